"""The fused head under PyTorch's autograd: eager calls on CPU tensors.

Design:
  a. The forward pass of a mean or a sum makes the gradients too, of what requires one, for the
     upstream gradient that is expected: the logits are computed once and held nowhere. The first
     backward gives them away if it came so; otherwise, and in a second backward, they are computed
     again for what came, since to multiply what is rounded would round twice. This changes what is
     computed when, not what comes out. `Expected` says what is expected.
  b. Gradient's own backward is the head's Hessian-vector product. What asks for more (a third
     derivative, a backward under vmap or forward mode) is answered by `linear_formulas.py`.
  c. `save_for_backward` holds operands and target, so that PyTorch notices when they were changed
     in place, and hooks on saved tensors (checkpointing, offloading) have their way.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crossent import rows
from crossent.head import Head, LinearGrad
from crossent.options import Options
from crossent.rows import RowPlan
from crossent.torch import formulas, linear_formulas
from crossent.torch.linear_formulas import Operands
from crossent.torch.native import as_loss, saving_is_watched, without_distribution
from crossent.torch.tensors import (
    COMPUTE_DTYPE,
    NUMPY_DTYPE,
    RowStats,
    as_array,
    as_numbers,
    as_tensor,
    is_batched,
    untransformed,
)


class Expected:
    """The upstream gradient that a loss will probably get: the one that the last loss got.

    Whoever scales the loss by a constant has its gradients computed twice in the first step and
    once from then on. After two surprises in a row nothing is to be made ahead, until the same
    upstream gradient came twice in a row.
    """

    def __init__(self) -> None:
        self._last, self._surprises = 1.0, 0

    def upstream(self) -> float | None:
        """Return what to expect; None: nothing, or what the loss's last bit might show.

        (Rows of an extreme upstream gradient are served by another kernel.)
        """
        plain = 2.0**-18 <= abs(self._last) <= 2.0**24
        return self._last if plain and self._surprises < 2 else None

    def came(self, upstream: float) -> None:
        """Learn what came."""
        self._surprises = 0 if same(upstream, self._last) else self._surprises + 1
        self._last = upstream


EXPECTED = Expected()


def same(a: float, b: float | None) -> bool:
    """Tell whether two numbers have the same bits; NaN is like nothing."""
    return b is not None and a == b and math.copysign(1.0, a) == math.copysign(1.0, b)


def planned(
    where: str, operands: Operands, target: Tensor, options: Options, shape: Any = None
) -> RowPlan:
    """Return the plan of the logits, whose class axis is the last one unless `shape` is given."""
    numbers = replace(
        options,
        weight=as_numbers(options.weight),
        sample_weight=as_numbers(options.sample_weight),
        target_prob=as_numbers(options.target_prob),
    )
    x, w, _ = operands
    axis = 1
    if shape is None:
        shape, axis = (*x.shape[:-1], w.shape[0]), x.dim() - 1
    dtype = NUMPY_DTYPE[COMPUTE_DTYPE[x.dtype]]
    return rows.lower(where, tuple(shape), axis, dtype, as_numbers(target), numbers, "logits")


def loss(where: str, operands: Operands, target: Tensor, options: Options) -> Tensor:
    """Return the loss of CPU tensors, with a graph where one of the operands requires it."""
    plan = planned(where, operands, target, options)
    needed = any(x is not None and x.requires_grad for x in operands)
    if needed and torch.is_grad_enabled():
        return Loss.apply(*operands, target, where, plan)
    return loss_alone(where, operands, plan)


def loss_alone(where: str, operands: Operands, plan: RowPlan) -> Tensor:
    """Return the loss without a graph."""
    return as_loss(_head(where, operands, plan).loss(), plan, operands.input.dtype)


def gradients(
    where: str,
    operands: Operands,
    target: Tensor,
    plan: RowPlan,
    grad_output: Tensor,
    wanted: tuple[bool, bool, bool],
) -> Operands:
    """Return the gradients that are wanted, times the upstream gradient, without a graph."""
    head = _head(where, operands, _whole(plan, target))
    _, found = head.value_and_grad(_upstream(grad_output), wanted)
    return _as_tensors(found, operands)


def hvp(
    where: str,
    operands: Operands,
    target: Tensor,
    plan: RowPlan,
    grad_output: Tensor,
    vectors: Operands,
    wanted: tuple[bool, ...],
) -> Operands:
    """Return the Hessian times `vectors` (None: 0) and the upstream gradient, where wanted."""
    along = LinearGrad(
        *(
            _direction(vector, x, want)
            for vector, x, want in zip(vectors, operands, wanted, strict=True)
        )
    )
    head = _head(where, operands, _whole(plan, target))
    found = _as_tensors(head.hvp(_upstream(grad_output), along), operands)
    return Operands(*(x if want else None for x, want in zip(found, wanted, strict=True)))


def along_gradient(operands: Operands, target: Tensor, plan: RowPlan, vectors: Operands) -> Tensor:
    """Return Σ ∂loss/∂operands · `vectors`, of the loss's shape: its derivative in u."""
    tensors = formulas.plan_of(plan, target, operands.input)
    return linear_formulas.along_gradient(operands, tensors, vectors)


class Loss(torch.autograd.Function):
    """The loss; differentiable in the operands."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        where: str,
        plan: RowPlan,
    ) -> Tensor:
        operands = Operands(input, weight, bias)
        ctx.ready = ctx.expected = None
        if plan.reduction != "none" and not saving_is_watched():
            ctx.expected = EXPECTED.upstream()
        head = _head(where, operands, plan)
        if ctx.expected is None:
            found = head.loss()
        else:
            found, ready = head.value_and_grad(ctx.expected, ctx.needs_input_grad[:3])
            ctx.ready = _as_tensors(ready, operands)
        ctx.save_for_backward(input, weight, bias, target)
        ctx.where, ctx.plan = where, without_distribution(plan)
        return as_loss(found, plan, input.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        *saved, target = ctx.saved_tensors
        operands, wanted = Operands(*saved), ctx.needs_input_grad[:3]
        ready, ctx.ready = ctx.ready, None
        if not untransformed() or is_batched(grad_output):
            plan = formulas.plan_of(ctx.plan, target, operands.input)
            found = linear_formulas.gradients(operands, plan, grad_output, wanted)
            return *found, None, None, None
        if torch.is_grad_enabled():
            given = grad_output, target, ctx.where, ctx.plan, wanted
            return *Gradient.apply(*operands, *given), None, None, None
        if ctx.plan.reduction != "none":
            came = grad_output.item()
            EXPECTED.came(came)
            if ready is not None and same(came, ctx.expected):
                return *ready, None, None, None
        found = gradients(ctx.where, operands, target, ctx.plan, grad_output, wanted)
        return *found, None, None, None


class Gradient(torch.autograd.Function):
    """The loss's gradients; differentiable in the operands and in the upstream gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        grad_output: Tensor,
        target: Tensor,
        where: str,
        plan: RowPlan,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, bias, grad_output, target)
        ctx.where, ctx.plan = where, plan
        operands = Operands(input, weight, bias)
        return tuple(gradients(where, operands, target, plan, grad_output, wanted))

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> Any:
        *saved, grad_output, target = ctx.saved_tensors
        operands, vectors = Operands(*saved), Operands(*given)
        wanted, for_upstream = ctx.needs_input_grad[:3], ctx.needs_input_grad[3]
        there = [x for x in vectors if x is not None]
        found, along = Operands(None, None, None), None
        if not there:
            pass
        elif torch.is_grad_enabled() or not untransformed() or any(map(is_batched, there)):
            plan = formulas.plan_of(ctx.plan, target, operands.input)
            if any(wanted):
                found = linear_formulas.hvp(operands, plan, grad_output, vectors, wanted)
            if for_upstream:
                along = linear_formulas.along_gradient(operands, plan, vectors)
        else:
            if any(wanted):
                args = ctx.where, operands, target, ctx.plan, grad_output, vectors, wanted
                found = hvp(*args)
            if for_upstream:
                along = along_gradient(operands, target, ctx.plan, vectors)
        return *found, along, None, None, None, None


# Statistics ---------------------------------------------------------------------------------------


def stats(
    where: str, operands: Operands, target: Tensor, options: Options, *, with_target: bool
) -> RowStats:
    """Return the statistics of CPU tensors, with a graph where one of the operands requires it."""
    plan = planned(where, operands, target, options)
    needed = any(x is not None and x.requires_grad for x in operands)
    if needed and torch.is_grad_enabled():
        found = Stats.apply(*operands, target, where, plan)
    else:
        found = _stats(where, operands, plan)
    lse, logprob, entropy, argmax, rank = found
    return RowStats(
        lse, logprob if with_target else None, entropy, argmax, rank if with_target else None
    )


class Stats(torch.autograd.Function):
    """The five statistics; the backward pass is plain operations, which go on from there."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        where: str,
        plan: RowPlan,
    ) -> tuple[Tensor, ...]:
        found = _stats(where, Operands(input, weight, bias), plan)
        ctx.save_for_backward(input, weight, bias, target)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*found[3:])
        return found

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        *saved, target = ctx.saved_tensors
        plan = formulas.plan_of(ctx.plan, target, saved[0])
        wanted = ctx.needs_input_grad[:3]
        found = linear_formulas.stats_gradients(Operands(*saved), plan, grad_outputs[:3], wanted)
        return *found, None, None, None


def _stats(where: str, operands: Operands, plan: RowPlan) -> tuple[Tensor, ...]:
    found = [torch.from_numpy(a) for a in _head(where, operands, plan).stats()]
    found[:3] = [a.to(COMPUTE_DTYPE[operands.input.dtype]) for a in found[:3]]
    return tuple(a.reshape(plan.rows_shape) for a in found)


# Arrays -------------------------------------------------------------------------------------------


def _head(where: str, operands: Operands, plan: RowPlan) -> Head:
    x, w, b = (None if tensor is None else as_array(tensor) for tensor in operands)
    name = NUMPY_DTYPE[COMPUTE_DTYPE[operands.input.dtype]].name
    assert w is not None
    return Head(where, x, w, b, plan, name)


def _whole(plan: RowPlan, target: Tensor) -> RowPlan:
    """Return the plan with the distribution that `without_distribution` took away."""
    if plan.kind != "distribution":
        return plan
    return replace(plan, target=as_numbers(target))


def _upstream(grad_output: Tensor) -> Any:
    if grad_output.dim() == 0:
        return grad_output.item()
    return np.ascontiguousarray(as_array(grad_output), np.float64).reshape(-1)


def _direction(vector: Tensor | None, like: Tensor | None, wanted: bool) -> Any:
    """Return a direction as an array; zeros without memory where its answer is wanted alone."""
    if vector is None:
        if not wanted or like is None:
            return None
        vector = torch.zeros((), dtype=like.dtype, device="cpu").expand(like.shape)
    return as_array(vector)


def _as_tensors(found: LinearGrad, operands: Operands) -> Operands:
    """Return gradients as tensors of their operands' shapes."""
    return Operands(
        *(
            None if a is None or x is None else as_tensor(a, x.dtype).reshape(x.shape)
            for a, x in zip(found, operands, strict=True)
        )
    )
