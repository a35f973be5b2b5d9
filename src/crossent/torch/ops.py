"""The native loss as PyTorch operators, for the graphs of `torch.compile` and `torch.export`.

    crossent::cross_entropy, crossent::cross_entropy_grad, crossent::cross_entropy_hvp

Design: an operator takes what the user gave, not a plan, since a plan depends on numbers that a
compiler does not have. It is lowered when the operator runs, and bad targets raise there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crossent.options import Options
from crossent.torch import formulas, native
from crossent.torch.tensors import COMPUTE_DTYPE

WHERE = "cross_entropy"
_OPTIONS = (
    "Tensor? weight, Tensor? sample_weight, Tensor? target_prob, int ignore_index, "
    "float label_smoothing, float z_loss, float logit_scale, float? softcap, str reduction, "
    "float? divisor, int dim"
)
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library = torch.library.Library("crossent", "FRAGMENT")
_library.define(f"cross_entropy(Tensor input, Tensor target, {_OPTIONS}) -> Tensor", tags=_TAGS)
_library.define(
    f"cross_entropy_grad(Tensor input, Tensor grad_output, Tensor target, {_OPTIONS}) -> Tensor",
    tags=_TAGS,
)
_library.define(
    "cross_entropy_hvp(Tensor input, Tensor grad_output, Tensor vector, Tensor target, "
    f"{_OPTIONS}) -> (Tensor, Tensor)",
    tags=_TAGS,
)
_ops = torch.ops.crossent


def cross_entropy(input: Tensor, target: Tensor, options: Options, dim: int) -> Tensor:
    """Return the loss by the operator, into whose graph this puts it."""
    found: Tensor = _ops.cross_entropy.default(
        input,
        target,
        options.weight,
        options.sample_weight,
        options.target_prob,
        options.ignore_index,
        options.label_smoothing,
        options.z_loss,
        options.logit_scale,
        options.softcap,
        options.reduction,
        options.divisor,
        dim,
    )
    return found


def _options(given: tuple[Any, ...]) -> Options:
    weight, sample_weight, target_prob, ignore, smoothing, z_loss, scale, cap, *rest = given
    reduction, divisor, _ = rest
    return Options(
        weight,
        sample_weight,
        ignore,
        smoothing,
        z_loss,
        scale,
        cap,
        reduction,
        divisor,
        target_prob,
    )


def _planned(input: Tensor, target: Tensor, given: tuple[Any, ...]) -> Any:
    return native.planned(WHERE, input, target, _options(given), given[-1])


def _cross_entropy(input: Tensor, target: Tensor, *given: Any) -> Tensor:
    return native.loss_alone(input, *_planned(input, target, given))


def _grad(input: Tensor, grad_output: Tensor, target: Tensor, *given: Any) -> Tensor:
    _, plan = _planned(input, target, given)
    return native.gradient(WHERE, input, target, plan, grad_output)


def _hvp(
    input: Tensor, grad_output: Tensor, vector: Tensor, target: Tensor, *given: Any
) -> tuple[Tensor, Tensor]:
    _, plan = _planned(input, target, given)
    found = native.hvp(WHERE, input, target, plan, grad_output, vector)
    return found, native.along_gradient(WHERE, input, target, plan, vector)


def _fake_loss(input: Tensor, target: Tensor, *given: Any) -> Tensor:
    *_, reduction, _, dim = given
    rows = input.shape[:dim] + input.shape[dim + 1 :]
    return input.new_empty(rows if reduction == "none" else (), dtype=COMPUTE_DTYPE[input.dtype])


def _like(input: Tensor) -> Tensor:
    """Allocate as `native` does: in the order of channels-last logits, else in C order."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(input.dim())
    if last is not None and input.is_contiguous(memory_format=last):
        return torch.empty_like(input, memory_format=last)
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _fake_grad(input: Tensor, grad_output: Tensor, target: Tensor, *given: Any) -> Tensor:
    return _like(input)


def _fake_hvp(
    input: Tensor, grad_output: Tensor, vector: Tensor, target: Tensor, *given: Any
) -> tuple[Tensor, Tensor]:
    return _like(input), torch.empty_like(grad_output)


# Elsewhere, where an exported graph may be taken: plain operations of the same meaning.


def _plan(input: Tensor, target: Tensor, given: tuple[Any, ...]) -> formulas.Plan:
    shape = tuple(input.shape)
    return formulas.lower(WHERE, shape, target, _options(given), given[-1], input.dtype)


def _loss_elsewhere(input: Tensor, target: Tensor, *given: Any) -> Tensor:
    return formulas.loss(input, _plan(input, target, given))


def _grad_elsewhere(input: Tensor, grad_output: Tensor, target: Tensor, *given: Any) -> Tensor:
    found = formulas.gradient(input, _plan(input, target, given), grad_output)
    return _like(input).copy_(found)


def _hvp_elsewhere(
    input: Tensor, grad_output: Tensor, vector: Tensor, target: Tensor, *given: Any
) -> tuple[Tensor, Tensor]:
    plan = _plan(input, target, given)
    found = formulas.hvp(input, plan, grad_output, vector)
    return _like(input).copy_(found), formulas.along_gradient(input, plan, vector)


for _name, _here, _elsewhere in (
    ("cross_entropy", _cross_entropy, _loss_elsewhere),
    ("cross_entropy_grad", _grad, _grad_elsewhere),
    ("cross_entropy_hvp", _hvp, _hvp_elsewhere),
):
    _library.impl(_name, _here, "CPU")
    _library.impl(_name, _elsewhere, "CompositeExplicitAutograd")
torch.library.register_fake("crossent::cross_entropy", _fake_loss, lib=_library)
torch.library.register_fake("crossent::cross_entropy_grad", _fake_grad, lib=_library)
torch.library.register_fake("crossent::cross_entropy_hvp", _fake_hvp, lib=_library)


# Derivatives --------------------------------------------------------------------------------------


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])  # the tensors stand first
    ctx.rest = inputs[5:]


def _loss_backward(ctx: Any, grad_output: Tensor) -> Any:
    input, target, *tensors = ctx.saved_tensors
    given = (*tensors, *ctx.rest)
    _only_the_logits(ctx, (0,))
    found = _ops.cross_entropy_grad.default(input, grad_output, target, *given)
    return found, *(None,) * (1 + len(given))


def _save_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.rest = inputs[6:]


def _grad_backward(ctx: Any, vector: Tensor) -> Any:
    input, grad_output, target, *tensors = ctx.saved_tensors
    given = (*tensors, *ctx.rest)
    _only_the_logits(ctx, (0, 1))
    found, along = _ops.cross_entropy_hvp.default(input, grad_output, vector, target, *given)
    return found, along, *(None,) * (1 + len(given))


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _hvp_backward(ctx: Any, *grad_outputs: Tensor) -> Any:
    raise NotImplementedError(
        f"{WHERE}: no third derivative passes through the operator of a compiled graph; "
        "call crossent.torch.cross_entropy eagerly"
    )


def _only_the_logits(ctx: Any, served: tuple[int, ...]) -> None:
    if any(ctx.needs_input_grad[len(served) :]):
        raise NotImplementedError(
            f"{WHERE}: the operator of a compiled graph has a gradient in the logits alone; "
            "call crossent.torch.cross_entropy, which chooses another way for the others"
        )


torch.library.register_autograd(
    "crossent::cross_entropy", _loss_backward, setup_context=_save_loss, lib=_library
)
torch.library.register_autograd(
    "crossent::cross_entropy_grad", _grad_backward, setup_context=_save_grad, lib=_library
)
torch.library.register_autograd(
    "crossent::cross_entropy_hvp", _hvp_backward, setup_context=_save_nothing, lib=_library
)
