"""What the fused head takes and leaves alone: layouts, special values, memory."""

import threading
import tracemalloc

import numpy as np
import pytest

import crossent
from crossent import LinearGrad, head, products

VALUE_AND_GRAD = crossent.linear_cross_entropy_value_and_grad
RESULTS = "input", "linear_weight", "linear_bias"


def arrays(n=12, d=5, v=7, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    x, w, b = (rng.normal(size=size).astype(dtype) for size in ((n, d), (v, d), v))
    return x, w, b, rng.integers(0, v, n)


def same(a, b):
    """Results of the same bits, whose shapes and dtypes agree."""
    flat = [
        [r for part in (c if isinstance(c, tuple) else (c,)) for r in _leaves(part)] for c in (a, b)
    ]
    return all(
        x is y is None or (x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes())
        for x, y in zip(*flat, strict=True)
    )


def _leaves(result):
    return (
        [leaf for part in result for leaf in _leaves(part)]
        if isinstance(result, tuple)
        else [result]
    )


# Layouts ------------------------------------------------------------------------------------------


def spread(array):
    """The same numbers, two apart along every axis."""
    wide = np.full([2 * n for n in array.shape], np.nan, array.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in array.shape)]
    view[...] = array
    return view


def misaligned(array):
    raw = np.empty(array.nbytes + 1, np.uint8)[1:]
    view = raw.view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


LAYOUTS = {
    "spread": spread,
    "backwards": lambda a: a[..., ::-1].copy()[..., ::-1],
    "upside down": lambda a: a[::-1].copy()[::-1],
    "Fortran": np.asfortranarray,
    "misaligned": misaligned,
    "other byte order": lambda a: a.astype(a.dtype.newbyteorder()) if a.dtype.kind == "f" else a,
    "read-only": read_only,
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("drops", [False, True])
def test_no_layout_changes_a_bit(layout, drops, dtype):
    x, w, b, target = arrays(dtype=dtype)
    if drops:
        target[[1, 5]] = -100
    vector = LinearGrad(x + x, w + w, b + b)
    x2, w2, b2 = (layout(a) for a in (x, w, b))
    plain = VALUE_AND_GRAD(x, w, target, linear_bias=b)
    found = VALUE_AND_GRAD(x2, w2, target, linear_bias=b2)
    for mine, other in zip(found.grad, plain.grad, strict=True):
        assert mine.dtype.name == dtype.name
        assert mine.tobytes() == other.tobytes()
    assert found.loss == plain.loss
    along = LinearGrad(*(layout(a) for a in vector))
    found = crossent.linear_cross_entropy_hvp(x2, w2, target, along, linear_bias=b2)
    plain = crossent.linear_cross_entropy_hvp(x, w, target, vector, linear_bias=b)
    assert [a.tobytes() for a in found] == [a.tobytes() for a in plain]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("drops", [False, True])
def test_rows_of_any_leading_shape_and_strides(drops, dtype):
    x, w, b, _ = arrays(n=60, dtype=dtype)
    rng = np.random.default_rng(1)
    shapes = {
        "joined": x.reshape(3, 4, 5, 5),
        "turned": np.moveaxis(np.ascontiguousarray(np.moveaxis(x.reshape(3, 4, 5, 5), 0, 2)), 2, 0),
        "part": np.concatenate([x.reshape(3, 4, 5, 5)] * 2, axis=1)[:, :4],
    }
    q = rng.dirichlet(np.ones(7), (3, 4, 5)).astype(dtype)
    turned_q = np.moveaxis(np.ascontiguousarray(np.moveaxis(q, 0, 2)), 2, 0)
    weights = (rng.random((3, 4, 5)) > 0.4).astype(float) if drops else None
    how = {"linear_bias": b, "reduction": "none", "sample_weight": weights}
    flat = None if weights is None else weights.reshape(-1)
    plain = VALUE_AND_GRAD(x, w, q.reshape(60, 7), **how | {"sample_weight": flat})
    for name, given in shapes.items():
        for target in (q, turned_q, q.astype(q.dtype.newbyteorder())):
            found = VALUE_AND_GRAD(given, w, target, **how)
            assert found.loss.shape == (3, 4, 5), name
            assert found.grad.input.shape == given.shape
            assert found.loss.tobytes() == plain.loss.tobytes()
            assert found.grad.input.tobytes() == plain.grad.input.tobytes()
            assert found.grad.linear_weight.tobytes() == plain.grad.linear_weight.tobytes()
    stats = crossent.linear_cross_entropy_stats(shapes["turned"], w, sample_weight=weights)
    assert stats.argmax.shape == (3, 4, 5)


def test_lists_integers_and_one_row():
    x, w = [[1, 2], [0, -1]], [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    want = VALUE_AND_GRAD(np.array(x, float), np.array(w), np.array([2, 0]))
    assert same(VALUE_AND_GRAD(x, w, [2, 0]), want)
    for dtype in ("int8", "uint8", "int16", "int64", ">i4"):
        found = VALUE_AND_GRAD(np.array(x).astype(dtype), w, [2, 0])
        if dtype != "uint8":  # which has no −1
            assert same(found, want), dtype
    images = np.array([[1, 2], [0, 40000]], np.uint16)  # not the bits of bfloat16
    assert same(VALUE_AND_GRAD(images, w, [2, 0]), VALUE_AND_GRAD(images.astype(float), w, [2, 0]))
    one = VALUE_AND_GRAD([1.0, 2.0], w, 2)
    assert one.grad.input.shape == (2,)
    assert one.loss == VALUE_AND_GRAD([[1.0, 2.0]], w, [2]).loss
    assert isinstance(one.loss, np.float64)


def test_each_argument_may_have_its_own_dtype():
    x, w, b, target = arrays()
    want = VALUE_AND_GRAD(x.astype("f"), w.astype("e"), target, linear_bias=b.astype("f"))
    assert want.loss.dtype == np.float32
    assert [a.dtype.char for a in want.grad] == ["f", "e", "f"]
    narrow = VALUE_AND_GRAD(x.astype("f"), w, target, linear_bias=b.astype("e"))
    assert narrow.loss.dtype == np.float64
    assert [a.dtype.char for a in narrow.grad] == ["f", "d", "e"]
    assert VALUE_AND_GRAD(x, w.astype("f"), target).loss.dtype == np.float64
    wide = VALUE_AND_GRAD(
        x.astype("f").astype("d"), w, target, linear_bias=b.astype("e").astype("d")
    )
    assert narrow.loss == wide.loss
    assert narrow.grad.input.tobytes() == wide.grad.input.astype("f").tobytes()


def test_a_direction_of_another_dtype_is_converted():
    x, w, b, target = arrays(dtype=np.float32)
    narrow = LinearGrad(x, w, b)
    wide = LinearGrad(*(a.astype(np.float64) for a in narrow))
    found, want = (
        crossent.linear_cross_entropy_hvp(x, w, target, vector, linear_bias=b)
        for vector in (wide, narrow)
    )
    assert same(found, want)


@pytest.mark.parametrize("drops", [False, True])
def test_inputs_are_not_written_to_and_a_second_call_gives_the_same(drops, dtype):
    x, w, b, target = arrays(dtype=dtype)
    target[3] = -100 if drops else target[3]
    q = np.full((12, 7), 1 / 7).astype(dtype)
    vector = LinearGrad(x.copy(), w.copy(), b.copy())
    everything = (x, w, b, target, q, *vector)
    before = [a.copy() for a in everything]
    for _ in range(2):
        results = [VALUE_AND_GRAD(x, w, t, linear_bias=b, z_loss=0.1) for t in (target, q)] + [
            crossent.linear_cross_entropy_hvp(x, w, target, vector, linear_bias=b)
        ]
        if _ == 0:
            first = results
    assert all(same(a, b) for a, b in zip(first, results, strict=True))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(everything, before, strict=True))


def test_results_do_not_depend_on_threads_nor_on_calls_beside():
    x, w, b, target = arrays(n=3000, d=64, v=90, dtype=np.float32)
    want = VALUE_AND_GRAD(x, w, target, linear_bias=b)
    before = crossent.get_num_threads()
    try:
        for n in (1, 3):
            crossent.set_num_threads(n)
            assert same(VALUE_AND_GRAD(x, w, target, linear_bias=b), want)
    finally:
        crossent.set_num_threads(before)
    found = [[], []]

    def call(k):
        for _ in range(5):
            found[k].append(VALUE_AND_GRAD(x, w, target, linear_bias=b))

    threads = [threading.Thread(target=call, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found[0] + found[1]) == 10
    assert all(same(each, want) for each in found[0] + found[1])


# Special values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("product", [products.native, products.host])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_dropped_rows_are_never_read(bad, product, monkeypatch, dtype):
    monkeypatch.setattr(products, "native", product)
    x, w, b, target = arrays(dtype=dtype)
    weights = np.ones(12)
    target[2], weights[5] = -100, 0
    vector = LinearGrad(np.ones_like(x), w, b)
    want, plain = None, None
    for value in (0.0, bad):
        x[[2, 5]] = value
        vector.input[[2, 5]] = value
        how = {"linear_bias": b, "sample_weight": weights}
        found = VALUE_AND_GRAD(x, w, target, **how)
        product_ = crossent.linear_cross_entropy_hvp(x, w, target, vector, **how)
        stats = crossent.linear_cross_entropy_stats(x, w, target, **how)
        if want is None:
            want, plain, stats_before = found, product_, stats
    assert same(found, want)
    assert same(product_, plain)
    assert same(stats, stats_before)
    assert not found.grad.input[[2, 5]].astype(float).any()
    padding = np.where(np.arange(12) == 2, -100, target)[:, None]
    padding[5] = -100
    padded = VALUE_AND_GRAD(x, w, padding, linear_bias=b, target_prob=np.ones((12, 1)))
    want = VALUE_AND_GRAD(x, w, padding[:, 0], linear_bias=b)
    room = {"d": 1e-14, "f": 1e-5, "e": 1e-2}.get(dtype.char, 1e-1)
    for mine, other in zip(padded.grad, want.grad, strict=True):
        assert np.abs(mine.astype(float) - other.astype(float)).max() < room


@pytest.mark.parametrize("product", [products.native, products.host])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_feature_spoils_its_own_row_and_the_weights_alone(bad, product, monkeypatch, dtype):
    monkeypatch.setattr(products, "native", product)
    x, w, b, target = arrays(dtype=dtype)
    want = VALUE_AND_GRAD(x, w, target, linear_bias=b, reduction="none")
    x[4, 1] = bad
    found = VALUE_AND_GRAD(x, w, target, linear_bias=b, reduction="none")
    others = np.arange(12) != 4
    assert np.isnan(found.loss[4])
    assert np.isnan(found.grad.input[4].astype(float)).all()
    assert np.isnan(found.grad.linear_weight.astype(float)).all()
    assert found.loss[others].tobytes() == want.loss[others].tobytes()
    if product is products.native:
        assert found.grad.input[others].tobytes() == want.grad.input[others].tobytes()
    assert np.isfinite(found.grad.input[others].astype(float)).all()
    stats = crossent.linear_cross_entropy_stats(x, w, target, linear_bias=b)
    assert np.flatnonzero(stats.argmax < 0).tolist() == [4]


def test_a_bias_of_minus_infinity_masks_a_class():
    x, w, b, target = arrays()
    b[3], target[target == 3] = -np.inf, 0
    others = np.arange(7) != 3
    names = np.cumsum(others) - 1
    found = VALUE_AND_GRAD(x, w, target, linear_bias=b)
    want = VALUE_AND_GRAD(x, w[others], names[target], linear_bias=b[others])
    assert abs(found.loss - want.loss) < 1e-15
    assert not found.grad.linear_weight[3].any()
    np.testing.assert_allclose(found.grad.input, want.grad.input, atol=1e-16)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("lead", [(0,), (0, 3), (2, 3)])
def test_no_row_or_none_that_is_kept(reduction, lead, dtype):
    _, w, b, _ = arrays(dtype=dtype)
    x = np.full((*lead, 5), np.nan).astype(dtype)
    target = np.full(lead, -100)
    vector = LinearGrad(x, w, b)
    found = VALUE_AND_GRAD(x, w, target, linear_bias=b, reduction=reduction)
    product = crossent.linear_cross_entropy_hvp(
        x, w, target, vector, linear_bias=b, reduction=reduction
    )
    assert np.shape(found.loss) == (lead if reduction == "none" else ())
    assert not np.any(found.loss)
    for grads in (found.grad, product):
        for grad, array in zip(grads, (x, w, b), strict=True):
            assert grad.shape == array.shape
            assert grad.dtype == dtype
            assert not grad.astype(float).any()
    assert crossent.linear_cross_entropy_stats(x, w, target).entropy.shape == lead


def test_kept_rows_over_a_divisor_of_0_are_nan():
    x, w, b, target = arrays()
    found = VALUE_AND_GRAD(x, w, target, linear_bias=b, divisor=0)
    assert np.isnan(found.loss)
    assert all(np.isnan(grad).all() for grad in found.grad)


@pytest.mark.parametrize("product", [products.native, products.host])
def test_no_feature_or_one_class(product, monkeypatch, dtype):
    monkeypatch.setattr(products, "native", product)
    b = np.arange(3.0).astype(dtype)
    x, w = np.zeros((4, 0), dtype), np.zeros((3, 0), dtype)
    found = VALUE_AND_GRAD(x, w, [0, 1, 2, 2], linear_bias=b)
    z = np.broadcast_to(
        b.astype(np.promote_types(np.float32, "d" if dtype == "d" else "f")), (4, 3)
    )
    want = crossent.cross_entropy_value_and_grad(z, [0, 1, 2, 2])
    assert found.loss == want.loss
    assert [g.shape for g in found.grad] == [(4, 0), (3, 0), (3,)]
    error = found.grad.linear_bias.astype(float) - want.grad.sum(axis=0)
    assert np.abs(error).max() < {"d": 1e-15, "f": 1e-6, "e": 1e-3}.get(dtype.char, 4e-3)
    x, w = np.ones((4, 2), dtype), np.ones((1, 2), dtype)
    found = VALUE_AND_GRAD(x, w, [0, 0, 0, 0])
    assert found.loss == 0
    assert not any(g.astype(float).any() for g in found.grad[:2])


# Memory -------------------------------------------------------------------------------------------


def peak(call):
    """Bytes that NumPy had beyond what was there before, at their most, and the result."""
    tracemalloc.start()
    try:
        result = call()
        return tracemalloc.get_traced_memory()[1], result
    finally:
        tracemalloc.stop()


def nbytes(result):
    return sum(leaf.nbytes for leaf in _leaves(result) if leaf is not None)


MEMORY = {
    "plain": {},
    "dropped rows": {"ignore_index": 0},
    "upstream": {"reduction": "none"},
}


@pytest.mark.parametrize("options", MEMORY.values(), ids=MEMORY)
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@pytest.mark.parametrize("product", [products.native, products.host])
def test_a_call_uses_its_workspace_and_no_more(options, name, product, monkeypatch):
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name)
    x, w, b, target = arrays(n=300, d=400, v=6000, dtype=dtype)  # logits and W: 7 and 10 MB
    target[::7] = 0
    monkeypatch.setattr(head, "workspace_bytes", lambda *_: 12 * 2**20)
    monkeypatch.setattr(products, "native", product)
    used, found = peak(lambda: VALUE_AND_GRAD(x, w, target, linear_bias=b, **options))
    # A few numbers a row and a class besides, and for 16 bits the float32 sums of W's size.
    room = 12 * 2**20 + 64 * 300 + 16 * 6000 + (w.size * 4 if name == "bfloat16" else 0)
    assert used - nbytes(found) <= room
    vector = LinearGrad(x, w, b)
    hvp = crossent.linear_cross_entropy_hvp
    used, found = peak(lambda: hvp(x, w, target, vector, linear_bias=b, **options))
    assert used - nbytes(found) <= room
    used, _ = peak(lambda: crossent.linear_cross_entropy(x, w, target, linear_bias=b))
    assert used <= 12 * 2**20 + 64 * 300 + 16 * 6000


# How (…, K) may lie: joined, its axes turned, a part of more.
LIES = {
    "joined": lambda a: a,
    "turned": lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 0, 1)), 1, 0),
    "part": lambda a: np.concatenate([a, a], axis=1)[:, : a.shape[1]],
}


@pytest.mark.parametrize("lies", LIES.values(), ids=LIES)
@pytest.mark.parametrize(("d", "v"), [(1500, 2), (2, 1500)])
def test_neither_features_nor_distributions_are_copied_whole(lies, d, v, monkeypatch):
    rng = np.random.default_rng(0)
    x, q = lies(rng.normal(size=(20, 50, d))), lies(rng.random((20, 50, v)))  # one of them: 12 MB
    w = rng.normal(size=(v, d))
    drops = np.arange(1000).reshape(20, 50) % 5
    monkeypatch.setattr(head, "workspace_bytes", lambda *_: 2**20)
    room = 2**20 + 64 * 1000 + 64 * v
    for weights in (None, drops):
        call = {"sample_weight": weights, "wrt": "input"}
        used, found = peak(lambda call=call: VALUE_AND_GRAD(x, w, q, **call))
        assert used - nbytes(found) <= room
        call = {"sample_weight": weights, "vector": LinearGrad(x, None, None)}
        used, found = peak(lambda call=call: crossent.linear_cross_entropy_hvp(x, w, q, **call))
        assert used - nbytes(found) <= room
    integers = lies((x * 10).astype(np.int8))
    used, _ = peak(lambda: crossent.linear_cross_entropy(integers, w, q))
    assert used <= room
