"""`crossent bench rows`: the loss of rows of logits and its gradient, against peers and copies."""

from __future__ import annotations

import numpy as np

import crossent
from crossent import _native
from crossent.cli.bench.benchmark import Benchmark, Column, Copies, Words
from crossent.cli.bench.inputs import row_kinds
from crossent.cli.bench.peers import Contender, Output, Problem, Task, all_peers
from crossent.cli.bench.timing import Call


def ours(problem: Problem) -> list[Contender]:
    """Return crossent's own calls."""
    x, t, axis, kept = problem.logits, problem.target, problem.axis, problem.kept
    value_and_grad = crossent.cross_entropy_value_and_grad
    if problem.task == "loss+gradient":
        return [
            Contender("fresh", lambda: value_and_grad(x, t, axis=axis)),
            Contender("kept", lambda: value_and_grad(x, t, axis=axis, out=kept)),
        ]
    others: dict[Task, tuple[Call, Output]] = {
        "loss": (lambda: crossent.cross_entropy(x, t, axis=axis), "none"),
        "softmax": (lambda: crossent.softmax(x, axis=axis), "fresh"),
        "log_softmax": (lambda: crossent.log_softmax(x, axis=axis), "fresh"),
        "stats": (lambda: crossent.cross_entropy_stats(x, t, axis=axis), "none"),
    }
    call, output = others[problem.task]
    return [Contender(output, call)]


def copies(problem: Problem) -> Copies:
    """Return the copies of the same bytes, by name, each with its title."""
    x, kept = problem.logits, problem.kept
    source, out = (array.reshape(-1).view(np.uint8) for array in (x, kept))

    def by_all_threads(streaming: bool) -> Call:
        return lambda: _native.copy_bytes(out, source, streaming)

    return {
        "copy": ("x.copy()", Contender("fresh", x.copy)),
        "copyto": ("numpy.copyto", Contender("kept", lambda: np.copyto(kept, x))),
        "threads": ("copy, all threads", Contender("kept", by_all_threads(False))),
        "stream": ("copy, all threads, streaming", Contender("kept", by_all_threads(True))),
    }


WORDS = Words(
    name="rows",
    columns=(
        Column("best peer", "best peer"),
        Column("x.copy()", "x.copy()"),
        Column("copyto", "numpy.copyto", "kept"),
        Column("threads' copy", "copy by all threads", "kept"),
        Column("fastest copy", "fastest copy", "kept"),
    ),
    base="fastest copy",
    base_text="the copy",
    axis="threads",
    axis_text="a plain copy of the logits by as many threads",
    title="Softmax cross-entropy and its gradient",
    caption="Peers make a new array, and so does crossent but for out=; a copy goes to an array "
    "that exists.",
    packages=("numpy", "scikit-learn", "torch", "jax"),
    ratios="Fresh: the result is a new array, as it is for `x.copy()`; kept: `out=` names an array "
    "that exists, as for the other copies.",
    times="the last column is over the fastest copy into an array that exists.",
)
ROWS = Benchmark(WORDS, row_kinds(held=7), all_peers, ours, copies)
