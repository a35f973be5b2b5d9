"""The fused head in bfloat16: what is multiplied, what may be rounded first, and what is read.

With AVX512_BF16 products of bfloat16 go two depths at a time, and a float32 operand beside one is
rounded to bfloat16 where the caller allows it; elsewhere nothing is rounded. In either case a sum
of K products is within γ_K = K·u/(1 − K·u) of the sum of their magnitudes, u that of float32.
"""

import ctypes
import itertools
import mmap
import sys

import numpy as np
import pytest

import crossent
from crossent import LinearGrad, products

BF16 = "x86-64-v4-bf16"
U = 2.0**-8  # bfloat16's unit roundoff
NAMES = "float64", "float32", "float16", "bfloat16"
PAIRS = [pair for pair in itertools.product(NAMES, NAMES) if "bfloat16" in pair]


def gamma(n, dtype=np.float32):
    u = np.finfo(dtype).eps / 2
    return n * u / (1 - n * u)


def as_bits(array):
    """The nearest bfloat16 numbers, ties to even, as uint16."""
    bits = np.asarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def as_numbers(array):
    """What an operand's numbers are, in float64."""
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def operand(rng, shape, name, order="C"):
    array = np.asarray(rng.standard_normal(shape), np.float32)
    array = as_bits(array) if name == "bfloat16" else array.astype(name)
    return np.asarray(array, order=order)


def multiplied(a, b, isa, may_round):
    """The two operands in float64, rounded as the product does."""
    if may_round and isa == BF16 and {a.dtype, b.dtype} == {np.dtype("f4"), np.dtype("u2")}:
        a, b = (x if x.dtype == np.uint16 else as_bits(x) for x in (a, b))
    return as_numbers(a), as_numbers(b)


def product(a, b, **options):
    wide = np.float64 in (a.dtype, b.dtype)
    out = np.full((len(a), b.shape[1]), np.nan, np.float64 if wide else np.float32)
    products.native(a, b, out, **options)
    return out


# Products -----------------------------------------------------------------------------------------

# Within one vector, parts of strips and panels, and whole ones; either side the shorter one.
SHAPES = [(1, 1), (5, 70), (70, 5), (16, 33), (16, 100), (48, 97), (96, 96), (130, 49)]


@pytest.mark.parametrize("depth", [1, 2, 3, 31, 66, 127, 129, 255, 256, 257, 600])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_a_product_is_that_of_its_numbers(pair, depth, isa):
    rng = np.random.default_rng(depth)
    for (m, n), order_a, order_b, may_round in itertools.product(SHAPES, "CF", "CF", (0, 1)):
        a = operand(rng, (m, depth), pair[0], order_a)
        b = operand(rng, (depth, n), pair[1], order_b)
        dtype = np.float64 if "float64" in pair else np.float32
        before, bias = (rng.standard_normal(size).astype(dtype) for size in ((m, n), n))
        out, (true_a, true_b) = before.copy(), multiplied(a, b, isa, may_round)
        products.native(a, b, out, accumulate=True, bias=bias, may_round=bool(may_round))
        exact = true_a @ true_b + before + bias
        size = abs(true_a) @ abs(true_b) + abs(before) + abs(bias)
        bound = 2 * gamma(depth + 2, dtype) * size  # as much for NumPy's
        assert (abs(out - exact) <= bound).all(), (m, n, order_a, order_b, may_round)


@pytest.mark.parametrize("other", ["float32", "bfloat16"])
@pytest.mark.parametrize("depth", [64, 129])
def test_where_the_numbers_lie_changes_no_bit(other, depth, isa):
    """Every other row or column, backwards, at odd addresses of pairs."""
    rng = np.random.default_rng(0)
    for m, n in (24, 100), (100, 24), (12, 9):
        for name_a, name_b in ("bfloat16", other), (other, "bfloat16"):
            a = operand(rng, (2 * m + 1, 2 * depth + 1), name_a)
            b = operand(rng, (2 * depth + 1, 2 * n + 1), name_b)
            for few, deep, many in itertools.product(
                (slice(m), slice(1, 2 * m, 2), slice(m, 0, -1)),
                (slice(depth), slice(1, depth + 1), slice(0, 2 * depth, 2), slice(depth, 0, -1)),
                (slice(n), slice(1, n + 1), slice(2, 2 * n + 1, 2), slice(n, 0, -1)),
            ):
                one, two = a[few, deep], b[deep, many]
                found = product(one, two, may_round=True)
                for order_a, order_b in ("CC", "FF"):
                    copies = np.array(one, order=order_a), np.array(two, order=order_b)
                    assert found.tobytes() == product(*copies, may_round=True).tobytes()


def test_a_rows_sum_does_not_depend_on_its_neighbours_or_the_threads(isa):
    rng = np.random.default_rng(1)
    w = operand(rng, (90, 601), "bfloat16")
    for name in "bfloat16", "float32":
        x = operand(rng, (300, 601), name)
        whole = product(x, w.T, may_round=True)
        some = product(x[100:120], w.T, may_round=True)  # the other side is packed now
        assert np.array_equal(whole[100:120], some)
        assert np.array_equal(whole, product(w, x.T, may_round=True).T)
        before = crossent.get_num_threads()
        crossent.set_num_threads(3)
        again = product(x, w.T, may_round=True)
        crossent.set_num_threads(before)
        assert np.array_equal(whole, again)


def test_float32_is_rounded_to_even_where_it_may_be(isa):
    # In 48 rows, for whole panels and strips, 33 and 66 for parts: all but the sum is exact.
    ties = (0x3F80_0000 + np.arange(48 * 66, dtype=np.uint32) * 0x8000).view(np.float32)
    nearest = as_numbers(as_bits(ties)).reshape(48, 66)
    ties = ties.reshape(48, 66)
    unit = as_bits(np.eye(66))
    for given, wanted in (ties, nearest), (ties.copy("F"), nearest), (ties[:33], nearest[:33]):
        for may_round in False, True:
            want = wanted if may_round and isa == BF16 else given
            assert np.array_equal(product(given, unit, may_round=may_round), want)
            assert np.array_equal(product(unit, given.T, may_round=may_round), want.T)
            assert np.array_equal(
                product(given, np.eye(66, dtype="f4"), may_round=may_round), given
            )
    half = (ties.reshape(-1)[:66] / 8).astype(np.float16)[None]
    assert np.array_equal(product(half, unit, may_round=True), half)


def test_nan_and_infinity_are_where_they_belong(isa):
    rng = np.random.default_rng(0)
    for name, (m, n) in itertools.product(("bfloat16", "float32"), ((9, 60), (60, 9), (48, 48))):
        for value, depth in itertools.product((np.nan, np.inf, -np.inf), (7, 64)):
            a, b = operand(rng, (m, depth), name), operand(rng, (depth, n), "bfloat16")
            number = np.array(value, np.float32)
            a[3, 5] = number.view(np.uint32) >> 16 if name == "bfloat16" else number
            with np.errstate(invalid="ignore"):
                want = as_numbers(a) @ as_numbers(b)
            found = product(a, b, may_round=True)
            assert np.array_equal(np.isnan(found), np.isnan(want))
            assert np.array_equal(found[3], want[3], equal_nan=True)
            assert np.isfinite(np.delete(found, 3, axis=0)).all()
    # A NaN of any payload stays one: 0x7F800001 would be cut to infinity.
    for bits in 0x7F80_0001, 0xFFFF_FFFF, 0x7FFF_FFFF:
        a = np.full((4, 64), bits, np.uint32).view(np.float32)
        for one, two in (a, as_bits(np.ones((64, 50)))), (as_bits(np.ones((50, 64))), a.T):
            assert np.isnan(product(one, two, may_round=True)).all()


def test_numbers_too_small_count_as_what_they_are_or_as_zero(isa):
    for a, b in (2.0**-130, 1.0), (2.0**-70, 2.0**-60):
        for depth in 1, 2, 64:
            x, w = np.zeros((20, depth), np.float32), np.ones((depth, 30), np.float32) * b
            x[:, depth // 2] = a
            want = 0.0 if isa == BF16 else a * b
            for left, may_round in (as_bits(x), False), (x, True):
                found = product(left, as_bits(w), may_round=may_round)
                assert np.array_equal(found, np.full((20, 30), np.float32(want)))


def test_a_long_sum_has_its_bias_once(isa):
    """The packed side goes in slabs where the sum is long; the last one has an odd depth here."""
    depth = 2**16 - 1
    for m, n in (40, 48), (48, 40):
        a, b = (np.full(shape, 0x3F80, np.uint16) for shape in ((m, depth), (depth, n)))
        found = product(a, b, bias=np.arange(n, dtype=np.float32))
        assert (found == depth + np.arange(n)).all()


def test_nothing_to_sum_and_nothing_to_write():
    for name in "bfloat16", "float32":
        empty, w = np.empty((3, 0), name if name == "float32" else "u2"), np.empty((0, 5), "u2")
        out = np.ones((3, 5), np.float32)
        products.native(empty, w, out, accumulate=True, bias=np.ones(5, "f4"), may_round=True)
        assert (out == 2).all()
        for m, n in (0, 5), (3, 0):
            x = np.ones((m, 7), empty.dtype)
            assert product(x, np.ones((7, n), "u2"), may_round=True).shape == (m, n)


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_nothing_is_read_beyond_the_end(isa):
    """Operands end where a page begins that may not be touched; a read there ends the process."""
    libc = ctypes.CDLL(None, use_errno=True)
    rng = np.random.default_rng(0)

    def at_the_end(array):
        pages = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
        start = np.frombuffer(memory, np.uint8).ctypes.data
        assert libc.mprotect(ctypes.c_void_p(start + pages), mmap.PAGESIZE, 0) == 0
        held = np.frombuffer(memory, array.dtype, array.size, pages - array.nbytes)
        held = (
            held.reshape(array.T.shape).T if array.flags.f_contiguous else held.reshape(array.shape)
        )
        held[...] = array
        return held

    sizes = itertools.product((1, 8, 48, 50), (1, 2, 3, 31, 64, 127, 257), (1, 16, 49))
    for (m, depth, n), order_a, order_b in itertools.product(sizes, "CF", "CF"):
        for names in ("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32"):
            a = operand(rng, (m, depth), names[0], order_a)
            b = operand(rng, (depth, n), names[1], order_b)
            found = product(at_the_end(a), at_the_end(b), may_round=True)
            assert np.array_equal(found, product(a, b, may_round=True))


# The head -----------------------------------------------------------------------------------------


def layer(n=45, d=131, v=70, of_x="bfloat16", of_w="bfloat16", seed=0):
    """Features, weights, bias and targets in some dtypes, and as float64; more than 64 classes.

    Few binary digits, so that logits are exact and only what follows from them is not.
    """
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    rng = np.random.default_rng(seed)
    arrays = (rng.integers(-16, 17, shape) / 8 for shape in ((n, d), (v, d), v))
    dtypes = (bfloat16 if name == "bfloat16" else name for name in (of_x, of_w, of_w))
    scaled = (array / by for array, by in zip(arrays, (1, 8, 1), strict=True))
    given = [array.astype(dtype) for array, dtype in zip(scaled, dtypes, strict=True)]
    return given, [array.astype(np.float64) for array in given], rng.integers(0, v, n)


def gradients(arrays, target, **options):
    x, w, b = arrays
    function = crossent.linear_cross_entropy_value_and_grad
    return function(x, w, target, linear_bias=b, reduction="sum", **options)


@pytest.mark.parametrize(
    ("of_x", "of_w"), [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_gradients(of_x, of_w, isa):
    """A gradient in bfloat16, and it alone, may be made of logits' gradients in bfloat16."""
    given, (x, w, b), target = layer(of_x=of_x, of_w=of_w)
    n, v = len(x), len(w)
    found, true = gradients(given, target), gradients((x, w, b), target)
    z = x @ w.T + b
    g = crossent.cross_entropy_value_and_grad(z, target, reduction="sum").grad
    assert abs(found.loss - true.loss) <= 8 * 2.0**-24 * true.loss
    # Of g the row kernel's 4 ulp, of its products γ, and one rounding at the end.
    own = LinearGrad(
        gamma(v + 8) * (abs(g) @ abs(w)),
        gamma(n + 8) * (abs(g).T @ abs(x)),
        gamma(n + 8) * abs(g).sum(axis=0),
    )
    rounds = isa == BF16 and of_x == of_w == "bfloat16"
    of_g = LinearGrad(U * abs(g) @ abs(w), U * abs(g).T @ abs(x), 0) if rounds else (0, 0, 0)
    for ours, exact, slack, more in zip(found.grad, true.grad, own, of_g, strict=True):
        u = 2.0**-24 if ours.dtype == np.float32 else U
        error = abs(ours.astype(np.float64) - exact)
        assert (error <= (1 + u) * (slack + more) + u * abs(exact)).all()


def test_only_what_becomes_a_gradient_in_bfloat16_may_be_rounded(monkeypatch):
    seen = []

    def spy(a, b, out, **options):
        seen.append(options.pop("may_round", False))
        products.host(a, b, out, **options)

    monkeypatch.setattr(products, "native", spy)
    for of_x, of_w in itertools.product(("bfloat16", "float32"), repeat=2):
        given, _, target = layer(of_x=of_x, of_w=of_w)
        gradients(given, target)
        # The logits, and the gradients in x, W and b.
        assert seen == [False, of_x == "bfloat16", of_w == "bfloat16", False]
        seen.clear()
        x, w, b = given
        crossent.linear_cross_entropy_hvp(x, w, target, LinearGrad(x, w, b), linear_bias=b)
        assert not any(seen)
        seen.clear()


def test_hessian_products_are_not_rounded_before_their_end(isa):
    given, true, target = layer()
    along, true_along, _ = layer(seed=1)
    found, want = (
        crossent.linear_cross_entropy_hvp(
            x, w, target, LinearGrad(*vector), linear_bias=b, reduction="sum"
        )
        for (x, w, b), vector in ((given, along), (true, true_along))
    )
    for ours, exact in zip(found, want, strict=True):
        error = abs(ours.astype(np.float64) - exact)
        assert (error <= U * abs(exact) + 1e-5 * abs(exact).max()).all()


def test_threads_chunks_and_layout_change_no_bit_of_a_row(isa):
    given, _, target = layer(n=301)
    before = crossent.get_num_threads()
    found = []
    for threads in 1, 2, 5:
        crossent.set_num_threads(threads)
        found.append(gradients(given, target))
    crossent.set_num_threads(before)
    for other in found[1:]:
        assert other.loss == found[0].loss
        for one, two in zip(found[0].grad, other.grad, strict=True):
            assert one.tobytes() == two.tobytes()
    x, w, b = given
    for other in (
        gradients(given, target, workspace_mb=0.01),
        gradients((np.asfortranarray(x), np.asfortranarray(w), b), target),
    ):
        assert other.grad.input.tobytes() == found[0].grad.input.tobytes()
    some = gradients((x[100:133], w, b), target[100:133])
    assert np.array_equal(some.grad.input, found[0].grad.input[100:133])
