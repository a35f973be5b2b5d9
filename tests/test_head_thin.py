"""The fused head with few classes, one pass over the features: any shape, any instruction set."""

import itertools
import signal
import subprocess
import sys

import numpy as np
import pytest

import crossent
from crossent import LinearGrad, _native, backends, products

VALUE_AND_GRAD = crossent.linear_cross_entropy_value_and_grad


def layer(n, d, v, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    arrays = rng.standard_normal((n, d)), rng.standard_normal((v, d)) / 2, rng.standard_normal(v)
    x, w, b = (a.astype(dtype) for a in arrays)
    return x, w, b, rng.integers(0, v, n)


def by_products(monkeypatch, *args, **options):
    """The same without the pass: it is for this library's own products alone."""
    with monkeypatch.context() as patch:
        patch.setattr(products, "native", products.host)
        return VALUE_AND_GRAD(*args, **options)


@pytest.fixture
def passes(monkeypatch):
    """The rows of each pass."""
    seen = []
    real = backends.NativeBackend.thin_head

    def spy(self, given, *rest):
        seen.append(len(given[0]))
        return real(self, given, *rest)

    monkeypatch.setattr(backends.NativeBackend, "thin_head", spy)
    return seen


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5, 6, 8, 9, 11, 12, 13, 16, 17, 33, 48, 49, 64])
def test_every_number_of_classes(classes, isa, monkeypatch):
    # Features in and out of whole strips and panels; rows in more blocks and slots than one.
    shapes = [(1, 1), (7, 5), (5000, 37), (67, 525)]
    for (n, d), dtype in itertools.product(shapes, [np.float64, np.float32]):
        x, w, b, target = layer(n, d, classes, dtype)
        found = VALUE_AND_GRAD(x, w, target, linear_bias=b)
        want = by_products(monkeypatch, *(a.astype(float) for a in (x, w)), target, linear_bias=b)
        # γ of the features and of the rows, for both.
        bound = (d + n + 50) * np.finfo(dtype).eps
        np.testing.assert_allclose(found.loss, want.loss, rtol=bound, atol=bound)
        for ours, theirs in zip(found.grad, want.grad, strict=True):
            size = max(abs(theirs).max(), abs(x).max() / n)
            assert abs(ours - theirs).max() <= bound * size


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_sixteen_bits(name, monkeypatch):
    dtype = np.dtype(name) if name == "float16" else pytest.importorskip("ml_dtypes").bfloat16
    x, w, b, target = layer(300, 29, 10, dtype)
    found = VALUE_AND_GRAD(x, w, target, linear_bias=b)
    wide = [a.astype(np.float32) for a in (x, w, b)]
    exact = by_products(monkeypatch, *wide[:2], target, linear_bias=wide[2])
    np.testing.assert_allclose(found.loss, exact.loss, rtol=1e-6)
    ulp = 2.0**-10 if name == "float16" else 2.0**-7
    for ours, theirs in zip(found.grad, exact.grad, strict=True):
        assert ours.dtype == dtype
        error = abs(ours.astype(np.float32) - theirs)
        assert (error <= ulp / 2 * abs(theirs) + 1e-6 * abs(theirs).max() + 2.0**-25).all()


def test_few_classes_and_rows_that_need_no_copy_are_one_pass(passes):
    x, w, b, target = layer(5000, 20, 10)
    VALUE_AND_GRAD(x, w, target, linear_bias=b, workspace_mb=0.001)
    crossent.linear_cross_entropy(x, w, target)
    assert passes == [5000, 5000]


def test_rows_that_need_a_copy_are_taken_as_the_workspace_allows(passes):
    x, w, b, target = layer(5000, 20, 10)
    target[7] = -100
    whole = VALUE_AND_GRAD(x, w, target, linear_bias=b)
    assert sum(passes) == 4999
    assert len(passes) == 1
    some = VALUE_AND_GRAD(x, w, target, linear_bias=b, workspace_mb=0.5)
    assert len(passes) > 3
    assert np.array_equal(whole.grad.input, some.grad.input)
    for one, other in zip(whole.grad, some.grad, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-15)


def test_more_classes_and_no_features_are_products(passes):
    for n, d, v in ((50, 3, 65), (50, 0, 3)):
        x, w, b, target = layer(n, d, v)
        VALUE_AND_GRAD(x, w, target, linear_bias=b)
    assert passes == []
    assert not _native.thin(64, 2**20, True)


@pytest.mark.parametrize("wrt", LinearGrad._fields)
def test_one_gradient_alone_has_the_same_bits(wrt):
    x, w, b, target = layer(700, 31, 12, np.float32)
    alone = VALUE_AND_GRAD(x, w, target, linear_bias=b, wrt=wrt)
    whole = VALUE_AND_GRAD(x, w, target, linear_bias=b)
    assert alone.loss == whole.loss == crossent.linear_cross_entropy(x, w, target, linear_bias=b)
    assert np.array_equal(getattr(alone.grad, wrt), getattr(whole.grad, wrt))


def test_threads_and_neighbours_change_no_bit():
    x, w, b, target = layer(3000, 50, 10, np.float32)
    options = {"linear_bias": b, "reduction": "none"}
    before = crossent.get_num_threads()
    found = []
    for threads in (1, 2, 5):
        crossent.set_num_threads(threads)
        found.append(VALUE_AND_GRAD(x, w, target, **options))
    crossent.set_num_threads(before)
    for other in found[1:]:
        assert np.array_equal(found[0].loss, other.loss)
        for one, two in zip(found[0].grad, other.grad, strict=True):
            assert np.array_equal(one, two)
    some = VALUE_AND_GRAD(x[500:533], w, target[500:533], **options)
    assert np.array_equal(some.loss, found[0].loss[500:533])
    assert np.array_equal(some.grad.input, found[0].grad.input[500:533])


@pytest.mark.parametrize("classes", [3, 10, 13])
def test_no_layout_of_the_features_changes_a_bit(classes, isa):
    x, w, b, target = layer(400, 300, classes, np.float32)
    whole = VALUE_AND_GRAD(x, w, target, linear_bias=b)
    beside = np.repeat(x, 2, axis=1)[:, ::2]
    for other in (np.asfortranarray(x), beside, beside[::-1][::-1]):
        found = VALUE_AND_GRAD(other, np.asfortranarray(w), target, linear_bias=b)
        assert found.loss == whole.loss
        for one, two in zip(whole.grad, found.grad, strict=True):
            assert np.array_equal(one, two)


@pytest.mark.parametrize("dtypes", [(np.float32, np.float64), (np.float64, np.float32)])
def test_features_and_weights_of_two_dtypes(dtypes, isa):
    x, w, b, target = layer(150, 40, 10)
    x, w = x.astype(dtypes[0]), w.astype(dtypes[1])
    found = VALUE_AND_GRAD(x, w, target, linear_bias=b)
    exact = VALUE_AND_GRAD(*(a.astype(float) for a in (x, w)), target, linear_bias=b)
    # In float64 throughout, and rounded once where an argument is float32.
    for one, two in zip(found.grad, exact.grad, strict=True):
        u = np.finfo(one.dtype).eps / 2
        np.testing.assert_allclose(one, two, rtol=2 * u, atol=1e-15)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
def test_a_signal_handler_may_call_in_the_middle_of_a_pass():
    """A pass asks for signals while it holds the memory that a block's logits will lie in."""
    program = """
import signal
import time
import numpy as np
import crossent

crossent.set_num_threads(1)
rng = np.random.default_rng(0)
row, w = rng.standard_normal(200, np.float32), rng.standard_normal((5, 200), np.float32)
small, kept, n, seconds = np.ones((300, 8)), [], 5000, 0

def handler(*_):
    # Of more classes than any call before, it needs more memory. Arrays then take what is free.
    classes = np.ones((16 << k, 8))
    crossent.linear_cross_entropy_value_and_grad(small, classes, np.zeros(300, int))
    kept.extend(np.ones(250) for _ in range(1000))

def long_call(x, target):
    return crossent.linear_cross_entropy_value_and_grad(x, w, target, wrt="linear_weight")

while seconds < 0.3:  # signals are asked for every 50 ms
    n *= 2
    x, target = np.broadcast_to(row, (n, 200)), np.arange(n) % 5
    start = time.monotonic()
    wanted, seconds = long_call(x, target), time.monotonic() - start
crossent.cross_entropy(np.zeros((300, 64)), np.zeros(300, int))  # what rows need is there
signal.signal(signal.SIGALRM, handler)
for k in range(3):
    signal.setitimer(signal.ITIMER_REAL, seconds * (k + 1) / 4)
    found = long_call(x, target)
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert found.loss == wanted.loss
    assert np.array_equal(found.grad.linear_weight, wanted.grad.linear_weight)
assert kept and (np.array(kept) == 1).all()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_row_stays_alone(bad):
    x, w, b, target = layer(100, 9, 10)
    want = VALUE_AND_GRAD(x, w, target, linear_bias=b, reduction="none")
    x[41, 3] = bad
    found = VALUE_AND_GRAD(x, w, target, linear_bias=b, reduction="none")
    rest = np.arange(100) != 41
    assert np.isnan(found.loss[41])
    assert np.array_equal(found.loss[rest], want.loss[rest])
    assert np.array_equal(found.grad.input[rest], want.grad.input[rest])
    assert np.isnan(found.grad.linear_weight).all()


def test_features_of_any_strides():
    x, w, b, target = layer(400, 33, 7, np.float32)
    want = VALUE_AND_GRAD(x, w, target, linear_bias=b)
    for moved in (np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2], x[::-1].copy()[::-1]):
        found = VALUE_AND_GRAD(moved, np.asfortranarray(w), target, linear_bias=b)
        assert found.loss == want.loss
        for one, two in zip(found.grad, want.grad, strict=True):
            assert np.array_equal(one, two)


def test_the_pass_refuses_what_would_touch_other_memory():
    x, w, b, target = layer(6, 4, 3)
    plan = (target, None, None, None, None, -100, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, None)
    good = {"dx": np.empty((6, 4)), "dw": np.empty((3, 4)), "db": np.empty((1, 3))}
    _native.thin_head(x, w, b, plan, False, *good.values(), False)
    for name, out in (
        ("dx", np.empty((5, 4))),
        ("dw", np.empty((4, 3)).T),
        ("dw", np.empty((6, 4))[::-2]),
        ("db", np.empty((1, 4))),
    ):
        with pytest.raises(ValueError, match="expected"):
            _native.thin_head(x, w, b, plan, False, *(good | {name: out}).values(), False)
    with pytest.raises(ValueError, match="expected an output of the pass's dtype"):
        _native.thin_head(x, w, b, plan, False, np.empty((6, 4), np.float32), None, None, False)
    for args in (
        (x, w[:, 1:], b),
        (x, w[:0], None),
        (x, w, b[1:]),
        (x, w, b.astype(np.float32)),
        (x, w, np.ones(6)[::2]),
    ):
        with pytest.raises(ValueError, match="expected"):
            _native.thin_head(*args, plan, False, None, None, None, False)
    with pytest.raises(ValueError, match="expected fewer classes or features"):
        _native.thin_head(x, np.ones((65, 4)), None, plan, False, None, None, None, False)
