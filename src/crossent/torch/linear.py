"""`linear_cross_entropy` with PyTorch's signature, and its statistics: which way a call goes.

linear_native     eager, CPU tensors in memory, derivatives in the operands: the fused head
linear_ops        the same under torch.compile and torch.export
linear_formulas   all else, the logits held: other devices, torch.func, forward mode, gradients of
                  targets and weights
and, where `linear_weight` has more axes than two, the logits by `linear` and the loss by
`functional.route`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from crossent import options as errors
from crossent.options import Options, Reduction
from crossent.torch import formulas, functional, linear_formulas, linear_native, linear_ops
from crossent.torch.linear_formulas import Operands
from crossent.torch.tensors import BACKENDS, RowStats, in_memory

if TYPE_CHECKING:
    from torch.nn import LinearCrossEntropyOptions


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    divisor: float | None = None,
    target_prob: Tensor | None = None,
) -> Tensor:
    """Return `cross_entropy` of the logits x Wᵀ + b, without holding them.

    Parameters
    ----------
    input : Tensor (…, D)
        Features x in float64, float32, float16 or bfloat16.
    linear_weight : Tensor (C, D) or (C, d1, …, D), of `input`'s dtype
        Weights W of C classes. With more axes than two `input` is (N, D) and the logits, which
        are held then, (N, C, d1, …).
    target : Tensor
        Class indices (any integer dtype, the rows' shape, (…) or (N, d1, …)), probabilities
        (floating, the logits' shape), or, with `target_prob`, class ids (K of them in the place of
        the classes).
    linear_bias : Tensor, the shape of `linear_weight` without D, optional
        b.
    weight, reduction, label_smoothing, sample_weight, z_loss, logit_scale, softcap, divisor, \
target_prob
        As for `cross_entropy`. Rows that are dropped (`ignore_index`, a row weight of 0) are not
        read, and cost nothing.
    ignore_index : int, optional
        Rows with this target index are dropped; None means -100.
    options : optional
        Has no effect: how PyTorch would cut its rows. Rows are cut here in any case.

    Returns
    -------
    Tensor
        0-d, or of the rows' shape with reduction="none"; float64 for float64 features, else
        float32. Differentiable any number of times in `input`, `linear_weight`, `linear_bias`, a
        probability `target`, `target_prob` and `sample_weight`; what requires no gradient costs
        nothing.

    Raises
    ------
    IndexError
        A target outside 0 … C − 1 that is not `ignore_index`. Where its value is not at hand (on
        other devices, under `torch.func` and forward mode) the row's loss is NaN instead.
    TypeError, ValueError
        Arguments that do not fit, or a `weight`, `divisor` or scale that requires a gradient.

    Notes
    -----
    Beside the gradients it uses a fixed workspace, 128 MB or ``CROSSENT_WORKSPACE_MB``.
    docs/torch.md says which calls hold the logits after all.

    Examples
    --------
    >>> import torch
    >>> from crossent.torch import linear_cross_entropy
    >>> hidden = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    >>> embedding = torch.tensor([[0.5, 0.0], [0.0, 0.5], [-0.5, -0.5]], requires_grad=True)
    >>> loss = linear_cross_entropy(hidden, embedding, torch.tensor([1, 0]))
    >>> loss.backward()
    >>> print(f"{loss.item():.4f}", embedding.grad[0])
    0.3603 tensor([-0.0883,  0.4485])
    """
    tensors = (input, linear_weight, target, linear_bias, weight, sample_weight, target_prob)
    if has_torch_function(tensors):
        return handle_torch_function(
            linear_cross_entropy,
            tensors,
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
            sample_weight=sample_weight,
            z_loss=z_loss,
            logit_scale=logit_scale,
            softcap=softcap,
            divisor=divisor,
            target_prob=target_prob,
        )
    where = "linear_cross_entropy"
    operands = _checked(where, input, linear_weight, linear_bias, target)
    asked = Options(
        weight,
        sample_weight,
        -100 if ignore_index is None else ignore_index,
        label_smoothing,
        z_loss,
        logit_scale,
        softcap,
        reduction,
        divisor,
        target_prob,
    )
    functional.check_options(where, input, asked)
    if linear_weight.dim() > 2:
        return _by_logits(where, operands, target, asked)
    operands_alone = not functional.others_need_gradients(target, asked)
    if torch.compiler.is_compiling():
        transformed = torch._C._are_functorch_transforms_active()
        if operands_alone and input.is_cpu and not transformed:
            return linear_ops.linear_cross_entropy(operands, target, asked)
    elif _at_hand(operands, target, asked):
        if operands_alone:
            return linear_native.loss(where, operands, target, asked)
        linear_native.planned(where, operands, target, asked)  # which raises for bad numbers
    return linear_formulas.loss(operands, _plan(where, operands, target, asked))


def linear_cross_entropy_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> RowStats:
    """Return what the softmax of x Wᵀ + b says of each row, without holding the logits.

    Parameters
    ----------
    input : Tensor (…, D)
        Features.
    linear_weight : Tensor (C, D), of `input`'s dtype
        Weights.
    target : Tensor of integers, the rows' shape, optional
        Class indices.
    linear_bias : Tensor (C,), optional
        Bias.
    sample_weight : Tensor, the rows' shape or broadcast to it, optional
        Rows of weight 0 are dropped; other weights have no effect.
    ignore_index, logit_scale, softcap
        As for `cross_entropy`.

    Returns
    -------
    RowStats
        As `cross_entropy_stats` returns it; ``logsumexp``, ``target_logprob`` and ``entropy`` are
        differentiable in `input`, `linear_weight` and `linear_bias`.

    Raises
    ------
    IndexError, TypeError, ValueError
        As `linear_cross_entropy`.

    Examples
    --------
    >>> import torch
    >>> from crossent.torch import linear_cross_entropy_stats
    >>> hidden, embedding = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.0], [0.0, 0.5]])
    >>> stats = linear_cross_entropy_stats(hidden, embedding, torch.tensor([0]))
    >>> stats.argmax.item(), stats.target_rank.item()
    (1, 1)
    """
    tensors = (input, linear_weight, target, linear_bias, sample_weight)
    if has_torch_function(tensors):
        return handle_torch_function(
            linear_cross_entropy_stats,
            tensors,
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            sample_weight=sample_weight,
            ignore_index=ignore_index,
            logit_scale=logit_scale,
            softcap=softcap,
        )
    where = "linear_cross_entropy_stats"
    operands = _checked(where, input, linear_weight, linear_bias, target, target_wanted=False)
    if linear_weight.dim() > 2:
        raise errors.bad_linear_weight(where, tuple(linear_weight.shape), input.shape[-1])
    # Without a target class 0 stands in, and what it gives is left out; weight 0 alone drops a row.
    given = target is not None
    if target is None:
        target = torch.zeros(input.shape[:-1], dtype=torch.int64, device=input.device)
    elif target.is_floating_point():
        raise errors.bad_target_dtype_for_stats(where, target.dtype)
    if sample_weight is not None and isinstance(sample_weight, Tensor):
        sample_weight = sample_weight.detach()  # whose values have no effect
    asked = Options(
        sample_weight=sample_weight,
        ignore_index=ignore_index if given else -100,
        logit_scale=logit_scale,
        softcap=softcap,
        reduction="none",
    )
    functional.check_options(where, input, asked)
    if not torch.compiler.is_compiling() and _at_hand(operands, target, asked):
        return linear_native.stats(where, operands, target, asked, with_target=given)
    plan = _plan(where, operands, target, asked)
    return linear_formulas.stats(operands, plan, with_target=given)


# Arguments ----------------------------------------------------------------------------------------


def _checked(
    where: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    target_wanted: bool = True,
) -> Operands:
    """Return the operands, cast where autocast would; raise for what is no head."""
    named = {"input": input, "linear_weight": weight}
    named |= {"linear_bias": bias} if bias is not None else {}
    named |= {"target": target} if target is not None or target_wanted else {}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise errors.not_a_tensor(where, name, value)
        if value.device != input.device:
            raise errors.other_device(where, name, value.device, input.device)
    if input.dim() == 0:
        raise errors.bad_features_ndim(where, 0, sparse=False)
    n_features, shape = input.shape[-1], tuple(weight.shape)
    if len(shape) < 2 or shape[-1] != n_features or shape[0] == 0:
        raise errors.bad_linear_weight(where, shape, n_features)
    if bias is not None and bias.shape != weight.shape[:-1]:
        expected = f"({shape[0]},), one for each class"
        if len(shape) > 2:
            expected = f"{shape[:-1]}, that of linear_weight without its features"
        raise errors.bad_shape(where, "linear_bias", expected, tuple(bias.shape))
    if len(shape) > 2 and input.dim() != 2:
        raise errors.more_than_rows(where, shape, tuple(input.shape))
    operands = _autocast(Operands(input, weight, bias))
    if operands.input.dtype not in BACKENDS:
        raise errors.bad_tensor_dtype(where, "input", operands.input.dtype)
    for name, value in zip(("linear_weight", "linear_bias"), operands[1:], strict=True):
        if value is not None and value.dtype != operands.input.dtype:
            raise errors.other_dtype(where, name, value.dtype, operands.input.dtype)
    return operands


def _autocast(operands: Operands) -> Operands:
    """Cast as `linear` does where autocast is on: all floating numbers but float64."""
    device = operands.input.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return operands
    dtype = torch.get_autocast_dtype(device)
    return Operands(*(_cast(x, dtype) for x in operands))


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if x is None or not x.is_floating_point() or x.dtype is torch.float64:
        return x
    return x.to(dtype)


def _at_hand(operands: Operands, target: Tensor, options: Options) -> bool:
    """Tell whether the kernels can read all that there is, in an eager call."""
    x, *others = operands
    return functional.numbers_at_hand(x, target, options) and all(map(in_memory, others))


def _plan(where: str, operands: Operands, target: Tensor, options: Options) -> formulas.Plan:
    x, w, _ = operands
    shape = (*x.shape[:-1], w.shape[0])
    return formulas.lower(where, shape, target, options, x.dim() - 1, x.dtype, "logits")


def _by_logits(where: str, operands: Operands, target: Tensor, options: Options) -> Any:
    """Return the loss where each class has several rows of weights, one for each place."""
    x, w, b = operands
    classes = w.shape[:-1]
    if not torch.compiler.is_compiling() and _at_hand(operands, target, options):
        shape = x.shape[0], *classes
        linear_native.planned(where, operands, target, options, shape)  # whose errors name logits
    flat = Operands(
        x,
        w.reshape(math.prod(classes), w.shape[-1]),
        None if b is None else b.reshape(math.prod(classes)),
    )
    logits = linear_formulas.logits_as_they_are(flat).reshape(x.shape[0], *classes)
    return functional.route(where, logits, target, options, 1)
