"""The NumPy front end of the fused head: against the logits it does without."""

from __future__ import annotations

import doctest
import math
import threading
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import scipy.sparse

import crossent
from crossent import LinearGrad

RNG = np.random.default_rng(3)
N, D, V = 40, 23, 11
X, W, B = RNG.standard_normal((N, D)), RNG.standard_normal((V, D)) / 2, RNG.standard_normal(V)
Y = np.where(np.arange(N) % 7, RNG.integers(0, V, N), -100)
Q = RNG.dirichlet(np.ones(V), N)
CASES = {
    "indices": (Y, {}),
    "ignored": (Y, {"ignore_index": 3, "sample_weight": (Y >= 0) * 1.0}),
    "weights": (Y, {"weight": RNG.random(V), "label_smoothing": 0.2, "reduction": "sum"}),
    "rows": (Y, {"sample_weight": RNG.integers(0, 3, N) * 1.0, "divisor": 100.0}),
    "distributions": (Q, {"logit_scale": 0.5}),
    "sparse": (RNG.integers(0, V, (N, 2)), {"target_prob": RNG.random((N, 2)), "z_loss": 1e-3}),
    "each": (Y, {"reduction": "none", "softcap": 5.0}),
}
CASES["ignored"] = (np.where(Y < 0, 3, Y), {"ignore_index": 3})


@pytest.mark.parametrize("case", CASES)
def test_every_option_means_what_it_means_for_logits(case):
    target, options = CASES[case]
    upstream = RNG.standard_normal(N) if options.get("reduction") == "none" else 0.5
    logits = crossent.cross_entropy_value_and_grad(
        X @ W.T + B, target, grad_output=upstream, **options
    )
    found = crossent.linear_cross_entropy_value_and_grad(
        X, W, target, linear_bias=B, grad_output=upstream, **options
    )
    loss = crossent.linear_cross_entropy(X, W, target, linear_bias=B, **options)
    np.testing.assert_array_equal(loss, found.loss)
    np.testing.assert_allclose(found.loss, logits.loss, rtol=1e-12)
    np.testing.assert_allclose(found.grad.input, logits.grad @ W, atol=1e-12)
    np.testing.assert_allclose(found.grad.linear_weight, logits.grad.T @ X, atol=1e-12)
    np.testing.assert_allclose(found.grad.linear_bias, logits.grad.sum(axis=0), atol=1e-12)


@pytest.mark.parametrize("format", ["csr", "csc", "coo"])
@pytest.mark.parametrize("container", ["matrix", "array"])
def test_sparse_features(format, container):
    dense = X * (RNG.random(X.shape) < 0.2)
    sparse = getattr(scipy.sparse, f"{format}_{container}")(dense)
    found = crossent.linear_cross_entropy_value_and_grad(sparse, W, Y, linear_bias=B)
    same = crossent.linear_cross_entropy_value_and_grad(dense, W, Y, linear_bias=B)
    np.testing.assert_allclose(found.loss, same.loss, rtol=1e-13)
    assert found.grad.input is None
    np.testing.assert_allclose(found.grad.linear_weight, same.grad.linear_weight, atol=1e-14)
    along = LinearGrad(None, W[::-1], None)
    np.testing.assert_allclose(
        crossent.linear_cross_entropy_hvp(sparse, W, Y, along).linear_weight,
        crossent.linear_cross_entropy_hvp(dense, W, Y, along).linear_weight,
        atol=1e-14,
    )
    stats = crossent.linear_cross_entropy_stats(sparse, W, Y)
    np.testing.assert_allclose(
        stats.entropy, crossent.linear_cross_entropy_stats(dense, W, Y).entropy
    )
    for call in (
        lambda: crossent.linear_cross_entropy_value_and_grad(sparse, W, Y, wrt="input"),
        lambda: crossent.linear_cross_entropy_hvp(sparse, W, Y, LinearGrad(X, None, None)),
    ):
        with pytest.raises(ValueError, match="would be dense"):
            call()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
def test_narrow_dtypes_are_summed_in_float32_and_rounded_once(dtype):
    x, w, b = (a.astype(dtype) for a in (X, W, B))
    exact = crossent.linear_cross_entropy_value_and_grad(
        *(a.astype(np.float64) for a in (x, w)), Y, linear_bias=b.astype(np.float64)
    )
    found = crossent.linear_cross_entropy_value_and_grad(x, w, Y, linear_bias=b)
    assert found.loss.dtype == np.float32
    np.testing.assert_allclose(found.loss, exact.loss, rtol=1e-6)
    # Half an ulp of the dtype and sums of at most 40 float32 products, γ ≈ 40 · 6e-8.
    half = 0 if dtype is np.float32 else float(ml_dtypes.finfo(dtype).eps) / 2
    for ours, theirs in zip(found.grad, exact.grad, strict=True):
        assert ours.dtype == dtype
        error = abs(ours.astype(np.float64) - theirs)
        tiny = 0 if dtype is np.float32 else float(ml_dtypes.finfo(dtype).smallest_subnormal)
        assert (error <= half * abs(theirs) * 1.001 + 3e-6 * abs(theirs).max() + tiny).all()


def test_dtypes_are_promoted_as_numpy_does():
    found = crossent.linear_cross_entropy_value_and_grad(X.astype(np.float32), W, Y)
    assert found.grad.input.dtype == np.float64
    integers = crossent.linear_cross_entropy([[1, 2]], [[0, 0], [0, 0]], [0])
    assert integers == pytest.approx(math.log(2))


def test_leading_shapes_and_layouts():
    whole = crossent.linear_cross_entropy_value_and_grad(X, W, Y, reduction="none")
    folded = crossent.linear_cross_entropy_value_and_grad(
        np.asfortranarray(X).reshape(5, 8, D), W, Y.reshape(5, 8), reduction="none"
    )
    assert folded.loss.shape == (5, 8)
    assert np.array_equal(folded.loss.ravel(), whole.loss)
    assert np.array_equal(folded.grad.input.reshape(N, D), whole.grad.input)
    strided = crossent.linear_cross_entropy(np.repeat(X, 2, axis=1)[:, ::2], W[::-1][::-1], Y)
    assert strided == crossent.linear_cross_entropy(X, W, Y)
    one = crossent.linear_cross_entropy_value_and_grad(X[1], W, Y[1])
    assert one.loss.shape == ()
    assert one.grad.input.shape == (D,)
    soft = crossent.linear_cross_entropy(X.reshape(5, 8, D), W, Q.reshape(5, 8, V))
    assert soft == crossent.linear_cross_entropy(X, W, Q)


def test_a_rows_results_do_not_depend_on_the_workspace(monkeypatch):
    x, w = RNG.standard_normal((900, 300), np.float32), RNG.standard_normal((70, 300), np.float32)
    y = RNG.integers(0, 70, 900)
    some = crossent.linear_cross_entropy_value_and_grad(x, w, y, reduction="none")
    few = crossent.linear_cross_entropy_value_and_grad(x, w, y, reduction="none", workspace_mb=8.05)
    assert np.array_equal(some.loss, few.loss)
    assert np.array_equal(some.grad.input, few.grad.input)
    np.testing.assert_allclose(some.grad.linear_weight, few.grad.linear_weight, atol=1e-4)


@pytest.mark.parametrize("wrt", ["input", ("linear_weight",), ("linear_bias", "input"), ()])
def test_gradients_that_are_asked_for(wrt):
    grad = crossent.linear_cross_entropy_value_and_grad(X, W, Y, linear_bias=B, wrt=wrt).grad
    whole = crossent.linear_cross_entropy_value_and_grad(X, W, Y, linear_bias=B).grad
    for name in LinearGrad._fields:
        asked = name == wrt or (not isinstance(wrt, str) and name in wrt)
        found = getattr(grad, name)
        assert (found is not None) == asked
        if asked:
            assert np.array_equal(found, getattr(whole, name))


def test_statistics_are_those_of_the_logits():
    for target in (Y, None):
        found = crossent.linear_cross_entropy_stats(X, W, target, linear_bias=B)
        logits = crossent.cross_entropy_stats(X @ W.T + B, target)
        for ours, theirs in zip(found, logits, strict=True):
            if theirs is None:
                assert ours is None
            else:
                np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_bad_rows_stay_alone():
    x = X.copy()
    x[0], x[1] = np.nan, np.nan
    y = Y.copy()
    y[0], y[1] = -100, 2
    found = crossent.linear_cross_entropy_value_and_grad(x, W, y, reduction="none")
    assert found.loss[0] == 0
    assert not found.grad.input[0].any()
    assert np.isnan(found.loss[1])
    assert np.isnan(found.grad.input[1]).all()
    rest = crossent.linear_cross_entropy_value_and_grad(X, W, y, reduction="none")
    assert np.array_equal(found.loss[2:], rest.loss[2:])
    assert np.array_equal(found.grad.input[2:], rest.grad.input[2:])


@pytest.mark.parametrize("shape", [(0, 4, 3), (5, 0, 3), (5, 4, 1), (1, 1, 1)], ids=str)
def test_empty_and_smallest(shape):
    n, d, v = shape
    found = crossent.linear_cross_entropy_value_and_grad(
        np.ones((n, d)), np.ones((v, d)), np.zeros(n, np.int64), linear_bias=np.zeros(v)
    )
    assert found.loss == pytest.approx(math.log(v) if n else 0)
    assert found.grad.input.shape == (n, d)
    assert found.grad.linear_weight.shape == (v, d)
    assert np.isfinite(found.grad.linear_bias).all()


def test_inputs_are_never_written_and_may_be_read_only():
    arrays = [a.copy() for a in (X, W, Y, B)]
    for a in arrays:
        a.flags.writeable = False
    x, w, y, b = arrays
    crossent.linear_cross_entropy_value_and_grad(x, w, y, linear_bias=b)
    for a, was in zip(arrays, (X, W, Y, B), strict=True):
        assert np.array_equal(a, was)


def test_memory_is_the_outputs_and_the_workspace():
    n, d, v = 600, 16, 60_000  # 144 MB of logits
    x, w = RNG.standard_normal((n, d), np.float32), RNG.standard_normal((v, d), np.float32)
    y = RNG.integers(0, v, n)
    tracemalloc.start()
    try:
        for workspace in (24, 48):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            found = crossent.linear_cross_entropy_value_and_grad(x, w, y, workspace_mb=workspace)
            outputs = sum(a.nbytes for a in found.grad if a is not None)
            # (What the native part packs, up to 8 MB of the workspace, tracemalloc does not see.)
            assert tracemalloc.get_traced_memory()[1] - before <= outputs + workspace * 2**20
            del found
    finally:
        tracemalloc.stop()


def test_two_threads_at_once():
    expected = crossent.linear_cross_entropy_value_and_grad(X, W, Y)
    wrong = []

    def work():
        for _ in range(30):
            found = crossent.linear_cross_entropy_value_and_grad(X, W, Y)
            if not np.array_equal(found.grad.linear_weight, expected.grad.linear_weight):
                wrong.append(found)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


BAD = {
    "weights of other features": ((X, W[:, 1:], Y), {}, "linear_weight must have shape"),
    "no class": ((X, W[:0], Y), {}, "linear_weight must have shape"),
    "one weight": ((X, W[0], Y), {}, "linear_weight must have shape"),
    "no features": ((1.0, W, 0), {}, "input must have shape"),
    "a bias too long": ((X, W, Y), {"linear_bias": X[0]}, "linear_bias must have shape"),
    "a target too short": ((X, W, Y[1:]), {}, "target"),
    "an unknown name": ((X, W, Y), {"wrt": "bias"}, "wrt must name some of"),
    "no memory": ((X, W, Y), {"workspace_mb": 0}, "workspace_mb must be above 0"),
    "an upstream gradient a row": ((X, W, Y), {"grad_output": B}, "grad_output must have"),
}


@pytest.mark.parametrize("bad", BAD)
def test_errors_say_what_to_do(bad):
    arguments, options, text = BAD[bad]
    with pytest.raises(ValueError, match=text):
        crossent.linear_cross_entropy_value_and_grad(*arguments, **options)


def test_a_class_out_of_range_and_dtypes_nobody_reads():
    with pytest.raises(IndexError, match=r"target\[1\] is 11, but there are 11 classes"):
        crossent.linear_cross_entropy(X[:2], W, [0, V])
    with pytest.raises(TypeError, match="linear_weight"):
        crossent.linear_cross_entropy(X, W.astype(complex), Y)
    with pytest.raises(TypeError, match="input"):
        crossent.linear_cross_entropy(scipy.sparse.csr_matrix(X.astype(complex)), W, Y)
    with pytest.raises(TypeError, match="vector must be a LinearGrad"):
        crossent.linear_cross_entropy_hvp(X, W, Y, W)
    with pytest.raises(ValueError, match=r"vector\.input must have shape"):
        crossent.linear_cross_entropy_hvp(X, W, Y, LinearGrad(W, None, None))


def test_the_page_runs():
    page = Path(__file__).parent.parent / "docs" / "head.md"
    block = page.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    example = doctest.DocTestParser().get_doctest(block, {}, "head.md", None, 0)
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
