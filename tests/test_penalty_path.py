"""`crossent train --select-penalty`: the numbers of plain cross-validation, and no leakage."""

import json
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("polars")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")
pytest.importorskip("typer")
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from sklearn.model_selection import StratifiedKFold, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from crossent import cli

SEED, TOL = 5, 1e-6


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run `crossent train` on x, y; return exit status, stdout, stderr and the metrics."""

    def run(x, y, *arguments, output="out"):
        np.savez(tmp_path / "t.npz", X=x, y=y)
        folder = tmp_path / output
        words = ["crossent", "train", tmp_path / "t.npz", "-o", folder, *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        with pytest.raises(SystemExit) as exit:
            cli.main()
        path = folder / "metrics.json"
        metrics = json.loads(path.read_text()) if path.exists() else None
        return exit.value.code, *capsys.readouterr(), metrics

    return run


def rows(classes=3, count=150, spread=1.0, seed=0):
    """Clusters, with a few rows so far out that they move a scaling they take part in."""
    rng = np.random.default_rng(seed)
    y = np.arange(count) % classes
    x = rng.normal(size=(classes, 4))[y] + spread * rng.normal(size=(count, 4))
    x[::29] *= 6
    return x, y


def test_the_numbers_are_those_of_cold_fits_scaled_without_the_held_out_rows(run):
    x, y = rows()
    cs = [0.01, 0.3, 10.0]
    options = ("--seed", SEED, "--tol", TOL, "--folds", 4, "--select-penalty")
    status, _, err, metrics = run(x, y, *options, "--Cs", "10,0.01,0.3")
    assert (status, err) == (0, "")
    selection = metrics["penalty_selection"]
    assert [point["C"] for point in selection["path"]] == cs

    train, _ = train_test_split(np.arange(len(y)), test_size=0.2, random_state=SEED, stratify=y)
    train.sort()
    x, y = x[train], y[train]
    folds = list(StratifiedKFold(4, shuffle=True, random_state=SEED).split(x, y))
    for point in selection["path"]:
        exact = LogisticRegression(C=point["C"], tol=1e-8, solver="newton-cholesky")
        model = make_pipeline(StandardScaler(), exact)
        losses, hits, sizes = [], [], [len(out) for _, out in folds]
        for kept, out in folds:
            model.fit(x[kept], y[kept])
            losses.append(log_loss(y[out], model.predict_proba(x[out])))
            hits.append(accuracy_score(y[out], model.predict(x[out])))
        np.testing.assert_allclose(point["fold_losses"], losses, rtol=1e-4)
        mean = np.average(losses, weights=sizes)
        error = np.sqrt(np.average((np.array(losses) - mean) ** 2, weights=sizes) / 3)
        assert point["loss"] == pytest.approx(mean, rel=1e-4)
        assert point["standard_error"] == pytest.approx(error, rel=1e-3)
        assert point["accuracy"] == pytest.approx(np.average(hits, weights=sizes))
        model.fit(x, y)
        assert point["train_loss"] == pytest.approx(log_loss(y, model.predict_proba(x)), rel=1e-4)
        assert point["folds_converged"] == 4
        assert point["converged"]


def test_the_chosen_model_is_the_one_that_its_c_alone_gives(run, tmp_path):
    from safetensors.numpy import load_file

    x, y = rows()
    status, out, _, chosen = run(x, y, "--tol", TOL, "--select-penalty", "--Cs", "0.01,0.3,10")
    C = chosen["fit"]["C"]
    _, _, _, alone = run(x, y, "--tol", TOL, "--C", C, output="alone")
    assert status == 0
    assert f"best C {C:g}: held-out loss" in out
    assert alone["penalty_selection"] is None
    assert chosen["test"]["loss"] == pytest.approx(alone["test"]["loss"], rel=1e-4)
    one, other = (
        load_file(tmp_path / name / "model.safetensors")["coef"] for name in ("out", "alone")
    )
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_each_fit_starts_from_the_one_before(run):
    x, y = rows(classes=4, count=400)
    cs = ("--select-penalty", "--Cs", "1,1.0001,1.0002")
    _, _, _, metrics = run(x, y, *cs)
    first, *later = metrics["penalty_selection"]["path"]
    for point in later:
        assert sum(point["fold_iterations"]) < sum(first["fold_iterations"]) / 2
        assert point["iterations"] < first["iterations"]


def test_the_test_rows_have_no_part_in_it(run, tmp_path):
    x, y = rows()
    _, test = train_test_split(np.arange(len(y)), test_size=0.2, random_state=0, stratify=y)
    selection = ("--select-penalty", "--Cs", "0.1,1,10")
    _, _, _, before = run(x, y, *selection)
    x[test] = 1000 * np.random.default_rng(1).normal(size=(len(test), 4))
    _, _, _, after = run(x, y, *selection, output="other")
    assert before["test"]["loss"] != after["test"]["loss"]
    for metrics in (before, after):
        del metrics["penalty_selection"]["seconds"]
    assert before["penalty_selection"] == after["penalty_selection"]
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "other"))
    assert one == other


def test_the_one_standard_error_rule_takes_the_strongest_penalty_within_it(run):
    x, y = rows(spread=1.5)
    cs = ("--select-penalty", "--Cs", "1e-3,0.01,0.03,0.1,0.3,1,3")
    _, _, _, lowest = run(x, y, *cs)
    _, out, _, strong = run(x, y, *cs, "--one-se", output="strong")
    path = strong["penalty_selection"]["path"]
    assert path == lowest["penalty_selection"]["path"]
    losses = [point["loss"] for point in path]
    best = int(np.argmin(losses))
    limit = losses[best] + path[best]["standard_error"]
    expected = next(point["C"] for point in path if point["loss"] <= limit)
    assert expected < path[best]["C"]
    assert lowest["fit"]["C"] == lowest["penalty_selection"]["chosen_C"] == path[best]["C"]
    assert strong["fit"]["C"] == strong["penalty_selection"]["chosen_C"] == expected
    assert f"chosen C {expected:g}, the strongest penalty within one standard error" in out
    assert "--one-se" in strong["command"]


def test_the_default_grid_ends_where_the_loss_only_rises(run):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 10)), np.arange(300) % 2  # nothing to learn
    status, out, err, metrics = run(x, y, "--select-penalty")
    assert (status, err) == (0, "")
    selection = metrics["penalty_selection"]
    losses = [point["loss"] for point in selection["path"]]
    assert selection["ended_by"] == "rise"
    assert losses[-4] < losses[-3] < losses[-2] < losses[-1]
    best = min(selection["path"], key=lambda point: point["loss"])
    assert losses[-1] > best["loss"] + best["standard_error"]
    assert len(losses) + len(selection["not_tried"]) == 17
    assert selection["not_tried"][-1] == 1e4
    assert selection["best_on_edge"] == "strongest"
    assert "larger Cs not tried: the loss rose 3 times in a row" in out
    assert "the best C is the first of the grid, a smaller one may be better" in out


def test_cs_that_were_asked_for_are_all_tried(run):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 10)), np.arange(300) % 2
    cs = "1e-4,1e-3,0.01,0.1,1,10,100,1000,10000"
    _, _, _, metrics = run(x, y, "--select-penalty", "--Cs", cs)
    selection = metrics["penalty_selection"]
    losses = [point["loss"] for point in selection["path"]]
    assert len(losses) == 9
    assert losses[-3] < losses[-2] < losses[-1]
    assert (selection["ended_by"], selection["not_tried"]) == ("grid", [])


def test_a_best_c_at_the_weak_end_is_said(run, tmp_path):
    x, y = rows(classes=2, spread=0.1)
    _, out, _, metrics = run(x, y, "--select-penalty", "--Cs", "0.01,0.1")
    assert metrics["penalty_selection"]["best_on_edge"] == "weakest"
    advice = "the best C is the last of the grid, a larger one may be better; try larger ones"
    assert advice in out
    assert advice[1:] in (tmp_path / "out" / "report.html").read_text()


def test_a_class_may_have_fewer_rows_than_folds(run):
    x, y = rows()
    y[y == 2] = 0
    y[:5] = 2  # four to train, one to test
    status, _, err, metrics = run(x, y, "--select-penalty", "--Cs", "0.1,1", "--folds", 6)
    assert (status, err) == (0, "")
    assert [len(point["fold_losses"]) for point in metrics["penalty_selection"]["path"]] == [6, 6]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--C", "1", "--select-penalty"], "--C gives the penalty that --select-penalty is to"),
        (["--Cs", "0.1,1"], "--Cs is about the choice of C; add --select-penalty"),
        (["--folds", "3"], "--folds is about the choice of C; add --select-penalty"),
        (["--one-se"], "--one-se is about the choice of C; add --select-penalty"),
        (["--select-penalty", "--folds", "1"], "--folds"),
        (["--select-penalty", "--Cs", "1"], "--Cs is '1'; give two or more different numbers"),
        (["--select-penalty", "--Cs", "1,a"], "--Cs is '1,a'"),
        (["--select-penalty", "--Cs", "1,1.0"], "--Cs is '1,1.0'"),
        (["--select-penalty", "--Cs", "0,1"], "--Cs is '0,1'"),
        (["--select-penalty", "--Cs", "1,inf"], "--Cs is '1,inf'"),
        (["--select-penalty", "--Cs", "1,nan"], "--Cs is '1,nan'"),
        (["--select-penalty", "--folds", "41"], "no class has more than 40 training rows"),
    ],
)
def test_bad_options_are_one_line_and_exit_2(run, arguments, text):
    x, y = rows()
    status, _, err, metrics = run(x, y, *arguments)
    assert (status, metrics) == (2, None)
    assert err.startswith("crossent: ")
    assert err.count("\n") == 1
    assert text in err


def test_a_class_with_one_training_row_cannot_be_held_out(run):
    x, y = rows()
    y[y == 2] = 0
    y[:2] = 2
    status, _, err, _ = run(x, y, "--select-penalty", "--test-size", 0.5)
    assert status == 2
    assert "class '2' has a single training row, and --select-penalty needs two" in err
