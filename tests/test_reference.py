"""`reference` by hand values, by finite differences and by its own consistency.

`test_reference_edges.py` holds extreme and bad inputs, `test_maths_numbers.py` each formula.
"""

from fractions import Fraction

import mpmath
import numpy as np
import pytest

from crossent import reference
from crossent.options import Options
from crossent.reference import exact
from crossent.rows import lower

# 1, 2, 3 before normalising: p = 1/6, 1/3, 1/2, lse = ln 6.
SIXTHS = np.log([[1.0, 2.0, 3.0]])
P = np.array([[1, 2, 3]]) / 6
# Logarithms, exponentials and a sum of three: a handful of roundings.
BY_HAND = 8 * 2.0**-53


@pytest.fixture(autouse=True)
def _sixty_digits():
    with mpmath.workdps(60):
        yield


def plan_for(logits, target, axis=-1, **options):
    shape = np.shape(logits)
    return lower("test", shape, axis % len(shape), np.dtype(float), target, Options(**options))


# By hand ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "options", "loss", "grad"),
    [
        ([0], {}, np.log(6), P - [1, 0, 0]),
        ([2], {}, np.log(2), P - [0, 0, 1]),
        ([[0.0, 0.5, 0.5]], {}, np.log(6) / 2, P - [0, 0.5, 0.5]),
        ([[0.0, 1.0, 1.0]], {}, np.log(6), 2 * P - [0, 1, 1]),
        ([[1, 2, 2]], {"target_prob": [[0.5, 0.25, 0.25]]}, np.log(6) / 2, P - [0, 0.5, 0.5]),
        ([0], {"weight": [2.0, 3, 5], "reduction": "sum"}, 2 * np.log(6), 2 * P - [2, 0, 0]),
        ([0], {"weight": [2.0, 3, 5]}, np.log(6), P - [1, 0, 0]),
        ([0], {"sample_weight": [-3.0], "reduction": "sum"}, -3 * np.log(6), [3, 0, 0] - 3 * P),
        ([0], {"label_smoothing": 1.0}, np.log(36) / 3, P - 1 / 3),
        ([0], {"z_loss": 0.5}, np.log(6) + np.log(6) ** 2 / 2, P * (1 + np.log(6)) - [1, 0, 0]),
        ([0], {"divisor": 4.0}, np.log(6) / 4, (P - [1, 0, 0]) / 4),
    ],
    ids=str,
)
def test_hand_values(target, options, loss, grad):
    plan = plan_for(SIXTHS, target, **options)
    assert reference.loss(SIXTHS, plan) == pytest.approx(loss, rel=BY_HAND)
    np.testing.assert_allclose(reference.grad(SIXTHS, plan), grad, rtol=BY_HAND, atol=BY_HAND)


def test_hand_values_of_scale_and_softcap():
    squares = np.array([[1, 4, 9]]) / 14
    plan = plan_for(SIXTHS, [1], logit_scale=2.0)
    np.testing.assert_allclose(reference.rows(SIXTHS, plan).p, squares, rtol=BY_HAND)
    np.testing.assert_allclose(
        reference.grad(SIXTHS, plan), 2 * (squares - [0, 1, 0]), rtol=BY_HAND
    )
    capped = np.arctanh([[0.0, 0.5, -0.5]])  # z = 2·tanh(2v/2) = 0, 1, −1
    plan = plan_for(capped, [0], logit_scale=2.0, softcap=2.0)
    np.testing.assert_allclose(reference.rows(capped, plan).z, [[0, 1, -1]], rtol=BY_HAND)
    p = reference.softmax([[0.0, 1.0, -1.0]])
    slope = 2 * np.array([1, 0.75, 0.75])
    np.testing.assert_allclose(
        reference.grad(capped, plan), (p - [1, 0, 0]) * slope, rtol=2 * BY_HAND
    )


def test_hand_values_of_softmax_and_its_jacobian():
    np.testing.assert_allclose(reference.softmax(SIXTHS.T, axis=0), P.T, rtol=BY_HAND)
    np.testing.assert_allclose(reference.log_softmax(SIXTHS), np.log(P), rtol=BY_HAND)
    jacobian = np.array([[5, -2, -3], [-2, 8, -6], [-3, -6, 9]]) / 36
    np.testing.assert_allclose(reference.softmax_jacobian(SIXTHS[0]), jacobian, rtol=BY_HAND)
    assert reference.softmax_jacobian(np.zeros((4, 2, 3))).shape == (4, 2, 3, 3)


def test_hand_values_of_the_chain_rule():
    terms = reference.chain_rule_terms([0.5, 0.5, 0.0], [0.25, 0.0, 0.5])
    # −(â_i/a_i)·a_i·(δ_ij − a_j); the third class has an output of 0
    np.testing.assert_array_equal(terms, [[-0.125, 0.125, 0], [0, 0, 0], [0.25, 0.25, -0.5]])


def test_mean_divides_by_the_weights_of_kept_rows():
    logits = np.repeat(SIXTHS, 4, axis=0)
    weight, s = np.array([2.0, 3, 5]), np.array([1.0, 2, 0, 4])
    plan = plan_for(logits, [0, -100, 1, 2], weight=weight, sample_weight=s)
    expected = (1 * 2 * np.log(6) + 4 * 5 * np.log(2)) / (1 * 2 + 4 * 5)
    assert reference.loss(logits, plan) == pytest.approx(expected, rel=BY_HAND)
    plan = plan_for(logits, np.full((4, 3), 1 / 3), sample_weight=s)
    assert reference.loss(logits, plan) == pytest.approx(np.log(36) / 3, rel=BY_HAND)


def test_stats_by_hand():
    logits = np.log([[1.0, 2.0, 3.0], [3.0, 3.0, 3.0], [1.0, 2.0, 2.0], [1.0, 1.0, 1.0]])
    plan = plan_for(logits, [0, 2, 1, -100], reduction="none")
    stats = reference.stats(logits, plan)
    np.testing.assert_allclose(stats.logsumexp, [*np.log([6, 9, 5]), np.nan], rtol=BY_HAND)
    np.testing.assert_allclose(stats.target_logprob, [*-np.log([6, 3, 2.5]), np.nan], rtol=BY_HAND)
    first = np.log(6) / 6 + np.log(3) / 3 + np.log(2) / 2
    third = np.log(5) / 5 + 0.8 * np.log(2.5)
    np.testing.assert_allclose(stats.entropy, [first, np.log(3), third, np.nan], rtol=BY_HAND)
    np.testing.assert_array_equal(stats.argmax, [2, 0, 1, -1])
    np.testing.assert_array_equal(stats.target_rank, [2, 0, 0, -1])
    assert stats.target_rank.dtype == np.int64


def test_stats_see_the_scaled_and_capped_logits():
    plan = plan_for(SIXTHS, [1], logit_scale=2.0, softcap=3.0)
    z = 3 * np.tanh(2 * SIXTHS / 3)
    plain = reference.stats(z, plan_for(z, [1]))
    for a, b in zip(reference.stats(SIXTHS, plan), plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=BY_HAND)


# By differences, for every kind of target and every option ----------------------------------------

RNG = np.random.default_rng(7)
LOGITS = RNG.normal(size=(2, 4, 3)) * 3  # class axis 1
IDS = RNG.integers(0, 4, (2, 5, 3))
IDS[0, :3, 0] = -100
IDS[1, :, 1] = -100  # a row of padding alone
TARGETS = {
    "index": {"target": np.array([[0, -100, 3], [1, 2, 0]])},
    "distribution": {"target": RNG.normal(size=LOGITS.shape)},
    "sparse": {"target": IDS, "target_prob": RNG.random(IDS.shape)},
}
OPTIONS = {
    "weight": RNG.normal(size=4),
    "sample_weight": np.array([[1.0, 2.0, -0.5], [0.0, 3.0, 0.25]]),
    "label_smoothing": 0.125,
    "z_loss": 0.01,
    "logit_scale": 1.7,
    "softcap": 5.0,
}
CASES = [{}, *({name: value} for name, value in OPTIONS.items()), OPTIONS]
STEP = mpmath.mpf(10) ** -20
# h² times a third derivative, and 1e-60/h, both of numbers below 1e4.
BY_DIFFERENCE = mpmath.mpf(10) ** -35


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", CASES, ids=lambda case: "+".join(case) or "plain")
@pytest.mark.parametrize("kind", TARGETS)
def test_derivatives_by_differences(kind, options, reduction):
    plan = plan_for(LOGITS, **TARGETS[kind], **options, axis=1, reduction=reduction)
    x, direction = exact(LOGITS), exact(RNG.normal(size=LOGITS.shape))
    u = exact(RNG.normal(size=(2, 3)) if reduction == "none" else 1.5)[()]
    up, down = x + STEP * direction, x - STEP * direction
    slope = np.sum(u * (reference.loss(up, plan) - reference.loss(down, plan))) / (2 * STEP)
    gradient = reference.grad(x, plan, u)
    assert abs((gradient * direction).sum() - slope) < BY_DIFFERENCE
    curve = (reference.grad(up, plan, u) - reference.grad(down, plan, u)) / (2 * STEP)
    product = reference.hvp(x, plan, direction, u)
    assert np.abs(product - curve).max() < BY_DIFFERENCE

    rows = np.moveaxis(direction, 1, -1).reshape(6, 4)
    by_matrix = np.einsum("ijk,ik->ij", reference.hessian(x, plan), rows).reshape(2, 3, 4)
    by_matrix = np.broadcast_to(u, (2, 3))[..., None] * by_matrix
    assert np.abs(product - np.moveaxis(by_matrix, -1, 1)).max() < BY_DIFFERENCE


@pytest.mark.parametrize("kind", TARGETS)
def test_floats_follow_the_exact_numbers(kind):
    plan = plan_for(LOGITS, **TARGETS[kind], **OPTIONS, axis=1)
    vector = RNG.normal(size=LOGITS.shape)
    for function, *rest in (
        (reference.loss,),
        (reference.grad,),
        (reference.hvp, vector),
        (reference.hessian,),
    ):
        floats = function(LOGITS, plan, *rest)
        truth = function(exact(LOGITS), plan, *map(exact, rest))
        # A few dozen roundings of numbers below 1e2.
        np.testing.assert_allclose(floats, np.array(truth, float), rtol=0, atol=1e4 * 2.0**-53)


# Consistency --------------------------------------------------------------------------------------


def test_hessian_is_symmetric_positive_semi_definite_and_the_jacobian_times_the_targets_sum():
    logits, target = RNG.normal(size=(5, 4)) * 4, RNG.random((5, 4))
    hessian = reference.hessian(exact(logits), plan_for(logits, target, reduction="sum"))
    jacobian = reference.softmax_jacobian(exact(logits))
    difference = hessian - exact(target).sum(axis=1)[:, None, None] * jacobian
    assert np.abs(difference).max() < BY_DIFFERENCE
    assert (hessian == hessian.transpose(0, 2, 1)).all()
    values = np.linalg.eigvalsh(hessian.astype(float))
    assert (values >= -8 * np.finfo(float).eps).all()
    assert (values[:, 1] > 0).all()  # one flat direction alone


@pytest.mark.parametrize("kind", TARGETS)
def test_gradient_and_hessian_sum_to_zero_over_the_classes(kind):
    plain = {k: v for k, v in OPTIONS.items() if k not in ("z_loss", "softcap")}
    plan = plan_for(LOGITS, **TARGETS[kind], **plain, axis=1)
    assert np.abs(reference.grad(exact(LOGITS), plan).sum(axis=1)).max() < BY_DIFFERENCE
    assert np.abs(reference.hessian(exact(LOGITS), plan).sum(axis=1)).max() < BY_DIFFERENCE
    ones = exact(np.ones(LOGITS.shape))
    assert np.abs(reference.hvp(exact(LOGITS), plan, ones)).max() < BY_DIFFERENCE


def test_three_ways_to_write_one_target():
    logits, y = LOGITS[0].T, np.array([3, 0, 1])
    one_hot = np.eye(4)[y]
    repeated = {"target": np.stack([y, y, y], axis=1), "target_prob": np.full((3, 3), 1 / 4)}
    repeated["target_prob"][:, 0] = 1 / 2
    smooth = {"label_smoothing": 0.25, "reduction": "sum"}
    results = [
        (reference.loss(logits, plan), reference.grad(logits, plan))
        for plan in (
            plan_for(logits, y, **smooth),
            plan_for(logits, one_hot, **smooth),
            plan_for(logits, **repeated, **smooth),
        )
    ]
    for loss, grad in results[1:]:
        assert loss == results[0][0]
        np.testing.assert_array_equal(grad, results[0][1])


# The layer before the loss ------------------------------------------------------------------------


def test_the_layer_by_hand():
    x, w, b = [[1.0, 2.0]], [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [0.5, 0.0, -1.0]
    np.testing.assert_array_equal(reference.weighted_sums(x, w), [[1, 2, 3]])
    np.testing.assert_array_equal(reference.weighted_sums(x, w, b), [[1.5, 2, 2]])
    thirds = [[0.0, 0.0]] * 3  # W = 0: p = 1/3 for all, and a gradient of −2/3, 1/3, 1/3
    of_x, of_w, of_b = reference.linear_grad(x, thirds, None, plan_for(np.zeros((1, 3)), [0]))
    np.testing.assert_array_equal(of_x, [[0, 0]])
    np.testing.assert_allclose(of_b, np.array([-2, 1, 1]) / 3, rtol=BY_HAND)
    np.testing.assert_allclose(of_w, np.array([[-2, -4], [1, 2], [1, 2]]) / 3, rtol=BY_HAND)


def test_the_layer_s_gradients_are_differences_of_the_loss():
    rng = np.random.default_rng(0)
    arrays = [exact(rng.normal(size=size)) for size in ((2, 3, 2), (4, 2), 4)]
    target = [[0, -100, 2], [3, 1, 1]]
    plan = plan_for(np.zeros((2, 3, 4)), target, label_smoothing=0.1, softcap=2.0)
    h = mpmath.mpf("1e-20")  # the difference is good to h² = 1e-40
    grads = reference.linear_grad(*arrays, plan)
    assert not grads[0][0, 1].any()
    for grad, array in zip(grads, arrays, strict=True):
        for at in np.ndindex(array.shape):
            value, ends = array[at], []
            for step in (h, -h):
                array[at] = value + step
                ends.append(reference.loss(reference.weighted_sums(*arrays), plan))
            array[at] = value
            assert abs((ends[0] - ends[1]) / (2 * h) - grad[at]) < 1e-35


def test_the_layer_does_not_read_dropped_rows():
    x = np.array([[1.0, 2.0], [np.nan, np.inf]])
    grads = reference.linear_grad(x, np.eye(2), None, plan_for(np.zeros((2, 2)), [0, -100]))
    assert all(np.isfinite(grad).all() for grad in grads)


def test_class_axis_may_lie_anywhere():
    y = TARGETS["index"]["target"]
    last = np.moveaxis(LOGITS, 1, -1)
    a, b = (plan_for(x, y, axis=k, reduction="none") for x, k in ((LOGITS, 1), (last, 2)))
    np.testing.assert_array_equal(reference.loss(LOGITS, a), reference.loss(last, b))
    np.testing.assert_array_equal(
        np.moveaxis(reference.grad(LOGITS, a), 1, -1), reference.grad(last, b)
    )
    np.testing.assert_array_equal(
        np.moveaxis(reference.softmax(LOGITS, axis=1), 1, -1), reference.softmax(last)
    )


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (np.float16, np.float32),
        (np.float32, np.float32),
        (np.float64, np.float64),
        (np.longdouble, np.longdouble),
        (np.int32, np.float64),
    ],
)
def test_dtype_of_the_numbers(given, computed):
    logits = np.array([[1, 2, 3]], dtype=given)
    plan = plan_for(logits, [0], **{k: OPTIONS[k] for k in ("z_loss", "softcap", "logit_scale")})
    assert reference.loss(logits, plan).dtype == computed
    assert reference.grad(logits, plan).dtype == computed
    assert reference.hvp(logits, plan, np.ones((1, 3))).dtype == computed
    assert reference.softmax(logits).dtype == computed


def test_shapes_of_one_row_and_of_no_row():
    plan = plan_for(SIXTHS[0], 0, reduction="none")
    assert isinstance(reference.loss(SIXTHS[0], plan), np.float64)
    assert reference.grad(SIXTHS[0], plan).shape == (3,)
    nothing = np.zeros((0, 3))
    plan = plan_for(nothing, np.zeros(0, int))
    assert reference.loss(nothing, plan) == 0
    assert reference.loss(exact(nothing), plan) == 0
    assert reference.grad(nothing, plan).shape == (0, 3)


def test_exact_keeps_every_bit():
    numbers = np.array([0.1, -1e-310, 1e308, 3.0], dtype=np.float64).reshape(2, 2)
    for given in (numbers, numbers[:, ::-1]):
        for x, y in zip(given.flat, exact(given).flat, strict=True):
            sign, mantissa, exponent, _ = y._mpf_
            assert Fraction(float(x)) == (-1) ** sign * mantissa * Fraction(2) ** exponent
    assert exact(0.5).shape == ()
