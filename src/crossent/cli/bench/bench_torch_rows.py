"""`crossent bench torch-rows`: a loss and its backward pass from PyTorch, against its own."""

from __future__ import annotations

from crossent.cli.bench.benchmark import Benchmark, Column, Words
from crossent.cli.bench.inputs import row_kinds
from crossent.cli.bench.peers_frameworks_steps import our_step, step_peers
from crossent.cli.bench.shapes import MAIN

COMPILED = "crossent-compile"
WORDS = Words(
    name="torch-rows",
    columns=(
        Column("torch", "torch"),
        Column("torch.compile", "torch.compile"),
        Column("compiled / torch", "torch", name=COMPILED),
        Column("compiled / torch.compile", "torch.compile", name=COMPILED),
    ),
    base="torch",
    base_text="torch",
    axis="torch",
    axis_text="torch.nn.functional.cross_entropy, eager",
    title="Loss and backward pass from PyTorch",
    caption="Each call makes a new gradient.",
    packages=("torch",),
    ratios="torch is `torch.nn.functional.cross_entropy`, eager; torch.compile is the same, "
    "compiled. The first columns are of `crossent.torch.cross_entropy`, eager; those named "
    "compiled, of the same under `torch.compile`.",
    times="the last column is over torch, eager.",
    method="A call sets x.grad to None, computes the mean loss of x and target, and calls "
    "loss.backward(); it releases the gradient of the call before. Every contender's x has the "
    "same memory.",
)
# at once: logits, an output, every contender's last gradient, and two arrays of torch's, eager
TORCH_ROWS = Benchmark(WORDS, row_kinds(held=8), step_peers, our_step, needs=("torch",), tasks=MAIN)
