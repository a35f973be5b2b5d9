"""The same bits: for any number of threads, layout, alignment, split, and whatever is beside."""

import numpy as np
import pytest

import crossent

THREADS = [1, 2, 3, 8]
# (N, V): many tasks of many rows, one row a task, rows of several blocks, and (the last two) an
# output that no cache holds, which is written past it.
SHAPES = [(5000, 10), (700, 130), (40, 5000), (9, 33000), (1100, 1000), (40, 33000)]
OPTIONS = {
    "plain": {},
    "weights": {"weight": "classes", "sample_weight": "rows"},
    "smoothing": {"label_smoothing": 0.1, "z_loss": 1e-3},
    "softcap": {"softcap": 20.0},
}


@pytest.fixture(autouse=True)
def threads_restored():
    before = crossent.get_num_threads()
    yield
    crossent.set_num_threads(before)


def problem(n_rows, n_classes, dtype, options="plain"):
    rng = np.random.default_rng(n_classes)
    logits = (rng.normal(size=(n_rows, n_classes)) * 3).astype(dtype)
    target = rng.integers(0, n_classes, n_rows)
    target[::7] = -100
    sizes = {"rows": rng.random(n_rows), "classes": rng.random(n_classes)}
    return logits, target, {k: sizes.get(v, v) for k, v in OPTIONS[options].items()}


def everything(logits, target, options):
    """The bits of all that is computed from some logits."""
    loss, grad = crossent.cross_entropy_value_and_grad(logits, target, **options)
    each = crossent.cross_entropy(logits, target, reduction="none", **options)
    found = [loss, grad, each, crossent.softmax(logits), crossent.log_softmax(logits)]
    if logits.shape[1] <= 5000:
        found.append(crossent.cross_entropy_hvp(logits, target, logits, **options))
        found += crossent.cross_entropy_stats(logits, target)
    return [np.asarray(part).tobytes() for part in found]


@pytest.mark.parametrize("options", OPTIONS)
def test_any_number_of_threads(options, dtype):
    for shape in SHAPES[:4] if options == "plain" else SHAPES[1:3]:
        given = problem(*shape, dtype, options)
        wanted = None
        for n in THREADS:
            crossent.set_num_threads(n)
            found = everything(*given)
            wanted = wanted or found
            assert found == wanted, (shape, n)


@pytest.mark.parametrize("options", ["plain", "weights", "smoothing"])
def test_a_row_in_parts_has_the_bits_of_a_row(options, dtype, isa):
    """One row for several threads is served in parts, which one thread does without."""
    logits, _, options = problem(1, 70_001, dtype, options)
    logits[0, 40_000:50_000] -= 30  # blocks far below the maximum
    target = np.array([66_000])
    found = {}
    for n in (1, 2, 3):
        crossent.set_num_threads(n)
        in_place = logits.copy()
        crossent.cross_entropy_value_and_grad(in_place, target, **options, out=in_place)
        stats = crossent.cross_entropy_stats(logits, target)
        found[n] = [*everything(logits, target, options), in_place.tobytes()]
        found[n] += [np.asarray(part).tobytes() for part in stats]
    assert found[2] == found[1]
    assert found[3] == found[1]


def test_a_row_longer_than_the_caches(dtype):
    """Served in parts whatever the threads; a row of the same numbers in half the length is not."""
    n = 2**20
    half = (np.random.default_rng(0).normal(size=n) * 3).astype(dtype)
    logits = np.concatenate([half, half])
    small = crossent.softmax(half).astype(np.float64)
    large = crossent.softmax(logits).astype(np.float64)
    # Half of each probability; 4 ulp each, and half an ulp of a 16-bit dtype.
    bits = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}[dtype.name]
    least = {"float64": 5e-324, "float32": 1.5e-45, "float16": 6e-8, "bfloat16": 1e-40}[dtype.name]
    allowed = 16 * 2.0**-bits * small + 4 * least
    assert (np.abs(large - np.tile(small / 2, 2)) <= np.tile(allowed, 2)).all()
    loss = float(crossent.cross_entropy(logits, 5))
    assert abs(loss - float(crossent.cross_entropy(half, 5)) - np.log(2)) < 1e-5


def test_repeated_calls_with_many_threads(dtype):
    crossent.set_num_threads(8)
    given = problem(3000, 33, dtype)
    wanted = everything(*given)
    for _ in range(20):
        assert everything(*given) == wanted


@pytest.mark.parametrize("options", OPTIONS)
def test_contiguous_strided_and_misaligned(options, dtype, isa):
    for n_rows, n_classes in ((300, 10), (60, 131), (7, 5000)):
        logits, target, given = problem(n_rows, n_classes, dtype, options)
        wanted = everything(logits, target, given)
        fortran = np.asfortranarray(logits)
        steps = np.zeros((2 * n_rows, 3 * n_classes), dtype)[::2, 1::3]
        shifted = np.zeros(logits.size + 5, dtype)[5:].reshape(logits.shape)
        backwards = np.zeros_like(logits)[::-1, ::-1]
        for array in (steps, shifted, backwards):
            array[...] = logits
        for array in (fortran, steps, shifted, backwards):
            assert everything(array, target, given) == wanted


@pytest.mark.parametrize("n_classes", [40, 515, 4099, 5001])
def test_an_output_past_the_caches_that_starts_anywhere(n_classes, dtype, isa):
    """Few rows of the same are not: of any dtype, whatever lies before a row's first vector."""
    n_rows = 2**22 // (n_classes * dtype.itemsize) + 64
    logits, target, _ = problem(n_rows, n_classes, dtype)
    few = range(0, n_rows, 64)
    wanted = np.concatenate(
        [
            crossent.cross_entropy_value_and_grad(
                logits[i : i + 64], target[i : i + 64], reduction="sum"
            ).grad
            for i in few
        ]
    )
    place = np.empty(logits.size + 64, dtype)
    for start in (0, 1, 9):
        place[:] = 7
        out = place[start : start + logits.size].reshape(logits.shape)
        crossent.cross_entropy_value_and_grad(logits, target, reduction="sum", out=out)
        assert out.tobytes() == wanted.tobytes(), start
        assert (place[:start] == 7).all()
        assert (place[start + logits.size :] == 7).all()
        planes = place[start : start + logits.size].reshape(n_classes, n_rows).T
        crossent.cross_entropy_value_and_grad(logits, target, reduction="sum", out=planes)
        assert planes.tobytes() == wanted.tobytes(), start


@pytest.mark.parametrize("shape", SHAPES)
def test_out_given_or_not(shape, dtype):
    logits, target, _ = problem(*shape, dtype)
    wanted = crossent.cross_entropy_value_and_grad(logits, target)
    assert crossent.cross_entropy(logits, target) == wanted.loss
    shifted = np.full(logits.size + 3, 9, dtype)[3:].reshape(logits.shape)
    fortran = np.full_like(logits, 9, order="F")
    for out in (np.full_like(logits, 9), shifted, fortran, logits.copy()):
        given = out if out.flags.owndata and out.tobytes() == logits.tobytes() else logits
        found = crossent.cross_entropy_value_and_grad(given, target, out=out)
        assert found.loss == wanted.loss
        assert found.grad.tobytes() == wanted.grad.tobytes()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_part_of_the_rows_alone(shape, dtype):
    logits, target, _ = problem(*shape, dtype)
    whole = crossent.cross_entropy_value_and_grad(logits, target, reduction="none")
    n = len(target)
    for part in (slice(0, 1), slice(1, 4), slice(n // 2, n // 2 + 9), slice(n - 3, n)):
        found = crossent.cross_entropy_value_and_grad(logits[part], target[part], reduction="none")
        assert found.loss.tobytes() == whole.loss[part].tobytes()
        assert found.grad.tobytes() == whole.grad[part].tobytes()


@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_of_far_scales_among_others(order, dtype, isa):
    # What a kernel in lanes of the compute dtype leaves to the general one.
    logits, target, _ = problem(50, 131, dtype)
    row_weight = np.where(np.arange(50) % 3, 1.0, 1e200 if dtype == np.float64 else 1e30)
    given = {"sample_weight": row_weight, "reduction": "none"}
    each = [
        crossent.cross_entropy_value_and_grad(
            logits[i : i + 1], target[i : i + 1], **given | {"sample_weight": row_weight[i]}
        )
        for i in range(50)
    ]
    x = np.array(logits, order=order)
    for out in (np.full_like(x, 9), x):
        found = crossent.cross_entropy_value_and_grad(x, target, **given, out=out)
        assert found.loss.tobytes() == b"".join(one.loss.tobytes() for one in each)
        assert found.grad.tobytes() == b"".join(one.grad.tobytes() for one in each)


def test_other_rows_do_not_matter(dtype, isa):
    logits, target, _ = problem(64, 131, dtype)
    before = crossent.cross_entropy_value_and_grad(logits, target, reduction="none")
    kept = np.arange(64) % 3 == 0
    changed = logits.copy()
    changed[~kept] = np.where(np.arange(131) % 5, dtype.type(-100), np.nan).astype(dtype)
    target = np.where(kept, target, 130)
    after = crossent.cross_entropy_value_and_grad(changed, target, reduction="none")
    assert after.loss[kept].tobytes() == before.loss[kept].tobytes()
    assert after.grad[kept].tobytes() == before.grad[kept].tobytes()


def test_the_sum_over_rows_is_compensated():
    # Losses of 0.1 and 1e-3 by turns: what a plain float64 sum of a million loses shows.
    logits = np.zeros((10**6, 2))
    logits[:, 1] = np.where(np.arange(10**6) % 2, -2.25, -6.9)
    target = np.zeros(10**6, int)
    each = crossent.cross_entropy(logits, target, reduction="none")
    pair = [float(each[0]), float(each[1])]
    # Half a million times each, in one rounding: 500,000 has 19 bits, so long double holds it.
    exact = np.float64(np.longdouble(500_000) * (np.longdouble(pair[0]) + np.longdouble(pair[1])))
    total = crossent.cross_entropy(logits, target, reduction="sum")
    assert abs(total - exact) <= np.spacing(exact)
