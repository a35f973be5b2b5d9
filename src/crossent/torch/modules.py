"""`CrossEntropyLoss`, a module with PyTorch's constructor and state."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from crossent.options import Options, Reduction
from crossent.torch.functional import cross_entropy

_MORE = {"z_loss": 0.0, "logit_scale": 1.0, "softcap": None, "dim": None}


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`cross_entropy` as a module: PyTorch's own, with this project's options by name.

    Parameters
    ----------
    weight, size_average, ignore_index, reduce, reduction, label_smoothing
        As for `torch.nn.CrossEntropyLoss`, in its order; `weight` is its one entry of the state.
    z_loss, logit_scale, softcap, dim
        As for `cross_entropy`.

    Raises
    ------
    TypeError, ValueError
        An option of the wrong type or out of range, already when the module is made.

    Examples
    --------
    >>> import torch
    >>> from crossent.torch import CrossEntropyLoss
    >>> criterion = CrossEntropyLoss(label_smoothing=0.1, z_loss=1e-4)
    >>> criterion
    CrossEntropyLoss(label_smoothing=0.1, z_loss=0.0001)
    >>> f"{criterion(torch.zeros(2, 10), torch.tensor([3, 7])).item():.4f}"
    '2.3031'
    """

    z_loss: float
    logit_scale: float
    softcap: float | None
    dim: int | None

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        dim: int | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss, self.logit_scale, self.softcap, self.dim = z_loss, logit_scale, softcap, dim
        options = Options(
            None,
            None,
            ignore_index,
            label_smoothing,
            z_loss,
            logit_scale,
            softcap,
            self.reduction,
        )
        options.checked("CrossEntropyLoss", np.dtype(np.float64))

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        divisor: float | None = None,
        target_prob: Tensor | None = None,
    ) -> Tensor:
        """Return the loss; what varies from batch to batch comes by name, as in `cross_entropy`."""
        return cross_entropy(
            input,
            target,
            self.weight,
            None,
            self.ignore_index,
            None,
            self.reduction,
            self.label_smoothing,
            sample_weight=sample_weight,
            z_loss=self.z_loss,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            divisor=divisor,
            target_prob=target_prob,
            dim=self.dim,
        )

    def extra_repr(self) -> str:
        """Name the options that are not the defaults."""
        every: dict[str, Any] = {
            "ignore_index": -100,
            "reduction": "mean",
            "label_smoothing": 0.0,
            **_MORE,
        }
        changed = ((name, getattr(self, name), default) for name, default in every.items())
        return ", ".join(
            f"{name}={value!r}" for name, value, default in changed if value != default
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**_MORE, **state})
