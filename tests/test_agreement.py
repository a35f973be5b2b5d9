"""The kernels against the formulas in extended precision: options, sizes, lanes, second order.

The bounds are the design page's (section 4.1): 4 ulp of the exact value for index targets without
options and for the softmax, otherwise 8 ulp of the sizes of what the formula adds up. 16-bit
dtypes are computed in float32 and rounded once. `test_check.py` asks mpmath; here NumPy's
long double is the judge, which is quick enough for every instruction set and every tail.
"""

from itertools import combinations

import numpy as np
import pytest

import crossent
from crossent import reference
from crossent.options import OPTION_NAMES, Options
from crossent.rows import lower

WIDE = np.longdouble
if np.finfo(WIDE).nmant < 63:
    pytest.skip("long double is no wider than double here", allow_module_level=True)

BITS = {"float64": (53, -1022), "float32": (24, -126), "float16": (11, -14), "bfloat16": (8, -126)}


def ulp(x, name):
    bits, least = BITS[name]
    exponent = np.where(x == 0, least, np.maximum(np.frexp(x)[1] - 1, least))
    return np.ldexp(WIDE(1), (exponent - bits + 1).astype(int))


def compute_name(dtype):
    return "float64" if dtype == np.float64 else "float32"


def assert_within(got, exact, scale, bound, dtype, what):
    """Assert `bound` ulp of `scale` in the compute dtype, and one rounding to a 16-bit dtype."""
    got, name = np.asarray(got).astype(WIDE), compute_name(dtype)
    allowed = bound * ulp(scale, name)
    if dtype.name in ("float16", "bfloat16"):
        allowed = allowed + ulp(np.abs(exact) + allowed, dtype.name) / 2
    bits, least = BITS[dtype.name]
    largest = np.ldexp(2 - WIDE(2) ** (1 - bits), 1 - least)
    over = np.isinf(got) & (got * exact > 0) & (np.abs(exact) + allowed > largest)
    same = (got == exact) | over | ((got != got) & (exact != exact))
    with np.errstate(invalid="ignore"):
        wrong = ~same & ~(np.abs(got - exact) <= allowed)
    if wrong.any():
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.where(wrong, np.abs(got - exact) / allowed * bound, 0)
        worst = np.unravel_index(np.argmax(share), share.shape)
        raise AssertionError(
            f"{what} at {tuple(map(int, worst))}: got {got[worst]}, exact {exact[worst]}, "
            f"{share[worst]:.3g} of {np.broadcast_to(bound, share.shape)[worst]:.3g} ulp allowed"
        )


class Truth:
    """The plan of one call, its terms, and the sizes that errors are counted in."""

    def __init__(self, logits, target, options):
        self.upstream = options.get("grad_output")
        given = {name: value for name, value in options.items() if name in OPTION_NAMES}
        compute = np.dtype(compute_name(logits.dtype))
        target = np.asarray(target)
        if target.dtype.kind != "i":
            target = target.astype(compute)
        self.plan = lower("truth", logits.shape, 1, compute, target, Options(**given))
        self.v = logits.astype(WIDE)
        self.t = t = reference.rows(self.v, self.plan)
        self.plain = set(given) <= {"reduction"} and self.plan.kind == "index"
        self.lse_size = np.abs(t.lse - t.log_sum) + t.log_sum
        # Softcap is promised nothing; z = κ tanh(x) is within 7u κ, each p so within 14u κ.
        self.more = 0
        if self.plan.softcap:
            x = np.abs(self.plan.logit_scale * self.v / self.plan.softcap)
            self.more = 21 * self.plan.softcap + 4 * np.where(np.isfinite(x), x, 0) + 4

    def loss_scale(self):
        t, plan = self.t, self.plan
        surprise = np.where(t.q == 0, 0, t.gap) + t.log_sum[:, None]
        size = (np.abs(t.q) * surprise).sum(axis=1)
        return np.abs(t.r) * (size + plan.z_loss * np.abs(t.Q) * self.lse_size**2)

    def grad_scale(self):
        t, q = self.t, np.abs(self.t.q)
        a, b = t.p * reference.sum_of_others(q), q * t.others_p
        c = (2 * self.plan.z_loss * self.lse_size * q.sum(axis=1))[:, None] * t.p
        u = 1 if self.upstream is None else np.abs(np.asarray(self.upstream, WIDE)).reshape(-1, 1)
        return np.abs(t.r)[:, None] * u * t.slope * np.maximum(np.maximum(a, b), c)

    def hvp_scale(self, vector):
        """What the product adds up: differences of the direction's entries, at twice their size."""
        t, plan = self.t, self.plan
        x = np.abs(vector.astype(WIDE))
        y = np.where(t.p == 0, 0, x * t.slope)
        top = np.take_along_axis(y, np.argmax(t.p, axis=1)[:, None], axis=1)
        mean = top + (t.p * (y + top)).sum(axis=1, keepdims=True)
        size = 1 + 4 * plan.z_loss * self.lse_size[:, None]
        in_z = np.abs(t.q).sum(axis=1)[:, None] * size * t.p * (y + mean)
        u = 1 if self.upstream is None else np.abs(np.asarray(self.upstream, WIDE)).reshape(-1, 1)
        r = np.abs(t.r)[:, None] * u
        bend = np.abs(t.curvature) * x * self.grad_scale() / np.where(t.slope == 0, 1, t.slope)
        return r * t.slope * in_z + bend

    def check_hvp(self, found, vector, what):
        exact = reference.hvp(self.v, self.plan, vector.astype(WIDE), self.upstream)
        scale, bound = self.hvp_scale(vector), 8 + 2 * self.more
        assert_within(found, exact, scale, bound, vector.dtype, f"hvp, {what}")

    def check(self, found, dtype, what):
        exact_grad = reference.grad(self.v, self.plan, self.upstream)
        scale = np.abs(exact_grad) if self.plain else self.grad_scale()
        bound = 4 if self.plain else 8 + self.more
        assert_within(found.grad, exact_grad, scale, bound, dtype, f"gradient, {what}")
        exact_loss = np.asarray(reference.loss(self.v, self.plan))
        scale = np.abs(exact_loss) if self.plain else self.loss_scale()
        bound = np.max(bound)
        if self.plan.reduction != "none":
            # Each row's error, at most twice as large in ulp of the sum, and one rounding of it.
            scale, bound = np.asarray(scale.sum()), 2 * bound + 1
        loss_dtype = np.dtype(compute_name(dtype))
        assert_within(found.loss, exact_loss, scale, bound, loss_dtype, f"loss, {what}")


# Options ------------------------------------------------------------------------------------------

N, V = 9, 37
RNG = np.random.default_rng(7)
LOGITS = RNG.normal(size=(N, V)) * np.geomspace(0.1, 50, N)[:, None]
LOGITS[::3] += RNG.choice([-1000.0, 100.0, 700.0], (3, 1))
DISTRIBUTION = RNG.dirichlet(np.full(V, 0.2), N)
DISTRIBUTION[0] = np.eye(V)[5]
DISTRIBUTION[1] = -RNG.normal(size=V)  # neither positive nor of sum 1
IDS = RNG.integers(0, V, (N, 4))
IDS[::2, 1] = IDS[::2, 0]
IDS[1::2, 2] = -100
IDS[4] = -100
VECTOR = RNG.normal(size=(N, V))
TARGETS = {
    "index": (np.array([3, -100, 0, V - 1, 16, 17, 31, 2, 36]), {}),
    "distribution": (DISTRIBUTION, {}),
    "sparse": (IDS, {"target_prob": RNG.dirichlet(np.ones(4), N)}),
}
OPTIONS = {
    "weight": {"weight": RNG.normal(1, 1, V)},
    "sample_weight": {"sample_weight": np.array([1, 0.5, 0, -2, 1e-3, 3, 1, 0, 1])},
    "label_smoothing": {"label_smoothing": 0.1},
    "label_smoothing 1": {"label_smoothing": 1.0},
    "z_loss": {"z_loss": 1e-2},
    "logit_scale": {"logit_scale": 0.37},
    "softcap": {"softcap": 5.0},
    "sum": {"reduction": "sum"},
    "mean": {"reduction": "mean"},
    "divisor": {"reduction": "mean", "divisor": 1000.0},
    "ignore_index": {"ignore_index": 3},
    "grad_output": {"grad_output": RNG.normal(size=N)},
}


def option_sets():
    for count in range(3):
        for names in combinations(OPTIONS, count):
            merged, total = {}, 0
            for name in names:
                merged |= OPTIONS[name]
                total += len(OPTIONS[name])
            whole = merged.get("reduction", "none") != "none"
            if len(merged) == total and not (whole and "grad_output" in merged):
                yield " and ".join(names) or "no option", {"reduction": "none"} | merged


@pytest.mark.parametrize("kind", TARGETS)
def test_every_option_alone_and_in_pairs(kind, dtype, isa):
    logits = LOGITS.astype(dtype)
    for what, options in option_sets():
        target, more = TARGETS[kind]
        if "ignore_index" in options and kind != "distribution":
            target = np.where(target == -100, options["ignore_index"], target)
        given = options | more
        found = crossent.cross_entropy_value_and_grad(logits, target, **given)
        assert found.grad.dtype == dtype
        assert np.asarray(found.loss).dtype == compute_name(dtype)
        truth = Truth(logits, target, given)
        truth.check(found, dtype, what)
        vector = VECTOR.astype(dtype)
        truth.check_hvp(crossent.cross_entropy_hvp(logits, target, vector, **given), vector, what)
        given.pop("grad_output", None)
        alone = crossent.cross_entropy(logits, target, **given)
        np.testing.assert_array_equal(alone, found.loss)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_scalar_upstream_gradient(reduction, dtype, isa):
    logits, target = LOGITS.astype(dtype), TARGETS["index"][0]
    options = {"reduction": reduction, "grad_output": -3.0, "label_smoothing": 0.25}
    found = crossent.cross_entropy_value_and_grad(logits, target, **options)
    Truth(logits, target, options).check(found, dtype, "grad_output -3")


def test_an_upstream_gradient_saves_a_float16_gradient_from_underflow(isa):
    logits, target = LOGITS[:4].astype(np.float16), [1, 2, 3, 4]
    options = {"reduction": "mean", "divisor": 1e7, "grad_output": 65536.0}
    found = crossent.cross_entropy_value_and_grad(logits, target, **options)
    assert not crossent.cross_entropy_value_and_grad(logits, target, divisor=1e10).grad.any()
    assert np.count_nonzero(found.grad) > 30
    truth = Truth(logits, target, options)
    exact = reference.grad(truth.v, truth.plan, options["grad_output"])
    assert_within(found.grad, exact, truth.grad_scale(), 8, found.grad.dtype, "scaled")


# Sizes and places ---------------------------------------------------------------------------------

# Tails of 2 … 16 lanes; kernels work in blocks of 16 KiB (4096 floats, 2048 doubles).
SIZES = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 23, 31, 32, 33, 48, 63, 65, 100, 128, 129]
SIZES += [140, 150, 158, 257]
BLOCKS = [2047, 2048, 2049, 4095, 4096, 4097, 8193, 20000]


def misaligned(array, by):
    """Return a copy that starts `by` items past a 64-byte boundary."""
    room = np.empty(array.nbytes + 128, np.uint8)
    start = -room.ctypes.data % 64 + by * array.itemsize
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def rows_of(n_classes, n_rows, dtype):
    rng = np.random.default_rng(n_classes)
    spread = np.array([0.5, 3.0, 20.0])[np.arange(n_rows) % 3, None]
    return (rng.normal(size=(n_rows, n_classes)) * spread).astype(dtype)


@pytest.mark.parametrize("by", [0, 1, 3])
def test_every_tail_at_every_alignment(by, dtype, isa):
    for n_classes in SIZES + (BLOCKS if by == 1 else BLOCKS[-2:]):
        logits = misaligned(rows_of(n_classes, 6, dtype), by)
        target = np.array([0, n_classes // 2, n_classes - 1] * 2)
        for options in ({}, {"label_smoothing": 0.1, "z_loss": 1e-3, "logit_scale": 0.7}):
            given = {"reduction": "none"} | options
            out = misaligned(np.full_like(logits, np.nan), 2 * by + 1)
            found = crossent.cross_entropy_value_and_grad(logits, target, **given, out=out)
            assert found.grad is out
            truth = Truth(logits, target, given)
            truth.check(found, dtype, f"V = {n_classes}, {options}")
        truth = Truth(logits, target, {"reduction": "none"})
        p = truth.t.p
        assert_within(crossent.softmax(logits), p, p, 4, dtype, f"softmax, V = {n_classes}")
        log_p = -(truth.t.gap + truth.t.log_sum[:, None])
        found = crossent.log_softmax(logits)
        assert_within(found, log_p, np.abs(log_p), 4, dtype, f"log_softmax, V = {n_classes}")


@pytest.mark.parametrize("n_classes", [10, 67, 150])
def test_the_target_in_every_lane(n_classes, dtype, isa):
    logits = np.tile(rows_of(n_classes, 3, dtype)[2], (n_classes, 1))
    target = np.arange(n_classes)
    found = crossent.cross_entropy_value_and_grad(logits, target, reduction="none")
    Truth(logits, target, {"reduction": "none"}).check(found, dtype, "every lane")


def test_the_target_in_every_block(dtype, isa):
    n_classes = 20000
    target = np.arange(0, n_classes, 2048)
    target = np.unique(np.concatenate([target, target[1:] - 1, target + 1000, [n_classes - 1]]))
    target = target[target < n_classes]
    logits = np.tile(rows_of(n_classes, 3, dtype)[1], (len(target), 1))
    found = crossent.cross_entropy_value_and_grad(logits, target, reduction="none")
    Truth(logits, target, {"reduction": "none"}).check(found, dtype, "every block")


@pytest.mark.parametrize("n_classes", [40, 300, 4000, 10000])
def test_a_confident_row_in_every_block(n_classes, dtype, isa):
    target = np.array([0, 31, 256, 2047, 2048, 4095, 4096, 8192, n_classes - 1])
    target = target[target < n_classes]
    logits = rows_of(n_classes, len(target), dtype) / dtype.type(30)
    logits[np.arange(len(target)), target] = 60
    for options in ({}, {"label_smoothing": 0.1}):
        given = {"reduction": "none"} | options
        found = crossent.cross_entropy_value_and_grad(logits, target, **given)
        assert (np.asarray(found.loss) > 0).all()
        Truth(logits, target, given).check(found, dtype, f"confident, {options}")


def test_blocks_of_minus_infinity(dtype, isa):
    n_classes = 10000
    logits = rows_of(n_classes, 4, dtype)
    logits[0, :4096] = -np.inf  # the first block and, of doubles, the second
    logits[1, 4096:8192] = -np.inf
    logits[2, 8192:] = -np.inf
    logits[3] = -np.inf
    logits[3, 9999] = 3
    target = np.array([9000, 0, 4100, 9999])
    for options in ({}, {"z_loss": 1e-3}):
        given = {"reduction": "none"} | options
        found = crossent.cross_entropy_value_and_grad(logits, target, **given)
        assert np.isfinite(found.loss).all()
        assert not found.grad[np.isneginf(logits)].any()
        Truth(logits, target, given).check(found, dtype, f"masked, {options}")
    found = crossent.softmax(logits)
    assert not found[np.isneginf(logits)].any()
    np.testing.assert_array_equal(found[3, -1], 1)


@pytest.mark.parametrize("offset", [-30000.0, -1000.0, 0.0, 1000.0])
def test_blocks_at_different_heights(offset, dtype, isa):
    n_classes = 10000
    block = 2048 if dtype == np.float64 else 4096
    logits = np.full((3, n_classes), offset) + rows_of(n_classes, 3, np.dtype(float)) / 40
    deep = {"float64": 700.0, "float16": 9.0}.get(dtype.name, 84.0)
    logits[0, block : 2 * block] -= deep  # p just above the least normal number
    logits[1, :block] += deep
    logits[2, :block] = -np.inf
    logits = logits.astype(dtype)
    target = np.array([block + 1, 0, n_classes - 1])
    found = crossent.cross_entropy_value_and_grad(logits, target, reduction="none")
    truth = Truth(logits, target, {"reduction": "none"})
    truth.check(found, dtype, f"blocks about {offset}")
    p = truth.t.p
    assert_within(crossent.softmax(logits), p, p, 4, dtype, "softmax")


def test_confident_rows_of_distributions(dtype, isa):
    """Where p and q agree closely, the complements of both count."""
    logits = np.zeros((4, 37), dtype)
    logits[:, 5] = [12, 25, 50, 80]
    for rest in (0.0, 1e-3, 1e-20, 1e-30):
        target = np.full((4, 37), rest)
        target[:, 5] = 1
        found = crossent.cross_entropy_value_and_grad(logits, target, reduction="none")
        Truth(logits, target, {"reduction": "none"}).check(found, dtype, f"1 beside {rest}")


@pytest.mark.parametrize("row_weight", [1e-35, 1e-20, 1.0, 1e20, 1e35])
@pytest.mark.parametrize("upstream", [1e-35, 1.0, 1e35])
@pytest.mark.parametrize("options", [{}, {"weight": np.linspace(1e-5, 1e5, V)}], ids=["", "weight"])
def test_scales_far_from_one(row_weight, upstream, options, isa):
    """What goes in and out may be anything; only a result itself over- or underflows."""
    for dtype in (np.dtype(np.float32), np.dtype(np.float64)):
        logits, target = LOGITS.astype(dtype), TARGETS["index"][0]
        given = {"sample_weight": row_weight, "grad_output": np.full(N, upstream)} | options
        given["reduction"] = "none"
        found = crossent.cross_entropy_value_and_grad(logits, target, **given)
        Truth(logits, target, given).check(found, dtype, "far")


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_sixteen_bits_are_float32_rounded_once_to_nearest_even(name, isa):
    if name == "bfloat16":
        name = pytest.importorskip("ml_dtypes").bfloat16
    dtype = np.dtype(name)
    for n_classes in (2, 37, 300, 5000):
        half = rows_of(n_classes, 64, dtype)
        half[:32] = 0  # with these upstream gradients every entry for V = 2 is a tie
        single, target = half.astype(np.float32), np.arange(64) % n_classes
        upstream = 1 + np.arange(1, 129, 2) * {"float16": 2.0**-11}.get(dtype.name, 2.0**-8)
        given = {"reduction": "none", "grad_output": upstream}
        found = crossent.cross_entropy_value_and_grad(half, target, **given)
        wide = crossent.cross_entropy_value_and_grad(single, target, **given)
        np.testing.assert_array_equal(found.loss, wide.loss)
        np.testing.assert_array_equal(found.grad, wide.grad.astype(dtype))
        np.testing.assert_array_equal(
            crossent.softmax(half), crossent.softmax(single).astype(dtype)
        )


# Second order and statistics ----------------------------------------------------------------------


def test_the_hvp_of_a_confident_row_is_not_zero(dtype, isa):
    logits = np.zeros((2, 5), dtype)
    logits[:, 2] = 40
    vector = np.zeros((2, 5), dtype)
    vector[:, 2] = 1
    truth = Truth(logits, [2, 0], {"reduction": "none"})
    found = crossent.cross_entropy_hvp(logits, [2, 0], vector, reduction="none")
    exact = reference.hvp(truth.v, truth.plan, vector.astype(WIDE))
    assert_within(found, exact, np.abs(exact), 8, dtype, "hvp")
    if dtype != np.float16:
        assert found[0, 2] > 0


@pytest.mark.parametrize("n_classes", [1, 3, 17, 130, 5000])
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.37}, {"softcap": 5.0}], ids=str)
def test_statistics(n_classes, options, dtype, isa):
    logits = rows_of(n_classes, 6, dtype)
    target = np.array([0, n_classes // 2, n_classes - 1, 0, -100, 0])
    row_weight = [1, 2, -1, 1, 1, 0]
    found = crossent.cross_entropy_stats(logits, target, sample_weight=row_weight, **options)
    given = options | {"sample_weight": row_weight, "reduction": "none"}
    truth = Truth(logits, target, given)
    exact = reference.stats(truth.v, truth.plan)
    np.testing.assert_array_equal(found.argmax, exact.argmax)
    np.testing.assert_array_equal(found.target_rank, exact.target_rank)
    compute = np.dtype(compute_name(dtype))
    bound = 8 + np.max(truth.more)
    sizes = [truth.lse_size, np.abs(exact.target_logprob), exact.entropy]
    for name, size in zip(("logsumexp", "target_logprob", "entropy"), sizes, strict=True):
        got, size = getattr(found, name), np.where(np.isnan(size), 0, size)
        assert got.dtype == compute
        assert_within(got, getattr(exact, name), size, bound, compute, name)
