"""Linear probes: what a network knows of classes it has never seen, layer by layer.

A small convolutional network learns five of Fashion-MNIST's classes. Each of its layers, and the
same layer before training, then describes images of the other five, and a softmax classifier is
fitted to that description and to few labels: the probe. Pixels are the description to beat.

    python examples/linear_probe.py --plot linear-probe.png

docs/linear-probe.md explains what it shows. The data are Debian's package dataset-fashion-mnist;
the plot needs matplotlib.

Shapes: N images of 1 × 28 × 28 pixels, D features of a layer, V = 5 classes.

Design: features are written to disk once and mapped into memory. The classifier reads them there, a
block of rows at a time, and makes no copy, so they may be larger than memory; the table says what a
fit took besides.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

try:
    import torch
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    package = str(error.name).partition(".")[0]
    if package not in ("torch", "rich"):
        raise
    raise SystemExit(
        f"linear_probe.py needs {package}; pip install 'crossent[torch,cli]'"
    ) from None
from torch import Tensor, nn

from crossent.cli import idx
from crossent.cli.data import FASHION_MNIST_CLASSES, FASHION_MNIST_FOLDER
from crossent.cli.errors import InputError
from crossent.sklearn import FitProgress, SoftmaxClassifier
from crossent.torch import CrossEntropyLoss

Array = NDArray[Any]
KNOWN = (0, 1, 2, 3, 4)  # what the network learns; the probes learn the others
C_PATH = tuple(float(f"{10**exponent:.1g}") for exponent in np.arange(-3, 2.1, 0.5))
TOLERANCE = 1e-3  # float32 allows little below 1e-4, which moved a test loss of 0.235 by 0.001


class Images(NamedTuple):
    """Images (N, 1, 28, 28) in [0, 1] and their classes (N,)."""

    input: Tensor
    target: Tensor


def split_classes(folder: Path, part: str) -> tuple[Images, Images]:
    """Return a part's images of the known classes and of the others, numbered 0 to 4 each."""
    pixels, labels = idx.read_part(folder, part)
    known = np.isin(labels, KNOWN)
    others = np.setdiff1d(np.arange(10), KNOWN)
    return tuple(
        Images(
            torch.from_numpy(pixels[rows].astype(np.float32) / 255)[:, None],
            torch.from_numpy(np.searchsorted(classes, labels[rows])),
        )
        for rows, classes in ((known, np.array(KNOWN)), (~known, others))
    )


# The network --------------------------------------------------------------------------------------


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        nn.Sequential(nn.Linear(32 * 7 * 7, 64), nn.ReLU()),
        nn.Linear(64, len(KNOWN)),
    )


LAYERS = ("1st convolution", "2nd convolution", "hidden layer")
OUTPUTS = "its five outputs, trained"


def train(model: nn.Sequential, images: Images, *, epochs: int, seed: int) -> None:
    loss, optimiser = CrossEntropyLoss(), torch.optim.Adam(model.parameters())
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(images.input), generator=order).split(128):
            optimiser.zero_grad()
            loss(model(images.input[rows]), images.target[rows]).backward()
            optimiser.step()


def accuracy(model: nn.Sequential, images: Images) -> float:
    with torch.no_grad():
        predicted = torch.cat([model(part).argmax(dim=1) for part in images.input.split(1000)])
    return (predicted == images.target).float().mean().item()


def write_features(path: Path, layers: nn.Sequential, images: Tensor, scale: float | None) -> float:
    """Write what the layers make of the images, (N, D) float32, divided by the scale; return that.

    No scale given: the features' root mean square over the first thousand images. One number for
    all columns, so that the same C means about the same in every layer.
    """
    with torch.no_grad():
        first = layers(images[:1000]).flatten(1)
        scale = scale or first.square().mean().sqrt().item()
        shape = (len(images), first.shape[1])
        features = np.lib.format.open_memmap(path, "w+", np.float32, shape)
        begin = 0
        for part in images.split(1000):
            features[begin : begin + len(part)] = layers(part).flatten(1) / scale
            begin += len(part)
    features.flush()
    return scale


# The probe ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """What a probe of one description found."""

    n_labels: int
    C: float
    loss: float  # on the test images
    accuracy: float
    megabytes: float  # of the features it was fitted to
    taken: float  # MB of memory that the fits took besides


def probe(
    features: Array, target: Array, test_features: Array, test_target: Array, n_labels: int
) -> Probe:
    """Fit a probe to the first `n_labels` images, with the C that is best for a fifth of them."""
    n_fit = n_labels - n_labels // 5
    before, peak = memory(), 0.0

    def watch(progress: FitProgress) -> None:
        nonlocal peak
        peak = max(peak, memory())

    model = SoftmaxClassifier(tol=TOLERANCE, max_iter=2000, warm_start=True, callback=watch)
    losses: dict[float, float] = {}
    for C in C_PATH:  # from strong to weak: each fit starts where the last one ended
        # slices of a memory map are maps: nothing is copied
        model.set_params(C=C).fit(features[:n_fit], target[:n_fit])
        losses[C] = mean_loss(model, features[n_fit:n_labels], target[n_fit:n_labels])
        if losses[C] > min(losses.values()):
            break
    best = min(losses, key=losses.__getitem__)
    model.set_params(C=best).fit(features[:n_labels], target[:n_labels])
    return Probe(
        n_labels,
        best,
        mean_loss(model, test_features, test_target),
        float(model.score(test_features, test_target)),
        features[:n_labels].nbytes / 1e6,
        peak - before,
    )


def mean_loss(model: SoftmaxClassifier, features: Array, target: Array) -> float:
    return float(-model.predict_log_proba(features)[np.arange(len(target)), target].mean())


def memory() -> float:
    """Return the MB of memory that are this process's own: files mapped into it do not count."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024 / 1e6


def descriptions(seed: int, known: Images, epochs: int) -> dict[str, nn.Sequential]:
    """Return what describes images: each layer, before and after training, under its name."""
    found = {"pixels": nn.Sequential()}
    for state in ("untrained", "trained"):
        model = network(seed)
        if state == "trained":
            train(model, known, epochs=epochs, seed=seed)
        model.eval().requires_grad_(False)
        found |= {f"{layer}, {state}": model[: i + 1] for i, layer in enumerate(LAYERS)}
    found[OUTPUTS] = model
    return found


def probe_all(
    networks: dict[str, nn.Sequential], train: Images, test: Images, labels: list[int], folder: Path
) -> dict[str, list[Probe]]:
    """Return the probes of every description, one for each number of labels."""
    found = {}
    for name, layers in networks.items():
        scale = write_features(folder / "train.npy", layers, train.input[: max(labels)], None)
        write_features(folder / "test.npy", layers, test.input, scale)
        features, test_features = (
            np.load(folder / f"{part}.npy", mmap_mode="r") for part in ("train", "test")
        )
        target, test_target = train.target.numpy(), test.target.numpy()
        found[name] = [probe(features, target, test_features, test_target, n) for n in labels]
    return found


# Report -------------------------------------------------------------------------------------------


def report(probes: dict[str, list[Probe]]) -> None:
    console = Console(highlight=False, width=100)
    labels = [probe.n_labels for probe in next(iter(probes.values()))]
    for title, cell in (
        ("test accuracy", lambda probe: f"{probe.accuracy:.1%}"),
        ("test loss", lambda probe: f"{probe.loss:.3f}"),
        ("C chosen", lambda probe: f"{probe.C:g}"),
    ):
        table = Table(box=None, pad_edge=False)
        table.add_column(f"{title}, by number of labels", width=36)
        for n_labels in labels:
            table.add_column(str(n_labels), justify="right", width=9)
        for name, row in probes.items():
            table.add_row(name, *(cell(probe) for probe in row))
        console.print(table, "")
    largest = max((probe for row in probes.values() for probe in row), key=lambda p: p.megabytes)
    console.print(
        f"largest features {largest.megabytes:.0f} MB, mapped from disk; "
        f"the fits to them took {largest.taken:.0f} MB besides"
    )


def plot(probes: dict[str, list[Probe]], path: str) -> None:
    """Draw the test accuracy of every description over the number of labels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    colors = dict(zip(("pixels", *LAYERS), ("black", "#93c5fd", "#2563eb", "#ea580c"), strict=True))
    for name, row in probes.items():
        layer, _, state = name.partition(", ")
        axes.plot(
            [probe.n_labels for probe in row],
            [1 - probe.accuracy for probe in row],
            "o--" if state == "untrained" else "o-",
            color=colors.get(layer, "#9ca3af"),
            label=name,
            markersize=4,
        )
    axes.set(xscale="log", yscale="log", xlabel="labelled images of the five new classes")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.yaxis.set_minor_formatter(lambda share, _: f"{share:.0%}")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title("test error of a linear probe", fontsize=10, loc="left")
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=9, loc="outside right upper")
    figure.savefig(path, dpi=130)


def at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        found = int(text)
        if found < least:
            raise argparse.ArgumentTypeError(f"{found} is less than {least}")
        return found

    return number


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What a network knows of classes it has not seen.")
    parser.add_argument("--epochs", type=at_least(1), default=2, help="of the network")
    parser.add_argument("--labels", type=at_least(50), nargs="+", default=[100, 300, 1000, 3000])
    parser.add_argument("--seed", type=at_least(0), default=0)
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
    try:
        known, others = split_classes(args.data_dir, "train")
        known_test, others_test = split_classes(args.data_dir, "test")
    except InputError as error:
        parser.error(f"{error} (apt install dataset-fashion-mnist, or --data-dir FOLDER)")
    if max(args.labels) > len(others.input):
        parser.error(f"--labels {max(args.labels)}: there are {len(others.input)} images")
    torch.use_deterministic_algorithms(True)
    networks = descriptions(args.seed, known, args.epochs)
    print(
        f"The network tells {', '.join(FASHION_MNIST_CLASSES[i] for i in KNOWN)} apart: "
        f"{accuracy(networks[OUTPUTS], known_test):.1%} of the test images."
    )
    names = [name for i, name in enumerate(FASHION_MNIST_CLASSES) if i not in KNOWN]
    print(f"The probes tell {', '.join(names)} apart, with features of that network.\n")
    with tempfile.TemporaryDirectory() as folder:
        probes = probe_all(networks, others, others_test, sorted(args.labels), Path(folder))
    report(probes)
    if args.plot:
        plot(probes, args.plot)


if __name__ == "__main__":
    main()
