"""Derivatives of every order, for every option and target, by PyTorch's own checks."""

import math

import pytest

pytest.importorskip("torch")
import torch
from torch.autograd import gradcheck, gradgradcheck

from crossent.torch import cross_entropy, cross_entropy_stats

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    # PyTorch's own, as it first enters forward mode
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

V = 3
LAYOUTS = {"(C,)": (V,), "(N,C)": (2, V), "(N,C,d1)": (2, V, 2)}
OPTIONS = {
    "none": {},
    "weight": {"weight": torch.tensor([0.5, -1.0, 2.0]).double()},
    "sample_weight": {"sample_weight": [0.5, -1.5, 2.0, 0.7]},
    "a dropped row": {"sample_weight": [0.5, 0.0, 2.0, 0.7]},
    "ignore_index": {"ignore_index": 1},
    "label_smoothing": {"label_smoothing": 0.3},
    "z_loss": {"z_loss": 0.2},
    "logit_scale": {"logit_scale": 1.7},
    "softcap": {"softcap": 2.0},
    "sum": {"reduction": "sum"},
    "rows": {"reduction": "none"},
    "divisor": {"divisor": 2.5},
    "every one": {
        "weight": torch.tensor([0.5, 1.0, 2.0]).double(),
        "sample_weight": [0.5, 1.5, 2.0, 0.7],
        "ignore_index": 1,
        "label_smoothing": 0.3,
        "z_loss": 0.2,
        "logit_scale": 1.7,
        "softcap": 2.0,
        "reduction": "none",
    },
}
KINDS = ["index", "distribution", "sparse"]
CELLS = [
    (kind, layout, name)
    for kind in KINDS
    for layout in LAYOUTS
    for name in OPTIONS
    if layout == "(N,C)" or name in ("none", "every one")
]
BATCHED = {"check_batched_grad": True}


def example(kind, layout="(N,C)", name="none", seed=0):
    """Return logits, a target, its probabilities if sparse, and options, rows by rows."""
    random = torch.Generator().manual_seed(seed)
    shape = LAYOUTS[layout]
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    input = torch.randn(shape, generator=random, dtype=torch.float64)
    options = dict(OPTIONS[name])
    count = math.prod(rows)
    if "sample_weight" in options:
        weights = torch.tensor(options["sample_weight"], dtype=torch.float64)
        options["sample_weight"] = weights[:count].reshape(rows)
    prob = None
    if kind == "index":
        target = torch.arange(count).reshape(rows) % V
    elif kind == "distribution":
        target = torch.rand(shape, generator=random, dtype=torch.float64)
        options.pop("ignore_index", None)
    else:
        axis = min(1, len(shape) - 1)
        wide = (*shape[:axis], 2, *shape[axis + 1 :])
        target = torch.randint(V, wide, generator=random)
        prob = torch.rand(wide, generator=random, dtype=torch.float64)
    return input, target, prob, options


@pytest.mark.parametrize(("kind", "layout", "name"), CELLS)
def test_derivatives_in_the_logits(kind, layout, name):
    input, target, prob, options = example(kind, layout, name)

    def loss(v):
        return cross_entropy(v, target, target_prob=prob, **options)

    input.requires_grad_()
    assert gradcheck(loss, input, check_forward_ad=True, check_batched_forward_grad=True, **BATCHED)
    assert gradgradcheck(loss, input, check_fwd_over_rev=True, check_rev_over_rev=True, **BATCHED)


# At weight 0, where a row is dropped, the loss has no derivative in the weight.
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "a dropped row"])
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_in_all_that_has_one(kind, name):
    input, target, prob, options = example(kind, "(N,C)", name)
    weights = options.pop("sample_weight", torch.tensor([0.5, 1.5]).double())

    def loss(v, s, t=None):
        given = {"index": (target, None), "distribution": (t, None), "sparse": (target, t)}[kind]
        return cross_entropy(v, given[0], target_prob=given[1], sample_weight=s, **options)

    given = [input, weights, target if kind == "distribution" else prob]
    if kind == "index":
        given.pop()
    for x in given:
        x.requires_grad_()
    assert gradcheck(loss, given, check_forward_ad=True, check_batched_forward_grad=True, **BATCHED)
    assert gradgradcheck(loss, given, check_fwd_over_rev=True, **BATCHED)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_derivatives_along_any_axis(dim):
    input = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    rows = [n for i, n in enumerate(input.shape) if i != dim % 3]
    target = torch.ones(rows, dtype=torch.int64)
    assert gradcheck(lambda v: cross_entropy(v, target, dim=dim, z_loss=0.1), input)
    assert gradgradcheck(lambda v: cross_entropy(v, target, dim=dim, z_loss=0.1), input)


@pytest.mark.parametrize("name", ["none", "every one"])
@pytest.mark.parametrize("kind", KINDS)
def test_third_derivative(kind, name):
    input, target, prob, options = example(kind, "(N,C)", name)
    direction = torch.linspace(-1, 1, input.numel(), dtype=torch.float64).reshape(input.shape)

    def curvature(v):
        loss = cross_entropy(v, target, target_prob=prob, **options).sum()
        (grad,) = torch.autograd.grad(loss, v, create_graph=True)
        return torch.autograd.grad((grad * direction).sum(), v, create_graph=True)[0]

    input.requires_grad_()
    assert gradcheck(curvature, input)


@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.7}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("with_target", [True, False])
def test_derivatives_of_the_statistics(with_target, options):
    input, target, _, _ = example("index")
    target = target if with_target else None

    def numbers(v):
        found = cross_entropy_stats(v, target, **options)
        return tuple(
            x for x in (found.logsumexp, found.target_logprob, found.entropy) if x is not None
        )

    input.requires_grad_()
    assert gradcheck(numbers, input, check_forward_ad=True, **BATCHED)
    assert gradgradcheck(numbers, input, **BATCHED)


def test_a_dropped_row_of_the_statistics_has_gradient_0():
    input = torch.randn(3, V, dtype=torch.float64, requires_grad=True)
    found = cross_entropy_stats(input, torch.tensor([0, -100, 1]))
    (found.logsumexp + found.target_logprob + found.entropy)[::2].sum().backward()
    assert not input.grad[1].any()
    assert input.grad[::2].all()
    assert not found.argmax.requires_grad
    assert not found.target_rank.requires_grad


@pytest.mark.parametrize("name", ["weight", "divisor", "logit_scale", "z_loss", "softcap"])
def test_what_would_get_no_gradient_is_refused(name):
    input, target, _, _ = example("index")
    value = torch.ones(V if name == "weight" else ()).double()
    expected = cross_entropy(input, target, **{name: value})
    value.requires_grad_()
    with pytest.raises(ValueError, match=f"^cross_entropy: {name} requires a gradient, but"):
        cross_entropy(input, target, **{name: value})
    with torch.no_grad():
        assert cross_entropy(input, target, **{name: value}) == expected
