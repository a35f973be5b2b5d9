"""`crossent check`: what it measures, and that a wrong kernel does not pass it."""

import io
import re

import numpy as np
import pytest

pytest.importorskip("mpmath")
pytest.importorskip("rich")

import mpmath
from rich.console import Console

import crossent
from crossent import _native
from crossent.accuracy import compare, computed, measure, truths, ulp
from crossent.cli.check import check
from crossent.hard_cases import Case, index_cases, option_cases, special_case

DTYPES = ("float64", "float32", "float16", "bfloat16")


def dtype_of(name):
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(name)


def run(quick=True):
    page = io.StringIO()
    passed = check(quick=quick, console=Console(file=page, width=100))
    return passed, page.getvalue()


# The report ---------------------------------------------------------------------------------------


def test_this_machine_passes():
    passed, page = run()
    assert passed
    assert "FAIL" not in page
    assert f"instruction set: {_native.isa()} in use" in page
    assert f"threads: {crossent.get_num_threads()} " in page
    for dtype in DTYPES:
        dtype_of(dtype)
        for quantity in ("loss", "gradient", "softmax", "log_softmax"):
            assert re.search(rf"^{dtype} +{quantity} +plain +\d+ +[\d.]+ +[\d.]+ +ok$", page, re.M)


def scaled(result, factor):
    return crossent.LossGrad(result.loss, (result.grad * factor).astype(result.grad.dtype))


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        pytest.param(
            lambda found: scaled(found, 1 + 2**-20),
            "FAIL: float32 gradient, .* ulp, 4 allowed",
            id="gradient",
        ),
        pytest.param(
            lambda found: crossent.LossGrad(found.loss * (1 + 2**-20), found.grad),
            "FAIL: float64 loss",
            id="loss",
        ),
        pytest.param(
            lambda found: crossent.LossGrad(np.nan_to_num(found.loss), found.grad),
            "FAIL: float64 loss, NaN and infinities, .* NaN or infinity amiss",
            id="NaN",
        ),
        pytest.param(lambda found: scaled(found, -1), "FAIL: bfloat16 gradient", id="sign"),
    ],
)
def test_a_wrong_kernel_is_found(monkeypatch, spoil, line):
    right = crossent.cross_entropy_value_and_grad
    monkeypatch.setattr(
        crossent, "cross_entropy_value_and_grad", lambda *a, **k: spoil(right(*a, **k))
    )
    passed, page = run()
    assert not passed
    assert re.search(r"^float64 .* ok$", page, re.M)  # what is right is still called so
    assert re.search(line, " ".join(page.split()))
    _, dtype, quantity = line.replace(",", "").split()[:3]
    assert re.search(rf"^{dtype} +{quantity} +plain .* FAIL$", page, re.M)


# The measure --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "dtype", "exponent"),
    [
        (1.0, "float64", -52),
        (-1.5, "float32", -23),
        (2.0 - 2**-20, "float32", -23),
        (2.0, "float16", -9),
        (1.0, "bfloat16", -7),
        (0.0, "float64", -1074),
        (1e-320, "float64", -1074),
        (2.0**-126, "float32", -149),
        (2.0**-24, "float16", -24),
        (3e-40, "bfloat16", -133),
    ],
)
def test_ulp(x, dtype, exponent):
    assert ulp(mpmath.mpf(x), dtype) == mpmath.mpf(2) ** exponent


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_ulp_is_numpy_s_spacing(dtype):
    for x in np.array([1e-300, 1e-30, 0.1, 1.0, 7.0, 3e38]).astype(dtype):
        if x:
            assert float(ulp(mpmath.mpf(float(x)), dtype)) == float(np.spacing(x))


def test_an_error_is_counted_in_ulp_of_the_exact_value():
    case = Case("two", np.array([[0.0, 1.0]], np.float32), np.array([1]))
    loss = truths(case)[0]
    nearest = np.float32(np.log1p(np.exp(-1.0)))
    assert compare(loss, np.array([nearest])).error <= 0.5
    three_up = nearest + 3 * np.spacing(nearest)
    assert compare(loss, np.array([three_up])).error == pytest.approx(3, abs=0.5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_allow_one_rounding_and_no_more(dtype):
    case = Case("two", np.array([[0.0, 1.0]]).astype(dtype_of(dtype)), np.array([1]))
    gradient = {truth.quantity: truth for truth in truths(case)}["gradient"]
    right = computed(case)["gradient"]
    assert compare(gradient, right).ok
    assert not compare(gradient, np.nextafter(right, right.dtype.type(1))).ok


def test_nan_and_infinity_must_be_in_their_places():
    case = special_case(np.dtype(np.float64))
    for truth in truths(case):
        right = computed(case)[truth.quantity]
        assert compare(truth, right).ok
        for wrong in (np.nan, np.inf):
            moved = np.where(np.isfinite(right), right, 0.0)
            assert compare(truth, moved).error == np.inf
            at = tuple(np.argwhere(np.isfinite(right))[0])
            moved = right.copy()
            moved[at] = wrong
            assert compare(truth, moved).place == at


# The cases ----------------------------------------------------------------------------------------


def test_index_cases_reach_what_hurts():
    dtype = np.dtype(np.float32)
    (case,) = index_cases(dtype, (5,), limit=10**6)
    found = computed(case)
    tiny = np.finfo(dtype).tiny
    assert ((found["loss"] > 0) & (found["loss"] < tiny)).any()
    assert ((np.abs(found["gradient"]) > 0) & (np.abs(found["gradient"]) < tiny)).any()
    assert set(case.target) == {0, 2, 4}
    assert np.isneginf(case.logits).any()
    assert (np.abs(case.logits[np.isfinite(case.logits)]) > 1e29).any()


def test_option_cases_name_every_option():
    cases = list(option_cases(np.dtype(np.float64), 8, 5, together=1))
    tried = {name for case in cases for name in case.options}
    assert tried >= {
        *("weight", "sample_weight", "label_smoothing", "z_loss", "logit_scale", "softcap"),
        *("reduction", "target_prob", "grad_output"),
    }
    assert {case.target.shape for case in cases} == {(8,), (8, 5), (8, 3)}
    assert len({case.name for case in cases}) == len(cases)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_keep_their_bounds_with_two_options_at_once(dtype):
    for case in option_cases(dtype_of(dtype), 8, 5, together=2):
        for found in measure(case):
            assert found.ok, (case.name, found.truth.quantity, found.error, found.place)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_keeps_its_bounds(dtype):
    before = _native.isa()
    try:
        for case in index_cases(dtype_of(dtype), (1, 3, 17, 40), limit=300):
            exact = truths(case)
            for isa in _native.available_isas():
                assert _native.set_isa(isa)
                results = computed(case)
                for truth in exact:
                    found = compare(truth, results[truth.quantity])
                    assert found.ok, (isa, case.name, truth.quantity, found.error, found.place)
    finally:
        _native.set_isa(before)
