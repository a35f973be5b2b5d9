"""A network with hidden layers, written out in NumPy; its final layer is crossent's.

    forward     hˡ = tanh(hˡ⁻¹ Wˡᵀ + bˡ)  for each hidden layer, h⁰ = x
                z = h Wᵀ + b,  a = σ(z),  λ = −Σ â ln a             the final layer
    backward    ∂λ/∂z = a − â                                       the final layer
                ∂λ/∂W = (a − â)ᵀh,  ∂λ/∂b = Σ(a − â),  ∂λ/∂h = (a − â)W
                and so on down, with the chain rule and tanh' = 1 − tanh²

The final layer's lines, both ways, are one call: features of the last hidden layer in, the loss and
the three gradients out. docs/maths.md derives them, (M7) and (M12) to (M14).

    python examples/numpy_network.py --plot numpy-network.png

docs/numpy-network.md explains what it shows. The network is NumPy and crossent alone; the data and
the picture need crossent[cli].

Shapes: N images of D pixels, V classes; a layer's weight is (out, in) and its bias (out,).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crossent import linear_cross_entropy_stats, linear_cross_entropy_value_and_grad
from crossent.cli import data
from crossent.cli.errors import InputError

Array = NDArray[Any]


class Layer(NamedTuple):
    """The parameters of a layer, or the gradient in them."""

    weight: Array
    bias: Array


def network(sizes: tuple[int, ...], seed: int, dtype: type = np.float32) -> list[Layer]:
    """Return layers between the sizes given, with random weights that keep the sums' variance."""
    rng = np.random.default_rng(seed)
    return [
        Layer(rng.normal(0, n_in**-0.5, (n_out, n_in)).astype(dtype), np.zeros(n_out, dtype))
        for n_in, n_out in pairwise(sizes)
    ]


def forward(hidden: list[Layer], x: Array) -> list[Array]:
    """Return x and what each hidden layer makes of it."""
    values = [x]
    for weight, bias in hidden:
        values.append(np.tanh(values[-1] @ weight.T + bias))
    return values


def loss_and_gradient(layers: list[Layer], x: Array, target: Array) -> tuple[float, list[Layer]]:
    """Return the mean loss and its gradient in every layer's parameters."""
    *hidden, final = layers
    values = forward(hidden, x)
    loss, (grad, weight, bias) = linear_cross_entropy_value_and_grad(
        values[-1], final.weight, target, linear_bias=final.bias
    )
    grads = [Layer(weight, bias)]
    for layer, (below, value) in zip(hidden[::-1], list(pairwise(values))[::-1], strict=True):
        grad = grad * (1 - value**2)  # (N, out): now in the layer's weighted sums
        grads.append(Layer(grad.T @ below, grad.sum(axis=0)))
        grad = grad @ layer.weight  # (N, in)
    return float(loss), grads[::-1]


def evaluate(layers: list[Layer], x: Array, target: Array) -> tuple[float, float]:
    """Return the mean loss and the share of images that get their own class."""
    *hidden, final = layers
    features = forward(hidden, x)[-1]
    stats = linear_cross_entropy_stats(features, final.weight, target, linear_bias=final.bias)
    return float(-stats.target_logprob.mean()), float((stats.argmax == target).mean())


def train(
    layers: list[Layer], x: Array, target: Array, epochs: int, batch: int, rate: float, seed: int
) -> Iterator[list[float]]:
    """Change the layers in place by SGD with momentum, and yield each epoch's losses, by step."""
    velocity = [Layer(np.zeros_like(weight), np.zeros_like(bias)) for weight, bias in layers]
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order, losses = rng.permutation(len(x)), []
        for rows in np.split(order, range(batch, len(x), batch)):
            loss, grads = loss_and_gradient(layers, x[rows], target[rows])
            losses.append(loss)
            for arrays in zip(layers, grads, velocity, strict=True):
                for parameter, grad, moving in zip(*arrays, strict=True):
                    moving *= 0.9
                    moving -= rate * grad  # downhill: â − a is the way the weighted sums go
                    parameter += moving
        yield losses


def check(sizes: tuple[int, ...], x: Array, target: Array, entries: int = 100) -> list[Array]:
    """Return (2, n) of each layer: entries of its gradient, and differences of the loss there.

    Central differences in float64, at up to `entries` random entries of each weight and bias.
    """
    layers, rng = network(sizes, 0, np.float64), np.random.default_rng(0)
    step = np.cbrt(np.finfo(float).eps)  # balances rounding and the third derivative
    pairs = []
    for layer, grad in zip(layers, loss_and_gradient(layers, x, target)[1], strict=True):
        found = []
        for array, derivative in zip(layer, grad, strict=True):
            for i in rng.choice(array.size, min(entries, array.size), replace=False):
                here, losses = array.flat[i], []
                for there in (here - step, here + step):
                    array.flat[i] = there
                    losses.append(evaluate(layers, x, target)[0])
                array.flat[i] = here
                found.append((derivative.flat[i], (losses[1] - losses[0]) / (2 * step)))
        pairs.append(np.transpose(found))
    return pairs


def images(name: str, seed: int) -> list[Array]:
    """Return images (N, D) in [0, 1] and their classes, to train on and to test on."""
    found = data.load(name)
    x = np.float32(1 / (found.pixel_max or 1)) * found.features.astype(np.float32)
    parts = data.split(found, test_size=None if found.own_test_rows else 1 / 3, seed=seed)
    return [array[rows] for rows in parts for array in (x, found.labels)]


def plot(losses: list[float], tests: list[tuple[int, float]], change: Array, path: str) -> None:
    """Draw the loss of each step and on the test images, and what training did to the weights."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subfigures(1, 2)
    axes = left.subplots()
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color="#93c5fd", linewidth=0.7, label="each step's images")
    axes.plot(*zip(*tests, strict=True), color="#1d4ed8", linewidth=2, label="test images")
    axes.set(yscale="log", xlabel="step")
    axes.set_title("loss", fontsize=10, loc="left")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    side, across = (int(np.ceil(n**0.5)) for n in change.T.shape)
    right.suptitle("what training added to the first layer's weights", fontsize=10)
    panels = right.subplots(across, across, squeeze=False).flat
    for panel, unit in zip(panels, change, strict=False):
        largest = np.abs(unit).max()
        panel.imshow(unit.reshape(side, side), cmap="RdBu_r", vmin=-largest, vmax=largest)
    for panel in right.axes:
        panel.axis("off")
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A network in NumPy whose final layer is ours.")
    parser.add_argument("--data", default="digits", help="fashion-mnist, or a folder of IDX files")
    parser.add_argument("--hidden", type=int, nargs="*", default=[64, 64], metavar="UNITS")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=0.02, help="of learning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="PATH", help="where to write the figure (.png or .svg)")
    args = parser.parse_args(argv)
    if args.plot and not Path(args.plot).parent.is_dir():
        parser.error(f"--plot: there is no folder {Path(args.plot).parent}")
    try:
        x, target, test_x, test_target = images(args.data, args.seed)
    except InputError as error:
        parser.error(str(error))
    sizes = (x.shape[1], *args.hidden, int(target.max()) + 1)

    print("relative distance from differences of the loss, by layer")
    print(f"{'':14}{'a − â':>9}{'â − a':>9}")
    for layer, (grad, slope) in enumerate(check(sizes, x[:20], target[:20])):
        ours, negative = (np.linalg.norm(g - slope) / np.linalg.norm(slope) for g in (grad, -grad))
        print(f"{sizes[layer]:5} → {sizes[layer + 1]:<6}{ours:9.0e}{negative:9.6f}")

    layers = network(sizes, args.seed)
    start = layers[0].weight.copy()
    losses: list[float] = []
    tests = [(1, evaluate(layers, test_x, test_target)[0])]
    print(f"\n{'epoch':>5}{'loss':>10}{'test loss':>11}{'test accuracy':>15}")
    training = train(layers, x, target, args.epochs, args.batch, args.rate, args.seed)
    for epoch, found in enumerate(training, 1):
        test_loss, accuracy = evaluate(layers, test_x, test_target)
        losses += found
        tests.append((len(losses), test_loss))
        if epoch <= 4 or epoch % 5 == 0:
            print(f"{epoch:5}{np.mean(found):10.4f}{test_loss:11.4f}{accuracy:15.1%}")
    if args.plot:
        plot(losses, tests, layers[0].weight - start, args.plot)


if __name__ == "__main__":
    main()
