"""A scikit-learn classifier that minimises the cross-entropy of a softmax layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils.validation import check_is_fitted, validate_data
except ModuleNotFoundError as error:
    raise ImportError(
        f"crossent.sklearn needs scikit-learn ({error}); pip install crossent[sklearn]"
    ) from error

from crossent import log_softmax, softmax
from crossent._fit_history import FitRecord
from crossent._fit_inputs import (
    distribution_target,
    is_distribution,
    label_target,
    row_weights,
)
from crossent._fit_parameters import check_parameters
from crossent._minimize import minimize_objective
from crossent._multinomial import MultinomialObjective, class_scores, logits
from crossent.runtime import register_with_loaded_threadpoolctl

__all__ = ["FitProgress", "FitRecord", "SoftmaxClassifier"]

FLOATS = (np.float64, np.float32)

FitRecord.__module__ = __name__  # its public place, by which pickle and skops name it
register_with_loaded_threadpoolctl()  # scikit-learn has loaded it


@dataclass(frozen=True)
class FitProgress:
    """What a fit's callback is given after each iteration.

    Attributes
    ----------
    iteration : int
        0 for the start.
    objective : float
        The mean loss plus the penalty's share, as in ``SoftmaxClassifier``'s notes.
    gradient_norm : float
        Largest absolute entry of the objective's gradient; the fit ends at ``tol``.
    seconds : float
        Time since the fit began, by the wall clock.
    coef : ndarray of shape (1, D) or (V, D)
        The weights at this iteration.
    intercept : ndarray of shape (1,) or (V,)
        The biases at this iteration.
    """

    iteration: int
    objective: float
    gradient_norm: float
    seconds: float
    coef: NDArray[np.floating[Any]]
    intercept: NDArray[np.floating[Any]]


class SoftmaxClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # bases untyped
    """Multinomial logistic regression: weighted sums, softmax, cross-entropy, L2 penalty.

    Parameters
    ----------
    C : float, default=1.0
        Inverse of the penalty's strength, in (0, inf]; ``inf`` fits without penalty.
    fit_intercept : bool, default=True
        Whether to fit a bias for each class. Biases are not penalised.
    class_weight : dict, "balanced" or None, default=None
        Weights by class label that multiply the sample weights; classes left out of the dict have
        weight 1. "balanced" gives every class the same total weight.
    label_smoothing : float, default=0.0
        Share ε in [0, 1] of each target that is spread evenly over all classes.
    tol : float, default=1e-4
        The fit has converged when no entry of the objective's gradient exceeds ``tol`` in size.
    max_iter : int, default=100
        Most iterations of the solver, at least 1.
    solver : {"newton-cg", "lbfgs"}, default="newton-cg"
        An inexact Newton method with preconditioned conjugate gradients, whose Hessian is that of
        a sample of the rows where there are many; or SciPy's L-BFGS-B, which needs many more
        iterations, each of them one pass over the rows.
    warm_start : bool, default=False
        Whether ``fit`` starts from the last fit's coefficients.
    callback : callable or None, default=None
        Called with a `FitProgress` at the start and after each iteration. If it returns True or
        raises StopIteration the fit ends there and keeps the coefficients of that iteration.

    Attributes
    ----------
    classes_ : ndarray of shape (V,)
        The class labels, sorted.
    coef_ : ndarray of shape (1, D) or (V, D)
        The weights W, in the dtype of the training features: one row for two classes.
    intercept_ : ndarray of shape (1,) or (V,)
        The biases b; zeros without ``fit_intercept``.
    n_iter_ : ndarray of shape (1,), int32
        Number of iterations.
    history_ : list of FitRecord
        (iteration, objective, gradient_norm, seconds) of the start and of every iteration.
    n_features_in_ : int
        D.
    feature_names_in_ : ndarray of shape (D,)
        Column names of X, where it has some.

    Notes
    -----
    For rows x_i of weight s_i with loss λ_i, the fit minimises
    C Σ_i s_i λ_i + ½‖W‖², the objective of scikit-learn's ``LogisticRegression``. ``tol``, the
    history and the callback are about that divided by C Σ_i s_i, as in scikit-learn's L-BFGS
    solver. Two classes share one weight vector: the logits are [0, x·w + b].

    The same data give the same bits for any ``crossent.set_num_threads``.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from crossent.sklearn import SoftmaxClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> model = SoftmaxClassifier(max_iter=200).fit(X, y)
    >>> model.coef_.shape
    (3, 4)
    >>> model.predict(X[[0, 60, 120]])
    array([0, 1, 2])
    >>> round(model.score(X, y), 2)
    0.97
    """

    def __init__(
        self,
        *,
        C: float = 1.0,
        fit_intercept: bool = True,
        class_weight: dict[Any, float] | str | None = None,
        label_smoothing: float = 0.0,
        tol: float = 1e-4,
        max_iter: int = 100,
        solver: str = "newton-cg",
        warm_start: bool = False,
        callback: Callable[[FitProgress], bool | None] | None = None,
    ) -> None:
        self.C = C
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.label_smoothing = label_smoothing
        self.tol = tol
        self.max_iter = max_iter
        self.solver = solver
        self.warm_start = warm_start
        self.callback = callback

    def __sklearn_tags__(self) -> Any:
        """Return scikit-learn's description of this estimator."""
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> SoftmaxClassifier:
        """Fit the weights and biases.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (N, D)
            The features. float32 and float64 are computed in their own dtype, others in float64.
        y : array-like of shape (N,), or of floats of shape (N, V)
            Class labels, or a distribution over the classes 0 to V - 1 for each row.
        sample_weight : array-like of shape (N,) or float, optional
            Row weights, not negative; 1 if not given.

        Returns
        -------
        SoftmaxClassifier
            The estimator itself.

        Raises
        ------
        ValueError
            If a parameter or an input is not usable; the message says which and why. After this
            and after any other exception, KeyboardInterrupt too, the estimator is as it was.

        Warns
        -----
        sklearn.exceptions.ConvergenceWarning
            If the fit ended before it converged.
        """
        with _unchanged_on_error(self):
            check_parameters(self)
            soft = is_distribution(y)
            X, y = validate_data(
                self, X, y, accept_sparse="csr", dtype=FLOATS, order="C", multi_output=soft
            )
            classes, target = distribution_target(y, X.dtype) if soft else label_target(y)
            weight = row_weights(sample_weight, target, classes, self.class_weight)
            objective = MultinomialObjective(
                X,
                target,
                n_classes=len(classes),
                sample_weight=weight,
                C=self.C,
                fit_intercept=self.fit_intercept,
                label_smoothing=self.label_smoothing,
            )
            minimum = minimize_objective(
                objective,
                self._start(objective, classes),
                solver=self.solver,
                tol=self.tol,
                max_iter=self.max_iter,
                notify=self._notifier(objective),
            )
            self.classes_ = classes
            self.coef_, self.intercept_ = objective.unpack(minimum.theta)
            self.history_ = minimum.history
            self.n_iter_ = np.array([minimum.history[-1].iteration], np.int32)
        return self

    def decision_function(self, X: Any) -> NDArray[np.floating[Any]]:
        """Return the weighted sums.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (N, D)
            The features.

        Returns
        -------
        ndarray of shape (N,) or (N, V)
            For two classes the log-odds of ``classes_[1]``, else the logits of every class.
        """
        scores = self._scores(X)
        return scores[:, 0] if scores.shape[1] == 1 else scores

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the most probable class of each row.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (N, D)
            The features.

        Returns
        -------
        ndarray of shape (N,)
            Labels from ``classes_``; the first of several that tie.
        """
        best = np.argmax(logits(self._scores(X)), axis=1)
        labels: NDArray[Any] = self.classes_[best]
        return labels

    def predict_proba(self, X: Any) -> NDArray[np.floating[Any]]:
        """Return the probability of every class.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (N, D)
            The features.

        Returns
        -------
        ndarray of shape (N, V)
            Probabilities in the order of ``classes_``.
        """
        return softmax(logits(self._scores(X)))

    def predict_log_proba(self, X: Any) -> NDArray[np.floating[Any]]:
        """Return the logarithm of the probability of every class.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (N, D)
            The features.

        Returns
        -------
        ndarray of shape (N, V)
            Natural logarithms in the order of ``classes_``, finite where a probability underflows.
        """
        return log_softmax(logits(self._scores(X)))

    def _scores(self, X: Any) -> NDArray[np.floating[Any]]:
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", dtype=FLOATS, reset=False)
        return class_scores(X, self.coef_, self.intercept_)  # (N, K)

    def _start(self, objective: MultinomialObjective, classes: NDArray[Any]) -> NDArray[np.float64]:
        if not (self.warm_start and hasattr(self, "coef_")):
            k, d = objective.shape
            return objective.pack(np.zeros((k, d)), np.zeros(k))
        if self.coef_.shape[1] != objective.shape[1] or not np.array_equal(self.classes_, classes):
            raise ValueError(
                f"warm_start: the last fit had {self.coef_.shape[1]} features and the classes "
                f"{self.classes_}, this one has {objective.shape[1]} and {classes}; fit the same "
                "features and classes, or set warm_start=False"
            )
        return objective.pack(self.coef_, self.intercept_)

    def _notifier(
        self, objective: MultinomialObjective
    ) -> Callable[[FitRecord, NDArray[np.float64]], bool]:
        callback = self.callback

        def notify(record: FitRecord, theta: NDArray[np.float64]) -> bool:
            return callback is not None and bool(
                callback(FitProgress(*record, *objective.unpack(theta)))
            )

        return notify


@contextmanager
def _unchanged_on_error(estimator: SoftmaxClassifier) -> Iterator[None]:
    before = estimator.__dict__.copy()
    try:
        yield
    except BaseException:  # KeyboardInterrupt included
        estimator.__dict__.clear()
        estimator.__dict__.update(before)
        raise
