"""The objective of penalised multinomial logistic regression, ready for an optimiser.

Design: the loss and its gradient in the logits come from ``crossent.cross_entropy_value_and_grad``
and its second derivative from ``crossent.cross_entropy_hvp``; this file only multiplies by X and by
W and adds the penalty. Rows are asked for with ``reduction="none"`` and added here in float64, so a
float32 fit is not stopped by the rounding of a float32 total.

Conventions: N rows, D features, V classes. K weight vectors: V of them, or one where V = 2, whose
logits are then [0, x·w + b]. The parameter vector is float64: W (K, D) row by row, then b (K,).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossent import cross_entropy_hvp, cross_entropy_value_and_grad

Vector = NDArray[np.float64]
Matrix = NDArray[np.floating[Any]]


def logits(scores: Matrix, out: Matrix | None = None) -> Matrix:
    """Return the (N, V) logits of (N, K) scores: [0, score] where K = 1, the scores else."""
    if scores.shape[1] > 1:
        return scores
    if out is None:
        out = np.empty((len(scores), 2), scores.dtype)
    out[:, 0] = 0
    out[:, 1] = scores[:, 0]
    return out


class MultinomialObjective:
    """F(θ) = (C Σᵢ sᵢ λᵢ + ½‖W‖²) / (C Σᵢ sᵢ), its gradient and its Hessian times a vector.

    The bias is not penalised. This is the objective that scikit-learn documents for
    ``LogisticRegression``, divided by C Σᵢ sᵢ as its L-BFGS solver divides it (scikit-learn 1.9,
    ``_logistic_regression_path``), so that a tolerance on the gradient means the same.

    Parameters
    ----------
    X : ndarray or CSR matrix of shape (N, D), float32 or float64
        The features; their dtype is the dtype of every product and of the logits.
    target : ndarray
        Class indices (N,), or distributions (N, V).
    n_classes : int
        V.
    sample_weight : ndarray of shape (N,), optional
        The row weights s; ones if not given.
    C : float
        Inverse penalty strength; infinity means no penalty.
    fit_intercept : bool
        Whether θ holds b.
    label_smoothing : float
        Passed to the loss.
    """

    def __init__(
        self,
        X: Any,
        target: NDArray[Any],
        *,
        n_classes: int,
        sample_weight: Vector | None = None,
        C: float = 1.0,
        fit_intercept: bool = True,
        label_smoothing: float = 0.0,
    ) -> None:
        self.X = X
        self.target = target
        self.shape = (1 if n_classes == 2 else n_classes, X.shape[1])  # (K, D)
        self.fit_intercept = fit_intercept
        self.total_weight = float(X.shape[0] if sample_weight is None else sample_weight.sum())
        self.ridge = 1.0 / (C * self.total_weight)
        self._loss_options: dict[str, Any] = {
            "sample_weight": sample_weight,
            "label_smoothing": label_smoothing,
        }
        self._logits = np.empty((X.shape[0], n_classes), X.dtype)  # (N, V), then its gradient
        self._last: tuple[Vector, float, Vector] | None = None
        self._curved_at: tuple[Vector, Matrix] | None = None

    def pack(self, coef: Matrix, intercept: Matrix) -> Vector:
        """Return θ for W (K, D) and b (K,)."""
        parts = [np.ravel(coef), intercept] if self.fit_intercept else [np.ravel(coef)]
        return np.concatenate(parts).astype(np.float64)

    def unpack(self, theta: Vector) -> tuple[Matrix, Matrix]:
        """Return W (K, D) and b (K,) in the dtype of X, as fresh arrays."""
        k, d = self.shape
        coef = theta[: k * d].reshape(k, d).astype(self.X.dtype)
        intercept = theta[k * d :] if self.fit_intercept else np.zeros(k)
        return coef, intercept.astype(self.X.dtype)

    def value_and_grad(self, theta: Vector) -> tuple[float, Vector]:
        """Return F(θ) and ∇F(θ); the last point asked for is remembered."""
        if self._last is None or not np.array_equal(self._last[0], theta):
            self._last = (theta.copy(), *self._evaluate(theta))
        _, value, grad = self._last
        return value, grad.copy()

    def hvp(self, theta: Vector, direction: Vector) -> Vector:
        """Return ∇²F(θ) times a direction of the shape of θ; the logits at θ are remembered."""
        if self._curved_at is None or not np.array_equal(self._curved_at[0], theta):
            self._curved_at = (theta.copy(), logits(self._scores(theta)))
        curvature = cross_entropy_hvp(
            self._curved_at[1],
            self.target,
            logits(self._scores(direction)),
            reduction="sum",
            **self._loss_options,
        )  # (N, V)
        return self._pull_back(curvature) + self._penalty_grad(direction)

    def _evaluate(self, theta: Vector) -> tuple[float, Vector]:
        z = logits(self._scores(theta, out=self._logits), out=self._logits)  # (N, V)
        loss, grad = cross_entropy_value_and_grad(
            z, self.target, reduction="none", out=z, **self._loss_options
        )  # (N,), (N, V)
        penalty_grad = self._penalty_grad(theta)
        value = loss.sum(dtype=np.float64) / self.total_weight + 0.5 * (penalty_grad @ theta)
        return float(value), self._pull_back(grad) + penalty_grad

    def _scores(self, theta: Vector, out: Matrix | None = None) -> Matrix:
        coef, intercept = self.unpack(theta)
        if isinstance(self.X, np.ndarray) and self.shape[0] > 1:
            scores = np.matmul(self.X, coef.T, out=out)
        else:  # a sparse product takes no `out`, and one score a row is half of a row of logits
            scores = self.X @ coef.T
        scores += intercept
        return scores  # (N, K)

    def _pull_back(self, grad_logits: Matrix) -> Vector:
        """Return the gradient in θ of a mean over rows, from its gradient in the logits (N, V)."""
        grad = grad_logits[:, -self.shape[0] :]  # (N, K): z₀ is the constant 0 where K = 1
        coef_grad = grad.T @ self.X if isinstance(self.X, np.ndarray) else (self.X.T @ grad).T
        return self.pack(coef_grad, grad.sum(axis=0, dtype=np.float64)) / self.total_weight

    def _penalty_grad(self, theta: Vector) -> Vector:
        size = self.shape[0] * self.shape[1]
        return np.concatenate([self.ridge * theta[:size], np.zeros(theta.size - size)])
