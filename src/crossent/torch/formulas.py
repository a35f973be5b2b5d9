"""The loss in plain PyTorch operations: for every device, transform and derivative.

Notation: that of `crossent.reference`, whose formulas these are. N rows, V classes, v the logits,
z what the softmax sees, t a row's maximum, q the weighted target, r the row's weight.

Design:
  a. Nothing here looks at a number, so that everything may be traced, batched and differentiated
     any number of times. A target out of range makes its row NaN.
  b. What is subtracted from a row's maximum never holds the maximum itself (`_Row.gap`, `_Row.e`
     are 0 there, and no derivative passes), so that automatic differentiation sums the mass beside
     it as the loss does, and a confident row keeps its gradient.
  c. `Plan` holds as tensors what `rows.RowPlan` holds as arrays; r stands for the divisor, which is
     a tensor of its own here and may carry a gradient to the row weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from crossent import options as errors
from crossent.options import Options
from crossent.rows import RowPlan
from crossent.torch.tensors import COMPUTE_DTYPE, NUMPY_DTYPE, RowStats


@dataclass(slots=True, eq=False)
class Plan:
    """What every row of a loss means, in tensors; see `crossent.rows.RowPlan`."""

    kind: str
    axis: int
    rows_shape: tuple[int, ...]
    target: Tensor  # (N,) or (N, K) class ids, in range; (N, V) probabilities
    target_prob: Tensor | None  # (N, K), 0 at padding
    kept: Tensor  # (N,) bool
    bad: Tensor | None  # (N,) bool: a class id out of range
    class_weight: Tensor | None  # (V,)
    r: Tensor  # (N,) s / divisor, 0 where dropped
    on: float
    off: float
    z_loss: float
    logit_scale: float
    softcap: float
    reduction: str


def lower(
    where: str,
    shape: tuple[int, ...],
    target: Tensor,
    options: Options,
    axis: int,
    dtype: torch.dtype,
    named: str = "an input",
) -> Plan:
    """Lower options and target as `crossent.rows.lower` does, without a look at the numbers.

    `shape` and `dtype` are those of the logits, `named` what messages call them.
    """
    n_classes, rows_shape = shape[axis], shape[:axis] + shape[axis + 1 :]
    if n_classes == 0:
        raise errors.no_classes(where, shape, axis)
    dtype = COMPUTE_DTYPE[dtype]
    options = options.checked(where, NUMPY_DTYPE[dtype])
    class_weight = row_weight = target_prob = bad = None
    if options.weight is not None:
        class_weight = _real(where, "weight", options.weight).to(dtype)
        if class_weight.shape != (n_classes,):
            expected = f"({n_classes},), one for each class"
            raise errors.bad_shape(where, "weight", expected, tuple(class_weight.shape))
    if options.sample_weight is not None:
        row_weight = _real(where, "sample_weight", options.sample_weight).to(dtype)
        row_weight = _row_weight(where, row_weight, rows_shape)

    if options.target_prob is not None:
        kind = "sparse"
        ids, prob = _sparse(where, target, options.target_prob, shape, axis, named)
        padding = _same(ids, options.ignore_index)
        ids = ids.long()
        bad = (~padding & ((ids < 0) | (ids >= n_classes))).any(dim=-1)
        ids = torch.where(padding, 0, ids).clamp(0, n_classes - 1)
        target_prob = torch.where(padding, 0.0, prob.to(dtype))
        target, kept = ids, ~padding.all(dim=-1)
    elif target.is_floating_point():
        kind = "distribution"
        if tuple(target.shape) != shape:
            raise _bad_target(where, target, rows_shape, shape, named)
        target = _rows(target, axis).to(dtype)
        kept = torch.ones_like(target[:, 0], dtype=torch.bool)
    else:
        kind = "index"
        _check_target(where, target)
        if tuple(target.shape) != rows_shape:
            raise _bad_target(where, target, rows_shape, shape, named)
        kept = ~_same(target.reshape(-1), options.ignore_index)
        target = target.reshape(-1).long()
        bad = kept & ((target < 0) | (target >= n_classes))
        target = torch.where(kept & ~bad, target, 0)

    if row_weight is not None:
        kept = kept & (row_weight != 0)
    return Plan(
        kind,
        axis,
        rows_shape,
        target,
        target_prob,
        kept,
        bad,
        class_weight,
        _share(kind, target, kept, row_weight, class_weight, options, dtype),
        1.0 - options.label_smoothing,
        options.label_smoothing / n_classes,
        options.z_loss,
        options.logit_scale,
        options.softcap or 0.0,
        options.reduction,
    )


def plan_of(plan: RowPlan, target: Tensor, input: Tensor) -> Plan:
    """Return a native call's plan as tensors; a distribution is the saved `target` itself."""
    dtype = COMPUTE_DTYPE[input.dtype]
    kept = np.ones(plan.n_rows, bool) if plan.row_weight is None else plan.row_weight != 0
    weight = np.ones(plan.n_rows) if plan.row_weight is None else plan.row_weight
    prob = None
    if plan.kind == "distribution":
        ids = _rows(target, plan.axis).to(dtype)
    else:
        if plan.kind == "index":
            kept = kept & (plan.target != plan.skip)
        flat = kept if plan.kind == "index" else plan.target >= 0
        ids = torch.from_numpy(np.where(flat, plan.target, 0))
    if plan.target_prob is not None:
        prob = torch.from_numpy(plan.target_prob).to(dtype)
    share = np.where(kept, weight / plan.divisor, 0.0)
    class_weight = None
    if plan.class_weight is not None:
        class_weight = torch.from_numpy(plan.class_weight).to(dtype)
    return Plan(
        plan.kind,
        plan.axis,
        plan.rows_shape,
        ids,
        prob,
        torch.from_numpy(kept),
        None,
        class_weight,
        torch.from_numpy(share).to(dtype),
        plan.on,
        plan.off,
        plan.z_loss,
        plan.logit_scale,
        plan.softcap,
        plan.reduction,
    )


def loss(input: Tensor, plan: Plan) -> Tensor:
    """Loss, differentiable in the logits, the target's numbers and the row weights."""
    row = _row(input, plan)
    if plan.kind == "index":
        w_y = 1.0 if plan.class_weight is None else plan.class_weight[plan.target]
        weight: Any = plan.on * w_y  # Σ q, (N,)
        each = weight * row.gap.gather(1, plan.target[:, None]).squeeze(1)
        if plan.off:
            q = _smooth(plan, row.gap)
            each = each + _admitted(q, row.gap)
            weight = weight + q.sum(dim=-1)
    else:
        q = _target(plan, row.gap)
        each, weight = _admitted(q, row.gap), q.sum(dim=-1)
    each = each + weight * row.log_sum
    if plan.z_loss:
        each = each + plan.z_loss * weight * row.lse**2
    each = plan.r * each
    return each.reshape(plan.rows_shape) if plan.reduction == "none" else each.sum()


def stats(input: Tensor, plan: Plan, *, with_target: bool) -> RowStats:
    """Row statistics, differentiable in logsumexp, target_logprob and entropy."""
    row = _row(input, plan)
    v = row.v.detach()
    y = plan.target[:, None]  # (N, 1)
    # Here e is 0 at the maximum, whose p is 1/S and whose surprise is ln S.
    safe = torch.where(row.e == 0, 0.0, row.gap)
    entropy = (row.e * (safe + row.log_sum[:, None])).sum(dim=-1)
    entropy = (entropy + row.log_sum) / (1 + row.beside)
    valid = plan.kept & ~row.lse.isnan()
    if plan.bad is not None and with_target:
        valid = valid & ~plan.bad
    nan = math.nan

    def result(x: Tensor, otherwise: float) -> Tensor:
        return torch.where(valid, x, otherwise).reshape(plan.rows_shape)

    logprob = rank = None
    if with_target:
        logprob = result(-row.gap.gather(1, y).squeeze(1) - row.log_sum, nan)
        rank = result((v > v.gather(1, y)).sum(dim=-1), -1)
    argmax = result(row.top.squeeze(1), -1)
    return RowStats(result(row.lse, nan), logprob, result(entropy, nan), argmax, rank)


def stats_gradient(
    input: Tensor,
    plan: Plan,
    for_lse: Tensor | None,
    for_logprob: Tensor | None,
    for_entropy: Tensor | None,
) -> Tensor:
    """Gradient in the logits of the statistics, each times its upstream gradient (None: 0)."""
    row = _row(input, plan)
    p, others_p = _probabilities(row)
    found = torch.zeros_like(p)
    if for_lse is not None:
        found = found + p * for_lse.reshape(-1, 1)
    if for_entropy is not None:
        surprise = torch.where(p == 0, 0.0, row.gap) + row.log_sum[:, None]
        entropy = (p * surprise).sum(dim=-1, keepdim=True)
        found = found + p * (surprise - entropy) * for_entropy.reshape(-1, 1)
    if for_logprob is not None:
        y = plan.target[:, None]
        slope = (-p).scatter(1, y, others_p.gather(1, y))
        found = found + slope * for_logprob.reshape(-1, 1)
    found = torch.where(plan.kept[:, None], found * _slope(row, plan), 0.0)
    return _back(found, plan, input)


def gradient(input: Tensor, plan: Plan, grad_output: Tensor) -> Tensor:
    """Gradient of the loss in the logits, A − B + C of `crossent.reference`, times u."""
    row = _row(input, plan)
    in_z, _, _ = _in_z(row, plan)
    return _back(_upstream(plan, grad_output)[:, None] * in_z * _slope(row, plan), plan, input)


def along_gradient(input: Tensor, plan: Plan, vector: Tensor) -> Tensor:
    """Σ ∂loss/∂input · `vector`, of the loss's shape."""
    row = _row(input, plan)
    in_z, _, _ = _in_z(row, plan)
    x = _kept_rows(vector, plan).to(in_z.dtype)
    each = plan.r * (in_z * _slope(row, plan) * x).sum(dim=-1)
    return each.reshape(plan.rows_shape) if plan.reduction == "none" else each.sum()


def hvp(input: Tensor, plan: Plan, grad_output: Tensor, vector: Tensor) -> Tensor:
    """Hessian of the loss in the logits, times `vector` and u (M25 of docs/maths.md)."""
    row = _row(input, plan)
    in_z, p, weight = _in_z(row, plan)
    x = _kept_rows(vector, plan).to(p.dtype)
    slope = _slope(row, plan)
    y = p * slope * x
    mean = y.sum(dim=-1, keepdim=True)
    twice = 2 * plan.z_loss
    product = weight * (1 + twice * row.lse[:, None]) * (y - p * mean) + twice * weight * p * mean
    product = slope * product
    if plan.softcap:
        curvature = -2 * (plan.logit_scale / plan.softcap) * slope
        product = product + in_z * curvature * (plan.logit_scale / plan.softcap * row.v).tanh() * x
    return _back(_upstream(plan, grad_output)[:, None] * product, plan, input)


# One row ------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    v: Tensor  # (N, V) logits, 0 where dropped
    top: Tensor  # (N, 1) where the maximum is
    gap: Tensor  # (N, V) z_t − z ≥ 0; 0 at t
    e: Tensor  # (N, V) exp(−gap); 0 at t
    beside: Tensor  # (N,) Σ e: the mass beside the maximum
    log_sum: Tensor  # (N,) log1p of it
    lse: Tensor  # (N,) z_t + ln S


def _row(input: Tensor, plan: Plan) -> _Row:
    v = _kept_rows(input, plan).to(COMPUTE_DTYPE[input.dtype])
    if plan.bad is not None:
        v = v + torch.where(plan.bad, math.nan, 0.0).to(v.dtype)[:, None]
    z = v * plan.logit_scale
    if plan.softcap:
        z = torch.where(v.isinf(), v, _capped(z, plan.softcap))
    top = v.detach().argmax(dim=-1, keepdim=True)
    largest = z.gather(1, top)
    if plan.softcap:
        gap, rest = largest - z, None
    else:
        # τ(v − max v): an offset common to a row leaves before anything is rounded.
        gap, rest = _difference(v.gather(1, top), v, plan.logit_scale)
    gap = gap.scatter(1, top, 0.0)
    e = (-gap).exp()
    if rest is not None:
        e = e * (1 - rest)
    e = e.scatter(1, top, 0.0)
    # z_t − z_t is 0, and NaN where the maximum is infinite.
    beside = e.sum(dim=-1) + (largest - largest).squeeze(1)
    log_sum = beside.log1p()
    return _Row(v, top, gap, e, beside, log_sum, largest.squeeze(1) + log_sum)


def _capped(z: Tensor, cap: float) -> Tensor:
    """κ·tanh(z/κ), of whose derivative autodiff's 1 − tanh² would leave nothing far beyond κ."""
    x = z / cap
    w = (x.abs() * -2).exp()
    return cap * torch.where(x.abs() < 0.5, x.tanh(), x.sign() * ((1 - w) / (1 + w)))


def _difference(a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return scale·(a − b) as rounded, and what the rounding of a − b left off, scaled."""
    difference = a - b
    with torch.no_grad():
        back = difference - a
        rest = (a - (difference - back)) - (b + back)
        rest = torch.where(rest.isfinite(), rest * scale, 0.0)
    return difference * scale, rest


def _probabilities(row: _Row) -> tuple[Tensor, Tensor]:
    """Return p and Σ_{k≠j} p_k, ``(N, V)``."""
    beside = row.beside[:, None]
    total = 1 + beside
    p = row.e.scatter(1, row.top, torch.ones_like(beside))
    others = (total - row.e).scatter(1, row.top, beside)
    return p / total, others / total


def _in_z(row: _Row, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Return A − B + C, p ``(N, V)`` and Σ q ``(N, 1)``."""
    q = _target(plan, row.gap)
    p, others_p = _probabilities(row)
    weight = q.sum(dim=-1, keepdim=True)
    in_z = p * _sum_of_others(q) - q * others_p
    if plan.z_loss:
        in_z = in_z + 2 * plan.z_loss * row.lse[:, None] * weight * p
    return in_z, p, weight


def _slope(row: _Row, plan: Plan) -> Tensor:
    """∂z/∂v ``(N, V)``."""
    if not plan.softcap:
        return torch.full_like(row.v, plan.logit_scale)
    w = (row.v.abs() * (-2 * plan.logit_scale / plan.softcap)).exp()
    return plan.logit_scale * (4 * w / (1 + w) ** 2)  # τ·sech²; 1 − tanh² would cancel


def _sum_of_others(x: Tensor) -> Tensor:
    """Σ_{k≠j} x_k for each j: the largest entry's others by themselves, as the reference does."""
    top = x.detach().abs().argmax(dim=-1, keepdim=True)
    rest = x.scatter(1, top, 0.0).sum(dim=-1, keepdim=True)
    return rest + (x.gather(1, top) - x).scatter(1, top, 0.0)


# Targets ------------------------------------------------------------------------------------------


def _target(plan: Plan, like: Tensor) -> Tensor:
    """Q ``(N, V)``: w_j·((1 − ε)·â_j + ε/V)."""
    if plan.kind == "distribution":
        given = torch.where(plan.kept[:, None], plan.target, 0.0)
    elif plan.kind == "sparse":
        assert plan.target_prob is not None
        given = torch.zeros_like(like).scatter_add(1, plan.target, plan.target_prob)
    else:
        given = torch.zeros_like(like).scatter(1, plan.target[:, None], 1.0)
    q = plan.on * given + plan.off
    return q if plan.class_weight is None else plan.class_weight * q


def _smooth(plan: Plan, like: Tensor) -> Tensor:
    """Return the part of q that smoothing spreads over the classes, ``(1, V)``."""
    w = plan.class_weight
    return torch.full_like(like[:1], plan.off) if w is None else (plan.off * w)[None]


def _admitted(q: Tensor, gap: Tensor) -> Tensor:
    """Σ q·gap, where q = 0 admits an infinite gap."""
    return (q * torch.where((q == 0) & gap.isinf(), 0.0, gap)).sum(dim=-1)


def _share(
    kind: str,
    target: Tensor,
    kept: Tensor,
    row_weight: Tensor | None,
    class_weight: Tensor | None,
    options: Options,
    dtype: torch.dtype,
) -> Tensor:
    """R = s / divisor ``(N,)``, 0 where dropped."""
    one = kept.to(dtype)
    s = one if row_weight is None else torch.where(kept, row_weight, 0.0)
    if options.reduction != "mean":
        return s
    if options.divisor is not None:
        total = torch.full_like(s[:1].sum(), options.divisor)
    else:
        counted = s
        if kind == "index" and class_weight is not None:
            counted = torch.where(kept, s * class_weight[target], 0.0)
        # In float64 where the device has it: float32 counts no further than 2^24.
        total = counted.sum(dtype=torch.float32 if s.device.type == "mps" else torch.float64)
    # A divisor of 0 is NaN where it meets a kept row; with none kept it is never seen.
    total = torch.where(total == 0, torch.where(kept.any(), math.nan, 1.0).to(total.dtype), total)
    return torch.where(kept, (s / total).to(dtype), 0.0)


def _real(where: str, name: str, value: Tensor) -> Tensor:
    if value.dtype is torch.bool or value.is_complex():
        raise errors.bad_array(where, name, "an array of real numbers", value)
    return value


def _check_target(where: str, target: Tensor) -> None:
    if target.dtype is torch.bool or target.is_complex():
        raise errors.bad_target_dtype(where, target.dtype)


def _same(ids: Tensor, index: int) -> Tensor:
    """Tell the ids that are `index`; 2^64 − 100 is not −100, though as int64 it would be."""
    same = ids.long() == index
    return same if ids.dtype is not torch.uint64 or index >= 0 else torch.zeros_like(same)


def _row_weight(where: str, weight: Tensor, rows_shape: tuple[int, ...]) -> Tensor:
    try:
        return weight.broadcast_to(rows_shape).reshape(-1)
    except RuntimeError:
        expected = f"{rows_shape}, one for each row (or broadcast to it)"
        raise errors.bad_shape(where, "sample_weight", expected, tuple(weight.shape)) from None


def _sparse(
    where: str, ids: Tensor, prob: Tensor, shape: tuple[int, ...], axis: int, named: str
) -> tuple[Tensor, Tensor]:
    """Return ids and probabilities ``(N, K)``."""
    _check_target(where, ids)
    if ids.is_floating_point():
        raise errors.bad_target_prob(where, f"target has dtype {errors.dtype_name(ids.dtype)}")
    if prob.dtype is torch.bool or prob.is_complex():
        reason = f"target_prob has dtype {errors.dtype_name(prob.dtype)}"
        raise errors.bad_target_prob(where, reason)
    got, other = tuple(ids.shape), tuple(prob.shape)
    rows_shape = shape[:axis] + shape[axis + 1 :]
    fits = len(got) == len(shape) and got[:axis] + got[axis + 1 :] == rows_shape
    if not fits or got != other:
        reason = f"got target {got} and target_prob {other} for {named} of shape {shape}"
        raise errors.bad_target_prob(where, reason)
    return _rows(ids, axis), _rows(prob, axis)


def _bad_target(
    where: str, target: Tensor, rows_shape: tuple[int, ...], shape: tuple[int, ...], named: str
) -> ValueError:
    name = errors.dtype_name(target.dtype)
    return errors.bad_target_shape(where, tuple(target.shape), name, rows_shape, shape, named)


# Shapes -------------------------------------------------------------------------------------------


def _rows(x: Tensor, axis: int) -> Tensor:
    """From the logits' shape to rows ``(N, V)``."""
    moved = x.movedim(axis, -1)
    return moved.reshape(math.prod(moved.shape[:-1]), moved.shape[-1])


def _kept_rows(x: Tensor, plan: Plan) -> Tensor:
    """Rows ``(N, V)``, 0 where dropped: nothing reads what stood there."""
    return torch.where(plan.kept[:, None], _rows(x, plan.axis), 0.0)


def _back(x: Tensor, plan: Plan, input: Tensor) -> Tensor:
    """From rows ``(N, V)`` to the logits' shape and dtype."""
    found = x.reshape(*plan.rows_shape, x.shape[-1]).movedim(-1, plan.axis)
    return found.to(input.dtype)


def _upstream(plan: Plan, grad_output: Tensor) -> Tensor:
    """u·r ``(N,)``; 0 where dropped, whatever u is there."""
    u = grad_output.reshape(-1) if plan.reduction == "none" else grad_output
    return torch.where(plan.kept, u, 0.0).to(plan.r.dtype) * plan.r
