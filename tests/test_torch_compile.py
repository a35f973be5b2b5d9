"""Compiled, exported and traced graphs give the numbers of eager calls, bit for bit."""

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

from crossent.torch import CrossEntropyLoss, cross_entropy, cross_entropy_stats, ops

N, V = 3, 5
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.3, -1.0])
OPTIONS = {
    "none": {},
    "weight": {"weight": WEIGHT},
    "sample_weight": {"sample_weight": torch.tensor([0.5, 0.0, 2.0])},
    "ignore_index": {"ignore_index": 1},
    "label_smoothing": {"label_smoothing": 0.3},
    "z_loss": {"z_loss": 0.2},
    "logit_scale": {"logit_scale": 1.7},
    "softcap": {"softcap": 2.0},
    "sum": {"reduction": "sum"},
    "rows": {"reduction": "none"},
    "divisor": {"divisor": 2.5},
    "dim": {"dim": -1},
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
CELLS += [(kind, name) for kind in ("distribution", "sparse") for name in ("none", "every one")]


@pytest.fixture(autouse=True)
def alone(one_torch_thread):
    """Let no test see another's graphs."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def example(kind="index", rows=N, **options):
    input = torch.randn(rows, V, requires_grad=True)
    if kind == "index":
        return input, torch.arange(rows) % V, options
    if kind == "distribution":
        return input, torch.rand(rows, V), options
    return input, torch.randint(V, (rows, 2)), {"target_prob": torch.rand(rows, 2)} | options


def with_gradient(function, input, *args, **options):
    loss = function(input, *args, **options)
    (grad,) = torch.autograd.grad(loss, input, torch.full_like(loss, 0.3))
    return loss.detach(), grad


def assert_same_bits(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


# torch.compile ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), CELLS)
def test_a_compiled_call(kind, name):
    input, target, options = example(kind, **OPTIONS[name])
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    want = with_gradient(cross_entropy, input, target, **options)
    assert_same_bits(with_gradient(compiled, input, target, **options), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_compiled_call_in_every_dtype(dtype):
    input, target, _ = example()
    input = input.detach().to(dtype).requires_grad_()
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    want = with_gradient(cross_entropy, input, target)
    assert_same_bits(with_gradient(compiled, input, target), want)


def test_one_graph_for_any_number_of_rows():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(cross_entropy, fullgraph=True, backend=counter, dynamic=True)
    compiled(*example()[:2])
    once = counter.frame_count  # one, and one more where Dynamo starts again to fix the floats
    for rows in (7, 20):
        input, target, _ = example(rows=rows)
        want = with_gradient(cross_entropy, input, target)
        assert_same_bits(with_gradient(compiled, input, target), want)
    assert counter.frame_count == once


@pytest.mark.parametrize("kind", ["distribution", "sparse"])
def test_compiled_gradients_of_targets_and_weights(kind):
    """Plain operations, traced and replayed one by one."""
    input, target, options = example(kind)
    options["sample_weight"] = torch.rand(N, requires_grad=True)
    wanted = [input, options["sample_weight"]]
    wanted.append(target if kind == "distribution" else options["target_prob"])
    wanted[-1].requires_grad_()
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(input, target, **options), wanted)
    want = torch.autograd.grad(cross_entropy(input, target, **options), wanted)
    assert_same_bits(found, want)


def test_compiled_statistics():
    input, target, _ = example()
    compiled = torch.compile(cross_entropy_stats, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(input, target), cross_entropy_stats(input, target), strict=True):
        # A dozen operations on numbers below 8, none off by more than an ulp.
        torch.testing.assert_close(got, want, rtol=0, atol=12 * 8 * 2.0**-23)


def test_a_compiled_module_in_a_model():
    input, target, _ = example()
    model = torch.nn.Linear(V, V)
    criterion = CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1)

    def step(x):
        return criterion(model(x), target)

    want = with_gradient(step, input)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same_bits(with_gradient(compiled, input), want)


def test_torch_func_in_a_compiled_graph():
    input, target, _ = example()
    slope = torch.func.grad(lambda v: cross_entropy(v, target, z_loss=0.1))
    compiled = torch.compile(slope, fullgraph=True, backend="aot_eager")
    assert_same_bits([compiled(input.detach())], [slope(input.detach())])
    each = torch.func.vmap(torch.func.grad(cross_entropy), in_dims=(None, 0))
    targets = torch.stack([target, (target + 1) % V])
    compiled = torch.compile(each, fullgraph=True, backend="aot_eager")
    assert_same_bits([compiled(input.detach(), targets)], [each(input.detach(), targets)])


@pytest.mark.parametrize("value", [V, -1])
def test_a_target_out_of_range_raises_in_a_compiled_graph(value):
    input, target, _ = example()
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    compiled(input, target)
    target[1] = value
    with pytest.raises(IndexError, match=rf"target\[1\] is {value}, but there are 5 classes"):
        compiled(input, target)


@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="Inductor needs a C++ compiler"
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["none", "every one"])
def test_inductor(name):
    input, target, options = example(**OPTIONS[name])
    want = with_gradient(cross_entropy, input, target, **options)
    compiled = torch.compile(cross_entropy, fullgraph=True)
    assert_same_bits(with_gradient(compiled, input, target, **options), want)


# torch.export and tracing -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "every one"])
def test_export(name):
    class Training(torch.nn.Module):
        def forward(self, input, target):
            return cross_entropy(input, target, **OPTIONS[name])

    input, target, options = example(**OPTIONS[name])
    rows = None if "sample_weight" in options else torch.export.Dim("rows", min=2)
    program = torch.export.export(
        Training(), (input, target), dynamic_shapes=({0: rows}, {0: rows})
    )
    assert "crossent.cross_entropy.default" in str(program.graph)
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    module = torch.export.load(stored).module()
    for count in (N,) if rows is None else (N, 8):
        input, target, options = example(rows=count, **OPTIONS[name])
        want = with_gradient(cross_entropy, input, target, **options)
        assert_same_bits(with_gradient(module, input, target), want)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # shapes are compared
def test_a_trace_keeps_no_numbers():
    """No target, divisor or loss of the traced call may stand in the graph as a constant."""
    input, target, _ = example()
    target[1] = -100
    traced = torch.jit.trace(lambda v, y: cross_entropy(v, y), (input, target))
    input, target, _ = example(rows=N)
    target[[0, 2]] = torch.tensor([4, 4])
    got, want = (with_gradient(f, input, target) for f in (traced, cross_entropy))
    for a, b in zip(got, want, strict=True):
        # Forty operations on numbers below 8, none off by more than an ulp.
        torch.testing.assert_close(a, b, rtol=0, atol=40 * 8 * 2.0**-23)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode):
    input, target, _ = example()
    input = input.detach()

    def loss(v, y):
        return cross_entropy(v, y)

    slope = torch.func.grad(loss)
    graph = make_fx(loss, tracing_mode=mode)(input, target)
    slopes = make_fx(slope, tracing_mode=mode)(input, target)
    input, target = 2 * input, torch.tensor([2, -100, 4])
    # In a transform the loss is made of the same plain operations as in a trace.
    want, _ = torch.func.vjp(lambda v: cross_entropy(v, target), input)
    assert_same_bits([graph(input, target)], [want])
    assert_same_bits([slopes(input, target)], [slope(input, target)])


# Without numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["index", "distribution", "sparse"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["fake", "meta"])
def test_shapes_and_dtypes_without_numbers(where, dtype, reduction, kind):
    def given():
        input, target, options = example(kind, reduction=reduction, z_loss=0.1)
        return input.detach().to(dtype).requires_grad_(), target, options

    input, target, options = given()
    want = with_gradient(cross_entropy, input, target, **options)
    if where == "fake":
        with FakeTensorMode():
            input, target, options = given()
            got = with_gradient(cross_entropy, input, target, **options)
    else:
        input, target, *_ = (x.detach().to("meta") for x in (input, target))
        moved = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        got = with_gradient(cross_entropy, input.requires_grad_(), target, **moved)
    for a, b in zip(got, want, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)


# The operators themselves -------------------------------------------------------------------------


def operands(kind, name, dtype, layout):
    """Return input, target and what follows them in every operator of ops.py."""
    input, target, options = example(kind, **OPTIONS[name])
    input = input.detach().to(dtype)
    if layout == "transposed":
        input = input.t().contiguous().t()
    input.requires_grad_()
    rest = [options.get(key) for key in ("weight", "sample_weight", "target_prob")]
    defaults = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0, "logit_scale": 1.0}
    defaults |= {"softcap": None, "reduction": "mean", "divisor": None}
    rest += [options.get(key, value) for key, value in defaults.items()]
    return input, target, [*rest, 1]


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("kind", "name"), [("index", "none"), ("sparse", "every one")])
def test_opcheck(kind, name, dtype, layout):
    input, target, rest = operands(kind, name, dtype, layout)
    served = torch.ops.crossent
    torch.library.opcheck(served.cross_entropy.default, (input, target, *rest))
    loss = served.cross_entropy.default(input, target, *rest)
    upstream = torch.rand_like(loss).requires_grad_()
    torch.library.opcheck(served.cross_entropy_grad.default, (input, upstream, target, *rest))
    vector = torch.rand(input.shape).to(dtype)
    given = (input.detach(), upstream.detach(), vector, target, *rest)
    torch.library.opcheck(served.cross_entropy_hvp.default, given)


@pytest.mark.parametrize("kind", ["index", "distribution", "sparse"])
@pytest.mark.parametrize("name", ["none", "every one"])
def test_the_operators_on_other_devices_mean_the_same(kind, name):
    """Called as they are there; here on the CPU, whose own they must equal to rounding."""
    input, target, rest = operands(kind, name, torch.float64, "contiguous")
    input = input.detach()
    rows = () if rest[8] == "mean" else (N,)
    upstream, vector = torch.rand(rows).double(), torch.rand(N, V).double()
    for operator, elsewhere, given in (
        ("cross_entropy", ops._loss_elsewhere, (input, target)),
        ("cross_entropy_grad", ops._grad_elsewhere, (input, upstream, target)),
        ("cross_entropy_hvp", ops._hvp_elsewhere, (input, upstream, vector, target)),
    ):
        want = getattr(torch.ops.crossent, operator).default(*given, *rest)
        got = elsewhere(*given, *rest)
        for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
            # Some 120 ulp (a softcap of 2 among them) of terms that are at most 64.
            assert ((a - b).abs() <= 124 * 64 * 2.0**-52).all()


@pytest.mark.parametrize("name", ["none", "every one"])
def test_the_operators_double_backward(name):
    input, target, rest = operands("index", name, torch.float64, "contiguous")
    options = OPTIONS[name]
    found = []
    for function in (
        lambda v: torch.ops.crossent.cross_entropy.default(v, target, *rest),
        lambda v: cross_entropy(v, target, **options),
    ):
        (grad,) = torch.autograd.grad(function(input).sum(), input, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), input))
    assert_same_bits(*found)


def test_the_operators_say_what_they_do_not_do():
    input, target, rest = operands("distribution", "none", torch.float64, "contiguous")
    loss = torch.ops.crossent.cross_entropy.default(input, target.requires_grad_(), *rest)
    with pytest.raises(NotImplementedError, match="has a gradient in the logits alone"):
        loss.backward()
    loss = torch.ops.crossent.cross_entropy.default(input, target.detach(), *rest)
    (grad,) = torch.autograd.grad(loss, input, create_graph=True)
    (curve,) = torch.autograd.grad(grad.square().sum(), input, create_graph=True)
    with pytest.raises(NotImplementedError, match="no third derivative"):
        curve.sum().backward()
