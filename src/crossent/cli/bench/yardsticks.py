"""What the head is held against: products of matrices, and one read of the features.

The rate of products is that of square matrices in float32, the best that NumPy, PyTorch or oneDNN
reaches among the contenders of the same problem; its products then take `operations` over the rate.
"""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossent.cli.bench.benchmark import Copies
from crossent.cli.bench.head_problem import HeadProblem
from crossent.cli.bench.peers import Contender
from crossent.cli.bench.peers_frameworks_head import torch_products
from crossent.cli.bench.results import Timed
from crossent.cli.bench.timing import Call, Timing

_MEMORY_BOUND = 2**25  # bytes of features from which reading them is a matter of memory
_PIECES = 8  # for each thread
_COUNTS = {1: "one product", 2: "two products", 3: "three products"}


def yardsticks(problem: HeadProblem) -> Copies:
    """Return what is timed beside the contenders, by name, each with its title."""
    side = problem.side
    a, b = np.random.default_rng(0).standard_normal((2, side, side), dtype=np.float32)
    found: Copies = {"product-numpy": ("NumPy", Contender("kept", lambda: a @ b))}
    if importlib.util.find_spec("torch") is not None:
        found |= {
            f"product-{name}": (title, Contender("kept", call))
            for name, title, call in torch_products(a, b, problem.threads)
        }
    if problem.x.nbytes >= _MEMORY_BOUND and problem.frozen:
        title = "one read of x, all threads"
        found["read"] = (title, Contender("kept", reader(problem.x, problem.threads)))
    return found


def reader(x: NDArray[Any], threads: int) -> Call:
    """Return a call that reads all of an array, by as many threads; it makes next to nothing."""
    memory = x.reshape(-1).view(np.uint8)
    words = memory[: len(memory) // 8 * 8].view(np.uint64)
    parts = np.array_split(words, _PIECES * threads)
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(np.bitwise_or.reduce, parts))


def held_against(
    problem: HeadProblem, times: tuple[Timed, ...]
) -> tuple[tuple[Timed, ...], dict[str, float]]:
    """Return the times with the products of this problem in place of the square ones.

    Besides, the rates of the square ones in operations a second, by title.
    """
    operations = 2.0 * problem.side**3
    square = [each for each in times if each.name.startswith("product-")]
    best = min(square, key=lambda each: each.timing.median).timing
    rates = {each.title: operations / each.timing.median for each in square}
    factor = problem.operations / operations
    products = Timing(
        best.median * factor, best.lower * factor, best.upper * factor, best.n, best.inner
    )
    title = f"{_COUNTS[problem.products]} at {max(rates.values()) / 1e9:.0f} GFLOP/s"
    bounds = [Timed("products", title, "bound", "kept", products)]
    bounds += [
        Timed(each.name, each.title, "bound", "kept", each.timing)
        for each in times
        if each.name == "read"
    ]
    rest = (each for each in times if each.kind != "copy")
    return (*rest, *bounds), rates
