"""The loss and its derivatives as plain formulas: the truth that kernels are held to.

Notation: N rows, V classes; v the logits as given, z what the softmax sees, p = softmax(z), q the
weighted target, r the row's weight over the divisor, lse = m + ln S with m the row's maximum and
S = Σ exp(z − m). `docs/maths.md` derives every formula; its labels (M1) … (M28) stand here.

Design:
  a. A function moves the class axis last, works on (N, V) rows and moves it back. Speed is no aim.
  b. One code for floating arrays and for arrays of mpmath numbers (`exact`); under
     ``mpmath.workdps(60)`` the latter judge everything else. A plan holds options and weights as
     rounded to the compute dtype, but a distribution target as the caller's array holds it.
  c. Nothing cancels where a row is confident. The mass beside the maximum is summed by itself,
     −ln p is ``(m − z) + log1p(mass)``, and ``p − q`` is the difference of two products with
     complements (`sum_of_others`), never ``p − 1``. Floats still round z − m before exp.
  d. A dropped row is replaced by zeros before anything reads it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from crossent.exact import Array, cast, computable, elementwise, exact, quiet, zero_where
from crossent.rows import RowPlan

__all__ = [
    "RowStats",
    "RowTerms",
    "chain_rule_terms",
    "exact",
    "grad",
    "grad_sample_weight",
    "grad_target",
    "grad_target_prob",
    "hessian",
    "hvp",
    "linear_grad",
    "log_softmax",
    "loss",
    "loss_rows",
    "rows",
    "softmax",
    "softmax_jacobian",
    "stats",
    "sum_of_others",
    "weighted_sums",
]


class RowTerms(NamedTuple):
    """The quantities of the formulas, row by row."""

    kept: Array  # (N,) bool
    r: Array  # (N,) s / divisor, 0 where dropped
    q: Array  # (N, V) weighted, smoothed target
    Q: Array  # (N,) Σ q
    z: Array  # (N, V) scaled and capped logits
    slope: Array  # (N, V) ∂z/∂v
    curvature: Array  # (N, V) ∂²z/∂v²
    gap: Array  # (N, V) m − z ≥ 0
    log_sum: Array  # (N,) ln S = log1p of the mass beside the maximum
    lse: Array  # (N,) m + ln S
    p: Array  # (N, V) softmax(z)
    others_p: Array  # (N, V) Σ_{k≠j} p_k
    others_q: Array  # (N, V) Σ_{k≠j} q_k


class RowStats(NamedTuple):
    """What one may ask of a row beside its loss, each of the rows' shape."""

    logsumexp: Array
    target_logprob: Array
    entropy: Array
    argmax: Array
    target_rank: Array


# The loss -----------------------------------------------------------------------------------------


@quiet
def loss(logits: ArrayLike, plan: RowPlan) -> Any:
    """Loss, put together as `plan.reduction` says: a scalar, or one number a row with "none".

    Parameters
    ----------
    logits
        v, with the class axis at ``plan.axis``: floating numbers, integers or mpmath numbers.
    plan
        The options and the target, from `crossent.rows.lower`.

    Examples
    --------
    >>> import numpy as np
    >>> from crossent import reference
    >>> from crossent.options import Options
    >>> from crossent.rows import lower
    >>> v = np.array([[2.0, 1.0, 0.1], [0.0, 50.0, 0.0]])
    >>> plan = lower("loss", v.shape, 1, v.dtype, [0, 1], Options(reduction="none"))
    >>> [float(f"{x:.6g}") for x in reference.loss(v, plan)]
    [0.41703, 3.8575e-22]
    """
    each = loss_rows(logits, plan)  # (N,)
    if plan.reduction == "none":
        return each.reshape(plan.rows_shape)[()]
    return each.sum()


@quiet
def loss_rows(logits: ArrayLike, plan: RowPlan) -> Array:
    """Loss of each row, r_i included, ``(N,)`` (M19)."""
    t = rows(logits, plan)
    return np.asarray(t.r * _unweighted_loss(t, plan))


@quiet
def grad(logits: ArrayLike, plan: RowPlan, grad_output: ArrayLike | None = None) -> Array:
    """Gradient of the loss in the logits, of their shape (M19).

    Parameters
    ----------
    logits, plan
        As in `loss`.
    grad_output
        The upstream gradient u: a scalar with "mean" and "sum", of the rows' shape with "none".
    """
    t = rows(logits, plan)
    return _from_rows(_upstream(plan, t, grad_output)[:, None] * _grad_z(t, plan) * t.slope, plan)


@quiet
def hvp(
    logits: ArrayLike, plan: RowPlan, vector: ArrayLike, grad_output: ArrayLike | None = None
) -> Array:
    """Hessian of the loss in the logits, times `vector`; both of the logits' shape (M25)."""
    t = rows(logits, plan)
    x = cast(_to_rows(np.asarray(vector), plan.axis, plan.n_classes), t.p.dtype)
    x = zero_where(~t.kept, x)
    y = t.p * t.slope * x  # (N, V)
    spread, rank_one = _hessian_factors(t, plan)
    in_z = spread * (t.others_p * y - t.p * sum_of_others(y))
    in_z = in_z + rank_one * t.p * y.sum(axis=-1, keepdims=True)
    product = t.slope * in_z + _grad_z(t, plan) * t.curvature * x
    return _from_rows(_upstream(plan, t, grad_output)[:, None] * product, plan)


@quiet
def hessian(logits: ArrayLike, plan: RowPlan) -> Array:
    """Hessian of each row's loss in its logits, r_i included, ``(N, V, V)`` (M24)."""
    t = rows(logits, plan)
    spread, rank_one = _hessian_factors(t, plan)
    pairs = t.p[:, :, None] * t.p[:, None, :]  # (N, V, V)
    in_z = spread[..., None] * _covariance(t.p, t.others_p) + rank_one[..., None] * pairs
    table = t.slope[:, :, None] * in_z * t.slope[:, None, :]
    j = np.arange(plan.n_classes)
    table[:, j, j] += _grad_z(t, plan) * t.curvature
    return np.asarray(t.r[:, None, None] * table)


# The layer before the loss ------------------------------------------------------------------------


@quiet
def weighted_sums(x: ArrayLike, w: ArrayLike, b: ArrayLike | None = None) -> Array:
    """Weighted sums z = x Wᵀ + b of features x ``(…, D)``, ``(…, V)``."""
    x, w = computable(x), computable(w)
    z = np.asarray(x @ w.T)
    return z if b is None else np.asarray(z + computable(b))


@quiet
def linear_grad(
    x: ArrayLike,
    w: ArrayLike,
    b: ArrayLike | None,
    plan: RowPlan,
    grad_output: ArrayLike | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of the loss of `weighted_sums` in x, W and b: g W, gᵀ x, Σ g (M12, M13, M14).

    Parameters
    ----------
    x, w, b
        As in `weighted_sums`; rows of x that are dropped may hold anything.
    plan, grad_output
        As in `grad`, the class axis last.
    """
    x, w = computable(x), computable(w)
    rows_of_x = zero_where(~_kept(plan), x.reshape(plan.n_rows, x.shape[-1]))  # (N, D)
    z = weighted_sums(rows_of_x, w, b).reshape(*plan.rows_shape, plan.n_classes)
    g = grad(z, plan, grad_output).reshape(plan.n_rows, plan.n_classes)
    return (g @ w).reshape(x.shape), g.T @ rows_of_x, g.sum(axis=0)


# Gradients of the loss in its other arguments -----------------------------------------------------


@quiet
def grad_target(logits: ArrayLike, plan: RowPlan, grad_output: ArrayLike | None = None) -> Array:
    """Gradient of the loss in a distribution target, of the logits' shape (M26)."""
    t = rows(logits, plan)
    return _from_rows(_upstream(plan, t, grad_output)[:, None] * _per_target(t, plan), plan)


@quiet
def grad_target_prob(
    logits: ArrayLike, plan: RowPlan, grad_output: ArrayLike | None = None
) -> Array:
    """Gradient of the loss in a sparse target's `target_prob`, ``(N, K)``, 0 at padding (M27)."""
    t = rows(logits, plan)
    padding = plan.target < 0
    at_ids = np.take_along_axis(_per_target(t, plan), np.where(padding, 0, plan.target), axis=-1)
    return zero_where(padding, _upstream(plan, t, grad_output)[:, None] * at_ids)


@quiet
def grad_sample_weight(
    logits: ArrayLike,
    plan: RowPlan,
    grad_output: ArrayLike | None = None,
    *,
    fixed_divisor: bool = False,
) -> Array:
    """Gradient of the loss in the row weights s, of the rows' shape; 0 at dropped rows (M28).

    With "mean" the weights stand in the divisor too, unless the caller gave it: `fixed_divisor`.
    """
    t = rows(logits, plan)
    dtype = t.p.dtype
    each = _unweighted_loss(t, plan)  # (N,)
    if plan.reduction == "mean" and not fixed_divisor:
        share = np.ones(plan.n_rows)
        if plan.kind == "index" and plan.class_weight is not None:
            share = plan.class_weight[np.where(t.kept, plan.target, 0)]
        each = each - cast(share, dtype) * (t.r * each).sum()
    one = cast(np.ones(plan.n_rows), dtype) / cast(plan.divisor, dtype)
    upstream = _upstream(plan, t._replace(r=one), grad_output)
    return zero_where(~t.kept, upstream * each).reshape(plan.rows_shape)


# The softmax itself -------------------------------------------------------------------------------


@quiet
def softmax(logits: ArrayLike, axis: int = -1) -> Array:
    """Softmax a_j = exp(z_j) / Σ_k exp(z_k) along `axis` (M1)."""
    z, shape = _plain_rows(logits, axis)
    p, _, _ = _probabilities(_shifted(z))
    return np.moveaxis(p.reshape(shape), -1, axis)


@quiet
def log_softmax(logits: ArrayLike, axis: int = -1) -> Array:
    """Logarithm of the softmax along `axis`, (z − m) − ln S (M20)."""
    z, shape = _plain_rows(logits, axis)
    shifted = _shifted(z)
    _, _, log_sum = _probabilities(shifted)
    return np.moveaxis((shifted - log_sum[:, None]).reshape(shape), -1, axis)


@quiet
def softmax_jacobian(logits: ArrayLike) -> Array:
    """Jacobian ∂a_i/∂z_j = a_i·(δ_ij − a_j) of the softmax, ``(…, V, V)`` (M5)."""
    z, shape = _plain_rows(logits, -1)
    p, others, _ = _probabilities(_shifted(z))
    return _covariance(p, others).reshape(*shape, shape[-1])


def chain_rule_terms(a: ArrayLike, target: ArrayLike) -> Array:
    """Terms −(â_i/a_i)·∂a_i/∂z_j of the chain rule, ``(V, V)``, i down and j across (M3, M6).

    The a_i cancels on paper, so an a_i of 0 is no obstacle. Column j sums to the gradient
    a_j·Σâ − â_j.

    Examples
    --------
    >>> from crossent import reference
    >>> reference.chain_rule_terms([0.5, 0.25, 0.25], [0, 1, 0]).sum(axis=0)
    array([ 0.5 , -0.75,  0.25])
    """
    a, target = computable(a), computable(target)
    table = target[:, None] * a[None, :]
    j = np.arange(len(a))
    table[j, j] = -target * sum_of_others(a)
    return np.asarray(table)


@quiet
def stats(logits: ArrayLike, plan: RowPlan) -> RowStats:
    """Row statistics of z for index targets; NaN and −1 where a row is dropped or has no softmax.

    `target_rank` counts the classes strictly above the target; ties in `argmax` go to the first.
    """
    t = rows(logits, plan)
    v = _kept_logits(logits, plan, t.kept)
    y = np.where(t.kept, plan.target, 0)[:, None]  # (N, 1)
    surprise = zero_where(t.p == 0, t.gap) + t.log_sum[:, None]
    target_logprob = -np.take_along_axis(t.gap, y, axis=-1)[:, 0] - t.log_sum
    rank = (v > np.take_along_axis(v, y, axis=-1)).sum(axis=-1)
    valid = t.kept & (t.lse == t.lse)

    def result(x: Array, otherwise: Array) -> Array:
        return np.where(valid, x, otherwise).reshape(plan.rows_shape)

    nan, none = cast(np.nan, t.p.dtype), np.asarray(-1)
    return RowStats(
        logsumexp=result(t.lse, nan),
        target_logprob=result(target_logprob, nan),
        entropy=result((t.p * surprise).sum(axis=-1), nan),
        argmax=result(np.argmax(v, axis=-1), none),
        target_rank=result(rank, none),
    )


# Rows ---------------------------------------------------------------------------------------------


@quiet
def rows(logits: ArrayLike, plan: RowPlan) -> RowTerms:
    """Evaluate every quantity of the formulas, row by row (M15, M16, M20)."""
    kept = _kept(plan)
    v = _kept_logits(logits, plan, kept)  # (N, V)
    dtype = v.dtype
    z, slope, curvature = _transform(v, plan)
    # τ(v − max v): an offset common to a row leaves before anything is rounded.
    shifted = _shifted(z) if plan.softcap else cast(plan.logit_scale, dtype) * _shifted(v)
    p, others_p, log_sum = _probabilities(shifted)
    q = zero_where(~kept, _weighted_target(plan, dtype))
    s = np.ones(plan.n_rows) if plan.row_weight is None else plan.row_weight
    maximum = np.take_along_axis(z, np.argmax(v, axis=-1, keepdims=True), axis=-1)[:, 0]
    return RowTerms(
        kept=kept,
        r=zero_where(~kept, cast(s, dtype) / cast(plan.divisor, dtype)),
        q=q,
        Q=q.sum(axis=-1),
        z=z,
        slope=slope,
        curvature=curvature,
        gap=-shifted,
        log_sum=log_sum,
        lse=maximum + log_sum,
        p=p,
        others_p=others_p,
        others_q=sum_of_others(q),
    )


def sum_of_others(x: Array) -> Array:
    """Σ_{k≠j} x_k for each j of the last axis, with no cancellation among equal signs (M22).

    With t the entry of largest magnitude it is Σ_{k≠t} x_k + (x_t − x_j): for j = t that is the
    others' sum itself, and elsewhere both parts have one sign.
    """
    top = np.argmax(np.abs(x), axis=-1, keepdims=True)
    largest = np.take_along_axis(x, top, axis=-1)
    rest = x.copy()
    np.put_along_axis(rest, top, cast(0.0, x.dtype), axis=-1)
    return np.asarray(rest.sum(axis=-1, keepdims=True) + (largest - x))


def _kept(plan: RowPlan) -> Array:
    kept = np.ones(plan.n_rows, bool) if plan.row_weight is None else plan.row_weight != 0
    return kept & (plan.target != plan.skip) if plan.kind == "index" else kept


def _kept_logits(logits: ArrayLike, plan: RowPlan, kept: Array) -> Array:
    """Return v ``(N, V)``, 0 in dropped rows."""
    return zero_where(~kept, _to_rows(computable(logits), plan.axis, plan.n_classes))


def _transform(v: Array, plan: RowPlan) -> tuple[Array, Array, Array]:
    """Return z = κ·tanh(τv/κ), or τv, and its first two derivatives in v (M16)."""
    scale = cast(plan.logit_scale, v.dtype)
    if not plan.softcap:
        return scale * v, np.full_like(v, scale), np.full_like(v, cast(0.0, v.dtype))
    cap = cast(plan.softcap, v.dtype)
    x = scale * v / cap
    t, w = elementwise("tanh", x), elementwise("exp", -2 * np.abs(x))
    slope = scale * (4 * w / (1 + w) ** 2)  # τ·sech²; 1 − tanh² would cancel
    return np.where(np.abs(v) == np.inf, v, cap * t), slope, -2 * scale / cap * t * slope


def _shifted(z: Array) -> Array:
    """Return z − max z: exactly 0 at the maximum, NaN where that is infinite."""
    return np.asarray(z - np.take_along_axis(z, np.argmax(z, axis=-1, keepdims=True), axis=-1))


def _probabilities(shifted: Array) -> tuple[Array, Array, Array]:
    """Return p ``(N, V)``, Σ_{k≠j} p_k ``(N, V)`` and ln S ``(N,)`` of rows whose maximum is 0.

    One NaN makes S, and with it the row, NaN.
    """
    others = sum_of_others(e := elementwise("exp", shifted))
    beside = others.min(axis=-1, keepdims=True)  # the mass beside the maximum
    total = 1 + beside
    return e / total, others / total, elementwise("log1p", beside[:, 0])


def _weighted_target(plan: RowPlan, dtype: np.dtype[Any]) -> Array:
    """Return q_ij = w_j·((1 − ε)·â_ij + ε/V), ``(N, V)`` (M15)."""
    if plan.kind == "distribution":
        target = cast(_to_rows(plan.target, plan.axis, plan.n_classes), dtype)
    else:
        target = cast(np.zeros((plan.n_rows, plan.n_classes)), dtype)
        ids = plan.target[:, None] if plan.kind == "index" else plan.target  # (N, 1) or (N, K)
        prob = np.ones(ids.shape) if plan.target_prob is None else plan.target_prob
        for k in range(ids.shape[1]):  # one id a row at a time, so that repeated ids add
            here = np.flatnonzero((ids[:, k] >= 0) & (ids[:, k] < plan.n_classes))
            target[here, ids[here, k]] += cast(prob[here, k], dtype)
    q: Array = cast(plan.on, dtype) * target + cast(plan.off, dtype)
    return q if plan.class_weight is None else cast(plan.class_weight, dtype) * q


def _unweighted_loss(t: RowTerms, plan: RowPlan) -> Array:
    """Return Σ q·((m − z) + ln S) + c·Q·lse², which is Q·lse·(1 + c·lse) − Σ q z (M17, M20)."""
    surprise = zero_where(t.q == 0, t.gap) + t.log_sum[:, None]  # q = 0 admits z = −inf
    plain: Array = (t.q * surprise).sum(axis=-1)
    if not plan.z_loss:
        return plain
    return np.asarray(plain + cast(plan.z_loss, t.p.dtype) * t.Q * t.lse**2)


def _grad_z(t: RowTerms, plan: RowPlan) -> Array:
    """Return A − B + C: a row's gradient in z without r and u, ``(N, V)`` (M18, M21)."""
    plain: Array = t.p * t.others_q - t.q * t.others_p
    if not plan.z_loss:
        return plain
    return np.asarray(plain + (2 * cast(plan.z_loss, t.p.dtype) * t.lse * t.Q)[:, None] * t.p)


def _hessian_factors(t: RowTerms, plan: RowPlan) -> tuple[Array, Array]:
    """Return the factors of diag p − p pᵀ and of p pᵀ in the Hessian, ``(N, 1)`` (M23)."""
    if not plan.z_loss:
        return t.Q[:, None], cast(np.zeros((plan.n_rows, 1)), t.p.dtype)
    twice = 2 * cast(plan.z_loss, t.p.dtype)
    return (t.Q * (1 + twice * t.lse))[:, None], (twice * t.Q)[:, None]


def _covariance(p: Array, others: Array) -> Array:
    """Diag p − p pᵀ, ``(N, V, V)``, its diagonal as p_j·Σ_{k≠j} p_k (M5)."""
    table: Array = -p[:, :, None] * p[:, None, :]
    j = np.arange(p.shape[-1])
    table[:, j, j] = p * others
    return table


def _per_target(t: RowTerms, plan: RowPlan) -> Array:
    """Return ∂loss_i/∂â_ij without r and u, ``(N, V)`` (M26)."""
    dtype = t.p.dtype
    w = np.ones(plan.n_classes) if plan.class_weight is None else plan.class_weight
    factor = np.broadcast_to(cast(plan.on, dtype) * cast(w, dtype), t.p.shape)
    surprise = zero_where(factor == 0, t.gap) + t.log_sum[:, None]
    if plan.z_loss:
        surprise = surprise + (cast(plan.z_loss, dtype) * t.lse**2)[:, None]
    return np.asarray(factor * surprise)


def _upstream(plan: RowPlan, t: RowTerms, grad_output: ArrayLike | None) -> Array:
    """Return u·r, ``(N,)``; 0 where a row is dropped, whatever u is there."""
    if grad_output is None:
        return t.r
    u = cast(grad_output, t.r.dtype)
    u = u.reshape(plan.n_rows) if plan.reduction == "none" else np.broadcast_to(u, t.r.shape)
    return np.asarray(zero_where(~t.kept, u) * t.r)


def _plain_rows(logits: ArrayLike, axis: int) -> tuple[Array, tuple[int, ...]]:
    """Return rows ``(N, V)`` and the shape they had with the class axis last."""
    z = np.moveaxis(computable(logits), axis, -1)
    return z.reshape(z.size // max(z.shape[-1], 1), z.shape[-1]), z.shape


def _to_rows(x: Array, axis: int, n_classes: int) -> Array:
    return np.moveaxis(x, axis, -1).reshape(x.size // n_classes, n_classes)


def _from_rows(x: Array, plan: RowPlan) -> Array:
    return np.moveaxis(x.reshape(*plan.rows_shape, plan.n_classes), -1, plan.axis)
