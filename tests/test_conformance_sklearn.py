"""`crossent` against scikit-learn's multinomial loss: what is the same, what differs and why."""

import math

import numpy as np
import pytest

pytest.importorskip("sklearn")
from sklearn._loss import HalfMultinomialLoss

import crossent

N, V = 40, 7
DTYPES = [np.float32, np.float64]


def problem(dtype, n_classes=V, seed=0):
    rng = np.random.default_rng(seed)
    raw = (3 * rng.normal(size=(N, n_classes))).astype(dtype)
    y = rng.integers(n_classes, size=N)
    return raw, y, rng.uniform(0.0, 3.0, N).astype(dtype)


def tolerance(raw):
    """Return what scikit-learn's lse − z and exp(z − lse) lose: V + 2L roundings of up to L.

    L is the largest lse − z_j of any row and class; it exceeds 1 here.
    """
    depth = float(-crossent.log_softmax(raw).min())
    return float(np.finfo(raw.dtype).eps) * (raw.shape[1] + 2 * depth) * depth


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_classes", [3, V])
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_and_gradients_of_rows(dtype, n_classes, weighted):
    raw, y, s = problem(dtype, n_classes)
    s = s if weighted else None
    expected_loss, expected_grad = HalfMultinomialLoss(n_classes=n_classes).loss_gradient(
        y.astype(dtype), raw, sample_weight=s
    )
    loss, grad = crossent.cross_entropy_value_and_grad(raw, y, sample_weight=s, reduction="none")
    atol = tolerance(raw) * (s.max() if weighted else 1)
    np.testing.assert_allclose(loss, expected_loss, rtol=0, atol=atol, strict=True)
    np.testing.assert_allclose(grad, expected_grad, rtol=0, atol=atol, strict=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_mean(dtype, weighted):
    raw, y, s = problem(dtype)
    s = s if weighted else None
    expected = HalfMultinomialLoss(n_classes=V)(y.astype(dtype), raw, sample_weight=s)
    loss = crossent.cross_entropy(raw, y, sample_weight=s)
    assert loss == pytest.approx(expected, rel=0, abs=2 * tolerance(raw))


def test_probabilities_and_diagonal_of_the_hessian():
    raw, y, s = problem(np.float64)
    peer = HalfMultinomialLoss(n_classes=V)
    _, proba = peer.gradient_proba(y.astype(float), raw)
    np.testing.assert_allclose(crossent.softmax(raw), proba, rtol=tolerance(raw))
    _, diagonal = peer.gradient_hessian(y.astype(float), raw, sample_weight=s)
    hessian = crossent.cross_entropy_hessian(raw, y, sample_weight=s, reduction="none")  # (N, V, V)
    np.testing.assert_allclose(
        np.diagonal(hessian, axis1=1, axis2=2), diagonal, rtol=0, atol=tolerance(raw) * s.max()
    )


# Differences ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "margin"), [(np.float32, 17.5), (np.float64, 40.0)])
def test_differs_confident_row(dtype, margin):
    raw, y = np.array([[margin, 0, 0]], dtype), np.array([0])
    loss, grad = crossent.cross_entropy_value_and_grad(raw, y)
    tolerance = 4 * np.finfo(dtype).eps
    np.testing.assert_allclose(loss, math.log1p(2 * math.exp(-margin)), rtol=tolerance)
    other = 1 / (2 + math.exp(margin))
    np.testing.assert_allclose(grad, [[-2 * other, other, other]], rtol=tolerance)
    loss, grad = HalfMultinomialLoss(n_classes=3).loss_gradient(y.astype(dtype), raw)
    assert loss == 0
    assert grad[0, 0] == 0


def test_differs_weights_that_are_all_0():
    raw, y, _ = problem(np.float64)
    loss, grad = crossent.cross_entropy_value_and_grad(raw, y, sample_weight=np.zeros(N))
    assert loss == 0
    np.testing.assert_array_equal(grad, np.zeros((N, V)))
    with pytest.raises(ZeroDivisionError):
        HalfMultinomialLoss(n_classes=V)(y.astype(float), raw, sample_weight=np.zeros(N))


def test_differs_nan_in_a_row_of_weight_0():
    raw, y, s = problem(np.float64)
    raw[2, 1], s[2] = np.nan, 0
    loss, grad = crossent.cross_entropy_value_and_grad(raw, y, sample_weight=s)
    assert np.isfinite(loss)
    np.testing.assert_array_equal(grad[2], np.zeros(V))
    loss, grad = HalfMultinomialLoss(n_classes=V).loss_gradient(y.astype(float), raw, s)
    assert np.isnan(loss[2])
    assert np.isnan(grad[2]).all()


def test_differs_dtype_of_labels():
    """scikit-learn's labels are floats of the logits' dtype; floats here are probabilities."""
    raw, y, _ = problem(np.float64)
    with pytest.raises(ValueError, match="convert them with target"):
        crossent.cross_entropy(raw, y.astype(float))
    with pytest.raises(TypeError):
        HalfMultinomialLoss(n_classes=V).loss(y, raw)


@pytest.mark.parametrize("label", [V, -1])
def test_differs_label_out_of_range(label):
    """scikit-learn reads the memory beside the row, so only this side is run."""
    raw, y, _ = problem(np.float64)
    y[5] = label
    with pytest.raises(IndexError, match=rf"target\[5\] is {label}, but there are {V} classes"):
        crossent.cross_entropy(raw, y)


def test_differs_16_bit_logits():
    raw, y, _ = problem(np.float16)
    loss = crossent.cross_entropy(raw, y)
    expected = crossent.cross_entropy(raw.astype(np.float64), y)
    assert loss == pytest.approx(expected, rel=2**-21)
    with pytest.raises(TypeError):
        HalfMultinomialLoss(n_classes=V).loss(y.astype(np.float16), raw)
