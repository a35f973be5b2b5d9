"""The examples run, and show what the pages say they show."""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")

import crossent
from crossent import cross_entropy, cross_entropy_value_and_grad

ROOT = Path(__file__).parents[1]
COLLAPSE_PAGE = (ROOT / "docs" / "softmax-collapse.md").read_text(encoding="utf-8")


# Softmax collapse ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def collapse(example):
    with example("softmax_collapse") as module:
        yield module


@pytest.fixture(scope="module")
def runs(collapse):
    """Both runs on 100 images: they reach a margin of 17 near step 450."""
    data = collapse.digits(seed=0, n_train=100)
    return {
        name: collapse.train(gradient, data, steps=900, every=50)
        for name, gradient in collapse.GRADIENTS.items()
    }


def test_collapse_backward_is_the_derivative_of_forward(collapse):
    network = collapse.Network((5, 7, 6, 4), seed=1)
    network.parameters = [p.astype(np.float64) for p in network.parameters]
    rng = np.random.default_rng(2)
    input, target = rng.normal(size=(9, 5)), rng.integers(4, size=9)
    values = network.forward(input)
    grads = network.backward(values, cross_entropy_value_and_grad(values[-1], target).grad)
    step = np.cbrt(np.finfo(float).eps)  # balances rounding and the third derivative
    for parameter, grad in zip(network.parameters, grads, strict=True):
        direction = rng.normal(size=parameter.shape)
        losses = []
        for shift in (step, -2 * step):
            parameter += shift * direction
            losses.append(cross_entropy(network.forward(input)[-1], target))
        parameter += step * direction
        difference = (losses[0] - losses[1]) / (2 * step)
        assert (grad * direction).sum() == pytest.approx(difference, rel=0, abs=100 * step**2)


def test_collapse_common_gradient_is_that_of_pytorch(collapse):
    pytest.importorskip("torch")
    import torch

    rng = np.random.default_rng(3)
    input, target = (8 * rng.normal(size=(50, 10))).astype(np.float32), rng.integers(10, size=50)
    logits = torch.tensor(input, requires_grad=True)
    torch.nn.functional.cross_entropy(logits, torch.tensor(target)).backward()
    # log p carries a few roundings of up to 50, and so p that many relative ones
    atol = 4 * 50 * np.finfo(np.float32).eps / len(target)
    grad = collapse.common_gradient(input, target)
    np.testing.assert_allclose(grad, logits.grad.numpy(), rtol=0, atol=atol)
    np.testing.assert_array_equal(collapse.common_gradient(np.float32([[17.5, 0]]), [0])[0, 0], 0)


def test_collapse_runs_coincide_before_the_margin_of_17(runs):
    common, exact = (runs[name][6] for name in ("common", "crossent"))
    assert common.step == exact.step == 300
    assert common.loss == pytest.approx(exact.loss, rel=0.05)


def test_collapse_stalls_the_common_run_alone(runs):
    """Six seeds ended at 3e-8 to 5e-8 with 78 % to 89 % of zero rows, and at 6e-12 to 1.1e-11."""
    common, exact = runs["common"][-1], runs["crossent"][-1]
    assert common.loss > 1e-8
    assert common.zero_rows > 0.5
    assert exact.loss < 1e-10
    assert exact.zero_rows == 0
    losses = [record.loss for record in runs["crossent"]]
    assert losses == sorted(losses, reverse=True)


def test_collapse_report_and_plot(collapse, runs, tmp_path, capsys):
    collapse.report(runs, lines=3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        [name, step] for name in ("common", "crossent") for step in ("0", "450", "900")
    ]
    pytest.importorskip("matplotlib")
    collapse.plot(runs, str(tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_collapse_command_line(collapse, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    collapse.main(["--steps", "10", "--eps", "1e-8", "--plot", str(tmp_path / "figure.svg")])
    assert capsys.readouterr().out.count("crossent") == 11
    assert "training loss" in (tmp_path / "figure.svg").read_text(encoding="utf-8")


MARGINS = re.findall(r"^\| (\d+) \| (.+e-\d\d) \|$", COLLAPSE_PAGE, re.MULTILINE)


@pytest.mark.parametrize(("margin", "row"), MARGINS, ids=[margin for margin, _ in MARGINS])
def test_collapse_table_of_margins(margin, row):
    pytest.importorskip("torch")
    import torch

    logits = np.float32([[float(margin), 0]])
    tensor = torch.tensor(logits, requires_grad=True)
    peer = torch.nn.functional.cross_entropy(tensor, torch.tensor([0]))
    peer.backward()
    loss, grad = cross_entropy_value_and_grad(logits, [0])
    exact = math.log1p(math.exp(-float(margin)))
    numbers = [exact, peer.item(), *tensor.grad[0].tolist(), loss, grad[0, 0]]
    assert row.split(" | ") == ["0" if n == 0 else f"{n:.3e}" for n in numbers]


def test_collapse_table_of_margins_is_found():
    assert {"16", "17"} <= {margin for margin, _ in MARGINS}


# A convolutional network --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cnn(example):
    torch = pytest.importorskip("torch")
    before = torch.are_deterministic_algorithms_enabled()
    with example("fashion_cnn") as module:
        torch.use_deterministic_algorithms(True)
        yield module
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="module")
def comparison(cnn, idx_folder):
    """Three epochs of 8 batches of 64 and one of 8."""
    return cnn.compare(cnn.fashion_mnist(idx_folder), epochs=3, batch_size=64)


def test_cnn_losses_agree_to_rounding_at_the_same_weights(cnn, comparison):
    """At most V + 4 roundings in each row and N in the sum of a batch; the logits are the same."""
    first = comparison.runs["torch"].losses[0]
    bound = (10 + 4 + 64) * np.finfo(np.float32).eps / 2 * (1 + first)
    assert comparison.difference("crossent")[0] <= bound
    assert comparison.difference(cnn.REVERSED)[0] <= bound


def test_cnn_curves_stay_together(comparison):
    """Six seeds gave at most 2.4e-7; rounding grows tenfold in some 20 steps (docs)."""
    losses = {name: run.losses for name, run in comparison.runs.items()}
    assert [len(curve) for curve in losses.values()] == [27, 27, 27]
    assert losses["crossent"][-1] < losses["crossent"][0] / 2
    assert comparison.difference("crossent").max() < 1e-5


def test_cnn_run_is_reproducible(cnn, comparison, idx_folder):
    again = cnn.compare(cnn.fashion_mnist(idx_folder), epochs=3, batch_size=64)
    for name, run in comparison.runs.items():
        assert run.losses == again.runs[name].losses


def test_cnn_changes_one_import():
    names = ("- from torch.nn.functional", "+ from crossent.torch")
    diff = "".join(f"{name} import cross_entropy\n" for name in names)
    for page in ("docs/fashion-cnn.md", "README.md"):
        assert diff in (ROOT / page).read_text(encoding="utf-8")


def test_cnn_command_line(cnn, idx_folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    figure = tmp_path / "figure.svg"
    small = ["--data-dir", str(idx_folder), "--rows", "200", "--epochs", "1"]
    cnn.main([*small, "--batch-size", "16", "--plot", str(figure)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("200 images, 13 steps; PyTorch ")
    for title in (
        "test accuracy",
        "  in the first 13 steps",
        "  a step",
        "  their share of a step",
    ):
        (line,) = (line for line in lines if line.startswith(title))
        assert len(line.removeprefix(title).split()) >= 2
    assert "distance from torch's loss" in figure.read_text(encoding="utf-8")


def test_cnn_says_how_to_get_the_data(cnn, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cnn.main(["--data-dir", str(tmp_path)])
    assert "apt install dataset-fashion-mnist" in capsys.readouterr().err


def test_cnn_says_what_is_wrong_before_it_trains(cnn, tmp_path, capsys, monkeypatch):
    for given, text in (
        (["--epochs", "0"], "less than 1"),
        (["--plot", f"{tmp_path}/a/b"], "no f"),
    ):
        with pytest.raises(SystemExit):
            cnn.main(given)
        assert text in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        cnn.main(["--plot", "figure.png"])
    assert "pip install 'crossent[cli]'" in capsys.readouterr().err


def test_cnn_says_that_it_needs_pytorch(example, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="needs PyTorch"), example("fashion_cnn"):
        pass


# A language model ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm(example):
    torch = pytest.importorskip("torch")
    pytest.importorskip("rich")
    deterministic = torch.are_deterministic_algorithms_enabled()
    threads = torch.get_num_threads(), crossent.get_num_threads()
    with example("language_model") as module:
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(1)
        yield module
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads[0])
    crossent.set_num_threads(threads[1])


@pytest.fixture(scope="module")
def small(lm):
    return lm.Sizes(vocabulary=300, width=32, layers=1, batch=4, context=16)


@pytest.fixture(scope="module")
def counting(lm):
    """A text that counts from 0 to 299, again and again."""
    import torch

    return torch.arange(3000) % 300


@pytest.fixture(scope="module")
def lm_comparison(lm, small, counting):
    return lm.compare(counting, small, steps=30)


def test_lm_losses_agree_to_rounding_at_the_same_weights(lm, small, lm_comparison):
    """A logit carries D roundings of at most |x|·|w|, a row V + 4 more, a batch's mean N."""
    logit = small.width * 6 * 0.1  # |x| < 6 after the norm, |w| < 5 · 0.02
    roundings = small.vocabulary + 4 + small.batch * small.context
    first = lm_comparison.runs["torch"].losses[0]
    eps = np.finfo(np.float32).eps
    bound = (2 * small.width * logit + roundings * (1 + first)) * eps / first
    for name in ("crossent", lm.REVERSED):
        assert lm_comparison.difference(name)[0] <= bound


def test_lm_curves_stay_together(lm_comparison):
    losses = {name: run.losses for name, run in lm_comparison.runs.items()}
    assert [len(curve) for curve in losses.values()] == [30, 30, 30]
    assert losses["crossent"][0] == pytest.approx(math.log(300), rel=0.02)
    assert losses["crossent"][-1] < losses["crossent"][0] - 0.1
    assert lm_comparison.difference("crossent").max() < 1e-5


def test_lm_run_is_reproducible(lm, small, counting, lm_comparison):
    again = lm.compare(counting, small, steps=30)
    for name, run in lm_comparison.runs.items():
        assert run.losses == again.runs[name].losses


def test_lm_runs_start_alike_and_tie_the_head_to_the_tokens(lm, small, counting):
    runs = [lm.Run(head, small) for head in lm.HEADS.values()]
    for (name, a), (_, b) in zip(*(run.model.named_parameters() for run in runs), strict=True):
        assert a.equal(b), name
    for run in runs:
        for input, target in lm.batches(counting, small, 1):
            run.step(input, target)
    # a token that is no input has the head's gradient all the same
    absent = next(token for token in range(300) if token not in input)
    assert all(run.model.tokens.weight.grad[absent].abs().sum() > 0 for run in runs)


def test_lm_sees_no_later_token(lm, small, counting):
    import torch

    model = lm.GPT(small)
    ((input, _),) = lm.batches(counting, small, 1)
    changed = input.clone()
    changed[:, 9] = (input[:, 9] + 1) % 300
    with torch.no_grad():
        before, after = (model(x).unflatten(0, input.shape) for x in (input, changed))
    assert before[:, :9].equal(after[:, :9])
    assert (before[:, 9:] != after[:, 9:]).any(dim=-1).all()


def test_lm_targets_are_the_next_tokens(lm, small, counting):
    for input, target in lm.batches(counting, small, 3):
        assert input.shape == target.shape == (4, 16)
        assert target.equal((input + 1) % 300)


def test_lm_text_is_the_standard_library(lm):
    texts = lm.library_source()
    assert texts == lm.library_source()
    assert Path(json.__file__).read_text("utf-8") in texts
    assert Path(pytest.__file__).read_text("utf-8") not in texts


def test_lm_tokens_are_learnt_from_the_text(lm):
    pytest.importorskip("tokenizers")
    texts = [Path(json.__file__).read_text("utf-8"), "caf\u00e9 \u2603"]
    tokens = lm.tokenise(texts, 400)
    assert tokens.equal(lm.tokenise(texts, 400))
    assert tokens.min() >= 0
    assert 256 <= tokens.max() < 400
    assert len(tokens) < len("".join(texts))  # bytes alone would be more


def test_lm_memory_of_held_logits_is_more(lm):
    """8192 × 4096 logits: 134 MB, which PyTorch holds more than once; here a workspace of that."""
    sizes = lm.Sizes(vocabulary=8192, width=32, layers=1, batch=32, context=128)
    taken = {name: lm.memory_in_a_process(name, sizes, threads=1) for name in lm.HEADS}
    assert taken["torch"] > taken["crossent"] + 8192 * 4096 * 4


def test_lm_command_line(lm, tmp_path, capsys, monkeypatch):
    pytest.importorskip("tokenizers")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(lm, "library_source", lambda: [Path(json.__file__).read_text("utf-8")])
    figure = tmp_path / "figure.svg"
    given = "--steps 4 --vocabulary 400 --width 16 --layers 1 --batch 2 --context 8 --threads 1"
    lm.main([*given.split(), "--plot", str(figure)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1 files, 0.0 million characters, ")
    for title in ("first step", "first 4 steps", "a step, median", "memory training takes"):
        assert any(line.startswith(f" {title} ") for line in lines)
    assert "training loss of each step" in figure.read_text(encoding="utf-8")


def test_lm_says_what_is_wrong_before_it_trains(lm, tmp_path, capsys, monkeypatch):
    for given, text in (
        (["--steps", "0"], "less than 1"),
        (["--vocabulary", "255"], "less than 256"),
        (["--width", "200"], "does not divide into 3 heads"),
        (["--plot", f"{tmp_path}/a/b"], "no f"),
    ):
        with pytest.raises(SystemExit):
            lm.main(given)
        assert text in capsys.readouterr().err
    monkeypatch.setattr(lm, "library_source", lambda: ["a"])
    if importlib.util.find_spec("tokenizers"):
        with pytest.raises(SystemExit):
            lm.main([])
        assert "the text has 1 tokens" in capsys.readouterr().err
    for package in ("tokenizers", "matplotlib"):
        with monkeypatch.context() as absent:
            absent.setitem(sys.modules, package, None)
            with pytest.raises(SystemExit):
                lm.main(["--plot", "figure.png"])
        assert "pip install 'crossent[examples]'" in capsys.readouterr().err


def test_lm_changes_one_line():
    page = (ROOT / "docs" / "language-model.md").read_text(encoding="utf-8")
    assert "- loss = cross_entropy(linear(hidden, weight), target)\n" in page
    assert "+ loss = linear_cross_entropy(hidden, weight, target)\n" in page


@pytest.mark.parametrize("package", ["torch", "rich"])
def test_lm_says_what_it_needs(example, monkeypatch, package):
    for name in [name for name in sys.modules if name.startswith("rich.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=f"needs {package}"), example("language_model"):
        pass
