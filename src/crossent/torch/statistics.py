"""Row statistics by the native kernel, differentiable in the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crossent import options as errors
from crossent.call import Call
from crossent.options import Options
from crossent.rows import RowPlan
from crossent.torch import formulas, native
from crossent.torch.tensors import COMPUTE_DTYPE, RowStats


def stats(
    where: str, input: Tensor, target: Tensor, options: Options, dim: int, *, with_target: bool
) -> RowStats:
    """Return the statistics of CPU tensors, with a graph where `input` requires a gradient."""
    call, plan = native.planned(where, input, target, options, dim)
    if plan.kind != "index":
        raise errors.bad_target_dtype_for_stats(where, target.dtype)
    if input.requires_grad and torch.is_grad_enabled():
        found = Stats.apply(input, target, call, plan)
    else:
        found = _found(input, call, plan)
    lse, logprob, entropy, argmax, rank = found
    return RowStats(
        lse, logprob if with_target else None, entropy, argmax, rank if with_target else None
    )


class Stats(torch.autograd.Function):
    """The five statistics; the backward pass is plain operations, which go on from there."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, call: Call, plan: RowPlan
    ) -> tuple[Tensor, ...]:
        found = _found(input, call, plan)
        ctx.save_for_backward(input, target)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*found[3:])
        return found

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        input, target = ctx.saved_tensors
        plan = formulas.plan_of(ctx.plan, target, input)
        found = formulas.stats_gradient(input, plan, *grad_outputs[:3])
        return found, None, None, None


def _found(input: Tensor, call: Call, plan: RowPlan) -> tuple[Tensor, ...]:
    found = [torch.from_numpy(a) for a in call.backend.stats(call.view, call.viewed(plan))]
    found[:3] = [a.to(COMPUTE_DTYPE[input.dtype]) for a in found[:3]]
    return tuple(a.reshape(plan.rows_shape) for a in found)
