"""`crossent bench`: ratios, tables and pictures of times made by hand."""

import dataclasses
import re

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("typer")

from crossent.cli.bench import machine, picture, show, timing
from crossent.cli.bench.bench_rows import ROWS
from crossent.cli.bench.bench_torch_rows import TORCH_ROWS
from crossent.cli.bench.picture import draw
from crossent.cli.bench.results import Group, Report, Timed


def timed(name, kind, output, median):
    return Timed(name, name.upper(), kind, output, timing.summary([median] * 3, 1))


def group(*times, dtype="float32", task="loss+gradient"):
    return Group("digits", "10 digits", (8, 10), -1, dtype, task, 320, times)


MAIN = (
    timed("crossent", "crossent", "fresh", 6.0),
    timed("crossent", "crossent", "kept", 4.0),
    timed("torch", "peer", "fresh", 30.0),
    timed("jax", "peer", "fresh", 12.0),
    timed("numpy", "peer", "fresh", 24.0),
    timed("numpy", "peer", "kept", 8.0),
    timed("copy", "copy", "fresh", 3.0),
    timed("copyto", "copy", "kept", 5.0),
    timed("threads", "copy", "kept", 2.5),
    timed("stream", "copy", "kept", 2.0),
)


def test_ratios_by_hand():
    found = {(r.output, r.over): (r.which, r.value) for r in group(*MAIN).ratios()}
    assert found == {
        ("fresh", "TORCH"): ("TORCH", 0.2),
        ("fresh", "JAX"): ("JAX", 0.5),
        ("fresh", "NUMPY"): ("NUMPY", 0.25),
        ("fresh", "best peer"): ("JAX", 0.5),  # numpy's kept output is no rival of a fresh one
        ("fresh", "x.copy()"): ("COPY", 2.0),
        ("kept", "TORCH"): ("TORCH", 4 / 30),
        ("kept", "JAX"): ("JAX", 4 / 12),
        ("kept", "NUMPY"): ("NUMPY", 0.5),  # the faster of its two
        ("kept", "best peer"): ("NUMPY", 0.5),
        ("kept", "numpy.copyto"): ("COPYTO", 0.8),
        ("kept", "copy by all threads"): ("THREADS", 1.6),
        ("kept", "fastest copy"): ("STREAM", 2.0),
    }


def test_a_loss_alone_is_held_against_the_copies_too():
    times = [timed("crossent", "crossent", "none", 1.0), timed("torch", "peer", "none", 4.0)]
    found = {r.over: r.value for r in group(*times, *MAIN[6:], task="loss").ratios()}
    assert found == {
        "TORCH": 0.25,
        "best peer": 0.25,
        "numpy.copyto": 0.2,
        "copy by all threads": 0.4,
        "fastest copy": 0.5,
    }


def report(*groups, words=ROWS.words):
    about = machine.machine() | {"cpu": "A processor", "isa": "x86-64-v3"}
    who = ({"name": "torch", "title": "torch", "how": "eager", "skipped": None},)
    versions = {"crossent": "0", "numpy": "2"}
    return Report(words, "2026-01-02T03:04:05", 2, about, versions, "In turn.", False, who, groups)


def test_the_tables_by_hand():
    half = group(timed("crossent", "crossent", "kept", 3.0), *MAIN[6:], dtype="bfloat16")
    whole = report(group(*MAIN), half)
    assert [(r.output, r.value) for r in whole.over_float32(half)] == [("kept", 0.75)]
    assert whole.over_float32(whole.groups[0]) == []
    lines = [" ".join(line.split()) for line in show.summary(whole).splitlines()]
    assert lines[-2] == "loss+gradient float32 8×10 0.50 (JAX) 2.00 0.80 1.60 2.00 –"
    assert lines[-1] == "loss+gradient bfloat16 8×10 – – 0.60 1.20 1.50 0.75"
    page = show.markdown(whole)
    assert "| loss+gradient | float32 | 8×10 | 0.50 (JAX) | 2.00 | 0.80 | 1.60 | 2.00 | – |" in page
    assert "| **CROSSENT, out=** | 4000 ms | ± 0 % | 2.00 |" in page
    block = show.block(group(*MAIN), ROWS.words).splitlines()
    assert block[2].split() == ["STREAM", "2000", "ms", "±", "0", "%", "1.00", "×"]
    assert block[-1].split()[0] == "TORCH"


FROM_TORCH = (
    timed("crossent", "crossent", "fresh", 2.0),
    timed("crossent-compile", "crossent", "fresh", 3.0),
    timed("torch", "peer", "fresh", 8.0),
    Timed("torch-compile", "torch.compile", "peer", "fresh", timing.summary([4.0], 1)),
)


def test_the_tables_from_torch_by_hand():
    times = [dataclasses.replace(each, title=each.title.lower()) for each in FROM_TORCH]
    half = [dataclasses.replace(each, timing=timing.summary([1.0], 1)) for each in times]
    whole = report(group(*times), group(*half, dtype="bfloat16"), words=TORCH_ROWS.words)
    heads, *lines = show.summary(whole).splitlines()[-3:]
    assert re.split(" {2,}", heads)[3:-1] == [column.head for column in TORCH_ROWS.words.columns]
    assert lines[0].split()[3:] == ["0.25", "0.50", "0.38", "0.75", "–"]
    assert lines[1].split()[3:] == ["1.00", "1.00", "1.00", "1.00", "0.50"]  # not compiled's 0.33
    block = [line.split() for line in show.block(whole.groups[0], whole.words).splitlines()]
    assert [line[-2] for line in block[2:]] == ["0.25", "0.38", "0.50", "1.00"]


@pytest.mark.parametrize("words", [ROWS.words, TORCH_ROWS.words], ids=lambda words: words.name)
def test_the_picture_is_drawn_for_any_groups(tmp_path, words):
    every = [group(*MAIN)], [group(*MAIN[:3], task="loss")], [group(*FROM_TORCH)], []
    for k, groups in enumerate(every):
        draw(report(*groups, words=words), tmp_path / f"{k}.png")
        assert (tmp_path / f"{k}.png").stat().st_size > 1000


def test_only_where_an_output_is_kept_is_another_called_new():
    ours = FROM_TORCH[0]
    assert picture._legend_label(ours, group(*MAIN)) == "CROSSENT, new array"
    assert picture._legend_label(ours, group(*FROM_TORCH)) == "CROSSENT"
