"""The fused head on scipy.sparse features: as with the same numbers dense, and never densified."""

import tracemalloc

import numpy as np
import pytest

pytest.importorskip("scipy")

import scipy.sparse as sp

import crossent
from crossent import LinearGrad, head

VALUE_AND_GRAD = crossent.linear_cross_entropy_value_and_grad
HVP = crossent.linear_cross_entropy_hvp
FORMATS = ["csr_matrix", "csr_array", "csc_matrix", "csc_array", "coo_matrix", "coo_array"]
FORMATS += ["bsr_array", "lil_matrix", "dok_array", "dia_matrix"]


def whole(dtype=np.float64, n=50, d=20, v=9, seed=0):
    """Sparse features, weights and a bias of whole numbers: z is exact in any order of its sums."""
    rng = np.random.default_rng(seed)
    x = (rng.integers(-2, 3, (n, d)) * (rng.random((n, d)) < 0.2)).astype(dtype)
    w, b = rng.integers(-2, 3, (v, d)).astype(dtype), rng.integers(-2, 3, v).astype(dtype)
    target = rng.integers(0, v, n)
    target[[0, 7, 8, n - 1]] = -100
    return x, w, b, target


@pytest.fixture(params=[2**27, 2**14, 0])
def workspace(request, monkeypatch):
    monkeypatch.setattr(head, "workspace_bytes", lambda *_: request.param)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_same_as_dense(name, dtype, workspace):
    x, w, b, target = whole(dtype)
    given = getattr(sp, name)(x)
    options = {"linear_bias": b, "reduction": "none", "label_smoothing": 0.1}
    upstream = np.linspace(-1, 1, len(x))
    found = VALUE_AND_GRAD(given, w, target, grad_output=upstream, **options)
    want = VALUE_AND_GRAD(
        x, w, target, grad_output=upstream, wrt=head.LinearGrad._fields[1:], **options
    )
    assert found.loss.tobytes() == want.loss.tobytes()
    assert found.grad.input is None
    # 50 terms of at most 2: γ_50·100, twice.
    room = 2 * 50 * 100 * np.finfo(dtype).eps
    for mine, other in zip(found.grad[1:], want.grad[1:], strict=True):
        assert mine.dtype == dtype
        assert np.abs(mine - other).max() <= room
    stats = crossent.linear_cross_entropy_stats(given, w, target, linear_bias=b)
    dense = crossent.linear_cross_entropy_stats(x, w, target, linear_bias=b)
    assert [a.tobytes() for a in stats] == [a.tobytes() for a in dense]
    vector = LinearGrad(None, w + 1, b - 1)
    found, want = (HVP(a, w, target, vector, **options) for a in (given, x))
    for mine, other in zip(found[1:], want[1:], strict=True):
        assert np.abs(mine - other).max() <= 20 * room


@pytest.mark.parametrize("drops", [False, True])
def test_what_belongs_to_a_row_has_the_same_bits_for_any_workspace(drops, monkeypatch):
    rng = np.random.default_rng(0)
    x = sp.random_array((300, 40), density=0.2, format="csr", rng=rng, dtype=np.float32)
    w, target = rng.normal(size=(70, 40)).astype(np.float32), rng.integers(0, 70, 300)
    if drops:
        target[rng.random(300) < 0.3] = -100
    found = []
    for bytes_ in (2**27, 2**16, 0):
        monkeypatch.setattr(head, "workspace_bytes", lambda *_, n=bytes_: n)
        loss = crossent.linear_cross_entropy(x, w, target, reduction="none")
        found.append((loss, *crossent.linear_cross_entropy_stats(x, w, target)))
    for other in found[1:]:
        assert [a.tobytes() for a in found[0]] == [a.tobytes() for a in other]


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint16])
def test_other_numbers_become_those_of_the_computation(dtype):
    x, w, _, target = whole()
    x = np.abs(x)
    found = VALUE_AND_GRAD(sp.csr_array(x.astype(dtype)), w.astype(np.float32), target)
    want = VALUE_AND_GRAD(sp.csr_array(x), w.astype(np.float32), target)
    assert found.loss == want.loss
    assert found.loss.dtype == np.float64
    assert found.grad.linear_weight.dtype == np.float32
    assert found.grad.linear_weight.tobytes() == want.grad.linear_weight.tobytes()


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_weights_of_16_bits(name):
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name)
    x, w, b, target = whole(np.float32)
    w, b = w.astype(dtype), b.astype(dtype)
    found = VALUE_AND_GRAD(sp.csr_array(x), w, target, linear_bias=b)
    want = VALUE_AND_GRAD(x, w, target, linear_bias=b)
    assert found.loss == want.loss
    u = {"float16": 2.0**-10, "bfloat16": 2.0**-7}[name]
    for mine, other in zip(found.grad[1:], want.grad[1:], strict=True):
        assert mine.dtype == dtype
        gap = np.abs(mine.astype(float) - other.astype(float))
        assert (gap <= u * np.abs(other.astype(float)) + 1e-6).all()


def test_repeated_and_unsorted_entries_add_and_stay_as_they_are():
    w, target = np.arange(12.0).reshape(3, 4), [0, 2]
    columns, starts = np.array([3, 0, 3, 1]), np.array([0, 3, 4])
    numbers = np.array([1.0, 2.0, 0.5, -1.0])
    x = sp.csr_matrix((numbers, columns, starts), shape=(2, 4))
    before = [a.copy() for a in (x.data, x.indices, x.indptr)]
    found = VALUE_AND_GRAD(x, w, target)
    want = VALUE_AND_GRAD([[2.0, 0, 0, 1.5], [0, -1, 0, 0]], w, target)
    assert found.loss == want.loss
    np.testing.assert_allclose(found.grad.linear_weight, want.grad.linear_weight, atol=1e-15)
    for mine, other in zip((x.data, x.indices, x.indptr), before, strict=True):
        assert mine.tobytes() == other.tobytes()


def test_dropped_rows_are_never_read():
    x, w, b, target = whole()
    want = VALUE_AND_GRAD(sp.csr_array(x), w, target, linear_bias=b)
    x[target == -100] = np.nan
    found = VALUE_AND_GRAD(sp.csr_array(x), w, target, linear_bias=b)
    assert found.loss == want.loss
    assert found.grad.linear_weight.tobytes() == want.grad.linear_weight.tobytes()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (3, 4)])
def test_empty_matrices(shape):
    w, target = np.ones((2, shape[1])), np.zeros(shape[0], int)
    found = VALUE_AND_GRAD(sp.csr_array(shape), w, target, linear_bias=[0.0, 0.0])
    assert abs(found.loss - (np.log(2) if shape[0] else 0)) < 1e-15
    assert not found.grad.linear_weight.any()
    assert found.grad.linear_weight.shape == w.shape


@pytest.mark.parametrize("drops", [False, True])
def test_nothing_becomes_dense(drops, monkeypatch):
    rng = np.random.default_rng(0)
    n, d, v = 3000, 20_000, 60  # 480 MB if dense
    x = sp.random_array((n, d), density=1e-3, format="csr", rng=rng)
    w, target = rng.normal(size=(v, d)), rng.integers(0, v, n)
    if drops:
        target[::3] = -100
    monkeypatch.setattr(head, "workspace_bytes", lambda *_: 4 * 2**20)
    tracemalloc.start()
    try:
        grad = VALUE_AND_GRAD(x, w, target)[1]
        used = tracemalloc.get_traced_memory()[1] - grad.linear_weight.nbytes
    finally:
        tracemalloc.stop()
    assert used <= 4 * 2**20 + 64 * n


def refuse(error, message, call, *args, **kwargs):
    with pytest.raises(error) as caught:
        getattr(crossent, call)(*args, **kwargs)
    assert str(caught.value) == f"{call}: {message}"


def test_what_a_sparse_matrix_cannot_be():
    x, w, _, target = whole()
    call = "linear_cross_entropy_value_and_grad"
    advice = "whose gradient would be a dense array of its shape; "
    for wrt in ("input", ["linear_weight", "input"], ("input", "linear_weight", "linear_bias")):
        refuse(
            ValueError,
            f"wrt names a sparse input, {advice}leave 'input' out of wrt, or pass input.toarray()",
            call,
            *(sp.csr_array(x), w, target),
            wrt=wrt,
        )
    refuse(
        ValueError,
        f"vector.input is a direction in a sparse input, {advice}pass None as vector.input, or "
        "pass input.toarray()",
        "linear_cross_entropy_hvp",
        *(sp.csr_array(x), w, target, (x, None, None)),
    )
    refuse(
        TypeError,
        "linear_weight must be a dense array, got a sparse one (only input may be sparse); use "
        "linear_weight.toarray()",
        call,
        *(x, sp.csr_array(w), target),
    )
    refuse(
        TypeError,
        "input must be float64, float32, float16, bfloat16 or integers, got complex128; convert it "
        "first, for example with input.astype('float64')",
        call,
        *(sp.csr_array(x * 1j), w, target),
    )
    refuse(
        ValueError,
        "a sparse input must be a matrix (N, D), got 1 dimensions; use input.reshape(1, -1)",
        call,
        *(sp.coo_array(x[0]), w, target),
    )
