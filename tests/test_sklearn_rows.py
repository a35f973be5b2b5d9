"""SoftmaxClassifier on many rows: the sample behind its Newton steps, memory, and bits."""

import threading
import tracemalloc
import warnings
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from scipy import sparse

pytest.importorskip("sklearn")
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from crossent import _inverse
from crossent._multinomial import MultinomialObjective
from crossent._preconditioner import DiagonalPreconditioner
from crossent.sklearn import SoftmaxClassifier

N, D, V = 20_000, 6, 3
ROWS = 4096  # that a Newton step looks at, at least


def many(n=N, d=D, n_classes=V, dtype=np.float64):
    rng = np.random.default_rng(0)
    X, W = rng.normal(size=(n, d)), rng.normal(size=(n_classes, d))
    y = np.argmax(X @ W.T + rng.gumbel(size=(n, n_classes)), axis=1)
    return X.astype(dtype), y, rng


def heavy_weights(rng):
    return np.where(rng.random(N) < 0.3, 0, np.exp(2 * rng.normal(size=N)))


@pytest.mark.parametrize("weighted", [False, True])
def test_a_sampled_hessian_leads_to_the_exact_minimum(weighted):
    X, y, rng = many()
    weight = heavy_weights(rng) if weighted else None
    ours = SoftmaxClassifier(C=1e-2, tol=1e-10).fit(X, y, weight)
    theirs = LogisticRegression(C=1e-2, tol=1e-10, solver="newton-cg").fit(X, y, weight)
    assert len(ours.history_) < 20
    # 1/μ = C Σs times the gradients' size, as in test_sklearn
    total = N if weight is None else weight.sum()
    bound = 2e-10 * np.sqrt(V * D) * 1e-2 * total
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=0, atol=bound)


def test_a_category_that_few_rows_have_is_not_missed():
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, 201) ** 2
    category = rng.choice(200, N, p=share / share.sum())
    scores = 2 * rng.normal(size=(200, V))
    y = np.argmax(scores[category] + rng.gumbel(size=(N, V)), axis=1)
    model = SoftmaxClassifier(C=1e3, tol=1e-6).fit(np.eye(200)[category], y)
    assert len(model.history_) < 20  # 50 where the rare ones seem to be free


@pytest.mark.parametrize("weight", [1e9, 1e12])
def test_one_row_of_nearly_all_the_weight_is_not_the_whole_sample(weight):
    X, y, _ = many()
    each = np.ones(N)
    each[7] = weight
    model = SoftmaxClassifier(tol=1e-8).fit(X, y, each)
    assert len(model.history_) < 25  # 40 where it may be


def test_fits_at_once_take_turns_with_the_threads_of_the_blas(monkeypatch):
    X, y, _ = many(100)
    met, waited = [], threading.Barrier(2)

    class Pools:
        @contextmanager
        def limit(self, **asked):
            assert asked == {"limits": 1, "user_api": "blas"}
            with suppress(threading.BrokenBarrierError):
                met.append(waited.wait(timeout=0.5))  # for the other, which must not come
            yield

    monkeypatch.setattr(_inverse, "_blas", Pools)
    both = [
        threading.Thread(
            target=objective(X, y).preconditioner().update, args=(np.zeros(V * D + V),)
        )
        for _ in range(2)
    ]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert not met


def objective(X, y, weight=None, **options):
    return MultinomialObjective(X, y, n_classes=V, sample_weight=weight, **options)


def test_a_sample_is_the_same_rows_at_every_call():
    X, y, _ = many()
    first, second = (objective(X, y).sample(ROWS) for _ in "12")
    assert first.n_rows == ROWS
    np.testing.assert_array_equal(first.X, second.X)
    rows = {tuple(row): label for row, label in zip(X, y, strict=True)}
    assert [rows[tuple(row)] for row in first.X] == list(first.target)
    assert len({tuple(row) for row in first.X}) == ROWS


def test_a_sample_is_drawn_in_proportion_to_the_weights():
    X, y, rng = many()
    X[:, 0] = np.arange(N)
    weight = heavy_weights(rng)
    sample = objective(X, y, weight).sample(ROWS)
    drawn = sample.X[:, 0].astype(int)
    assert (weight[drawn] > 0).all()
    assert sample.sample_weight.sum() == ROWS
    # Of a row that n·share of the points fall upon, one more or one less may.
    expected = ROWS * weight / weight.sum()
    counts = np.zeros(N)
    counts[drawn] = sample.sample_weight
    assert (np.abs(counts - expected) <= 1 + 1e-6).all()


def test_a_sample_of_half_the_rows_is_all_of_them():
    X, y, _ = many()
    whole = objective(X, y)
    assert whole.sample(N // 2 + 1) is whole
    assert whole.sample(N // 2).n_rows == N // 2


def test_a_sample_has_the_penalty_of_all_rows():
    X, y, _ = many()
    whole = objective(X, y, C=0.5)
    sample = whole.sample(ROWS)
    theta = np.ones(V * D + V)
    bare = objective(sample.X, sample.target, C=np.inf)
    added = sample.value_and_grad(theta)[0] - bare.value_and_grad(theta)[0]
    assert added == pytest.approx(0.5 * V * D / (0.5 * N), rel=1e-9)


def peak_of_a_fit(X, y, **options):
    SoftmaxClassifier(max_iter=3, tol=1e9).fit(X[:100], y[:100])  # what is imported or kept once
    tracemalloc.start()
    try:
        model = SoftmaxClassifier(**options).fit(X, y)
        return model, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("solver", ["newton-cg", "lbfgs"])
def test_nothing_of_the_size_of_the_logits_is_held(solver):
    X, y, _ = many(100_000, 4, 50, np.float32)
    _, peak = peak_of_a_fit(X, y, solver=solver, C=1e-3, tol=1e-3)
    assert peak < 100_000 * 50 * 4 / 2


def test_memory_mapped_features_are_not_copied(tmp_path):
    X, y, _ = many(50_000, 64, 3, np.float32)
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    model, peak = peak_of_a_fit(mapped, y)
    assert peak < X.nbytes / 2
    np.testing.assert_array_equal(model.coef_, SoftmaxClassifier().fit(X, y).coef_)


def test_the_threads_of_the_blas_do_not_change_a_bit():
    X, y, _ = many(2000, 300)
    coefs = []
    for count in (1, 2):
        with threadpool_limits(count, user_api="blas"):
            coefs.append(SoftmaxClassifier().fit(X, y).coef_.tobytes())
    assert coefs[0] == coefs[1]


@pytest.mark.parametrize("d", [D, 1500])  # beyond 1024 features there is no Gram matrix
def test_both_preconditioners_reach_the_tolerance(d):
    X, y, _ = many(300, d)
    model = SoftmaxClassifier(C=1.0, tol=1e-9).fit(X, y)
    assert model.history_[-1].gradient_norm <= 1e-9


@pytest.mark.parametrize("C", [1.0, np.inf])
@pytest.mark.parametrize("d", [D, 1500])  # with each of the preconditioners
@pytest.mark.parametrize("solver", ["newton-cg", "lbfgs"])
def test_what_no_probability_shows_stays_zero(C, d, solver):
    X, y, _ = many(300, d)
    model = SoftmaxClassifier(C=C, solver=solver, tol=1e-7).fit(X, y)
    assert abs(model.intercept_.sum()) < 1e-12
    if np.isinf(C):  # else the penalty's own minimum has it, to the tolerance
        assert np.abs(model.coef_.sum(axis=0)).max() < 1e-12


@pytest.mark.parametrize("C", [1e12, np.inf])
@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_copies_of_features_do_not_carry_a_float32_fit_away(C, n_classes, seed):
    rng = np.random.default_rng(seed)
    X, y = rng.normal(size=(60, 4)), rng.integers(0, n_classes, 60)
    X = np.c_[X, X, np.ones((60, 2)), X[:, :1]].astype(np.float32)
    model = SoftmaxClassifier(C=C, tol=1e-5).fit(X, y)  # a warning is an error here
    assert np.abs(model.coef_).max() < 100


def test_features_of_very_different_scales():
    X, y, _ = many(300)
    scales = 10.0 ** np.linspace(-3, 3, D)
    even = SoftmaxClassifier(C=np.inf, tol=1e-9).fit(X, y)
    uneven = SoftmaxClassifier(C=np.inf, tol=1e-8).fit(X * scales, y)
    assert len(uneven.history_) <= len(even.history_) + 5
    # A gradient of 1e-8 is 1e-5 of the smallest feature itself, and F of the second order in it.
    assert uneven.history_[-1].objective == pytest.approx(even.history_[-1].objective, abs=1e-8)


@pytest.mark.parametrize("container", [np.asarray, sparse.csr_array])
@pytest.mark.parametrize("fit_intercept", [True, False])
def test_for_two_classes_the_gram_matrix_is_the_hessian(container, fit_intercept):
    X, y, rng = many(500, n_classes=2)
    problem = MultinomialObjective(
        container(X),
        y,
        n_classes=2,
        sample_weight=rng.uniform(0, 2, 500),
        C=0.1,
        fit_intercept=fit_intercept,
    )
    theta, direction = rng.normal(size=(2, D + fit_intercept))
    gram = problem.preconditioner()
    gram.update(theta)
    hessian = np.array([problem.hvp(theta, unit) for unit in np.eye(theta.size)])
    found = gram.solve(hessian @ direction)
    # but for the share of the diagonal that keeps it from being singular
    lifted = hessian + np.sqrt(np.finfo(float).eps) * np.diag(hessian.diagonal())
    np.testing.assert_allclose(lifted @ found, hessian @ direction, rtol=0, atol=1e-13)


def test_the_diagonal_is_what_it_says():
    X, y, rng = many(500)
    problem = objective(X, y, rng.uniform(0, 2, 500), C=0.1)
    theta = rng.normal(size=V * (D + 1))
    diagonal = DiagonalPreconditioner(problem)
    diagonal.update(theta)
    chunks = list(problem.probabilities(theta))
    (x, p, s), *more = chunks
    assert not more
    spread = (s[:, None] * p * (1 - p)).sum(axis=0)
    expected = np.append(np.outer(spread, s @ x**2) + problem.ridge, spread)
    residual = rng.normal(size=theta.size)
    residual[-V:] -= residual[-V:].mean()
    found = residual / expected
    found[-V:] -= found[-V:].mean()
    np.testing.assert_allclose(diagonal.solve(residual), found, rtol=1e-12)


@pytest.mark.parametrize("C", [1.0, np.inf])
@pytest.mark.parametrize(("dtype", "smallest"), [(np.float32, 1e-7), (np.float64, 1e-15)])
def test_a_fit_goes_on_to_the_last_bit_and_stays_there(C, dtype, smallest):
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    X = (rng.normal(size=(3, 4))[y] + rng.normal(size=(60, 4))).astype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it may or may not reach 0
        model = SoftmaxClassifier(C=C, tol=0).fit(X, y)
    assert len(model.history_) < 60
    assert model.history_[-1].gradient_norm < smallest
    assert np.abs(model.intercept_).max() < 10


def test_skops_keeps_a_fitted_classifier():
    io = pytest.importorskip("skops.io")
    X, y, _ = many(300)
    model = SoftmaxClassifier().fit(X, y)
    saved = io.dumps(model)
    own = ["crossent.sklearn.FitRecord", "crossent.sklearn.SoftmaxClassifier"]
    assert io.get_untrusted_types(data=saved) == own
    again = io.loads(saved, trusted=own)
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))
    assert again.history_ == model.history_
