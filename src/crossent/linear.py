"""The fused head from NumPy: features and weights in, loss and gradients out, no logits between.

Conventions: `input` holds D features a row along its last axis, in an array ``(…, D)`` or a SciPy
sparse matrix ``(N, D)``; "the rows' shape" is its shape without that axis; the classes are the last
axis of whatever has one. float64, float32, float16 and bfloat16 (`ml_dtypes`) are taken as they
are; integers and lists become float64. Where one of `input` and `linear_weight` is float64, all is
computed in float64, else in float32. The algorithm is in `head.py`, the meaning in `rows.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crossent import options as errors
from crossent import rows
from crossent.call import Asked, as_logits, stats_question
from crossent.features import is_sparse
from crossent.head import Head, LinearGrad
from crossent.numpy import LossGrad, RowStats, row_stats
from crossent.options import Options, Reduction

_ALL = ("input", "linear_weight", "linear_bias")
_FLOAT64, _FLOAT32 = np.dtype(np.float64), np.dtype(np.float32)


class _LinearCall(Asked):
    """One call's features, weights and bias, checked."""

    def __init__(self, where: str, input: Any, linear_weight: Any, linear_bias: Any) -> None:
        self.where = where
        self.sparse = is_sparse(input)
        self.input = _features(where, input, self.sparse)
        self.weight = _dense(where, "linear_weight", linear_weight)
        n_features = self.input.shape[-1]
        shape = self.weight.shape
        if len(shape) != 2 or shape[1] != n_features or shape[0] == 0:
            raise errors.bad_linear_weight(where, shape, n_features)
        self.bias = None
        if linear_bias is not None:
            self.bias = _dense(where, "linear_bias", linear_bias)
            if self.bias.shape != shape[:1]:
                expected = f"({shape[0]},), one for each class"
                raise errors.bad_shape(where, "linear_bias", expected, self.bias.shape)
        self.rows_shape = self.input.shape[:-1]
        wide = _FLOAT64 in (_dtype(self.input), self.weight.dtype)
        self.compute_dtype = _FLOAT64 if wide else _FLOAT32

    def head(self, target: ArrayLike, options: Options) -> Head:
        """Lower the options for this call's logits."""
        shape = (*self.rows_shape, self.weight.shape[0])
        plan = rows.lower(
            self.where, shape, len(shape) - 1, self.compute_dtype, target, options, "logits"
        )
        name = "float64" if self.compute_dtype is _FLOAT64 else "float32"  # .name takes 5 µs
        return Head(self.where, self.input, self.weight, self.bias, plan, name)

    def wrt(self, given: str | Sequence[str]) -> tuple[bool, bool, bool]:
        """Tell which gradients are wanted; of what is there, in the default."""
        names = (given,) if isinstance(given, str) else tuple(given)
        if not all(isinstance(name, str) and name in _ALL for name in names):
            raise errors.bad_wrt(self.where, given, _ALL)
        if self.sparse and "input" in names:
            if given is not _ALL:
                instead = "leave 'input' out of wrt"
                raise errors.sparse_gradient(self.where, "wrt names", instead)
            names = _ALL[1:]
        return "input" in names, _ALL[1] in names, _ALL[2] in names and self.bias is not None

    def vector(self, given: Any) -> LinearGrad:
        """Return directions in the dtypes of what they are directions in."""
        if not isinstance(given, tuple | list) or len(given) != 3:
            raise errors.bad_vector(self.where, given)
        if self.sparse and given[0] is not None:
            instead = "pass None as vector.input"
            raise errors.sparse_gradient(self.where, "vector.input is a direction in", instead)
        if self.bias is None and given[2] is not None:
            raise errors.no_bias(self.where)
        along: list[NDArray[Any] | None] = []
        for name, of, part in zip(_ALL, (self.input, self.weight, self.bias), given, strict=True):
            if part is None or of is None:
                along.append(None)
                continue
            direction = _dense(self.where, f"vector.{name}", part)
            if direction.shape != of.shape:
                expected = f"{of.shape}, that of {name}"
                raise errors.bad_shape(self.where, f"vector.{name}", expected, direction.shape)
            with np.errstate(all="ignore"):
                along.append(direction.astype(_dtype(of), copy=False))
        return LinearGrad(*along)

    def grads(self, found: LinearGrad) -> LinearGrad:
        """Return gradients in their arguments' shapes, and bfloat16 as itself."""
        dx, dw, db = found
        if dx is not None:
            dx = dx.view(_dtype(self.input)).reshape(self.input.shape)
        dw = None if dw is None else dw.view(self.weight.dtype)
        db = None if db is None or self.bias is None else db.view(self.bias.dtype)
        return LinearGrad(dx, dw, db)


def _features(where: str, input: Any, sparse: bool) -> Any:
    """Return features that `Head` takes."""
    if sparse:
        if input.ndim != 2:
            raise errors.bad_features_ndim(where, input.ndim, sparse)
        if not rows.is_float(input.dtype) and input.dtype.kind not in "iu":
            raise errors.bad_input_dtype(where, "input", input.dtype)
        return input.tocsr()
    array = errors.as_array(where, "input", input)
    # Integers become float64 chunk by chunk; a head takes those of 16 bits for bfloat16.
    if array.dtype.kind not in "iu" or array.dtype == np.uint16:
        array = as_logits(where, "input", array)
    if array.ndim == 0:
        raise errors.bad_features_ndim(where, 0, sparse)
    return array


def _dense(where: str, name: str, value: Any) -> NDArray[Any]:
    if is_sparse(value):
        raise errors.not_dense(where, name)
    return as_logits(where, name, value)


def _dtype(array: Any) -> np.dtype[Any]:
    """Return the dtype that the numbers of `array` are taken in, and its gradient is given in."""
    return array.dtype if rows.is_float(array.dtype) else _FLOAT64


def linear_cross_entropy(
    input: ArrayLike,
    linear_weight: ArrayLike,
    target: ArrayLike,
    *,
    linear_bias: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    divisor: float | None = None,
    target_prob: ArrayLike | None = None,
) -> Any:
    """Return `cross_entropy` of the logits x Wᵀ + b, without holding them.

    Parameters
    ----------
    input : array_like (…, D), or scipy.sparse matrix (N, D)
        Features x. A sparse matrix stays sparse; any format but CSR is converted to CSR.
    linear_weight : array_like (V, D)
        Weights W of V classes.
    target : array_like
        Class indices (integers, the rows' shape), probabilities â (floats, the rows' shape and V),
        or, with `target_prob`, class ids (the rows' shape and K).
    linear_bias : array_like (V,), optional
        b.
    weight, sample_weight, ignore_index, label_smoothing, z_loss, logit_scale, softcap, reduction, \
divisor, target_prob
        As for `cross_entropy`. Rows that are dropped (`ignore_index`, a row weight of 0) are not
        read, and cost nothing.

    Returns
    -------
    NumPy scalar, or an ndarray of the rows' shape with reduction="none"
        float64 where `input` or `linear_weight` is, else float32.

    Raises
    ------
    IndexError
        A target outside 0 … V − 1 that is not `ignore_index`.
    TypeError, ValueError
        Arguments that do not fit; the message says which, and what to do.

    Notes
    -----
    Beside its inputs it uses a fixed workspace, 128 MB or ``CROSSENT_WORKSPACE_MB``; docs/head.md
    says how, and docs/maths.md has the formulas.

    Examples
    --------
    >>> input, weight = [[1.0, 2.0], [3.0, -1.0]], [[0.5, 0.0], [0.0, 0.5], [-0.5, -0.5]]
    >>> loss = linear_cross_entropy(input, weight, [1, 0], linear_bias=[0.0, 0.1, 0.2])
    >>> print(round(loss, 4))
    0.3587
    """
    call = _LinearCall("linear_cross_entropy", input, linear_weight, linear_bias)
    head = call.head(
        target,
        Options(
            weight,
            sample_weight,
            ignore_index,
            label_smoothing,
            z_loss,
            logit_scale,
            softcap,
            reduction,
            divisor,
            target_prob,
        ),
    )
    return call.loss(head.plan, head.loss())


def linear_cross_entropy_value_and_grad(
    input: ArrayLike,
    linear_weight: ArrayLike,
    target: ArrayLike,
    *,
    linear_bias: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    divisor: float | None = None,
    target_prob: ArrayLike | None = None,
    wrt: str | Sequence[str] = _ALL,
    grad_output: ArrayLike | None = None,
) -> LossGrad:
    """Return `linear_cross_entropy` and its gradients, without holding logits or their gradient.

    Parameters
    ----------
    input, linear_weight, target, linear_bias, weight, sample_weight, ignore_index, \
label_smoothing, z_loss, logit_scale, softcap, reduction, divisor, target_prob
        As for `linear_cross_entropy`.
    wrt : str or sequence of str
        Which of "input", "linear_weight" and "linear_bias" to differentiate in; what is left out
        costs nothing. A sparse `input` has no gradient here: the default leaves it out.
    grad_output : float, or array_like of the rows' shape with reduction="none", optional
        Upstream gradient: multiplies the gradients (not the loss).

    Returns
    -------
    LossGrad
        ``loss`` as `linear_cross_entropy` returns it, and ``grad``, a
        LinearGrad(input, linear_weight, linear_bias) of arrays of their arguments' shapes and
        dtypes (float64 for integers); None where `wrt` leaves one out or there is no bias.

    Raises
    ------
    IndexError, TypeError, ValueError
        As `linear_cross_entropy`, and for a `wrt` that names something else, or a sparse `input`.

    Notes
    -----
    With g the gradient in the logits: g W, gᵀ x and Σ g over the rows ((M12) to (M14) of
    docs/maths.md).

    Examples
    --------
    >>> loss, grad = linear_cross_entropy_value_and_grad(
    ...     [[1.0, 2.0]], [[0.5, 0.0], [0.0, 0.5]], [1], wrt="linear_weight"
    ... )
    >>> grad.linear_weight.round(3)
    array([[ 0.378,  0.755],
           [-0.378, -0.755]])
    """
    where = "linear_cross_entropy_value_and_grad"
    call = _LinearCall(where, input, linear_weight, linear_bias)
    wanted = call.wrt(wrt)
    head = call.head(
        target,
        Options(
            weight,
            sample_weight,
            ignore_index,
            label_smoothing,
            z_loss,
            logit_scale,
            softcap,
            reduction,
            divisor,
            target_prob,
        ),
    )
    loss, found = head.value_and_grad(call.upstream(head.plan, grad_output), wanted)
    return LossGrad(call.loss(head.plan, loss), call.grads(found))


def linear_cross_entropy_hvp(
    input: ArrayLike,
    linear_weight: ArrayLike,
    target: ArrayLike,
    vector: LinearGrad,
    *,
    linear_bias: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    divisor: float | None = None,
    target_prob: ArrayLike | None = None,
    grad_output: ArrayLike | None = None,
) -> LinearGrad:
    """Return the Hessian of `linear_cross_entropy` in x, W and b times `vector`.

    Parameters
    ----------
    input, linear_weight, target, linear_bias, weight, sample_weight, ignore_index, \
label_smoothing, z_loss, logit_scale, softcap, reduction, divisor, target_prob
        As for `linear_cross_entropy`.
    vector : LinearGrad(input, linear_weight, linear_bias)
        The direction: array_likes of the arguments' shapes, in their dtypes or converted to them.
        What is None is held fixed; a sparse `input` has to be.
    grad_output : float, or array_like of the rows' shape with reduction="none", optional
        Upstream gradient.

    Returns
    -------
    LinearGrad
        Arrays of the arguments' shapes and dtypes; None where `vector` holds None. The terms that
        `input` and `linear_weight` have in common are counted. With reduction="none", of the sum
        of the rows' losses weighted by `grad_output`.

    Raises
    ------
    IndexError, TypeError, ValueError
        As `linear_cross_entropy`, and for a `vector` that does not fit.

    Notes
    -----
    With z' = x' Wᵀ + x W'ᵀ + b', g the gradient in the logits and h their Hessian times z':
    h W + g W', hᵀ x + gᵀ x' and Σ h over the rows ((M29) of docs/maths.md).

    Examples
    --------
    >>> product = linear_cross_entropy_hvp(
    ...     [[1.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]], [0], LinearGrad(None, [[1, 0], [0, 0]], None)
    ... )
    >>> product.linear_weight
    array([[ 0.25,  0.5 ],
           [-0.25, -0.5 ]])
    """
    call = _LinearCall("linear_cross_entropy_hvp", input, linear_weight, linear_bias)
    along = call.vector(vector)
    head = call.head(
        target,
        Options(
            weight,
            sample_weight,
            ignore_index,
            label_smoothing,
            z_loss,
            logit_scale,
            softcap,
            reduction,
            divisor,
            target_prob,
        ),
    )
    return call.grads(head.hvp(call.upstream(head.plan, grad_output), along))


def linear_cross_entropy_stats(
    input: ArrayLike,
    linear_weight: ArrayLike,
    target: ArrayLike | None = None,
    *,
    linear_bias: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> RowStats:
    """Return what the softmax of x Wᵀ + b says of each row, without holding the logits.

    Parameters
    ----------
    input, linear_weight, linear_bias
        As for `linear_cross_entropy`.
    target : array_like of integers, the rows' shape, optional
        Class indices.
    sample_weight : array_like, the rows' shape or broadcast to it, optional
        Rows of weight 0 are dropped; other weights have no effect.
    ignore_index, logit_scale, softcap
        As for `cross_entropy`.

    Returns
    -------
    RowStats
        As `cross_entropy_stats` returns it; float64 where `input` or `linear_weight` is, else
        float32.

    Raises
    ------
    IndexError, TypeError, ValueError
        As `linear_cross_entropy`.

    Examples
    --------
    >>> stats = linear_cross_entropy_stats([[1.0, 2.0]], [[0.5, 0.0], [0.0, 0.5]], [0])
    >>> int(stats.argmax[0]), int(stats.target_rank[0])
    (1, 1)
    """
    call = _LinearCall("linear_cross_entropy_stats", input, linear_weight, linear_bias)
    asked, options = stats_question(
        target, call.rows_shape, sample_weight, ignore_index, logit_scale, softcap
    )
    head = call.head(asked, options)
    if head.plan.kind != "index":
        raise errors.bad_target_dtype_for_stats(call.where, head.plan.target.dtype)
    return row_stats(call, head.plan, head.stats(), target)
