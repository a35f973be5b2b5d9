"""One call of the NumPy front end: its logits as kernels see them, and what goes with them.

Everything here adapts and checks arrays; what an option means is in `rows.py`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crossent import options as errors
from crossent import rows
from crossent.backends import Backend, backend_for
from crossent.options import Options
from crossent.rows import RowPlan

_FLOAT64, _FLOAT32 = np.dtype(np.float64), np.dtype(np.float32)
_READY = {_FLOAT64, _FLOAT32}
_ONES = (np.float64(1), np.float32(1))
# What makes a Python float a NumPy scalar: a product takes a quarter of the time of
# numpy.float32(x) (0.3 µs), but before NumPy 2 a float32 times a Python float is a float64.
_SCALAR: dict[np.dtype[Any], Any] = {
    one.dtype: one.__mul__ if type(one * 0.5) is type(one) else type(one) for one in _ONES
}
_FLOAT32_MAX = float(np.finfo(np.float32).max)


def as_logits(where: str, name: str, value: ArrayLike) -> NDArray[Any]:
    """Return logits, or a vector like them, in a dtype that kernels read; integers as float64."""
    array = errors.as_array(where, name, value)
    dtype = array.dtype
    if dtype in _READY and array.flags.aligned:
        return array  # as below, found without the dearer questions
    if not rows.is_float(dtype):
        if dtype.kind in "iu":
            return array.astype(np.float64)
        raise errors.bad_input_dtype(where, name, dtype)
    if not dtype.isnative or not array.flags.aligned:
        return array.astype(dtype.newbyteorder("="))
    return array


def stats_question(
    target: ArrayLike | None,
    rows_shape: tuple[int, ...],
    sample_weight: object,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
) -> tuple[ArrayLike, Options]:
    """Return the target and the options of a plan for statistics.

    Without a target class 0 stands in, and what it gives is to be left out; weight 0 alone drops a
    row then.
    """
    options = Options(
        sample_weight=sample_weight,
        ignore_index=Options().ignore_index if target is None else ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        reduction="none",
    )
    return np.zeros(rows_shape, np.int64) if target is None else target, options


class Asked:
    """What any call is asked with beside its logits, and how it answers."""

    where: str
    compute_dtype: np.dtype[Any]

    def upstream(self, plan: RowPlan, grad_output: ArrayLike | None) -> Any:
        """None, a float for all rows, or float64 ``(N,)``."""
        if grad_output is None:
            return None
        array = errors.as_array(self.where, "grad_output", grad_output)
        if array.dtype.kind not in "fiu" and not rows.is_float(array.dtype):
            raise errors.bad_array(self.where, "grad_output", "real numbers", grad_output)
        array = array.astype(np.float64)
        if array.ndim == 0:
            return float(array)
        if plan.reduction != "none" or array.shape != plan.rows_shape:
            raise errors.bad_grad_output(self.where, plan.reduction, plan.rows_shape, array.shape)
        return np.ascontiguousarray(array).reshape(-1)

    def rounded(self, found: NDArray[Any]) -> NDArray[Any]:
        """Return float64 results in the compute dtype, silently whatever `numpy.errstate` says."""
        with np.errstate(over="ignore", under="ignore"):
            return found.astype(self.compute_dtype, copy=False)

    def loss(self, plan: RowPlan, found: NDArray[np.float64] | float) -> Any:
        """Return what the backend found, the rows' losses or their sum, in the compute dtype."""
        if isinstance(found, float):
            if self.compute_dtype is _FLOAT64 or abs(found) <= _FLOAT32_MAX:
                return _SCALAR[self.compute_dtype](found)
            found = np.asarray(found)  # which turns an overflow into infinity in silence below
        found = self.rounded(found)
        found = found.reshape(plan.rows_shape if plan.reduction == "none" else ())
        return found if found.ndim else found[()]


class Call(Asked):
    """One call's logits, seen as kernels do: ``(outer, V, inner)`` around the class axis."""

    def __init__(self, where: str, input: Any, axis: int, backend: Backend | None = None) -> None:
        """Convert `input`, or take it as it is for the `backend` that reads it."""
        self.where = where
        if backend is None:
            input = as_logits(where, "input", input)
            backend = backend_for(input.dtype)
        logits: NDArray[Any] = input
        self.logits = logits
        shape = logits.shape
        ndim = len(shape)
        if ndim == 0:
            raise errors.bad_input_ndim(where)
        if type(axis) is not int:
            if not isinstance(axis, np.integer | int) or isinstance(axis, bool):
                raise errors.bad_axis(where, axis, ndim)
            axis = int(axis)
        if not -ndim <= axis < ndim:
            raise errors.bad_axis(where, axis, ndim)
        self.axis = axis = axis % ndim
        if shape[axis] == 0:
            raise errors.no_classes(where, shape, axis)
        self.shape = shape
        self.backend = backend
        self.compute_dtype = _FLOAT64 if logits.dtype.char == "d" else _FLOAT32
        self.view = self.seen(logits)

    def seen(self, array: NDArray[Any]) -> NDArray[Any]:
        """See `array` (of the logits' shape) as kernels do; a copy where no view can."""
        shape, axis = self.shape, self.axis
        if axis == 1 and len(shape) == 2:
            return array  # (N, V) is (N, V, 1) without the time of a reshape
        return array.reshape(math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))

    @property
    def rows_shape(self) -> tuple[int, ...]:
        """Shape of one number a row."""
        return self.shape[: self.axis] + self.shape[self.axis + 1 :]

    def plan(self, target: ArrayLike, options: Options) -> RowPlan:
        """Lower the options for these logits."""
        return rows.lower(self.where, self.shape, self.axis, self.compute_dtype, target, options)

    def viewed(self, plan: RowPlan) -> tuple[RowPlan, NDArray[Any] | None]:
        """The plan, and its distribution (if that is its kind) seen as the logits are."""
        if plan.kind != "distribution":
            return plan, None
        target = plan.target
        readable = target.dtype.isnative and target.flags.aligned
        if not rows.is_float(target.dtype) or not readable:
            target = target.astype(self.compute_dtype)
        return plan, self.seen(target)

    def output(self) -> NDArray[Any]:
        """Return a new array like the logits."""
        return np.empty(self.shape, self.logits.dtype)

    def checked_out(self, out: NDArray[Any], beside: tuple[object, ...]) -> NDArray[Any]:
        """Return `out`, which must fit the logits and lie apart from every array of `beside`."""
        logits = self.logits
        if not isinstance(out, np.ndarray):
            raise errors.bad_out_type(self.where, out)
        out = errors.as_array(self.where, "out", out)
        if out.shape != self.shape or out.dtype != logits.dtype:
            expected = f"an array of shape {self.shape} and dtype {logits.dtype}"
            got = f"shape {out.shape} and dtype {out.dtype}"
            raise errors.bad_out(self.where, expected, got, "use numpy.empty_like(input)")
        flags = out.flags
        if not flags.writeable:
            raise errors.bad_out(self.where, "writable", "a read-only array", "pass a copy")
        if not (flags.c_contiguous and flags.aligned):
            if out.size == 0:
                return out
            got = f"strides {out.strides}"
            if not flags.aligned or not np.shares_memory(self.seen(out), out):
                raise errors.bad_out(self.where, "a plain array", got, "pass a contiguous array")
            if _overlaps_itself(out):
                raise errors.bad_out(self.where, "an array of its own memory", got, "pass a copy")
        overlaps = np.shares_memory(out, logits) and not _same_place(out, logits)
        for other in beside:
            overlaps = overlaps or (isinstance(other, np.ndarray) and np.shares_memory(out, other))
        if overlaps:
            raise errors.bad_out(
                self.where,
                "input itself or memory apart from every input",
                "an array that overlaps one",
                "pass an array of its own",
            )
        return out


def _same_place(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Tell whether two arrays of one shape and dtype have their entries in the same bytes."""
    if a is b:
        return True
    address, other = (array.__array_interface__["data"] for array in (a, b))
    return address == other and a.strides == b.strides


def _overlaps_itself(array: NDArray[Any]) -> bool:
    """Tell whether two entries may lie in the same bytes, as in a broadcast or sliding window."""
    span = array.itemsize
    for stride, n in sorted(zip(map(abs, array.strides), array.shape, strict=True)):
        if n > 1 and stride < span:
            return True
        span += stride * (n - 1)
    return False
