"""Minimises a smooth convex objective and records how it went."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize
from sklearn.exceptions import ConvergenceWarning

from crossent._fit_history import FitRecord, Minimum, Monitor
from crossent._newton import Objective, Vector, minimize_newton


def _minimize_lbfgs(objective: Objective, start: Vector, max_iter: int, monitor: Monitor) -> Vector:
    # gtol: the monitor stops. maxls and ftol are scikit-learn's (1.9, _logistic_regression_path),
    # and no more than maxls + 1 evaluations fit in an iteration.
    maxls = 50
    options = {
        "maxiter": max_iter,
        "maxfun": 1 + max_iter * (maxls + 1),
        "maxls": maxls,
        "gtol": 0.0,
        "ftol": 64 * np.finfo(np.float64).eps,
    }
    theta: Vector = minimize(
        objective.value_and_grad,
        start,
        jac=True,
        method="L-BFGS-B",
        callback=monitor,
        options=options,
    ).x
    return theta


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
    start : ndarray of shape (P,), float64
        Iteration 0.
    solver : {"newton-cg", "lbfgs"}
        The inexact Newton method of `minimize_newton`, or SciPy's L-BFGS, which also stops where
        the objective no longer decreases by more than 64 float64 epsilons.
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
        The last iterate, which is the best, but for the rounding of the objective.

    Warns
    -----
    sklearn.exceptions.ConvergenceWarning
        If the fit ended with a larger gradient entry: the iterations ran out, or rounding hides
        any further decrease.

    Raises
    ------
    ValueError
        If the objective, its gradient or a direction is not finite at an iterate.
    """
    monitor = Monitor(objective, tol, notify)
    with np.errstate(over="ignore", invalid="ignore"):  # a step too far; the monitor judges
        try:
            monitor(start)
        except StopIteration:
            return Minimum(start, monitor.history)
        if solver == "lbfgs":
            theta = _minimize_lbfgs(objective, start, max_iter, monitor)
        else:
            try:
                theta = minimize_newton(objective, start, max_iter=max_iter, callback=monitor)
            except OverflowError:
                last = monitor.history[-1].iteration
                raise monitor.overflow("the direction of the step", last) from None
    if not monitor.stopped:
        _warn_not_converged(monitor.history[-1], solver, tol, max_iter)
    return Minimum(theta, monitor.history)


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
