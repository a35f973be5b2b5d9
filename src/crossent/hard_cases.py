"""Inputs chosen to hurt: what `crossent check` and the tests give the kernels to compute.

Notation: N rows, V classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Up to a loss that is denormal, and past it, in float32 (88 … 104) and in float64 (709 … 746).
MARGINS = (0.0, 1e-7, 1e-3, 0.7, 5.0, 17.0, 37.0, 87.0, 95.0, 103.0, 500.0, 709.0, 744.0, 1e4)


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One call of `cross_entropy_value_and_grad`."""

    name: str
    logits: Array  # (N, V)
    target: Array  # (N,) indices, (N, V) a distribution, or (N, K) ids
    options: dict[str, Any] = field(default_factory=dict)


def index_cases(dtype: np.dtype[Any], sizes: tuple[int, ...], limit: int) -> Iterator[Case]:
    """Yield index targets without options for each V of `sizes`, some `limit` logits a case."""
    rng = np.random.default_rng(0)
    for n_classes in sizes:
        rows = list(_hard_rows(n_classes, dtype, rng))
        picked = rng.permutation(len(rows))[: max(4, limit // n_classes)]
        logits = _rounded(np.array([rows[i][0] for i in picked]), dtype)
        target = np.array([rows[i][1] for i in picked])
        yield Case(f"index targets, V = {n_classes}", logits, target)


def option_cases(
    dtype: np.dtype[Any], n_rows: int, n_classes: int, *, together: int
) -> Iterator[Case]:
    """Yield every kind of target with every option, and with up to `together` of them at once."""
    rng = np.random.default_rng(1)
    for kind in ("index", "distribution", "sparse"):
        for count in range(together + 1):
            for names in combinations(_OPTIONS, count):
                if (count == 0 and kind == "index") or {"mean", "grad_output"} <= set(names):
                    continue  # in index_cases; one upstream number a row needs reduction="none"
                logits = _rounded(_mixed_logits(n_rows, n_classes, rng), dtype)
                target, options = _target(kind, n_rows, n_classes, dtype, rng)
                for name in names:
                    options |= _OPTIONS[name](n_rows, n_classes, rng)
                with_options = " and ".join(names) or "no option"
                title = f"{kind} targets, V = {n_classes}, {with_options}"
                yield Case(title, logits, target, options)


def special_case(dtype: np.dtype[Any]) -> Case:
    """NaN and infinities, each beside ordinary rows."""
    inf, nan = np.inf, np.nan
    rows = [
        ([0.0, 1.0, 2.0, 3.0], 1),
        ([0.0, nan, 2.0, 3.0], 0),
        ([0.0, inf, 2.0, 3.0], 1),
        ([-inf, -inf, -inf, -inf], 2),
        ([-inf, 1.0, -inf, 3.0], 1),  # masked classes
        ([-inf, 1.0, -inf, 3.0], 0),  # a masked target
        ([-inf, -inf, -inf, 3.0], 3),
        ([nan, inf, -inf, 3.0], -100),  # never read
        ([1.0, 1.0, 2.0, -inf], 2),
    ]
    logits = _rounded(np.array([row for row, _ in rows]), dtype)
    return Case("NaN and infinities", logits, np.array([y for _, y in rows]))


def _hard_rows(
    n_classes: int, dtype: np.dtype[Any], rng: np.random.Generator
) -> Iterator[tuple[Array, int]]:
    """Yield (logits (V,), target), targets in the first, a middle and the last place."""
    flat = np.zeros(n_classes)
    for y in sorted({0, n_classes // 2, n_classes - 1}):
        for margin in MARGINS:
            for sign in (1, -1):  # right, and wrong, by the margin
                row = flat.copy()
                row[y] = sign * margin
                yield row, y
            yield np.where(np.arange(n_classes) == y, margin, rng.normal(size=n_classes)), y
        for spread in (0.03, 3.0, 30.0):
            yield rng.normal(scale=spread, size=n_classes), y
        for depth in (20.0, 110.0, 760.0):  # every output from 1 down to below the least number
            yield -rng.uniform(0, depth, n_classes), y
        tied = rng.normal(size=n_classes)
        tied[[y, (y + 1) % n_classes]] = tied.max() + 1
        yield tied, y
        for offset in (1e3, -1e5, 1e30, -1e30):
            near = _rounded(np.array([offset]), dtype) / dtype.type(2)  # the steps stay in range
            step = abs(float(np.spacing(near)[0]))
            yield float(near[0]) + step * rng.integers(0, 9, n_classes), y
        huge = np.full(n_classes, -np.inf)
        huge[y] = 1e30
        yield huge, y
        half = np.where(np.arange(n_classes) % 2 == y % 2, rng.normal(size=n_classes), -np.inf)
        yield half, y


def _mixed_logits(n_rows: int, n_classes: int, rng: np.random.Generator) -> Array:
    """Rows from nearly flat to nearly one-hot, some with a common offset; ``(N, V)``."""
    spread = np.geomspace(0.1, 60.0, n_rows)[:, None]
    offset = rng.choice([0.0, 0.0, 100.0, -1000.0], n_rows)[:, None]
    logits: Array = rng.normal(size=(n_rows, n_classes)) * spread + offset
    return logits


def _rounded(array: Array, dtype: np.dtype[Any]) -> Array:
    """Bring finite numbers into the dtype's range, then to the dtype."""
    largest = {"float16": 65504.0, "bfloat16": 3e38, "float32": 3e38}.get(dtype.name, 1e308)
    finite = np.isfinite(array)
    return np.where(finite, np.clip(array, -largest, largest), array).astype(dtype)


def _target(
    kind: str, n_rows: int, n_classes: int, dtype: np.dtype[Any], rng: np.random.Generator
) -> tuple[Array, dict[str, Any]]:
    if kind == "index":
        return rng.integers(0, n_classes, n_rows), {}
    if kind == "distribution":
        target = rng.dirichlet(np.full(n_classes, 0.3), n_rows)
        target[::4] = np.eye(n_classes)[rng.integers(0, n_classes, len(target[::4]))]
        return target.astype(dtype), {}
    ids = rng.integers(0, n_classes, (n_rows, 3))
    ids[::3, 1] = ids[::3, 0]  # repeated ids add
    ids[1::3, 2] = -100  # padding
    ids[4] = -100  # a row of nothing else
    return ids, {"target_prob": rng.dirichlet(np.ones(3), n_rows)}


_OPTIONS: dict[str, Any] = {
    "weight": lambda n, v, rng: {"weight": rng.normal(1.0, 1.0, v)},
    "sample_weight": lambda n, v, rng: {"sample_weight": rng.normal(1.0, 1.0, n).round(1)},
    "label_smoothing": lambda n, v, rng: {"label_smoothing": 0.1},
    "z_loss": lambda n, v, rng: {"z_loss": 1e-3},
    "logit_scale": lambda n, v, rng: {"logit_scale": 0.37},
    "softcap": lambda n, v, rng: {"softcap": 5.0},
    "mean": lambda n, v, rng: {"reduction": "mean"},
    "grad_output": lambda n, v, rng: {"grad_output": rng.normal(size=n).astype(np.float32)},
}
