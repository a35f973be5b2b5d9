"""`reference` at the extremes and on bad input: what the design promises of numbers, row by row."""

import mpmath
import numpy as np
import pytest

from crossent import reference
from crossent.options import Options
from crossent.reference import exact
from crossent.rows import lower

FLOATS = [np.float32, np.float64]
INF, NAN = np.inf, np.nan


@pytest.fixture(autouse=True)
def _sixty_digits():
    with mpmath.workdps(60):
        yield


@pytest.fixture(params=["float32", "float64", "exact"])
def number(request):
    """Convert logits to one of the kinds of number."""
    return exact if request.param == "exact" else np.dtype(request.param).type


def plan_for(logits, target, **options):
    logits = np.asarray(logits)
    dtype = logits.dtype if logits.dtype.kind == "f" else np.dtype(float)
    return lower("test", logits.shape, logits.ndim - 1, dtype, target, Options(**options))


def none(logits, target, **options):
    return plan_for(logits, target, reduction="none", **options)


# Extremes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("margin", [0, 1e-7, 1e-3, 1, 17, 37, 80])
def test_margins_keep_their_digits(dtype, margin):
    eps = np.finfo(dtype).eps
    z = np.array([[margin, 0, 0, 0]], dtype)
    floats, truth = none(z, [0]), none(z, [0])
    u = 3 * mpmath.exp(-mpmath.mpf(float(z[0, 0])))
    within = (margin + 8) * float(eps)  # exp amplifies the rounding of z − m by |z − m|
    for value, stated in (
        (reference.loss(z, floats)[0], mpmath.log1p(u)),
        (reference.grad(z, floats)[0, 0], -u / (1 + u)),
        (reference.grad(z, floats)[0, 1], u / (1 + u) / 3),
        (reference.loss(exact(z), truth)[0], mpmath.log1p(u)),
    ):
        assert value != 0
        assert abs(value - stated) <= within * abs(stated)


def test_margins_past_every_float():
    z = np.array([[1e4, 0.0, -1e4]])
    assert reference.loss(z, plan_for(z, [0])) == 0  # e^-10000 underflows
    loss, grad = (f(exact(z), plan_for(z, [0])) for f in (reference.loss, reference.grad))
    u = mpmath.exp(-10000) + mpmath.exp(-20000)
    assert mpmath.almosteq(loss, mpmath.log1p(u), rel_eps=1e-50)
    assert mpmath.almosteq(grad[0, 0], -u / (1 + u), rel_eps=1e-50)
    assert mpmath.almosteq(grad[0, 2], mpmath.exp(-20000) / (1 + u), rel_eps=1e-50)
    assert reference.loss(z, plan_for(z, [2])) == 20000
    huge = exact(np.array([[1e300, -1e300]]))
    assert reference.loss(huge, plan_for(np.zeros((1, 2)), [1])) == exact(1e300) * 2


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.3}, {"label_smoothing": 0.1}], ids=str)
def test_a_common_offset_changes_nothing(dtype, options):
    z = np.array([[3.0, -2.0, 0.5, 30.0]], dtype)
    offset = dtype(2.0**17)  # the sums are exact in float32
    for target in (0, 3):
        plan = none(z, [target], **options)
        assert (z + offset - offset == z).all()
        np.testing.assert_array_equal(reference.loss(z + offset, plan), reference.loss(z, plan))
        np.testing.assert_array_equal(reference.grad(z + offset, plan), reference.grad(z, plan))


def test_an_offset_of_1e30_at_which_inputs_still_differ():
    z = np.array([[1e30, np.nextafter(1e30, 0)]])
    plan = plan_for(z, [1])
    assert reference.loss(z, plan) == reference.loss(exact(z), plan) == z[0, 0] - z[0, 1]
    assert reference.log_softmax(z)[0, 0] == 0
    assert reference.log_softmax(exact(z))[0, 0] < 0 or z[0, 0] - z[0, 1] > 1e10


@pytest.mark.parametrize("dtype", FLOATS)
def test_logits_at_both_ends_of_the_range(dtype):
    top = np.finfo(dtype).max
    z = np.array([[top, -top, 0], [top, -top, 0]], dtype)
    plan = none(z, [0, 1])
    np.testing.assert_array_equal(reference.loss(z, plan), [0, INF])  # 2·top overflows
    np.testing.assert_array_equal(reference.grad(z, plan), [[0, 0, 0], [1, -1, 0]])
    assert reference.loss(exact(z), plan)[1] == 2 * exact(top)


def test_many_classes():
    z = np.random.default_rng(0).normal(size=(1, 2_000))
    plan = plan_for(z, [123])
    truth = reference.loss(exact(z), plan)
    # NumPy's pairwise sum is off by less than log2(V) ulp, each exponential by |z − m| < 10.
    assert abs(reference.loss(z, plan) - truth) < 32 * 2.0**-53 * abs(truth)
    assert abs(reference.grad(exact(z), plan).sum()) < 1e-50


def test_a_nearly_one_hot_distribution_keeps_its_digits():
    z, q = np.array([[60.0, 0.0]]), np.array([[1.0, 1e-30]])
    plan = plan_for(z, q)
    truth = reference.grad(exact(z), plan)
    np.testing.assert_allclose(reference.grad(z, plan), truth.astype(float), rtol=64 * 2.0**-52)
    assert truth[0, 0] == -truth[0, 1]


def test_a_saturated_softcap_keeps_its_slope(number):
    v = number([[40.0, -40.0, 0.0]])
    plan = none(np.zeros((1, 3)), [2], softcap=1.0)
    slope = reference.rows(v, plan).slope[0]
    assert slope[0] == slope[1] == pytest.approx(4 * np.exp(-80.0), rel=1e-6)
    assert slope[2] == 1
    assert reference.grad(v, plan)[0, 0] > 0


def test_a_scale_that_overflows_a_logit_leaves_the_loss_finite():
    z = np.array([[3e38, 3e38]], np.float32)
    plan = none(z, [0], logit_scale=8.0)
    np.testing.assert_allclose(reference.loss(z, plan), [np.log(2)], rtol=1e-6)
    np.testing.assert_array_equal(reference.grad(z, plan), [[-4, 4]])


# Bad input ----------------------------------------------------------------------------------------

GOOD = [1.0, 2.0, 3.0]
BROKEN = [[NAN, 0.0, 0.0], [0.0, 0.0, NAN], [-INF, -INF, -INF], [INF, 0.0, 0.0], [INF, -INF, NAN]]
WAYS = [{}, {"softcap": 2.0}, {"z_loss": 0.1}, {"label_smoothing": 0.1}, {"weight": [0.0, 1, 1]}]


def is_nan(x):
    return np.asarray(x != x, bool)


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("bad", BROKEN, ids=str)
def test_a_row_without_softmax_is_nan_alone(number, bad, options):
    z = number([GOOD, bad, GOOD])
    plan = none(np.zeros((3, 3)), [1, 0, 1], **options)
    for result in (
        reference.loss(z, plan),
        reference.grad(z, plan),
        reference.hvp(z, plan, np.ones((3, 3))),
        reference.hessian(z, plan),
        reference.softmax(z),
        reference.log_softmax(z),
        reference.softmax_jacobian(z),
        *reference.stats(z, plan)[:3],
    ):
        assert is_nan(result[1]).all()
        assert not is_nan(result[[0, 2]]).any()
        assert np.all(result[0] == result[2])
    stats = reference.stats(z, plan)
    assert stats.argmax.tolist() == [2, -1, 2]
    assert stats.target_rank.tolist() == [1, -1, 1]
    total = reference.loss(z, plan_for(np.zeros((3, 3)), [1, 0, 1]))
    assert total != total


@pytest.mark.parametrize("options", [*WAYS[:3], {"weight": [0.5, 1, 1]}], ids=str)
def test_minus_infinity_masks_a_class(number, options):
    masked, plain = number([[-INF, 0.5, -1.0]]), number([[0.5, -1.0]])
    short = dict(options)
    if "weight" in options:
        short["weight"] = options["weight"][1:]
    a, b = none(np.zeros((1, 3)), [2], **options), none(np.zeros((1, 2)), [1], **short)
    assert (reference.loss(masked, a) == reference.loss(plain, b)).all()
    assert reference.grad(masked, a)[0, 0] == 0
    assert (reference.grad(masked, a)[:, 1:] == reference.grad(plain, b)).all()
    assert (reference.hessian(masked, a)[:, 0] == 0).all()
    assert reference.softmax(masked)[0, 0] == 0
    assert reference.log_softmax(masked)[0, 0] == -INF
    assert reference.stats(masked, a).entropy[0] == reference.stats(plain, b).entropy[0]


def test_minus_infinity_at_the_target(number):
    z = number([[-INF, 0.0, 0.0], GOOD])
    plan = none(np.zeros((2, 3)), [0, 0])
    loss, grad = reference.loss(z, plan), reference.grad(z, plan)
    assert loss[0] == INF
    assert loss[1] < INF
    assert grad[0].tolist() == [-1, 0.5, 0.5]
    assert reference.stats(z, plan).target_logprob[0] == -INF
    assert reference.stats(z, plan).target_rank[0] == 2
    smooth = none(np.zeros((2, 3)), [1, 0], label_smoothing=0.3)
    assert reference.loss(z, smooth)[0] == INF
    assert (np.abs(reference.grad(z, smooth)) < 2).all()
    capped = none(np.zeros((2, 3)), [0, 0], softcap=2.0)
    assert reference.loss(z, capped)[0] == INF  # the cap does not make it finite
    assert (np.abs(reference.grad(z, capped)) < 2).all()


def test_minus_infinity_under_a_negative_target(number):
    z = number([[-INF, 0.0, 0.0]])
    plan = none(np.zeros((1, 3)), [[-1.0, 1.0, 1.0]])
    assert reference.loss(z, plan)[0] == -INF


def test_gradient_in_a_target_at_minus_infinity(number):
    z, weight = number([[-INF, -INF, 0.0]]), [0.0, 2.0, 1.0]
    plan = none(np.zeros((1, 3)), [[0.5, 0.0, 0.5]], weight=weight)
    assert reference.grad_target(z, plan).tolist() == [[0, INF, 0]]


def test_one_class(number):
    z = number([[7.0]])
    plan = none(np.zeros((1, 1)), [0])
    assert reference.loss(z, plan)[0] == 0
    assert reference.grad(z, plan)[0, 0] == 0
    assert reference.softmax(z)[0, 0] == 1


DROPPED = {
    "ignored": {"target": [1, -100, 2]},
    "weightless": {"target": [1, 0, 2], "sample_weight": [1.0, 0.0, 1.0]},
    "weightless distribution": {
        "target": [GOOD, [NAN, INF, 0.0], GOOD],
        "sample_weight": [1.0, 0.0, 1.0],
    },
    "padding": {
        "target": [[1, 2], [-100, -100], [0, -100]],
        "target_prob": [[0.5, 0.5], [NAN, 1.0], [1.0, 0.0]],
    },
}


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("how", DROPPED)
def test_a_dropped_row_is_inert(number, how, reduction, options):
    z = number([GOOD, [NAN, INF, -INF], GOOD])
    plan = plan_for(np.zeros((3, 3)), **DROPPED[how], **options, reduction=reduction)
    u = [1.0, NAN, 1.0] if reduction == "none" else 1.0
    vector = [[1.0] * 3, [NAN] * 3, [1.0] * 3]
    assert reference.loss_rows(z, plan)[1] == 0
    assert not is_nan(np.asarray(reference.loss(z, plan))).any()
    for result in (
        reference.grad(z, plan, u),
        reference.hvp(z, plan, vector, u),
        reference.hessian(z, plan),
    ):
        assert (result[1] == 0).all()
        assert not is_nan(result).any()
    weights = reference.grad_sample_weight(z, plan, u)
    assert weights[1] == 0
    assert not is_nan(weights).any()
    if plan.kind == "distribution":
        assert (reference.grad_target(z, plan, u)[1] == 0).all()
    elif plan.kind == "sparse":
        assert (reference.grad_target_prob(z, plan, u)[1] == 0).all()
    else:
        assert is_nan(reference.stats(z, plan).logsumexp).tolist() == [False, True, False]


def test_no_kept_row(number):
    z = number([GOOD, GOOD])
    plan = plan_for(np.zeros((2, 3)), [-100, -100], label_smoothing=0.1)
    assert reference.loss(z, plan) == 0
    assert (reference.grad(z, plan) == 0).all()


def test_kept_rows_and_a_divisor_of_zero(number):
    z = number([GOOD, GOOD, GOOD])
    plan = plan_for(np.zeros((3, 3)), [0, 0, 1], sample_weight=[1.0, -1.0, 0.0])
    loss, grad = reference.loss(z, plan), reference.grad(z, plan)
    assert loss != loss
    assert is_nan(grad[:2]).all()
    assert (grad[2] == 0).all()


def test_inputs_are_left_alone():
    z = np.array([[NAN, 1.0, 2.0], GOOD])
    target = np.array([[0.5, 0.25, 0.25], [NAN, 1.0, 1.0]])
    before = z.copy(), target.copy()
    plan = plan_for(z, target, sample_weight=[1.0, 0.0])
    for array in (z, target):
        array.setflags(write=False)
    reference.loss(z, plan)
    reference.hvp(z, plan, z)
    np.testing.assert_array_equal((z, target), before)
