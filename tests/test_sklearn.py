"""SoftmaxClassifier: agreement with LogisticRegression, and its behaviour as an estimator."""

import pickle
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from scipy import sparse

pytest.importorskip("sklearn")
from sklearn import config_context
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import crossent
from crossent._multinomial import MultinomialObjective
from crossent.sklearn import FitProgress, SoftmaxClassifier

SOLVERS = ["lbfgs", "newton-cg"]


@parametrize_with_checks([SoftmaxClassifier(max_iter=1000, solver=s) for s in SOLVERS])
def test_scikit_learn_checks(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return StandardScaler().fit_transform(X), y


@pytest.fixture(scope="module")
def tumours():
    X, y = load_breast_cancer(return_X_y=True)
    return StandardScaler().fit_transform(X), np.array(["malignant", "benign"])[y]


def blobs(n_classes=3, n=60, d=4, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % n_classes
    return rng.normal(size=(n_classes, d))[y] + rng.normal(size=(n, d)), y


# Agreement with LogisticRegression.
#
# With μ = 1/(C·Σs) both objectives, divided by C·Σs, are μ-strongly convex in W, so two points with
# gradients g and h differ by at most (‖g‖ + ‖h‖)/μ in W, up to the share of the unpenalised b. At
# a largest entry of 2e-9 in P = 650 entries and 1/μ = C·Σs = 18 that is 1.8e-6; the objectives then
# differ by less than 2e-13.
TOL, C, COEF_ERROR = 1e-9, 0.01, 2e-6


def assert_agrees(X, y, *, sample_weight=None, loosen=1.0, **params):
    options = {"C": C, "tol": TOL, "max_iter": 500, **params}
    theirs = LogisticRegression(**options, solver="newton-cg").fit(X, y, sample_weight)
    ours = SoftmaxClassifier(**options, solver="newton-cg").fit(X, y, sample_weight)
    assert ours.coef_.shape == theirs.coef_.shape
    assert ours.intercept_.shape == theirs.intercept_.shape
    np.testing.assert_array_equal(ours.classes_, theirs.classes_)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=0, atol=COEF_ERROR)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-5)
    np.testing.assert_allclose(
        ours.decision_function(X), theirs.decision_function(X), rtol=0, atol=1e-4
    )
    return ours, theirs


def objective_at(model, X, y, **options):
    objective = MultinomialObjective(
        X, np.unique(y, return_inverse=True)[1], n_classes=len(model.classes_), C=model.C, **options
    )
    return objective.value_and_grad(objective.pack(model.coef_, model.intercept_))


@pytest.mark.parametrize("data", ["digits", "tumours"])
def test_same_minimum_as_logistic_regression(data, request):
    X, y = request.getfixturevalue(data)
    ours, theirs = assert_agrees(X, y)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, rtol=0, atol=1e-5)
    (value, grad), (their_value, their_grad) = (objective_at(m, X, y) for m in (ours, theirs))
    assert value == pytest.approx(their_value, rel=1e-12)
    assert np.abs(grad).max() <= TOL
    assert np.abs(their_grad).max() <= TOL
    assert ours.history_[-1].objective == pytest.approx(value, rel=1e-14)


@pytest.mark.parametrize("data", ["digits", "tumours"])
def test_lbfgs_walks_the_same_path_as_scikit_learns(data, request):
    X, y = request.getfixturevalue(data)
    ours = SoftmaxClassifier(C=C, solver="lbfgs").fit(X, y)
    theirs = LogisticRegression(C=C).fit(X, y)
    assert ours.n_iter_ == theirs.n_iter_
    # 20 iterations from the same start amplify the rounding of a different order of summation
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=0, atol=1e-9)


def test_without_intercept(digits):
    ours, _ = assert_agrees(*digits, fit_intercept=False)
    np.testing.assert_array_equal(ours.intercept_, np.zeros(10))


def test_two_classes_without_intercept(tumours):
    ours, _ = assert_agrees(*tumours, fit_intercept=False)
    np.testing.assert_array_equal(ours.intercept_, np.zeros(1))


@pytest.mark.parametrize("data", ["digits", "tumours"])
@pytest.mark.parametrize("class_weight", [None, "balanced", "dict"])
def test_weights(data, class_weight, request):
    X, y = request.getfixturevalue(data)
    weight = np.random.default_rng(0).uniform(0, 2, len(y))
    if class_weight == "dict":
        class_weight = {np.unique(y)[1]: 2.5}
    assert_agrees(X, y, sample_weight=weight, class_weight=class_weight)


@pytest.mark.parametrize("data", ["digits", "tumours"])
@pytest.mark.parametrize("container", [sparse.csr_array, sparse.csc_matrix, sparse.coo_array])
def test_sparse_features_are_not_made_dense(data, container, request, monkeypatch):
    X, y = request.getfixturevalue(data)
    X = np.where(X > 0, X, 0.0)
    dense = SoftmaxClassifier(C=C, tol=TOL, solver="newton-cg").fit(X, y)

    def guard(known):
        def guarded(self, *args, **kwargs):
            assert len(y) not in self.shape, "a sparse X was made dense"
            return known(self, *args, **kwargs)

        return guarded

    for kind in (sparse.csr_array, sparse.csr_matrix, sparse.csc_array, sparse.csc_matrix):
        for name in ("toarray", "todense"):
            monkeypatch.setattr(kind, name, guard(getattr(kind, name)))
    X = container(X)
    model = SoftmaxClassifier(C=C, tol=TOL, solver="newton-cg").fit(X, y)
    np.testing.assert_allclose(model.coef_, dense.coef_, rtol=0, atol=COEF_ERROR)
    np.testing.assert_array_equal(model.predict(X), dense.predict(X))
    assert model.predict_proba(X).shape == (len(y), len(model.classes_))


def test_an_infinite_c_fits_without_penalty():
    X, y = blobs()
    ours = SoftmaxClassifier(C=np.inf, tol=1e-8, solver="newton-cg").fit(X, y)
    theirs = LogisticRegression(C=np.inf, tol=1e-8, solver="newton-cg").fit(X, y)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-6)


# Data types, rows and targets


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("dtype", "kept"), [("f4", "f4"), ("f8", "f8"), ("f2", "f8"), ("i4", "f8"), (">f8", "f8")]
)
def test_dtype(dtype, kept, solver):
    X, y = blobs()
    X = (4 * X).astype(dtype)
    model = SoftmaxClassifier(solver=solver).fit(X, y)
    for array in (
        model.coef_,
        model.intercept_,
        model.predict_proba(X),
        model.decision_function(X),
    ):
        assert array.dtype == np.dtype(kept)


@pytest.mark.parametrize("data", ["digits", "tumours"])
def test_the_memory_order_of_x_does_not_change_a_bit(data, request):
    X, y = request.getfixturevalue(data)
    wide = np.repeat(X, 2, axis=1)
    coef = SoftmaxClassifier().fit(X, y).coef_
    for same in (np.asfortranarray(X), wide[:, ::2]):
        np.testing.assert_array_equal(SoftmaxClassifier().fit(same, y).coef_, coef)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_float32_reaches_the_float64_minimum(n_classes):
    X, y = blobs(n_classes, n=6000)
    single = SoftmaxClassifier(tol=1e-5, C=C).fit(X.astype(np.float32), y)
    double = SoftmaxClassifier(tol=1e-9, C=C, solver="newton-cg").fit(X, y)
    # ‖g‖ is at most √15 · 1e-5 and 1/μ = C·N = 60
    np.testing.assert_allclose(single.coef_, double.coef_, rtol=0, atol=60 * 15**0.5 * 1e-5)


def test_integer_weights_repeat_rows():
    X, y = blobs()
    times = np.random.default_rng(1).integers(0, 4, len(y))
    options = {"tol": 1e-10, "solver": "newton-cg", "class_weight": "balanced"}
    weighted = SoftmaxClassifier(**options).fit(X, y, times)
    repeated = SoftmaxClassifier(**options).fit(np.repeat(X, times, 0), np.repeat(y, times))
    np.testing.assert_allclose(weighted.coef_, repeated.coef_, rtol=0, atol=1e-7)


def test_a_class_without_weight_does_not_upset_the_balance():
    X, y = blobs()
    weight = np.where(y == 0, 0.0, 1.0)
    given = weight.copy()
    model = SoftmaxClassifier(class_weight="balanced").fit(X, y, weight)
    np.testing.assert_array_equal(weight, given)
    assert model.coef_.shape == (3, 4)
    assert set(model.predict(X)) == {1, 2}


def test_scalar_sample_weight_scales_c():
    X, y = blobs()
    options = {"tol": 1e-10, "solver": "newton-cg"}
    scaled = SoftmaxClassifier(**options, C=0.1).fit(X, y, 5.0)
    plain = SoftmaxClassifier(**options, C=0.5).fit(X, y)
    np.testing.assert_allclose(scaled.coef_, plain.coef_, rtol=0, atol=1e-7)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_soft_labels_are_weighted_copies_of_each_row(n_classes):
    X, _ = blobs(n_classes)
    Q = np.random.default_rng(2).dirichlet(np.ones(n_classes), len(X))
    options = {"tol": 1e-10, "solver": "newton-cg"}
    soft = SoftmaxClassifier(**options).fit(X, Q)
    copies = SoftmaxClassifier(**options).fit(
        np.repeat(X, n_classes, 0), np.tile(np.arange(n_classes), len(X)), Q.ravel()
    )
    np.testing.assert_array_equal(soft.classes_, np.arange(n_classes))
    np.testing.assert_allclose(soft.coef_, copies.coef_, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_label_smoothing_mixes_in_the_uniform_distribution(n_classes, dtype):
    X, y = blobs(n_classes)
    Q = (0.75 * np.eye(n_classes)[y] + 0.25 / n_classes).astype(dtype)
    options = {"tol": 1e-6, "solver": "newton-cg"}
    smoothed = SoftmaxClassifier(**options, label_smoothing=0.25).fit(X, y)
    mixed = SoftmaxClassifier(**options).fit(X, Q)
    # the distributions' own rounding moves the gradient by as much, times the largest x; 1/μ is 60
    atol = 60 * (2e-6 + np.abs(X).max() * np.finfo(dtype).eps)
    np.testing.assert_allclose(smoothed.coef_, mixed.coef_, rtol=0, atol=atol)


# The fit: convergence, warm start, progress, interruption


@pytest.mark.parametrize("solver", SOLVERS)
def test_not_converged_says_where_it_got_to_and_what_to_do(digits, solver):
    model = SoftmaxClassifier(max_iter=3, solver=solver)
    with pytest.warns(ConvergenceWarning) as caught:
        model.fit(*digits)
    (warning,) = caught
    last = model.history_[-1]
    assert str(warning.message) == (
        f"SoftmaxClassifier: solver '{solver}' reached max_iter=3, with objective "
        f"{last.objective:.6g} and largest gradient entry {last.gradient_norm:.3g}, above "
        "tol=0.0001; scale the features (StandardScaler), raise max_iter, or loosen tol."
    )
    assert warning.filename == __file__
    assert model.n_iter_ == 3
    assert model.coef_.any()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_tolerance_below_rounding_warns(solver):
    X, y = blobs()
    with pytest.warns(ConvergenceWarning, match="no further decrease.*pass float32 X as float64"):
        SoftmaxClassifier(tol=0, solver=solver).fit(X.astype(np.float32), y)


@pytest.mark.parametrize("solver", SOLVERS)
def test_history(digits, solver):
    X, y = digits
    model = SoftmaxClassifier(solver=solver, C=C).fit(X, y)
    history = model.history_
    assert [record.iteration for record in history] == list(range(model.n_iter_[0] + 1))
    assert history[0].objective == pytest.approx(np.log(10), rel=1e-14)
    assert all(a.objective >= b.objective for a, b in pairwise(history))
    assert all(a.seconds <= b.seconds for a, b in pairwise(history))
    value, grad = objective_at(model, X, y)
    assert (history[-1].objective, history[-1].gradient_norm) == (value, np.abs(grad).max())
    assert history[-1].gradient_norm <= model.tol < history[-2].gradient_norm
    assert tuple(history[-1]) == (model.n_iter_[0], *history[-1][1:])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("data", ["digits", "tumours"])
def test_warm_start_goes_on_from_the_last_fit(solver, data, request):
    X, y = request.getfixturevalue(data)
    model = SoftmaxClassifier(warm_start=True, solver=solver).fit(X, y)
    end = model.history_[-1]
    model.fit(X, y)
    assert model.n_iter_ == 0
    assert model.history_[0].objective == end.objective
    assert model.set_params(warm_start=False).fit(X, y).n_iter_ > 0


@pytest.mark.parametrize("change", ["features", "classes"])
def test_warm_start_refuses_another_problem(change):
    X, y = blobs()
    model = SoftmaxClassifier(warm_start=True).fit(X, y)
    before = dict(model.__dict__)
    X, y = (X[:, :2], y) if change == "features" else (X, y + 1)
    with pytest.raises(ValueError, match="warm_start: the last fit had 4 features and the classes"):
        model.fit(X, y)
    assert model.__dict__ == before


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("how", ["return", "raise"])
@pytest.mark.parametrize("last", [0, 4])
def test_callback_stops_the_fit(digits, solver, how, last):
    seen = []

    def stop(progress):
        seen.append(progress)
        if progress.iteration < last:
            return None
        if how == "raise":
            raise StopIteration
        return True

    model = SoftmaxClassifier(callback=stop, solver=solver).fit(*digits)  # and does not warn
    assert all(isinstance(progress, FitProgress) for progress in seen)
    assert [progress.iteration for progress in seen] == list(range(last + 1))
    assert model.n_iter_ == last
    np.testing.assert_array_equal(model.coef_, seen[-1].coef)
    np.testing.assert_array_equal(model.intercept_, seen[-1].intercept)
    assert [(p.iteration, p.objective, p.gradient_norm, p.seconds) for p in seen] == model.history_


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_fit_changes_nothing(error):
    def interrupt(progress):
        if progress.iteration == 2:
            raise error

    X, y = blobs()
    model = SoftmaxClassifier(callback=interrupt)
    with pytest.raises(error):
        model.fit(X, y)
    with pytest.raises(NotFittedError):
        model.predict(X)
    assert not hasattr(model, "n_features_in_")

    model.set_params(callback=None, warm_start=True).fit(X, y)
    model.set_params(callback=interrupt, tol=0)
    before = dict(model.__dict__)
    with pytest.raises(error):
        model.fit(X + 1, y)
    assert model.__dict__ == before


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("data", ["digits", "tumours"])
def test_the_number_of_threads_does_not_change_a_bit(solver, data, request):
    threads = crossent.get_num_threads()
    coefs = []
    try:
        for count in (1, 2):
            crossent.set_num_threads(count)
            model = SoftmaxClassifier(solver=solver).fit(*request.getfixturevalue(data))
            coefs.append((model.coef_.tobytes(), model.intercept_.tobytes()))
    finally:
        crossent.set_num_threads(threads)
    assert coefs[0] == coefs[1]


# As an estimator


def test_probabilities_keep_what_underflows():
    model = SoftmaxClassifier().fit(*blobs(2))
    model.coef_, model.intercept_ = np.array([[1000.0, 0, 0, 0]]), np.zeros(1)
    X = np.array([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]])
    np.testing.assert_array_equal(model.predict_proba(X), [[0, 1], [1, 0]])
    np.testing.assert_array_equal(model.predict_log_proba(X), [[-1000, 0], [0, -1000]])
    np.testing.assert_array_equal(model.predict(X), [1, 0])


@pytest.mark.parametrize("n_classes", [2, 3])
def test_shapes_and_labels(n_classes):
    X, y = blobs(n_classes)
    names = np.array(["ash", "birch", "cedar"])
    model = SoftmaxClassifier().fit(X, names[y])
    rows = 1 if n_classes == 2 else 3
    assert model.coef_.shape == (rows, 4)
    assert model.intercept_.shape == (rows,)
    assert model.decision_function(X).shape == ((60,) if n_classes == 2 else (60, 3))
    assert model.predict_log_proba(X).shape == model.predict_proba(X).shape == (60, n_classes)
    assert model.n_iter_.shape == (1,)
    assert set(model.predict(X)) <= set(names)
    best = model.classes_[model.predict_proba(X).argmax(axis=1)]
    np.testing.assert_array_equal(model.predict(X), best)


def test_pickle_and_clone():
    X, y = blobs()
    model = SoftmaxClassifier(C=0.5).fit(X, y)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))
    assert again.history_ == model.history_
    assert clone(model).get_params() == model.get_params()
    assert not hasattr(clone(model), "coef_")


def test_inside_other_estimators(digits):
    X, y = digits[0][:600], digits[1][:600]
    search = GridSearchCV(
        make_pipeline(StandardScaler(), SoftmaxClassifier()),
        {"softmaxclassifier__C": [1e-6, 0.1]},
        cv=3,
    ).fit(X, y)
    assert search.best_params_ == {"softmaxclassifier__C": 0.1}
    calibrated = CalibratedClassifierCV(SoftmaxClassifier(), cv=3).fit(X, y)
    np.testing.assert_allclose(calibrated.predict_proba(X).sum(axis=1), 1)
    assert calibrated.score(X, y) > 0.9


def test_sample_weight_is_routed():
    X, y = blobs()
    weight = np.where(y == 0, 0.0, 1.0)
    with config_context(enable_metadata_routing=True):
        model = SoftmaxClassifier().set_fit_request(sample_weight=True)
        model.set_score_request(sample_weight=False)
        result = cross_validate(
            model, X, y, params={"sample_weight": weight}, return_estimator=True
        )
    for fitted in result["estimator"]:
        assert not (fitted.predict(X) == 0).any()


def test_column_names():
    pandas = pytest.importorskip("pandas")
    X, y = blobs()
    table = pandas.DataFrame(X, columns=list("abcd"))
    model = SoftmaxClassifier().fit(table, pandas.Series(y, index=np.arange(len(y))[::-1]))
    np.testing.assert_array_equal(model.feature_names_in_, list("abcd"))
    np.testing.assert_array_equal(model.coef_, SoftmaxClassifier().fit(X, y).coef_)
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(table[list("dcba")])


# Imports


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_package_does_not_import_scikit_learn():
    assert python("import sys, crossent; print('sklearn' in sys.modules)") == "False"


def test_without_scikit_learn_the_import_says_what_to_install():
    code = """
import sys
sys.modules["sklearn"] = None
try:
    import crossent.sklearn
except ImportError as error:
    print(error)
"""
    text = python(code)
    assert text.startswith("crossent.sklearn needs scikit-learn (")
    assert text.endswith("); pip install crossent[sklearn]")
