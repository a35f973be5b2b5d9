"""Hessian-vector products of up to 64 classes have a kernel of their own, here beside the other.

A class that is masked (−inf) changes nothing, so with 65 classes, the last ones masked, the kernel
of many classes gives the same product. Agreement with the reference: test_agreement.py.
"""

import numpy as np
import pytest

import crossent

HVP = crossent.cross_entropy_hvp
OPTIONS = [
    {},
    {"z_loss": 0.05, "logit_scale": 0.7},
    {"weight": np.linspace(-1, 2, 65)},
    {"sample_weight": np.arange(11) % 3 - 1.0, "ignore_index": 3},
    {"softcap": 3.0},
]


def problem(n, v, dtype):
    rng = np.random.default_rng(v)
    logits, vector = (rng.normal(size=(n, v)).astype(dtype) for _ in "12")
    return logits * dtype(4), rng.integers(0, v, n), vector


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("classes", [1, 2, 3, 10, 63, 64])
def test_one_more_class_that_is_masked_changes_nothing(options, classes, isa):
    logits, target, vector = problem(11, classes, np.float64)
    more = ((0, 0), (0, 65 - classes))
    wide = np.pad(logits, more, constant_values=-np.inf), np.pad(vector, more, constant_values=9.0)
    options = options | {"reduction": "sum"}
    want = HVP(wide[0], target, wide[1], **options)
    if "weight" in options:
        options["weight"] = options["weight"][:classes]
    found = HVP(logits, target, vector, **options)
    scale = abs(vector).max()
    assert abs(found - want[:, :classes]).max() <= 16 * np.finfo(float).eps * scale


@pytest.mark.parametrize("classes", [2, 10, 64, 65])
def test_a_masked_class_has_no_part_whatever_its_direction(classes, isa):
    logits, _, vector = problem(11, classes, np.float32)
    target = np.zeros(11, int)
    logits[:, 1] = -np.inf
    want = HVP(logits, target, vector)
    for huge in (3e38, np.inf):
        vector[:, 1] = huge
        found = HVP(logits, target, vector)
        assert np.array_equal(found, want)
        assert not found[:, 1].any()
    logits[:, 1] = -3e38  # as good as masked
    assert np.array_equal(HVP(logits, target, vector), want)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9, 17])
def test_a_row_has_the_same_bits_among_any_others(rows, dtype, isa):
    logits, target, vector = problem(rows, 10, np.float64)
    logits, vector = logits.astype(dtype), vector.astype(dtype)
    for i, bad in ((1, np.nan), (4, np.inf), (7, -np.inf)):
        logits[i:, 2 if bad != -np.inf else slice(None)][::9] = bad
    whole = HVP(logits, target, vector, reduction="sum")
    for i in range(rows):
        alone = HVP(logits[i : i + 1], target[i : i + 1], vector[i : i + 1], reduction="sum")
        assert np.array_equal(alone[0], whole[i], equal_nan=True)
        assert np.isnan(whole[i].astype(float)).all() == (i % 9 in (1, 4, 7))
