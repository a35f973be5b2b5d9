"""Softmax collapse: float32 training that stalls with a common loss and goes on with crossent.

A small network learns to read 8 × 8 digits twice: same start, same data, same optimiser. Only the
gradient of the loss in the logits differs:

    common     p − onehot, computed as most libraries do
    crossent   the same numbers, each within a few ulp of its exact value

    python examples/softmax_collapse.py --plot softmax-collapse.png

docs/softmax-collapse.md explains what it shows. The data come with scikit-learn, the plot needs
matplotlib; the network is NumPy alone.

Shapes: N images of D pixels, V classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from crossent import cross_entropy, cross_entropy_value_and_grad

Array = NDArray[Any]
HIDDEN = (64, 64)


def common_gradient(logits: Array, target: Array) -> Array:
    """Return the mean loss's gradient (N, V) as p − onehot, p from a stable log-softmax."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_prob = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    grad: Array = np.exp(log_prob)
    grad[np.arange(len(target)), target] -= 1  # a probability that has rounded to 1 leaves 0
    grad /= len(target)
    return grad


def crossent_gradient(logits: Array, target: Array) -> Array:
    grad: Array = cross_entropy_value_and_grad(logits, target).grad
    return grad


GRADIENTS = {"common": common_gradient, "crossent": crossent_gradient}


class Digits(NamedTuple):
    """1200 images to train on and 597 to test on."""

    input: Array  # (N, D) float32 in [0, 1]
    target: Array  # (N,)
    test_input: Array
    test_target: Array


def digits(seed: int, n_train: int = 1200) -> Digits:
    input, target = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(target))
    input, target = (input[order] / 16).astype(np.float32), target[order]
    return Digits(input[:n_train], target[:n_train], input[n_train:], target[n_train:])


class Network:
    """Layers of ReLU units; `parameters` holds weights (in, out) and biases (out,) in turn."""

    def __init__(self, sizes: tuple[int, ...], seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.parameters: list[Array] = []
        for n_in, n_out in pairwise(sizes):
            weight = rng.normal(0, np.sqrt(2 / n_in), (n_in, n_out))
            self.parameters += [weight.astype(np.float32), np.zeros(n_out, np.float32)]

    def forward(self, input: Array) -> list[Array]:
        """Return what enters each layer, and last the logits."""
        values = [input]
        *hidden, last = zip(self.parameters[::2], self.parameters[1::2], strict=True)
        for weight, bias in hidden:
            values.append(np.maximum(values[-1] @ weight + bias, 0))
        weight, bias = last
        return [*values, values[-1] @ weight + bias]

    def backward(self, values: list[Array], grad: Array) -> list[Array]:
        """Return the parameters' gradients from that of the logits."""
        grads: list[Array] = []
        for weight, value in zip(self.parameters[-2::-2], values[-2::-1], strict=True):
            grads[:0] = [value.T @ grad, grad.sum(axis=0)]
            grad = (grad @ weight.T) * (value > 0)
        return grads


@dataclass
class Adam:
    """Adam; its moments are float64, so that they do not underflow before the gradient does."""

    parameters: list[Array]
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    steps: int = 0
    moments: list[tuple[Array, Array]] = field(init=False)

    def __post_init__(self) -> None:
        self.moments = [(np.zeros(p.shape), np.zeros(p.shape)) for p in self.parameters]

    def step(self, grads: list[Array]) -> None:
        """Move the parameters, in place."""
        self.steps += 1
        unbias1, unbias2 = 1 - self.beta1**self.steps, 1 - self.beta2**self.steps
        for p, g, (first, second) in zip(self.parameters, grads, self.moments, strict=True):
            first += (1 - self.beta1) * (g - first)
            second += (1 - self.beta2) * (g.astype(np.float64) ** 2 - second)
            update = first / unbias1 / (np.sqrt(second / unbias2) + self.eps)
            p -= (self.learning_rate * update).astype(p.dtype)


class Record(NamedTuple):
    """The state of a run at one step."""

    step: int
    loss: float  # of the training images, computed in float64 whatever the run itself uses
    gradient_norm: float  # over all parameters
    zero_rows: float  # share of training images whose target gradient is exactly 0
    test_accuracy: float


def train(
    gradient: Callable[[Array, Array], Array],
    data: Digits,
    *,
    steps: int = 1500,
    every: int = 5,
    seed: int = 0,
    beta2: float = 0.95,
    eps: float = 1e-30,
) -> list[Record]:
    """Train on all images at each step and return a record of each `every`-th step."""
    network = Network((data.input.shape[1], *HIDDEN, 10), seed)
    optimiser = Adam(network.parameters, beta2=beta2, eps=eps)
    records = []
    for step in range(steps + 1):
        values = network.forward(data.input)
        logits_grad = gradient(values[-1], data.target)
        grads = network.backward(values, logits_grad)
        if step % every == 0:
            predicted = network.forward(data.test_input)[-1].argmax(axis=1)
            records.append(
                Record(
                    step,
                    float(cross_entropy(values[-1].astype(np.float64), data.target)),
                    float(np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads))),
                    float(np.mean(logits_grad[np.arange(len(data.target)), data.target] == 0)),
                    float(np.mean(predicted == data.test_target)),
                )
            )
        optimiser.step(grads)
    return records


def plot(runs: dict[str, list[Record]], path: str) -> None:
    """Draw the four curves of each run."""
    from matplotlib.figure import Figure

    panels = {
        "loss": "training loss (exact value)",
        "gradient_norm": "norm of the gradient",
        "zero_rows": "training images whose target gradient is exactly 0",
        "test_accuracy": "test accuracy",
    }
    styles = {  # crossent wide and below, so that both show where they agree
        "common": {
            "color": "#ea580c",
            "linewidth": 1.2,
            "zorder": 3,
            "label": "common: p − onehot",
        },
        "crossent": {"color": "#1d4ed8", "linewidth": 3, "zorder": 2, "label": "crossent"},
    }
    figure = Figure(figsize=(9.5, 6.2), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for label, records in runs.items():
            values = [getattr(record, name) for record in records]
            axes.plot([record.step for record in records], values, **styles[label])
        axes.set_title(title, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.margins(x=0)
        if name in ("loss", "gradient_norm"):
            axes.set_yscale("log")
        else:
            axes.set_ylim((0.94, 1.0) if name == "test_accuracy" else (0, 1))
            axes.yaxis.set_major_formatter("{x:.0%}")
        axes.set_xlabel("step")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def report(runs: dict[str, list[Record]], lines: int = 11) -> None:
    print(f"{'':12}{'loss':>11}{'gradient':>11}{'zero rows':>11}{'test':>8}")
    for label, records in runs.items():
        for i in np.linspace(0, len(records) - 1, lines).astype(int):
            step, loss, norm, zero_rows, accuracy = records[i]
            print(f"{label:>8} {step:<5}{loss:9.1e}{norm:11.1e}{zero_rows:11.1%}{accuracy:8.1%}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Softmax collapse, with and without.")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beta2", type=float, default=0.95, help="Adam's (default: %(default)s)")
    parser.add_argument("--eps", type=float, default=1e-30, help="Adam's (default: %(default)s)")
    parser.add_argument("--plot", metavar="PATH", help="where to write the figure (.png or .svg)")
    args = parser.parse_args(argv)
    runs = {
        name: train(
            gradient,
            digits(args.seed),
            steps=args.steps,
            seed=args.seed,
            beta2=args.beta2,
            eps=args.eps,
        )
        for name, gradient in GRADIENTS.items()
    }
    report(runs)
    if args.plot:
        plot(runs, args.plot)


if __name__ == "__main__":
    main()
