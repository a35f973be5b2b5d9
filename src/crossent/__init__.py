"""Softmax cross-entropy and its gradient: exact, fast, and the same in every framework.

    weighted sums  z = x Wᵀ + b      softmax  a = σ(z)
    loss  λ = −Σᵢ âᵢ ln aᵢ           gradient  ∂λ/∂z = a − â

Importing this imports NumPy and nothing heavier.
"""

from crossent.head import LinearGrad
from crossent.linear import (
    linear_cross_entropy,
    linear_cross_entropy_hvp,
    linear_cross_entropy_stats,
    linear_cross_entropy_value_and_grad,
)
from crossent.numpy import (
    LossGrad,
    RowStats,
    cross_entropy,
    cross_entropy_hessian,
    cross_entropy_hvp,
    cross_entropy_stats,
    cross_entropy_value_and_grad,
    log_softmax,
    softmax,
    softmax_jacobian,
)
from crossent.runtime import get_num_threads, set_num_threads

__version__ = "0.1.0"

__all__ = [
    "LinearGrad",
    "LossGrad",
    "RowStats",
    "cross_entropy",
    "cross_entropy_hessian",
    "cross_entropy_hvp",
    "cross_entropy_stats",
    "cross_entropy_value_and_grad",
    "get_num_threads",
    "linear_cross_entropy",
    "linear_cross_entropy_hvp",
    "linear_cross_entropy_stats",
    "linear_cross_entropy_value_and_grad",
    "log_softmax",
    "set_num_threads",
    "softmax",
    "softmax_jacobian",
]
