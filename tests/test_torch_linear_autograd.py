"""Derivatives of the fused head, of every order, by PyTorch's checks and against plain operations.

Tolerance of comparisons in float64: a result adds up at most N·V·D products, of factors below 4
each, and every one of some forty operations is off by no more than an ulp of its result, as in
test_torch_linear.py.
"""

import pytest

pytest.importorskip("torch")
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional

from crossent.torch import (
    LinearCrossEntropyLoss,
    linear_cross_entropy,
    linear_cross_entropy_stats,
)

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    # PyTorch's own, as it first enters forward mode
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

N, D, V = 3, 2, 3
ROOM = 200 * 16 * 2.0**-52
WEIGHT = torch.tensor([0.5, 1.0, 2.0]).double()
SAMPLES = torch.tensor([0.5, 1.5, 0.7]).double()
EVERY_ONE = {
    "weight": WEIGHT,
    "sample_weight": SAMPLES,
    "ignore_index": 1,
    "label_smoothing": 0.3,
    "z_loss": 0.2,
    "logit_scale": 1.7,
    "softcap": 2.0,
}
OPTIONS = {
    "none": {},
    "weight": {"weight": torch.tensor([0.5, -1.0, 2.0]).double()},
    "sample_weight": {"sample_weight": torch.tensor([0.5, -1.5, 2.0]).double()},
    "a dropped row": {"sample_weight": torch.tensor([0.5, 0.0, 2.0]).double()},
    "ignore_index": {"ignore_index": 1},
    "label_smoothing": {"label_smoothing": 0.3},
    "z_loss": {"z_loss": 0.2},
    "logit_scale": {"logit_scale": 1.7},
    "softcap": {"softcap": 2.0},
    "sum": {"reduction": "sum"},
    "rows": {"reduction": "none"},
    "divisor": {"divisor": 2.5},
    "every one": EVERY_ONE,
    "every one, rows": EVERY_ONE | {"reduction": "none"},
}
KINDS = ["index", "distribution", "sparse"]
cells = pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in KINDS for name in OPTIONS]
)
some_cells = pytest.mark.parametrize(
    ("kind", "name"), [(k, name) for k in KINDS for name in ("none", "every one, rows")]
)


class Head:
    """Operands, target and options."""

    def __init__(self, kind="index", name="none", seed=0):
        random = torch.Generator().manual_seed(seed)
        x, w, b = (
            torch.randn(s, generator=random, dtype=torch.float64) for s in ((N, D), (V, D), (V,))
        )
        self.operands = x, w, b
        self.directions = tuple(
            torch.randn(o.shape, generator=random, dtype=torch.float64) for o in self.operands
        )
        self.options = dict(OPTIONS[name])
        self.target = torch.arange(N) % V
        if kind == "distribution":
            self.target = torch.rand(N, V, generator=random, dtype=torch.float64)
        elif kind == "sparse":
            self.target = torch.tensor([[2, 0], [1, 1], [0, 1]])
            self.options["target_prob"] = torch.rand(N, 2, generator=random, dtype=torch.float64)

    def requires(self):
        for x in self.operands:
            x.requires_grad_()
        return self

    def loss(self, x, w, b, **more):
        given = {"target": self.target, "linear_bias": b} | self.options | more
        return linear_cross_entropy(x, w, **given)

    def plain(self, x, w, b, **more):
        return plain(functional.linear(x, w, b), **{"target": self.target} | self.options | more)


def plain(
    logits,
    target,
    weight=None,
    sample_weight=None,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    logit_scale=1.0,
    softcap=None,
    reduction="mean",
    divisor=None,
    target_prob=None,
):
    """Return the loss by PyTorch's `log_softmax`, or by its `cross_entropy` where that has it."""
    theirs = sample_weight is None and target_prob is None and divisor is None
    theirs = theirs and (ignore_index < 0 or not target.is_floating_point())
    if theirs and z_loss == 0 and logit_scale == 1 and softcap is None:
        return functional.cross_entropy(
            logits, target, weight, None, ignore_index, None, reduction, label_smoothing
        )
    z = logits * logit_scale
    z = z if softcap is None else softcap * (z / softcap).tanh()
    w = torch.ones(V).double() if weight is None else weight
    s = torch.ones(N).double() if sample_weight is None else sample_weight
    counts = s
    if target_prob is not None:
        there = target != ignore_index
        prob = torch.where(there, target_prob, 0.0)
        q = torch.zeros_like(z).scatter_add(1, target * there, prob)
        s = s * there.any(dim=1)
        counts = s
    elif target.is_floating_point():
        q = target
    else:
        s = s * (target != ignore_index)
        q, counts = functional.one_hot(target, V).double(), s * w[target]
    q = w * ((1 - label_smoothing) * q + label_smoothing / V)
    each = -(q * z.log_softmax(1)).sum(1) + z_loss * q.sum(1) * z.logsumexp(1) ** 2
    if reduction == "none":
        return s * each
    total = (s * each).sum()
    if reduction == "sum":
        return total
    return total / (counts.sum() if divisor is None else divisor)


def close(got, want, size=1.0):
    assert got.shape == want.shape
    assert got.dtype is want.dtype
    assert ((got - want).abs() <= ROOM * size).all()


# PyTorch's checks ---------------------------------------------------------------------------------


@cells
def test_first_derivatives(kind, name):
    head = Head(kind, name).requires()
    assert gradcheck(head.loss, head.operands)


@some_cells
def test_second_derivatives_forward_and_batched(kind, name):
    head = Head(kind, name).requires()
    batched = {"check_batched_grad": True}
    assert gradcheck(
        head.loss, head.operands, check_forward_ad=True, check_batched_forward_grad=True, **batched
    )
    assert gradgradcheck(head.loss, head.operands, check_fwd_over_rev=True, **batched)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("name", ["none", "every one, rows"])
def test_derivatives_in_some_of_the_operands(name, wanted):
    head = Head("index", name)

    def loss(*given):
        mixed = list(head.operands)
        for i, x in zip(wanted, given, strict=True):
            mixed[i] = x
        return head.loss(*mixed)

    given = [head.operands[i].requires_grad_() for i in wanted]
    assert gradcheck(loss, given)
    assert gradgradcheck(loss, given)


# At weight 0, where a row is dropped, the loss has no derivative in the weight.
@pytest.mark.parametrize("name", ["none", "divisor", "every one"])
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_in_all_that_has_one(kind, name):
    head = Head(kind, name).requires()
    s = head.options.pop("sample_weight", SAMPLES).clone().requires_grad_()
    given = {"sample_weight": s}
    if kind == "distribution":
        given["target"] = head.target.requires_grad_()
    elif kind == "sparse":
        given["target_prob"] = head.options["target_prob"].requires_grad_()

    def loss(x, w, b, *others):
        return head.loss(x, w, b, **dict(zip(given, others, strict=True)))

    operands = (*head.operands, *given.values())
    assert gradcheck(loss, operands)
    assert gradgradcheck(loss, operands)
    want = torch.autograd.grad(head.plain(*head.operands, **given), operands)
    for found, expected in zip(torch.autograd.grad(loss(*operands), operands), want, strict=True):
        close(found, expected)


@some_cells
def test_third_derivative(kind, name):
    head = Head(kind, name).requires()

    def curvature(*operands, function=head.loss):
        loss = function(*operands).sum()
        grads = torch.autograd.grad(loss, operands, create_graph=True)
        along = sum((g * d).sum() for g, d in zip(grads, head.directions, strict=True))
        return torch.autograd.grad(along, operands, create_graph=True)

    thirds = []
    for function in (head.loss, head.plain):
        curves = curvature(*head.operands, function=function)
        thirds.append([*curves, *torch.autograd.grad(curves, head.operands, head.directions)])
    for found, want in zip(*thirds, strict=True):
        close(found, want, 16)
    assert gradcheck(curvature, head.operands)


@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.7}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("with_target", [True, False])
def test_derivatives_of_the_statistics(with_target, options):
    head = Head().requires()
    target = head.target if with_target else None

    def numbers(x, w, b):
        found = linear_cross_entropy_stats(x, w, target, linear_bias=b, **options)
        return tuple(n for n in found[:3] if n is not None)

    assert gradcheck(numbers, head.operands, check_batched_grad=True)
    assert gradcheck(numbers, head.operands, check_forward_ad=True)
    assert gradgradcheck(numbers, head.operands)


# Second derivatives by the head's own kernels -----------------------------------------------------


@cells
def test_double_backward_mixes_the_operands(kind, name):
    """∂/∂(x, W, b) of each gradient alone, so that a term in common belongs to its own pair."""
    head = Head(kind, name).requires()
    tables = []
    for function in (head.loss, head.plain):
        grads = torch.autograd.grad(
            function(*head.operands).sum(), head.operands, create_graph=True
        )
        tables.append(
            [
                found
                for g, d in zip(grads, head.directions, strict=True)
                for found in torch.autograd.grad(g, head.operands, d, retain_graph=True)
            ]
        )
    for found, expected in zip(*tables, strict=True):
        close(found, expected, 4)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_upstream_gradient_has_a_derivative(kind, reduction):
    """It is Σ ∂loss/∂operands · direction; with and without a derivative in the operands."""
    head = Head(kind).requires()
    head.options["reduction"] = reduction
    loss = head.loss(*head.operands)
    _, want = torch.func.jvp(head.plain, tuple(x.detach() for x in head.operands), head.directions)
    for operands in (head.operands, head.operands[:1]):
        upstream = torch.rand_like(loss).requires_grad_()
        grads = torch.autograd.grad(loss, head.operands, upstream, create_graph=True)
        found, *_ = torch.autograd.grad(grads, (upstream, *operands), head.directions)
        close(found, want, 4)
    # In the upstream gradient alone.
    (found,) = torch.autograd.grad(
        torch.autograd.grad(loss, head.operands, upstream, create_graph=True),
        upstream,
        head.directions,
    )
    close(found, want, 4)


def test_a_gradient_penalty():
    """∂/∂(x, W, b) of loss + |gradients|² and, through it, of what made the features."""
    head = Head(name="every one").requires()
    before = torch.eye(D).double().requires_grad_()
    found = []
    for function in (head.loss, head.plain):
        x, w, b = head.operands
        loss = function((x @ before).tanh(), w, b)
        grads = torch.autograd.grad(loss, (x, w, before), create_graph=True)
        whole = loss + sum(g.square().sum() for g in grads)
        found.append(torch.autograd.grad(whole, (x, w, b, before)))
    for got, want in zip(*found, strict=True):
        close(got, want, 16)


# torch.func ---------------------------------------------------------------------------------------


@cells
def test_grad_vjp_and_jvp(kind, name):
    head = Head(kind, name)
    want, back = vjp(head.plain, *head.operands)
    upstream = torch.linspace(0.5, -1, want.numel()).double().reshape(want.shape)
    loss, ours = vjp(head.loss, *head.operands)
    close(loss, want)
    for got, expected in zip(ours(upstream), back(upstream), strict=True):
        close(got, expected)
    also, along = jvp(head.loss, head.operands, head.directions)
    close(also, want)
    close(along, jvp(head.plain, head.operands, head.directions)[1], 4)
    slopes = [
        grad(lambda *o, f=f: f(*o).sum(), argnums=(0, 1, 2))(*head.operands)
        for f in (head.loss, head.plain)
    ]
    for got, expected in zip(*slopes, strict=True):
        close(got, expected)


@some_cells
def test_jacobians_and_hessians(kind, name):
    head = Head(kind, name)
    every = (0, 1, 2)

    def summed(function):
        return lambda *operands: function(*operands).sum()

    want = jacrev(head.plain, argnums=every)(*head.operands)
    for jacobian in (jacrev, jacfwd):
        found = jacobian(head.loss, argnums=every)(*head.operands)
        for got, expected in zip(found, want, strict=True):
            close(got, expected)
    want = hessian(summed(head.plain), argnums=every)(*head.operands)
    for found in (
        hessian(summed(head.loss), argnums=every)(*head.operands),
        jacrev(jacrev(summed(head.loss), argnums=every), argnums=every)(*head.operands),
    ):
        for ours, theirs in zip(found, want, strict=True):
            for got, expected in zip(ours, theirs, strict=True):
                close(got, expected, 4)


@pytest.mark.parametrize("batched", [(0, None, None), (None, 0, None), (1, 2, 0), (0, None, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_vmap(kind, batched):
    head = Head(kind, "every one")
    heads = [Head(kind, seed=i).operands for i in range(4)]
    given, each = [], [list(head.operands) for _ in heads]
    for i, at in enumerate(batched):
        stacked = torch.stack([h[i] for h in heads])
        given.append(head.operands[i] if at is None else stacked.movedim(0, at))
        for one, h in zip(each, heads, strict=True):
            one[i] = head.operands[i] if at is None else h[i]
    found = vmap(head.loss, in_dims=batched)(*given)
    slopes = vmap(grad(head.loss, argnums=(0, 1, 2)), in_dims=batched)(*given)
    for i, operands in enumerate(each):
        close(found[i], head.plain(*operands))
        want = grad(head.plain, argnums=(0, 1, 2))(*operands)
        for got, expected in zip(slopes, want, strict=True):
            close(got[i], expected)


def test_vmap_over_targets_and_weights():
    head = Head(name="label_smoothing")
    targets = torch.tensor([[0, 1, 2], [1, -100, 0], [2, 2, 2]])
    weights = torch.rand(3, N).double() + 0.5
    found = vmap(lambda y, s: head.loss(*head.operands, target=y, sample_weight=s))(
        targets, weights
    )
    for got, y, s in zip(found, targets, weights, strict=True):
        x = [o.index_select(0, (y >= 0).nonzero()[:, 0]) for o in (head.operands[0], s, y)]
        rows = plain(
            functional.linear(x[0], *head.operands[1:]), x[2], reduction="none", label_smoothing=0.3
        )
        close(got, (rows * x[1]).sum() / x[1].sum())


def test_gradients_of_each_sample_through_the_module():
    module = LinearCrossEntropyLoss(D, V, bias=True, dtype=torch.float64, label_smoothing=0.1)
    parameters = dict(module.named_parameters())
    x, y = Head().operands[0], torch.arange(N) % V

    def loss(parameters, x, y):
        return functional_call(module, parameters, (x[None], y[None]))

    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    for i in range(N):
        want = torch.autograd.grad(module(x[i], y[i]), list(parameters.values()))
        for got, expected in zip(found.values(), want, strict=True):
            close(got[i], expected)


def test_statistics_under_transforms():
    head = Head()
    x, w, b = head.operands

    def entropy(x):
        return linear_cross_entropy_stats(x, w, head.target, linear_bias=b).entropy.sum()

    def peer(x):
        z = functional.linear(x, w, b)
        return -(z.softmax(1) * z.log_softmax(1)).sum()

    close(grad(entropy)(x), grad(peer)(x))
    close(jvp(entropy, (x,), (x,))[1], jvp(peer, (x,), (x,))[1], 4)
    close(vmap(entropy)(x[:, None].expand(N, N, D))[0], linear_entropy(x[0], w, b) * N, N)


def linear_entropy(x, w, b):
    p = functional.linear(x, w, b).softmax(0)
    return -(p * p.log()).sum()


@pytest.mark.parametrize("value", [V, -1, 2**40])
def test_a_target_out_of_range_is_nan_where_nothing_can_raise(value):
    head = Head(name="rows")
    head.target[1] = value
    with pytest.raises(IndexError, match=rf"target\[1\] is {value}, but there are 3 classes"):
        head.loss(*head.operands)
    for found in (
        vjp(head.loss, *head.operands)[0],
        vmap(head.loss)(*(x[None] for x in head.operands))[0],
    ):
        assert found.isnan().tolist() == [False, True, False]
    slope = grad(lambda x: head.loss(x, *head.operands[1:]).sum())(head.operands[0])
    assert slope.isnan().all(dim=1).tolist() == [False, True, False]
