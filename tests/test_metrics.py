"""Calibration, intervals and confusions against values by hand and by scikit-learn."""

import numpy as np
import pytest

pytest.importorskip("sklearn")
from sklearn.metrics import confusion_matrix, log_loss

from crossent.cli.metrics import calibration, confusions, evaluate, wilson_interval
from crossent.cli.model_file import SavedModel
from crossent.cli.scaling import Scaling

RNG = np.random.default_rng(0)


def test_calibration_by_its_definition():
    p = RNG.dirichlet(np.ones(4), 500)
    labels = RNG.integers(0, 4, 500)
    found = calibration(p, labels)
    confidence, hits = p.max(axis=1), p.argmax(axis=1) == labels
    error = 0.0
    for place in range(15):
        inside = (confidence > place / 15) & (confidence <= (place + 1) / 15)
        assert found.rows[place] == inside.sum()
        assert found.correct[place] == hits[inside].sum()
        if inside.any():
            error += inside.mean() * abs(hits[inside].mean() - confidence[inside].mean())
    assert found.error == pytest.approx(error, rel=1e-12)


def test_calibration_at_the_ends():
    certain = calibration(np.array([[1.0, 0], [1.0, 0]]), np.array([0, 1]), bins=2)
    assert (certain.rows.tolist(), certain.error) == ([0, 2], 0.5)
    even = calibration(np.array([[0.5, 0.5]]), np.array([0]), bins=2)
    assert even.rows.tolist() == [1, 0]  # an upper edge belongs to its bin


def test_wilson_interval_by_its_equation():
    """Its ends are the shares p at which (correct/n − p)² = z²·p(1 − p)/n."""
    z = 1.959963984540054
    for correct, rows in ((0, 5), (5, 5), (90, 100), (1, 3)):
        for end in wilson_interval(correct, rows):
            gap = (correct / rows - end) ** 2 - z * z * end * (1 - end) / rows
            assert abs(gap) < 1e-14
        low, high = wilson_interval(correct, rows)
        assert 0 <= low <= correct / rows <= high <= 1


@pytest.mark.parametrize("classes", [2, 5])
def test_evaluation_agrees_with_scikit_learn(classes):
    vectors = 1 if classes == 2 else classes
    model = SavedModel(
        coef=RNG.normal(size=(vectors, 3)),
        intercept=RNG.normal(size=vectors),
        scaling=Scaling(np.zeros(3), np.ones(3)),
        classes=list(range(classes)),
        feature_names=["a", "b", "c"],
        image_shape=None,
    )
    x, labels = RNG.normal(size=(200, 3)), RNG.integers(0, classes, 200)
    found = evaluate(model, x, labels)
    assert found.loss == pytest.approx(
        log_loss(labels, found.probabilities, labels=model.classes), rel=1e-12
    )
    matrix = confusion_matrix(labels, found.predicted, labels=model.classes)
    assert found.accuracy == np.trace(matrix) / 200
    rows, predicted, correct = found.class_counts()
    np.testing.assert_array_equal(rows, matrix.sum(axis=1))
    np.testing.assert_array_equal(predicted, matrix.sum(axis=0))
    np.testing.assert_array_equal(correct, np.diag(matrix))
    listed = confusions(found.predicted, labels, classes)
    assert {(true, answer): count for true, answer, count in listed} == {
        (true, answer): matrix[true, answer]
        for true in range(classes)
        for answer in range(classes)
        if true != answer and matrix[true, answer]
    }
    counts = [count for *_, count in listed]
    assert counts == sorted(counts, reverse=True)
