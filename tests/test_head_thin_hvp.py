"""The Hessian of few classes times a direction in W and b, one pass over the features.

The truth is the same Hessian by the products of any head, in float64. An entry of the pass is off
by γ of the features (in z and in z') and of the rows, of numbers about the size of the largest.
"""

import itertools
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import crossent
from crossent import LinearGrad, _native, backends, products

HVP = crossent.linear_cross_entropy_hvp
RESULTS = LinearGrad._fields[1:]
N, D, V = 61, 7, 5


def layer(n=N, d=D, v=V, dtype=np.float64, seed=0):
    """Return x, W, b, index targets, and a direction in W and b."""
    rng = np.random.default_rng(seed)
    shapes = (n, d), (v, d), (v,), (v, d), (v,)
    x, w, b, w2, b2 = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return x, w, b, rng.integers(0, v, n), LinearGrad(None, w2, b2)


def by_products(monkeypatch, x, w, target, vector, linear_bias=None, **options):
    """The same without the pass, which is for this library's own products alone, in float64."""
    x, w, *vector = (None if a is None else a.astype(float) for a in (x, w, *vector))
    bias = None if linear_bias is None else linear_bias.astype(float)
    with monkeypatch.context() as patch:
        patch.setattr(products, "native", products.host)
        return HVP(x, w, target, LinearGrad(*vector), linear_bias=bias, **options)


def assert_near(found, want, bound):
    for name, ours, theirs in zip(LinearGrad._fields, found, want, strict=True):
        if theirs is None:
            assert ours is None, name
        elif theirs.size:
            assert abs(ours - theirs).max() <= bound * abs(theirs).max(), name


def assert_same(found, want):
    for name, ours, theirs in zip(RESULTS, found[1:], want[1:], strict=True):
        assert np.array_equal(ours, theirs), name


@pytest.fixture
def passes(monkeypatch):
    """The rows of each pass."""
    seen = []
    real = backends.NativeBackend.thin_hvp

    def spy(self, given, *rest):
        seen.append(len(given[0]))
        return real(self, given, *rest)

    monkeypatch.setattr(backends.NativeBackend, "thin_hvp", spy)
    return seen


@pytest.mark.parametrize("classes", [1, 2, 4, 5, 8, 9, 10, 16, 17, 33, 48, 49, 64])
def test_every_number_of_classes(classes, isa, monkeypatch, passes):
    # Features in and out of whole strips and panels; rows in more blocks and slots than one.
    shapes = (0, 3), (1, 1), (7, 5), (700, 37), (300, 97), (2000, 3)
    for (n, d), dtype in itertools.product(shapes, [np.float64, np.float32]):
        x, w, b, target, vector = layer(n, d, classes, dtype)
        found = HVP(x, w, target, vector, linear_bias=b)
        want = by_products(monkeypatch, x, w, target, vector, linear_bias=b)
        bound = (4 * d + n + 50) * np.finfo(dtype).eps
        assert_near(found, want, bound)
    assert passes == [n for n, _ in shapes if n for _ in "12"]


OPTIONS = [
    {},
    {"reduction": "sum"},
    {"weight": np.linspace(-1, 2, V)},
    {"sample_weight": np.arange(N) % 4 - 1.0},
    {"label_smoothing": 0.3},
    {"z_loss": 0.05},
    {"logit_scale": 0.7},
    {"softcap": 2.5},
    {"divisor": 17.0},
    {"reduction": "none", "grad_output": np.linspace(-1, 2, N)},
    {"grad_output": -1.5},
    {"ignore_index": 3},
    {
        "weight": np.linspace(0, 2, V),
        "sample_weight": np.arange(N) % 3 * 0.5,
        "label_smoothing": 0.1,
        "z_loss": 1e-3,
        "logit_scale": 1.3,
        "softcap": 5.0,
        "ignore_index": 2,
        "reduction": "sum",
    },
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("kind", ["index", "distribution", "sparse"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_every_option_on_any_part(options, kind, dtype, monkeypatch, passes):
    x, w, b, target, (_, w2, b2) = layer(dtype=dtype)
    rng = np.random.default_rng(1)
    if kind == "distribution":
        target = rng.dirichlet(np.ones(V), N).astype(dtype)
    elif kind == "sparse":
        target = rng.integers(0, V, (N, 3))
        options = options | {"target_prob": rng.dirichlet(np.ones(3), N)}
    for vector in (w2, b2), (w2, None), (None, b2):
        for bias in (b, None) if vector[1] is None else (b,):
            call = x, w, target, LinearGrad(None, *vector)
            found = HVP(*call, linear_bias=bias, **options)
            want = by_products(monkeypatch, *call, linear_bias=bias, **options)
            assert_near(found, want, (4 * D + N + 50) * np.finfo(dtype).eps)
    assert len(passes) == 4


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_sixteen_bits(name, monkeypatch, passes):
    dtype = np.dtype(name) if name == "float16" else pytest.importorskip("ml_dtypes").bfloat16
    x, w, b, target, vector = layer(300, 29, 10, dtype)
    found = HVP(x, w, target, vector, linear_bias=b)
    want = by_products(monkeypatch, x, w, target, vector, linear_bias=b)
    assert passes == [300]
    ulp = 2.0**-10 if name == "float16" else 2.0**-7
    for ours, theirs in zip(found[1:], want[1:], strict=True):
        assert ours.dtype == dtype
        error = abs(ours.astype(float) - theirs)
        assert (error <= ulp / 2 * abs(theirs) + 1e-5 * abs(theirs).max() + 2.0**-25).all()


def test_a_direction_in_the_features_more_classes_and_no_features_are_products(passes):
    x, w, b, target, vector = layer()
    HVP(x, w, target, vector._replace(input=x), linear_bias=b)
    HVP(x, w, target, LinearGrad(x, None, None), linear_bias=b)
    for shape in (50, 3, 65), (50, 0, 3):
        x, w, b, target, vector = layer(*shape)
        HVP(x, w, target, vector, linear_bias=b)
    assert passes == []


def test_rows_that_need_a_copy_are_taken_as_the_workspace_allows(passes):
    x, w, b, target, vector = layer(5000, 20, 10)
    target[7] = -100
    x[7] = np.nan
    whole = HVP(x, w, target, vector, linear_bias=b)
    assert passes == [4999]
    some = HVP(x, w, target, vector, linear_bias=b, workspace_mb=0.5)
    assert len(passes) > 3
    assert sum(passes) == 2 * 4999
    assert_near(some, whole, 1e-14)


def test_no_row_kept_is_zero():
    x, w, b, _, vector = layer(4)
    found = HVP(x, w, np.full(4, -100), vector, linear_bias=b)
    assert not np.any(found.linear_weight)
    assert not np.any(found.linear_bias)


def test_one_part_alone_is_a_column_of_the_whole():
    """The Hessian is linear, and W and b share no product but through the rows."""
    x, w, b, target, vector = layer(700, 31, 12)
    alone = [
        HVP(x, w, target, LinearGrad(None, *part), linear_bias=b)
        for part in ((vector[1], np.zeros(12)), (np.zeros((12, 31)), vector[2]))
    ]
    whole = HVP(x, w, target, vector, linear_bias=b)
    for name in RESULTS:
        parts = sum(getattr(found, name) for found in alone)
        np.testing.assert_allclose(parts, getattr(whole, name), rtol=0, atol=1e-15)
    weight_alone = HVP(x, w, target, vector._replace(linear_bias=None), linear_bias=b)
    assert np.array_equal(weight_alone.linear_weight, alone[0].linear_weight)


def test_threads_change_no_bit():
    x, w, b, target, vector = layer(3000, 50, 10, np.float32)
    before = crossent.get_num_threads()
    found = []
    for threads in (1, 2, 5):
        crossent.set_num_threads(threads)
        found.append(HVP(x, w, target, vector, linear_bias=b))
    crossent.set_num_threads(before)
    for other in found[1:]:
        assert_same(other, found[0])


def test_a_row_has_the_bits_of_the_same_row_alone():
    """Rows of upstream 0 add nothing: what is left is one row's product."""
    x, w, b, target, vector = layer(600, 9, 10, np.float32)
    for row in (0, 239, 240, 599):
        only = (np.arange(600) == row).astype(float)
        found = HVP(x, w, target, vector, linear_bias=b, reduction="none", grad_output=only)
        some = slice(row, row + 1)
        alone = HVP(x[some], w, target[some], vector, linear_bias=b, reduction="none")
        assert_same(found, alone)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_row_is_nan_unless_it_is_dropped(bad):
    x, w, b, target, vector = layer(100, 9, 10)
    kept = np.arange(100) != 41
    want = HVP(x[kept], w, target[kept], vector, linear_bias=b, reduction="sum")
    x[41, 3] = bad
    found = HVP(x, w, target, vector, linear_bias=b, reduction="sum")
    assert np.isnan(found.linear_weight).all()
    assert np.isnan(found.linear_bias).all()
    weights = kept.astype(float)
    found = HVP(x, w, target, vector, linear_bias=b, reduction="sum", sample_weight=weights)
    assert_near(found, want, 1e-14)


def test_features_and_weights_of_any_strides():
    x, w, b, target, vector = layer(400, 33, 7, np.float32)
    want = HVP(x, w, target, vector, linear_bias=b)
    turned = vector._replace(linear_weight=np.asfortranarray(vector.linear_weight))
    for moved in (np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2], x[::-1].copy()[::-1]):
        found = HVP(moved, np.asfortranarray(w), target, turned, linear_bias=b)
        assert_same(found, want)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
def test_signals_are_heard_in_the_middle_of_a_pass():
    """A handler may call as well; one that raises ends the pass."""
    code = """
    import signal
    import numpy as np
    import crossent
    from crossent import LinearGrad

    crossent.set_num_threads(1)
    rng = np.random.default_rng(0)
    row, w = rng.random(16_000).astype(np.float32), rng.random((64, 16_000)).astype(np.float32)
    along, calls = LinearGrad(None, w, None), 0

    def hvp(n):  # 64 us a row
        rows, target = np.broadcast_to(row, (n, len(row))), np.broadcast_to(3, n)
        return crossent.linear_cross_entropy_hvp(rows, w, target, along).linear_weight

    def call(*_):
        global calls
        calls += 1
        hvp(30)

    def leave(*_):
        raise KeyboardInterrupt

    wanted = hvp(1000)
    signal.signal(signal.SIGALRM, call)
    while not calls:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        assert np.array_equal(hvp(1000), wanted)
    signal.signal(signal.SIGALRM, leave)
    signal.setitimer(signal.ITIMER_REAL, 2)
    try:
        hvp(8_000_000)  # far longer than the test waits, and so is each of its slots
    except KeyboardInterrupt:
        print("answered")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "answered\n"), done.stderr


def test_the_pass_refuses_what_would_touch_other_memory():
    for n_classes in (20, 3):  # by tiles of products, and with lanes along the features
        x, w, b, target, (_, w2, b2) = layer(6, 4, n_classes)
        plan = (target, None, None, None, None, -100, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, None)
        good = {"w2": w2, "b2": b2, "dw": np.empty((n_classes, 4)), "db": np.empty((1, n_classes))}
        _native.thin_hvp(x, w, None, plan, *good.values(), False)
        along, zero = LinearGrad(None, w2, b2), np.zeros(n_classes)
        want = HVP(x, w, target, along, linear_bias=zero, reduction="sum")
        assert np.array_equal(good["dw"], want.linear_weight)
    for change in (
        {"w2": w2[1:]},
        {"w2": w2[:, 1:]},
        {"b2": b2[1:]},
        {"b2": b2.astype(np.float32)},
        {"b2": np.repeat(b2, 2)[::2]},
        {"w2": None, "b2": None},
        {"dw": np.empty((4, 3)).T},
        {"db": np.empty((1, 4))},
    ):
        with pytest.raises(ValueError, match="expected"):
            _native.thin_hvp(x, w, b, plan, *(good | change).values(), False)
    thin = x.astype(np.float32), w.astype(np.float32), None
    out = {"dw": np.empty((3, 4), np.float32), "db": np.empty((1, 3), np.float32), "b2": None}
    with pytest.raises(ValueError, match="expected a direction of the pass's dtype"):
        _native.thin_hvp(*thin, plan, *(good | out).values(), False)
