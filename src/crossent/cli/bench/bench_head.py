"""`crossent bench head`: the last layer with its loss and gradients, against peers and products."""

from __future__ import annotations

from crossent.cli.bench import memory
from crossent.cli.bench.benchmark import Benchmark, Column, Words
from crossent.cli.bench.head_results import HEAD_KINDS
from crossent.cli.bench.peers_frameworks_head import head_peers, our_heads
from crossent.cli.bench.yardsticks import yardsticks

LEADER = "crossent-torch"
WORDS = Words(
    name="head",
    columns=(
        Column("best peer", "best peer", name=LEADER),
        Column("torch", "torch", name=LEADER),
        Column("products", "products", name=LEADER),
        Column("read of x", "read of x", name=LEADER),
        Column("NumPy / best peer", "best peer"),
        Column("NumPy / products", "products"),
        Column("NumPy / read of x", "read of x"),
    ),
    base="products",
    base_text="the products",
    axis="products",
    axis_text="the products of matrices that it takes, at the best rate of any library",
    title="The last layer with its loss and gradients",
    caption="Gradients are new. Products: what nobody can do without, in float32.",
    packages=("numpy", "torch", "jax"),
    ratios="The first columns are of `crossent.torch.linear_cross_entropy`; those named NumPy, and "
    "float32, of `crossent.linear_cross_entropy_value_and_grad`.",
    times="the column after the spread is over the products of matrices that the task takes: "
    "2·N·D·V operations for the loss alone, as many again for each gradient.",
    method="A call computes the mean loss of x Wᵀ and target, and new gradients in x and W (in W "
    "alone for Fashion-MNIST, whose x is data), and releases them. The products' rate is the best "
    "that NumPy, torch.mm and oneDNN's linear (through PyTorch) reach with square float32 matrices "
    "of 2048 (128 in a quick run), timed in turn with the contenders of each problem. One read of "
    "x is a bitwise or of its words by as many threads, a part each. Errors are the norm of the "
    "difference to plain formulas in float64 over the norm of what those give, for fewer rows and "
    f"classes where there are many. {memory.METHOD}",
    leader=LEADER,
    sizes="N×D×V",
    mark=("read", "one read of x"),
)
# a sum of products has more rounding than a row of logits
HEAD = Benchmark(WORDS, HEAD_KINDS, head_peers, our_heads, yardsticks, slack=10.0)
