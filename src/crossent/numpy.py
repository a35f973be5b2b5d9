"""The NumPy front end: logits and targets in, arrays out; the meaning is in `rows.py`.

Conventions: `input` holds logits of any shape with the classes along `axis`; "the rows' shape" is
`input`'s shape without that axis. float64, float32, float16 and bfloat16 (`ml_dtypes`) are computed
as they are (16-bit ones in float32, rounded once); integers and lists become float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crossent import options as errors
from crossent import reference
from crossent.call import Asked, Call, as_logits, stats_question
from crossent.options import Options, Reduction
from crossent.rows import RowPlan


class LossGrad(NamedTuple):
    """A loss and its gradient: an array like the logits, or a head's `LinearGrad`."""

    loss: Any
    grad: Any


class RowStats(NamedTuple):
    """What `cross_entropy_stats` tells of each row; dropped rows hold NaN and −1."""

    logsumexp: NDArray[Any]
    target_logprob: NDArray[Any] | None
    entropy: NDArray[Any]
    argmax: NDArray[np.int64]
    target_rank: NDArray[np.int64] | None


def softmax(input: ArrayLike, *, axis: int = -1) -> NDArray[Any]:
    """Return σ(z), the probabilities e^z / Σ e^z along `axis`.

    Parameters
    ----------
    input : array_like of any shape
        Logits z.
    axis : int
        The class axis.

    Returns
    -------
    ndarray of `input`'s shape and dtype (float64 for integers)
        Rows that hold NaN or +inf, or −inf alone, are NaN.

    Examples
    --------
    >>> softmax([2.0, 1.0, 0.1]).round(3)
    array([0.659, 0.242, 0.099])
    """
    return _probabilities("softmax", input, axis, log=False)


def log_softmax(input: ArrayLike, *, axis: int = -1) -> NDArray[Any]:
    """Return ln σ(z) along `axis`, accurate where σ is within rounding of 1.

    Parameters
    ----------
    input : array_like of any shape
        Logits z.
    axis : int
        The class axis.

    Returns
    -------
    ndarray of `input`'s shape and dtype (float64 for integers)

    Examples
    --------
    >>> log_softmax([100.0, 0.0])
    array([-3.72007598e-44, -1.00000000e+02])
    """
    return _probabilities("log_softmax", input, axis, log=True)


def cross_entropy(
    input: ArrayLike,
    target: ArrayLike,
    *,
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
    axis: int = -1,
) -> Any:
    """Return the categorical cross-entropy λ = −Σᵢ âᵢ ln aᵢ of a = σ(`input`).

    Parameters
    ----------
    input : array_like of any shape
        Logits z, V classes along `axis`.
    target : array_like
        Class indices (integers, the rows' shape), probabilities â (floats, `input`'s shape), or,
        with `target_prob`, class ids (K of them a row on the class axis).
    weight : array_like (V,), optional
        Class weights w.
    sample_weight : array_like, the rows' shape or broadcast to it, optional
        Row weights s; 0 drops the row.
    ignore_index : int
        Rows with this target index are dropped.
    label_smoothing : float in [0, 1]
        ε: the target becomes (1 − ε) â + ε/V.
    z_loss : float ≥ 0
        c: adds c·logsumexp² to each row.
    logit_scale : float > 0
        τ, one over the temperature: z = τ·input.
    softcap : float > 0, optional
        κ: z = κ·tanh(τ·input/κ).
    reduction : {"mean", "sum", "none"}
        "mean" divides by the kept rows' Σ s·w; "none" returns one loss a row.
    divisor : float, optional
        Replaces what "mean" divides by.
    target_prob : array_like, optional
        Probabilities of the class ids in `target`, of the same shape.
    axis : int
        The class axis.

    Returns
    -------
    NumPy scalar, or an ndarray of the rows' shape with reduction="none"
        In `input`'s dtype; float32 for 16-bit input.

    Raises
    ------
    IndexError
        A target outside 0 … V − 1 that is not `ignore_index`.
    TypeError, ValueError
        Arguments that do not fit; the message says which, and what to do.

    Notes
    -----
    With q_j = w_j ((1 − ε) â_j + ε/V) and Q = Σ q a row's loss is
    s/divisor · (Q·lse·(1 + c·lse) − Σ q_j z_j); see docs/maths.md.

    Examples
    --------
    >>> loss = cross_entropy([[2.0, 1.0, 0.1], [0.5, 2.5, 0.0]], [0, 1])
    >>> print(round(loss, 4))
    0.3069
    """
    call = Call("cross_entropy", input, axis)
    plan = call.plan(
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
    found = call.backend.cross_entropy(call.view, call.viewed(plan), None, None)
    return call.loss(plan, found)


def cross_entropy_value_and_grad(
    input: ArrayLike,
    target: ArrayLike,
    *,
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
    axis: int = -1,
    grad_output: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
) -> LossGrad:
    """Return `cross_entropy` and its gradient in the logits, a − â for a plain row.

    Parameters
    ----------
    input, target, weight, sample_weight, ignore_index, label_smoothing, z_loss, logit_scale, \
softcap, reduction, divisor, target_prob, axis
        As for `cross_entropy`.
    grad_output : float, or array_like of the rows' shape with reduction="none", optional
        Upstream gradient: multiplies the gradient (not the loss).
    out : ndarray of `input`'s shape and dtype, optional
        Takes the gradient. May be `input` itself, whose logits are then overwritten.

    Returns
    -------
    LossGrad
        ``loss`` as `cross_entropy` returns it and ``grad`` of `input`'s shape and dtype.

    Raises
    ------
    IndexError, TypeError, ValueError
        As `cross_entropy`, and for an `out` that cannot take the gradient.

    Examples
    --------
    >>> loss, grad = cross_entropy_value_and_grad([2.0, 1.0, 0.1], 0)
    >>> grad.round(3)
    array([-0.341,  0.242,  0.099])
    """
    call = Call("cross_entropy_value_and_grad", input, axis)
    plan = call.plan(
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
    upstream = None if grad_output is None else call.upstream(plan, grad_output)
    beside = (target, weight, sample_weight, target_prob, grad_output)
    grad = call.output() if out is None else call.checked_out(out, beside)
    found = call.backend.cross_entropy(call.view, call.viewed(plan), upstream, call.seen(grad))
    return LossGrad(call.loss(plan, found), grad if out is None else out)


def cross_entropy_hvp(
    input: ArrayLike,
    target: ArrayLike,
    vector: ArrayLike,
    *,
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
    axis: int = -1,
    grad_output: ArrayLike | None = None,
) -> NDArray[Any]:
    """Return the Hessian of `cross_entropy` in the logits times `vector`, without the Hessian.

    Parameters
    ----------
    input, target, weight, sample_weight, ignore_index, label_smoothing, z_loss, logit_scale, \
softcap, reduction, divisor, target_prob, axis, grad_output
        As for `cross_entropy_value_and_grad`.
    vector : array_like of `input`'s shape
        The direction, in `input`'s dtype or converted to it.

    Returns
    -------
    ndarray of `input`'s shape and dtype
        With reduction="none", of the sum of the rows' losses weighted by `grad_output`.

    Raises
    ------
    IndexError, TypeError, ValueError
        As `cross_entropy`, and for a `vector` of another shape.

    Notes
    -----
    For a plain row: Q·(a∘x − a·(aᵀx)); see docs/maths.md.

    Examples
    --------
    >>> cross_entropy_hvp([0.0, 0.0], 0, [1.0, 0.0])
    array([ 0.25, -0.25])
    """
    call = Call("cross_entropy_hvp", input, axis)
    plan = call.plan(
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
    direction = as_logits(call.where, "vector", vector)
    if direction.shape != call.logits.shape:
        raise errors.bad_shape(
            call.where, "vector", f"{call.logits.shape}, the input's", direction.shape
        )
    with np.errstate(over="ignore"):
        direction = direction.astype(call.logits.dtype, copy=False)
    result = call.output()
    call.backend.hvp(
        call.view,
        call.viewed(plan),
        call.upstream(plan, grad_output),
        call.seen(direction),
        call.seen(result),
    )
    return result


def cross_entropy_hessian(
    input: ArrayLike,
    target: ArrayLike,
    *,
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
    axis: int = -1,
) -> NDArray[Any]:
    """Return each row's Hessian in its logits, for small V.

    Parameters
    ----------
    input, target, weight, sample_weight, ignore_index, label_smoothing, z_loss, logit_scale, \
softcap, reduction, divisor, target_prob, axis
        As for `cross_entropy`.

    Returns
    -------
    ndarray of the rows' shape + (V, V), in `input`'s dtype (float32 for 16-bit input)

    Raises
    ------
    IndexError, TypeError, ValueError
        As `cross_entropy`.

    Notes
    -----
    For a plain row: Σâ·(diag a − a aᵀ), positive semi-definite; see docs/maths.md.

    Examples
    --------
    >>> cross_entropy_hessian([0.0, 0.0], 0)
    array([[ 0.25, -0.25],
           [-0.25,  0.25]])
    """
    call = Call("cross_entropy_hessian", input, axis)
    plan = call.plan(
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
    n_classes = plan.n_classes
    # In float64 whatever the dtype: what a plain formula multiplies may leave float32's range.
    with np.errstate(under="ignore"):
        hessian = np.asarray(reference.hessian(call.logits.astype(np.float64), plan))
    return call.rounded(hessian).reshape((*plan.rows_shape, n_classes, n_classes))


def softmax_jacobian(input: ArrayLike) -> NDArray[Any]:
    """Return ∂aᵢ/∂zⱼ = aᵢ (δᵢⱼ − aⱼ) of a = σ(z), for small V.

    Parameters
    ----------
    input : array_like (…, V)
        Logits z, classes along the last axis.

    Returns
    -------
    ndarray (…, V, V), in `input`'s dtype (float32 for 16-bit input)

    Examples
    --------
    >>> softmax_jacobian([0.0, 0.0])
    array([[ 0.25, -0.25],
           [-0.25,  0.25]])
    """
    call = Call("softmax_jacobian", input, -1)
    return np.asarray(reference.softmax_jacobian(call.logits.astype(call.compute_dtype)))


def cross_entropy_stats(
    input: ArrayLike,
    target: ArrayLike | None = None,
    *,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    axis: int = -1,
) -> RowStats:
    """Return what the softmax says of each row, without keeping the softmax.

    Parameters
    ----------
    input : array_like of any shape
        Logits, V classes along `axis`.
    target : array_like of integers, the rows' shape, optional
        Class indices.
    sample_weight : array_like, the rows' shape or broadcast to it, optional
        Rows of weight 0 are dropped; other weights have no effect.
    ignore_index, logit_scale, softcap, axis
        As for `cross_entropy`.

    Returns
    -------
    RowStats
        Arrays of the rows' shape: ``logsumexp``; ``target_logprob`` (None without a target);
        ``entropy`` −Σ a ln a in nats; ``argmax``, ties to the first; ``target_rank``, the number of
        classes strictly above the target (None without one). Dropped rows hold NaN and −1, and so
        do rows that are NaN.

    Raises
    ------
    IndexError, TypeError, ValueError
        As `cross_entropy`.

    Examples
    --------
    >>> stats = cross_entropy_stats([[2.0, 1.0, 0.1]], [1])
    >>> int(stats.argmax[0]), int(stats.target_rank[0])
    (0, 1)
    """
    call = Call("cross_entropy_stats", input, axis)
    asked, options = stats_question(
        target, call.rows_shape, sample_weight, ignore_index, logit_scale, softcap
    )
    plan = call.plan(asked, options)
    if plan.kind != "index":
        raise errors.bad_target_dtype_for_stats(call.where, plan.target.dtype)
    return row_stats(call, plan, call.backend.stats(call.view, call.viewed(plan)), target)


def row_stats(
    call: Asked, plan: RowPlan, found: tuple[NDArray[Any], ...], target: object
) -> RowStats:
    """Return what a backend found, in the rows' shape and the compute dtype."""
    lse, logprob, entropy, argmax, rank = (a.reshape(plan.rows_shape) for a in found)
    return RowStats(
        call.rounded(lse),
        None if target is None else call.rounded(logprob),
        call.rounded(entropy),
        argmax,
        None if target is None else rank,
    )


def _probabilities(where: str, input: ArrayLike, axis: int, *, log: bool) -> NDArray[Any]:
    call = Call(where, input, axis)
    result = call.output()
    call.backend.softmax(call.view, call.seen(result), log)
    return result
