"""The fused head as PyTorch operators, for the graphs of `torch.compile` and `torch.export`.

    crossent::linear_cross_entropy, crossent::linear_cross_entropy_grad,
    crossent::linear_cross_entropy_hvp

Design:
  a. As in `ops.py` an operator takes what the user gave and is lowered when it runs.
  b. An operator returns tensors, and no fewer at one time than at another: in the place of a
     gradient that nobody wants stands a tensor without an entry, which costs nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crossent.options import Options
from crossent.torch import formulas, linear_formulas, linear_native
from crossent.torch.linear_formulas import Operands
from crossent.torch.tensors import COMPUTE_DTYPE

WHERE = "linear_cross_entropy"
_OPERANDS = "Tensor input, Tensor linear_weight, Tensor? linear_bias"
_OPTIONS = (
    "Tensor target, Tensor? weight, Tensor? sample_weight, Tensor? target_prob, int ignore_index, "
    "float label_smoothing, float z_loss, float logit_scale, float? softcap, str reduction, "
    "float? divisor"
)
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library = torch.library.Library("crossent", "FRAGMENT")
_library.define(f"linear_cross_entropy({_OPERANDS}, {_OPTIONS}) -> Tensor", tags=_TAGS)
_library.define(
    f"linear_cross_entropy_grad({_OPERANDS}, Tensor grad_output, {_OPTIONS}, bool for_input, "
    "bool for_weight, bool for_bias) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_library.define(
    f"linear_cross_entropy_hvp({_OPERANDS}, Tensor grad_output, Tensor? along_input, "
    f"Tensor? along_weight, Tensor? along_bias, {_OPTIONS}, bool for_input, bool for_weight, "
    "bool for_bias, bool for_upstream) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_ops = torch.ops.crossent
_N_OPTIONS = 11  # from target to divisor
_FOUR = 4  # of them tensors


def linear_cross_entropy(operands: Operands, target: Tensor, options: Options) -> Tensor:
    """Return the loss by the operator, into whose graph this puts it."""
    found: Tensor = _ops.linear_cross_entropy.default(
        *operands,
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
    )
    return found


def _options(given: tuple[Any, ...]) -> Options:
    _, weight, sample_weight, target_prob, *scalars = given[:_N_OPTIONS]
    ignore, smoothing, z_loss, scale, cap, reduction, divisor = scalars
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


def _planned(operands: Operands, given: tuple[Any, ...]) -> Any:
    return linear_native.planned(WHERE, operands, given[0], _options(given))


def _there(operands: Operands, found: Operands) -> tuple[Tensor, ...]:
    """Put a tensor without an entry in the place of what is not there."""
    return tuple(operands.input.new_empty(0) if x is None else x for x in found)


def _loss(x: Tensor, w: Tensor, b: Tensor | None, *given: Any) -> Tensor:
    operands = Operands(x, w, b)
    return linear_native.loss_alone(WHERE, operands, _planned(operands, given))


def _grad(
    x: Tensor, w: Tensor, b: Tensor | None, grad_output: Tensor, *given: Any
) -> tuple[Tensor, ...]:
    operands, plan = Operands(x, w, b), _planned(Operands(x, w, b), given)
    wanted = given[_N_OPTIONS:]
    found = linear_native.gradients(WHERE, operands, given[0], plan, grad_output, wanted)
    return _there(operands, found)


def _hvp(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    grad_output: Tensor,
    along_x: Tensor | None,
    along_w: Tensor | None,
    along_b: Tensor | None,
    *given: Any,
) -> tuple[Tensor, ...]:
    operands, vectors = Operands(x, w, b), Operands(along_x, along_w, along_b)
    target, plan = given[0], _planned(operands, given)
    *wanted, for_upstream = given[_N_OPTIONS:]
    found = linear_native.hvp(WHERE, operands, target, plan, grad_output, vectors, tuple(wanted))
    along = x.new_empty(0)
    if for_upstream:
        along = linear_native.along_gradient(operands, target, plan, vectors)
    return *_there(operands, found), along


def _fake_loss(x: Tensor, w: Tensor, b: Tensor | None, *given: Any) -> Tensor:
    rows = x.shape[:-1] if given[_N_OPTIONS - 2] == "none" else ()
    return x.new_empty(rows, dtype=COMPUTE_DTYPE[x.dtype])


def _fake_grad(
    x: Tensor, w: Tensor, b: Tensor | None, grad_output: Tensor, *given: Any
) -> tuple[Tensor, ...]:
    wanted = given[_N_OPTIONS:]
    operands = Operands(x, w, b)
    found = (
        y.new_empty(y.shape) if y is not None and want else None
        for y, want in zip(operands, wanted, strict=True)
    )
    return _there(operands, Operands(*found))


def _fake_hvp(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    grad_output: Tensor,
    along_x: Tensor | None,
    along_w: Tensor | None,
    along_b: Tensor | None,
    *given: Any,
) -> tuple[Tensor, ...]:
    found = _fake_grad(x, w, b, grad_output, *given[:-1])
    along = x.new_empty(0)
    if given[-1]:
        along = grad_output.new_empty(grad_output.shape)
    return *found, along


# Elsewhere, where an exported graph may be taken: plain operations of the same meaning.


def _plan(operands: Operands, given: tuple[Any, ...]) -> formulas.Plan:
    x, w, _ = operands
    shape = (*x.shape[:-1], w.shape[0])
    return formulas.lower(WHERE, shape, given[0], _options(given), x.dim() - 1, x.dtype, "logits")


def _loss_elsewhere(x: Tensor, w: Tensor, b: Tensor | None, *given: Any) -> Tensor:
    operands = Operands(x, w, b)
    return linear_formulas.loss(operands, _plan(operands, given))


def _grad_elsewhere(
    x: Tensor, w: Tensor, b: Tensor | None, grad_output: Tensor, *given: Any
) -> tuple[Tensor, ...]:
    operands, wanted = Operands(x, w, b), given[_N_OPTIONS:]
    plan = _plan(operands, given)
    found = linear_formulas.gradients(operands, plan, grad_output, wanted)
    return _in_order(operands, found)


def _hvp_elsewhere(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    grad_output: Tensor,
    along_x: Tensor | None,
    along_w: Tensor | None,
    along_b: Tensor | None,
    *given: Any,
) -> tuple[Tensor, ...]:
    operands, vectors = Operands(x, w, b), Operands(along_x, along_w, along_b)
    *wanted, for_upstream = given[_N_OPTIONS:]
    plan = _plan(operands, given)
    found = linear_formulas.hvp(operands, plan, grad_output, vectors, tuple(wanted))
    along = x.new_empty(0)
    if for_upstream:
        along = linear_formulas.along_gradient(operands, plan, vectors)
    return *_in_order(operands, found), along


def _in_order(operands: Operands, found: Operands) -> tuple[Tensor, ...]:
    """Return gradients in C order, as the kernels do."""
    return _there(operands, Operands(*(x if x is None else x.contiguous() for x in found)))


for _name, _here, _elsewhere, _fake in (
    ("linear_cross_entropy", _loss, _loss_elsewhere, _fake_loss),
    ("linear_cross_entropy_grad", _grad, _grad_elsewhere, _fake_grad),
    ("linear_cross_entropy_hvp", _hvp, _hvp_elsewhere, _fake_hvp),
):
    _library.impl(_name, _here, "CPU")
    _library.impl(_name, _elsewhere, "CompositeExplicitAutograd")
    torch.library.register_fake(f"crossent::{_name}", _fake, lib=_library)


# Derivatives --------------------------------------------------------------------------------------


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[: 3 + _FOUR])
    ctx.rest = inputs[3 + _FOUR :]


def _loss_backward(ctx: Any, grad_output: Tensor) -> Any:
    x, w, b, *tensors = ctx.saved_tensors
    _only_the_operands(ctx, 3)
    wanted = ctx.needs_input_grad[:3]
    given = (*tensors, *ctx.rest)
    found = _ops.linear_cross_entropy_grad.default(x, w, b, grad_output, *given, *wanted)
    return *_wanted(found, wanted), *(None,) * _N_OPTIONS


def _save_grad(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[: 4 + _FOUR])
    ctx.rest = inputs[4 + _FOUR :]


def _grad_backward(ctx: Any, *vectors: Tensor) -> Any:
    x, w, b, grad_output, *tensors = ctx.saved_tensors
    _only_the_operands(ctx, 4)
    options, made = ctx.rest[:-3], ctx.rest[-3:]
    along = _wanted(vectors, made)
    wanted = ctx.needs_input_grad[:4]
    given = (*along, *tensors, *options, *wanted)
    found = _ops.linear_cross_entropy_hvp.default(x, w, b, grad_output, *given)
    return *_wanted(found, wanted), *(None,) * (_N_OPTIONS + 3)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _hvp_backward(ctx: Any, *grad_outputs: Tensor) -> Any:
    raise NotImplementedError(
        f"{WHERE}: no third derivative passes through the operator of a compiled graph; "
        f"call crossent.torch.{WHERE} eagerly"
    )


def _wanted(found: Any, wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(x if want else None for x, want in zip(found, wanted, strict=True))


def _only_the_operands(ctx: Any, served: int) -> None:
    if any(ctx.needs_input_grad[served:]):
        raise NotImplementedError(
            f"{WHERE}: the operator of a compiled graph has gradients in input, linear_weight and "
            f"linear_bias alone; call crossent.torch.{WHERE}, which chooses another way for the "
            "others"
        )


for _name, _backward, _save in (
    ("linear_cross_entropy", _loss_backward, _save_loss),
    ("linear_cross_entropy_grad", _grad_backward, _save_grad),
    ("linear_cross_entropy_hvp", _hvp_backward, _save_nothing),
):
    torch.library.register_autograd(
        f"crossent::{_name}", _backward, setup_context=_save, lib=_library
    )
