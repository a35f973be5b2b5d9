"""`crossent bench`: what is timed and written, and the ratios; never how long anything took."""

import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("typer")

import crossent
from crossent import _native, cli
from crossent.cli.bench import contest, machine, peers, timing
from crossent.cli.bench.bench_head import HEAD
from crossent.cli.bench.bench_rows import ROWS
from crossent.cli.bench.bench_torch_rows import TORCH_ROWS
from crossent.cli.bench.inputs import output_like
from crossent.cli.bench.shapes import SHAPES, chosen
from crossent.cli.errors import InputError

FILES = ["rows.json", "rows.md", "rows.png"]
EFFORT = timing.Effort(0.0, 1, 1)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run `crossent bench` in an empty folder; return exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, benchmark="rows"):
        monkeypatch.setattr(sys, "argv", ["crossent", "bench", benchmark, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code, *capsys.readouterr()

    return run


def problem(task="loss+gradient", shape=(7, 5), axis=-1, dtype=np.float32):
    rng = np.random.default_rng(3)
    logits = rng.normal(size=shape).astype(dtype) * dtype(3)
    target = rng.integers(0, shape[axis], tuple(np.delete(shape, axis)))
    return peers.Problem(task, logits, target, axis, np.empty_like(logits), 1)


# The command --------------------------------------------------------------------------------------


def test_a_quick_run_writes_its_folder(run, tmp_path):
    arguments = ("--quick", "--repeats", 3, "--threads", 1, "--peers", "numpy,sklearn,scipy")
    shapes = "tiny,segmentation,imagenet"
    status, out, err = run(*arguments, "--shapes", shapes, "--output", "found")
    assert (status, err) == (0, "")
    assert sorted(os.listdir(tmp_path)) == ["found"]
    assert sorted(os.listdir(tmp_path / "found")) == FILES
    assert (tmp_path / "found" / "rows.png").read_bytes().startswith(b"\x89PNG")
    assert out.endswith("written to found: rows.json, rows.md, rows.png\n")

    report = json.loads((tmp_path / "found" / "rows.json").read_text())
    assert (report["benchmark"], report["threads"], report["quick"]) == ("rows", 1, True)
    assert report["isa"] == _native.isa()
    assert report["versions"]["numpy"] == np.__version__
    assert {"cpu", "caches", "cpus_usable", "system", "huge_pages"} <= set(report["machine"])
    assert "take turns" in report["method"]
    assert "bound to as many CPUs" in report["method"]
    skipped = {peer["name"]: peer["skipped"] for peer in report["peers"]}
    assert (skipped["numpy"], skipped["torch"]) == (None, "not asked for")

    groups = {(g["shape"], g["task"]): g for g in report["results"]}
    assert list(groups) == [
        *(("tiny", task) for task in ("loss+gradient", "loss")),
        ("segmentation", "loss+gradient"),
        *(("imagenet", task) for task in peers.TASKS),
    ]
    tiny = groups["tiny", "loss+gradient"]
    assert (tiny["logits"], tiny["nbytes"], tiny["dtype"]) == ([32, 10], 32 * 10 * 4, "float32")
    found = {(t["name"], t["output"]): t for t in tiny["times"]}
    assert set(found) == {
        *((name, output) for name in ("crossent", "numpy", "sklearn") for output in OUTPUTS),
        *(("copy", "fresh"), ("copyto", "kept"), ("threads", "kept"), ("stream", "kept")),
    }
    for each in found.values():
        assert 0 < each["lower"] <= each["median"] <= each["upper"]
        assert (each["n"], each["inner"] >= 1) == (3, True)
    of = {(r["output"], r["over"]): r for r in tiny["ratios"]}
    ours, copy = found["crossent", "fresh"], found["copy", "fresh"]
    assert of["fresh", "x.copy()"]["value"] == ours["median"] / copy["median"]

    assert groups["segmentation", "loss+gradient"]["skipped"]["sklearn"] == "takes rows (N, V) only"
    page = (tmp_path / "found" / "rows.md").read_text()
    assert "### loss+gradient of 8×21×64×64, float32, axis=1: 21-class segmentation maps" in page
    assert "Left out: sklearn: takes rows (N, V) only" in page
    assert all(line.count("|") == 10 for line in re.findall(r"^\| l.*float32 \| \d.*$", page, re.M))


OUTPUTS = ("fresh", "kept")


def test_bfloat16_is_held_against_float32(run, tmp_path):
    pytest.importorskip("ml_dtypes")
    arguments = ("--quick", "--repeats", 1, "--peers", "numpy", "--shapes", "vocab-32k")
    status, out, _ = run(*arguments, "--tasks", "loss+gradient")
    assert status == 0
    report = json.loads((tmp_path / "crossent-bench-rows" / "rows.json").read_text())
    plain, half = report["results"]
    assert (plain["dtype"], half["dtype"]) == ("float32", "bfloat16")
    assert half["nbytes"] * 2 == plain["nbytes"]
    assert {r["output"] for r in half["ratios"] if r["over"] == "float32"} == set(OUTPUTS)
    assert half["skipped"] == {"numpy": "takes float32, float64"}
    assert re.search(r"^loss\+gradient +bfloat16 +4×32768 ", out, re.M)


def test_a_peer_that_is_not_installed_is_skipped(run, monkeypatch, tmp_path):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    arguments = ("--quick", "--repeats", 1, "--shapes", "tiny", "--tasks", "loss")
    status, out, _ = run(*arguments, "--peers", "jax")
    assert status == 0
    assert "jax: skipped, jax is not installed\n" in out
    report = json.loads((tmp_path / "crossent-bench-rows" / "rows.json").read_text())
    assert {p["name"]: p["skipped"] for p in report["peers"]}["jax"] == "jax is not installed"
    assert report["results"][0]["times"][0]["name"] == "crossent"
    assert not [r for r in report["results"][0]["ratios"] if r["over"] == "best peer"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--shapes", "digits,words"), "--shapes names 'words'; there are tiny, digits, "),
        (("--dtypes", "float8"), "--dtypes names 'float8'; there are float64, float32, "),
        (("--tasks", "backward"), "--tasks names 'backward'; there are loss+gradient, loss, "),
        (("--peers", "numpy,mxnet"), "--peers names 'mxnet'; there are torch, torch-compile, "),
        (("--threads", 0), "--threads is 0, but this process may use "),
        (("--threads", 100_000), "--threads is 100000, but this process may use "),
        (("--output", "absent/x"), "absent is no folder, so x cannot be made there"),
        (("--output", "."), " exists already; choose another --output"),
        (("--repeats", 0), "--repeats"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, arguments, line):
    status, out, err = run("--quick", "--shapes", "tiny", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("crossent: ")
    assert line in err
    assert err.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_bench_alone_lists_what_there_is(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["crossent", "bench"])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    out, err = capsys.readouterr()
    assert (exit.value.code, err) == (0, "")
    assert re.search(r"^\s*rows +Loss and gradient", out, re.M)
    assert re.search(r"^\s*torch-rows +Loss and backward pass", out, re.M)
    assert re.search(r"^\s*head +Last layer, loss and gradients", out, re.M)


@pytest.mark.parametrize(
    ("benchmark", "tasks"), [(ROWS, peers.TASKS), (TORCH_ROWS, ()), (HEAD, HEAD.kinds.tasks)]
)
def test_help_names_every_choice(run, benchmark, tasks):
    _, out, _ = run("--help", benchmark=benchmark.words.name)
    text = "".join(out.replace("│", " ").split())
    for name in (*tasks, *(peer.name for peer in benchmark.peers())):
        assert name in text
    assert ("--tasks" in text) == (benchmark.tasks is None)


# The command from PyTorch -------------------------------------------------------------------------


def test_a_quick_run_from_torch_writes_its_folder(run, tmp_path):
    pytest.importorskip("torch")
    arguments = ("--quick", "--repeats", 2, "--threads", 1, "--peers", "torch")
    shapes = ("--shapes", "tiny,segmentation")
    status, out, err = run(*arguments, *shapes, benchmark="torch-rows")
    assert (status, err) == (0, "")
    folder = tmp_path / "crossent-bench-torch-rows"
    files = [f"torch-rows.{kind}" for kind in ("json", "md", "png")]
    assert sorted(os.listdir(folder)) == files
    assert (folder / "torch-rows.png").read_bytes().startswith(b"\x89PNG")
    assert out.endswith(f"written to crossent-bench-torch-rows: {', '.join(files)}\n")

    report = json.loads((folder / "torch-rows.json").read_text())
    assert report["benchmark"] == "torch-rows"
    assert report["method"].endswith("Every contender's x has the same memory.")
    skipped = {peer["name"]: peer["skipped"] for peer in report["peers"]}
    assert skipped == {
        "torch": None,
        "torch-compile": "not asked for",
        "crossent-compile": "not asked for",
    }
    found = [(group["shape"], group["task"]) for group in report["results"]]
    assert found == [(shape, "loss+gradient") for shape in ("tiny", "segmentation")]
    for group in report["results"]:
        median = {each["name"]: each["median"] for each in group["times"]}
        assert (set(median), group["skipped"]) == ({"crossent", "torch"}, {})
        over = {ratio["over"]: ratio["value"] for ratio in group["ratios"]}
        assert over["torch"] == over["best peer"] == median["crossent"] / median["torch"]

    page = (folder / "torch-rows.md").read_text()
    assert page.startswith("# crossent bench torch-rows, ")
    assert "eager](torch-rows.png)\n" in page
    assert "|  | time | spread | over torch |\n" in page
    assert re.search(r"^\| torch \| .* \| 1\.00 \|$", page, re.M)


def test_bfloat16_from_torch_is_held_against_float32(run, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("ml_dtypes")
    arguments = ("--quick", "--repeats", 1, "--shapes", "vocab-32k", "--peers", "torch")
    assert run(*arguments, "-o", "found", benchmark="torch-rows")[0] == 0
    plain, half = json.loads((tmp_path / "found" / "torch-rows.json").read_text())["results"]
    assert (plain["dtype"], half["dtype"]) == ("float32", "bfloat16")
    assert {each["name"] for each in half["times"]} == {"crossent", "torch"}, half["skipped"]
    assert "float32" in {ratio["over"] for ratio in half["ratios"]}


def test_without_torch_nothing_is_timed_from_it(run, monkeypatch, tmp_path):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    status, out, err = run("--quick", benchmark="torch-rows")
    wanted = "crossent: bench torch-rows needs torch; pip install 'crossent[torch]'\n"
    assert (status, out, err, os.listdir(tmp_path)) == (2, "", wanted, [])


def test_what_is_compiled_from_torch(monkeypatch):
    torch = pytest.importorskip("torch")
    from crossent.torch import cross_entropy

    asked = []

    def compile(function, **options):
        asked.append((function, options))
        return function

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch._dynamo, "reset", lambda: asked.append("reset"))
    found = contest.contest(TORCH_ROWS, problem(), TORCH_ROWS.peers(), EFFORT, lambda text: None)
    options = {"fullgraph": True, "dynamic": False}
    both = torch.nn.functional.cross_entropy, cross_entropy
    # a reset after the first had been compiled would have it compiled again while it is timed
    assert asked == ["reset", *((function, options) for function in both)]
    assert [(each.name, each.kind) for each in found[0]] == [
        ("crossent", "crossent"),
        ("torch", "peer"),
        ("torch-compile", "peer"),
        ("crossent-compile", "crossent"),
    ]
    assert found[1] == {}


def test_each_step_from_torch_makes_its_gradient_anew(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    given = problem(shape=(3, 5, 4, 2), axis=1)
    loss, grad = crossent.cross_entropy_value_and_grad(given.logits, given.target, axis=1)
    steps = [TORCH_ROWS.ours(given), *(peer.contenders(given) for peer in TORCH_ROWS.peers())]
    for (step,) in steps:
        for found in step.read(step.call()), step.read(step.call()):
            np.testing.assert_allclose(found[0], loss, rtol=1e-6)
            # subtracted from 1 in float32, divided by 24 rows
            np.testing.assert_allclose(found[1], grad, rtol=1e-5, atol=2**-22 / 24)


def test_our_step_from_torch_has_the_bits_of_numpy_s_function(dtype):
    pytest.importorskip("torch")  # what all contenders read wrongly, none of them would tell
    given = problem(dtype=dtype.type)
    expected = crossent.cross_entropy_value_and_grad(given.logits, given.target)
    (step,) = TORCH_ROWS.ours(given)
    for found, right in zip(step.read(step.call()), expected, strict=True):
        np.testing.assert_array_equal(found, np.asarray(right, found.dtype))


def test_threads_are_told_to_torch():
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            TORCH_ROWS.ours(dataclasses.replace(problem(), threads=threads))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


# Shapes -------------------------------------------------------------------------------------------


def test_shapes_measure_what_suits_them_or_what_is_asked_for():
    vocabulary = chosen("vocab-128k", None, None, False)[0]
    assert vocabulary.logits == (1024, 131072)
    assert vocabulary.measured() == {
        "float32": ("loss+gradient", "loss"),
        "bfloat16": ("loss+gradient",),
    }
    asked = chosen("vocab-128k", "bfloat16", "stats,loss", False)[0]
    assert asked.measured() == {"bfloat16": ("loss", "stats")}
    assert len(chosen(None, None, None, False)) == len(SHAPES)


def test_a_quick_run_keeps_the_classes():
    for shape, small in zip(SHAPES, chosen(None, None, None, True), strict=True):
        assert small.logits[small.axis] == shape.logits[shape.axis]
        assert math.prod(small.logits) <= 2**21


# Peers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", peers.TASKS)
@pytest.mark.parametrize(("shape", "axis"), [((7, 5), -1), ((3, 5, 4, 2), 1)])
@pytest.mark.parametrize("name", ["numpy", "scipy", "sklearn", "torch"])
def test_peers_agree_with_us(name, task, shape, axis):
    pytest.importorskip(name)
    (peer,) = (each for each in peers.all_peers() if each.name == name)
    given = problem(task, shape, axis)
    times, skipped = contest.contest(ROWS, given, [peer], EFFORT, lambda text: None)
    found = {each.output for each in times if each.kind == "peer"}
    if name in skipped:
        assert re.match("takes rows|has no such function", skipped[name])
        assert found == set()
    else:
        assert found >= ({"none"} if task == "loss" else {"fresh"})
    served = {"torch": 4, "numpy": 4, "scipy": 3, "sklearn": 2}[name]
    if len(shape) == 2:
        with_function = {"scipy": peers.TASKS[1:]}.get(name, peers.TASKS)[:served]
        assert (name not in skipped) == (task in with_function)


def test_jax_agrees_with_us(tmp_path):
    """In a process of its own: JAX warns of every later fork."""
    (peer,) = (each for each in peers.all_peers() if each.name == "jax")
    if peers.missing(peer):
        pytest.skip("JAX or Optax is not installed")
    quick = ("--quick", "--repeats", "1", "--shapes", "segmentation,imagenet", "--output", "found")
    done = subprocess.run(
        [sys.executable, "-m", "crossent", "bench", "rows", *quick, "--peers", "jax"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for group in json.loads((tmp_path / "found" / "rows.json").read_text())["results"]:
        found = {each["name"] for each in group["times"] if each["kind"] == "peer"}
        assert found == ({"jax"} if group["task"] != "stats" else set()), group["skipped"]


def test_torch_is_compiled_whole_and_for_the_shape(monkeypatch):
    torch = pytest.importorskip("torch")
    (peer,) = (each for each in peers.all_peers() if each.name == "torch-compile")
    asked = []

    def compile(function, **options):
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    times, skipped = contest.contest(ROWS, problem(), [peer], EFFORT, lambda text: None)
    assert (asked, skipped) == ([{"fullgraph": True, "dynamic": False}], {})
    assert [each.title for each in times if each.kind == "peer"] == ["torch.compile"]


@pytest.mark.parametrize(
    ("factor", "off"),
    [pytest.param(1.0015, "5", id="whole"), pytest.param(np.nan, "nan", id="NaN")],
)
def test_a_peer_that_computes_something_else_is_not_timed(monkeypatch, factor, off):
    from crossent.cli.bench.peers_arrays import NumPyPeer

    right = NumPyPeer.contenders

    def spoiled(call):
        loss, grad = call()
        return loss, grad * grad.dtype.type(factor)

    def wrong(self, given):
        found = right(self, given)
        return [peers.Contender(each.output, lambda e=each: spoiled(e.call)) for each in found]

    monkeypatch.setattr(NumPyPeer, "contenders", wrong)
    times, skipped = contest.contest(ROWS, problem(), [NumPyPeer()], EFFORT, lambda text: None)
    assert skipped["numpy"].startswith(f"failed: its result is not crossent's (off by {off}")
    assert "numpy" not in {each.name for each in times}


def test_a_compiler_that_fails_is_told():
    class Broken:
        name, title = "torch-compile", "torch.compile"

        def prepare(self, threads):
            raise RuntimeError("no C++ compiler\nand many more lines")

    times, skipped = contest.contest(ROWS, problem(), [Broken()], EFFORT, lambda text: None)
    assert skipped == {"torch-compile": "failed: no C++ compiler"}
    assert {each.name for each in times} == {"crossent", "copy", "copyto", "threads", "stream"}


def test_kept_outputs_are_written():
    given = problem()
    for kept in ROWS.ours(given), ROWS.copies(given).values():
        for each in kept:
            contender = each if isinstance(each, peers.Contender) else each[1]
            if contender.output == "kept":
                given.kept[:] = np.nan
                contender.call()
                assert not np.isnan(given.kept).any()


def test_an_output_lies_in_its_page_as_the_logits_do():
    for logits in (np.zeros((3, 5), np.float32), np.zeros(10**6)[3:].reshape(1, -1)):
        kept = output_like(logits)
        assert (kept.shape, kept.dtype) == (logits.shape, logits.dtype)
        assert (kept.ctypes.data - logits.ctypes.data) % 4096 == 0


# Timing -------------------------------------------------------------------------------------------


def test_rounds_are_shared_out():
    assert timing.Effort(1.0, 5, 31).enough(2, 99.0) is False
    assert timing.Effort(1.0, 5, 31).enough(4, 3.9) is False
    assert timing.Effort(1.0, 5, 31).enough(3, 4.1) is True
    assert timing.Effort(1.0, 5, 31).enough(5, 1.1) is True
    assert timing.Effort(1.0, 5, 31).enough(30, 0.9) is False
    assert timing.Effort(1.0, 5, 31).enough(31, 0.1) is True
    assert timing.Effort(math.inf, 7, 7).enough(6, 1e9) is False


def test_every_contender_has_its_turns(monkeypatch):
    monkeypatch.setattr(timing, "_QUICK", 10.0)  # on a machine as busy as can be
    calls = dict.fromkeys("ab", 0)

    def call(key):
        calls[key] += 1
        time.sleep(6e-3)

    found = timing.interleaved({key: lambda key=key: call(key) for key in "ab"}, rounds(4))
    for key in "ab":
        assert (found[key].n, found[key].inner) == (4, 1)
        assert calls[key] == 2 + 2 * 4  # to expect, and a warm one before each timed one
        assert found[key].lower >= 6e-3


def rounds(n):
    return timing.Effort(math.inf, n, n)


def test_short_calls_are_timed_in_loops(monkeypatch):
    clock = itertools.count(0, 10e-6)  # every look at the clock is 10 µs later
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(timing, "_rest", lambda: None)
    calls = []
    found = timing.interleaved({"a": lambda: calls.append(0)}, rounds(2))["a"]
    assert found.inner == 500
    assert found.median == pytest.approx(10e-6 / 500)
    assert len(calls) == 2 + 2 * (1 + 500)


# Threads ------------------------------------------------------------------------------------------


def test_the_process_is_bound_to_as_many_cpus_and_released():
    cpus, before = os.sched_getaffinity(0), crossent.get_num_threads()
    with machine.on_cpus(1) as threads:
        assert threads == crossent.get_num_threads() == len(os.sched_getaffinity(0)) == 1
    assert (os.sched_getaffinity(0), crossent.get_num_threads()) == (cpus, before)
    with pytest.raises(InputError, match="this process may use"), machine.on_cpus(len(cpus) + 1):
        pass
