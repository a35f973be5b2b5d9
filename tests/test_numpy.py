"""The NumPy front end: arrays of every shape, layout and type in, and what comes back."""

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import crossent

RNG = np.random.default_rng(3)
X = RNG.normal(size=(6, 9)) * 3
Y = np.array([0, 8, 4, -100, 2, 5])
PLAIN = crossent.cross_entropy_value_and_grad(X, Y)
CALLS = {
    "softmax": lambda x, **k: crossent.softmax(x, **k),
    "log_softmax": lambda x, **k: crossent.log_softmax(x, **k),
    "value_and_grad": lambda x, **k: crossent.cross_entropy_value_and_grad(
        x, np.zeros(rows_shape(x, **k), int), reduction="none", **k
    ),
    "hvp": lambda x, **k: crossent.cross_entropy_hvp(
        x, np.zeros(rows_shape(x, **k), int), np.asarray(x) * 0.5, reduction="none", **k
    ),
    "stats": lambda x, **k: crossent.cross_entropy_stats(x, np.zeros(rows_shape(x, **k), int), **k),
}


def rows_shape(x, axis=-1):
    return np.delete(np.shape(x), axis)


def arrays(result):
    return [np.asarray(part) for part in (result if isinstance(result, tuple) else (result,))]


def assert_same_bits(got, wanted):
    for a, b in zip(arrays(got), arrays(wanted), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.tobytes() == b.tobytes()


# Shapes and axes ----------------------------------------------------------------------------------


def test_one_row_gives_scalars():
    loss, grad = crossent.cross_entropy_value_and_grad(X[0], 4)
    assert type(loss) is np.float64
    assert grad.shape == (9,)
    none = crossent.cross_entropy(X[0].astype(np.float16), np.int8(4), reduction="none")
    assert type(none) is np.float32
    assert_same_bits(loss, crossent.cross_entropy(X[:1], [4]))
    stats = crossent.cross_entropy_stats(X[0], 4)
    assert stats.argmax.shape == stats.logsumexp.shape == ()
    assert crossent.softmax_jacobian(X[0]).shape == (9, 9)
    assert crossent.cross_entropy_hessian(X[0], 4).shape == (9, 9)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("axis", range(-4, 4))
def test_the_class_axis_may_be_any(call, axis):
    x = RNG.normal(size=(2, 3, 4, 5))
    found = CALLS[call](x, axis=axis)
    wanted = CALLS[call](np.ascontiguousarray(np.moveaxis(x, axis, -1)))
    for got, want in zip(arrays(found), arrays(wanted), strict=True):
        if got.ndim == x.ndim:
            want = np.moveaxis(want, -1, axis)
        assert_same_bits(got, np.ascontiguousarray(want))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_kind_of_target_along_any_axis(axis):
    x = RNG.normal(size=(4, 5, 3))
    rows = np.moveaxis(x, axis, -1)
    distribution = RNG.dirichlet(np.ones(rows.shape[-1]), rows.shape[:-1])
    ids = RNG.integers(0, rows.shape[-1], (*rows.shape[:-1], 2))
    prob = RNG.random(ids.shape)
    for target, more in ((distribution, None), (ids, prob)):
        given = {} if more is None else {"target_prob": more}
        moved = {name: np.moveaxis(a, -1, axis) for name, a in given.items()}
        wanted = crossent.cross_entropy_value_and_grad(
            np.ascontiguousarray(rows), target, reduction="none", **given
        )
        found = crossent.cross_entropy_value_and_grad(
            x, np.moveaxis(target, -1, axis), reduction="none", axis=axis, **moved
        )
        assert_same_bits(found.loss, wanted.loss)
        assert_same_bits(np.ascontiguousarray(np.moveaxis(found.grad, axis, -1)), wanted.grad)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (3, 0)])
def test_no_rows(shape, dtype):
    axis = -1 if shape[-1] == 3 else 0
    x = np.empty(shape, dtype)
    none = np.empty(rows_shape(x, axis), int)
    for reduction in ("mean", "sum"):
        loss, grad = crossent.cross_entropy_value_and_grad(x, none, axis=axis, reduction=reduction)
        assert (loss, grad.shape) == (0, shape)
    out = np.empty_like(x)
    found = crossent.cross_entropy_value_and_grad(x, none, axis=axis, reduction="none", out=out)
    assert (found.loss.shape, found.grad is out) == (none.shape, True)
    assert crossent.softmax(x, axis=axis).shape == shape
    assert crossent.cross_entropy_stats(x, axis=axis).argmax.shape == none.shape
    assert crossent.cross_entropy_hvp(x, none, x, axis=axis).shape == shape
    assert crossent.cross_entropy_hessian(x, none, axis=axis).shape == (*none.shape, 3, 3)


def test_an_empty_list_of_targets_is_a_list_of_indices():
    assert crossent.cross_entropy(np.empty((0, 3)), []) == 0


# Memory layouts -----------------------------------------------------------------------------------


def layouts(x):
    """The same numbers, laid out in every way NumPy knows."""
    n, v = x.shape
    yield "Fortran order", np.asfortranarray(x)
    yield "negative strides", np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1]
    wide = np.zeros((2 * n, 3 * v), x.dtype)
    wide[::2, 1::3] = x
    yield "steps", wide[::2, 1::3]
    read_only = x.copy()
    read_only.flags.writeable = False
    yield "read-only", read_only
    yield "bytes swapped", x.astype(x.dtype.newbyteorder(">")) if x.dtype.kind == "f" else x
    shifted = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    shifted[...] = x
    assert not shifted.flags.aligned
    yield "unaligned", shifted
    record = np.zeros(x.shape, [("a", "u1"), ("x", x.dtype)])
    record["x"] = x
    yield "a field of records", record["x"]
    yield "matrix", np.asarray(x).view(np.matrix) if x.dtype.kind == "f" else x


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize("call", CALLS)
def test_the_layout_does_not_matter(call, dtype):
    x = X.astype(dtype)
    wanted = CALLS[call](x)
    for name, laid_out in layouts(x):
        before = laid_out.tobytes()
        assert_same_bits(CALLS[call](laid_out), wanted), name
        assert laid_out.tobytes() == before, name


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_the_layout_of_targets_and_weights_does_not_matter(dtype):
    x = X.astype(dtype)
    given = {"weight": RNG.random((1, 9)), "sample_weight": RNG.random((1, 6))}
    given |= {"grad_output": RNG.random((1, 6)), "target_prob": RNG.random((6, 2))}
    distribution, ids = RNG.random((6, 9)).astype(dtype), RNG.integers(0, 9, (6, 2))

    def call(target, **options):
        return crossent.cross_entropy_value_and_grad(x, target, reduction="none", **options)

    for name in ("weight", "sample_weight", "grad_output"):
        wanted = call(Y, **{name: given[name][0]})
        for _, array in layouts(given[name]):
            assert_same_bits(call(Y, **{name: np.asarray(array)[0]}), wanted)
    wanted = call(distribution)
    for _, array in layouts(distribution):
        assert_same_bits(call(array), wanted)
    wanted = call(ids, target_prob=given["target_prob"])
    for (_, a), (_, b) in zip(layouts(ids), layouts(given["target_prob"]), strict=True):
        assert_same_bits(call(a, target_prob=b), wanted)
    wanted = call(Y)
    for _, array in layouts(Y[None]):
        assert_same_bits(call(np.asarray(array)[0]), wanted)


def test_broadcast_input_and_target(dtype):
    row = X[0].astype(dtype)
    found = crossent.cross_entropy_value_and_grad(np.broadcast_to(row, (4, 9)), np.zeros(4, int))
    wanted = crossent.cross_entropy_value_and_grad(np.tile(row, (4, 1)), np.zeros(4, int))
    assert_same_bits(found, wanted)
    column = np.broadcast_to(row[:4, None], (4, 9))
    assert_same_bits(crossent.softmax(column), crossent.softmax(column.copy()))
    even = np.broadcast_to(np.array(1 / 9, dtype), (4, 9))
    found = crossent.cross_entropy_value_and_grad(np.tile(row, (4, 1)), even)
    wanted = crossent.cross_entropy_value_and_grad(np.tile(row, (4, 1)), even.copy())
    assert_same_bits(found, wanted)


def test_axes_that_no_view_can_join():
    x = RNG.normal(size=(3, 4, 5, 2))
    wanted = crossent.softmax(x, axis=1)
    crosswise = np.asfortranarray(x)
    assert_same_bits(np.ascontiguousarray(crossent.softmax(crosswise, axis=1)), wanted)
    target = np.zeros((3, 5, 2), int)
    found = crossent.cross_entropy_value_and_grad(crosswise, target, axis=1)
    assert_same_bits(found, crossent.cross_entropy_value_and_grad(x, target, axis=1))


# Types --------------------------------------------------------------------------------------------


def test_results_have_the_input_s_dtype(dtype):
    x, compute = X.astype(dtype), np.float64 if dtype == np.float64 else np.float32
    loss, grad = crossent.cross_entropy_value_and_grad(x, Y)
    assert (type(loss), grad.dtype) == (compute, dtype)
    assert crossent.cross_entropy(x, Y, reduction="none").dtype == compute
    assert crossent.softmax(x).dtype == crossent.log_softmax(x).dtype == dtype
    assert crossent.cross_entropy_hvp(x, Y, X).dtype == dtype
    assert crossent.cross_entropy_hessian(x, Y).dtype == compute
    assert crossent.softmax_jacobian(x).dtype == compute
    stats = crossent.cross_entropy_stats(x, Y)
    assert stats.logsumexp.dtype == stats.entropy.dtype == stats.target_logprob.dtype == compute
    assert stats.argmax.dtype == stats.target_rank.dtype == np.int64


@pytest.mark.parametrize("dtype", ["i1", "u2", "i8", "u8"])
def test_integer_logits_become_float64(dtype):
    x = (np.abs(X) * 3).astype(dtype)
    assert_same_bits(crossent.softmax(x), crossent.softmax(x.astype(float)))
    assert_same_bits(
        crossent.cross_entropy_value_and_grad(x, Y),
        crossent.cross_entropy_value_and_grad(x.astype(float), Y),
    )


def test_lists_become_float64():
    assert_same_bits(crossent.softmax([[1, 2], [3, 5]]), crossent.softmax([[1.0, 2.0], [3.0, 5.0]]))
    found = crossent.cross_entropy_value_and_grad(X.tolist(), Y.tolist())
    assert_same_bits(found, PLAIN)
    found = crossent.cross_entropy_value_and_grad(
        tuple(map(tuple, X)), Y, weight=[1] * 9, sample_weight=[1] * 6, grad_output=1
    )
    assert_same_bits(found.grad, PLAIN.grad)


@pytest.mark.parametrize("dtype", ["i1", "u1", "<i2", ">i4", "u4", ">i8", "u8"])
def test_targets_of_every_integer_dtype(dtype):
    target = np.array([0, 8, 4, 100, 2, 5], dtype)
    wanted = crossent.cross_entropy_value_and_grad(X, target.astype(int), ignore_index=100)
    found = crossent.cross_entropy_value_and_grad(X, target, ignore_index=100)
    assert_same_bits(found, wanted)


@pytest.mark.parametrize("target_dtype", ["f2", "f4", ">f8", "f8", "longdouble", "bfloat16"])
def test_distributions_of_every_floating_dtype(target_dtype, dtype):
    pytest.importorskip("ml_dtypes")
    given = RNG.dirichlet(np.ones(9), 6).astype(target_dtype)
    compute = np.float64 if dtype == np.float64 else np.float32
    x = X.astype(dtype)
    wanted = crossent.cross_entropy_value_and_grad(x, given.astype(compute), reduction="none")
    found = crossent.cross_entropy_value_and_grad(x, given, reduction="none")
    assert_same_bits(found, wanted)


def test_the_logits_themselves_may_be_the_target():
    p = crossent.softmax(X)
    wanted = crossent.cross_entropy_value_and_grad(p, p.copy())
    assert_same_bits(crossent.cross_entropy_value_and_grad(p, p), wanted)


# out= ---------------------------------------------------------------------------------------------


def outputs(x):
    yield "contiguous", np.full_like(x, 7)
    yield "Fortran order", np.full_like(np.asfortranarray(x), 7)
    yield "steps", np.full((12, 27), 7, x.dtype)[::2, 1::3]
    yield "negative strides", np.full_like(x, 7)[::-1, ::-1]
    yield "apart in one buffer", np.full(200, 7, x.dtype)[100:154].reshape(x.shape)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"softcap": 3.0}], ids=str)
def test_out_takes_the_gradient(options, dtype):
    x = X.astype(dtype)
    wanted = crossent.cross_entropy_value_and_grad(x, Y, **options)
    for name, out in outputs(x):
        found = crossent.cross_entropy_value_and_grad(x, Y, out=out, **options)
        assert found.grad is out, name
        assert_same_bits(out, wanted.grad)
        assert_same_bits(found.loss, wanted.loss)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"softcap": 3.0}], ids=str)
def test_out_may_be_the_input(options, dtype):
    wanted = crossent.cross_entropy_value_and_grad(X.astype(dtype), Y, **options)
    for name, x in outputs(X.astype(dtype)):
        x[...] = X.astype(dtype)
        found = crossent.cross_entropy_value_and_grad(x, Y, out=x, **options)
        assert found.grad is x, name
        assert_same_bits(found, wanted)


def test_out_may_be_the_input_along_any_axis():
    x = RNG.normal(size=(3, 40, 5))
    target = np.zeros((3, 5), int)
    wanted = crossent.cross_entropy_value_and_grad(x, target, axis=1)
    assert_same_bits(crossent.cross_entropy_value_and_grad(x, target, axis=1, out=x), wanted)


def test_out_is_written_between_and_nowhere_else(dtype):
    wide = np.full((12, 27), 7, dtype)
    crossent.cross_entropy_value_and_grad(X.astype(dtype), Y, out=wide[::2, 1::3])
    wide[::2, 1::3] = 7
    assert (wide == 7).all()


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_out_may_be_a_subclass(tmp_path):
    out = np.memmap(tmp_path / "grad", X.dtype, "w+", shape=X.shape)
    assert crossent.cross_entropy_value_and_grad(X, Y, out=out).grad is out
    assert_same_bits(np.asarray(out), PLAIN.grad)
    out = np.matrix(np.zeros(X.shape))
    crossent.cross_entropy_value_and_grad(X, Y, out=out)
    assert_same_bits(np.asarray(out), PLAIN.grad)


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (
            np.empty((6, 8)),
            "an array of shape (6, 9) and dtype float64, got shape (6, 8) and dtype float64; "
            "use numpy.empty_like(input)",
        ),
        (
            np.empty((6, 9), np.float32),
            "an array of shape (6, 9) and dtype float64, got shape (6, 9) and dtype float32; "
            "use numpy.empty_like(input)",
        ),
        (
            np.empty((6, 9), ">f8"),
            "an array of shape (6, 9) and dtype float64, got shape (6, 9) and dtype >f8; "
            "use numpy.empty_like(input)",
        ),
        (read_only(np.empty((6, 9))), "writable, got a read-only array; pass a copy"),
        (
            as_strided(np.empty(9), (6, 9), (0, 8)),
            "an array of its own memory, got strides (0, 8); pass a copy",
        ),
        (
            as_strided(np.empty(14), (6, 9), (8, 8)),
            "an array of its own memory, got strides (8, 8); pass a copy",
        ),
        (
            np.zeros(433, np.uint8)[1:].view(float).reshape(6, 9),
            "a plain array, got strides (72, 8); pass a contiguous array",
        ),
    ],
)
def test_an_out_that_cannot_take_it(out, message):
    before = X.copy()
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        crossent.cross_entropy_value_and_grad(X, Y, out=out)
    assert str(caught.value) == f"cross_entropy_value_and_grad: out must be {message}"
    assert_same_bits(X, before)


@pytest.mark.parametrize("out", [[0.0], (), 1, "out"])
def test_an_out_that_is_no_array(out):
    with pytest.raises(TypeError, match=r"^cross_entropy_value_and_grad: out must be a NumPy arra"):
        crossent.cross_entropy_value_and_grad(X, Y, out=out)


def test_an_out_that_overlaps_an_input():
    message = (
        "cross_entropy_value_and_grad: out must be input itself or memory apart from every input, "
        "got an array that overlaps one; pass an array of its own"
    )
    buffer = np.zeros(100)
    x, shifted = buffer[:54].reshape(6, 9), buffer[1:55].reshape(6, 9)
    distribution, weights = np.full((6, 9), 1 / 9), np.zeros((6, 9))
    for given, out in (
        ({"input": x, "target": Y}, shifted),
        ({"input": x, "target": Y}, x[::-1]),
        ({"input": x[:, ::-1], "target": Y}, x),
        ({"input": x[:, :6], "target": Y % 6}, x[:, :6].T),
        ({"input": X, "target": distribution}, distribution),
        ({"input": X, "target": Y, "weight": weights[2]}, weights),
        ({"input": X, "target": Y, "sample_weight": weights[:, 1]}, weights),
        ({"input": X, "target": Y[:, None], "target_prob": weights[:, :1]}, weights),
        (
            {"input": X, "target": Y, "grad_output": weights[:, 3], "reduction": "none"},
            weights,
        ),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            crossent.cross_entropy_value_and_grad(**given, out=out)
        assert str(caught.value) == message


# Purity -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("valid", [True, False])
@pytest.mark.parametrize(
    "call",
    ["cross_entropy", "cross_entropy_value_and_grad", "cross_entropy_hvp", "cross_entropy_hessian"],
)
def test_inputs_are_never_written_to(call, valid, dtype):
    x = X.astype(dtype)
    given = {
        "weight": RNG.random(9),
        "sample_weight": RNG.random(6),
        "target_prob": RNG.random((6, 2)),
        "label_smoothing": np.array(0.1),
    }
    ids = RNG.integers(0, 9, (6, 2))
    if not valid:
        ids[5, 1] = 9
    args = [x, ids] + ([RNG.normal(size=(6, 9))] if call == "cross_entropy_hvp" else [])
    everything = [*args, *given.values()]
    before = [array.tobytes() for array in everything]
    try:
        getattr(crossent, call)(*args, **given)
        assert valid
    except IndexError:
        assert not valid
    assert [array.tobytes() for array in everything] == before
