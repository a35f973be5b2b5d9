"""Who fits: crossent's two solvers and scikit-learn's three, on the same rows and the same C."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossent.cli.bench.fit_tasks import FitProblem
from crossent.cli.bench.results import Kind

_ITERATIONS = 100_000  # never reached: the limit on time comes first


@dataclass(frozen=True)
class Fitted:
    """What a fit ended with.

    Parameters
    ----------
    coef : ndarray (V, D)
    intercept : ndarray (V,)
    iterations : int
    """

    coef: NDArray[Any]
    intercept: NDArray[Any]
    iterations: int


@dataclass(frozen=True)
class Solver:
    """A way to fit.

    Parameters
    ----------
    name : str
        As on the command line.
    title : str
        As in tables.
    kind
        "crossent" or "peer".
    how : str
        The call that is timed.
    classifier : callable
        Returns the estimator; it takes C, tol and max_iter by name.
    hessian : bool
        It holds the Hessian in all weights and intercepts.
    """

    name: str
    title: str
    kind: Kind
    how: str
    classifier: Callable[..., Any]
    hessian: bool = False

    def need(self, sizes: tuple[int, int, int], dtype: str) -> int:
        """Return the bytes of its Hessian, ((D + 1) V)² numbers; 0 where it holds none."""
        _, columns, classes = sizes
        each = int(np.dtype(dtype).itemsize)
        return ((columns + 1) * classes) ** 2 * each if self.hessian else 0

    def fit(self, problem: FitProblem, tol: float) -> Fitted:
        """Return what a fit from zero ends with; that it did not converge is no error here."""
        model = self.classifier(C=problem.c, tol=tol, max_iter=_ITERATIONS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(problem.features, problem.labels)
        return Fitted(model.coef_, model.intercept_, int(np.max(model.n_iter_)))


def _ours(solver: str) -> Callable[..., Any]:
    def classifier(**options: Any) -> Any:
        from crossent.sklearn import SoftmaxClassifier

        return SoftmaxClassifier(solver=solver, **options)

    return classifier


def _theirs(solver: str) -> Callable[..., Any]:
    def classifier(**options: Any) -> Any:
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(solver=solver, **options)

    return classifier


def _crossent(name: str, solver: str) -> Solver:
    how = f'`crossent.sklearn.SoftmaxClassifier(C=C, tol=tol, solver="{solver}").fit(X, y)`'
    return Solver(name, f"crossent {solver}", "crossent", how, _ours(solver))


def _sklearn(solver: str, hessian: bool = False) -> Solver:
    how = f'`sklearn.linear_model.LogisticRegression(C=C, tol=tol, solver="{solver}").fit(X, y)`'
    name, title = f"sklearn-{solver}", f"scikit-learn {solver}"
    return Solver(name, title, "peer", how, _theirs(solver), hessian)


SOLVERS = (
    _crossent("crossent", "newton-cg"),
    _crossent("crossent-lbfgs", "lbfgs"),
    _sklearn("lbfgs"),
    _sklearn("newton-cg"),
    _sklearn("newton-cholesky", hessian=True),
)
