"""The PyTorch front end: a drop-in for `torch.nn.functional.cross_entropy` and its module.

    from crossent.torch import cross_entropy, CrossEntropyLoss

and for `linear_cross_entropy`, which needs no logits, and its module. On the CPU the native kernels
compute; on other devices, and under every transform of `torch.func`, plain PyTorch operations of
the same meaning. docs/torch.md lists what differs from PyTorch.
"""

from crossent.torch.functional import cross_entropy, cross_entropy_stats
from crossent.torch.linear import linear_cross_entropy, linear_cross_entropy_stats
from crossent.torch.linear_modules import LinearCrossEntropyLoss
from crossent.torch.modules import CrossEntropyLoss
from crossent.torch.tensors import RowStats

__all__ = [
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "RowStats",
    "cross_entropy",
    "cross_entropy_stats",
    "linear_cross_entropy",
    "linear_cross_entropy_stats",
]
