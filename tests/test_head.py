"""The fused head's algorithm and its matrix product, against the rows they stand for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import crossent
from crossent import _native, products, rows
from crossent.head import Head, LinearGrad
from crossent.options import Options

SHAPES = [(1, 1, 1), (5, 7, 3), (0, 3, 4), (8, 8, 0), (97, 33, 300), (13, 200, 530), (12, 900, 300)]
DTYPES = [("f4", "f4"), ("f8", "f8"), ("f2", "f2"), ("f4", "f2"), ("f8", "f4")]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_of_any_layout(isa, shape):
    rng = np.random.default_rng(0)
    m, n, k = shape
    options = itertools.product(DTYPES, "CF", "CF", (False, True), (False, True))
    for (left, right), order_a, order_b, accumulate, with_bias in options:
        a = np.asarray(rng.standard_normal((m, k)).astype(left), order=order_a)
        b = np.asarray(rng.standard_normal((k, n)).astype(right), order=order_b)
        dtype = np.float64 if "f8" in (left, right) else np.float32
        out = rng.standard_normal((m, n)).astype(dtype)
        bias = rng.standard_normal(n).astype(dtype) if with_bias else None
        wide = a.astype(float) @ b.astype(float)
        exact = wide + accumulate * out + (0 if bias is None else bias)
        size = abs(a).astype(float) @ abs(b).astype(float) + accumulate * abs(out) + 4
        products.native(a, b, out, accumulate=accumulate, bias=bias)
        # γ of k products, one sum over the blocks and two additions; and as much for numpy's.
        bound = 2 * (k + 4) * np.finfo(dtype).eps * size
        assert (abs(out - exact) <= bound).all(), (left, order_a, order_b, accumulate, with_bias)


def test_a_rows_sum_does_not_depend_on_its_neighbours_or_the_threads():
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((700, 600), np.float32), rng.standard_normal((90, 600), np.float32)
    whole, some = np.empty((700, 90), np.float32), np.empty((20, 90), np.float32)
    products.native(x, w.T, whole)
    products.native(x[100:120], w.T, some)  # the other side is packed now
    assert np.array_equal(whole[100:120], some)
    before = crossent.get_num_threads()
    crossent.set_num_threads(3)
    again = np.empty_like(whole)
    products.native(x, w.T, again)
    crossent.set_num_threads(before)
    assert np.array_equal(whole, again)


def test_product_refuses_what_would_touch_other_memory():
    a = np.ones((3, 4), np.float32)
    for b, out, bias in (
        (np.ones((5, 2), np.float32), np.empty((3, 2), np.float32), None),
        (np.ones((4, 2), np.float32), np.empty((3, 3), np.float32), None),
        (np.ones((4, 2), np.float32), np.empty((3, 2)), None),
        (np.ones((4, 2), np.float32), np.empty((2, 3), np.float32).T, None),
        (np.ones((4, 2), np.float32), np.empty((3, 2), np.float32), np.ones(3, np.float32)),
        (np.ones((4, 2), np.float32), np.empty((3, 2), np.float32), np.ones(2)),
    ):
        with pytest.raises(ValueError, match="expected"):
            _native.matmul(a, b, out, False, bias)


RNG = np.random.default_rng(2)
N, D, V = 37, 19, 13
X, W, B = RNG.standard_normal((N, D)), RNG.standard_normal((V, D)) / 2, RNG.standard_normal(V)
INDEX = np.where(np.arange(N) % 5, RNG.integers(0, V, N), -100)
Q = RNG.dirichlet(np.ones(V), N)
CASES = {
    "indices": (INDEX, {}),
    "weights and smoothing": (INDEX, {"weight": RNG.random(V), "label_smoothing": 0.1}),
    "row weights": (INDEX, {"sample_weight": np.where(np.arange(N) % 3, 1.5, 0.0)}),
    "distributions, capped": (Q, {"softcap": 3.0}),
    "sparse, z-loss": (
        RNG.integers(0, V, (N, 3)),
        {"target_prob": RNG.random((N, 3)), "z_loss": 0.01},
    ),
    "each": (INDEX, {"reduction": "none"}),
}


def _head(target, options, arrays=(X, W, B), product=products.native, workspace=2**27):
    plan = rows.lower("head", (N, V), 1, np.dtype(np.float64), target, Options(**options))
    return Head("head", *arrays, plan, "float64", workspace=workspace, product=product)


@pytest.mark.parametrize("product", [products.native, products.host])
@pytest.mark.parametrize("case", CASES)
def test_head_is_the_loss_of_its_logits(case, product):
    target, options = CASES[case]
    logits = crossent.cross_entropy_value_and_grad(X @ W.T + B, target, **options)
    for workspace in (2**27, 0):  # at once, and row by row
        head = _head(target, options, product=product, workspace=workspace)
        loss, grad = head.value_and_grad(None, (True, True, True))
        np.testing.assert_allclose(loss, logits.loss, rtol=1e-12)
        np.testing.assert_allclose(head.loss(), logits.loss, rtol=1e-12)
        g = logits.grad
        np.testing.assert_allclose(grad.input, g @ W, atol=1e-12)
        np.testing.assert_allclose(grad.linear_weight, g.T @ X, atol=1e-12)
        np.testing.assert_allclose(grad.linear_bias, g.sum(axis=0), atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_hessian_vector_product_is_the_gradients_slope(case):
    target, options = CASES[case]
    step = 1e-6  # the differences' error: step² times the third derivative, and ε / step
    for given in itertools.product((False, True), repeat=3):
        along = [
            RNG.standard_normal(a.shape) if on else None
            for a, on in zip((X, W, B), given, strict=True)
        ]
        found = _head(target, options).hvp(None, LinearGrad(*along))
        ahead, behind = (
            _head(
                target,
                options,
                [a if v is None else a + s * v for a, v in zip((X, W, B), along, strict=True)],
            ).value_and_grad(None, (True, True, True))[1]
            for s in (step, -step)
        )
        for product, a, b, on in zip(found, ahead, behind, given, strict=True):
            assert (product is not None) == on
            if on:
                np.testing.assert_allclose(product, (a - b) / (2 * step), atol=1e-7)


def test_dropped_rows_are_never_multiplied():
    target = np.where(np.arange(N) < 3, -100, INDEX)
    features = X.copy()
    features[:3] = np.nan
    _, grad = _head(target, {}, (features, W, B)).value_and_grad(None, (True, True, True))
    assert not grad.input[:3].any()
    assert np.isfinite(grad.linear_weight).all()


def test_no_row_is_kept():
    _, grad = _head(np.full(N, -100), {}).value_and_grad(None, (True, True, True))
    assert not any(part.any() for part in grad)
