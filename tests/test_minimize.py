"""The minimiser behind SoftmaxClassifier, on a quadratic whose every step can be told by hand."""

import numpy as np
import pytest

pytest.importorskip("sklearn")
from crossent._minimize import minimize_objective
from crossent._newton import _Curvature, _direction, _Pair, _Point

SCALE = np.array([1.0, 4.0, 9.0])
SOLVERS = ["lbfgs", "newton-cg"]


class Quadratic:
    """½ Σ scale·(θ − 1)²."""

    n_rows, shape, rounding = 1, (1, 3), 1e-16
    cost = 0.0

    def sample(self, n):
        return self

    def preconditioner(self):
        return self

    def update(self, theta):
        pass

    def solve(self, residual):
        return residual

    def value_and_grad(self, theta):
        return float(0.5 * SCALE @ (theta - 1) ** 2), SCALE * (theta - 1)

    def hvp(self, theta, direction):
        return SCALE * direction


def run(start, *, solver="lbfgs", tol=1e-8, notify=lambda record, theta: False):
    return minimize_objective(
        Quadratic(), np.array(start), solver=solver, tol=tol, max_iter=50, notify=notify
    )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("start", [[0.0, 0.0, 0.0], [2.0, 2.0, 2.0]])
def test_reaches_the_minimum_and_records_the_way(solver, start):
    seen = []
    minimum = run(start, solver=solver, notify=lambda record, theta: seen.append((record, theta)))
    np.testing.assert_allclose(minimum.theta, 1, rtol=0, atol=1e-8)
    assert [record for record, _ in seen] == minimum.history
    assert minimum.history[0][:3] == (0, 7.0, 9.0)  # the gradient is ∓(1, 4, 9)
    for record, theta in seen:
        value, grad = Quadratic().value_and_grad(theta)
        assert (record.objective, record.gradient_norm) == (value, np.abs(grad).max())
    seconds = [record.seconds for record in minimum.history]
    assert seconds == sorted(seconds)
    assert 0 <= seconds[0] <= seconds[-1] < 60


def test_a_start_at_the_tolerance_is_the_minimum():
    minimum = run([0.0, 0.0, 0.0], tol=9.0)
    np.testing.assert_array_equal(minimum.theta, 0)
    assert len(minimum.history) == 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_last_iterate_is_returned_when_told_to_stop(solver):
    seen = []

    def notify(record, theta):
        seen.append(theta)
        return record.iteration == 2

    minimum = run([0.0, 0.0, 0.0], solver=solver, tol=0.0, notify=notify)
    assert len(seen) == len(minimum.history) == 3
    np.testing.assert_array_equal(minimum.theta, seen[-1])


def test_the_last_step_is_the_direction_of_its_own_change():
    # The secant equation of quasi-Newton methods: whatever the sample's Hessian (here the unit
    # matrix), the last change of the gradient is answered by the last step.
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(3):
        step = rng.normal(size=3)
        pairs.append(_Pair(step, SCALE * step, float(step @ (SCALE * step))))

    class Unit:
        def solve(self, theta, right):
            return right.copy()

    at = _Point(np.zeros(3), 0.0, pairs[-1].change)
    np.testing.assert_allclose(_direction(Unit(), at, pairs), -pairs[-1].step, rtol=1e-13)


def test_a_sample_that_does_not_do_grows_to_all_rows():
    class Heavy(Quadratic):
        """Whose samples are one row, drawn many times."""

        n_rows = 20_000

        def sample(self, n):
            return Quadratic() if 2 * n <= self.n_rows else self

    curvature = _Curvature(Heavy(), 4096)
    for _ in range(3):
        curvature = curvature.larger()
    assert curvature.whole
