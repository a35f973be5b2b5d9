"""Options and a target, lowered once to a `RowPlan`: what a kernel needs to know of a row.

Notation: N rows, V classes, K ids a row of a sparse distribution. A front end sees its logits as
``(outer, V, inner)`` around the class axis; row ``i = o·inner + k`` runs over the other axes in
C order.

Design:
  a. All three kinds of target become ``q_ij = w_j·(on·â_ij + off)`` with ``on = 1 − ε`` and
     ``off = ε/V``: for an index target â is one-hot, for a sparse one it is scattered from K ids.
  b. ``r_i = s_i / divisor``; a row is dropped where its target is ``skip`` or its ``s_i`` is 0.
     The divisor, smoothing and ignoring live in this file and nowhere else.
  c. Nothing of size N·V is made here: a distribution target is passed on as it lies in memory.

The formulas are those of the design page, section 3 (`docs/maths.md`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from crossent import _native
from crossent import options as errors
from crossent.features import DenseRows
from crossent.options import Options, Reduction

Kind = Literal["index", "distribution", "sparse"]
_INT64 = np.dtype(np.int64)


def is_float(dtype: np.dtype[Any]) -> bool:
    """Tell the dtypes that kernels read: float64, float32, float16 and `ml_dtypes`' bfloat16."""
    # dtype.name takes microseconds, so only what NumPy itself does not know is asked for it.
    return dtype.char in "dfe" or (dtype.kind == "V" and dtype.name == "bfloat16")


@dataclass(slots=True, eq=False)
class RowPlan:
    """What every row of a loss means, in compute-dtype numbers; kernels see nothing else.

    Attributes
    ----------
    kind
        How `target` describes â.
    rows_shape
        Shape of one number a row (the logits' shape without the class axis); N is its product.
    n_classes
        V.
    axis
        Position of the class axis in the logits (0 … ndim − 1).
    target
        "index": int64 ``(N,)``. "distribution": floating, the logits' own shape.
        "sparse": int64 ``(N, K)``, −1 where padding.
    target_prob
        "sparse": float64 ``(N, K)``, 0 where padding; else None.
    skip
        The index target that drops a row.
    class_weight
        w, float64 ``(V,)``, or None for all 1.
    on, off
        ``1 − ε`` and ``ε/V``.
    row_weight
        s, float64 ``(N,)`` with 0 for dropped rows, or None for all 1.
    divisor
        What `reduction` divides by: r_i = s_i / divisor; NaN where kept rows meet a divisor of 0.
    z_loss, logit_scale, softcap
        c, τ and κ (``softcap`` 0: none).
    reduction
        How the rows' losses are put together; "mean" and "sum" both add them up.
    """

    kind: Kind
    rows_shape: tuple[int, ...]
    n_classes: int
    axis: int
    target: NDArray[Any]
    target_prob: NDArray[np.float64] | None
    skip: int
    class_weight: NDArray[np.float64] | None
    on: float
    off: float
    row_weight: NDArray[np.float64] | None
    divisor: float
    z_loss: float
    logit_scale: float
    softcap: float
    reduction: Reduction

    @property
    def n_rows(self) -> int:
        """N."""
        return math.prod(self.rows_shape)


def lower(
    where: str,
    shape: tuple[int, ...],
    axis: int,
    compute_dtype: np.dtype[Any],
    target: object,
    options: Options,
    named: str = "an input",
) -> RowPlan:
    """Lower `options` and `target` for logits of `shape` to a plan.

    Parameters
    ----------
    where
        The public function's name, for messages.
    shape, axis
        Shape of the logits and the (non-negative) position of their class axis.
    compute_dtype
        float32 or float64: what options, weights and targets are rounded to.
    target
        Class indices, a distribution, or (with ``options.target_prob``) class ids.
    options
        As the caller gave them.
    named
        What messages call the logits.

    Raises
    ------
    TypeError, ValueError, IndexError
        For anything that does not fit; the texts are in `crossent.options`.
    """
    options = options.checked(where, compute_dtype)
    rows_shape = shape[:axis] + shape[axis + 1 :]
    n_classes = shape[axis]
    class_weight = row_weight = None
    if options.weight is not None:
        class_weight = _class_weight(where, options.weight, n_classes, compute_dtype)
    if options.sample_weight is not None:
        row_weight = _row_weight(where, options.sample_weight, rows_shape, compute_dtype)

    target_prob = None
    if options.target_prob is not None:
        kind: Kind = "sparse"
        lowered, target_prob = _sparse_target(
            where, target, options, shape, axis, compute_dtype, named
        )
        padding_alone = (lowered < 0).all(axis=1)
        # A row of padding alone is dropped, like a row of weight 0.
        if padding_alone.any():
            row_weight = np.where(padding_alone, 0.0, 1.0 if row_weight is None else row_weight)
    else:
        lowered = _as_target(where, target, rows_shape, n_classes)
        kind = "index" if lowered.dtype.kind == "i" else "distribution"
        if lowered.shape != (rows_shape if kind == "index" else shape):
            raise errors.bad_target_shape(
                where, lowered.shape, lowered.dtype, rows_shape, shape, named
            )

    # The divisor of "mean" counts s_i·w_{y_i} for indices and s_i for distributions.
    if kind == "index":
        flags = lowered.flags
        if not (flags.c_contiguous and flags.aligned):
            lowered = np.require(lowered, requirements=["C", "A"])
        if lowered.ndim != 1:
            lowered = lowered.reshape(-1)
        bad, kept, weight_sum = _native.scan_targets(
            lowered, n_classes, options.ignore_index, row_weight, class_weight
        )
        if bad >= 0:
            position = tuple(int(k) for k in np.unravel_index(bad, rows_shape))
            raise errors.target_out_of_range(where, position, int(lowered[bad]), n_classes)
    elif row_weight is None:
        kept = math.prod(rows_shape)
        weight_sum = float(kept)
    else:
        kept, weight_sum = int(np.count_nonzero(row_weight)), math.fsum(row_weight)

    on = 1.0 - options.label_smoothing
    off = options.label_smoothing / n_classes
    softcap = options.softcap or 0.0
    # In the order of the fields: by name they take 0.8 µs more.
    return RowPlan(
        kind,
        rows_shape,
        n_classes,
        axis,
        lowered,
        target_prob,
        options.ignore_index,
        class_weight,
        on,
        off,
        row_weight,
        _divisor(kept, weight_sum, options),
        options.z_loss,
        options.logit_scale,
        softcap,
        options.reduction,
    )


def kept(plan: RowPlan) -> NDArray[np.int64] | None:
    """Return the positions of the rows that are kept; None where all are."""
    drops = plan.target == plan.skip if plan.kind == "index" else None
    if plan.row_weight is not None:
        weightless = plan.row_weight == 0
        drops = weightless if drops is None else drops | weightless
    if drops is None or not drops.any():
        return None
    return np.flatnonzero(~drops)


def part(plan: RowPlan, rows: slice | NDArray[np.int64]) -> RowPlan:
    """Return the plan of some of the rows, n of them, of logits ``(n, V)``; the divisor stays."""
    n = len(range(plan.n_rows)[rows]) if isinstance(rows, slice) else len(rows)
    whole = distribution_rows(plan).take if plan.kind == "distribution" else plan.target.__getitem__
    return replace(
        plan,
        rows_shape=(n,),
        axis=1,
        target=whole(rows),
        target_prob=None if plan.target_prob is None else plan.target_prob[rows],
        row_weight=None if plan.row_weight is None else plan.row_weight[rows],
    )


def distribution_rows(plan: RowPlan) -> DenseRows:
    """Return a distribution target as rows ``(N, V)``, without a copy."""
    return DenseRows(np.moveaxis(plan.target, plan.axis, -1), plan.target.dtype)


def _divisor(kept: int, weight_sum: float, options: Options) -> float:
    """Return 1 for "sum" and "none"; for "mean" the kept rows' Σ s·w, or `divisor`; never 0."""
    if options.reduction != "mean" or kept == 0:
        return 1.0  # with no row kept loss and gradient are 0 whatever the divisor
    total = weight_sum if options.divisor is None else options.divisor
    return math.nan if total == 0 else total


def _class_weight(
    where: str, weight: object, n_classes: int, compute_dtype: np.dtype[Any]
) -> NDArray[np.float64]:
    array = _real_array(where, "weight", weight, compute_dtype)
    if array.shape != (n_classes,):
        raise errors.bad_shape(where, "weight", f"({n_classes},), one for each class", array.shape)
    return array


def _row_weight(
    where: str, sample_weight: object, rows_shape: tuple[int, ...], compute_dtype: np.dtype[Any]
) -> NDArray[np.float64]:
    array = _real_array(where, "sample_weight", sample_weight, compute_dtype)
    try:
        array = np.broadcast_to(array, rows_shape)
    except ValueError:
        raise errors.bad_shape(
            where,
            "sample_weight",
            f"{rows_shape}, one for each row (or broadcast to it)",
            array.shape,
        ) from None
    return np.ascontiguousarray(array).reshape(-1)


def _real_array(
    where: str, name: str, value: object, compute_dtype: np.dtype[Any]
) -> NDArray[np.float64]:
    """Return `value` rounded to the compute dtype and held in float64, every entry finite."""
    array = errors.as_array(where, name, value)
    if array.dtype.kind not in "fiu" and not is_float(array.dtype):
        raise errors.bad_array(where, name, "an array of real numbers", value)
    with np.errstate(over="ignore", under="ignore"):
        array = array.astype(compute_dtype).astype(np.float64)
    finite = np.isfinite(array)
    if not finite.all():
        position = tuple(int(k) for k in np.argwhere(~finite)[0])
        raise errors.not_finite(where, name, position, float(array[position]), compute_dtype.name)
    return array


def _as_target(
    where: str, target: object, rows_shape: tuple[int, ...], n_classes: int
) -> NDArray[Any]:
    """Return int64 class indices or a floating array; the caller's own where that is possible."""
    array = errors.as_array(where, "target", target)
    dtype = array.dtype
    if dtype is _INT64 or dtype == _INT64 or dtype.kind == "f" or is_float(dtype):
        # An empty list of indices arrives as float64.
        if array is not target and array.size == 0 and array.shape == rows_shape:
            return array if isinstance(target, np.ndarray) else array.astype(np.int64)
        return array
    if dtype.kind not in "iu":
        raise errors.bad_target_dtype(where, dtype)
    if dtype == np.uint64:
        # Cast to int64 these would wrap, perhaps to −100 or to a class.
        huge = array > np.iinfo(np.int64).max
        if huge.any():
            position = tuple(int(k) for k in np.argwhere(huge)[0])
            way_out = "convert it to a signed dtype first"
            value = int(array[position])
            raise errors.target_out_of_range(where, position, value, n_classes, way_out)
    return array.astype(np.int64)


def _sparse_target(
    where: str,
    target: object,
    options: Options,
    shape: tuple[int, ...],
    axis: int,
    compute_dtype: np.dtype[Any],
    named: str,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return ids ``(N, K)``, −1 where padding, and their probabilities ``(N, K)``, 0 there."""
    ids = _as_target(where, target, (), shape[axis])
    if ids.dtype.kind != "i":
        raise errors.bad_target_prob(where, f"target has dtype {ids.dtype}")
    prob = errors.as_array(where, "target_prob", options.target_prob)
    if prob.dtype.kind not in "fiu" and not is_float(prob.dtype):
        raise errors.bad_target_prob(where, f"target_prob has dtype {prob.dtype}")
    rows_shape = shape[:axis] + shape[axis + 1 :]
    fits = ids.ndim == len(shape) and ids.shape[:axis] + ids.shape[axis + 1 :] == rows_shape
    if not fits or ids.shape != prob.shape:
        raise errors.bad_target_prob(
            where,
            f"got target {ids.shape} and target_prob {prob.shape} for {named} of shape {shape}",
        )
    n_rows, k = math.prod(rows_shape), ids.shape[axis]
    ids = np.moveaxis(ids, axis, -1)
    padding = ids == options.ignore_index
    bad = ((ids < 0) | (ids >= shape[axis])) & ~padding
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        position = (*at[:-1][:axis], at[-1], *at[:-1][axis:])
        raise errors.target_out_of_range(where, position, int(ids[at]), shape[axis])
    with np.errstate(over="ignore", under="ignore"):
        prob = np.moveaxis(prob, axis, -1).astype(compute_dtype).astype(np.float64)
    ids = np.where(padding, np.int64(-1), ids).reshape(n_rows, k)
    prob = np.where(padding, 0.0, prob).reshape(n_rows, k)
    return np.ascontiguousarray(ids), np.ascontiguousarray(prob)
