"""The head in plain PyTorch operations: `linear`, then the formulas of the loss.

Notation: x ``(…, D)``, W ``(V, D)``, b ``(V,)`` or None; z the logits ``(…, V)``; primes mark
directions. "Operands" are (x, W, b).

Design:
  a. As in `formulas.py` nothing looks at a number, so that everything may be traced, batched and
     differentiated any number of times. The logits are held, and what autograd keeps beside them.
  b. On the CPU 16-bit features and weights are multiplied as float32, as the kernels do; elsewhere
     `linear` takes them as they are, for the sake of its speed, and rounds the logits.
  c. Whether autocast is on was asked where the call began; here it is off.
  d. A dropped row's features are replaced by 0, since 0 times a NaN in them is none; so is its
     gradient in them, for the sake of a NaN in a direction that meets it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from crossent.runtime import workspace_bytes
from crossent.torch import formulas
from crossent.torch.formulas import Plan
from crossent.torch.tensors import COMPUTE_DTYPE, RowStats

_ARRAYS = 16  # of a chunk's logits' size that the formulas of a gradient may hold at once


class Operands(NamedTuple):
    """Features, weights and bias, or something for each of them; None: there is none."""

    input: Any
    weight: Any
    bias: Any


def loss(operands: Operands, plan: Plan) -> Tensor:
    """Loss, differentiable in the operands, the target's numbers and the row weights."""
    with _as_they_are(operands.input):
        return formulas.loss(logits(_kept(operands, plan)), plan)


def stats(operands: Operands, plan: Plan, *, with_target: bool) -> RowStats:
    """Row statistics, differentiable in logsumexp, target_logprob and entropy."""
    with _as_they_are(operands.input):
        return formulas.stats(logits(_kept(operands, plan)), plan, with_target=with_target)


def gradients(
    operands: Operands, plan: Plan, grad_output: Tensor, wanted: tuple[bool, ...]
) -> Operands:
    """Gradients of the loss in those operands that are `wanted`, times u: g W, gᵀ x and Σ g."""
    with _as_they_are(operands.input):
        kept = _kept(operands, plan)
        g = formulas.gradient(logits(kept), plan, grad_output)
        return _in_operands(g, kept, wanted, plan)


def hvp(
    operands: Operands,
    plan: Plan,
    grad_output: Tensor,
    vectors: Operands,
    wanted: tuple[bool, ...],
) -> Operands:
    """Hessian of the loss times `vectors` (None: 0) and u, in those operands that are `wanted`."""
    with _as_they_are(operands.input):
        kept = _kept(operands, plan)
        along_x = vectors.input
        if along_x is not None:
            along_x = _kept_features(along_x, plan)
        vectors = Operands(along_x, *vectors[1:])
        z, along = logits(kept), _along(kept, vectors)
        h = formulas.hvp(z, plan, grad_output, along)
        found = _in_operands(h, kept, wanted, plan)
        if along_x is None and vectors.weight is None:
            return found
        # The terms that x and W have in common.
        g = formulas.gradient(z, plan, grad_output)
        common = Operands(along_x, vectors.weight, None)
        also = (
            wanted[0] and vectors.weight is not None,
            wanted[1] and along_x is not None,
            False,
        )
        more = _in_operands(g, common, also, plan)
        return Operands(*map(_sum, found, more))


def along_gradient(operands: Operands, plan: Plan, vectors: Operands) -> Tensor:
    """Σ ∂loss/∂operands · `vectors` (None: 0), of the loss's shape, a chunk of rows at a time."""
    found = []
    with _as_they_are(operands.input):
        for _, part, some, directions in chunks(operands, plan, vectors):
            z, along = logits(some), _along(some, directions)
            found.append(formulas.along_gradient(z, part, along))
    if plan.reduction == "none":
        return torch.cat(found).reshape(plan.rows_shape)
    return torch.stack(found).sum()


def stats_gradients(
    operands: Operands, plan: Plan, upstream: tuple[Tensor | None, ...], wanted: tuple[bool, ...]
) -> Operands:
    """Gradients of logsumexp, target_logprob and entropy, each times its upstream gradient.

    They are summed up over chunks of rows, in the compute dtype, and rounded once.
    """
    dtype = COMPUTE_DTYPE[operands.input.dtype]
    in_rows, sums = [], Operands(None, None, None)
    flat = [None if u is None else u.reshape(-1) for u in upstream]
    with _as_they_are(operands.input):
        wide = Operands(*(None if x is None else x.to(dtype) for x in operands))
        for at, part, some, _ in chunks(wide, plan, Operands(None, None, None)):
            given = [None if u is None else u[at] for u in flat]
            g = formulas.stats_gradient(logits(some), part, *given)
            found = _in_operands(g, some, wanted, part)
            in_rows.append(found.input)
            sums = Operands(None, _sum(sums.weight, found.weight), _sum(sums.bias, found.bias))
    in_x = torch.cat(in_rows).reshape(operands.input.shape) if wanted[0] else None
    found = Operands(in_x, sums.weight, sums.bias)
    return Operands(
        *(x if x is None else x.to(y.dtype) for x, y in zip(found, operands, strict=True))
    )


def logits_as_they_are(operands: Operands) -> Tensor:
    """Return the logits of every row."""
    with _as_they_are(operands.input):
        return logits(operands)


# Parts --------------------------------------------------------------------------------------------


def logits(operands: Operands) -> Tensor:
    """Return z = x Wᵀ + b, on the CPU in float32 or float64."""
    return functional.linear(*(None if x is None else _computed(x) for x in operands))


def chunks(
    operands: Operands, plan: Plan, vectors: Operands
) -> Iterator[tuple[slice, Plan, Operands, Operands]]:
    """Cut rows so that the workspace holds what the formulas make of a chunk's logits."""
    n_features, n_classes = operands.input.shape[-1], operands.weight.shape[0]
    n_rows = math.prod(plan.rows_shape)
    x = operands.input.reshape(n_rows, n_features)
    along_x = vectors.input
    if along_x is not None:
        along_x = along_x.reshape(n_rows, n_features)
    size = COMPUTE_DTYPE[x.dtype].itemsize
    n = max(1, workspace_bytes("linear_cross_entropy", None) // (_ARRAYS * n_classes * size))
    for i in range(0, max(1, n_rows), n):
        at = slice(i, i + n)
        part = _part(plan, at, len(range(n_rows)[at]))
        directions = None if along_x is None else _kept_features(along_x[at], part)
        features = _kept_features(x[at], part)
        yield (
            at,
            part,
            Operands(features, *operands[1:]),
            Operands(directions, *vectors[1:]),
        )


def _part(plan: Plan, at: slice, n: int) -> Plan:
    """Return the plan of `n` rows; their weights stay as they are divided."""
    return replace(
        plan,
        axis=1,
        rows_shape=(n,),
        target=plan.target[at],
        target_prob=None if plan.target_prob is None else plan.target_prob[at],
        kept=plan.kept[at],
        bad=None if plan.bad is None else plan.bad[at],
        r=plan.r[at],
    )


def _kept(operands: Operands, plan: Plan) -> Operands:
    return Operands(_kept_features(operands.input, plan), *operands[1:])


def _kept_features(x: Tensor, plan: Plan) -> Tensor:
    kept = plan.kept.reshape(*plan.rows_shape, 1)
    return torch.where(kept, x, torch.zeros((), dtype=x.dtype, device=x.device))


def _along(operands: Operands, vectors: Operands) -> Tensor:
    """Return z' = x' Wᵀ + x W'ᵀ + b'."""
    x, w, _ = operands
    found = None
    if vectors.input is not None:
        found = logits(Operands(vectors.input, w, None))
    if vectors.weight is not None:
        found = _sum(found, logits(Operands(x, vectors.weight, None)))
    if vectors.bias is not None:
        bias = _computed(vectors.bias)
        found = bias.expand(*x.shape[:-1], -1) if found is None else found + bias
    assert found is not None
    return found


def _in_operands(g: Tensor, operands: Operands, wanted: tuple[bool, ...], plan: Plan) -> Operands:
    """G W, gᵀ x and Σ g, each in its operand's dtype, as far as they are `wanted`."""
    x, w, _ = operands
    like = x if x is not None else w
    rows = g.reshape(-1, g.shape[-1])
    in_x = in_w = in_b = None
    if wanted[0]:
        in_x = _kept_features((g @ _computed(w)).to(like.dtype), plan)
    if wanted[1]:
        features = _computed(x).reshape(rows.shape[0], x.shape[-1])
        in_w = (rows.mT @ features).to(like.dtype)
    if wanted[2]:
        in_b = rows.sum(dim=0).to(like.dtype)
    return Operands(in_x, in_w, in_b)


def _computed(x: Tensor) -> Tensor:
    return x.to(COMPUTE_DTYPE[x.dtype]) if x.is_cpu else x


def _sum(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a + b


def _as_they_are(x: Tensor) -> AbstractContextManager[Any]:
    """Keep autocast from casting what is multiplied here."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
