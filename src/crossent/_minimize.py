"""Minimises a smooth convex objective with SciPy and records how it went."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.exceptions import ConvergenceWarning

Vector = NDArray[np.float64]


class Objective(Protocol):
    """What is minimised."""

    def value_and_grad(self, theta: Vector) -> tuple[float, Vector]:
        """Return the value and the gradient at θ."""

    def hvp(self, theta: Vector, direction: Vector) -> Vector:
        """Return the Hessian at θ times a direction."""


class FitRecord(NamedTuple):
    """One line of a fit's history."""

    iteration: int
    objective: float
    gradient_norm: float
    seconds: float


@dataclass(frozen=True)
class Minimum:
    """Where a minimisation ended, and its history from iteration 0, the start, onwards."""

    theta: Vector
    history: list[FitRecord]


class _Monitor:
    """SciPy's callback: records each iterate and stops at the tolerance or when told to."""

    def __init__(
        self, objective: Objective, tol: float, notify: Callable[[FitRecord, Vector], bool]
    ) -> None:
        self.objective = objective
        self.tol = tol
        self.notify = notify
        self.history: list[FitRecord] = []
        self.stopped = False
        self.start = time.perf_counter()

    def __call__(self, theta: Vector) -> None:
        value, grad = self.objective.value_and_grad(theta)
        record = FitRecord(
            iteration=len(self.history),
            objective=value,
            gradient_norm=float(np.max(np.abs(grad), initial=0.0)),
            seconds=time.perf_counter() - self.start,
        )
        if not np.isfinite([record.objective, record.gradient_norm]).all():
            raise ValueError(
                f"the objective ({value}) or its gradient is not finite at iteration "
                f"{record.iteration}: the features, or the sample weights, are too large for "
                "their dtype; scale the features, for example with StandardScaler"
            )
        self.history.append(record)
        try:
            told_to_stop = self.notify(record, theta)
        except StopIteration:
            told_to_stop = True
        self.stopped = told_to_stop or record.gradient_norm <= self.tol
        if self.stopped:
            raise StopIteration


def _solver_arguments(objective: Objective, solver: str, max_iter: int) -> dict[str, Any]:
    if solver == "newton-cg":
        return {
            "method": "trust-ncg",
            "hessp": objective.hvp,
            "options": {"maxiter": max_iter, "gtol": 0.0},
        }
    # gtol: the monitor stops. maxls and ftol are scikit-learn's (1.9, _logistic_regression_path),
    # and no more than maxls + 1 evaluations fit in an iteration.
    maxls = 50
    return {
        "method": "L-BFGS-B",
        "options": {
            "maxiter": max_iter,
            "maxfun": 1 + max_iter * (maxls + 1),
            "maxls": maxls,
            "gtol": 0.0,
            "ftol": 64 * np.finfo(np.float64).eps,
        },
    }


def minimize_objective(
    objective: Objective,
    start: Vector,
    *,
    solver: str,
    tol: float,
    max_iter: int,
    notify: Callable[[FitRecord, Vector], bool],
) -> Minimum:
    """Minimise an objective until no gradient entry exceeds ``tol`` in absolute value.

    Parameters
    ----------
    objective : Objective
        Value with gradient, and Hessian-vector product.
    start : ndarray of shape (P,), float64
        Iteration 0.
    solver : {"lbfgs", "newton-cg"}
        L-BFGS, which also stops where the objective no longer decreases by more than 64 float64
        epsilons, or a trust-region Newton method with conjugate gradients.
    tol : float
        Bound on the largest absolute gradient entry.
    max_iter : int
        Most iterations.
    notify : callable
        Called with each record, iteration 0 included, and its θ; stops the fit by returning True
        or raising StopIteration.

    Returns
    -------
    Minimum
        The last iterate, which is the best: both methods only accept decreases.

    Warns
    -----
    sklearn.exceptions.ConvergenceWarning
        If the fit ended with a larger gradient entry: the iterations ran out, or rounding hides
        any further decrease.

    Raises
    ------
    ValueError
        If the objective or its gradient is not finite at an iterate.
    """
    monitor = _Monitor(objective, tol, notify)
    with np.errstate(over="ignore", invalid="ignore"):  # a step too far; the monitor judges
        try:
            monitor(start)
        except StopIteration:
            return Minimum(start, monitor.history)
        result = minimize(
            objective.value_and_grad,
            start,
            jac=True,
            callback=monitor,
            **_solver_arguments(objective, solver, max_iter),
        )
    if not monitor.stopped:
        _warn_not_converged(monitor.history[-1], solver, tol, max_iter)
    return Minimum(result.x, monitor.history)


def _warn_not_converged(last: FitRecord, solver: str, tol: float, max_iter: int) -> None:
    if last.iteration >= max_iter:
        cause = f"reached max_iter={max_iter}"
        advice = "scale the features (StandardScaler), raise max_iter, or loosen tol"
    else:
        cause = f"found no further decrease of the objective at iteration {last.iteration}"
        advice = "loosen tol, scale the features (StandardScaler), or pass float32 X as float64"
    warnings.warn(
        f"SoftmaxClassifier: solver {solver!r} {cause}, with objective {last.objective:.6g} and "
        f"largest gradient entry {last.gradient_norm:.3g}, above tol={tol:g}; {advice}.",
        ConvergenceWarning,
        stacklevel=4,
    )
