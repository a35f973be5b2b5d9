"""A convolutional network on Fashion-MNIST, trained with PyTorch's loss and with crossent's.

What a user changes is one line:

    - from torch.nn.functional import cross_entropy
    + from crossent.torch import cross_entropy

Same start, same batches, same optimiser. A third run shows what such a comparison can show at all:
PyTorch's loss once more, with each batch's images in reverse order. That step is the same on paper,
and its sums round otherwise.

    python examples/fashion_cnn.py --plot fashion-cnn.png

docs/fashion-cnn.md explains what it shows. The data are Debian's package dataset-fashion-mnist; the
plot needs matplotlib.

Shapes: N images of 1 × 28 × 28 pixels, V = 10 classes.

Design: the runs go through each batch in turn, not one after the other, so that whatever else the
machine does slows all of them alike; who begins changes from step to step.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import numpy as np

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise SystemExit(
        "fashion_cnn.py needs PyTorch, and matplotlib for --plot; pip install 'crossent[torch,cli]'"
    ) from None
from torch import Tensor, nn
from torch.nn import functional

import crossent.torch
from crossent.cli import idx
from crossent.cli.data import FASHION_MNIST_FOLDER
from crossent.cli.errors import InputError

Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "torch": functional.cross_entropy,
    "crossent": crossent.torch.cross_entropy,
}
REVERSED = "torch, reversed"


class Images(NamedTuple):
    """What to train on and what to test on."""

    input: Tensor  # (N, 1, 28, 28) float32 in [0, 1]
    target: Tensor  # (N,)
    test_input: Tensor
    test_target: Tensor


def fashion_mnist(folder: Path, rows: int | None = None) -> Images:
    """Return the images of the four files in a folder; of the training set its first `rows`."""
    found = []
    for part, first in (("train", rows), ("test", None)):
        images, labels = idx.read_part(folder, part)
        found += [
            torch.from_numpy(images[:first].astype(np.float32) / 255)[:, None],
            torch.from_numpy(labels[:first].astype(np.int64)),
        ]
    return Images(*found)


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),  # (N, 16, 14, 14)
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),  # (N, 32, 7, 7)
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 10),
    )


class Run:
    """One network, its optimiser, and what was recorded of it."""

    def __init__(self, cross_entropy: Loss, seed: int) -> None:
        self.cross_entropy = cross_entropy
        self.model = network(seed)
        self.optimiser = torch.optim.Adam(self.model.parameters())
        self.losses: list[float] = []  # of each step
        self.seconds: list[float] = []  # of each step

    def step(self, input: Tensor, target: Tensor) -> Tensor:
        """Train on one batch and return its logits."""
        begin = perf_counter()
        self.optimiser.zero_grad()
        logits = self.model(input)
        loss = self.cross_entropy(logits, target)
        loss.backward()
        self.optimiser.step()
        self.seconds.append(perf_counter() - begin)
        self.losses.append(loss.item())
        return logits.detach()

    def predict(self, input: Tensor) -> Tensor:
        """Return the class of each image."""
        with torch.no_grad():
            return torch.cat([self.model(part).argmax(dim=1) for part in input.split(1000)])


@dataclass
class Comparison:
    """The runs by name, and seconds of the losses alone on the logits of the run "torch"."""

    runs: dict[str, Run]
    loss_seconds: dict[str, list[float]] = field(
        default_factory=lambda: {name: [] for name in LOSSES}
    )

    @property
    def steps(self) -> int:
        """Return the number of steps that every run has taken."""
        return len(self.runs["torch"].losses)

    def difference(self, name: str) -> np.ndarray:
        """Return |loss − torch's loss| of each step."""
        return np.abs(np.subtract(self.runs[name].losses, self.runs["torch"].losses))


def in_turn(names: list[str], step: int) -> list[str]:
    first = step % len(names)
    return names[first:] + names[:first]


def compare(data: Images, *, epochs: int = 3, batch_size: int = 128, seed: int = 0) -> Comparison:
    """Train all runs on the same batches."""
    runs = {name: Run(loss, seed) for name, loss in LOSSES.items()}
    runs[REVERSED] = Run(functional.cross_entropy, seed)
    comparison = Comparison(runs)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.input), generator=order).split(batch_size):
            input, target = data.input[rows], data.target[rows]
            step, logits = comparison.steps, {}
            for name in in_turn(list(runs), step):
                if name == REVERSED:
                    logits[name] = runs[name].step(input.flip(0), target.flip(0))
                else:
                    logits[name] = runs[name].step(input, target)
            for name in in_turn(list(LOSSES), step):
                seconds = time_loss(LOSSES[name], logits["torch"], target)
                comparison.loss_seconds[name].append(seconds)
    return comparison


def time_loss(cross_entropy: Loss, logits: Tensor, target: Tensor) -> float:
    """Return the seconds of the loss and its gradient in the logits."""
    logits = logits.clone().requires_grad_()
    begin = perf_counter()
    cross_entropy(logits, target).backward()
    return perf_counter() - begin


def report(comparison: Comparison, data: Images) -> None:
    runs = comparison.runs
    predicted = {name: run.predict(data.test_input) for name, run in runs.items()}

    def line(title: str, cells: dict[str, str]) -> None:
        print(f"{title:36}" + "".join(f"{cells.get(name, ''):>17}" for name in runs))

    print(
        f"{len(data.input)} images, {comparison.steps} steps; "
        f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    line("", {name: name for name in runs})
    line("loss at the first step", {n: f"{run.losses[0]:.7f}" for n, run in runs.items()})
    last = min(100, comparison.steps)
    line(
        f"mean loss of the last {last}",
        {n: f"{np.mean(run.losses[-last:]):.7f}" for n, run in runs.items()},
    )
    right = {name: (p == data.test_target).float().mean().item() for name, p in predicted.items()}
    line("test accuracy", {name: f"{share:.2%}" for name, share in right.items()})

    print("\nlargest difference from torch's loss")
    others = [name for name in runs if name != "torch"]
    for first in sorted({1, 10, 100, comparison.steps}):
        if first <= comparison.steps:
            title = "  at the first step" if first == 1 else f"  in the first {first} steps"
            largest = {name: comparison.difference(name)[:first].max() for name in others}
            line(title, {name: f"{value:.1e}" for name, value in largest.items()})
    differ = {name: int((predicted[name] != predicted["torch"]).sum()) for name in others}
    line(
        f"test images of {len(data.test_target)} read otherwise",
        {n: str(differ[n]) for n in others},
    )

    print("\ntime, median of all steps")
    step = {name: run.seconds for name, run in runs.items()}
    alone = comparison.loss_seconds
    share = {name: median(alone[name]) / median(step[name]) for name in alone}
    line("  a step", {name: f"{median(s) * 1e3:.2f} ms" for name, s in step.items()})
    line("  loss and gradient alone", {n: f"{median(alone[n]) * 1e6:.0f} µs" for n in alone})
    line("  their share of a step", {name: f"{value:.2%}" for name, value in share.items()})


def plot(comparison: Comparison, path: str) -> None:
    """Draw the losses over each other, and below them how far they are from torch's."""
    from matplotlib.figure import Figure

    steps = np.arange(1, comparison.steps + 1)
    torch_losses = np.array(comparison.runs["torch"].losses)
    figure = Figure(figsize=(8, 5.8), layout="constrained")
    curves, differences = figure.subplots(2, 1, sharex=True)
    # crossent wide and below, so that both show where they agree
    curves.plot(
        steps, comparison.runs["crossent"].losses, color="#1d4ed8", linewidth=2.4, label="crossent"
    )
    curves.plot(steps, torch_losses, color="#fb923c", linewidth=0.7, label="torch")
    curves.set_ylim(bottom=0)
    curves.set_title("training loss of each step", fontsize=10, loc="left")
    curves.legend(frameon=False)
    styles = {
        REVERSED: ("#9ca3af", "torch, images of each batch in reverse order"),
        "crossent": ("#1d4ed8", "crossent"),
    }
    for name, (color, label) in styles.items():
        differences.plot(
            steps, comparison.difference(name), ".", color=color, markersize=2.5, label=label
        )
    differences.plot(
        steps,
        np.spacing(torch_losses.astype(np.float32)),
        color="black",
        linewidth=0.8,
        label="one ulp: distance to the next float32",
    )
    differences.set_xscale("log")  # both: the axis is shared
    differences.xaxis.set_major_formatter("{x:g}")
    differences.set_yscale("log")
    differences.set_title("distance from torch's loss (no dot: none)", fontsize=10, loc="left")
    differences.set_xlabel("step")
    differences.legend(frameon=False, markerscale=4, loc="upper left")
    for axes in (curves, differences):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.margins(x=0.005)
    figure.savefig(path, dpi=110)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="One import changed: a CNN on Fashion-MNIST.")
    parser.add_argument("--epochs", type=positive, default=3)
    parser.add_argument(
        "--rows", type=positive, help="train on the first ROWS images (default: all)"
    )
    parser.add_argument("--batch-size", type=positive, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=FASHION_MNIST_FOLDER,
        help="folder of the four files (default: %(default)s)",
    )
    parser.add_argument("--plot", metavar="PATH", help="where to write the figure (.png or .svg)")
    args = parser.parse_args(argv)
    if args.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib; pip install 'crossent[cli]'")
    if args.plot and not Path(args.plot).parent.is_dir():
        parser.error(f"--plot: there is no folder {Path(args.plot).parent}")
    torch.use_deterministic_algorithms(True)
    try:
        data = fashion_mnist(args.data_dir, args.rows)
    except InputError as error:
        parser.error(f"{error} (apt install dataset-fashion-mnist, or --data-dir FOLDER)")
    comparison = compare(data, epochs=args.epochs, batch_size=args.batch_size, seed=args.seed)
    report(comparison, data)
    if args.plot:
        plot(comparison, args.plot)


if __name__ == "__main__":
    main()
