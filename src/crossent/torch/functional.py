"""`cross_entropy` and `cross_entropy_stats` with PyTorch's signatures: which way a call goes.

native      eager, CPU tensors in memory, derivatives in the logits: the kernels
ops         the same under torch.compile and torch.export
formulas    all else: other devices, torch.func, forward mode, gradients of targets and weights
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function

from crossent import options as errors
from crossent.options import Options, Reduction
from crossent.torch import formulas, native, ops, statistics
from crossent.torch.tensors import BACKENDS, RowStats, class_axis, in_memory, untransformed


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    *,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    divisor: float | None = None,
    target_prob: Tensor | None = None,
    dim: int | None = None,
) -> Tensor:
    """Return what `torch.nn.functional.cross_entropy` returns: right, and faster.

    Parameters
    ----------
    input : Tensor (C,), (N, C) or (N, C, d1, …)
        Logits z in float64, float32, float16 or bfloat16.
    target : Tensor
        Class indices (any integer dtype, `input`'s shape without the class axis), probabilities
        (floating, `input`'s shape), or, with `target_prob`, class ids (K of them a row on the class
        axis).
    weight : Tensor (C,), optional
        Class weights w.
    size_average, reduce : bool, optional
        Deprecated by PyTorch: use `reduction`.
    ignore_index : int
        Rows with this target index are dropped.
    reduction : {"mean", "sum", "none"}
        "mean" divides by the kept rows' Σ s·w; "none" returns one loss a row.
    label_smoothing : float in [0, 1]
        ε: the target becomes (1 − ε) â + ε/C.
    sample_weight : Tensor, the rows' shape or broadcast to it, optional
        Row weights s; 0 drops the row.
    z_loss : float ≥ 0
        c: adds c·logsumexp² to each row.
    logit_scale : float > 0
        τ, one over the temperature: z = τ·input.
    softcap : float > 0, optional
        κ: z = κ·tanh(τ·input/κ).
    divisor : float, optional
        Replaces what "mean" divides by.
    target_prob : Tensor, optional
        Probabilities of the class ids in `target`, of the same shape.
    dim : int, optional
        The class axis; None is PyTorch's rule: 1, or 0 where `input` has one dimension.

    Returns
    -------
    Tensor
        0-d, or of the rows' shape with reduction="none"; float64 for float64 logits, else float32.
        Differentiable any number of times in `input`, a probability `target`, `target_prob` and
        `sample_weight`.

    Raises
    ------
    IndexError
        A target outside 0 … C − 1 that is not `ignore_index`. Where its value is not at hand (on
        other devices, under `torch.func` and forward mode) the row's loss is NaN instead.
    TypeError, ValueError
        Arguments that do not fit, or a `weight`, `divisor` or scale that requires a gradient.

    Notes
    -----
    The gradient of a plain row is (softmax(z) − â)·grad_output; see docs/maths.md.

    Examples
    --------
    >>> import torch
    >>> from crossent.torch import cross_entropy
    >>> input = torch.tensor([[2.0, 1.0, 0.1], [0.5, 2.5, 0.0]], requires_grad=True)
    >>> loss = cross_entropy(input, torch.tensor([0, 1]))
    >>> loss.backward()
    >>> print(f"{loss.item():.4f}", input.grad[0])
    0.3069 tensor([-0.1705,  0.1212,  0.0493])
    """
    tensors = (input, target, weight, sample_weight, target_prob)
    if has_torch_function(tensors):
        return handle_torch_function(
            cross_entropy,
            tensors,
            input,
            target,
            weight,
            size_average,
            ignore_index,
            reduce,
            reduction,
            label_smoothing,
            sample_weight=sample_weight,
            z_loss=z_loss,
            logit_scale=logit_scale,
            softcap=softcap,
            divisor=divisor,
            target_prob=target_prob,
            dim=dim,
        )
    where = "cross_entropy"
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    if target is None:
        raise errors.not_a_tensor(where, "target", target)
    _check(where, input, target)
    axis = class_axis(where, input, dim)
    options = Options(
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
    )
    check_options(where, input, options)
    return route(where, input, target, options, axis)


def cross_entropy_stats(
    input: Tensor,
    target: Tensor | None = None,
    *,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    dim: int | None = None,
) -> RowStats:
    """Return what the softmax says of each row, without keeping the softmax.

    Parameters
    ----------
    input : Tensor (C,), (N, C) or (N, C, d1, …)
        Logits.
    target : Tensor of integers, the rows' shape, optional
        Class indices.
    sample_weight : Tensor, the rows' shape or broadcast to it, optional
        Rows of weight 0 are dropped; other weights have no effect.
    ignore_index, logit_scale, softcap, dim
        As for `cross_entropy`.

    Returns
    -------
    RowStats
        Tensors of the rows' shape: ``logsumexp``; ``target_logprob`` (None without a target);
        ``entropy`` −Σ a ln a in nats; ``argmax``, ties to the first; ``target_rank``, the number of
        classes strictly above the target (None without one). Dropped rows hold NaN and −1, and so
        do rows that are NaN. ``logsumexp``, ``target_logprob`` and ``entropy`` are differentiable
        in `input`.

    Raises
    ------
    IndexError, TypeError, ValueError
        As `cross_entropy`.

    Examples
    --------
    >>> import torch
    >>> from crossent.torch import cross_entropy_stats
    >>> stats = cross_entropy_stats(torch.tensor([[2.0, 1.0, 0.1]]), torch.tensor([1]))
    >>> stats.argmax.item(), stats.target_rank.item()
    (0, 1)
    """
    where = "cross_entropy_stats"
    tensors = (input, target, sample_weight)
    _check(where, input, target)
    axis = class_axis(where, input, dim)
    # Without a target class 0 stands in, and what it gives is left out; weight 0 alone drops a row.
    given = target is not None
    if target is None:
        shape = input.shape[:axis] + input.shape[axis + 1 :]
        target = torch.zeros(shape, dtype=torch.int64, device=input.device)
    elif target.is_floating_point():
        raise errors.bad_target_dtype_for_stats(where, target.dtype)
    options = Options(
        sample_weight=sample_weight,
        ignore_index=ignore_index if given else -100,
        logit_scale=logit_scale,
        softcap=softcap,
        reduction="none",
    )
    if sample_weight is not None and sample_weight.requires_grad:
        options.sample_weight = sample_weight.detach()  # whose values have no effect
    check_options(where, input, options)
    eager = not torch.compiler.is_compiling() and untransformed()
    if eager and all(map(in_memory, tensors)):
        return statistics.stats(where, input, target, options, axis, with_target=given)
    plan = formulas.lower(where, tuple(input.shape), target, options, axis, input.dtype)
    return formulas.stats(input, plan, with_target=given)


def route(where: str, input: Tensor, target: Tensor, options: Options, axis: int) -> Tensor:
    """Return the loss of arguments that are checked, the way they need."""
    logits_alone = not others_need_gradients(target, options)
    if torch.compiler.is_compiling():
        transformed = torch._C._are_functorch_transforms_active()
        if logits_alone and input.is_cpu and not transformed:
            return ops.cross_entropy(input, target, options, axis)
    elif numbers_at_hand(input, target, options):
        if logits_alone:
            return native.cross_entropy(where, input, target, options, axis)
        native.check(where, input, target, options, axis)
    shape = tuple(input.shape)
    plan = formulas.lower(where, shape, target, options, axis, input.dtype)
    return formulas.loss(input, plan)


def others_need_gradients(target: Tensor, options: Options) -> bool:
    """Tell whether a gradient is wanted in the target's numbers or in the row weights."""
    weights, probabilities = options.sample_weight, options.target_prob
    return torch.is_grad_enabled() and (
        target.requires_grad
        or (weights is not None and weights.requires_grad)
        or (probabilities is not None and probabilities.requires_grad)
    )


def numbers_at_hand(input: Tensor, target: Tensor, options: Options) -> bool:
    """Tell whether kernels can read all that there is, in an eager call."""
    tensors = (input, target, options.weight, options.sample_weight, options.target_prob)
    return untransformed() and all(map(in_memory, tensors))


def _check(where: str, input: Tensor, target: Tensor | None) -> None:
    """Raise for what is no tensor of logits, as PyTorch does, or no target."""
    if not isinstance(input, Tensor):
        raise errors.not_a_tensor(where, "input", input)
    if input.dtype not in BACKENDS:
        if not input.is_floating_point():
            functional.log_softmax(input, -1)  # PyTorch's own error
        raise errors.bad_tensor_dtype(where, "input", input.dtype)
    if target is not None:
        if not isinstance(target, Tensor):
            raise errors.not_a_tensor(where, "target", target)
        if target.device != input.device:
            raise errors.other_device(where, "target", target.device, input.device)
        _check_numbers(where, "target", target)


def _check_numbers(where: str, name: str, value: Tensor) -> None:
    """Raise for floats of 8 bits or fewer, of which neither NumPy nor most of PyTorch knows."""
    if value.dtype not in BACKENDS and value.dtype.is_floating_point:
        raise errors.bad_input_dtype(where, name, value.dtype)


def check_options(where: str, input: Tensor, options: Options) -> None:
    """Raise for an array that is no tensor or elsewhere, and for a gradient nobody would get.

    A number that comes as a 0-d tensor becomes a number.
    """
    for name in ("weight", "sample_weight", "target_prob"):
        value = getattr(options, name)
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise errors.not_a_tensor(where, name, value)
        if value.device != input.device:
            raise errors.other_device(where, name, value.device, input.device)
        _check_numbers(where, name, value)
    _no_gradient(where, "weight", options.weight)
    for name in _NUMBERS:
        value = getattr(options, name)
        if type(value) is not float and isinstance(value, Tensor):
            _no_gradient(where, name, value)
            if value.dim() == 0:
                setattr(options, name, value.item())


_NUMBERS = ("ignore_index", "label_smoothing", "z_loss", "logit_scale", "softcap", "divisor")


def _no_gradient(where: str, name: str, value: Tensor | None) -> None:
    if value is not None and value.requires_grad and torch.is_grad_enabled():
        raise errors.no_gradient(where, name)
