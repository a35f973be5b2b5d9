"""Ctrl-C during `crossent train`: real signals to a real process that waits for them."""

import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("polars")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")
pytest.importorskip("typer")
from crossent.cli.errors import InputError
from crossent.cli.output import new_folder

FILES = ["metrics.json", "model.safetensors", "report.html"]
OURS = frozenset(FILES)

# The command, but where it prints a line that holds the next of the given texts it goes on only
# after a signal. So a signal cannot come too late, whatever the machine is busy with.
WAITING = """
import sys, time
from rich.console import Console
texts, sys.argv = sys.argv[1].split("|"), ["crossent", *sys.argv[2:]]
printed = Console.print
def print_and_wait(self, *objects, **options):
    printed(self, *objects, **options)
    if texts and objects and texts[0] in str(objects[0]):
        del texts[0]
        sys.stdout.flush()
        for _ in range(1200):
            time.sleep(0.05)
        raise SystemExit("no signal came")
Console.print = print_and_wait
from crossent.cli import main
main()
"""


def interrupted(folder, texts, *arguments):
    """Run `crossent train`, interrupt it at each of the texts; return status, lines and stderr."""
    lines = []
    with subprocess.Popen(
        [sys.executable, "-c", WAITING, "|".join(texts), "train", *map(str, arguments)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        for text in texts:
            for line in process.stdout:
                lines.append(line.rstrip("\n"))
                if text in line:
                    break
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    return process.returncode, lines + out.splitlines(), err


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    y = np.arange(240) % 4
    x = rng.normal(size=(4, 6))[y] + rng.normal(size=(240, 6))
    np.savez(tmp_path / "t.npz", X=x, y=y)
    return tmp_path


def metrics_of(folder):
    return json.loads((folder / "crossent-t" / "metrics.json").read_text())


def test_a_fit_keeps_its_last_iterate(data):
    from safetensors.numpy import load_file

    from crossent.sklearn import SoftmaxClassifier

    status, lines, err = interrupted(data, ["iteration    2"], "t.npz", "--scale", "none")
    assert (status, err) == (3, "")
    assert sorted(os.listdir(data / "crossent-t")) == FILES
    metrics = metrics_of(data)
    assert metrics["interrupted"] is True
    assert metrics["fit"]["interrupted"] is True
    assert metrics["fit"]["converged"] is False
    assert metrics["fit"]["iterations"] == 2
    assert [record["iteration"] for record in metrics["fit"]["history"]] == [0, 1, 2]
    assert any(line.startswith("interrupted: keeping the best model") for line in lines)
    assert any(line.startswith("interrupted after 2 iterations") for line in lines)
    report = (data / "crossent-t" / "report.html").read_text()
    assert "Ctrl-C ended the fit after 2 iterations" in report

    from sklearn.model_selection import train_test_split

    with np.load(data / "t.npz") as file:
        x, y = file["X"], file["y"]
    rows, _ = train_test_split(np.arange(len(y)), test_size=0.2, random_state=0, stratify=y)
    rows.sort()
    same = SoftmaxClassifier(tol=1e-6, callback=lambda progress: progress.iteration == 2)
    same.fit(x[rows], y[rows])
    np.testing.assert_array_equal(
        load_file(data / "crossent-t" / "model.safetensors")["coef"], same.coef_
    )


def test_before_the_first_iteration_there_is_nothing_to_keep(data):
    status, _, err = interrupted(data, ["iteration    0"], "t.npz")
    assert (status, err) == (130, "crossent: interrupted\n")
    assert os.listdir(data) == ["t.npz"]


def test_a_path_keeps_the_best_of_the_cs_that_are_finished(data):
    cs = ["--select-penalty", "--Cs", "1e-4,1e-3,0.1,1,10"]
    status, lines, err = interrupted(data, ["     0.1  "], "t.npz", *cs)
    assert (status, err) == (3, "")
    metrics = metrics_of(data)
    selection = metrics["penalty_selection"]
    assert metrics["interrupted"] is True
    assert metrics["fit"]["interrupted"] is False
    assert metrics["fit"]["converged"] is True
    assert [point["C"] for point in selection["path"]] == [1e-4, 1e-3, 0.1]
    assert selection["not_tried"] == [1, 10]
    assert selection["ended_by"] == "interrupt"
    assert metrics["fit"]["C"] == selection["best_C"] == 0.1
    assert "2 larger Cs not tried: interrupted" in lines
    report = (data / "crossent-t" / "report.html").read_text()
    assert "Ctrl-C ended the choice of the penalty after 3 of 5 Cs" in report


def test_a_path_without_a_finished_c_has_nothing_to_keep(data):
    status, _, err = interrupted(data, ["held-out loss"], "t.npz", "--select-penalty")
    assert (status, err) == (130, "crossent: interrupted\n")
    assert os.listdir(data) == ["t.npz"]


@pytest.mark.parametrize("extra", [(), ("--select-penalty", "--Cs", "0.1,1,10")])
def test_a_second_time_nothing_is_written_and_the_older_folder_stays(data, extra):
    old = data / "crossent-t"
    old.mkdir()
    (old / "metrics.json").write_text("old")
    first = "     0.1  " if extra else "iteration    1"
    status, _, err = interrupted(data, [first, "keeping"], "t.npz", "--force", *extra)
    assert (status, err) == (130, "crossent: interrupted\n")
    assert sorted(os.listdir(data)) == ["crossent-t", "t.npz"]
    assert os.listdir(old) == ["metrics.json"]
    assert (old / "metrics.json").read_text() == "old"


def test_no_folder_is_lost_while_two_change_places(tmp_path, monkeypatch):
    """A signal after each rename: the older folder or the new one is there, whole."""
    from pathlib import Path

    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "metrics.json").write_text("old")
    renamed = []
    rename = Path.rename

    def rename_and_interrupt(path, target):
        renamed.append(target)
        rename(path, target)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Path, "rename", rename_and_interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with new_folder(folder, True, OURS) as staging:
            (staging / "metrics.json").write_text("new")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(renamed) == 2
    assert os.listdir(tmp_path) == ["out"]
    assert (folder / "metrics.json").read_text() == "new"


def test_while_the_files_are_written_it_still_ends_everything(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", False, OURS):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert os.listdir(tmp_path) == []


def test_a_folder_is_made_in_another_thread_too(tmp_path):
    failed = []

    def make():
        try:
            with new_folder(tmp_path / "out", False, OURS):
                pass
        except (InputError, ValueError) as error:
            failed.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert not failed
    assert os.listdir(tmp_path) == ["out"]
