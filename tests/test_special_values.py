"""NaN, infinities, masks and dropped rows: each row of the design page's table of bad input."""

import mpmath
import numpy as np
import pytest

import crossent

inf, nan = np.inf, np.nan
ORDINARY = [[0.5, -1.0, 2.0, 0.0], [3.0, 1.0, 1.0, -2.0]]
BAD = {
    "NaN": [0.0, nan, 1.0, 2.0],
    "all −inf": [-inf, -inf, -inf, -inf],
    "+inf": [0.0, inf, 1.0, 2.0],
    "+inf and −inf": [-inf, inf, -inf, -inf],
    "all +inf": [inf, inf, inf, inf],
}
OPTIONS = [{}, {"label_smoothing": 0.1, "z_loss": 0.1}, {"logit_scale": 2.0}, {"softcap": 9.0}]


def targets(kind, n_rows, n_classes):
    """Every row wants class 0; `ignore_index` is −100."""
    if kind == "index":
        return np.zeros(n_rows, int), {}
    if kind == "distribution":
        return np.tile(np.eye(n_classes)[0], (n_rows, 1)), {}
    return np.zeros((n_rows, 1), int), {"target_prob": np.ones((n_rows, 1))}


KINDS = ["index", "distribution", "sparse"]


def call(logits, kind="index", **options):
    logits = np.asarray(logits)
    target, more = targets(kind, *logits.shape)
    return crossent.cross_entropy_value_and_grad(logits, target, **more, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_is_nan_and_alone_so(bad, options, kind, dtype, isa):
    logits = np.array([ORDINARY[0], BAD[bad], ORDINARY[1]], dtype)
    loss, grad = call(logits, kind, reduction="none", **options)
    assert np.isnan(loss[1])
    assert np.isnan(grad[1]).all()
    clean = call(logits[::2], kind, reduction="none", **options)
    np.testing.assert_array_equal(loss[::2], clean.loss)
    np.testing.assert_array_equal(grad[::2], clean.grad)
    assert np.isnan(call(logits, kind, **options).loss)


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_of_the_softmax_is_nan_and_alone_so(bad, dtype, isa):
    logits = np.array([ORDINARY[0], BAD[bad], ORDINARY[1]], dtype)
    for function in (crossent.softmax, crossent.log_softmax):
        found = function(logits)
        assert np.isnan(found[1]).all()
        np.testing.assert_array_equal(found[::2], function(logits[::2]))


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_of_the_statistics(bad, dtype, isa):
    logits = np.array([ORDINARY[0], BAD[bad], ORDINARY[1]], dtype)
    found = crossent.cross_entropy_stats(logits, [0, 0, 0])
    clean = crossent.cross_entropy_stats(logits[::2], [0, 0])
    for name in ("logsumexp", "target_logprob", "entropy"):
        assert np.isnan(getattr(found, name)[1])
    assert (found.argmax[1], found.target_rank[1]) == (-1, -1)
    for got, want in zip(found, clean, strict=True):
        np.testing.assert_array_equal(got[::2], want)


@pytest.mark.parametrize("n_classes", [3, 40, 5000])
@pytest.mark.parametrize("place", [0, -1])
def test_nan_is_found_in_any_place(n_classes, place, dtype, isa):
    for payload in (nan, -nan, np.array(0x7FC00001, "u4").view("f4")):
        logits = np.zeros((1, n_classes), dtype)
        logits[0, place] = payload
        loss, grad = call(logits)
        assert np.isnan(loss)
        assert np.isnan(grad).all()
        assert np.isnan(crossent.softmax(logits)).all()
        logits[0, 0] = -inf  # also as the only number beside it
        logits[0, place] = payload
        assert np.isnan(call(logits).loss)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropped", ["sample_weight", "ignore_index"])
def test_the_logits_of_a_dropped_row_are_never_read(dropped, kind, dtype, isa):
    logits = np.array([*ORDINARY, *BAD.values()], dtype)
    target, options = targets(kind, *logits.shape)
    if dropped == "sample_weight":
        options["sample_weight"] = np.array([1, 1] + [0] * len(BAD))
    elif kind == "distribution":
        return  # ignore_index does not apply
    else:
        target[2:] = -100
    for more in OPTIONS:
        found = crossent.cross_entropy_value_and_grad(logits, target, **options, **more)
        clean = call(logits[:2], kind, **more)
        np.testing.assert_array_equal(found.loss, clean.loss)
        np.testing.assert_array_equal(found.grad[:2], clean.grad)
        assert not found.grad[2:].any()
        assert not np.signbit(found.grad[2:].astype(float)).any()
        upstream = np.where(np.arange(len(logits)) < 2, 1.0, nan)
        found = crossent.cross_entropy_value_and_grad(
            logits, target, **options, **more, reduction="none", grad_output=upstream
        )
        assert not found.grad[2:].any()
        assert not found.loss[2:].any()
        vector = np.full(logits.shape, nan)
        assert not crossent.cross_entropy_hvp(logits, target, vector, **options)[2:].any()


def test_dropped_rows_of_the_statistics():
    logits = np.array([*ORDINARY, BAD["NaN"]])
    found = crossent.cross_entropy_stats(logits, [2, -100, 0], sample_weight=[1, 1, 0])
    for name in ("logsumexp", "target_logprob", "entropy"):
        np.testing.assert_array_equal(np.isnan(getattr(found, name)), [False, True, True])
    np.testing.assert_array_equal(found.argmax, [2, -1, -1])
    np.testing.assert_array_equal(found.target_rank, [0, -1, -1])
    for ignore_index in (-100, 0):  # no target, so nothing equals it
        found = crossent.cross_entropy_stats(logits[:2], ignore_index=ignore_index)
        np.testing.assert_array_equal(found.argmax, [2, 0])
        assert found.target_logprob is found.target_rank is None


def test_ties_and_ranks():
    logits = [[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0], [0.0, -inf, -inf, 0.0]]
    for y, ranks in enumerate([(3, 0, 0), (0, 0, 2), (0, 0, 2), (2, 0, 0)]):
        found = crossent.cross_entropy_stats(logits, [y] * 3)
        np.testing.assert_array_equal(found.argmax, [1, 0, 0])
        np.testing.assert_array_equal(found.target_rank, ranks)


# Masks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_class_has_no_probability_and_no_gradient(kind, dtype, isa):
    logits = np.array(ORDINARY, dtype)
    masked = np.insert(logits, [1, 4, 4], -inf, axis=1)
    at = [1, 5, 6]
    for options in ({}, {"z_loss": 0.1}, {"logit_scale": 0.5}, {"softcap": 9.0}):
        found = call(masked, kind, reduction="none", **options)
        plain = call(logits, kind, reduction="none", **options)
        np.testing.assert_array_equal(found.loss, plain.loss)
        assert not found.grad[:, at].any()
        np.testing.assert_array_equal(np.delete(found.grad, at, axis=1), plain.grad)
    p = crossent.softmax(masked)
    assert not p[:, at].any()
    np.testing.assert_array_equal(np.delete(p, at, axis=1), crossent.softmax(logits))
    assert np.isneginf(crossent.log_softmax(masked)[:, at]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_target_costs_infinity_with_a_finite_gradient(kind, dtype, isa):
    logits = np.array([[-inf, 1.0, 0.0], [-inf, -inf, 3.0]], dtype)
    for options in ({}, {"z_loss": 0.1}):
        loss, grad = call(logits, kind, reduction="none", **options)
        np.testing.assert_array_equal(loss, [inf, inf])
        assert np.isfinite(grad).all()
    assert grad[0, 0] == -1
    loss, grad = call(logits, kind, reduction="none", label_smoothing=0.3)
    np.testing.assert_array_equal(loss, [inf, inf])
    assert np.isfinite(grad).all()
    assert call(logits, kind).loss == inf


def test_a_masked_target_of_weight_zero_costs_nothing(dtype, isa):
    logits = np.array([[-inf, 1.0, 0.0]], dtype)
    loss, grad = call(logits, weight=[0.0, 1.0, 1.0], reduction="none")
    assert loss == 0
    assert not grad.any()
    loss, _ = call(logits, weight=[-1.0, 1.0, 1.0], reduction="none")
    assert loss == -inf
    assert np.isnan(call([BAD["NaN"]], weight=[0.0, 1, 1, 1], reduction="none").loss).all()


@pytest.mark.parametrize("n_classes", [17, 4100, 10000])
def test_all_masked_but_one(n_classes, dtype, isa):
    for y in (0, n_classes // 2, n_classes - 1):
        logits = np.full((1, n_classes), -inf).astype(dtype)
        logits[0, y] = -7
        loss, grad = crossent.cross_entropy_value_and_grad(logits, [y])
        assert loss == 0
        assert not grad.any()
        p = crossent.softmax(logits)[0]
        assert p[y] == 1
        assert np.count_nonzero(p) == 1


# Divisors and rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_all_rows_dropped_is_zero_not_nan(kind, dtype):
    logits = np.array([BAD["NaN"], *ORDINARY], dtype)
    for reduction in ("mean", "sum"):
        loss, grad = call(logits, kind, reduction=reduction, sample_weight=0)
        assert loss == 0
        assert not grad.any()
    loss, grad = crossent.cross_entropy_value_and_grad(logits, [-100] * 3)
    assert loss == 0
    assert not grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_divisor_of_zero_is_nan(kind, dtype, isa):
    for options in ({"sample_weight": [1.0, -1.0]}, {"divisor": 0}):
        loss, grad = call(np.array(ORDINARY, dtype), kind, **options)
        assert np.isnan(loss)
        assert np.isnan(grad).all()


def test_a_target_that_is_no_distribution_is_taken_as_it_stands():
    logits = np.array(ORDINARY)
    target = np.array([[2.0, 0.0, -1.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    loss, grad = crossent.cross_entropy_value_and_grad(logits, target, reduction="none")
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    # Both sides of well-conditioned numbers of order 1: a few roundings.
    np.testing.assert_allclose(loss, -(target * np.log(p)).sum(axis=1), rtol=1e-14, atol=0)
    np.testing.assert_allclose(grad, p * target.sum(axis=1, keepdims=True) - target, atol=1e-15)


def test_nan_in_a_distribution_stays_in_its_row():
    target = np.array([[0.5, nan, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]])
    loss, grad = crossent.cross_entropy_value_and_grad(ORDINARY, target, reduction="none")
    np.testing.assert_array_equal(np.isnan(loss), [True, False])
    np.testing.assert_array_equal(np.isnan(grad).all(axis=1), [True, False])


def test_a_finite_logit_under_a_softcap_is_never_infinite():
    loss, grad = crossent.cross_entropy_value_and_grad([[1e308, 0.0]], [0], softcap=0.5)
    exact = np.log1p(np.exp(-0.5))
    assert abs(loss - exact) <= 8 * np.spacing(exact)
    assert not grad[0, 0]


def test_results_too_large_for_float32_are_infinite_in_silence():
    logits = np.array([[3e38, -3e38]], np.float32)
    for reduction in ("mean", "sum", "none"):
        assert crossent.cross_entropy(logits, [1], reduction=reduction) == inf
    assert crossent.cross_entropy(logits, [1], sample_weight=-1, reduction="sum") == -inf
    stats = crossent.cross_entropy_stats(logits, [1], logit_scale=2)
    assert (stats.logsumexp[0], stats.target_logprob[0], stats.entropy[0]) == (inf, -inf, 0)


@pytest.mark.parametrize("low", [-1e5, -1e300])
def test_a_class_out_of_reach_has_no_part_in_the_entropy(isa, low):
    stats = crossent.cross_entropy_stats(np.array([[0.0, low]]), [0])
    assert stats.entropy[0] == 0
    assert stats.logsumexp[0] == 0


@pytest.mark.parametrize("n_classes", [4, 60, 5000])
@pytest.mark.parametrize("logit_scale", [1e9, 1e14, 1e30, 1e38])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_out_of_reach_stays_at_0_under_a_huge_logit_scale(
    dtype, logit_scale, n_classes, isa
):
    logits = np.zeros((20, n_classes), dtype)
    logits[:, 1:] = np.where(np.arange(1, n_classes) % 2, -inf, -1)
    for options in ({}, {"sample_weight": np.ones(20)}):
        options |= {"logit_scale": logit_scale, "reduction": "none"}
        loss, grad = crossent.cross_entropy_value_and_grad(logits, np.arange(20) % 2, **options)
        assert not loss[::2].any()
        assert not grad[::2].any()
        assert not grad[:, 2:].any()
    stats = crossent.cross_entropy_stats(logits, logit_scale=logit_scale)
    assert not stats.entropy.any()


@pytest.mark.parametrize("n_classes", [1, 4, 60, 5000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_scale_that_takes_logits_beyond_their_dtype(dtype, sign, n_classes, isa):
    logits = np.full((20, n_classes), sign * np.finfo(dtype).max)
    loss, grad = crossent.cross_entropy_value_and_grad(
        logits, np.zeros(20, int), logit_scale=100, reduction="none"
    )
    exact = np.full((20, n_classes), 100 / n_classes)
    exact[:, 0] = 100 / n_classes - 100
    np.testing.assert_allclose(grad, exact, rtol=8 * np.finfo(dtype).eps)
    np.testing.assert_allclose(loss, np.log(n_classes), rtol=8 * np.finfo(dtype).eps)


@pytest.mark.parametrize("n_classes", [3, 60, 5000])
@pytest.mark.parametrize("width", [1e6, 1e37])
def test_the_entropy_of_logits_far_apart_under_a_small_scale(n_classes, width, isa):
    logits = np.linspace(-width, 0, n_classes, dtype=np.float32)[None]
    scale = np.float32(3 / width)
    found = crossent.cross_entropy_stats(logits, logit_scale=scale).entropy
    exact = crossent.cross_entropy_stats(logits.astype(float), logit_scale=scale).entropy
    np.testing.assert_allclose(found, exact, rtol=8 * 2.0**-23)


@pytest.mark.parametrize("n_classes", [4, 60])  # one row a lane, and one row after the other
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_masked_class_stays_at_0_under_a_huge_z_loss(isa, dtype, n_classes):
    top = dtype(1e38 if dtype == np.float32 else 1e300)
    logits = np.zeros((20, n_classes), dtype)
    logits[3, 0], logits[3, 1] = -inf, top
    _, grad = crossent.cross_entropy_value_and_grad(logits, np.full(20, 2), z_loss=10)
    assert grad[3, 0] == 0
    assert grad[3, 1] > 0
    alone = crossent.cross_entropy_value_and_grad(
        logits, np.full(20, 2), z_loss=10, sample_weight=1
    )
    np.testing.assert_array_equal(grad, alone.grad)


def test_no_floating_point_error_of_numpy_s():
    """The numbers are the answer, whatever `numpy.errstate` and the warning filters say."""
    sure = np.array([[100, 0]], np.float32)  # a loss of 4e-44
    huge = np.array([[3e38, 0]], np.float32)
    with np.errstate(all="raise"):
        assert crossent.cross_entropy(sure, [0], reduction="none")[0] > 0
        assert crossent.cross_entropy_stats(sure, [0]).target_logprob[0] < 0
        assert crossent.cross_entropy_stats(huge, [1], logit_scale=10.0).logsumexp[0] == np.inf


def test_repeated_ids_that_cancel(isa):
    """What cancels does so before smoothing and weights round it."""
    logits = np.array([[3.0, -2e4, 1.0]])
    options = {"label_smoothing": 0.1, "weight": [1.1, 0.7, 0.3]}
    prob = np.array([[0.3, 512.7, 0.4, -512.7]])
    got = crossent.cross_entropy(logits, [[0, 1, 2, 1]], target_prob=prob, **options)
    wanted = crossent.cross_entropy(logits, [[0, 2]], target_prob=[[0.3, 0.4]], **options)
    assert got == wanted


def test_the_hessian_of_a_z_loss_beyond_float32():
    hessian = crossent.cross_entropy_hessian(np.float32([[7.0]]), [0], z_loss=1e38)
    assert hessian.dtype == np.float32
    # d2/dz2 of z + c z^2 less z: 2 c, for one class.
    np.testing.assert_allclose(hessian, [[[2e38]]], rtol=1e-6)


def test_a_block_far_below_counts_while_it_can_show(isa):
    """exp of the distance between two blocks leaves float64; what it is multiplied by does not."""
    for low in (-750.0, -1100.0):
        logits = np.full((1, 4096), low)
        logits[0, 5] = 0
        for offset in (0, 2000):
            grad = crossent.cross_entropy_value_and_grad(
                logits + offset, [5], reduction="sum", grad_output=1e180
            ).grad
            exact = float(mpmath.exp(low) * mpmath.mpf(1e180))
            np.testing.assert_allclose(np.delete(grad[0], 5), exact, rtol=1e-15)
            np.testing.assert_allclose(grad[0, 5], -4095 * exact, rtol=1e-15)
            loss = crossent.cross_entropy(
                logits + offset, [5], reduction="sum", sample_weight=[1e180]
            )
            np.testing.assert_allclose(loss, 4095 * exact, rtol=1e-15)
    logits = np.full((1, 4096), -750.0)
    logits[0, 5] = 0
    np.testing.assert_array_equal(
        crossent.log_softmax(logits)[0, 5],
        -4095 * 2.0**-537 * float(mpmath.exp(-750) * mpmath.mpf(2) ** 537),
    )
