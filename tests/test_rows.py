"""The plan: what each option, and each kind of target, comes to before any kernel sees it."""

import numpy as np
import pytest

from crossent.options import Options
from crossent.rows import lower

SHAPE = (4, 3)  # N, V
INDEX = [0, 2, -100, 1]
DISTRIBUTION = np.full(SHAPE, 1 / 3)
IDS = np.array([[0, 1], [2, -100], [-100, -100], [1, 1]])
PROB = np.array([[0.25, 0.75], [1.0, 9.0], [0.5, 0.5], [0.5, 0.5]])


def plan(target=INDEX, shape=SHAPE, axis=1, dtype=np.float64, **options):
    return lower("call", shape, axis, np.dtype(dtype), target, Options(**options))


# Kinds of target ----------------------------------------------------------------------------------


def test_index_targets_become_int64_rows():
    found = plan()
    assert (found.kind, found.rows_shape, found.n_classes, found.n_rows) == ("index", (4,), 3, 4)
    assert found.target.dtype == np.int64
    np.testing.assert_array_equal(found.target, INDEX)
    assert (found.skip, found.on, found.off) == (-100, 1.0, 0.0)
    assert (found.z_loss, found.logit_scale, found.softcap) == (0.0, 1.0, 0.0)
    assert found.class_weight is found.row_weight is found.target_prob is None


@pytest.mark.parametrize("dtype", ["i1", "u1", "<i2", ">i2", "u4", "<i8", ">i8", "u8"])
def test_every_integer_dtype_is_an_index(dtype):
    found = plan(np.array([0, 2, 1, 0], dtype))
    assert found.target.dtype == np.dtype("=i8")
    np.testing.assert_array_equal(found.target, [0, 2, 1, 0])


def test_index_targets_of_more_axes_are_rows_in_c_order():
    target = np.arange(6).reshape(2, 3).T % 4  # (3, 2), not contiguous
    found = plan(target, shape=(3, 4, 2), axis=1)
    assert (found.rows_shape, found.axis) == ((3, 2), 1)
    np.testing.assert_array_equal(found.target, target.ravel())


def test_a_distribution_is_passed_on_as_it_lies():
    target = DISTRIBUTION.astype(np.float32)
    found = plan(target)
    assert found.kind == "distribution"
    assert np.shares_memory(found.target, target)


def test_sparse_targets_pad_with_minus_one_and_zero():
    found = plan(IDS, target_prob=PROB)
    assert found.kind == "sparse"
    np.testing.assert_array_equal(found.target, [[0, 1], [2, -1], [-1, -1], [1, 1]])
    np.testing.assert_array_equal(found.target_prob, [[0.25, 0.75], [1, 0], [0, 0], [0.5, 0.5]])
    np.testing.assert_array_equal(found.row_weight, [1, 1, 0, 1])


def test_sparse_targets_along_another_axis():
    rows = plan(IDS, target_prob=PROB)
    found = plan(IDS.T, shape=(3, 4), axis=0, target_prob=PROB.T)
    np.testing.assert_array_equal(found.target, rows.target)
    np.testing.assert_array_equal(found.target_prob, rows.target_prob)


def test_padding_is_ignore_index():
    found = plan([[0, 1], [2, 2], [1, 2], [2, 0]], target_prob=PROB, ignore_index=2)
    np.testing.assert_array_equal(found.target, [[0, 1], [-1, -1], [1, -1], [-1, 0]])
    np.testing.assert_array_equal(found.row_weight, [1, 0, 1, 1])


def test_no_ids_at_all_drop_every_row():
    found = plan(np.empty((4, 0), int), target_prob=np.empty((4, 0)))
    np.testing.assert_array_equal(found.row_weight, np.zeros(4))
    assert found.divisor == 1


# The divisor --------------------------------------------------------------------------------------

WEIGHT = [0.5, 2.0, -3.0]
ROW_WEIGHT = [1.0, 0.25, 7.0, 0.0]


@pytest.mark.parametrize(
    ("options", "divisor"),
    [
        ({}, 3),
        ({"weight": WEIGHT}, 0.5 - 3 + 2),
        ({"sample_weight": ROW_WEIGHT}, 1.25),
        ({"sample_weight": 2.0}, 6),
        ({"weight": WEIGHT, "sample_weight": ROW_WEIGHT}, 0.5 + 0.25 * -3),
        ({"label_smoothing": 0.5, "weight": WEIGHT}, 0.5 - 3 + 2),
        ({"divisor": 10, "weight": WEIGHT}, 10),
        ({"divisor": -2.5}, -2.5),
        ({"divisor": 2**24 + 1}, 2**24 + 1),
        ({"ignore_index": 2}, None),
        ({"reduction": "sum", "sample_weight": ROW_WEIGHT, "weight": WEIGHT}, 1),
        ({"reduction": "none", "sample_weight": ROW_WEIGHT}, 1),
    ],
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_divisor_of_index_targets(options, divisor, dtype):
    if divisor is None:
        assert plan([0, 2, 2, 1], dtype=dtype, **options).divisor == 2
    else:
        assert plan(dtype=dtype, **options).divisor == divisor


@pytest.mark.parametrize(
    ("options", "divisor"),
    [
        ({}, 4),
        ({"weight": WEIGHT}, 4),
        ({"sample_weight": ROW_WEIGHT}, 8.25),
        ({"sample_weight": ROW_WEIGHT, "weight": WEIGHT, "label_smoothing": 1.0}, 8.25),
        ({"ignore_index": 0}, 4),
        ({"divisor": 3.0}, 3),
        ({"reduction": "sum", "sample_weight": ROW_WEIGHT}, 1),
        ({"reduction": "none"}, 1),
    ],
)
def test_the_divisor_of_distributions(options, divisor):
    assert plan(DISTRIBUTION, **options).divisor == divisor


@pytest.mark.parametrize(
    ("options", "divisor"),
    [
        ({}, 3),
        ({"weight": WEIGHT}, 3),
        ({"sample_weight": ROW_WEIGHT}, 1.25),
        ({"divisor": 3.5}, 3.5),
        ({"reduction": "sum"}, 1),
    ],
)
def test_the_divisor_of_sparse_targets(options, divisor):
    assert plan(IDS, target_prob=PROB, **options).divisor == divisor


def test_the_divisor_s_sum_is_compensated():
    row_weight = np.array([1e16, 1.0, 1.0, -1e16])
    assert plan([0, 1, 2, 0], sample_weight=row_weight).divisor == 2
    assert plan(DISTRIBUTION, sample_weight=row_weight).divisor == 2


@pytest.mark.parametrize("target", ["index", "distribution", "sparse"])
def test_kept_rows_with_a_divisor_of_zero_are_nan(target):
    given = {
        "index": (INDEX, {}),
        "distribution": (DISTRIBUTION, {}),
        "sparse": (IDS, {"target_prob": PROB}),
    }[target]
    assert np.isnan(plan(given[0], divisor=0, **given[1]).divisor)
    signs = [1.0, -1.0, 0.0, 0.0]
    assert np.isnan(plan(given[0], sample_weight=signs, **given[1]).divisor)


def test_weights_that_cancel_are_a_divisor_of_zero():
    assert np.isnan(plan([0, 1, -100, -100], weight=[1.0, -1.0, 5.0]).divisor)


@pytest.mark.parametrize("divisor", [None, 0, 5])
def test_with_no_row_kept_the_divisor_is_not_used(divisor):
    assert plan([-100] * 4, divisor=divisor).divisor == 1
    assert plan(INDEX, sample_weight=0.0, divisor=divisor).divisor == 1
    assert plan(DISTRIBUTION, sample_weight=np.zeros(4), divisor=divisor).divisor == 1
    assert plan(np.full((4, 2), -100), target_prob=PROB, divisor=divisor).divisor == 1
    assert plan([], shape=(0, 3), divisor=divisor).divisor == 1
    assert plan(np.empty((0, 3)), shape=(0, 3), divisor=divisor).divisor == 1


# Drops, weights, smoothing ------------------------------------------------------------------------


def test_a_row_of_weight_zero_is_out_of_the_divisor_whatever_its_target():
    found = plan([0, 2, -100, 1], sample_weight=[1.0, 0.0, 5.0, 2.0])
    assert found.divisor == 3
    np.testing.assert_array_equal(found.row_weight, [1, 0, 5, 2])


def test_a_row_of_padding_alone_is_dropped_beside_row_weights():
    found = plan(IDS, target_prob=PROB, sample_weight=ROW_WEIGHT)
    np.testing.assert_array_equal(found.row_weight, [1, 0.25, 0, 0])


def test_row_weights_broadcast_to_the_rows():
    found = plan(np.zeros((2, 3), int), shape=(2, 4, 3), axis=1, sample_weight=[[2.0], [3.0]])
    np.testing.assert_array_equal(found.row_weight, [2, 2, 2, 3, 3, 3])


def test_smoothing_shares_out_epsilon():
    found = plan(label_smoothing=0.3)
    assert (found.on, found.off) == (1 - 0.3, 0.3 / 3)
    found = plan(label_smoothing=1)
    assert (found.on, found.off) == (0.0, 1 / 3)


def test_numbers_are_rounded_to_the_compute_dtype():
    found = plan(
        dtype=np.float32,
        label_smoothing=0.1,
        z_loss=0.1,
        logit_scale=0.1,
        softcap=0.1,
        weight=[0.1, 0.1, 0.1],
        sample_weight=0.1,
        divisor=0.1,
    )
    tenth = float(np.float32(0.1))
    assert (found.z_loss, found.logit_scale, found.softcap) == (tenth, tenth, tenth)
    assert found.on == 1 - tenth
    assert set(found.class_weight) == set(found.row_weight) == {tenth}
    assert found.divisor == 0.1  # a count, kept as it is
    found = plan(IDS, dtype=np.float32, target_prob=np.full(IDS.shape, 0.1))
    assert set(found.target_prob.ravel()) == {tenth, 0.0}


def test_scalar_options_may_be_numpy_s():
    given = plan(
        label_smoothing=np.float32(0.5),
        z_loss=np.array(0.25),
        logit_scale=np.int64(2),
        softcap=np.float16(3),
        ignore_index=np.array(-100),
        divisor=np.uint8(4),
    )
    assert (given.on, given.z_loss, given.logit_scale, given.softcap) == (0.5, 0.25, 2.0, 3.0)
    assert (given.divisor, given.skip) == (4.0, -100)


def test_a_plan_does_not_write_to_what_it_is_given():
    target, row_weight, weight = np.array(INDEX), np.array(ROW_WEIGHT), np.array(WEIGHT)
    ids, prob = IDS.copy(), PROB.copy()
    for array in (target, row_weight, weight, ids, prob):
        array.flags.writeable = False
    plan(target, sample_weight=row_weight, weight=weight)
    plan(ids, target_prob=prob, sample_weight=row_weight)
    np.testing.assert_array_equal(ids, IDS)
