"""The numbers of the PyTorch front end: the kernels' bits, and plain operations close to them."""

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import crossent
from crossent import reference
from crossent.accuracy import compare, truths
from crossent.hard_cases import Case, index_cases, option_cases, special_case
from crossent.options import OPTION_NAMES, Options
from crossent.rows import lower
from crossent.torch import cross_entropy, cross_entropy_stats

pytestmark = pytest.mark.usefixtures("one_torch_thread")

inf, nan = float("inf"), float("nan")


def as_tensor(array):
    """Return a tensor of the array's numbers, and of its strides."""
    if not isinstance(array, np.ndarray):
        return array
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def bits(x):
    if isinstance(x, torch.Tensor):
        x = x.detach()
        name = str(x.dtype).removeprefix("torch.")
        x = (x.view(torch.int16) if x.dtype is torch.bfloat16 else x).numpy()
    else:
        name = np.asarray(x).dtype.name
    return name, np.shape(x), np.ascontiguousarray(x).tobytes()


def native(input, target, upstream=None, **options):
    """Loss and gradient of an eager call: the kernels."""
    input = input.detach().requires_grad_()
    loss = cross_entropy(input, target, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, input, upstream)[0]


def plain(input, target, upstream=None, **options):
    """The same by plain operations and their derivatives."""
    loss, back = torch.func.vjp(lambda v: cross_entropy(v, target, **options), input)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss, back(upstream)[0]


def plain_formulas(input, target, upstream=None, **options):
    """The same by the formula of the gradient, in which a batched backward pass ends."""
    input = input.detach().requires_grad_()
    loss = cross_entropy(input, target, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    (grad,) = torch.autograd.grad(loss, input, upstream[None], is_grads_batched=True)
    return loss.detach(), grad[0]


ROUTES = [native, plain, plain_formulas]
routes = pytest.mark.parametrize("route", ROUTES)


def cases(dtype, classes=40):
    yield from index_cases(dtype, (1, 3, classes, 300), 4000)
    yield from option_cases(dtype, 12, classes, together=1)
    yield special_case(dtype)


def given(case):
    """Return a case's logits, target, upstream gradient and options, as tensors."""
    options = {"reduction": "none"} | {k: as_tensor(v) for k, v in case.options.items()}
    upstream = options.pop("grad_output", None)
    return as_tensor(case.logits), as_tensor(case.target), upstream, options


# The kernels' bits --------------------------------------------------------------------------------


def test_the_bits_of_the_numpy_front_end(dtype, isa):
    for case in cases(dtype):
        call = {"reduction": "none"} | case.options
        want = crossent.cross_entropy_value_and_grad(case.logits, case.target, **call)
        input, target, upstream, options = given(case)
        found = native(input, target, upstream, **options)
        assert list(map(bits, found)) == list(map(bits, want)), case.name
        with torch.no_grad():
            assert bits(cross_entropy(input, target, **options)) == bits(want.loss), case.name


def test_the_bits_of_the_numpy_hessian(dtype, isa):
    rng = np.random.default_rng(0)
    for case in cases(dtype):
        vector = rng.normal(size=case.logits.shape).astype(dtype)
        call = {"reduction": "none"} | case.options
        want = crossent.cross_entropy_hvp(case.logits, case.target, vector, **call)
        input, target, upstream, options = given(case)
        input.requires_grad_()
        loss = cross_entropy(input, target, **options)
        upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
        (grad,) = torch.autograd.grad(loss, input, upstream, create_graph=True)
        (found,) = torch.autograd.grad(grad, input, as_tensor(vector))
        assert bits(found) == bits(want), case.name


def test_the_bits_of_the_numpy_statistics(dtype, isa):
    for case in index_cases(dtype, (1, 3, 40, 300), 4000):
        want = crossent.cross_entropy_stats(case.logits, case.target)
        found = cross_entropy_stats(as_tensor(case.logits), as_tensor(case.target))
        assert list(map(bits, found)) == list(map(bits, want)), case.name


def test_a_scaled_loss_before_or_after_changes_no_bit(dtype):
    """Whether the forward pass makes the gradient ahead shows in the time alone."""
    logits = (np.random.default_rng(0).normal(size=(6, 40)) * 3).astype(dtype)
    target = np.arange(6)
    for upstream in (1.0, 0.3, 0.3, 1.0, 1.0, 2.0):
        want = crossent.cross_entropy_value_and_grad(
            logits, target, grad_output=np.float32(upstream)
        )
        found = native(as_tensor(logits), as_tensor(target), torch.tensor(upstream))
        assert list(map(bits, found)) == list(map(bits, want))


LAYOUTS = {
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every other class": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "classes last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "rows last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "all reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "expanded": lambda x: x[:, :, :1, :1].expand(x.shape),
    "one row for all": lambda x: x[:1].expand(x.shape),
    "misplaced": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["index", "distribution", "sparse"])
def test_any_strides_have_the_same_bits(kind, layout, dtype, isa):
    rng = np.random.default_rng(0)
    shape = (3, 7, 2, 5)
    array = (rng.normal(size=shape) * 3).astype(dtype)
    target, options = rng.integers(0, 7, (3, 2, 5)), {}
    if kind == "distribution":
        target = rng.uniform(size=shape).astype(dtype)
    elif kind == "sparse":
        target = rng.integers(0, 7, (3, 2, 2, 5))
        options["target_prob"] = rng.uniform(size=target.shape)
    strided = LAYOUTS[layout](as_tensor(array))
    given = as_tensor(target)
    given = LAYOUTS[layout](given) if kind == "distribution" else given.mT.contiguous().mT
    assert not strided.is_contiguous() or layout == "misplaced"
    copies = [np.ascontiguousarray(from_bits(x)) for x in (strided, given)]
    if dtype.name == "bfloat16":
        copies = [c.view(dtype) if c.dtype == np.int16 else c for c in copies]
    want = crossent.cross_entropy_value_and_grad(*copies, axis=1, **options)
    more = {k: as_tensor(v) for k, v in options.items()}
    found = native(strided, given, **more)
    assert list(map(bits, found)) == list(map(bits, want))
    if layout == "channels_last":
        assert found[1].is_contiguous(memory_format=torch.channels_last)


def from_bits(x):
    return (x.view(torch.int16) if x.dtype is torch.bfloat16 else x).numpy()


# Plain operations ---------------------------------------------------------------------------------


def sizes(case, input):
    """Return what the loss adds up and the largest term of each row's gradient, (N,)."""
    options = Options(
        **{"reduction": "none"} | {k: v for k, v in case.options.items() if k in OPTION_NAMES}
    )
    compute = np.dtype(np.float64 if input.dtype is torch.float64 else np.float32)
    target = case.target if case.target.dtype.kind == "i" else case.target.astype(float)
    plan = lower("sizes", case.logits.shape, 1, compute, target, options)
    t = reference.rows(case.logits.astype(float), plan)
    q, lse = np.abs(t.q), np.abs(t.lse - t.log_sum) + t.log_sum
    surprise = np.where(q == 0, 0, t.gap) + t.log_sum[:, None]
    loss = np.abs(t.r) * ((q * surprise).sum(axis=1) + plan.z_loss * q.sum(axis=1) * lse**2)
    terms = [t.p * reference.sum_of_others(q), q * t.others_p]
    terms.append((2 * plan.z_loss * lse * q.sum(axis=1))[:, None] * t.p)
    upstream = np.abs(case.options.get("grad_output", np.ones(len(q))))
    grad = np.abs(t.r) * upstream * (np.maximum.reduce(terms) * t.slope).max(axis=1)
    return plan, loss if plan.reduction == "none" else loss.sum(), grad[:, None]


@pytest.mark.parametrize("route", [plain, plain_formulas])
def test_plain_operations_are_close_to_the_kernels(route, dtype):
    """Within what adding V terms loses, and thirty operations around it, of the largest term.

    A softcap κ moves z by 7κu, both sides of a difference of two, and each term by 42κ ulp.
    """
    u = 2.0**-52 if dtype == np.float64 else 2.0**-23
    own = {"float16": 2.0**-10, "bfloat16": 2.0**-7}.get(dtype.name, u)
    least = {"float16": 6e-8, "float64": 5e-324}.get(dtype.name, 1.5e-45)
    for case in option_cases(dtype, 12, 40, together=1):
        input, target, upstream, options = given(case)
        plan, loss_size, grad_size = sizes(case, input)
        ulps = 40 + 30 + 42 * plan.softcap
        want, got = (
            native(input, target, upstream, **options),
            route(input, target, upstream, **options),
        )
        off = (got[0].double() - want[0].double()).abs().numpy()
        assert (off <= ulps * u * loss_size + 1.5e-45).all(), case.name
        off = (got[1].double() - want[1].double()).abs().numpy()
        room = ulps * u * grad_size + own * want[1].double().abs().numpy()
        assert (off <= room + (40 + 30) * least).all(), case.name


CONFIDENT = [
    *(("float32", margin) for margin in (17.0, 20.0, 40.0, 80.0, 90.0)),
    *(("float64", margin) for margin in (37.0, 100.0, 400.0, 700.0)),
]


@pytest.mark.parametrize("n_classes", [2, 5, 50])
@pytest.mark.parametrize(("dtype", "margin"), CONFIDENT)
@pytest.mark.parametrize("route", [plain, plain_formulas])
def test_a_confident_row_keeps_its_gradient(route, dtype, margin, n_classes):
    """Judged by mpmath: V additions, and exp, log1p and six products on the way to each entry."""
    rng = np.random.default_rng(0)
    logits = rng.uniform(-1, 0, (4, n_classes)).round(3).astype(dtype)
    target = np.arange(4) % n_classes
    logits[range(4), target] = margin
    case = Case("confident", logits, target)
    loss, grad = route(as_tensor(logits), as_tensor(target), reduction="none")
    for truth, got in zip(truths(case), (loss, grad), strict=False):
        assert compare(truth, got.numpy()).error <= n_classes + 10
    assert (loss > 0).all()
    assert (grad[range(4), target] < 0).all()


@pytest.mark.parametrize("route", [plain, plain_formulas])
def test_an_offset_costs_plain_operations_nothing(route):
    """Multiples of 2^-10 beside 1000 need 20 bits, but times 0.37 more than float32 holds.

    Rows with and without the offset differ by nothing: it leaves before anything is rounded.
    """
    near = np.random.default_rng(0).integers(-4096, 4096, (6, 40)) / 1024
    target = torch.arange(6)
    with_, without = (
        route(torch.from_numpy((near + c).astype(np.float32)), target, logit_scale=0.37)
        for c in (1000, 0)
    )
    for a, b in zip(with_, without, strict=True):
        assert torch.equal(a, b)
    # What the rounding of v − max v leaves off counts as well: here up to 2^-18, that is 32 ulp.
    logits = np.array([[80.3, 0.1234567, -0.98765], [0.01234567, 70.7, 0.3333333]])
    case = Case("far exponents", logits.astype(np.float32), np.array([0, 1]))
    loss, grad = route(torch.from_numpy(case.logits), torch.tensor([0, 1]), reduction="none")
    for truth, got in zip(truths(case), (loss, grad), strict=False):
        assert compare(truth, got.numpy()).error <= 3 + 10


@pytest.mark.parametrize("route", ROUTES)
def test_an_upstream_gradient_of_a_dropped_row_is_not_read(route):
    target = torch.tensor([0, -100, 2])
    upstream = torch.tensor([1.0, nan, 2.0])
    _, grad = route(torch.zeros(3, 4), target, upstream, reduction="none")
    assert not grad[1].any()
    assert grad[::2].isfinite().all()


# What is no ordinary row --------------------------------------------------------------------------

BAD = {"NaN": [0.0, nan, 1.0], "+inf": [0.0, inf, 1.0], "all −inf": [-inf, -inf, -inf]}
OPTIONS = [{}, {"label_smoothing": 0.1, "z_loss": 0.1}, {"logit_scale": 2.0}, {"softcap": 9.0}]


def rows(logits, kind, dtype):
    n_rows = len(logits)
    logits = as_tensor(np.array(logits, dtype))
    if kind == "index":
        return logits, torch.zeros(n_rows, dtype=torch.int64), {}
    if kind == "distribution":
        return logits, torch.tensor([[1.0, 0.0, 0.0]] * n_rows), {}
    return logits, torch.zeros(n_rows, 1, dtype=torch.int64), {"target_prob": torch.ones(n_rows, 1)}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", ["index", "distribution", "sparse"])
@routes
def test_a_bad_row_is_nan_and_alone_so(route, kind, bad, options, dtype):
    input, target, more = rows([[0.5, -1.0, 2.0], BAD[bad], [3.0, 1.0, 1.0]], kind, dtype)
    loss, grad = route(input, target, reduction="none", **more, **options)
    assert loss.isnan().tolist() == [False, True, False]
    assert grad[1].isnan().all()
    assert grad[::2].isfinite().all()


@pytest.mark.parametrize("kind", ["index", "distribution", "sparse"])
@routes
def test_a_masked_class_has_no_gradient(route, kind, dtype):
    input, target, more = rows([[0.5, -inf, 2.0], [-inf, 1.0, 0.0]], kind, dtype)
    loss, grad = route(input, target, reduction="none", **more)
    pair = native(
        input[:1, ::2],
        target[:1] if kind != "distribution" else target[:1, ::2],
        reduction="none",
        **{k: v[:1] for k, v in more.items()},
    )
    tolerance = 10 * torch.finfo(grad.dtype).eps
    torch.testing.assert_close(grad[0, ::2], pair[1][0], rtol=tolerance, atol=0)
    torch.testing.assert_close(loss[0], pair[0][0], rtol=10 * torch.finfo(loss.dtype).eps, atol=0)
    assert grad[0, 1] == 0
    assert loss[1] == inf
    assert grad[1].isfinite().all()


@pytest.mark.parametrize("kind", ["index", "distribution", "sparse"])
@routes
def test_no_kept_row_is_0(route, kind, dtype):
    input, target, more = rows([[0.5, nan, 2.0], [nan, 1.0, 0.0]], kind, dtype)
    loss, grad = route(input, target, sample_weight=torch.zeros(2), **more)
    assert loss == 0
    assert not grad.any()
    empty = {k: v[:0] for k, v in more.items()}
    for reduction in ("mean", "sum", "none"):
        loss, grad = route(input[:0], target[:0], reduction=reduction, **empty)
        assert loss.sum() == 0
        assert grad.shape == (0, 3)
    if kind == "index":
        loss, grad = route(input, target - 100)
        assert loss == 0
        assert not grad.any()


@routes
def test_kept_rows_over_a_divisor_of_0_are_nan(route, dtype):
    input, target, _ = rows([[0.5, 1.0, 2.0], [0.0, 1.0, 0.0]], "index", dtype)
    for options in ({"weight": torch.tensor([0.0, 1.0, 1.0])}, {"divisor": 0.0}):
        loss, grad = route(input, target, **options)
        assert loss.isnan()
        assert grad.isnan().all()


@routes
def test_a_float16_gradient_does_not_underflow_before_its_scale(route):
    """e^-12/4096 is far below float16's least number, 6e-8; times 2^16 it is not."""
    input = torch.zeros(4096, 2, dtype=torch.float16)
    input[:, 0] = 12
    _, grad = route(input, torch.zeros(4096, dtype=torch.int64), torch.tensor(2.0**16))
    other = 1 / (1 + np.exp(12.0))
    want = torch.tensor([-other, other]) * 16
    # Rounded once, to 2^-11.
    torch.testing.assert_close(grad[7].float(), want.float(), rtol=2.0**-11 + 2.0**-20, atol=0)


def test_autocast_changes_nothing():
    torch.manual_seed(0)
    layer, x, target = torch.nn.Linear(6, 5), torch.randn(4, 6), torch.tensor([0, 1, 2, -100])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = layer(x)
        assert logits.dtype is torch.bfloat16
        for v in (logits.detach(), logits.detach().float()):
            for route in ROUTES:
                inside = route(v, target, label_smoothing=0.1)
                with torch.autocast("cpu", enabled=False):
                    outside = route(v, target, label_smoothing=0.1)
                assert list(map(bits, inside)) == list(map(bits, outside))
        loss = cross_entropy(logits, target)
    assert loss.dtype is torch.float32
    loss.backward()
    assert layer.weight.grad.isfinite().all()
