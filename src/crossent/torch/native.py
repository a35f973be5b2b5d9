"""The native kernels under PyTorch's autograd: eager calls on CPU tensors.

Design:
  a. The forward pass of a mean or a sum makes the gradient too, as if the upstream gradient were 1,
     which `loss.backward()` makes it: the logits are read once. The first backward gives that
     gradient away; another upstream gradient, or a second backward, computes it again, so that
     nothing anyone does to a returned gradient is seen by the next, and an upstream gradient
     multiplies before anything is rounded. Whoever scales the loss (a gradient scaler, accumulation
     over micro-batches) does so at every step: after an upstream gradient that is not 1 the forward
     pass makes none, until one is 1 again. This changes what is computed when, not what comes out.
  b. Gradient's own backward is the native Hessian-vector product. What asks for more (a third
     derivative, a backward under vmap or forward mode) is answered by `formulas.py`.
  c. `save_for_backward` holds logits and target, so that PyTorch notices when they were changed in
     place, and hooks on saved tensors (checkpointing, offloading) have their way.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crossent.call import Call
from crossent.options import Options
from crossent.rows import RowPlan
from crossent.torch import formulas
from crossent.torch.tensors import (
    COMPUTE_DTYPE,
    as_array,
    as_numbers,
    call_of,
    is_batched,
    new_like,
    untransformed,
)


def planned(where: str, input: Tensor, target: Tensor, options: Options, dim: int) -> Any:
    """Return the call of the kernels and its plan."""
    call = call_of(where, input, dim)
    if options.weight is not None:
        options.weight = as_numbers(options.weight)
    if options.sample_weight is not None:
        options.sample_weight = as_numbers(options.sample_weight)
    if options.target_prob is not None:
        options.target_prob = as_numbers(options.target_prob)
    return call, call.plan(as_numbers(target), options)


def check(where: str, input: Tensor, target: Tensor, options: Options, dim: int) -> None:
    """Raise for whatever the numbers in the arguments make wrong."""
    planned(where, input, target, replace(options), dim)


def cross_entropy(where: str, input: Tensor, target: Tensor, options: Options, dim: int) -> Tensor:
    """Return the loss of CPU tensors, with a graph where `input` requires a gradient."""
    call, plan = planned(where, input, target, options, dim)
    if input.requires_grad and torch.is_grad_enabled():
        return Loss.apply(input, target, call, plan)
    return loss_alone(input, call, plan)


def loss_alone(input: Tensor, call: Call, plan: RowPlan) -> Tensor:
    """Return the loss without a graph."""
    found = call.backend.cross_entropy(call.view, call.viewed(plan), None, None)
    return as_loss(found, plan, input.dtype)


def gradient(
    where: str, input: Tensor, target: Tensor, plan: RowPlan, grad_output: Tensor
) -> Tensor:
    """Return the loss's gradient in `input` times the upstream gradient, without a graph."""
    call, plan = _again(where, input, target, plan)
    result, out = new_like(input, call)
    upstream = _upstream(call, plan, grad_output)
    call.backend.cross_entropy(call.view, call.viewed(plan), upstream, out)
    return result


def hvp(
    where: str, input: Tensor, target: Tensor, plan: RowPlan, grad_output: Tensor, vector: Tensor
) -> Tensor:
    """Return the loss's Hessian in `input` times `vector` and the upstream gradient."""
    call, plan = _again(where, input, target, plan)
    result, out = new_like(input, call)
    upstream = _upstream(call, plan, grad_output)
    along = call.seen(as_array(vector))
    call.backend.hvp(call.view, call.viewed(plan), upstream, along, out)
    return result


def along_gradient(
    where: str, input: Tensor, target: Tensor, plan: RowPlan, vector: Tensor
) -> Tensor:
    """Return Σ ∂loss/∂input · `vector`, of the loss's shape: what the upstream gradient gets."""
    dtype = COMPUTE_DTYPE[input.dtype]
    one = torch.ones((), dtype=dtype, device="cpu")
    slope = gradient(where, input.to(dtype), target, plan, one)
    product = slope.mul_(vector)
    return product.sum(dim=plan.axis) if plan.reduction == "none" else product.sum()


class Loss(torch.autograd.Function):
    """The loss; differentiable in the logits."""

    upstream_was_one = True

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, call: Call, plan: RowPlan) -> Tensor:
        ctx.ready = out = None
        if Loss.upstream_was_one and plan.reduction != "none" and not saving_is_watched():
            ctx.ready, out = new_like(input, call)
        found = call.backend.cross_entropy(call.view, call.viewed(plan), None, out)
        ctx.save_for_backward(input, target)
        ctx.where, ctx.plan = call.where, without_distribution(plan)
        return as_loss(found, plan, input.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        input, target = ctx.saved_tensors
        ready, ctx.ready = ctx.ready, None
        if not untransformed() or is_batched(grad_output):
            plan = formulas.plan_of(ctx.plan, target, input)
            return formulas.gradient(input, plan, grad_output), None, None, None
        if torch.is_grad_enabled():
            found = Gradient.apply(input, grad_output, target, ctx.where, ctx.plan)
            return found, None, None, None
        if ctx.plan.reduction != "none":
            Loss.upstream_was_one = grad_output.item() == 1.0
            if ready is not None and Loss.upstream_was_one:
                return ready, None, None, None
        found = gradient(ctx.where, input, target, ctx.plan, grad_output)
        return found, None, None, None


class Gradient(torch.autograd.Function):
    """The loss's gradient in the logits; differentiable in these and in the upstream gradient."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, grad_output: Tensor, target: Tensor, where: str, plan: RowPlan
    ) -> Tensor:
        ctx.save_for_backward(input, grad_output, target)
        ctx.where, ctx.plan = where, plan
        return gradient(where, input, target, plan, grad_output)

    @staticmethod
    def backward(ctx: Any, vector: Tensor) -> Any:
        input, grad_output, target = ctx.saved_tensors
        for_input, for_upstream, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled() or not untransformed() or is_batched(vector):
            plan = formulas.plan_of(ctx.plan, target, input)
            along = formulas.along_gradient(input, plan, vector) if for_upstream else None
            found = formulas.hvp(input, plan, grad_output, vector) if for_input else None
            return found, along, None, None, None
        given = ctx.where, input, target, ctx.plan
        found = hvp(*given, grad_output, vector) if for_input else None
        along = along_gradient(*given, vector) if for_upstream else None
        return found, along, None, None, None


def as_loss(found: Any, plan: RowPlan, dtype: torch.dtype) -> Tensor:
    """Return what a kernel found, the rows' losses or their sum, as the loss of such logits."""
    dtype = COMPUTE_DTYPE[dtype]
    if isinstance(found, float):
        return torch.scalar_tensor(found, dtype=dtype, device="cpu")
    return torch.from_numpy(found).to(dtype).reshape(plan.rows_shape)


def _upstream(call: Call, plan: RowPlan, grad_output: Tensor) -> Any:
    if grad_output.dim() == 0:
        return grad_output.item()
    return call.upstream(plan, as_array(grad_output))


def saving_is_watched() -> bool:
    """Tell whether hooks on saved tensors stand: what is kept beside them would defeat them."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def without_distribution(plan: RowPlan) -> RowPlan:
    """Return the plan without an array of the logits' size: the saved target brings it back."""
    if plan.kind != "distribution":
        return plan
    return replace(plan, target=np.empty(0, plan.target.dtype))


def _again(where: str, input: Tensor, target: Tensor, plan: RowPlan) -> tuple[Call, RowPlan]:
    if plan.kind == "distribution":
        plan = replace(plan, target=as_numbers(target))
    return call_of(where, input, plan.axis), plan
