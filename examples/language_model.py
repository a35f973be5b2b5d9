"""A small GPT on Python's own source, trained with the logits held and with crossent's fused head.

What a user changes is one line:

    - loss = cross_entropy(linear(hidden, weight), target)
    + loss = linear_cross_entropy(hidden, weight, target)

Same start, same batches, same optimiser. A third run shows what such a comparison can show at all:
PyTorch's functions once more, with each batch's sequences in reverse order. That step is the same
on paper, and its sums round otherwise.

    python examples/language_model.py --plot language-model.png

docs/language-model.md explains what it shows. The text is the standard library of the Python that
runs this; `tokenizers` learns the vocabulary from it; the plot needs matplotlib.

Shapes: B sequences of T tokens, N = B·T rows of D features, V tokens in the vocabulary.

Design:
  a. The runs go through each batch in turn, not one after the other, so that whatever else the
     machine does slows all of them alike; who begins changes from step to step.
  b. The peak of memory is a process's own, so each head trains once more in a process of its own,
     on tokens drawn at random: memory depends on the shapes alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

try:
    import torch
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    package = str(error.name).partition(".")[0]
    if package not in ("torch", "rich"):
        raise
    raise SystemExit(
        f"language_model.py needs {package}; pip install 'crossent[examples]'"
    ) from None
from torch import Tensor, nn
from torch.nn import functional

import crossent
from crossent.torch import linear_cross_entropy


def held_logits(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Return the loss the usual way, which holds the logits, (N, V)."""
    return functional.cross_entropy(functional.linear(hidden, weight), target)


Head = Callable[[Tensor, Tensor, Tensor], Tensor]
HEADS: dict[str, Head] = {"torch": held_logits, "crossent": linear_cross_entropy}
REVERSED = "torch, reversed"
WARM_UP = 3  # steps whose time does not count


@dataclass(frozen=True)
class Sizes:
    """What the model and its batches look like."""

    vocabulary: int = 16384
    width: int = 256
    layers: int = 2
    batch: int = 16
    context: int = 128
    seed: int = 0


# Text ---------------------------------------------------------------------------------------------


def library_source() -> list[str]:
    """Return the files of the standard library, in sorted order; its package `test` is no part."""
    folder = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
    return [
        (folder / name).read_text("utf-8", errors="replace")
        for name in names
        if name.parts[0].removesuffix(".py") in sys.stdlib_module_names
    ]


def tokenise(texts: list[str], vocabulary: int) -> Tensor:
    """Learn byte-level BPE tokens from the texts, and return these as one row of tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return torch.tensor([token for text in texts for token in tokenizer.encode(text).ids])


def batches(tokens: Tensor, sizes: Sizes, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets, (B, T) each: pieces from anywhere, the same for the same seed."""
    generator = torch.Generator().manual_seed(sizes.seed)
    offsets = torch.arange(sizes.context)
    for _ in range(steps):
        begin = torch.randint(len(tokens) - sizes.context, (sizes.batch, 1), generator=generator)
        yield tokens[begin + offsets], tokens[begin + offsets + 1]


# Model --------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Causal self-attention and a layer of 4 D hidden units, each added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.gather = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        """Return what the next block takes."""
        parts = self.query_key_value(self.before_attention(x)).chunk(3, dim=-1)
        parts = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        seen = functional.scaled_dot_product_attention(*parts, is_causal=True)  # (B, heads, T, ·)
        x = x + self.gather(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class GPT(nn.Module):
    """Tokens and learned positions through the blocks; the head's weights are the tokens' own."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        torch.manual_seed(sizes.seed)
        heads = max(1, sizes.width // 64)
        self.tokens = nn.Embedding(sizes.vocabulary, sizes.width)
        self.positions = nn.Embedding(sizes.context, sizes.width)
        self.blocks = nn.Sequential(*(Block(sizes.width, heads) for _ in range(sizes.layers)))
        self.norm = nn.LayerNorm(sizes.width)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)  # as GPT-2: the first loss is near log V

    def forward(self, input: Tensor) -> Tensor:  # (B, T)
        """Return what the head takes, (N, D)."""
        x = self.tokens(input) + self.positions.weight[: input.shape[1]]
        return self.norm(self.blocks(x)).flatten(0, 1)


class Run:
    """One model, its optimiser, and what was recorded of it."""

    def __init__(self, head: Head, sizes: Sizes) -> None:
        self.head = head
        self.model = GPT(sizes)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.losses: list[float] = []  # of each step
        self.seconds: list[float] = []  # of each step
        self.head_seconds: list[float] = []  # of them the head's, forward and backward

    def step(self, input: Tensor, target: Tensor) -> None:
        """Train on one batch."""
        times = [perf_counter()]
        self.optimiser.zero_grad()
        hidden = self.model(input)
        # the head's backward is over when the features have their gradient
        hidden.register_hook(lambda grad: times.append(perf_counter()))
        times.append(perf_counter())
        loss = self.head(hidden, self.model.tokens.weight, target.flatten())
        loss.backward()
        self.optimiser.step()
        begin, head, blocks = times
        self.seconds.append(perf_counter() - begin)
        self.head_seconds.append(blocks - head)
        self.losses.append(loss.item())


# Comparison ---------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """The runs by name, and bytes that each head's training takes."""

    sizes: Sizes
    runs: dict[str, Run]
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Return the number of steps that every run has taken."""
        return len(self.runs["torch"].losses)

    def difference(self, name: str) -> np.ndarray:
        """Return |loss − torch's loss| / torch's loss of each step."""
        losses = np.array(self.runs["torch"].losses)
        return np.abs(self.runs[name].losses - losses) / losses

    def seconds(self, name: str) -> tuple[float, float]:
        """Return the median of a step's time and of its head's, without the warm-up."""
        run, first = self.runs[name], min(WARM_UP, self.steps - 1)
        return median(run.seconds[first:]), median(run.head_seconds[first:])


def compare(tokens: Tensor, sizes: Sizes, steps: int) -> Comparison:
    """Train all runs on the same batches."""
    runs = {name: Run(head, sizes) for name, head in HEADS.items()}
    runs[REVERSED] = Run(held_logits, sizes)
    names = list(runs)
    for step, (input, target) in enumerate(batches(tokens, sizes, steps)):
        first = step % len(names)
        for name in names[first:] + names[:first]:
            if name == REVERSED:
                runs[name].step(input.flip(0), target.flip(0))
            else:
                runs[name].step(input, target)
    return Comparison(sizes, runs)


def peak_bytes() -> int:
    """Return the most memory that this process has held so far (Linux)."""
    status = Path("/proc/self/status").read_text("ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def memory_taken(name: str, sizes: Sizes, steps: int = 3) -> int:
    """Return by how much some steps raise this process's peak, the model being there already."""
    tiny = replace(sizes, vocabulary=64, width=64, batch=1, context=8)
    tokens = torch.randint(64, (10 * sizes.context,))
    for first in (tiny, sizes):  # the tiny one brings what libraries load at their first use
        run = Run(HEADS[name], first)
        before = peak_bytes()
        for input, target in batches(tokens, first, steps):
            run.step(input, target)
    return peak_bytes() - before


def memory_in_a_process(name: str, sizes: Sizes, threads: int) -> int:
    """Return `memory_taken`, measured by a Python of its own."""
    given = [f"--{f.name}={getattr(sizes, f.name)}" for f in fields(sizes)]
    command = [sys.executable, __file__, "--memory-of", name, *given, f"--threads={threads}"]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


# Report -------------------------------------------------------------------------------------------


def report(comparison: Comparison) -> None:
    runs, steps, sizes = comparison.runs, comparison.steps, comparison.sizes
    console = Console(highlight=False)
    others = [name for name in runs if name != "torch"]

    def table(title: str, rows: dict[str, dict[str, str]]) -> None:
        found = Table(title=title, title_justify="left", title_style="bold", box=None)
        found.add_column("")
        for name in runs:
            found.add_column(name, justify="right")
        for row, cells in rows.items():
            found.add_row(row, *(cells.get(name, "") for name in runs))
        console.print(found, "")

    last = min(10, steps)
    table(
        "loss, a token",
        {
            "first step": {name: f"{run.losses[0]:.7f}" for name, run in runs.items()},
            f"mean of the last {last}": {
                name: f"{np.mean(run.losses[-last:]):.7f}" for name, run in runs.items()
            },
        },
    )
    table(
        "largest relative difference from torch's loss",
        {
            "first step" if first == 1 else f"first {first} steps": {
                name: f"{comparison.difference(name)[:first].max():.1e}" for name in others
            }
            for first in sorted({1, 10, 20, steps})
            if first <= steps
        },
    )
    seconds = {name: comparison.seconds(name) for name in runs}
    rows = sizes.batch * sizes.context
    table(
        "time and memory",
        {
            "a step, median": {name: f"{step * 1e3:.0f} ms" for name, (step, _) in seconds.items()},
            "of it the head": {name: f"{head * 1e3:.0f} ms" for name, (_, head) in seconds.items()},
            "tokens a second": {name: f"{rows / step:.0f}" for name, (step, _) in seconds.items()},
            "memory training takes": {
                name: f"{taken / 1e6:.0f} MB" for name, taken in comparison.memory.items()
            },
        },
    )
    console.print(
        f"The logits are {rows} × {sizes.vocabulary}, "
        f"{rows * sizes.vocabulary * 4 / 1e6:.0f} MB in float32."
    )


COLORS = {"torch": "#fb923c", "crossent": "#1d4ed8", REVERSED: "#9ca3af"}


def plot(comparison: Comparison, path: str) -> None:
    """Draw the losses over each other, how far they are from torch's, time and memory."""
    from matplotlib.figure import Figure

    runs, steps = comparison.runs, np.arange(1, comparison.steps + 1)
    figure = Figure(figsize=(9, 6), layout="constrained")
    grid = figure.subplot_mosaic("CCCTT\nDDDMM")
    # crossent wide and below, so that both show where they agree
    for name, width in (("crossent", 3.2), ("torch", 1.0)):
        grid["C"].plot(steps, runs[name].losses, color=COLORS[name], linewidth=width, label=name)
    grid["C"].set_title("training loss of each step, a token", fontsize=10, loc="left")
    labels = {REVERSED: "torch, sequences of each batch in reverse order", "crossent": "crossent"}
    for name, label in labels.items():
        difference = comparison.difference(name)
        there = difference > 0
        grid["D"].plot(
            steps[there], difference[there], ".", color=COLORS[name], markersize=5, label=label
        )
    losses = np.array(runs["torch"].losses)
    ulp = np.spacing(losses.astype(np.float32)) / losses
    grid["D"].plot(steps, ulp, color="black", linewidth=0.8, label="one ulp of float32")
    grid["D"].set_yscale("log")
    grid["D"].set_title(
        "relative difference from torch's loss (no dot: none)", fontsize=10, loc="left"
    )
    for panel in ("C", "D"):
        grid[panel].set_xlabel("step")
        grid[panel].legend(frameon=False, fontsize=9)
        grid[panel].grid(alpha=0.25)

    names = list(HEADS)[::-1]  # the first one on top
    seconds = np.array([comparison.seconds(name) for name in names])  # step, head
    colors = [COLORS[name] for name in names]
    rest = seconds[:, 0] - seconds[:, 1]
    megabytes = [comparison.memory[name] / 1e6 for name in names]

    def bars(panel: str, lengths: Any, left: Any, alpha: float, label: str) -> None:
        drawn = grid[panel].barh(names, lengths, 0.55, left, color=colors, alpha=alpha)
        grid[panel].bar_label(drawn, fmt=label, label_type="center", fontsize=9)

    bars("T", seconds[:, 1], 0, 0.6, "head %.2f s")
    bars("T", rest, seconds[:, 1], 0.2, "rest %.2f s")
    bars("M", megabytes, 0, 0.6, "%.0f MB")
    grid["T"].set_title("time of a step, median", fontsize=10, loc="left")
    grid["M"].set_title("memory that training takes", fontsize=10, loc="left")
    for panel, unit in (("T", "seconds"), ("M", "MB")):
        grid[panel].set_xlabel(unit)
        grid[panel].grid(axis="x", alpha=0.25)
        grid[panel].set_axisbelow(True)
        grid[panel].tick_params(axis="y", length=0)
    for axes in grid.values():
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        found = int(text)
        if found < least:
            raise argparse.ArgumentTypeError(f"{found} is less than {least}")
        return found

    return number


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="One line changed: a small GPT on Python's source."
    )
    parser.add_argument("--steps", type=at_least(1), default=80)
    for part in fields(Sizes):
        least = {"vocabulary": 256, "seed": 0}.get(part.name, 1)
        parser.add_argument(f"--{part.name}", type=at_least(least), default=part.default)
    parser.add_argument("--threads", type=at_least(1), default=torch.get_num_threads())
    parser.add_argument("--plot", metavar="PATH", help="where to write the figure (.png or .svg)")
    parser.add_argument("--memory-of", choices=HEADS, help=argparse.SUPPRESS)  # for ourselves
    args = parser.parse_args(argv)
    sizes = Sizes(**{part.name: getattr(args, part.name) for part in fields(Sizes)})
    if sizes.width > 64 and sizes.width % (sizes.width // 64):
        parser.error(f"--width {sizes.width} does not divide into {sizes.width // 64} heads")
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(args.threads)
    crossent.set_num_threads(args.threads)
    if args.memory_of:
        print(memory_taken(args.memory_of, sizes))
        return
    wanted = {"tokenizers": "the text", "matplotlib": "--plot"}
    for package, what in wanted.items():
        if (package == "tokenizers" or args.plot) and not importlib.util.find_spec(package):
            parser.error(f"{what} needs {package}; pip install 'crossent[examples]'")
    if args.plot and not Path(args.plot).parent.is_dir():
        parser.error(f"--plot: there is no folder {Path(args.plot).parent}")

    texts = library_source()
    tokens = tokenise(texts, sizes.vocabulary)
    if len(tokens) <= sizes.context:
        parser.error(f"--context {sizes.context}: the text has {len(tokens)} tokens")
    run = Run(held_logits, sizes)
    parameters = sum(p.numel() for p in run.model.parameters())
    del run
    Console(highlight=False).print(
        f"{len(texts)} files, {sum(map(len, texts)) / 1e6:.1f} million characters, "
        f"{len(tokens) / 1e6:.2f} million tokens; {parameters / 1e6:.2f} million parameters; "
        f"{args.steps} steps; Python {sys.version.split()[0]}, PyTorch {torch.__version__}, "
        f"{args.threads} threads\n"
    )
    comparison = compare(tokens, sizes, args.steps)
    for name in HEADS:
        comparison.memory[name] = memory_in_a_process(name, sizes, args.threads)
    report(comparison)
    if args.plot:
        plot(comparison, args.plot)


if __name__ == "__main__":
    main()
