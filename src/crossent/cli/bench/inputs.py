"""Rows of logits: their inputs, their problems, and what is kept of a contest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossent.cli.bench.benchmark import Found, Kinds
from crossent.cli.bench.peers import Problem, Task
from crossent.cli.bench.results import Group
from crossent.cli.bench.shapes import SCALE, SHAPES, Shape


def row_kinds(held: int) -> Kinds[Problem]:
    """Return rows of logits; `held` arrays of their size are in memory at once."""

    def need(shape: Shape, dtype: str) -> float:
        return held * shape.nbytes(dtype)

    return Kinds(SHAPES, need, _problems, _group)


def _problems(shape: Shape, dtype: str, threads: int) -> Callable[[Task], Problem]:
    logits, target = inputs(shape, dtype)
    kept = output_like(logits)
    return lambda task: Problem(task, logits, target, shape.axis, kept, threads)


def _group(shape: Shape, problem: Problem, found: Found[Problem]) -> Group:
    return Group(
        shape=shape.name,
        use=shape.use,
        logits=shape.logits,
        axis=shape.axis,
        dtype=problem.dtype,
        task=problem.task,
        nbytes=problem.logits.nbytes,
        times=found.times,
        skipped=found.skipped,
    )


def inputs(shape: Shape, dtype: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return logits and targets, the same in every run."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(shape.logits, dtype=np.float32)
    logits *= SCALE
    rows = np.delete(shape.logits, shape.axis)
    target = rng.integers(0, shape.logits[shape.axis], tuple(rows))
    return in_dtype(logits, dtype), target


def in_dtype(array: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Return an array in a dtype named as NumPy names it, bfloat16 among them."""
    if dtype == "bfloat16":
        import ml_dtypes

        return array.astype(ml_dtypes.bfloat16)
    return array.astype(dtype, copy=False)


def output_like(logits: NDArray[Any]) -> NDArray[Any]:
    """Return an output whose pages exist and that lies in its first page where `logits` do.

    Of NumPy's large arrays that is true anyway. Small ones lie anywhere, and where two places
    differ by little modulo the size of a page some processors copy at a tenth of the speed
    (https://lunnova.dev/articles/ryzen-slow-short-rep-mov).
    """
    page = 4096
    memory = np.ones(logits.nbytes + page, np.uint8)
    start = (logits.ctypes.data - memory.ctypes.data) % page
    return memory[start : start + logits.nbytes].view(logits.dtype).reshape(logits.shape)
