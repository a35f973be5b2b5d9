"""Compiled, exported and traced heads give the numbers of eager calls, bit for bit."""

import io
import os
import shutil

import pytest

pytest.importorskip("torch")
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from crossent.torch import (
    LinearCrossEntropyLoss,
    linear_cross_entropy,
    linear_cross_entropy_stats,
    linear_ops,
)

N, D, V = 3, 4, 5
U32, U64 = 2.0**-23, 2.0**-52
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.3, -1.0])
OPTIONS = {
    "none": {},
    "divisor": {"divisor": 2.5},
    "sum": {"reduction": "sum"},
    "every one": {
        "weight": WEIGHT,
        "sample_weight": torch.tensor([0.5, 1.5, 2.0]),
        "ignore_index": 1,
        "label_smoothing": 0.3,
        "z_loss": 0.2,
        "logit_scale": 1.7,
        "softcap": 2.0,
        "reduction": "none",
    },
}
CELLS = [("index", name) for name in OPTIONS]
CELLS += [("distribution", "none"), ("distribution", "every one"), ("sparse", "every one")]
KINDS = ["index", "distribution", "sparse"]


@pytest.fixture(autouse=True)
def alone(one_torch_thread):
    """Let no test see another's graphs."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Head:
    """Operands, target and options."""

    def __init__(self, kind="index", name="none", rows=N, dtype=torch.float32):
        self.operands = [
            torch.randn(s).to(dtype).requires_grad_() for s in ((rows, D), (V, D), (V,))
        ]
        self.options = dict(OPTIONS[name])
        self.target = torch.arange(rows) % V
        if kind == "distribution":
            self.target = torch.rand(rows, V)
        elif kind == "sparse":
            self.target = torch.randint(V, (rows, 2))
            self.options["target_prob"] = torch.rand(rows, 2)

    def loss(self, function=linear_cross_entropy, **more):
        x, w, b = self.operands
        return function(x, w, self.target, linear_bias=b, **self.options | more)

    def with_gradients(self, function=linear_cross_entropy):
        loss = self.loss(function)
        grads = torch.autograd.grad(loss, self.operands, torch.full_like(loss, 0.3))
        return loss.detach(), *grads

    def of_operator(self):
        """Return what follows the operands in every operator of linear_ops.py."""
        defaults = {"weight": None, "sample_weight": None, "target_prob": None}
        defaults |= {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0}
        defaults |= {"logit_scale": 1.0, "softcap": None, "reduction": "mean", "divisor": None}
        return [self.target, *(defaults | self.options).values()]


def compiled(function=linear_cross_entropy, **more):
    return torch.compile(function, fullgraph=True, backend="aot_eager", **more)


def assert_same_bits(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


# torch.compile ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), CELLS)
def test_a_compiled_call(kind, name):
    head = Head(kind, name)
    assert_same_bits(head.with_gradients(compiled(dynamic=True)), head.with_gradients())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_compiled_call_in_every_dtype(dtype):
    head = Head(dtype=dtype)
    assert_same_bits(head.with_gradients(compiled()), head.with_gradients())


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_compiled_call_with_something_frozen(frozen):
    head = Head()
    head.operands[frozen] = head.operands[frozen].detach()
    found = []
    for function in (compiled(), linear_cross_entropy):
        loss = head.loss(function)
        wanted = [x for x in head.operands if x.requires_grad]
        found.append((loss.detach(), *torch.autograd.grad(loss, wanted)))
    assert_same_bits(*found)


def test_one_graph_for_any_number_of_rows():
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(linear_cross_entropy, fullgraph=True, backend=counter, dynamic=True)
    Head().loss(function)
    once = counter.frame_count
    for rows in (7, 20):
        head = Head(rows=rows)
        assert_same_bits(head.with_gradients(function), head.with_gradients())
    assert counter.frame_count == once


def test_compiled_gradients_of_targets_and_weights():
    """Plain operations, traced and replayed one by one."""
    head = Head("distribution")
    head.options["sample_weight"] = torch.rand(N, requires_grad=True)
    head.operands += [head.target.requires_grad_(), head.options["sample_weight"]]

    def loss(function):
        x, w, b, *_ = head.operands
        return function(x, w, head.target, linear_bias=b, **head.options)

    found = torch.autograd.grad(loss(compiled()), head.operands)
    assert_same_bits(found, torch.autograd.grad(loss(linear_cross_entropy), head.operands))


def test_compiled_statistics():
    head = Head()
    x, w, b = head.operands
    want = linear_cross_entropy_stats(x, w, head.target, linear_bias=b)
    found = compiled(linear_cross_entropy_stats)(x, w, head.target, linear_bias=b)
    for got, expected in zip(found, want, strict=True):
        # Some twenty operations on numbers below 8, none off by more than an ulp.
        torch.testing.assert_close(got, expected, rtol=0, atol=20 * 8 * U32)


@pytest.mark.parametrize("out_features", [(), (2,)])
def test_a_compiled_module(out_features):
    module = LinearCrossEntropyLoss(D, V, bias=True, out_features=out_features, weight=WEIGHT)
    x, y = torch.randn(N, D, requires_grad=True), torch.randint(V, (N, *out_features))
    found = []
    for function in (compiled(module), module):
        loss = function(x, y)
        found.append((loss.detach(), *torch.autograd.grad(loss, [x, *module.parameters()])))
    assert_same_bits(*found)


def test_torch_func_in_a_compiled_graph():
    head = Head()
    x, w, b = (x.detach() for x in head.operands)
    slope = torch.func.grad(
        lambda x, w: linear_cross_entropy(x, w, head.target, linear_bias=b), argnums=(0, 1)
    )
    assert_same_bits(compiled(slope)(x, w), slope(x, w))


@pytest.mark.parametrize("value", [V, -1])
def test_a_target_out_of_range_raises_in_a_compiled_graph(value):
    head, function = Head(), compiled()
    head.loss(function)
    head.target[1] = value
    with pytest.raises(IndexError, match=rf"target\[1\] is {value}, but there are 5 classes"):
        head.loss(function)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_in_a_compiled_graph(dtype):
    head = Head()
    with torch.autocast("cpu", dtype):
        want, found = head.with_gradients(), head.with_gradients(compiled())
    assert_same_bits(found, want)


@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="Inductor needs a C++ compiler"
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_inductor():
    head = Head(name="every one")
    function = torch.compile(linear_cross_entropy, fullgraph=True)
    assert_same_bits(head.with_gradients(function), head.with_gradients())


# torch.export and tracing -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "every one"])
def test_export(name):
    class Training(torch.nn.Module):
        def forward(self, x, w, target, b):
            return linear_cross_entropy(x, w, target, linear_bias=b, **OPTIONS[name])

    head = Head(name=name)
    x, w, b = head.operands
    fixed = "sample_weight" in head.options
    rows = torch.export.Dim.STATIC if fixed else torch.export.Dim("rows", min=2)
    program = torch.export.export(
        Training(), (x, w, head.target, b), dynamic_shapes=({0: rows}, {}, {0: rows}, {})
    )
    assert "crossent.linear_cross_entropy.default" in str(program.graph)
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    module = torch.export.load(stored).module()
    for count in (N,) if fixed else (N, 8):
        head = Head(name=name, rows=count)
        want = head.with_gradients()
        got = head.with_gradients(lambda x, w, y, *, linear_bias, **_: module(x, w, y, linear_bias))
        assert_same_bits(got, want)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode):
    head = Head()
    x, w, b = (x.detach() for x in head.operands)

    def loss(x, w, b, y):
        return linear_cross_entropy(x, w, y, linear_bias=b)

    slope = torch.func.grad(loss, argnums=(0, 1, 2))
    graph = make_fx(loss, tracing_mode=mode)(x, w, b, head.target)
    slopes = make_fx(slope, tracing_mode=mode)(x, w, b, head.target)
    x, y = 2 * x, torch.tensor([2, -100, 4])
    # In a transform the loss is made of the same plain operations as in a trace.
    assert_same_bits([graph(x, w, b, y)], [torch.func.vjp(lambda x: loss(x, w, b, y), x)[0]])
    assert_same_bits(slopes(x, w, b, y), slope(x, w, b, y))


# Without numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("where", ["fake", "meta"])
def test_shapes_and_dtypes_without_numbers(where, dtype, reduction, kind):
    def made():
        head = Head(kind, dtype=dtype)
        head.options |= {"reduction": reduction, "z_loss": 0.1}
        return head

    want = made().with_gradients()
    if where == "fake":
        with FakeTensorMode():
            got = made().with_gradients()
    else:
        head = made()
        head.operands = [x.detach().to("meta").requires_grad_() for x in head.operands]
        head.target = head.target.to("meta")
        head.options = {
            k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in head.options.items()
        }
        got = head.with_gradients()
    for a, b in zip(got, want, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)


# The operators themselves -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "dtype", "bias"),
    [
        ("index", "none", torch.float64, True),
        ("distribution", "none", torch.float32, False),
        ("sparse", "every one", torch.bfloat16, True),
    ],
)
def test_opcheck(kind, name, dtype, bias):
    head, served = Head(kind, name, dtype=dtype), torch.ops.crossent
    x, w, b = head.operands
    b = b if bias else None
    rest = head.of_operator()
    torch.library.opcheck(served.linear_cross_entropy.default, (x, w, b, *rest))
    upstream = torch.rand_like(served.linear_cross_entropy.default(x, w, b, *rest))
    upstream.requires_grad_()
    x = x.detach().mT.contiguous().mT.requires_grad_()
    given = (x, w, b, upstream, *rest, not bias, True, bias)
    torch.library.opcheck(served.linear_cross_entropy_grad.default, given)
    x, w, b, upstream = (t if t is None else t.detach() for t in (x, w, b, upstream))
    given = (x, w, b, upstream, torch.rand_like(x), None, b, *rest, True, True, bias, True)
    torch.library.opcheck(served.linear_cross_entropy_hvp.default, given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["none", "every one"])
def test_the_operators_on_other_devices_mean_the_same(kind, name):
    """Called as they are there; here on the CPU, whose own they must equal to rounding."""
    head = Head(kind, name, dtype=torch.float64)
    operands = [x.detach() for x in head.operands]
    rest = head.of_operator()
    rows = (N,) if "reduction" in head.options else ()
    upstream = torch.rand(rows).double()
    along = [torch.rand_like(x) for x in operands]
    for operator, elsewhere, given, wanted in (
        ("linear_cross_entropy", linear_ops._loss_elsewhere, (), ()),
        ("linear_cross_entropy_grad", linear_ops._grad_elsewhere, (upstream,), (True,) * 3),
        (
            "linear_cross_entropy_hvp",
            linear_ops._hvp_elsewhere,
            (upstream, *along),
            (True,) * 4,
        ),
    ):
        want = getattr(torch.ops.crossent, operator).default(*operands, *given, *rest, *wanted)
        got = elsewhere(*operands, *given, *rest, *wanted)
        for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
            # Some 120 ulp (a softcap of 2 among them) of terms that are at most 256.
            assert a.shape == b.shape
            assert ((a - b).abs() <= 124 * 256 * U64).all()


@pytest.mark.parametrize("frozen", [None, 0, 1, 2])
@pytest.mark.parametrize("name", ["none", "every one"])
def test_the_operators_double_backward(name, frozen):
    head, found = Head(name=name, dtype=torch.float64), []
    if frozen is not None:
        head.operands[frozen] = head.operands[frozen].detach()
    wanted = [x for x in head.operands if x.requires_grad]
    upstream = torch.rand(N if "reduction" in head.options else ()).double().requires_grad_()
    for loss in (
        torch.ops.crossent.linear_cross_entropy.default(*head.operands, *head.of_operator()),
        head.loss(),
    ):
        grads = torch.autograd.grad(loss, wanted, upstream, create_graph=True)
        whole = sum(g.square().sum() for g in grads)
        found.append(torch.autograd.grad(whole, [*wanted, upstream]))
    assert_same_bits(*found)


def test_the_operators_say_what_they_do_not_do():
    head, operator = Head("distribution"), torch.ops.crossent.linear_cross_entropy.default
    head.target.requires_grad_()
    with pytest.raises(NotImplementedError, match="has gradients in input, linear_weight and"):
        operator(*head.operands, *head.of_operator()).backward()
    head.target = head.target.detach()
    loss = operator(*head.operands, *head.of_operator())
    (grad,) = torch.autograd.grad(loss, head.operands[0], create_graph=True)
    (curve,) = torch.autograd.grad(grad.square().sum(), head.operands[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="no third derivative"):
        curve.sum().backward()
