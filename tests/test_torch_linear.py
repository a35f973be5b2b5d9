"""The fused head from PyTorch: the bits of the NumPy functions, PyTorch's meaning and layouts."""

import inspect
from inspect import Parameter

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import crossent
import crossent.torch
from crossent.options import OPTION_NAMES, Options
from crossent.torch import (
    LinearCrossEntropyLoss,
    cross_entropy,
    linear_cross_entropy,
    linear_cross_entropy_stats,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")

N, D, V = 6, 4, 5
U = 2.0**-52
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
KINDS = ["index", "distribution", "sparse"]
OPTIONS = {
    "none": {},
    "weight": {"weight": torch.tensor([0.5, 1.0, 2.0, 0.3, -1.0])},
    "sample_weight": {"sample_weight": torch.tensor([0.5, 0.0, 2.0, 1.0, -0.3, 0.0])},
    "ignore_index": {"ignore_index": 1},
    "label_smoothing": {"label_smoothing": 0.3},
    "z_loss": {"z_loss": 0.2},
    "logit_scale": {"logit_scale": 1.7},
    "softcap": {"softcap": 2.0},
    "sum": {"reduction": "sum"},
    "rows": {"reduction": "none"},
    "divisor": {"divisor": 2.5},
}
ALL = {k: v for option in list(OPTIONS.values())[:8] for k, v in option.items()}
OPTIONS["every one"] = ALL
MOVED = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "backwards in memory": lambda x: x.flip(0).contiguous().flip(0),
}


class Head:
    """Operands, target and options."""

    def __init__(self, kind="index", name="none", dtype=torch.float64, rows=(N,), bias=True):
        torch.manual_seed(0)
        self.x = torch.randn(*rows, D, dtype=torch.float64).to(dtype)
        self.w = torch.randn(V, D, dtype=torch.float64).to(dtype)
        self.b = torch.randn(V, dtype=torch.float64).to(dtype) if bias else None
        self.options = dict(OPTIONS[name])
        self.target = torch.randint(V, rows)
        if kind == "distribution":
            self.target = torch.rand(*rows, V).to(dtype)
        elif kind == "sparse":
            self.target = torch.randint(V, (*rows, 2))
            self.options["target_prob"] = torch.rand(*rows, 2)

    def requires(self, *wanted):
        for name in wanted:
            getattr(self, name).requires_grad_()
        return self

    def loss(self, **more):
        more = {"linear_bias": self.b} | self.options | more
        return linear_cross_entropy(self.x, self.w, self.target, **more)


def array(x):
    if not isinstance(x, torch.Tensor):
        return x
    x = x.detach()
    if x.dtype is torch.bfloat16:
        ml_dtypes = pytest.importorskip("ml_dtypes")
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def assert_same_bits(tensor, other):
    """`other` is the NumPy function's."""
    found = array(tensor)
    assert found.dtype == other.dtype
    assert found.shape == other.shape
    assert found.tobytes() == other.tobytes()


def assert_bits_of_numpy(head, upstream=None):
    loss = head.loss()
    named = {"input": head.x, "linear_weight": head.w, "linear_bias": head.b}
    wanted = [name for name, x in named.items() if x is not None]
    given = {k: array(v) for k, v in head.options.items()}
    if upstream is None:
        upstream = torch.ones_like(loss)
    layer = array(head.x), array(head.w), array(head.target)
    given["linear_bias"] = array(head.b)
    value = crossent.linear_cross_entropy(*layer, **given)
    want = crossent.linear_cross_entropy_value_and_grad(
        *layer, grad_output=array(upstream), **given
    )
    grads = torch.autograd.grad(loss, [named[name] for name in wanted], upstream)
    assert_same_bits(loss, np.asarray(value))
    for name, found in zip(wanted, grads, strict=True):
        assert_same_bits(found, getattr(want.grad, name))


def wanted(head):
    return ("x", "w", "b") if head.b is not None else ("x", "w")


# The bits of NumPy --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_numpy(dtype, kind, name):
    head = Head(kind, name, dtype)
    assert_bits_of_numpy(head.requires(*wanted(head)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [(), (1,), (2, 3), (3, 1, 2), (0,), (2, 0)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_features_of_any_shape(rows, kind, reduction):
    head = Head(kind, rows=rows, bias=False)
    head.options["reduction"] = reduction
    assert_bits_of_numpy(head.requires("x", "w"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", MOVED)
def test_operands_of_any_strides(layout, dtype):
    head = Head(dtype=dtype)
    plain = head.loss()
    head.x, head.w = MOVED[layout](head.x), MOVED[layout](head.w)
    assert torch.equal(head.loss(), plain)
    assert_bits_of_numpy(head.requires(*wanted(head)))


@pytest.mark.parametrize("upstream", [0.5, -3.0, 0.0, 1e-30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_upstream_gradient(dtype, upstream):
    head = Head(dtype=dtype).requires("x", "w", "b")
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    for _ in range(2):  # a surprise, and what was expected
        assert_bits_of_numpy(head, torch.tensor(upstream, dtype=compute))


def test_upstream_gradients_row_by_row():
    head = Head(name="rows", rows=(2, 3)).requires("x", "w", "b")
    upstream = torch.tensor([[0.0, -1.0, 1.0], [4.0, -0.25, 0.0]]).double()
    assert_bits_of_numpy(head, upstream)
    assert_bits_of_numpy(head, upstream.mT.contiguous().mT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_double_backward_has_the_bits_of_numpy(dtype, kind):
    head = Head(kind, "every one", dtype).requires("x", "w", "b")
    operands = [head.x, head.w, head.b]
    upstream = torch.tensor(0.7, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    grads = torch.autograd.grad(head.loss(), operands, upstream, create_graph=True)
    vectors = [torch.randn(g.shape, dtype=torch.float64).to(dtype) for g in grads]
    products = torch.autograd.grad(grads, operands, vectors)
    want = crossent.linear_cross_entropy_hvp(
        array(head.x),
        array(head.w),
        array(head.target),
        crossent.LinearGrad(*map(array, vectors)),
        linear_bias=array(head.b),
        grad_output=upstream.item(),
        **{k: array(v) for k, v in head.options.items()},
    )
    for found, expected in zip(products, want, strict=True):
        assert_same_bits(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.3, "softcap": 4.0}], ids=str)
def test_statistics_have_the_bits_of_numpy(options, dtype):
    head = Head(dtype=dtype, rows=(2, 3)).requires("x")
    head.target[0, 1] = -100
    for target in (head.target, None):
        found = linear_cross_entropy_stats(head.x, head.w, target, linear_bias=head.b, **options)
        want = crossent.linear_cross_entropy_stats(
            array(head.x), array(head.w), array(target), linear_bias=array(head.b), **options
        )
        for ours, theirs in zip(found, want, strict=True):
            if theirs is None:
                assert ours is None
            else:
                assert_same_bits(ours, theirs)
        assert found.entropy.requires_grad
        assert not found.argmax.requires_grad


# Meaning ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_loss_of_the_logits(kind, name):
    """Sums of at most N·V·D products of numbers below 4, and an option's 16 ulp, in float64."""
    head = Head(kind, name).requires("x", "w", "b")
    head.x.data[1] /= 64  # of the size of what it stands beside
    operands = [head.x, head.w, head.b]
    losses = head.loss(), cross_entropy(functional.linear(*operands), head.target, **head.options)
    assert ((losses[0] - losses[1]).abs() <= 200 * U * 16).all()
    grads = [torch.autograd.grad(loss.sum(), operands) for loss in losses]
    for ours, theirs in zip(*grads, strict=True):
        assert ((ours - theirs).abs() <= 200 * U * 16).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("places", [(2,), (2, 3), (1, 2, 1)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_weights_of_more_axes(kind, places, reduction):
    torch.manual_seed(0)
    x = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    w = torch.randn(V, *places, D, dtype=torch.float64, requires_grad=True)
    b = torch.randn(V, *places, dtype=torch.float64, requires_grad=True)
    more = {"reduction": reduction}
    target = torch.randint(V, (N, *places))
    if kind == "distribution":
        target = torch.rand(N, V, *places)
    elif kind == "sparse":
        target = torch.randint(V, (N, 2, *places))
        more["target_prob"] = torch.rand(N, 2, *places)
    logits = torch.einsum("nd,v...d->nv...", x, w) + b
    losses = (
        linear_cross_entropy(x, w, target, linear_bias=b, **more),
        cross_entropy(logits, target, **more),
    )
    assert losses[0].shape == losses[1].shape
    assert ((losses[0] - losses[1]).abs() <= 200 * U * 16).all()
    grads = [torch.autograd.grad(loss.sum(), (x, w, b)) for loss in losses]
    for ours, theirs in zip(*grads, strict=True):
        assert ((ours - theirs).abs() <= 200 * U * 16).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropped_rows_are_not_read(dtype):
    head = Head(name="sample_weight", dtype=dtype)
    head.target[2] = -100
    want = head.loss()
    head.x[1] = torch.nan
    head.x[2] = torch.inf
    head.requires("x", "w", "b")
    loss = head.loss()
    assert torch.equal(loss, want)
    loss.backward()
    assert not head.x.grad[[1, 2, 5]].any()
    assert head.w.grad.isfinite().all()
    found = torch.func.grad(lambda w: linear_cross_entropy(head.x, w, head.target, **head.options))(
        head.w
    )
    assert found.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_row_at_all(reduction):
    head = Head(rows=(0,)).requires("x", "w", "b")
    loss = head.loss(reduction=reduction)
    loss.backward()
    assert loss == 0
    assert head.x.grad.shape == (0, D)
    assert not head.w.grad.any()


def test_a_confident_row_keeps_its_gradient():
    x = torch.tensor([[40.0, 0.0]], requires_grad=True)
    loss = linear_cross_entropy(x, torch.eye(2), torch.tensor([0]))
    loss.backward()
    assert loss > 0
    assert (x.grad[0] == torch.tensor([-1.0, 1.0]) * loss.detach()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_what_linear_would(dtype):
    head = Head(dtype=torch.float32).requires("x", "w", "b")
    operands = [head.x, head.w, head.b]
    with torch.autocast("cpu", dtype):
        loss = head.loss()
        peer = functional.cross_entropy(functional.linear(*operands), head.target)
        also = torch.func.vjp(lambda x: linear_cross_entropy(x, head.w, head.target), head.x)[0]
        double = Head().requires("x").loss()
    assert loss.dtype is peer.dtype is also.dtype is torch.float32
    assert double.dtype is torch.float64
    cast = [x.detach().to(dtype).requires_grad_() for x in operands]
    want = linear_cross_entropy(cast[0], cast[1], head.target, linear_bias=cast[2])
    assert torch.equal(loss, want)
    for found, expected in zip(
        torch.autograd.grad(loss, operands), torch.autograd.grad(want, cast), strict=True
    ):
        assert found.dtype is torch.float32
        assert torch.equal(found, expected.float())
    # PyTorch rounds logits below 8 to 16 bits, which moves each log-probability by twice as much.
    assert (loss - peer).abs() <= 2 * 4 * torch.finfo(dtype).eps
    plain = linear_cross_entropy(cast[0], cast[1], head.target)
    assert (also - plain).abs() <= 200 * 2.0**-23 * 4


def test_sixteen_bits_under_a_transform_are_not_rounded_before_the_loss():
    for dtype in (torch.bfloat16, torch.float16):
        head = Head(dtype=dtype)
        found, back = torch.func.vjp(
            lambda x, w, head=head: linear_cross_entropy(x, w, head.target, linear_bias=head.b),
            head.x,
            head.w,
        )
        want = head.requires("x", "w").loss()
        assert (found - want).abs() <= 200 * 2.0**-23 * 4
        for a, b in zip(
            back(found / found), torch.autograd.grad(want, (head.x, head.w)), strict=True
        ):
            assert ((a - b).abs() <= torch.finfo(dtype).eps * b.abs() + 1e-6).all()


# Signatures ---------------------------------------------------------------------------------------


def parameters(function):
    found = inspect.signature(function).parameters.values()
    return {p.name: (p.kind, p.default) for p in found if p.name != "self"}


@pytest.mark.parametrize(
    ("ours", "name"),
    [
        (linear_cross_entropy, "functional.linear_cross_entropy"),
        (LinearCrossEntropyLoss.__init__, "LinearCrossEntropyLoss.__init__"),
        (LinearCrossEntropyLoss.forward, "LinearCrossEntropyLoss.forward"),
    ],
    ids=["function", "constructor", "forward"],
)
def test_the_arguments_are_pytorch_s_and_more_come_by_name(ours, name):
    theirs = torch.nn
    for part in name.split("."):
        theirs = getattr(theirs, part, None)
    if theirs is None:
        pytest.skip("this PyTorch has no linear_cross_entropy")
    ours, theirs = parameters(ours), parameters(theirs)
    assert list(ours)[: len(theirs)] == list(theirs)
    assert {k: v for k, v in ours.items() if k in theirs} == theirs
    more = {k: v for k, v in ours.items() if k not in theirs}
    assert more.keys() <= set(OPTION_NAMES)
    for key, (kind, default) in more.items():
        assert kind is Parameter.KEYWORD_ONLY
        assert default == getattr(Options(), key)


def test_every_option_is_there():
    function, made = parameters(linear_cross_entropy), parameters(LinearCrossEntropyLoss.__init__)
    called = parameters(LinearCrossEntropyLoss.forward)
    assert function.keys() >= set(OPTION_NAMES)
    assert made.keys() | called.keys() >= set(OPTION_NAMES)
    assert called.keys() & set(OPTION_NAMES) == {"sample_weight", "divisor", "target_prob"}
    theirs = parameters(crossent.linear_cross_entropy_stats)
    del theirs["workspace_mb"]  # which CROSSENT_WORKSPACE_MB sets here
    assert parameters(linear_cross_entropy_stats) == theirs


def test_options_have_no_effect():
    head = Head()
    assert torch.equal(head.loss(options=object()), head.loss())


def test_subclasses_and_modes_are_asked():
    class Mine(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    head, seen = Head(), []
    want = head.loss(), linear_cross_entropy_stats(head.x, head.w, head.target).entropy
    with Mode():
        found = head.loss(), linear_cross_entropy_stats(head.x, head.w, head.target).entropy
    assert linear_cross_entropy in seen
    assert linear_cross_entropy_stats in seen
    assert torch.equal(found[0], want[0])
    assert torch.equal(found[1], want[1])
    del seen[:]
    for name in ("x", "w"):
        mine = Head()
        setattr(mine, name, getattr(mine, name).as_subclass(Mine))
        assert torch.equal(torch.Tensor(mine.loss()), want[0])
        assert seen.pop(0) is linear_cross_entropy
