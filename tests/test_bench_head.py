"""`crossent bench head`: what is timed and measured, and what follows; never how long it took."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("typer")

from crossent import cli
from crossent.cli.bench import contest, head_results, memory, peak, peers, show, timing, yardsticks
from crossent.cli.bench.bench_head import HEAD
from crossent.cli.bench.benchmark import Found
from crossent.cli.bench.head_problem import HEADS, HeadShape, answer, head_problems
from crossent.cli.bench.machine import machine
from crossent.cli.bench.picture import draw
from crossent.cli.bench.results import Report, Timed
from crossent.cli.bench.shapes import chosen

EFFORT = timing.Effort(0.0, 1, 1)
TASKS = ("loss+gradient", "loss")
SMALL = HeadShape("small", "a small head", (9, 5), features=7, side=8)
FROZEN = dataclasses.replace(SMALL, frozen=True)
TORCH = ["crossent-torch", "torch", "torch-linear", "torch-chunked"]


def problem(task="loss+gradient", shape=SMALL, dtype="float32"):
    return head_problems(shape, dtype, 1)(task)


def named(*names):
    return [peer for peer in HEAD.peers() if peer.name in names]


def timed(name, kind, median, output="fresh"):
    return Timed(name, f"{name}'s", kind, output, timing.summary([median] * 3, 1))


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run `crossent bench head --quick` in an empty folder; return exit status and outputs."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        line = ["crossent", "bench", "head", "--quick", "--repeats", "1", "--threads", "1"]
        monkeypatch.setattr(sys, "argv", [*line, *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code, *capsys.readouterr()

    return run


# The command --------------------------------------------------------------------------------------


def test_a_quick_run_writes_its_folder(run, tmp_path):
    pytest.importorskip("torch")
    arguments = ("--shapes", "fashion-mnist,gpt-32k", "--peers", ",".join(TORCH), "--no-memory")
    status, _, err = run(*arguments, "--dtypes", "float32")
    assert (status, err) == (0, "")
    folder = tmp_path / "crossent-bench-head"
    assert sorted(os.listdir(folder)) == ["head.json", "head.md", "head.png"]
    assert (folder / "head.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((folder / "head.json").read_text())
    assert (report["benchmark"], report["threads"], report["quick"]) == ("head", 1, True)
    skipped = {peer["name"]: peer["skipped"] for peer in report["peers"]}
    assert skipped == dict.fromkeys(TORCH) | dict.fromkeys(
        ["torch-compile", "jax"], "not asked for"
    )

    groups = {(group["shape"], group["task"]): group for group in report["results"]}
    assert list(groups) == [("fashion-mnist", TASKS[0]), *(("gpt-32k", task) for task in TASKS)]
    for (name, task), group in groups.items():
        assert group["skipped"] == {}
        of = {each["name"]: each for each in group["times"]}
        assert set(of) == {"crossent", *TORCH, "products"}
        rows, classes = group["logits"]
        wanted = 2 if name == "fashion-mnist" else 3 if task == TASKS[0] else 1
        assert group["operations"] == 2 * wanted * rows * group["features"] * classes
        best = max(group["rates"].values())
        assert of["products"]["median"] == pytest.approx(group["operations"] / best)
        over = {(r["name"], r["over"]): r["value"] for r in group["ratios"]}
        ratio = of["crossent-torch"]["median"] / of["products"]["median"]
        assert over["crossent-torch", "products"] == ratio
        assert set(group["errors"]) == {"crossent", *TORCH}
        parts = {1: {"loss"}, 2: {"loss", "dW"}, 3: {"loss", "dx", "dW"}}[wanted]
        for errors in group["errors"].values():
            assert set(errors) == parts
            # logits are off by 16 units of 2^-24 of |x||W|, some ten
            assert all(0 <= value < 1e-5 for value in errors.values())
        assert (group["memory"], group["memory_how"]) == ({}, "not asked for")

    page = (folder / "head.md").read_text()
    assert "### loss+gradient of 4×16×32768, float32: a 32k vocabulary" in page
    assert "|  | time | spread | over the products | memory | err. loss | err. dW |" in page
    assert "GFLOP/s of a product of square matrices: NumPy " in page


def test_without_torch_there_is_crossent_from_numpy(run, monkeypatch, tmp_path):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    status, out, _ = run("--shapes", "classifier", "--no-memory")
    assert status == 0
    assert "torch-chunked: skipped, torch is not installed\n" in out
    assert "jax: skipped, jax is not installed\n" in out
    (group,) = json.loads((tmp_path / "crossent-bench-head" / "head.json").read_text())["results"]
    assert [each["name"] for each in group["times"]] == ["crossent", "products"]
    assert list(group["rates"]) == ["NumPy"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--shapes", "digits"), "--shapes names 'digits'; there are fashion-mnist, classifier, "),
        (("--tasks", "softmax"), "--tasks names 'softmax'; there are loss+gradient, loss\n"),
        (("--peers", "numpy"), "--peers names 'numpy'; there are crossent-torch, torch, "),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, arguments, line):
    status, out, err = run(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert line in err
    assert os.listdir(tmp_path) == []


def test_bfloat16_is_held_against_float32_and_torch(run, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("ml_dtypes")
    asked = ("--shapes", "gpt-32k", "--tasks", "loss+gradient", "--peers", ",".join(TORCH))
    assert run(*asked, "--no-memory")[0] == 0
    report = json.loads((tmp_path / "crossent-bench-head" / "head.json").read_text())
    plain, half = report["results"]
    assert (plain["dtype"], half["dtype"]) == ("float32", "bfloat16")
    assert half["nbytes"] * 2 == plain["nbytes"]
    assert {each["name"] for each in half["times"]} == {"crossent", *TORCH, "products"}
    over = {(ratio["name"], ratio["over"]) for ratio in half["ratios"]}
    assert {("crossent-torch", "torch"), ("crossent-torch", "float32")} <= over


# Who takes part -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [SMALL, FROZEN], ids=["whole", "x frozen"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", TORCH)
def test_torch_s_heads_agree_with_us(name, task, shape, dtype):
    pytest.importorskip("torch")
    pytest.importorskip("ml_dtypes")
    given = problem(task, shape, dtype)
    times, skipped = contest.contest(HEAD, given, named(name), EFFORT, lambda text: None)
    assert skipped == {}
    (found,) = (each for each in times if each.name == name)
    assert found.output == ("none" if task == "loss" else "fresh")
    assert found.kind == ("crossent" if name == "crossent-torch" else "peer")


@pytest.mark.parametrize("shape", [SMALL, FROZEN], ids=["whole", "x frozen"])
@pytest.mark.parametrize("task", TASKS)
def test_the_answer_in_float64_is_ours(task, shape):
    given = problem(task, shape, "float64")
    (ours,) = HEAD.ours(given)
    expected = answer(given)
    assert len(expected) == given.products
    for found, right in zip(ours.read(ours.call()), expected, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-12, atol=1e-15)


def test_jax_agrees_with_us(tmp_path):
    """In a process of its own: JAX warns of every later fork."""
    (jax,) = named("jax")
    if peers.missing(jax):
        pytest.skip("JAX or Optax is not installed")
    quick = ("--quick", "--repeats", "1", "--shapes", "fashion-mnist,gpt-32k", "--no-memory")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "crossent",
            "bench",
            "head",
            *quick,
            "--peers",
            "jax",
            "-o",
            "found",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for group in json.loads((tmp_path / "found" / "head.json").read_text())["results"]:
        assert "jax" in {each["name"] for each in group["times"]}, group["skipped"]
        assert "jax" in group["errors"]
    taken, how = memory.in_a_process("jax", problem(), SMALL)
    assert taken is not None, how


def test_what_is_asked_of_torch(monkeypatch):
    torch = pytest.importorskip("torch")
    asked = []

    def compile(function, **options):
        asked.append(options)
        return function

    def linear_cross_entropy(x, weight, target, **options):
        asked.append(options)
        return torch.nn.functional.cross_entropy(x @ weight.T, target)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch.nn.functional, "linear_cross_entropy", linear_cross_entropy)
    for name in ("torch-compile", "torch-linear", "torch-chunked"):
        (peer,) = named(name)
        peer.contenders(problem())[0].call()
    assert asked == [
        {"fullgraph": True, "dynamic": False},
        {"options": None},
        {"options": torch.nn.LinearCrossEntropyOptions()},
    ]


def test_an_old_torch_has_no_such_function(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy")
    who = named("torch-linear", "torch-chunked")
    _, skipped = contest.contest(HEAD, problem(), who, EFFORT, lambda text: None)
    assert set(skipped) == {"torch-linear", "torch-chunked"}
    assert all(why.endswith("has no linear_cross_entropy") for why in skipped.values())


@pytest.mark.parametrize("shape", [SMALL, FROZEN], ids=["whole", "x frozen"])
def test_gradients_are_new_and_not_kept(monkeypatch, shape):
    torch = pytest.importorskip("torch")
    leaves, require = [], torch.Tensor.requires_grad_

    def requires_grad_(tensor):
        leaves.append(tensor)
        return require(tensor)

    monkeypatch.setattr(torch.Tensor, "requires_grad_", requires_grad_)
    (eager,) = named("torch")
    given = problem(shape=shape)
    (step,) = eager.contenders(given)
    first, second = step.call(), step.call()
    assert len(leaves) == len(first) - 1 == len(given.wrt)
    assert all(leaf.grad is None for leaf in leaves)
    for one, other in zip(first[1:], second[1:], strict=True):
        assert one.data_ptr() != other.data_ptr()
        assert torch.equal(one, other)


def test_a_peer_that_computes_something_else_is_not_timed():
    class Wrong:
        name, title, package = "wrong", "wrong", "wrong"

        def prepare(self, threads):
            pass

        def contenders(self, given):
            (ours,) = HEAD.ours(given)

            def spoiled():
                loss, dx, dw = ours.call()
                return loss, dx, dw * np.float32(1.002)

            return [peers.Contender("fresh", spoiled)]

    times, skipped = contest.contest(HEAD, problem(), [Wrong()], EFFORT, lambda text: None)
    assert skipped["wrong"].startswith("failed: its result is not crossent's (off by ")
    assert "wrong" not in {each.name for each in times}


# Shapes -------------------------------------------------------------------------------------------


def test_shapes_are_those_of_models():
    assert [shape.text for shape in chosen(None, None, None, False, HEADS)] == [
        "60000×784×10",
        "8192×256×1000",
        "8192×2048×1000",
        "2048×768×32768",
        "2048×2048×32768",
        "1024×768×131072",
    ]
    (wide,) = chosen("gpt-128k-wide", None, None, False, HEADS)
    assert wide.text == "1024×2048×131072"
    assert wide.measured() == {"float32": TASKS, "bfloat16": TASKS[:1]}


@pytest.mark.parametrize("shape", HEADS, ids=lambda shape: shape.name)
def test_a_reference_is_made_of_what_is_affordable(shape):
    few = shape.affordable()
    rows, classes = few.logits
    assert rows * classes * shape.features <= 2**31
    assert rows >= 512
    assert classes >= min(shape.logits[1], 512)
    assert (few.features, few.frozen) == (shape.features, shape.frozen)
    assert shape.small().logits[1] == shape.logits[1]


# What it is held against --------------------------------------------------------------------------


def test_products_by_hand():
    given = problem()  # 3 products of 9 × 7 × 5; the squares have a side of 8
    times = (
        timed("crossent", "crossent", 6.0),
        timed("product-numpy", "copy", 4.0, "kept"),
        timed("product-torch", "copy", 2.0, "kept"),
        timed("read", "copy", 3.0, "kept"),
    )
    found, rates = yardsticks.held_against(given, times)
    assert [(each.name, each.kind) for each in found] == [
        ("crossent", "crossent"),
        ("products", "bound"),
        ("read", "bound"),
    ]
    assert rates == {"product-numpy's": 256.0, "product-torch's": 512.0}
    assert found[1].timing.median == 3 * 2 * 9 * 7 * 5 / 512
    assert found[1].title.startswith("three products")
    group = dataclasses.replace(a_group(), times=found)
    over = {ratio.over: ratio.value for ratio in group.ratios()}
    assert over == {"products": 6.0 / (1890 / 512), "read of x": 2.0}


@pytest.mark.parametrize(
    ("task", "shape", "n"), [(TASKS[0], SMALL, 3), (TASKS[0], FROZEN, 2), (TASKS[1], SMALL, 1)]
)
def test_a_task_takes_so_many_products(task, shape, n):
    given = problem(task, shape)
    assert (given.products, given.operations) == (n, 2 * n * 9 * 7 * 5)


def test_all_of_the_features_are_read():
    x = np.zeros((101, 7), np.float32)  # 707 numbers: the last is half a word, and left out
    flat = x.reshape(-1)
    read = yardsticks.reader(x, 2)
    for k in (0, 43, 353, 705):
        flat[k] = 1
        assert any(read())
        flat[k] = 0
    assert not any(read())


def test_large_frozen_features_are_read_and_others_not(monkeypatch):
    monkeypatch.setattr(yardsticks, "_MEMORY_BOUND", 4 * 9 * 7)
    assert "read" in yardsticks.yardsticks(problem(shape=FROZEN))
    assert "read" not in yardsticks.yardsticks(problem())
    monkeypatch.setattr(yardsticks, "_MEMORY_BOUND", 4 * 9 * 7 + 1)
    assert "read" not in yardsticks.yardsticks(problem(shape=FROZEN))


def test_every_product_is_the_product():
    pytest.importorskip("torch")
    found = yardsticks.yardsticks(problem())
    a, b = np.random.default_rng(0).standard_normal((2, 8, 8), dtype=np.float32)
    assert list(found)[:2] == ["product-numpy", "product-torch"]
    for name, (_, contender) in found.items():
        right = a @ (b.T if name == "product-mkldnn" else b)  # a layer's weights lie the other way
        np.testing.assert_allclose(np.asarray(contender.call()), right, rtol=1e-4, atol=1e-5)


# Errors and memory --------------------------------------------------------------------------------


def test_errors_by_hand():
    given = problem()
    loss, dx, dw = answer(given)
    spoiled = peers.Contender("fresh", lambda: (loss * 1.5, dx, dw * 0.75))
    found = head_results._error(spoiled, given, (loss, dx, dw))
    assert found == {"loss": 0.5, "dx": 0.0, "dW": pytest.approx(0.25)}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_memory_is_that_of_one_call():
    shape = HeadShape("", "", (2000, 4000), features=1000)  # logits of 32 MB, gradients of 24 MB
    given = problem(shape=dataclasses.replace(shape, logits=(2, 2)))
    taken, how = memory.in_a_process("crossent", given, shape)
    assert "VmHWM" in how or "maxrss" in how
    assert taken is not None
    assert 0.9 * 24e6 < taken < 24e6 + 1.1 * 2**27  # a workspace of 128 MB, and some scratch
    if "VmHWM" in how and peers.missing(named("torch")[0]) == []:
        eager, _ = memory.in_a_process("torch", given, shape)
        assert eager is not None
        assert eager > 24e6 + 32e6  # beside the gradients the logits, at least


def test_a_child_that_fails_says_so():
    impossible = dataclasses.replace(SMALL, logits=(1, 0))
    found = memory.in_a_process("crossent", problem(), impossible)
    assert found == (None, "failed: CalledProcessError")


def test_why_memory_is_not_known_is_kept(monkeypatch):
    answers = {"crossent": (None, "failed: TimeoutExpired"), "crossent-torch": (2**19, "by hand")}
    monkeypatch.setattr(memory, "in_a_process", lambda name, given, shape: answers[name])
    ours = (timed(name, "crossent", 1.0) for name in answers)
    times = (*ours, timed("product-numpy", "copy", 1.0, "kept"))
    group = HEAD.kinds.group(SMALL, problem(), Found(times, {}, [], lambda text: None))
    assert group.memory_how == "crossent failed: TimeoutExpired; by hand"
    assert [group.extra(each)[0] for each in group.times] == ["–", "< 1 MB", "–"]


def test_where_the_peak_cannot_be_reset_the_largest_so_far_is_taken(monkeypatch):
    monkeypatch.setattr(peak, "_reset_peak", lambda: False)
    taken, how = memory.measured("crossent", "loss", "float32", SMALL, 1)
    assert taken >= 0
    assert how == "ru_maxrss over the resident set before"


def test_what_is_measured_is_kept(monkeypatch):
    asked = []

    def in_a_process(name, given, shape):
        asked.append(name)
        return 3 * 2**20, "by hand"

    monkeypatch.setattr(memory, "in_a_process", in_a_process)
    times = (timed("crossent", "crossent", 1.0), timed("product-numpy", "copy", 1.0, "kept"))
    group = HEAD.kinds.group(SMALL, problem(), Found(times, {}, [], lambda text: None))
    assert (asked, group.memory, group.memory_how) == (
        ["crossent"],
        {"crossent": 3 * 2**20},
        "by hand",
    )
    assert group.extra(group.times[0])[0] == "3 MB"
    assert group.extra(group.times[1]) == ("–",) * 4
    assert set(group.errors["crossent"]) == {"loss", "dx", "dW"}


# Tables and picture -------------------------------------------------------------------------------


def a_group(**changes):
    times = (
        timed("crossent", "crossent", 6.0),
        timed("crossent-torch", "crossent", 5.0),
        dataclasses.replace(timed("torch", "peer", 20.0), title="torch"),
        timed("torch-chunked", "peer", 10.0),
        timed("products", "bound", 4.0, "kept"),
        timed("read", "bound", 2.0, "kept"),
    )
    group = head_results.HeadGroup(
        *("fashion-mnist", "Fashion-MNIST", (8, 10), -1, "float32", "loss+gradient", 320, times),
        features=3,
        wrt=("linear_weight",),
        memory={"crossent-torch": 2**20, "torch": None},
        errors={"crossent-torch": {"loss": 1e-8, "dW": 2.5e-7}},
        outputs=5 * 2**20,
        rates={"NumPy": 5e10},
        errors_of=(4, 3, 10),
    )
    return dataclasses.replace(group, **changes)


def a_report(*groups):
    about = machine() | {"cpu": "A processor", "isa": "x86-64-v3"}
    date = "2026-01-02T03:04:05"
    return Report(HEAD.words, date, 2, about, {"numpy": "2"}, "In turn.", False, (), groups)


def test_the_tables_by_hand():
    page = show.markdown(a_report(a_group()))
    assert "| task | dtype | N×D×V | best peer | torch | products | read of x | NumPy / " in page
    of_torch, of_numpy = (
        "0.50 (torch-chunked's) | 0.25 | 1.25 | 2.50",
        "0.60 (torch-chunked's) | 1.50",
    )
    ratios = f"{of_torch} | {of_numpy} | 3.00 | –"
    assert f"| loss+gradient | float32 | 8×3×10 | {ratios} |" in page
    assert "| **crossent-torch's** | 5000 ms | ± 0 % | 1.25 | 1 MB | 1.0e-08 | 2.5e-07 |" in page
    assert "| torch | 20000 ms | ± 0 % | 5.00 | – | – | – |" in page
    assert "the gradients, 5 MB, among it. Errors on 4×3×10. " in page
    assert "GFLOP/s of a product of square matrices: NumPy 50.0." in page
    block = show.block(a_group(), HEAD.words)
    assert re.search(r"memory +err\. loss +err\. dW$", block.splitlines()[1])
    assert re.search(r"crossent-torch's .* 1\.25 × +1 MB +1\.0e-08 +2\.5e-07$", block, re.M)


def test_the_picture_is_drawn_for_any_groups(tmp_path):
    alone = a_group(times=(timed("crossent", "crossent", 1.0, "none"),), task="loss", wrt=())
    for k, groups in enumerate(([a_group(), alone], [alone], [])):
        draw(a_report(*groups), tmp_path / f"{k}.png")
        assert (tmp_path / f"{k}.png").stat().st_size > 1000
