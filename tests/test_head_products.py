"""The products of the fused head: each against float64, and the rounding of what they give."""

import itertools

import numpy as np
import pytest

import crossent
from crossent import _native, products
from crossent.products import store

NAMES = "float64", "float32", "float16", "bfloat16"


def numbers(rng, shape, name):
    """Numbers as a product takes them (bfloat16 as uint16), and what they are in float64."""
    if name != "bfloat16":
        given = rng.normal(size=shape).astype(name)
        return given, given.astype(np.float64)
    bits = (rng.normal(size=shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@pytest.mark.parametrize("product", [products.native, products.host])
@pytest.mark.parametrize("of_a", NAMES)
@pytest.mark.parametrize("of_b", NAMES)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_a_product_is_that_of_its_numbers(product, of_a, of_b, accumulate, turned):
    rng = np.random.default_rng(0)
    m, k, n = 13, 300, 21
    a, true_a = numbers(rng, (k, m) if turned else (m, k), of_a)
    b, true_b = numbers(rng, (n, k) if turned else (k, n), of_b)
    if turned:
        a, true_a, b, true_b = a.T, true_a.T, b.T, true_b.T
    dtype = np.float64 if "float64" in (of_a, of_b) else np.float32
    out, bias = rng.normal(size=(m, 2 * n)).astype(dtype)[:, :n], rng.normal(size=n).astype(dtype)
    want = true_a @ true_b + bias.astype(np.float64) + out.astype(np.float64) * accumulate
    sizes = np.abs(true_a) @ np.abs(true_b) + np.abs(bias) + np.abs(out)
    product(a, b, out, accumulate=accumulate, bias=bias)
    u = np.finfo(dtype).eps / 2
    assert (np.abs(out - want) <= (k + 2) * u / (1 - (k + 2) * u) * sizes + 1e-13).all()


def test_store_rounds_as_the_dtype_does():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, np.uint32)
    bits[:65536] = np.arange(65536, dtype=np.uint32) << 16 | 0x8000  # ties
    given = bits.view(np.float32).reshape(400, 500)
    rounded = np.empty(given.shape, np.uint16)
    store(given, rounded)
    with np.errstate(all="ignore"):
        want = given.astype(ml_dtypes.bfloat16)
    found = rounded.view(ml_dtypes.bfloat16)
    nan = np.isnan(given)
    assert np.isnan(found[nan].astype(np.float32)).all()
    assert found[~nan].tobytes() == want[~nan].tobytes()
    half = np.empty(given.shape, np.float16)
    store(given, half)
    with np.errstate(all="ignore"):
        assert half[~nan].tobytes() == given.astype(np.float16)[~nan].tobytes()


def test_store_puts_rows_where_they_belong():
    out = np.zeros((5, 2), np.float16)
    store(np.array([[1.0, 2], [3, 4]], np.float32), out, np.array([4, 1]))
    assert out.tolist() == [[0, 0], [3, 4], [0, 0], [0, 0], [1, 2]]


# The library's own product ------------------------------------------------------------------------

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


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_a_product_of_every_other_number(dtype, isa):
    """Two float16 lie as far apart as float32 numbers in a row do."""
    rng = np.random.default_rng(0)
    for shape in (40, 30, 13), (13, 30, 40):  # either side packed
        m, k, n = shape
        a = rng.standard_normal((m, 2 * k)).astype(dtype)[:, ::2]
        b = rng.standard_normal((2 * k, 2 * n)).astype(dtype)[::2, ::2]
        found, wanted = (np.empty((m, n), np.result_type(dtype, np.float32)) for _ in "ab")
        products.native(a, b, found)
        products.native(a.copy(), b.copy(), wanted)
        assert np.array_equal(found, wanted)


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
        (np.ones((4, 2), np.float32), np.empty((3, 2), np.float32), np.ones(4, np.float32)[::2]),
        (np.ones((4, 2), np.float32), np.empty((6, 2), np.float32)[::-2], None),
    ):
        with pytest.raises(ValueError, match="expected"):
            _native.matmul(a, b, out, False, bias)
    with pytest.raises(ValueError, match="expected out in float32"):
        _native.matmul(
            a[:1], np.ones((4, 1), np.float32), np.empty((1, 1), np.float16), False, None
        )


def test_a_long_sum_has_its_bias_once():
    """The packed side goes in slabs where the sum is long and wide."""
    a, b = np.ones((700, 1600), np.float32), np.ones((1600, 700), np.float32)
    out, bias = np.empty((700, 700), np.float32), np.arange(700, dtype=np.float32)
    products.native(a, b, out, bias=bias)
    assert (out == 1600 + bias).all()
