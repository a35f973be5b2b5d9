"""The fused head against the layer and the loss written out: z = x Wᵀ + b, then the reference.

Tolerances: u is the unit roundoff of the dtype that is computed in. A product over K terms is
within γ_K = K·u/(1 − K·u) of the sum of its terms' magnitudes, so z is off by at most
δ = γ_{D+1}·(|x||W|ᵀ + |b|); a softmax moves by at most 2·δ in the sum of its entries, and by what
an option multiplies that with (`SLOPE`). The rest is the products' own γ.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import crossent
from crossent import LinearGrad, _native, head, products, reference, runtime
from crossent.options import Options
from crossent.rows import lower

# Derandomised: a law that fails does so on every run, here and elsewhere.
law = settings(derandomize=True, deadline=None, max_examples=40, database=None)
N, D, V = 23, 7, 11
SIXTEEN = 2.0**-11, 2.0**-8  # unit roundoff of float16 and bfloat16
RESULTS = "input", "linear_weight", "linear_bias"


class Layer:
    """Random features, weights and targets of every kind, and the truth in float64."""

    def __init__(self, kind="index", dtype=np.float64, seed=0, n=N, d=D, v=V, lead=None):
        rng = self.rng = np.random.default_rng(seed)
        self.lead = (n,) if lead is None else lead
        n = int(np.prod(self.lead))
        self.x = rng.normal(size=(*self.lead, d)).astype(dtype)
        self.w = rng.normal(size=(v, d)).astype(dtype)
        self.b = rng.normal(size=v).astype(dtype)
        self.more = {}
        index = rng.integers(0, v, n)
        self.target = index.reshape(self.lead)
        if kind == "distribution":
            self.target = rng.dirichlet(np.ones(v), n).astype(dtype).reshape(*self.lead, v)
        elif kind == "sparse":
            self.target = rng.integers(0, v, (*self.lead, 3))
            self.more = {"target_prob": rng.dirichlet(np.ones(3), n).reshape(*self.lead, 3)}

    def __call__(self, name="_value_and_grad", *more, **options):
        function = getattr(crossent, f"linear_cross_entropy{name}")
        options = {"linear_bias": self.b} | self.more | options
        return function(self.x, self.w, self.target, *more, **options)

    def truth(self, grad_output=None, bias=True, **options):
        """Loss and gradients by `reference`, in float64."""
        x, w, b = (a.astype(np.float64) for a in (self.x, self.w, self.b))
        b = b if bias else None
        compute = np.dtype(np.float64 if self.x.dtype == np.float64 else np.float32)
        shape = (*self.lead, len(w))
        plan = lower(
            "t", shape, len(shape) - 1, compute, self.target, Options(**self.more | options)
        )
        loss = reference.loss(reference.weighted_sums(x, w, b), plan)
        return loss, LinearGrad(*reference.linear_grad(x, w, b, plan, grad_output))


@pytest.fixture(params=["native", "host"])
def product(request, monkeypatch):
    """Each product in use, for the public functions as well."""
    if request.param == "host":
        monkeypatch.setattr(products, "native", products.host)
    return request.param


@pytest.fixture
def workspace(monkeypatch):
    """Set the bytes of the workspace."""

    def use(n):
        monkeypatch.setattr(runtime, "_workspace_bytes", n)

    return use


def near(got, want, ulps=64, size=1.0):
    """Within so many float64 roundings of numbers about `size`."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return bool((np.abs(got - want) <= ulps * 2.0**-52 * (np.abs(want) + size)).all())


def assert_grads(got, want, **how):
    for name in RESULTS:
        assert near(getattr(got, name), getattr(want, name), **how), name


CASES = [
    {},
    {"reduction": "sum"},
    {"weight": np.linspace(-1, 2, V)},
    {"sample_weight": np.arange(N) % 4 - 1.0},
    {"label_smoothing": 0.3},
    {"z_loss": 0.05},
    {"logit_scale": 0.7},
    {"softcap": 2.5},
    {"divisor": 17.0},
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


@pytest.mark.parametrize("options", CASES, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("kind", ["index", "distribution", "sparse"])
@pytest.mark.parametrize("bytes_", [2**27, 4000])
def test_every_option_means_what_it_means_for_logits(options, kind, bytes_, product, workspace):
    workspace(bytes_)
    layer = Layer(kind)
    loss, grad = layer(**options)
    true_loss, true_grad = layer.truth(**options)
    assert near(loss, true_loss)
    assert near(layer("", **options), true_loss)
    assert_grads(grad, true_grad)


@pytest.mark.parametrize("bytes_", [2**27, 4000])
def test_one_loss_a_row_with_an_upstream_gradient_a_row(bytes_, product, workspace):
    workspace(bytes_)
    layer = Layer(lead=(3, 4))
    layer.target[1, 2] = -100
    upstream = layer.rng.normal(size=(3, 4))
    loss, grad = layer(reduction="none", grad_output=upstream)
    true_loss, true_grad = layer.truth(upstream, reduction="none")
    assert near(loss, true_loss)
    assert_grads(grad, true_grad)
    assert grad.input.shape == layer.x.shape
    assert not grad.input[1, 2].any()
    assert_grads(layer(reduction="none")[1], layer.truth(reduction="none")[1])
    for factor in (-2.5, np.float32(3)):
        assert_grads(layer(grad_output=factor)[1], layer.truth(float(factor))[1])


def test_without_a_bias():
    layer = Layer()
    loss, grad = layer(linear_bias=None)
    true_loss, true_grad = layer.truth(bias=False)
    assert near(loss, true_loss)
    assert near(grad.input, true_grad.input)
    assert near(grad.linear_weight, true_grad.linear_weight)
    assert grad.linear_bias is None


@law
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(*(st.integers(1, 40) for _ in "NDV")),
    kind=st.sampled_from(["index", "distribution", "sparse"]),
    options=st.fixed_dictionaries(
        {},
        optional={
            "label_smoothing": st.sampled_from([0.1, 1.0]),
            "z_loss": st.sampled_from([1e-4, 0.1]),
            "logit_scale": st.sampled_from([0.37, 2.0]),
            "softcap": st.sampled_from([1.0, 20.0]),
        },
    ),
    rows=st.integers(1, 9),
    drops=st.booleans(),
)
def test_any_shape_in_chunks_of_any_length(seed, shape, kind, options, rows, drops):
    n, d, v = shape
    layer = Layer(kind, seed=seed, n=n, d=d, v=v)
    if drops:
        options["sample_weight"] = layer.rng.integers(0, 3, n) * 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head.Head, "_chunk_rows", lambda *_: rows)
        loss, grad = layer(**options)
    true_loss, true_grad = layer.truth(**options)
    assert near(loss, true_loss, size=20)
    assert_grads(grad, true_grad, size=20)


# Chunks -------------------------------------------------------------------------------------------


@pytest.fixture
def spy(monkeypatch):
    """Shapes of the products that are made, as (M, K, N)."""
    made, native = [], products.native

    def watched(a, b, out, **how):
        made.append((*a.shape, b.shape[1]))
        native(a, b, out, **how)

    monkeypatch.setattr(products, "native", watched)
    return made


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("drops", [False, True])
def test_what_belongs_to_a_row_has_the_same_bits_for_any_workspace(dtype, drops, workspace):
    layer = Layer(dtype=dtype, n=200, d=37, v=61)
    if drops:
        layer.target[layer.rng.random(200) < 0.3] = -100
    results, vector = [], LinearGrad(*(np.ones_like(a) for a in (layer.x, layer.w, layer.b)))
    for bytes_ in (2**27, 2**15, 0):
        workspace(bytes_)
        loss, grad = layer(reduction="none")
        product = layer("_hvp", vector, reduction="none")
        results.append((loss, grad.input, product.input, *layer("_stats")))
        sums = [*grad[1:], *product[1:]]
        if bytes_ == 2**27:
            first_sums = sums
        # Sums over 200 rows: γ_200 of the sum of magnitudes, which is below 200·|x|.
        room = (
            2 * 200 * np.finfo(dtype).eps * 200 * max(np.abs(layer.x).max(), np.abs(layer.w).max())
        )
        assert all(np.abs(a - b).max() <= room for a, b in zip(sums, first_sums, strict=True))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("bytes_", range(0, 200_000, 16_000))
def test_a_small_workspace_makes_chunks_of_about_one_length(bytes_, spy, workspace):
    layer = Layer(n=100, d=8, v=50)
    layer("")
    assert spy == [(100, 8, 50)]
    spy.clear()
    workspace(bytes_)
    layer("")
    rows = [m for m, _, _ in spy]
    assert sum(rows) == 100
    assert max(rows) - min(rows) < len(rows)
    if bytes_ == 0:
        assert rows == [1] * 100
    elif bytes_ < 20_000:
        assert len(rows) > 2


def test_few_classes_are_taken_in_chunks_that_stay_in_the_cache(spy):
    layer = Layer(dtype=np.float32, n=30_000, d=100, v=10)
    layer("")
    rows = [m for m, _, _ in spy]
    assert len(rows) > 1
    assert min(rows) >= 512
    assert max(rows) * (100 + 10) * 4 <= 8 * 2**20


@pytest.mark.parametrize(
    ("wrt", "products"),
    [
        ((), ["z"]),
        ("input", ["z", "x"]),
        (["linear_weight"], ["z", "w"]),
        ("linear_bias", ["z", "b"]),
        (("linear_bias", "input"), ["z", "x", "b"]),
        (("input", "linear_weight", "linear_bias"), ["z", "x", "w", "b"]),
    ],
)
def test_a_gradient_that_is_not_wanted_costs_no_product(wrt, products, spy):
    layer = Layer()
    loss, grad = layer(wrt=wrt)
    shapes = {"z": (N, D, V), "x": (N, V, D), "w": (V, N, D), "b": (1, N, V)}
    assert spy == [shapes[name] for name in products]
    true_loss, true_grad = layer.truth()
    assert near(loss, true_loss)
    for name in RESULTS:
        found = getattr(grad, name)
        if name == wrt or (name in wrt and not isinstance(wrt, str)):
            assert near(found, getattr(true_grad, name))
        else:
            assert found is None


def test_dropped_rows_are_left_out_of_the_products(spy):
    layer = Layer(n=10)
    layer.target[[1, 2, 8]] = -100
    layer(sample_weight=np.abs(np.arange(10) - 5))
    assert spy == [(6, D, V), (6, V, D), (V, 6, D), (1, 6, V)]


# Numbers ------------------------------------------------------------------------------------------


def gamma(n, dtype):
    u = np.finfo(dtype).eps / 2
    return n * u / (1 - n * u)


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_accuracy(scale, dtype, product):
    n, d, v = 40, 130, 70
    layer = Layer(dtype=dtype, n=n, d=d, v=v)
    layer.w = (layer.w.astype(np.float64) * scale).astype(dtype)
    loss, grad = layer(reduction="none")
    true_loss, true_grad = layer.truth(reduction="none")
    compute = np.float64 if dtype == np.float64 else np.float32
    x, w, b = (np.abs(a.astype(np.float64)) for a in (layer.x, layer.w, layer.b))
    delta = (gamma(d + 1, compute) * (x @ w.T + b)).max(axis=1)  # (N,)
    # A loss moves by at most p·δ + δ, and rounds as it is formed.
    assert (np.abs(loss - true_loss) <= 2 * delta + 8 * np.finfo(compute).eps * true_loss).all()
    u = {"float16": SIXTEEN[0], "bfloat16": SIXTEEN[1]}.get(np.dtype(dtype).name, 0.0)
    g = np.full((n, v), 2 / v)  # magnitudes of g sum to at most 2
    own = product == "native" and np.dtype(dtype).name == "bfloat16"
    of_g = u if own and _native.isa() == "x86-64-v4-bf16" else 0.0  # g's own rounding
    bounds = LinearGrad(
        2 * delta[:, None] * w.max(axis=0) + (gamma(v + 8, compute) + of_g) * 2 * w.max(axis=0),
        (2 * delta[:, None] * x).sum(axis=0) + (gamma(n + 8, compute) + of_g) * 2 * x.sum(axis=0),
        (2 * delta).sum() + gamma(n + 8, compute) * g.sum(),
    )
    tiny = {"float16": 2.0**-25}.get(np.dtype(dtype).name, 0.0)  # half the least subnormal
    for name in RESULTS:
        found, true = getattr(grad, name), getattr(true_grad, name)
        assert found.dtype == dtype
        error = np.abs(found.astype(np.float64) - true)
        assert (error <= getattr(bounds, name) + u * np.abs(true) + tiny).all(), name


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_sixteen_bits_are_rounded_once(name, product):
    """Of many terms each of which a 16-bit sum would lose, once it has grown."""
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name)
    u = SIXTEEN[name == "bfloat16"]
    n = 4096
    x = np.ones((n, 1), dtype)
    w = np.zeros((2, 1), dtype)
    loss, grad = crossent.linear_cross_entropy_value_and_grad(
        x, w, np.zeros(n, int), reduction="sum"
    )
    assert loss.dtype == np.float32
    assert abs(loss - n * np.log(2)) < 1e-6 * n
    # Each row adds ½; a 16-bit sum would stop at 2^10 or 2^7.
    assert grad.linear_weight.astype(np.float64).tolist() == [[-n / 2], [n / 2]]
    x[0] = 1 + 2 * u  # lost as it should be, in one rounding at the end
    grad = crossent.linear_cross_entropy_value_and_grad(x, w, np.zeros(n, int), reduction="sum")[1]
    assert grad.linear_weight.astype(np.float64).tolist() == [[-n / 2], [n / 2]]


def test_a_float16_gradient_does_not_underflow_before_its_upstream_gradient():
    layer = Layer(dtype=np.float16)
    small, large = layer(divisor=1e10)[1], layer(divisor=1e10, grad_output=1e10)[1]
    assert not small.linear_weight.any()
    want = layer(reduction="sum")[1].linear_weight
    np.testing.assert_allclose(large.linear_weight.astype(float), want.astype(float), rtol=2e-3)


def test_a_confident_row_keeps_its_gradient():
    """A margin of 50 by a layer whose sums are exact."""
    x, w = np.array([[1.0, 2.0]], np.float32), np.array([[10.0, 20.0], [0.0, 0.0]], np.float32)
    loss, grad = crossent.linear_cross_entropy_value_and_grad(x, w, [0])
    tail = np.exp(-50.0)
    assert abs(loss / tail - 1) < 1e-6
    want = tail * np.array([[-1, -2], [1, 2]])
    np.testing.assert_allclose(grad.linear_weight, want, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "z_loss": 0.1, "label_smoothing": 0.2}])
def test_gradients_are_those_of_the_loss(options):
    layer = Layer(seed=3, n=4, d=3, v=5)
    grad = layer(**options)[1]
    h = 1e-5  # the error of the difference: h²·f‴ and 1e-16/h, both near 1e-10
    for name, array in zip(RESULTS, (layer.x, layer.w, layer.b), strict=True):
        for i in range(array.size):
            value, ends = array.flat[i], []
            for step in (h, -h):
                array.flat[i] = value + step
                ends.append(layer("", **options))
            array.flat[i] = value
            assert abs((ends[0] - ends[1]) / (2 * h) - getattr(grad, name).flat[i]) < 1e-8


SUBSETS = [tuple(k >> i & 1 for i in range(3)) for k in range(8)]


@pytest.mark.parametrize("given_parts", SUBSETS)
@pytest.mark.parametrize("kind", ["index", "distribution"])
@pytest.mark.parametrize("bytes_", [2**27, 4000])
def test_hessian_products_are_differences_of_gradients(
    given_parts, kind, bytes_, product, workspace
):
    workspace(bytes_)
    layer = Layer(kind, seed=5, lead=(3, 4))
    options = {"label_smoothing": 0.1, "z_loss": 0.05, "softcap": 4.0, "reduction": "none"}
    options |= {"sample_weight": np.arange(12).reshape(3, 4) % 5 * 0.5}
    upstream = layer.rng.normal(size=(3, 4))
    arrays = layer.x, layer.w, layer.b
    draws = [layer.rng.normal(size=a.shape) for a in arrays]
    vector = LinearGrad(*(d if k else None for d, k in zip(draws, given_parts, strict=True)))
    found = layer("_hvp", vector, grad_output=upstream, **options)
    h, ends = 1e-5, []
    for step in (h, -h):
        moved = Layer(kind, seed=5, lead=(3, 4))
        moved.x, moved.w, moved.b = (
            a if d is None else a + step * d for a, d in zip(arrays, vector, strict=True)
        )
        ends.append(moved.truth(upstream, **options)[1])
    for name, part in zip(RESULTS, vector, strict=True):
        if part is None:
            assert getattr(found, name) is None
            continue
        slope = (getattr(ends[0], name) - getattr(ends[1], name)) / (2 * h)
        assert np.abs(slope - getattr(found, name)).max() < 1e-7


def test_a_hessian_product_has_the_dtype_of_each_argument(dtype, product):
    layer = Layer(dtype=dtype, n=30)
    wide = Layer(n=30)
    wide.x, wide.w, wide.b = (a.astype(np.float64) for a in (layer.x, layer.w, layer.b))
    vector = LinearGrad(layer.x, layer.w, layer.b)
    found = layer("_hvp", vector)
    want = wide("_hvp", LinearGrad(wide.x, wide.w, wide.b))
    u = {"float16": 4 * SIXTEEN[0], "bfloat16": 4 * SIXTEEN[1]}.get(np.dtype(dtype).name, 1e-5)
    for a, b in zip(found, want, strict=True):
        assert a.dtype == dtype
        assert np.abs(a.astype(np.float64) - b).max() <= u * np.abs(b).max()


# Whole numbers, exact in any order: the head then has the row kernel's bits -----------------------


def whole(dtype, seed=0, n=60, d=9, v=33):
    rng = np.random.default_rng(seed)
    x, w = (rng.integers(-2, 3, size).astype(dtype) for size in ((n, d), (v, d)))
    b = rng.integers(-3, 4, v).astype(dtype)
    compute = np.float64 if dtype == np.float64 else np.float32
    z = x.astype(compute) @ w.astype(compute).T + b.astype(compute)
    return x, w, b, z, rng.integers(0, v, n)


@pytest.mark.parametrize("bytes_", [2**27, 2**13])
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.3, "softcap": 4.0}])
def test_losses_and_statistics_have_the_bits_of_those_of_the_logits(
    options, bytes_, dtype, product, workspace
):
    workspace(bytes_)
    x, w, b, z, target = whole(dtype)
    target[3:7] = -100
    stats = crossent.linear_cross_entropy_stats(x, w, target, linear_bias=b, **options)
    for mine, plain in zip(stats, crossent.cross_entropy_stats(z, target, **options), strict=True):
        assert mine.dtype == plain.dtype
        assert mine.tobytes() == plain.tobytes()
    options = options | {"reduction": "none"}
    loss = crossent.linear_cross_entropy(x, w, target, linear_bias=b, **options)
    assert loss.tobytes() == crossent.cross_entropy(z, target, **options).tobytes()


def test_statistics_without_a_target():
    x, w, b, z, _ = whole(np.float64)
    drops = np.arange(60) % 2
    stats = crossent.linear_cross_entropy_stats(x, w, linear_bias=b, sample_weight=drops)
    plain = crossent.cross_entropy_stats(z, sample_weight=drops)
    assert stats.target_logprob is None
    assert stats.target_rank is None
    for name in ("logsumexp", "entropy", "argmax"):
        assert getattr(stats, name).tobytes() == getattr(plain, name).tobytes()
    assert stats.argmax[::2].tolist() == [-1] * 30
