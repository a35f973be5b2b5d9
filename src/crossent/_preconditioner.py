"""Approximate inverses of a multinomial objective's Hessian, for conjugate gradients.

The Hessian is Σᵢ sᵢ (diag pᵢ − pᵢ pᵢᵀ) ⊗ x̃ᵢ x̃ᵢᵀ / Σᵢ sᵢ plus the penalty's, with x̃ = (x, 1) where
there is a bias. Both approximations drop what couples the classes:

`GramPreconditioner`      one matrix for every class, Σᵢ sᵢ hᵢ x̃ᵢ x̃ᵢᵀ / Σᵢ sᵢ with hᵢ the mean over
                          the classes of p(1 − p); its Cholesky factor takes n D² + D³/3 operations.
`DiagonalPreconditioner`  one number for every weight, its feature's mean square times its class's
                          mean of p(1 − p): for very many features.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from crossent import products
from crossent._inverse import symmetric_inverse

if TYPE_CHECKING:
    from crossent._multinomial import MultinomialObjective

Vector = NDArray[np.float64]

_FEW_FEATURES, _MOST_FEATURES = 1024, 4096  # of a Gram matrix of 8 MB, of 128 MB
_FLOOR = 1e-12  # of the largest entry: for what has no penalty and hardly any curvature


class Preconditioner(Protocol):
    """An approximate inverse of the Hessian."""

    @property
    def cost(self) -> float:
        """About as many Hessian-vector products as an update costs."""

    def update(self, theta: Vector) -> None:
        """Go to θ."""

    def solve(self, residual: Vector) -> Vector:
        """Return the approximate inverse times a vector of the shape of θ."""


def preconditioner(objective: MultinomialObjective) -> Preconditioner:
    """Return the one that suits an objective's features."""
    n_features, dense = objective.shape[1], isinstance(objective.X, np.ndarray)
    few = n_features <= _FEW_FEATURES
    # The matrix then takes a quarter of X's memory at most.
    few = few or (dense and n_features <= min(_MOST_FEATURES, objective.n_rows // 4))
    return GramPreconditioner(objective) if few else DiagonalPreconditioner(objective)


class GramPreconditioner:
    """The same matrix (D̃, D̃) for every class, D̃ = D + 1 with a bias."""

    def __init__(self, objective: MultinomialObjective) -> None:
        self._objective = objective
        self._inverse: Vector

    @property
    def cost(self) -> float:
        k, d = self._objective.shape
        return float(d / (2 * k))

    def update(self, theta: Vector) -> None:
        objective = self._objective
        n_features = objective.shape[1]
        gram = np.zeros((n_features + objective.fit_intercept,) * 2, objective.X.dtype)
        for x, p, s in objective.probabilities(theta):
            root = np.sqrt(s * (p * (1 - p)).mean(axis=1, dtype=np.float64)).astype(gram.dtype)
            if isinstance(x, np.ndarray):
                scaled = np.empty((len(x), len(gram)), gram.dtype)
                np.multiply(x, root[:, np.newaxis], out=scaled[:, :n_features])
                scaled[:, n_features:] = root[:, np.newaxis]
                products.native(scaled.T, scaled, gram, accumulate=True)
            else:
                bias = [root[:, np.newaxis]] * objective.fit_intercept
                scaled = sparse.hstack([sparse.diags_array(root) @ x, *bias], format="csr")
                gram += (scaled.T @ scaled).toarray()
        gram = gram.astype(np.float64)  # before the penalty's share, which float32 may not hold
        gram[np.arange(n_features), np.arange(n_features)] += objective.ridge
        self._inverse = symmetric_inverse(gram, math.sqrt(objective.rounding))

    def solve(self, residual: Vector) -> Vector:
        k, d = self._objective.shape
        given = np.empty((k, len(self._inverse)))
        given[:, :d] = residual[: k * d].reshape(k, d)
        given[:, d:] = residual[k * d :].reshape(k, -1)
        found = np.empty_like(given)
        products.native(given, self._inverse, found)
        return self._objective.without_free(self._objective.pack(found[:, :d], found[:, -1]))


class DiagonalPreconditioner:
    """One number for every entry of θ."""

    cost = 1.0

    def __init__(self, objective: MultinomialObjective) -> None:
        self._objective = objective
        self._inverse: Vector

    def update(self, theta: Vector) -> None:
        objective = self._objective
        spread = np.zeros(objective.shape[0])
        for _, p, s in objective.probabilities(theta):
            spread += (p * (1 - p) * s[:, np.newaxis]).sum(axis=0)
        coef = np.outer(spread, objective.mean_squares) + objective.ridge
        diagonal = objective.pack(coef, spread)
        largest = float(diagonal.max(initial=0.0))
        if not math.isfinite(largest):
            raise OverflowError
        self._inverse = 1.0 / np.maximum(diagonal, _FLOOR * largest or 1.0)

    def solve(self, residual: Vector) -> Vector:
        return self._objective.without_free(self._inverse * residual)
