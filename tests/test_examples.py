"""The examples run, and show what the pages say they show."""

import importlib.util
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")

from crossent import cross_entropy, cross_entropy_value_and_grad

ROOT = Path(__file__).parents[1]
COLLAPSE_PAGE = (ROOT / "docs" / "softmax-collapse.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def collapse():
    path = ROOT / "examples" / "softmax_collapse.py"
    spec = importlib.util.spec_from_file_location("softmax_collapse", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


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
