"""The network written out in NumPy: its gradient, its training, its command line."""

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("polars")
pytest.importorskip("sklearn")

from crossent import cross_entropy, softmax

PAGE = Path(__file__).parents[1] / "docs" / "numpy-network.md"


@pytest.fixture(scope="module")
def net(example):
    with example("numpy_network") as module:
        yield module


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(2)
    return rng.normal(size=(9, 5)), rng.integers(4, size=9)


def test_gradient_of_every_layer_is_the_derivative(net, batch):
    """The loss carries a few roundings, which a step of cbrt(eps) divides; see also the module."""
    eps = np.finfo(float).eps
    step = np.cbrt(eps)
    for grad, slope in net.check((5, 7, 6, 4), *batch):
        np.testing.assert_allclose(grad, slope, rtol=0, atol=16 * eps / step + step**2)
        assert np.abs(grad).max() > 0.01


def test_final_layer_is_that_of_the_note(net, batch):
    """Its gradients are (a − â)ᵀh and Σ(a − â), and its loss −ln a of the class, in the mean."""
    layers, (x, target) = net.network((5, 7, 4), 1, np.float64), batch
    h = np.tanh(x @ layers[0].weight.T + layers[0].bias)
    z = h @ layers[1].weight.T + layers[1].bias
    g = (softmax(z) - np.eye(4)[target]) / len(x)
    loss, grads = net.loss_and_gradient(layers, x, target)
    assert loss == pytest.approx(cross_entropy(z, target), rel=1e-14)
    np.testing.assert_allclose(grads[1].weight, g.T @ h, rtol=0, atol=1e-15)
    np.testing.assert_allclose(grads[1].bias, g.sum(axis=0), rtol=0, atol=1e-15)


def test_evaluation_is_the_loss_and_the_share_of_right_classes(net, batch):
    layers, (x, target) = net.network((5, 7, 4), 1, np.float64), batch
    loss, accuracy = net.evaluate(layers, x, target)
    assert loss == pytest.approx(net.loss_and_gradient(layers, x, target)[0], rel=1e-14)
    z = net.forward(layers[:1], x)[-1] @ layers[1].weight.T + layers[1].bias
    assert accuracy == (z.argmax(axis=1) == target).mean()


def test_learns_the_digits_and_is_reproducible(net):
    """Six seeds gave 94.8 % to 96.8 % after five epochs."""
    x, target, test_x, test_target = net.images("digits", seed=0)
    assert len(x) + len(test_x) == 1797
    runs = []
    for _ in range(2):
        layers = net.network((64, 64, 64, 10), 0)
        runs.append(
            [loss for epoch in net.train(layers, x, target, 5, 32, 0.02, 0) for loss in epoch]
        )
    assert runs[0] == runs[1]
    assert len(runs[0]) == 5 * -(-len(x) // 32)
    assert net.evaluate(layers, test_x, test_target)[1] > 0.9


def test_the_last_batch_of_an_epoch_may_be_smaller(net, batch):
    (losses,) = net.train(net.network((5, 4), 0, np.float64), *batch, 1, 4, 0.1, 0)
    assert len(losses) == 3


def test_command_line_and_page(net, idx_folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    figure = tmp_path / "figure.svg"
    net.main(["--data", str(idx_folder), "--hidden", "9", "--epochs", "5", "--plot", str(figure)])
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if re.fullmatch(r"[^0-9]+", line)]
    page = PAGE.read_text(encoding="utf-8")
    assert len(heads) == 3
    assert all(head in page for head in heads)
    checks = [line.split() for line in lines if "→" in line]
    assert [check[:3] for check in checks] == [["784", "→", "9"], ["9", "→", "10"]]
    assert all(float(check[3]) < 1e-6 and check[4] == "2.000000" for check in checks)
    assert [line.split()[0] for line in lines[-5:]] == ["1", "2", "3", "4", "5"]
    assert "what training added" in figure.read_text(encoding="utf-8")


def test_says_what_is_wrong_before_it_trains(net, tmp_path, capsys):
    for given, text in (
        (["--data", str(tmp_path)], "no such file"),
        (["--plot", f"{tmp_path}/a/b"], "no folder"),
    ):
        with pytest.raises(SystemExit):
            net.main(given)
        assert text in capsys.readouterr().err
