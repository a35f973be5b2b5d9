"""The products of the fused head: each against float64, and the rounding of what they give."""

import numpy as np
import pytest

from crossent.products import host_product, native_product, store

NAMES = "float64", "float32", "float16", "bfloat16"


def numbers(rng, shape, name):
    """Numbers as a product takes them (bfloat16 as uint16), and what they are in float64."""
    if name != "bfloat16":
        given = rng.normal(size=shape).astype(name)
        return given, given.astype(np.float64)
    bits = (rng.normal(size=shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@pytest.mark.parametrize("product", [native_product, host_product])
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
