"""What SoftmaxClassifier says to parameters and data it cannot use."""

import re

import numpy as np
import pytest

pytest.importorskip("sklearn")
from sklearn.exceptions import DataConversionWarning

from crossent.sklearn import SoftmaxClassifier

Y = np.arange(60) % 3
X = np.random.default_rng(0).normal(size=(60, 4)) + Y[:, None]
THIRDS = np.full((60, 3), 1 / 3)


def changed(array, index, value):
    array = np.array(array, dtype=np.float64)
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"C": 0}, "The 'C' parameter of SoftmaxClassifier must be a number in (0, inf]"),
        ({"C": -1.0}, "Got -1.0 instead."),
        ({"C": np.nan}, "'C'"),
        ({"C": "1"}, "'C'"),
        ({"C": True}, "'C'"),
        ({"tol": -1e-9}, "'tol' parameter of SoftmaxClassifier must be a number in [0, inf]"),
        ({"tol": np.nan}, "'tol'"),
        ({"max_iter": 0}, "'max_iter' parameter of SoftmaxClassifier must be an integer of at"),
        ({"max_iter": 1.5}, "'max_iter'"),
        ({"solver": "sag"}, "must be 'lbfgs' or 'newton-cg'. Got 'sag' instead."),
        ({"fit_intercept": 1}, "'fit_intercept' parameter of SoftmaxClassifier must be True or"),
        ({"warm_start": "no"}, "'warm_start'"),
        ({"class_weight": "auto"}, "must be a dict of weights by class label, 'balanced' or None"),
        ({"class_weight": [1, 2]}, "'class_weight'"),
        ({"class_weight": {7: 1.0}}, "are not in class_weight"),
        ({"class_weight": {0: -1.0}}, "must not be negative: the smallest row weight is -1"),
        ({"class_weight": {0: 0, 1: 0, 2: 0}}, "all row weights are zero after class_weight"),
        ({"callback": 3}, "The 'callback' parameter of SoftmaxClassifier must be a callable or"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"label_smoothing": np.nan}, "label_smoothing"),
    ],
)
def test_bad_parameters(params, text):
    model = SoftmaxClassifier(**params)
    with pytest.raises(ValueError, match=re.escape(text)):
        model.fit(X, Y)
    assert vars(model).keys() == SoftmaxClassifier().get_params().keys()


@pytest.mark.parametrize(
    ("X", "y", "sample_weight", "text"),
    [
        (
            X,
            np.zeros(60),
            None,
            "needs samples of at least 2 classes in y, but it contains only one",
        ),
        (X, Y[:-1], None, "inconsistent numbers of samples: [60, 59]"),
        (X, np.c_[Y, Y], None, "y should be a 1d array, got an array of shape (60, 2) instead"),
        (X, Y + 0.5, None, "Unknown label type: continuous"),
        (X, None, None, "requires y to be passed, but the target y is None"),
        (X[:, 0], Y, None, "Expected 2D array, got 1D array instead"),
        (X[:0], Y[:0], None, "Found array with 0 sample(s)"),
        (changed(X, (3, 1), np.nan), Y, None, "Input X contains NaN"),
        (changed(X, (3, 1), np.inf), Y, None, "Input X contains infinity"),
        (X, changed(Y, 3, np.nan), None, "Input y contains NaN"),
        (changed(X, Y == 0, 1e308), Y, None, "not finite at iteration 0: the features"),
        (X, Y, np.ones(59), "sample_weight has shape (59,), expected (60,)"),
        (X, Y, np.ones((60, 1)), "sample_weight has shape (60, 1), expected (60,)"),
        (X, Y, changed(np.ones(60), 5, np.nan), "Input sample_weight contains NaN"),
        (X, Y, changed(np.ones(60), 5, -2), "must not be negative: the smallest row weight is -2"),
        (X, Y, np.zeros(60), "Sample weights must contain at least one non-zero number"),
        (
            X,
            Y,
            np.full(60, 1e307),
            "add up to inf, too much for float64",
        ),
        (X, Y, np.full(60, 1e-320), "so small that the penalty"),
        (X, changed(THIRDS, (3, 1), 0.5), None, "y[3] has minimum 0.333333 and sum 1.16667"),
        (X, changed(THIRDS, 3, [-1, 1, 1]), None, "y[3] has minimum -1 and sum 1. Divide each row"),
        (X, changed(THIRDS, (3, 1), np.nan), None, "Input y contains NaN"),
    ],
)
def test_bad_data(X, y, sample_weight, text):
    model = SoftmaxClassifier()
    with pytest.raises(ValueError, match=re.escape(text)):
        model.fit(X, y, sample_weight)
    assert vars(model) == vars(SoftmaxClassifier())


def test_a_c_so_small_that_the_penalty_overflows_is_named():
    with pytest.raises(ValueError, match="C is 1e-312 and the row weights add up to 60, so small"):
        SoftmaxClassifier(C=1e-312).fit(X, Y)


def test_the_smallest_c_is_a_penalty_like_another():
    model = SoftmaxClassifier(C=1e-300).fit(X, Y)
    assert np.abs(model.coef_).max() < 1e-30


def test_distributions_of_a_wider_dtype():
    rows = np.random.default_rng(0).random((60, 3)).astype(np.longdouble)
    rows /= rows.sum(axis=1, keepdims=True)
    narrow = SoftmaxClassifier().fit(X, rows.astype(float))
    np.testing.assert_array_equal(SoftmaxClassifier().fit(X, rows).coef_, narrow.coef_)


def test_class_weight_needs_labels():
    with pytest.raises(ValueError, match="class_weight needs class labels, but y holds distrib"):
        SoftmaxClassifier(class_weight="balanced").fit(X, THIRDS)


def test_a_float_column_is_labels_not_distributions():
    model = SoftmaxClassifier()
    with pytest.warns(DataConversionWarning, match="A column-vector y was passed"):
        model.fit(X, Y[:, None].astype(float))
    np.testing.assert_array_equal(model.classes_, [0.0, 1.0, 2.0])


def test_the_wrong_number_of_features_is_refused():
    with pytest.raises(ValueError, match="X has 3 features, but SoftmaxClassifier is expecting 4"):
        SoftmaxClassifier().fit(X, Y).predict(X[:, :3])


def test_labels_without_an_order_are_refused_by_name():
    y = np.array(["a", 1, None] * 4, object)
    with pytest.raises(TypeError, match=r"SoftmaxClassifier\.fit: y mixes labels"):
        SoftmaxClassifier().fit(np.arange(12.0).reshape(12, 1), y)
