"""The objective of SoftmaxClassifier: its value by other means, its derivatives by differences."""

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.special import expit
from scipy.special import softmax as scipy_softmax

pytest.importorskip("sklearn")
from sklearn.metrics import log_loss

from crossent._multinomial import MultinomialObjective

N, D = 23, 5


def problem(n_classes, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(N, D))
    y = np.r_[np.arange(n_classes), rng.integers(n_classes, size=N - n_classes)]
    return X, y, rng.uniform(0.2, 3.0, N), rng


@pytest.mark.parametrize("n_classes", [2, 3, 7])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("C", [0.3, np.inf])
def test_value_is_the_objective_that_scikit_learn_documents(n_classes, weighted, fit_intercept, C):
    X, y, s, rng = problem(n_classes)
    s = s if weighted else np.ones(N)
    k = 1 if n_classes == 2 else n_classes
    W, b = rng.normal(size=(k, D)), rng.normal(size=k) * fit_intercept
    objective = MultinomialObjective(
        X,
        y,
        n_classes=n_classes,
        sample_weight=s if weighted else None,
        C=C,
        fit_intercept=fit_intercept,
    )
    value, _ = objective.value_and_grad(objective.pack(W, b))

    z = X @ W.T + b  # (N, K)
    proba = scipy_softmax(z, axis=1) if k > 1 else np.c_[expit(-z), expit(z)]  # (N, V)
    total = log_loss(y, proba, sample_weight=s, normalize=False)
    penalty = 0.0 if np.isinf(C) else 0.5 * (W**2).sum() / C
    # N rows of a few epsilons each, summed in another order
    assert value == pytest.approx((total + penalty) / s.sum(), rel=4 * N * np.finfo(float).eps)


CASES = {
    "two classes": (2, {}),
    "three classes": (3, {}),
    "weighted": (3, {"weighted": True}),
    "two classes, weighted, smoothed": (2, {"weighted": True, "label_smoothing": 0.2}),
    "without intercept": (4, {"fit_intercept": False}),
    "without penalty": (3, {"C": np.inf}),
    "soft labels": (3, {"soft": True, "label_smoothing": 0.1}),
    "two soft labels": (2, {"soft": True, "weighted": True}),
    "sparse": (3, {"sparse": True}),
    "sparse, two classes": (2, {"sparse": True, "weighted": True}),
}


def case(name):
    n_classes, options = CASES[name]
    options = dict(options)
    X, y, s, rng = problem(n_classes, seed=1)
    if options.pop("soft", False):
        y = rng.dirichlet(np.ones(n_classes), N)
    if options.pop("sparse", False):
        X[rng.random(X.shape) < 0.6] = 0.0
        X = csr_array(X)
    weight = s if options.pop("weighted", False) else None
    objective = MultinomialObjective(
        X, y, n_classes=n_classes, sample_weight=weight, **{"C": 0.5, **options}
    )
    size = objective.shape[0] * (D + objective.fit_intercept)
    return objective, rng.normal(size=size), rng.normal(size=size)


# A central difference of step h has a truncation error of h²/6 times a third derivative (below 10
# here) and a rounding error of a few epsilons over h: 2e-11 together at h = 2e-6.
STEP, ERROR = 2e-6, 1e-9


@pytest.mark.parametrize("name", CASES)
def test_gradient_equals_differences_of_the_value(name):
    objective, theta, _ = case(name)
    grad = objective.value_and_grad(theta)[1]
    for i, unit in enumerate(np.eye(theta.size)):
        above = objective.value_and_grad(theta + STEP * unit)[0]
        below = objective.value_and_grad(theta - STEP * unit)[0]
        assert grad[i] == pytest.approx((above - below) / (2 * STEP), abs=ERROR)


@pytest.mark.parametrize("name", CASES)
def test_hessian_vector_product_equals_differences_of_the_gradient(name):
    objective, theta, direction = case(name)
    above = objective.value_and_grad(theta + STEP * direction)[1]
    below = objective.value_and_grad(theta - STEP * direction)[1]
    np.testing.assert_allclose(
        objective.hvp(theta, direction), (above - below) / (2 * STEP), rtol=0, atol=ERROR
    )


@pytest.mark.parametrize("name", ["two classes", "three classes", "sparse"])
def test_remembered_points_are_not_mixed_up(name):
    objective, theta, direction = case(name)
    value, grad = objective.value_and_grad(theta)
    kept = grad.copy()
    curvature = objective.hvp(theta, direction)
    grad[:] = np.nan  # a caller may write into what it was given
    np.testing.assert_array_equal(objective.value_and_grad(theta)[1], kept)
    theta += direction  # and into what it gave
    assert objective.value_and_grad(theta)[0] == case(name)[0].value_and_grad(theta)[0] != value
    moved = objective.hvp(theta, direction)
    np.testing.assert_array_equal(moved, case(name)[0].hvp(theta, direction))
    assert (moved != curvature).any()


def test_pack_and_unpack_are_inverse():
    objective, theta, _ = case("three classes")
    coef, intercept = objective.unpack(theta)
    assert (coef.shape, intercept.shape) == ((3, D), (3,))
    np.testing.assert_array_equal(objective.pack(coef, intercept), theta)
    assert not np.shares_memory(coef, theta)
    assert not np.shares_memory(intercept, theta)


def test_float32_rows_add_up_in_float64():
    rng = np.random.default_rng(2)
    row, W = rng.normal(size=(1, D)), rng.normal(size=(3, D))
    n, theta = 5000, np.append(W.ravel(), rng.normal(size=3))
    alone, many = (
        MultinomialObjective(
            np.repeat(row.astype(np.float32), k, axis=0), np.full(k, 1), n_classes=3, C=np.inf
        ).value_and_grad(theta)
        for k in (1, n)
    )
    # Halves of an ulp are lost at every row if the total is a float32: 3e-8 relative at least.
    assert many[0] == pytest.approx(alone[0], rel=n * np.finfo(np.float64).eps)
    np.testing.assert_allclose(many[1], alone[1], rtol=0, atol=1e-6)
