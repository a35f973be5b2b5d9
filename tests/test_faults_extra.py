"""What a list of one-line faults (faults.toml) showed that no other test noticed."""

import numpy as np
import pytest

import crossent
from crossent import _native, reference
from crossent.options import Options
from crossent.rows import lower

V = 150  # more classes than one row a lane serves, and a tail


def rows_of(n_rows, dtype, n_classes=V):
    return np.random.default_rng(5).normal(0, 3, (n_rows, n_classes)).astype(dtype)


def test_without_a_target_no_row_is_ignored():
    logits = rows_of(4, np.float32)
    stats = crossent.cross_entropy_stats(logits, ignore_index=0)
    np.testing.assert_array_equal(stats.argmax, logits.argmax(axis=1))


def test_a_dropped_row_beside_a_divisor_of_zero():
    logits, target = rows_of(2, np.float64), [3, -100]
    plan = lower("test", logits.shape, 1, logits.dtype, target, Options(divisor=0))
    exact = reference.grad(logits, plan)
    found = crossent.cross_entropy_value_and_grad(logits, target, divisor=0).grad
    np.testing.assert_array_equal(exact, found)
    assert np.isnan(found[0]).all()
    assert not found[1].any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_row_weights_of_any_size(dtype, isa):
    weights = np.ldexp(1.0, [0, 40, 57, 90, -40, -90, -120]).astype(dtype)
    logits = rows_of(len(weights), dtype) * 8
    logits[:, 7::9] = -np.inf
    target = np.arange(len(weights))
    options = {"sample_weight": weights, "reduction": "none"}
    found = crossent.cross_entropy_value_and_grad(logits, target, **options)
    plan = lower("test", logits.shape, 1, np.dtype(dtype), target, Options(**options))
    exact = reference.grad(logits.astype(np.longdouble), plan)
    assert not found.grad[:, 7::9].any()
    unit = np.maximum(np.spacing(np.abs(exact).astype(dtype)), np.finfo(dtype).smallest_subnormal)
    assert (np.abs(found.grad - exact) <= 4 * unit).all()


@pytest.mark.parametrize("n_classes", [67, V])
@pytest.mark.parametrize(("dtype", "offset"), [(np.float32, 3e7), (np.float64, -1e12)])
def test_an_offset_of_many_classes(dtype, offset, n_classes, isa):
    logits, target = rows_of(3, dtype, n_classes) * 8 + dtype(offset), [0, 1, 2]
    found = crossent.cross_entropy_value_and_grad(logits, target, reduction="sum").grad
    plan = lower("test", logits.shape, 1, logits.dtype, target, Options(reduction="sum"))
    exact = reference.grad(logits.astype(np.longdouble), plan)
    assert (np.abs(found - exact) <= 4 * np.spacing(np.abs(exact).astype(dtype))).all()


@pytest.mark.parametrize(("dtype", "low"), [(np.float32, -250), (np.float64, -1600)])
def test_a_masked_block_beside_low_logits(dtype, low, isa):
    logits = rows_of(1, dtype, 10000) + dtype(low)
    logits[0, :4096] = -np.inf  # the first block and, of doubles, the second
    for bare in (logits[:, 4096:], logits[:, 4090:]):
        target = [bare.shape[1] - 1]
        expected = crossent.cross_entropy(bare, target)
        found = crossent.cross_entropy(logits, [9999])
        np.testing.assert_allclose(found, expected, rtol=8 * np.finfo(dtype).eps)


@pytest.mark.parametrize("n_classes", [10, 100, 127, 1031])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_streamed_rows_of_any_alignment(dtype, n_classes, isa):
    n_rows = 4_400_000 // np.dtype(dtype).itemsize // n_classes | 5  # past 4 MiB: past the caches
    logits, target = rows_of(n_rows, dtype, n_classes), np.arange(n_rows) % n_classes
    seen = [*range(40), *range(n_rows - 40, n_rows)]
    expected = [
        crossent.cross_entropy_value_and_grad(logits[i : i + 1], target[i : i + 1]).grad[0]
        for i in seen
    ]
    for by in (1, 3):
        room = np.full(logits.size + 32, 7, dtype)
        out = room[by : by + logits.size].reshape(logits.shape)
        crossent.cross_entropy_value_and_grad(logits, target, reduction="sum", out=out)
        np.testing.assert_array_equal(out[seen], expected)
        assert (room[:by] == 7).all()
        assert (room[by + logits.size :] == 7).all()


def test_bfloat16_ties_round_to_even(isa):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    logits = np.full((2, V), -np.inf, ml_dtypes.bfloat16)
    logits[:, 3:5] = 0  # p is exactly one half
    weights = 2 * np.float32([1 + 2**-8, 1 + 3 * 2**-8])
    options = {"sample_weight": weights, "reduction": "sum"}
    grad = crossent.cross_entropy_value_and_grad(logits, [3, 3], **options).grad
    np.testing.assert_array_equal(grad[:, 4].astype(float), [1, 1 + 2**-6])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_strided_row_that_the_general_kernel_serves(dtype, isa):
    logits, target = rows_of(5, dtype), np.arange(5)
    big, small = 2.0**70, 2.0**-68
    options = {"sample_weight": [1, big, 1, big, 1], "reduction": "none"}
    options["grad_output"] = [1, small, 1, small, 1]
    plain = crossent.cross_entropy_value_and_grad(logits, target, **options)
    out = np.asfortranarray(np.full_like(logits, np.nan))
    strided = crossent.cross_entropy_value_and_grad(logits, target, **options, out=out)
    assert np.isfinite(plain.grad).all()
    np.testing.assert_array_equal(strided.grad, plain.grad)


def test_a_confident_distribution(isa):
    logits, one_hot = np.zeros((1, V)), np.zeros((1, V))
    logits[0, 11], one_hot[0, 11] = 50, 1
    grad = crossent.cross_entropy_value_and_grad(logits, one_hot).grad
    index = crossent.cross_entropy_value_and_grad(logits, [11]).grad
    np.testing.assert_allclose(grad, index, rtol=12 * np.finfo(float).eps, atol=0)


def test_a_nearly_one_hot_distribution(isa):
    logits, target = np.zeros((1, V)), np.full((1, V), 1e-20)
    logits[0, 11], target[0, 11] = 100, 1
    grad = crossent.cross_entropy_value_and_grad(logits, target).grad
    np.testing.assert_allclose(grad[0, 11], 1e-20 * (V - 1), rtol=12 * np.finfo(float).eps)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_masked_classes_have_no_part_in_the_entropy(dtype, isa):
    logits = np.full((1, V), -np.inf, dtype)
    logits[0, 5:9] = 2
    np.testing.assert_allclose(crossent.cross_entropy_stats(logits).entropy, np.log(4), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_masked_classes_that_a_distribution_leaves_out(dtype, isa):
    logits, target = np.full((1, V), -np.inf, dtype), np.zeros((1, V), dtype)
    logits[0, 5:9], target[0, 5:7] = 2, 0.5
    found = crossent.cross_entropy_value_and_grad(logits, target)
    np.testing.assert_allclose(found.loss, np.log(4), rtol=1e-6)
    assert np.isfinite(found.grad).all()


def test_targets_are_rounded_to_the_compute_dtype(isa):
    logits = rows_of(3, np.float32)
    target = np.random.default_rng(6).dirichlet(np.ones(V), 3)
    found = crossent.cross_entropy_value_and_grad(logits, target, reduction="none")
    rounded = crossent.cross_entropy_value_and_grad(
        logits, target.astype(np.float32), reduction="none"
    )
    np.testing.assert_array_equal(found.grad, rounded.grad)
    np.testing.assert_array_equal(found.loss, rounded.loss)


@pytest.mark.parametrize("n_classes", [4, V, 600, 5000])  # a lane a row, short, short, long
def test_dropped_rows_of_any_length(n_classes, dtype, isa):
    logits, target = rows_of(37, dtype, n_classes), np.arange(37) % n_classes
    dropped = np.arange(37) % 3 == 1
    clean = crossent.cross_entropy_value_and_grad(
        logits[~dropped], target[~dropped], reduction="none"
    )
    logits[dropped] = np.nan
    weights = {"sample_weight": np.where(dropped, 0, 1.0)}
    for y, options in ((np.where(dropped, -100, target), {}), (target, weights)):
        found = crossent.cross_entropy_value_and_grad(logits, y, reduction="none", **options)
        np.testing.assert_array_equal(found.loss[~dropped], clean.loss)
        np.testing.assert_array_equal(found.grad[~dropped], clean.grad)
        assert not found.loss[dropped].any()
        assert not found.grad[dropped].any()


@pytest.mark.parametrize("bad", [-1, 2**32 + 1, -(2**40)])
@pytest.mark.parametrize("n_classes", [4, V, 600, 5000])
def test_one_bad_target_among_many_rows(n_classes, bad, dtype, isa):
    logits, target = rows_of(37, dtype, n_classes), np.zeros(37, int)
    target[13] = bad
    for options in ({}, {"reduction": "none"}, {"sample_weight": 1}, {"sample_weight": 0}):
        with pytest.raises(IndexError, match=rf"target\[13\] is {bad}, "):
            crossent.cross_entropy(logits, target, **options)


@pytest.mark.parametrize("bad", [-1, 2**32 + 1, -(2**40)])
@pytest.mark.parametrize("n_classes", [4, V, 600, 5000])
def test_a_target_that_turns_bad_after_it_was_looked_at(n_classes, bad, dtype, isa, monkeypatch):
    monkeypatch.setattr(_native, "scan_targets", lambda target, *_: (-1, len(target), 1.0))
    logits, target = rows_of(37, dtype, n_classes), np.zeros(37, int)
    target[13] = bad
    for options in ({}, {"reduction": "none"}, {"sample_weight": 1}):
        with pytest.raises(ValueError, match="target out of range"):
            crossent.cross_entropy_value_and_grad(logits, target, **options)


@pytest.mark.parametrize("n_rows", [1, 5, 8, 16, 37])
def test_nothing_is_written_behind_the_last_row(n_rows, dtype, isa):
    for n_classes in (*range(1, 20), 31, 33, 48, 100, 127, 128, V):
        logits, target = rows_of(n_rows, dtype, n_classes), np.arange(n_rows) % n_classes
        room = np.full(logits.size + 64, 7, dtype)
        out = room[32:-32].reshape(logits.shape)
        crossent.cross_entropy_value_and_grad(logits, target, out=out)
        assert (room[:32] == 7).all()
        assert (room[-32:] == 7).all()
