"""An inexact Newton method for a smooth convex mean over many rows.

Each step solves H d = −g loosely by preconditioned conjugate gradients, and searches along d.

Design:
  a. The gradient is of all rows, the Hessian of a sample of them: where the method ends has to be
     exact, the way there has not (Byrd, Chin, Neveitt and Nocedal, "On the use of stochastic
     Hessian information in optimization methods for machine learning", SIAM J. Optim. 21, 2011).
     On 60,000 images a product with it is fifteen times as cheap.
  b. What the sample does not know of the curvature the last steps tell: their pairs (change of θ,
     change of ∇F) correct the direction as in L-BFGS, whose initial matrix is the sample's inverse
     Hessian (Nocedal and Wright, "Numerical optimization", algorithm 7.4).
  c. A step that had to be shortened a lot, or two that had to be shortened in a row, say that the
     sample is too small: it grows, up to all rows, from where on the method is Newton's own and
     needs no pairs.
  d. A step shrinks until F falls enough for its slope (Armijo) or, where F's rounding hides that,
     until the gradient falls.
  e. Sums of products are NumPy's own and not a BLAS's, whose bits depend on its threads.

SciPy's Newton methods (1.17: Newton-CG, trust-ncg, trust-krylov) take no preconditioner and no
second, cheaper Hessian.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from crossent._preconditioner import Preconditioner

Vector = NDArray[np.float64]

_FEWEST_ROWS, _ROWS_A_FEATURE, _GROWTH = 4096, 5, 4  # of the sample
_PAIRS = 5
_LOOSE = 0.3  # share of the gradient's size, as the preconditioner measures it, that may be left
_MOST_PRODUCTS = 250  # in one step
_ENOUGH = 1e-4  # Armijo's share of the slope
_SHORT = 0.2  # a length of step that makes the sample grow at once
_SHORTEST = 1e-10


class Objective(Protocol):
    """A smooth convex function, the mean over some rows."""

    @property
    def n_rows(self) -> int:
        """How many rows there are."""

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of outputs and of features."""

    @property
    def rounding(self) -> float:
        """Relative error of the value."""

    def value_and_grad(self, theta: Vector) -> tuple[float, Vector]:
        """Return the value and the gradient at θ."""

    def hvp(self, theta: Vector, direction: Vector) -> Vector:
        """Return the Hessian at θ times a direction."""

    def sample(self, n: int) -> Objective:
        """Return the mean over n rows or more, or itself where it has hardly more."""

    def preconditioner(self) -> Preconditioner:
        """Return an approximate inverse of the Hessian."""


class _Pair(NamedTuple):
    step: Vector
    change: Vector  # of the gradient
    product: float


class _Point(NamedTuple):
    theta: Vector
    value: float
    grad: Vector


def minimize_newton(
    objective: Objective, start: Vector, *, max_iter: int, callback: Callable[[Vector], None]
) -> Vector:
    """Minimise a convex objective.

    Parameters
    ----------
    objective : Objective
    start : ndarray of shape (P,), float64
    max_iter : int
        Most steps.
    callback : callable
        Called with θ after each step; ends the minimisation by raising StopIteration.

    Returns
    -------
    ndarray of shape (P,)
        The last θ: after `max_iter` steps, where the callback ended it, or where no step found a
        smaller value or gradient.

    Raises
    ------
    OverflowError
        If no direction can be computed.
    """
    curvature = _Curvature(objective, max(_FEWEST_ROWS, _ROWS_A_FEATURE * objective.shape[1]))
    pairs: deque[_Pair] = deque(maxlen=_PAIRS)
    at = _Point(start, *objective.value_and_grad(start))
    shortened = False
    for _ in range(max_iter):
        length, then = _search(objective, at, _direction(curvature, at, pairs))
        while then is None and not curvature.whole:
            curvature = curvature.larger()
            pairs.clear()
            length, then = _search(objective, at, _direction(curvature, at, pairs))
        if then is None:
            break
        if length < _SHORT or (length < 1 and shortened):
            curvature = curvature.larger()
            pairs.clear()
        shortened = length < 1
        if not curvature.whole:
            _remember(pairs, at, then)
        at = then
        try:
            callback(at.theta)
        except StopIteration:
            break
    return at.theta


class _Curvature:
    """The Hessian of a sample of at least n rows, with its preconditioner."""

    def __init__(self, objective: Objective, n: int) -> None:
        self._all, self._n, self._sample = objective, n, objective.sample(n)
        self.whole = self._sample is objective
        self._preconditioner = self._sample.preconditioner()
        self._products = math.inf  # since the preconditioner was made

    def larger(self) -> _Curvature:
        # Of what was asked for: a sample has fewer rows where it holds some of them several times.
        n = max(self._n, self._sample.n_rows)
        return self if self.whole else _Curvature(self._all, _GROWTH * n)

    def solve(self, theta: Vector, right: Vector) -> Vector:
        """Return about H⁻¹ times a vector, by conjugate gradients from 0 on."""
        if self._products >= self._preconditioner.cost:
            self._preconditioner.update(theta)
            self._products = 0
        found, residual = np.zeros_like(right), right.copy()
        preconditioned = self._preconditioner.solve(residual)
        along, size = preconditioned, _dot(residual, preconditioned)
        enough = _LOOSE**2 * size
        for _ in range(_MOST_PRODUCTS):
            if not size > enough:
                break
            product = self._sample.hvp(theta, along)
            self._products += 1
            curvature = _dot(along, product)
            if not curvature > 0:  # none along here, but for rounding
                return found if found.any() else along
            found += size / curvature * along
            residual -= size / curvature * product
            preconditioned = self._preconditioner.solve(residual)
            size, before = _dot(residual, preconditioned), size
            along = preconditioned + size / before * along
        return found


def _direction(curvature: _Curvature, at: _Point, pairs: deque[_Pair]) -> Vector:
    """Return L-BFGS's direction whose initial matrix is the sample's inverse Hessian."""
    right, shares = -at.grad, []
    for pair in reversed(pairs):
        shares.append(_dot(pair.step, right) / pair.product)
        right = right - shares[-1] * pair.change
    found = curvature.solve(at.theta, right)
    for pair in pairs:
        found += (shares.pop() - _dot(pair.change, found) / pair.product) * pair.step
    return found


def _search(objective: Objective, at: _Point, direction: Vector) -> tuple[float, _Point | None]:
    """Return a length and the point there, None where none is better."""
    slope = _dot(at.grad, direction)
    if not math.isfinite(slope):
        raise OverflowError
    length = 1.0
    while slope < 0 and length > _SHORTEST:
        theta = at.theta + length * direction
        then = _Point(theta, *objective.value_and_grad(theta))
        change = then.value - at.value
        if change <= _ENOUGH * length * slope:
            return length, then
        hidden = change <= objective.rounding * abs(at.value)
        if hidden and np.abs(then.grad).max() < np.abs(at.grad).max():
            return length, then
        # The parabola through both values and the slope has its lowest point here.
        lowest = 0.5 * slope * length / (slope - change / length)
        length = min(max(lowest, 0.1 * length), 0.5 * length) if lowest > 0 else 0.1 * length
    return length, None


def _remember(pairs: deque[_Pair], before: _Point, after: _Point) -> None:
    step, change = after.theta - before.theta, after.grad - before.grad
    product = _dot(step, change)
    if product > 0:  # it is, but for rounding
        pairs.append(_Pair(step, change, product))


def _dot(a: Vector, b: Vector) -> float:
    return float(np.sum(a * b))
