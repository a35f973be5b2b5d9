"""The head's problems: shapes named after models, their inputs, and the answer in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossent.cli.bench.inputs import in_dtype
from crossent.cli.bench.peers import SAMPLED, Arrays, Task, Unserved
from crossent.cli.bench.shapes import MAIN, SCALE, Shape

_SIDE = 2048  # of the square matrices whose product gives the rate
_AFFORDABLE = 2**31  # multiplications a product in float64


@dataclass(frozen=True)
class HeadShape(Shape):
    """A last layer: as many rows and classes as the logits would have, from `features` each.

    Parameters
    ----------
    features : int
    frozen : bool
        No gradient in the features is wanted: they are data.
    side : int
        Of the matrices whose product says how fast products are.
    """

    features: int = 1
    frozen: bool = False
    side: int = _SIDE

    @property
    def text(self) -> str:
        """Return rows, features and classes, 8192×2048×1000."""
        rows, classes = self.logits
        return f"{rows}×{self.features}×{classes}"

    def small(self) -> HeadShape:
        """Return the same use with few rows and features."""
        rows = replace(self, logits=(min(self.logits[0], 64), self.logits[1]))
        few = rows if self.logits[1] < 2000 else replace(self, logits=(4, self.logits[1]))
        return replace(few, features=min(self.features, 16), side=128)

    def affordable(self) -> HeadShape:
        """Return as much of it as a product in float64 is made of in a second or so."""
        rows, classes = self.logits
        while rows * classes * self.features > _AFFORDABLE:
            if classes > rows:
                classes //= 2
            else:
                rows //= 2
        return replace(self, logits=(rows, classes))


_BOTH = ("float32", "bfloat16")


def _vocabulary(name: str, use: str, n: int, d: int, v: int, default: bool = True) -> HeadShape:
    both: tuple[Task, ...] = (MAIN, "loss")
    return HeadShape(name, use, (n, v), tasks=both, dtypes=_BOTH, default=default, features=d)


HEADS = (
    HeadShape("fashion-mnist", "Fashion-MNIST, W alone", (60000, 10), features=784, frozen=True),
    HeadShape("classifier", "a small classifier", (8192, 1000), features=256),
    HeadShape("imagenet", "1000 classes of ImageNet", (8192, 1000), features=2048),
    _vocabulary("gpt-32k", "a 32k vocabulary", 2048, 768, 32768),
    _vocabulary("gpt-32k-wide", "a 32k vocabulary, wide", 2048, 2048, 32768),
    _vocabulary("gpt-128k", "a 128k vocabulary", 1024, 768, 131072),
    _vocabulary("gpt-128k-wide", "a 128k vocabulary, wide", 1024, 2048, 131072, default=False),
)


@dataclass(frozen=True)
class HeadProblem:
    """What is to be computed: the mean cross-entropy of the logits x Wᵀ, and its gradients.

    Parameters
    ----------
    task
        "loss+gradient" or "loss".
    x : ndarray (rows, features)
    weight : ndarray (classes, features)
        W.
    target : ndarray of int64 (rows,)
    frozen : bool
        The gradient is wanted in W alone.
    threads : int
    side : int
        As in `HeadShape`.
    """

    task: Task
    x: NDArray[Any]
    weight: NDArray[Any]
    target: NDArray[np.int64]
    frozen: bool
    threads: int
    side: int = _SIDE

    @property
    def dtype(self) -> str:
        """Return the name of the dtype of x and W."""
        return self.x.dtype.name

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Return the numbers of rows, features and classes."""
        return (*self.x.shape, len(self.weight))

    @property
    def wrt(self) -> tuple[str, ...]:
        """Return what the gradients are in, as crossent names it; nothing for the loss alone."""
        if self.task == "loss":
            return ()
        return ("linear_weight",) if self.frozen else ("input", "linear_weight")

    @property
    def products(self) -> int:
        """Return how many products of matrices it takes: the logits, and one for each gradient."""
        return 1 + len(self.wrt)

    @property
    def operations(self) -> int:
        """Return the multiplications and additions in those products."""
        return 2 * self.products * math.prod(self.sizes)

    @property
    def text(self) -> str:
        """Return what is computed, in words."""
        return f"{self.task} of {self.dtype} {self.sizes}"

    def sample(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return single numbers, and of a gradient some of the rows."""
        if array.ndim != 2:
            return np.array(array, np.float64)
        index = np.linspace(0, len(array) - 1, SAMPLED).round().astype(np.int64)
        found: NDArray[Any] = array[index].astype(np.float64)
        return found

    def require_dtype(self, *names: str) -> None:
        """Raise `Unserved` for another dtype."""
        if self.dtype not in names:
            raise Unserved(f"takes {', '.join(names)}")


def head_problems(shape: HeadShape, dtype: str, threads: int) -> Callable[[Task], HeadProblem]:
    """Return the maker of a shape's problems, for each task, on the same inputs in every run.

    The logits are normal, with the standard deviation of those of `crossent bench rows`.
    """
    rows, classes = shape.logits
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, shape.features), dtype=np.float32)
    weight = rng.standard_normal((classes, shape.features), dtype=np.float32)
    weight *= SCALE / math.sqrt(shape.features)
    target = rng.integers(0, classes, rows)
    x, weight = in_dtype(x, dtype), in_dtype(weight, dtype)
    return lambda task: HeadProblem(task, x, weight, target, shape.frozen, threads, shape.side)


def answer(problem: HeadProblem) -> Arrays:
    """Return loss and gradients by the plain formulas in float64, from the numbers as they are."""
    x, weight = problem.x.astype(np.float64), problem.weight.astype(np.float64)
    rows, target = np.arange(len(x)), problem.target
    z = x @ weight.T
    z -= z.max(axis=1, keepdims=True)
    at_target = z[rows, target]
    np.exp(z, out=z)
    total = z.sum(axis=1, keepdims=True)
    loss = np.array((np.log(total[:, 0]) - at_target).mean())
    if problem.task == "loss":
        return (loss,)
    z /= total
    z[rows, target] -= 1
    z /= len(x)
    return (loss, z.T @ x) if problem.frozen else (loss, z @ weight, z.T @ x)
