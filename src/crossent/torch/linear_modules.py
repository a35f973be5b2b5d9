"""`LinearCrossEntropyLoss`, a module with PyTorch's constructor and state."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.loss import _WeightedLoss

from crossent import options as errors
from crossent.options import Options, Reduction
from crossent.torch.linear import linear_cross_entropy

if TYPE_CHECKING:
    from torch.nn import LinearCrossEntropyOptions

_MORE = {"z_loss": 0.0, "logit_scale": 1.0, "softcap": None}
# PyTorch has it since 2.13; before, the same constructor and state stand on what it stands on.
_BASE: Any = getattr(torch.nn, "LinearCrossEntropyLoss", _WeightedLoss)


class LinearCrossEntropyLoss(_BASE):
    """`linear_cross_entropy` as a module that owns the weights: a head and its loss.

    Parameters
    ----------
    in_features, num_classes, out_features, bias, device, dtype, reduction, weight, \
ignore_index, label_smoothing, options
        As for `torch.nn.LinearCrossEntropyLoss`; ``linear.weight``, ``linear.bias`` and `weight`
        are its state.
    z_loss, logit_scale, softcap
        As for `cross_entropy`.

    Raises
    ------
    TypeError, ValueError
        An option of the wrong type or out of range, already when the module is made.

    Examples
    --------
    >>> import torch
    >>> from crossent.torch import LinearCrossEntropyLoss
    >>> head = LinearCrossEntropyLoss(8, 100, z_loss=1e-4)
    >>> head(torch.zeros(2, 5, 8), torch.zeros(2, 5, dtype=torch.int64)).backward()
    >>> head.linear.weight.grad.shape
    torch.Size([100, 8])
    """

    num_classes: int
    out_features: tuple[int, ...]
    ignore_index: int | None
    label_smoothing: float
    z_loss: float
    logit_scale: float
    softcap: float | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: Reduction = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: LinearCrossEntropyOptions | None = None,
        z_loss: float = 0.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        where = "LinearCrossEntropyLoss"
        asked = Options(
            None,
            None,
            -100 if ignore_index is None else ignore_index,
            label_smoothing,
            z_loss,
            logit_scale,
            softcap,
            reduction,
        )
        asked.checked(where, np.dtype(np.float64))
        if weight is not None and tuple(weight.shape) != (num_classes,):
            expected = f"({num_classes},), one for each class"
            raise errors.bad_shape(where, "weight", expected, tuple(weight.shape))
        _WeightedLoss.__init__(self, weight, None, None, reduction)
        self.num_classes, self.out_features = num_classes, out_features
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        n_out = math.prod(out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, n_out, bias=bias, device=device, dtype=dtype)
        self.options = options
        self.z_loss, self.logit_scale, self.softcap = z_loss, logit_scale, softcap

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        divisor: float | None = None,
        target_prob: Tensor | None = None,
    ) -> Tensor:
        """Return the loss; what varies from batch to batch comes by name."""
        weight, bias = self.linear.weight, self.linear.bias
        if self.out_features:
            classes = (self.num_classes, *self.out_features)
            weight = weight.reshape(*classes, self.linear.in_features)
            bias = None if bias is None else bias.reshape(classes)
        return linear_cross_entropy(
            input,
            weight,
            target,
            linear_bias=bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            sample_weight=sample_weight,
            z_loss=self.z_loss,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            divisor=divisor,
            target_prob=target_prob,
        )

    def extra_repr(self) -> str:
        """Name the sizes, and the options that are not the defaults."""
        every: dict[str, Any] = {
            "out_features": (),
            "reduction": "mean",
            "ignore_index": None,
            "label_smoothing": 0.0,
            "options": None,
            **_MORE,
        }
        changed = ((name, getattr(self, name), default) for name, default in every.items())
        named = [f"{name}={value!r}" for name, value, default in changed if value != default]
        return ", ".join([f"num_classes={self.num_classes}", *named])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**_MORE, **state})
