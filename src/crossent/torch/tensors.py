"""Tensors as the arrays that kernels read, and back; which tensors that can be done to.

A bfloat16 tensor goes to its kernel as uint16 (NumPy has no such dtype).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import forward_ad

from crossent import options as errors
from crossent.backends import Backend, backend_named
from crossent.call import Call

BACKENDS: dict[torch.dtype, Backend] = {
    torch.float64: backend_named("float64"),
    torch.float32: backend_named("float32"),
    torch.float16: backend_named("float16"),
    torch.bfloat16: backend_named("bfloat16"),
}
COMPUTE_DTYPE = dict.fromkeys(BACKENDS, torch.float32) | {torch.float64: torch.float64}
NUMPY_DTYPE: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}
_PLAIN = {Tensor, torch.nn.Parameter}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class RowStats(NamedTuple):
    """What `cross_entropy_stats` tells of each row; dropped rows hold NaN and −1."""

    logsumexp: Tensor
    target_logprob: Tensor | None
    entropy: Tensor
    argmax: Tensor
    target_rank: Tensor | None


def untransformed() -> bool:
    """Tell whether a tensor's numbers are at hand: no transform, trace or mode stands between."""
    return not (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state()
    )


def is_batched(tensor: Tensor) -> bool:
    """Tell a tensor of the older vmap, by which `torch.autograd` batches backward passes."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def in_memory(tensor: Tensor | None) -> bool:
    """Tell whether a tensor lies on the CPU as plain memory, and is not a subclass's own idea."""
    if tensor is None:
        return True
    kind = type(tensor)
    if kind not in _PLAIN and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return False
    return tensor.is_cpu and tensor.layout is torch.strided


def as_array(tensor: Tensor) -> NDArray[Any]:
    """Return the array that shares a CPU tensor's memory; bfloat16 as uint16."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    try:
        return _shared(tensor)
    except RuntimeError:  # no memory as it should be: a sign is pending, or all zeros are implied
        return _shared(tensor.resolve_neg().clone())


def _shared(tensor: Tensor) -> NDArray[Any]:
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def as_numbers(value: Any) -> Any:
    """Return an option's or a target's tensor as an array of numbers; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    if value.dtype is torch.bfloat16:
        return _as_bfloat16(value)
    return as_array(value)


def call_of(where: str, input: Tensor, dim: int) -> Call:
    """Return the call of the kernels on these logits."""
    return Call(where, as_array(input), dim, BACKENDS[input.dtype])


def class_axis(where: str, input: Tensor, dim: int | None) -> int:
    """Return the class axis: PyTorch's rule (1, or 0 of one row) unless `dim` says another."""
    ndim = input.dim()
    if ndim == 0:
        raise errors.bad_input_ndim(where)
    if dim is None:
        return min(ndim - 1, 1)
    if type(dim) is not int:
        raise errors.bad_axis(where, dim, ndim)
    if not -ndim <= dim < ndim:
        raise errors.bad_axis(where, dim, ndim)
    return dim % ndim


def new_like(input: Tensor, call: Call) -> tuple[Tensor, NDArray[Any]]:
    """Return a new tensor of the logits' shape, dtype and order, and its array as kernels see it.

    NumPy allocates, which asks the system for huge pages where an array is large.
    """
    logits = call.logits
    last = _CHANNELS_LAST.get(logits.ndim)
    keep = last is not None and input.is_contiguous(memory_format=last)
    array = np.empty_like(logits, order="K" if keep else "C")
    return as_tensor(array, input.dtype), call.seen(array)


def as_tensor(array: NDArray[Any], dtype: torch.dtype) -> Tensor:
    """Return the tensor that shares an array's memory."""
    if dtype is torch.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _as_bfloat16(tensor: Tensor) -> NDArray[Any]:
    """Return bfloat16 as `ml_dtypes` knows it, or, without that, an exact copy in float32."""
    try:
        from ml_dtypes import bfloat16
    except ModuleNotFoundError:
        return as_array(tensor.float())
    return as_array(tensor).view(bfloat16)
