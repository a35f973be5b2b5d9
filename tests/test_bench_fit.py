"""`crossent bench fit`: what is fitted, what counts as reached, and what is told of it."""

import dataclasses
import json
import math
import os
import re
import sys
from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("typer")

from scipy import sparse

from crossent import cli
from crossent.cli.bench import bench_fit, fit_contest, fit_process, fit_tasks, picture, show, timing
from crossent.cli.bench.fit_contest import Climb, Step, contest, near, objective
from crossent.cli.bench.fit_process import Done, Limits, TooLong, Unfinished
from crossent.cli.bench.fit_results import grouped
from crossent.cli.bench.fit_solvers import SOLVERS, Fitted
from crossent.cli.bench.fit_tasks import TASKS, FitProblem, FitTask
from crossent.cli.bench.machine import machine
from crossent.cli.bench.picture import draw
from crossent.cli.bench.results import Report

NAMES = [solver.name for solver in SOLVERS]
BY_NAME = {solver.name: solver for solver in SOLVERS}
ONCE = timing.Effort(0.0, 1, 1)


def problem(dtype="float64", c=2.0):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((40, 3)).astype(dtype)
    return FitProblem(features, np.arange(40) % 4, c)


def in_csr(given):
    return dataclasses.replace(given, features=sparse.csr_matrix(given.features))


def done(value=0.0, seconds=1.0, nbytes=0):
    return Done(Fitted(np.full((4, 3), value), np.zeros(4), 7), seconds, nbytes, "by hand")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run `crossent bench fit --quick` in an empty folder, its fits in this process."""
    monkeypatch.chdir(tmp_path)

    def fit(folder, solver, tol, threads, limits):
        return Done(BY_NAME[solver].fit(fit_tasks.load(folder), tol), 1.0, 2**21, "by hand")

    monkeypatch.setattr(fit_process, "fit", fit)

    def run(*arguments):
        line = ["crossent", "bench", "fit", "--quick", "--threads", "1"]
        monkeypatch.setattr(sys, "argv", [*line, *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code, *capsys.readouterr()

    return run


# The command --------------------------------------------------------------------------------------


def test_a_quick_run_writes_its_folder(run, tmp_path):
    status, _, err = run("--tasks", "digits")
    assert (status, err) == (0, "")
    folder = tmp_path / "crossent-bench-fit"
    assert sorted(os.listdir(folder)) == ["fit.json", "fit.md", "fit.png"]
    assert (folder / "fit.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((folder / "fit.json").read_text())
    assert (report["benchmark"], report["threads"], report["quick"]) == ("fit", 1, True)
    assert {peer["name"]: peer["skipped"] for peer in report["peers"]} == dict.fromkeys(NAMES)

    (group,) = report["results"]
    assert (group["shape"], group["logits"], group["features"]) == ("digits", [300, 10], 64)
    assert (group["task"], group["dtype"], group["c"]) == ("fit", "float64", 1.0)
    assert [each["name"] for each in group["times"]] == NAMES
    steps = {name: each["steps"] for name, each in group["fits"].items()}
    for name, found in steps.items():
        tolerances = [step["tol"] for step in found]
        assert tolerances == sorted(tolerances, reverse=True)
        assert {1e-4, 1e-6, 1e-8} <= set(tolerances)
        reached = group["reached"][name]
        assert reached in found
        assert reached["objective"] <= group["goal"] * (1 + group["slack"])
        assert reached["tol"] == 3e-4 or any(
            each["objective"] > group["goal"] * (1 + group["slack"])
            for each in found
            if each["tol"] > reached["tol"]
        )
    theirs = [s["objective"] for name in NAMES[2:] for s in steps[name]]
    assert group["goal"] == min(theirs)
    assert group["lowest"] == min(s["objective"] for found in steps.values() for s in found)
    assert group["memory"] == dict.fromkeys(NAMES, 2**21)

    page = (folder / "fit.md").read_text()
    assert "### fit of 300×64×10, float64: handwritten digits" in page
    assert "| over the best of scikit-learn | tol | steps | above | memory |" in page
    assert "A fit may take 10 s and 4 GB." in page


def test_who_is_not_asked_for_does_not_fit(run, tmp_path):
    assert run("--tasks", "digits", "--peers", "sklearn-newton-cg")[0] == 0
    report = json.loads((tmp_path / "crossent-bench-fit" / "fit.json").read_text())
    skipped = {peer["name"]: peer["skipped"] for peer in report["peers"]}
    assert [name for name, why in skipped.items() if why is None] == [NAMES[0], NAMES[3]]
    assert list(report["results"][0]["fits"]) == [NAMES[0], NAMES[3]]


def test_a_hessian_beyond_the_limit_is_not_tried(run, tmp_path):
    status, out, _ = run("--tasks", "digits", "--memory", "0.002", "--peers", NAMES[4])
    why = "its Hessian takes 0.00315 GB, the limit is 0.002"
    assert status == 0
    assert f"  {NAMES[4]}: skipped, {why}\n" in out
    (group,) = json.loads((tmp_path / "crossent-bench-fit" / "fit.json").read_text())["results"]
    assert group["skipped"] == {NAMES[4]: why}
    assert f"{650**2 * 8 / 2**30:.3g}" == "0.00315"  # (64 + 1) × 10 numbers, squared
    assert group["goal_of"].startswith("crossent newton-cg")  # no peer came to an end


def test_a_task_without_its_data_is_skipped(run, monkeypatch, tmp_path):
    monkeypatch.setattr(fit_tasks.data, "FASHION_MNIST_FOLDER", tmp_path / "none")
    assert run("--tasks", "fashion-mnist")[0] == 2
    assert os.listdir(tmp_path) == []
    status, out, _ = run("--tasks", "digits,fashion-mnist", "--peers", "sklearn-lbfgs")
    assert status == 0
    assert "\nfashion-mnist: skipped, " in out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--tasks", "iris"), "--tasks names 'iris'; there are digits, fashion-mnist, text, "),
        (("--peers", "saga"), "--peers names 'saga'; there are crossent-lbfgs, sklearn-lbfgs, "),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, arguments, line):
    status, out, err = run(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert line in err
    assert os.listdir(tmp_path) == []


# What is fitted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_class_of_a_task_has_rows(task):
    if task.name == "fashion-mnist" and not fit_tasks.data.FASHION_MNIST_FOLDER.exists():
        pytest.skip("Fashion-MNIST is not installed")
    made = task.make(True)
    rows, _, classes = made.sizes
    assert len(made.labels) == rows
    assert classes >= 10
    assert np.bincount(made.labels).min() > 0
    assert made.dtype == ("float64" if task.name in ("digits", "text") else "float32")
    assert (made.density < 0.1) == (task.name == "text")


def test_the_whole_many_classes():
    assert TASKS[3].make(False).sizes == (10_000, 128, 1000)


def test_pieces_of_the_library(tmp_path):
    files = {"json/tool.py": 21, "ast.py": 10, "test/test_ast.py": 30, "site-packages/x.py": 30}
    for name, lines in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(f"{name} {k}\n" for k in range(lines)))
    found = list(fit_tasks.library_snippets(tmp_path))
    assert [package for package, _ in found] == ["ast", "json", "json"]
    assert found[2][1].splitlines() == [f"json/tool.py {k}" for k in range(10, 20)]


@pytest.mark.parametrize("given", [problem("float32"), in_csr(problem())], ids=["dense", "CSR"])
def test_a_problem_comes_back_from_its_files(given, tmp_path):
    fit_tasks.save(given, tmp_path)
    found = fit_tasks.load(tmp_path)
    assert type(found.features) is type(given.features)
    assert (found.dtype, found.c, found.sizes) == (given.dtype, given.c, (40, 3, 4))
    difference = found.features - given.features
    assert np.abs(difference).max() == 0
    np.testing.assert_array_equal(found.labels, given.labels)
    tiny = fit_tasks.tiny(found)
    assert (type(tiny.features), tiny.dtype) == (type(given.features), given.dtype)


def test_a_solver_is_what_its_name_says():
    found = [(type(each).__name__, each.solver) for each in (s.classifier() for s in SOLVERS)]
    ours, theirs = "SoftmaxClassifier", "LogisticRegression"
    assert found[:2] == [(ours, "newton-cg"), (ours, "lbfgs")]
    assert found[2:] == [(theirs, name.removeprefix("sklearn-")) for name in NAMES[2:]]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.name)
def test_every_solver_finds_the_minimum_in_the_dtype(solver, dtype):
    given = problem(dtype)
    found = solver.fit(given, 1e-5)
    assert found.coef.dtype == found.intercept.dtype == dtype
    exact = objective(problem(), BY_NAME["sklearn-newton-cholesky"].fit(problem(), 1e-12))
    assert objective(given, found) == pytest.approx(exact, rel=1e-6)
    assert found.iterations > 0


# The objective ------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [problem(), in_csr(problem())], ids=["dense", "CSR"])
def test_the_objective_by_hand(given, monkeypatch):
    monkeypatch.setattr(fit_contest, "_BLOCK", 12)  # three rows at a time
    rng = np.random.default_rng(1)
    coef, intercept = rng.standard_normal((4, 3)), rng.standard_normal(4)
    total = []
    for row, label in zip(problem().features, given.labels, strict=True):
        z = [float(w @ row) + float(b) for w, b in zip(coef, intercept, strict=True)]
        total.append(math.log(sum(map(math.exp, z))) - z[label])
    expected = 2.0 * math.fsum(total) + math.fsum(w * w for w in coef.flat) / 2
    assert objective(given, Fitted(coef, intercept, 1)) == pytest.approx(expected, rel=1e-13)


def test_the_objective_is_computed_in_float64():
    coef = np.full((4, 3), 0.1, np.float32)
    given = problem("float32")
    wide = dataclasses.replace(given, features=given.features.astype(np.float64))
    expected = objective(wide, Fitted(coef.astype(np.float64), np.zeros(4), 1))
    assert objective(given, Fitted(coef, np.zeros(4, np.float32), 1)) == expected


# Who is near enough, and when ---------------------------------------------------------------------


def climbed(monkeypatch, script, tolerances=(1e-3, 1e-4, 1e-5, 1e-6), effort=ONCE):
    """Return the climbs of solvers whose objectives, by tolerance, a script gives."""
    monkeypatch.setattr(fit_contest, "objective", lambda given, fitted: fitted.coef[0, 0])
    asked = []

    def fit(solver, tol):
        asked.append((solver.name, tol))
        answer = script[solver.name].get(tol)
        if answer is None:
            raise TooLong("takes more than 9 s")
        return done(answer, seconds=1e-4 / tol, nbytes=len(asked))

    solvers = [BY_NAME[name] for name in script]
    found = contest(problem(), solvers, fit, tolerances, effort, lambda text: None)
    return {climb.solver.name: climb for climb in found}, asked


OURS, LBFGS, NEWTON = NAMES[0], NAMES[2], NAMES[3]


def test_the_first_tolerance_that_is_near_enough_counts(monkeypatch):
    script = {
        OURS: {1e-3: 2.0, 3e-4: 1.1, 1e-4: 1.000_000_9, 1e-5: 0.5, 1e-6: None},
        LBFGS: {1e-3: 2.0, 1e-4: 1.5, 1e-5: 1.000_001_1, 3e-6: 1.000_000_9, 1e-6: 1.0},
        NEWTON: {1e-3: 1.7, 1e-4: 1.6, 1e-5: None},
    }
    climbs, _ = climbed(monkeypatch, script)
    reached = {name: climb.reached and climb.reached.tol for name, climb in climbs.items()}
    assert reached == {OURS: 1e-4, LBFGS: 3e-6, NEWTON: None}
    assert climbs[NEWTON].ended == "takes more than 9 s at tolerance 1e-05"
    late = a_group(climbs.values()).beyond()
    assert [(each.name, each.timing.median) for each in late] == [(NEWTON, 9.0)]
    goal = fit_contest.target(list(climbs.values()))
    assert goal == climbs[LBFGS].steps[-1]  # ours went lower, but scikit-learn's is the goal
    assert [step.tol for step in climbs[OURS].steps] == [1e-3, 3e-4, 1e-4, 1e-5]


def test_a_solver_stops_where_tolerances_gain_nothing(monkeypatch):
    flat = {1e-3: 1.0, 1e-4: 1.0 - 0.9e-7, 1e-5: 1.0 - 1.8e-7, 3e-3: 2.0}
    steep = {1e-3: 1.0, 1e-4: 1.0 - 1.2e-7, 1e-5: 1.0 - 2.0e-7, 1e-6: 1.0 - 2.1e-7, 3e-3: 2.0}
    climbs, asked = climbed(monkeypatch, {LBFGS: flat, NEWTON: steep})
    assert [tol for name, tol in asked if name == LBFGS] == [1e-3, 1e-4, 1e-5, 3e-3]
    assert (NEWTON, 1e-6) in asked
    assert climbs[LBFGS].ended == climbs[NEWTON].ended == "settled"


def test_without_an_end_of_any_peer_the_lowest_is_the_goal(monkeypatch):
    script = {OURS: {1e-3: 2.0, 1e-4: 1.0, 1e-5: 1.0, 1e-6: 1.0, 3e-4: 1.5}, LBFGS: {}}
    climbs, _ = climbed(monkeypatch, script)
    assert climbs[OURS].reached.tol == 1e-4
    group = a_group(climbs.values())
    assert group.goal_of == "crossent newton-cg, tolerance 1e-04"
    assert group.skipped == {LBFGS: "takes more than 9 s at tolerance 1e-03"}


def test_nobody_comes_to_an_end(monkeypatch):
    climbs, _ = climbed(monkeypatch, {OURS: {}, LBFGS: {}})
    group = a_group(climbs.values())
    assert (group.goal, group.lowest, group.times) == (None, None, ())
    assert set(group.skipped) == {OURS, LBFGS}
    assert group.note() == "Made by hand."


def test_fits_that_count_are_made_again(monkeypatch):
    script = {name: {1e-3: 1.0, 3e-3: 2.0} for name in (OURS, LBFGS)}
    climbs, asked = climbed(monkeypatch, script, (1e-3,), timing.Effort(0.25, 1, 5))
    assert {name: len(climb.again) for name, climb in climbs.items()} == {OURS: 3, LBFGS: 3}
    assert {tol for _, tol in asked[-4:]} == {1e-3}
    assert {name for name, _ in asked[-4:-2]} == {name for name, _ in asked[-2:]} == {OURS, LBFGS}
    group = a_group(climbs.values())
    assert group.times[0].timing == timing.summary([0.1] * 3, 1)
    assert group.memory == {n: max(s.nbytes for s in climbs[n].again) for n in (OURS, LBFGS)}


@pytest.mark.parametrize("goal", [1.0, 50.0])
def test_near_is_a_millionth(goal):
    def at(value):
        return Step(1e-3, 1.0, 0, 1, value)

    assert near(at(goal * (1 + 0.99e-6)), at(goal))
    assert near(at(goal / 2), at(goal))
    assert not near(at(goal * (1 + 1.01e-6)), at(goal))


# Processes ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    fit_tasks.save(problem("float32"), tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [NAMES[0], NAMES[3]])
def test_a_process_fits_as_we_do(folder, name):
    found = fit_process.fit(folder, name, 1e-4, 1, Limits(60, 2**30))
    here = BY_NAME[name].fit(problem("float32"), 1e-4)
    np.testing.assert_allclose(found.fitted.coef, here.coef, rtol=1e-4, atol=1e-5)
    assert found.fitted.coef.dtype == np.float32
    assert found.fitted.iterations == here.iterations
    assert found.seconds > 0
    assert "VmHWM" in found.how or "maxrss" in found.how


def test_who_takes_too_long_is_ended(folder):
    with pytest.raises(TooLong, match=r"^takes more than 1e-05 s$"):
        fit_process.fit(folder, NAMES[2], 1e-8, 1, Limits(1e-5, 2**30))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits are Linux's")
def test_who_takes_too_much_is_ended(tmp_path):
    rows = np.random.default_rng(0).standard_normal((400, 300))
    fit_tasks.save(FitProblem(rows, np.arange(400) % 10, 1.0), tmp_path)
    with pytest.raises(Unfinished, match=r"^takes more than 0.00977 GB of memory$"):
        fit_process.fit(tmp_path, NAMES[4], 1e-4, 1, Limits(60, 10 * 2**20))  # a Hessian of 72 MB


def test_who_fails_says_why(tmp_path):
    given = problem()
    given.features[3, 1] = np.nan
    fit_tasks.save(given, tmp_path)
    with pytest.raises(Unfinished, match=r"^failed: Input X contains NaN"):
        fit_process.fit(tmp_path, NAMES[2], 1e-4, 1, Limits(60, 2**30))


def test_a_process_is_told_its_threads(folder, monkeypatch):
    told = {}

    def run(command, env, **options):
        told.update(env)
        raise OSError

    monkeypatch.setattr(fit_process.subprocess, "run", run)
    with pytest.raises(Unfinished, match="failed: OSError"):
        fit_process.fit(folder, NAMES[0], 1e-4, 3, Limits(60, 2**30))
    for pool in ("OMP", "OPENBLAS", "MKL", "CROSSENT"):
        assert told[f"{pool}_NUM_THREADS"] == "3"


# Tables and picture -------------------------------------------------------------------------------


def climb(name, *steps, ended="", reached=None):
    given = [Step(*step) for step in steps]
    found = Climb(BY_NAME[name], given, ended, bool(ended), how="by hand")
    if reached is not None:
        found.reached = given[reached]
        found.again = [found.reached]
    return found


CLIMBS = (
    climb(OURS, (1e-3, 1.0, 5, 4, 1.5), (1e-4, 2.0, 3 * 2**20, 6, 1.0), reached=1),
    climb(LBFGS, (1e-4, 8.0, 2**20, 90, 1.000_000_5), reached=0),
    climb(NEWTON, (1e-4, 4.0, 2**21, 5, 1.000_000_25), reached=0),
    climb(NAMES[4], (1e-3, 30.0, 2**21, 5, 1.3), ended="takes more than 9 s at tolerance 1e-04"),
)


def a_group(climbs=CLIMBS, name="small"):
    task = FitTask(name, "a small task", "Made by hand.", lambda quick: problem())
    return grouped(task, problem(), list(climbs), {}, 9.0)


def a_report(*groups):
    about = machine() | {"cpu": "A processor", "isa": "x86-64-v3"}
    date = "2026-01-02T03:04:05"
    return Report(bench_fit.WORDS, date, 2, about, {"numpy": "2"}, "So.", False, (), groups)


def test_the_tables_by_hand():
    page = show.markdown(a_report(a_group()))
    assert "| data | dtype | N×D×V | best of scikit-learn | its lbfgs | its newton-cg | " in page
    ratios = "0.50 (scikit-learn newton-cg) | 0.25 | 0.50 | – | – | – |"
    assert f"| small | float64 | 40×3×4 | {ratios}\n" in page
    assert "| **crossent newton-cg** | 2000 ms | ± 0 % | 0.50 | 1e-04 | 6 | 0 | 3 MB |" in page
    assert "| scikit-learn lbfgs | 8000 ms | ± 0 % | 2.00 | 1e-04 | 90 | 5e-07 | 1 MB |" in page
    assert "To reach: 1.00000025 (scikit-learn newton-cg, tolerance 1e-04)" in page
    assert "The lowest of all, 1 (crossent newton-cg, tolerance 1e-04), is 2.5e-07 below" in page
    why = (
        "takes more than 9 s at tolerance 1e-04; its lowest objective, at tolerance 1e-03 after "
        "30 s, is 3.0e-01 too high"
    )
    assert f"Left out: {NAMES[4]}: {why}." in page
    block = show.block(a_group(), bench_fit.WORDS)
    assert f"  {NAMES[4]}: skipped, {why}" in block
    assert re.search(r"tol +steps +above +memory$", block.splitlines()[1])
    lines = [line for line in block.splitlines() if "±" in line]
    assert all(
        float(a.split("×")[0].split()[-1]) <= float(b.split("×")[0].split()[-1])
        for a, b in pairwise(lines)
    )


def test_the_picture_is_drawn_for_any_groups(tmp_path):
    alone = a_group(CLIMBS[:1])
    for k, groups in enumerate(([a_group(), alone], [alone], [])):
        draw(a_report(*groups), tmp_path / f"{k}.png")
        assert (tmp_path / f"{k}.png").stat().st_size > 1000


def test_who_took_too_long_is_drawn_with_an_arrow(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(picture, "_arrow", lambda axes, place, each, unit: drawn.append(each.name))
    draw(a_report(a_group(), a_group(CLIMBS[:3])), tmp_path / "drawn.png")
    assert drawn == [NAMES[4]]
