"""The objective of penalised multinomial logistic regression, ready for an optimiser.

Design: loss, gradient and Hessian-vector products are the fused head's (`crossent.head`), so no
array of N·V numbers is ever held; this file only adds the penalty. The head sums the rows' losses
in float64, so a float32 fit is not stopped by the rounding of a float32 total.

Conventions: N rows, D features, V classes. K weight vectors: V of them, or one where V = 2, whose
logits are then [0, x·w + b]. The parameter vector is float64: W (K, D) row by row, then b (K,).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossent import products, rows, softmax
from crossent._preconditioner import Preconditioner, preconditioner
from crossent.head import Head, LinearGrad
from crossent.options import Options

Vector = NDArray[np.float64]
Matrix = NDArray[np.floating[Any]]

_WHERE = "SoftmaxClassifier.fit"
_SAMPLE_SEED = 0
_CHUNK_NUMBERS = 2**20
_GROWTH, _LEAST_SEEN = 4, 0.25  # of a sample: more rows at a time, share of a feature's curvature
_FEW_ROWS = 8  # a sample may hold a row so many times, on average


def logits(scores: Matrix) -> Matrix:
    """Return the (N, V) logits of (N, K) scores: [0, score] where K = 1, the scores else."""
    if scores.shape[1] > 1:
        return scores
    return np.hstack([np.zeros_like(scores), scores])


def class_scores(x: Any, coef: Matrix, intercept: Matrix) -> Matrix:
    """Return x Wᵀ + b (n, K), the same bits for any number of threads."""
    if not isinstance(x, np.ndarray):
        return np.asarray(x @ coef.T + intercept)
    dtype = np.result_type(x, coef)
    scores = np.empty((len(x), len(coef)), dtype)
    products.native(x, coef.T, scores, bias=intercept.astype(dtype))
    return scores


def _ridge(C: float, total_weight: float) -> float:
    """Return 1 / (C Σᵢ sᵢ)."""
    strength = C * total_weight
    ridge = 1 / strength if strength > 0 else np.inf
    if not np.isfinite(ridge):
        raise ValueError(
            f"{_WHERE}: C is {C:g} and the row weights add up to {total_weight:g}, so small that "
            "the penalty, 1 / (C · sum) for each row, overflows; raise C, or scale the weights up"
        )
    return ridge


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
        self.X, self.target, self.n_classes = X, target, n_classes
        self.sample_weight, self.C = sample_weight, C
        self.fit_intercept, self.label_smoothing = fit_intercept, label_smoothing
        self.shape = (1 if n_classes == 2 else n_classes, X.shape[1])  # (K, D)
        self.total_weight = float(X.shape[0] if sample_weight is None else sample_weight.sum())
        self.ridge = _ridge(C, self.total_weight)
        options = Options(
            sample_weight=sample_weight,
            label_smoothing=label_smoothing,
            divisor=self.total_weight,
        )
        size = X.shape[0], n_classes
        self._plan = rows.lower(_WHERE, size, 1, X.dtype, target, options, "the classes' scores")
        self._last: tuple[Vector, float, Vector] | None = None

    @property
    def n_rows(self) -> int:
        """N."""
        return int(self.X.shape[0])

    @property
    def rounding(self) -> float:
        """Relative error of F and its gradient, about."""
        return float(np.finfo(self.X.dtype).eps)

    def sample(self, n: int) -> MultinomialObjective:
        """Return the mean over n rows or more, drawn in proportion to their weight.

        Rows are drawn at equal distances along the sum of the weights of the shuffled rows, a row
        of great weight more than once, and the same ones at every call. The penalty stays. More
        are drawn as long as a feature that is rarely not 0 would seem to have hardly any
        curvature; where not even half of the rows will do, the objective is this one.
        """
        n_weighted = self.n_rows
        if self.sample_weight is not None:
            n_weighted = int(np.count_nonzero(self.sample_weight))
        spread = (1 - 1 / self.n_classes) / self.n_classes  # p(1 − p) where all p are equal
        while 2 * n <= n_weighted:
            part = self._draw(n)
            whole, seen = (spread * each.mean_squares + self.ridge for each in (self, part))
            if _FEW_ROWS * part.n_rows >= n and (seen >= _LEAST_SEEN * whole).all():
                return part
            n *= _GROWTH
        return self

    def _draw(self, n: int) -> MultinomialObjective:
        drawn = np.random.default_rng(_SAMPLE_SEED).permutation(self.n_rows)
        weight = None
        if self.sample_weight is None:
            drawn = np.sort(drawn[:n])
        else:
            along = np.cumsum(self.sample_weight[drawn])
            at = np.searchsorted(along, (np.arange(n) + 0.5) * (along[-1] / n))
            drawn, counts = np.unique(drawn[np.minimum(at, self.n_rows - 1)], return_counts=True)
            weight = counts.astype(np.float64)
        n_drawn = float(len(drawn) if weight is None else weight.sum())
        return MultinomialObjective(
            self.X[drawn],
            self.target[drawn],
            n_classes=self.n_classes,
            sample_weight=weight,
            C=self.C * (self.total_weight / n_drawn),
            fit_intercept=self.fit_intercept,
            label_smoothing=self.label_smoothing,
        )

    @cached_property
    def mean_squares(self) -> Vector:
        """Mean square of every feature (D,), of the weighted rows."""
        total = np.zeros((1, self.shape[1]), self.X.dtype)
        for x, weight in self._chunks():
            if isinstance(x, np.ndarray):
                given = weight[np.newaxis].astype(total.dtype)
                products.native(given, np.square(x), total, accumulate=True)
            else:
                each = np.repeat(weight, np.diff(x.indptr)) * np.square(x.data)
                total += np.bincount(x.indices, weights=each, minlength=self.shape[1])
        squares: Vector = total[0].astype(np.float64)
        return squares

    def preconditioner(self) -> Preconditioner:
        """Return an approximate inverse of the Hessian."""
        return preconditioner(self)

    def probabilities(self, theta: Vector) -> Iterator[tuple[Any, Matrix, Vector]]:
        """Yield chunks of features (n, D), probabilities (n, K), weights (n,) with sum 1 in all."""
        coef, intercept = self.unpack(theta)
        for x, weight in self._chunks():
            p = softmax(logits(class_scores(x, coef, intercept)))[:, -self.shape[0] :]
            yield x, p, weight

    def _chunks(self) -> Iterator[tuple[Any, Vector]]:
        dense = isinstance(self.X, np.ndarray)
        length = max(1, _CHUNK_NUMBERS // max(self.n_classes, self.shape[1] * dense))
        for i in range(0, self.n_rows, length):
            x = self.X[i : i + length]
            weight = np.ones(x.shape[0])
            if self.sample_weight is not None:
                weight = self.sample_weight[i : i + length]
            yield x, weight / self.total_weight

    def pack(self, coef: Matrix, intercept: Matrix | None) -> Vector:
        """Return θ for W (K, D) and b (K,)."""
        parts = [np.ravel(coef)]
        if self.fit_intercept and intercept is not None:
            parts.append(intercept)
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
            loss, grad = self._head(theta).value_and_grad(None, (False, True, self.fit_intercept))
            # Of the numbers that the loss is of: F must not tell apart what rounds to the same.
            coef = self.unpack(theta)[0].astype(np.float64)
            value = float(loss) + 0.5 * self.ridge * float(np.sum(coef * coef))
            gradient = self._packed(grad) + self._penalty_grad(coef)
            self._last = (theta.copy(), value, gradient)
        _, value, gradient = self._last
        return value, gradient.copy()

    def hvp(self, theta: Vector, direction: Vector) -> Vector:
        """Return ∇²F(θ) times a direction of the shape of θ."""
        weight, bias = self._layer(direction)
        vector = LinearGrad(None, weight, bias if self.fit_intercept else None)
        product = self._packed(self._head(theta).hvp(None, vector))
        return product + self._penalty_grad(direction[: self.shape[0] * self.shape[1]])

    def _head(self, theta: Vector) -> Head:
        return Head(_WHERE, self.X, *self._layer(theta), self._plan, self.X.dtype.name)

    def _layer(self, theta: Vector) -> tuple[Matrix, Matrix]:
        """Return the head's weights (V, D) and biases (V,)."""
        coef, intercept = self.unpack(theta)
        if self.shape[0] > 1:
            return coef, intercept
        return np.vstack([np.zeros_like(coef), coef]), np.append(
            np.zeros_like(intercept), intercept
        )

    def _packed(self, grad: LinearGrad) -> Vector:
        """Return the loss's own derivatives as one vector, or a product with them."""
        weight, bias = grad.linear_weight, grad.linear_bias
        if self.shape[0] == 1:  # z₀ is the constant 0
            return self.pack(weight[1:], None if bias is None else bias[1:])
        return self.without_free(self.pack(weight, bias), everywhere=True)

    def without_free(self, direction: Vector, everywhere: bool = False) -> Vector:
        """Return a direction without its share along which F does not change.

        The softmax does not see what is added to all classes, nor does a penalty that is not
        there: the mean over the classes is taken away from the biases and, where nothing is
        penalised, from the weights. `everywhere` takes it away from both: from the loss's own
        derivatives, where it is rounding alone, that would else grow along F's flat directions.
        """
        k, d = self.shape
        if k == 1:
            return direction
        found = direction.copy()
        coef, bias = found[: k * d].reshape(k, d), found[k * d :]
        if everywhere or self.ridge == 0:
            coef -= coef.mean(axis=0)
        if self.fit_intercept:
            bias -= bias.mean()
        return found

    def _penalty_grad(self, coef: Matrix | Vector) -> Vector:
        grad: Vector = np.zeros(self.shape[0] * (self.shape[1] + self.fit_intercept))
        grad[: coef.size] = self.ridge * coef.ravel()
        return grad
