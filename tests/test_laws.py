"""Laws that hold for any rows, over every front end, dtype of the registry and instruction set.

Where both sides do the same operations on the same numbers they agree bit for bit. Elsewhere each
is within the design page's 4 or 8 ulp of its sizes: two results differ by at most twice that.
"""

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import crossent

# Derandomised: a law that fails does so on every run, here and elsewhere.
law = settings(
    derandomize=True,
    deadline=None,
    max_examples=15,
    database=None,
    # One function serves all examples of a test: the dtype and the instruction set stay.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SIZES = st.sampled_from([1, 2, 3, 7, 15, 16, 17, 31, 33, 48, 65, 130, 300])
SEEDS = st.integers(0, 2**32 - 1)
SPREADS = st.sampled_from([0.0, 0.01, 1.0, 5.0, 30.0])
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "label_smoothing": st.sampled_from([0.1, 0.5, 1.0]),
        "z_loss": st.sampled_from([1e-4, 0.1]),
        "logit_scale": st.sampled_from([0.37, 2.0]),
        "softcap": st.sampled_from([1.0, 20.0]),
    },
)
KINDS = st.sampled_from(["index", "distribution", "sparse"])


class Rows:
    """Random logits (N, V) and a target of some kind, from a seed."""

    def __init__(self, front, seed, n_classes, spread, dtype, kind="index", n_rows=5):
        self.front = front
        rng = self.rng = np.random.default_rng(seed)
        self.logits = (rng.normal(size=(n_rows, n_classes)) * spread).astype(dtype)
        self.index = rng.integers(0, n_classes, n_rows)
        self.more = {}
        self.target = self.index
        if kind == "distribution":
            self.target = rng.dirichlet(np.ones(n_classes), n_rows).astype(dtype)
        elif kind == "sparse":
            self.target = rng.integers(0, n_classes, (n_rows, 3))
            self.more = {"target_prob": rng.dirichlet(np.ones(3), n_rows)}

    def __call__(self, **options):
        call = {"reduction": "none"} | self.more | options
        return self.front.cross_entropy_value_and_grad(self.logits, self.target, **call)


def unit(dtype):
    """Twice the rounding unit: 1 ulp of numbers from 1 up to 2, of what results are rounded to."""
    return {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[
        np.dtype(dtype).name
    ]


def loss_unit(dtype):
    return unit(np.float64) if dtype == np.float64 else unit(np.float32)


def tiny(dtype):
    """Room for rounding among denormal numbers."""
    return 8 * {"float64": 5e-324, "float32": 2e-45, "float16": 6e-8, "bfloat16": 1e-40}[dtype.name]


def assert_close(got, want, size, ulps, dtype, u=None):
    got, want = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
    u = unit(dtype) if u is None else u
    assert (np.abs(got - want) <= ulps * u * np.asarray(size, np.float64) + tiny(dtype)).all()


def loss_size(rows, options):
    """A bound of Σ|q|·(lse − z) + c·|Q|·(|m| + ln S)² for |q| of sum at most 1."""
    scale = options.get("logit_scale", 1.0)
    z = np.abs(rows.logits.astype(float)).max(axis=1) * scale
    lse = z + np.log(rows.logits.shape[1])
    return z + lse + options.get("z_loss", 0) * lse**2


def assert_same_bits(got, want):
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())


# One function, one answer -------------------------------------------------------------------------


@law
@given(SEEDS, SIZES, SPREADS, KINDS, OPTIONS)
def test_a_second_call_gives_the_same_bits(
    front, dtype, isa, seed, n_classes, spread, kind, options
):
    rows = Rows(front, seed, n_classes, spread, dtype, kind)
    before = rows.logits.tobytes(), rows.target.tobytes()
    first = rows(**options)
    kept = first.grad.copy()
    assert_same_bits(first, rows(**options))
    assert_same_bits([kept], [first.grad])
    assert (rows.logits.tobytes(), rows.target.tobytes()) == before


@law
@given(SEEDS, SIZES, SPREADS, KINDS, OPTIONS, st.integers(0, 5))
def test_a_split_of_rows_equals_the_whole(
    front, dtype, isa, seed, n_classes, spread, kind, options, where
):
    rows = Rows(front, seed, n_classes, spread, dtype, kind)
    whole = rows(**options)
    for part in (slice(where), slice(where, None)):
        piece = Rows(front, seed, n_classes, spread, dtype, kind)
        piece.logits, piece.target = piece.logits[part], piece.target[part]
        piece.more = {name: array[part] for name, array in piece.more.items()}
        found = piece(**options)
        assert_same_bits(found, (whole.loss[part], whole.grad[part]))


@law
@given(SEEDS, SIZES, SPREADS, KINDS, OPTIONS)
def test_other_rows_do_not_matter(front, dtype, isa, seed, n_classes, spread, kind, options):
    rows = Rows(front, seed, n_classes, spread, dtype, kind)
    before = rows(**options)
    rows.logits[1:] = rows.logits[1:] * dtype.type(3) + dtype.type(1)
    rows.logits[2] = np.nan
    after = rows(**options)
    assert_same_bits((after.loss[0], after.grad[0]), (before.loss[0], before.grad[0]))


@law
@given(SEEDS, SIZES, SPREADS, OPTIONS)
def test_the_loss_alone_is_the_loss_with_its_gradient(
    front, dtype, isa, seed, n_classes, spread, options
):
    rows = Rows(front, seed, n_classes, spread, dtype)
    for reduction in ("none", "mean"):
        alone = front.cross_entropy(rows.logits, rows.target, reduction=reduction, **options)
        assert_same_bits([alone], [rows(reduction=reduction, **options).loss])


# The softmax --------------------------------------------------------------------------------------


@law
@given(SEEDS, SIZES, SPREADS, KINDS, st.integers(-8, 8))
def test_a_common_offset_changes_nothing(front, dtype, isa, seed, n_classes, spread, kind, steps):
    rows = Rows(front, seed, n_classes, spread, dtype, kind)
    # On a grid of 1/4 below 32 every sum is exact in every dtype.
    grid = np.clip(np.rint(rows.logits.astype(float) * 4), -16, 16) / 4
    rows.logits = grid.astype(dtype)
    plain = rows()
    rows.logits = (grid + steps).astype(dtype)
    assume((rows.logits.astype(float) == grid + steps).all())
    moved = rows()
    size = 8 + np.log(n_classes)
    assert_close(moved.loss, plain.loss, size, 16, dtype, loss_unit(dtype))
    assert_close(moved.grad, plain.grad, np.ones(n_classes), 17, dtype)


@law
@given(SEEDS, SIZES, SPREADS)
def test_probabilities_sum_to_one(dtype, isa, seed, n_classes, spread):
    p = crossent.softmax(Rows(crossent, seed, n_classes, spread, dtype).logits).astype(float)
    assert ((p >= 0) & (p <= 1)).all()
    # Σ 4.5 ulp(p_j) ≤ 4.5 u Σ p_j, and half a denormal step for each class.
    assert_close(p.sum(axis=1), np.ones(5), 1, 4.5 + n_classes * tiny(dtype) / unit(dtype), dtype)


@law
@given(SEEDS, SIZES, SPREADS)
def test_the_plain_gradient_of_a_row_sums_to_zero(front, dtype, isa, seed, n_classes, spread):
    grad = Rows(front, seed, n_classes, spread, dtype)().grad.astype(float)
    # Σ |p − q| = 2 (1 − p_y) ≤ 2, each entry within 4.5 ulp.
    size = np.abs(grad).sum(axis=1)
    room = 4.5 * unit(dtype) * size + n_classes * tiny(dtype)
    assert (np.abs(grad.sum(axis=1)) <= room).all()


@law
@given(SEEDS, SIZES, SPREADS, KINDS, OPTIONS)
def test_the_order_of_the_classes_does_not_matter(
    front, dtype, isa, seed, n_classes, spread, kind, options
):
    rows = Rows(front, seed, n_classes, spread, dtype, kind)
    before = rows(**options)
    order = rows.rng.permutation(n_classes)
    place = np.argsort(order)
    size = loss_size(rows, options)
    rows.logits = rows.logits[:, order]
    rows.target = rows.target[:, order] if kind == "distribution" else place[rows.target]
    after = rows(**options)
    softcap = options.get("softcap", 0)
    assert_close(after.loss, before.loss, size, 16 + 21 * softcap, dtype, loss_unit(dtype))
    entries = grad_size(rows, options)
    ulps = 17 + 30 * softcap
    assert_close(after.grad, before.grad[:, order], entries, ulps, dtype)


def grad_size(rows, options):
    """A bound of τ·max(A, B, C): A and B are at most 1."""
    lse = np.abs(rows.logits.astype(float)).max(axis=1) * options.get("logit_scale", 1.0)
    lse = lse + np.log(rows.logits.shape[1])
    size = options.get("logit_scale", 1.0) * (1 + 2 * options.get("z_loss", 0) * lse)
    return size[:, None]


# Targets ------------------------------------------------------------------------------------------


@law
@given(SEEDS, SIZES, SPREADS, OPTIONS)
def test_one_hot_is_the_index(front, dtype, isa, seed, n_classes, spread, options):
    rows = Rows(front, seed, n_classes, spread, dtype)
    index = rows(**options)
    rows.target = np.eye(n_classes, dtype=dtype)[rows.index]
    assert_agree(rows, rows(**options), index, options, dtype)


@law
@given(SEEDS, SIZES, SPREADS, OPTIONS)
def test_sparse_is_dense(front, dtype, isa, seed, n_classes, spread, options):
    rows = Rows(front, seed, n_classes, spread, dtype, "sparse")
    prob = rows.more["target_prob"] = np.round(rows.more["target_prob"] * 16) / 16
    sparse = rows(**options)
    dense = np.zeros(rows.logits.shape)
    for k in range(3):
        dense[np.arange(5), rows.target[:, k]] += prob[:, k]
    rows.target, rows.more = dense.astype(dtype), {}  # exact: few bits
    assert_agree(rows, rows(**options), sparse, options, dtype)


@law
@given(SEEDS, SIZES, SPREADS, st.sampled_from([0.25, 0.5, 1.0]))
def test_smoothing_is_a_mixture_with_the_uniform(
    front, dtype, isa, seed, n_classes, spread, epsilon
):
    rows = Rows(front, seed, n_classes, spread, dtype)
    smoothed = rows(label_smoothing=epsilon)
    compute = np.float64 if dtype == np.float64 else np.float32
    rows.target = (1 - epsilon) * np.eye(n_classes)[rows.index] + epsilon / n_classes
    rows.target = rows.target.astype(compute)
    assert_agree(rows, rows(), smoothed, {}, dtype)


def assert_agree(rows, got, want, options, dtype):
    # Twice 8 ulp, and what a target rounded to the compute dtype may differ by.
    softcap = options.get("softcap", 0)
    size = loss_size(rows, options)
    assert_close(got.loss, want.loss, size, 18 + 42 * softcap, dtype, loss_unit(dtype))
    assert_close(got.grad, want.grad, grad_size(rows, options), 18 + 30 * softcap, dtype)


# Weights and reductions ---------------------------------------------------------------------------


@law
@given(SEEDS, SIZES, SPREADS, KINDS, OPTIONS, st.sampled_from([-2.0, 0.5, 64.0]))
def test_powers_of_two_multiply_exactly(
    front, dtype, isa, seed, n_classes, spread, kind, options, factor
):
    rows = Rows(front, seed, n_classes, spread, dtype, kind)
    plain = rows(**options)
    enough = np.abs(plain.grad.astype(float)) > 1e-3  # clear of denormal numbers in every dtype
    by_class = rows(**options, weight=np.full(n_classes, factor))
    if options.get("label_smoothing"):  # served by another kernel than smoothing without weights
        size = loss_size(rows, options) * abs(factor)
        assert_close(by_class.loss, plain.loss * factor, size, 18, dtype, loss_unit(dtype))
        size = grad_size(rows, options) * abs(factor)
        assert_close(by_class.grad, plain.grad.astype(float) * factor, size, 18, dtype)
        exact = []
    else:
        exact = [by_class]
    by_row = rows(**options, sample_weight=factor)
    for weighted in (*exact, by_row, rows(**options, reduction="sum", grad_output=factor)):
        want = plain.grad.astype(float) * factor
        np.testing.assert_array_equal(weighted.grad.astype(float)[enough], want[enough])
    for weighted in (*exact, by_row):
        assert_close(weighted.loss, plain.loss * factor, 0, 0, dtype)


@law
@given(SEEDS, SIZES, SPREADS, KINDS, OPTIONS)
def test_weights_and_upstream_gradients_multiply(
    front, dtype, isa, seed, n_classes, spread, kind, options
):
    rows = Rows(front, seed, n_classes, spread, dtype, kind)
    s, u = rows.rng.normal(size=(2, 5)).astype(np.float32).astype(float)
    plain = rows(**options)
    plain_row = kind == "index" and not {"label_smoothing", "z_loss"} & set(options)
    size = np.abs(plain.grad.astype(float)) if plain_row else grad_size(rows, options)
    weighted = rows(**options, sample_weight=s, grad_output=u)
    # Twice what a gradient may be off by, and the roundings of s, u and the products.
    factor = (s * u)[:, None]
    room = np.abs(factor) * (size + tiny(dtype) / unit(dtype))
    assert_close(weighted.grad, factor * plain.grad.astype(float), room, 20, dtype)
    size = np.abs(s) * loss_size(rows, options)
    assert_close(weighted.loss, s * plain.loss, size, 20, dtype, loss_unit(dtype))


@law
@given(SEEDS, SIZES, SPREADS, KINDS, OPTIONS)
def test_dropped_rows_are_inert(front, dtype, isa, seed, n_classes, spread, kind, options):
    rows = Rows(front, seed, n_classes, spread, dtype, kind)
    kept = np.array([True, False, True, True, False])
    s = np.where(kept, rows.rng.uniform(0.5, 2, 5), 0.0)
    rows.logits[~kept] = np.nan
    found = rows(**options, sample_weight=s, reduction="mean")
    rows.logits, rows.target = rows.logits[kept], rows.target[kept]
    rows.more = {name: array[kept] for name, array in rows.more.items()}
    without = rows(**options, sample_weight=s[kept], reduction="mean")
    assert_same_bits((found.loss, found.grad[kept]), without)
    assert not found.grad[~kept].any()


@law
@given(SEEDS, SIZES, SPREADS, KINDS, OPTIONS)
def test_the_sum_is_the_mean_times_its_divisor(
    front, dtype, isa, seed, n_classes, spread, kind, options
):
    rows = Rows(front, seed, n_classes, spread, dtype, kind, n_rows=8)
    if kind == "sparse":
        rows.target[0] = 0  # no row of padding: the divisor is 8, and dividing by it exact
    each, total, mean = (rows(**options, reduction=how) for how in ("none", "sum", "mean"))
    assert_close(mean.loss * 8, total.loss, np.abs(total.loss), 1, dtype, loss_unit(dtype))
    size = np.abs(each.loss.astype(float)).sum()
    assert_close(each.loss.astype(float).sum(), total.loss, size, 1, dtype, loss_unit(dtype))
    assert_same_bits([each.grad], [total.grad])


@law
@given(SEEDS, st.sampled_from([1, 3, 17, 40]), SPREADS, KINDS, OPTIONS, st.integers(0, 2))
def test_the_class_axis_may_stand_anywhere(
    front, dtype, isa, seed, n_classes, spread, kind, options, axis
):
    rows = Rows(front, seed, n_classes, spread, dtype, kind, n_rows=6)
    flat = rows(**options)

    def moved(array):
        return (
            np.moveaxis(array.reshape(2, 3, *array.shape[1:]), 2, axis)
            if array.ndim > 1
            else (array.reshape(2, 3))
        )

    rows.logits, rows.target = moved(rows.logits), moved(rows.target)
    rows.more = {name: moved(array) for name, array in rows.more.items()}
    found = rows(**options, axis=axis)
    back = np.moveaxis(found.grad, axis, -1).reshape(6, n_classes)
    assert_same_bits((found.loss.reshape(6), np.ascontiguousarray(back)), flat)


# Derivatives --------------------------------------------------------------------------------------


@law
@given(SEEDS, st.sampled_from([1, 3, 17, 40]), st.sampled_from([0.1, 1.0, 5.0]), KINDS, OPTIONS)
def test_finite_differences(front, isa, seed, n_classes, spread, kind, options):
    rows = Rows(front, seed, n_classes, spread, np.dtype(float), kind)
    options = options | {"reduction": "sum"}
    direction = rows.rng.normal(size=rows.logits.shape)
    call = {**rows.more, **options}
    grad = rows(**options).grad
    product = front.cross_entropy_hvp(rows.logits, rows.target, direction, **call)
    # Central differences: h² times a third derivative (under 30 |x|³ here), and rounding over h.
    h = 1e-5
    length = np.abs(direction).max()
    ends = []
    for sign in (1, -1):
        moved = rows.logits + sign * h * direction
        ends.append(front.cross_entropy_value_and_grad(moved, rows.target, **call))
    size = loss_size(rows, options).sum() + 1
    scale = max(1.0, options.get("logit_scale", 1.0)) ** 3
    room = scale * (h**2 * 30 * length**3 * n_classes * 5 + 32 * unit(float) * size / h)
    slope = (ends[0].loss - ends[1].loss) / (2 * h)
    assert abs(slope - (grad * direction).sum()) <= room
    curve = (ends[0].grad - ends[1].grad) / (2 * h)
    assert np.abs(curve - product).max() <= room


@law
@given(SEEDS, st.sampled_from([1, 3, 17]), SPREADS, KINDS, OPTIONS)
def test_the_hvp_is_linear_and_symmetric(front, isa, seed, n_classes, spread, kind, options):
    rows = Rows(front, seed, n_classes, spread, np.dtype(float), kind)
    call = {"reduction": "sum", **rows.more, **options}
    x, y = rows.rng.normal(size=(2, *rows.logits.shape))

    def product(vector):
        return front.cross_entropy_hvp(rows.logits, rows.target, vector, **call)

    hx, hy = product(x), product(y)
    tables = crossent.cross_entropy_hessian(rows.logits, rows.target, **call)
    size = 16 * np.abs(x).max() * np.abs(y).max() * grad_size(rows, options).max() * 4
    room = 64 * unit(float) * size * n_classes * 5 * (1 + options.get("softcap", 0))
    assert abs((y * hx).sum() - (x * hy).sum()) <= room
    assert np.abs(product(x + 3 * y) - (hx + 3 * hy)).max() <= 8 * room
    assert np.abs(np.einsum("nij,nj->ni", tables, x) - hx).max() <= room
