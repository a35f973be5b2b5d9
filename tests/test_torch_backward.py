"""How the loss behaves in a graph: repeated, changed, scaled, checkpointed, frozen, stored."""

import copy
import io
import pickle

import pytest

pytest.importorskip("torch")
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from crossent.torch import CrossEntropyLoss, cross_entropy, cross_entropy_stats

pytestmark = pytest.mark.usefixtures("one_torch_thread")

N, V = 6, 40
KINDS = ["index", "distribution", "sparse"]
REDUCTIONS = ["mean", "sum", "none"]


def example(kind="index", dtype=torch.float32):
    torch.manual_seed(0)
    input = (3 * torch.randn(N, V)).to(dtype).requires_grad_()
    if kind == "index":
        return input, torch.randint(V, (N,)), {}
    if kind == "distribution":
        return input, torch.rand(N, V).softmax(1), {}
    return input, torch.randint(V, (N, 2)), {"target_prob": torch.rand(N, 2)}


def same_bits(a, b):
    return a.dtype is b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# Backward once more -------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_backward_gives_the_same_bits(kind, reduction):
    input, target, options = example(kind)
    loss = cross_entropy(input, target, reduction=reduction, **options).sum()
    (first,) = torch.autograd.grad(loss, input, retain_graph=True)
    kept = first.clone()
    first.fill_(7)  # what the first caller does with it is nobody else's business
    (second,) = torch.autograd.grad(loss, input, retain_graph=True)
    assert same_bits(second, kept)
    second.fill_(7)
    (third,) = torch.autograd.grad(loss, input, create_graph=True)
    assert same_bits(third.detach(), kept)
    loss.backward()
    assert same_bits(input.grad, kept)


def test_a_gradient_accumulates_and_is_not_written_to():
    input, target, _ = example()
    cross_entropy(input, target).backward()
    once = input.grad.clone()
    cross_entropy(input, target).backward()
    torch.testing.assert_close(input.grad, 2 * once, rtol=0, atol=0)


@pytest.mark.parametrize("changed", ["input", "target", "target_prob", "sample_weight", "weight"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_before_backward_raises_or_does_not_matter(kind, changed):
    """Logits and probabilities are read again, and PyTorch notices; the rest is copied."""
    input, target, options = example(kind)
    if changed == "sample_weight":
        options["sample_weight"] = torch.rand(N)
    if changed == "weight":
        options["weight"] = torch.rand(V)
    given = {"input": input, "target": target, **options}
    if changed not in given:
        return
    for upstream in (1.0, 0.5):
        logits = input.detach().clone().requires_grad_()
        work = logits * 1
        given = {k: v.clone() for k, v in given.items()} | {"input": work}
        loss = cross_entropy(**given)
        (want,) = torch.autograd.grad(loss, logits, torch.tensor(upstream), retain_graph=True)
        with torch.no_grad():
            given[changed].zero_()
        if changed in ("input", "target"):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(loss, logits, torch.tensor(upstream))
        else:
            (got,) = torch.autograd.grad(loss, logits, torch.tensor(upstream))
            assert same_bits(got, want)


# Upstream -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("upstream", [0.0, -1.0, 1.0, 2.0**-20, 3.0, 1e30])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_any_upstream_gradient(kind, reduction, upstream):
    """Row numbers are float64 and rounded once: within 1 ulp of the product, an ulp being 2^-23."""
    input, target, options = example(kind)
    given = {"reduction": reduction, **options}
    (plain,) = torch.autograd.grad(cross_entropy(input, target, **given).sum(), input)
    loss = cross_entropy(input, target, **given)  # whose gradient may be ready, for 1
    (found,) = torch.autograd.grad(loss, input, torch.full_like(loss, upstream))
    assert found.isfinite().all()
    want = plain.double() * upstream
    # Each of the two is within 8 ulp of its size, at most 1, which upstream multiplies.
    assert ((found - want).abs() <= 16 * 2.0**-23 * abs(upstream) + 1e-44).all()
    if upstream == 0:
        assert not found.any()
    if abs(upstream) == 1:
        assert torch.equal(found, plain * upstream)


def test_upstream_gradients_row_by_row():
    input, target, _ = example()
    loss = cross_entropy(input, target, reduction="none")
    upstream = torch.tensor([0.0, -1.0, 1.0, 4.0, -0.25, 0.0])
    (plain,) = torch.autograd.grad(loss.sum(), input, retain_graph=True)
    (found,) = torch.autograd.grad(loss, input, upstream)
    assert torch.equal(found, plain * upstream[:, None])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_expanded_or_strided_upstream_gradient(reduction):
    input, target, _ = example()
    loss = cross_entropy(input, target, reduction=reduction)
    (want,) = torch.autograd.grad(loss, input, torch.full_like(loss, 0.3), retain_graph=True)
    (found,) = torch.autograd.grad(
        loss, input, torch.full((), 0.3).expand(loss.shape), retain_graph=True
    )
    assert same_bits(found, want)
    if reduction == "none":
        wide = torch.full((2 * N,), 0.3)[::2]
        assert same_bits(torch.autograd.grad(loss, input, wide)[0], want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_penalty(kind):
    """∂/∂v of loss + |∂loss/∂v|² is g + 2·H·g: by the kernels as by finite differences of g."""
    input, target, options = example(kind, torch.float64)

    def gradient(v):
        return torch.autograd.grad(cross_entropy(v, target, **options), v)[0]

    loss = cross_entropy(input, target, **options)
    (grad,) = torch.autograd.grad(loss, input, create_graph=True)
    (loss + grad.square().sum()).backward()
    g, h = grad.detach(), 1e-6
    ahead, behind = (gradient((input.detach() + s * h * g).requires_grad_()) for s in (1, -1))
    curve = (ahead - behind) / (2 * h)
    # h² times a third derivative of at most |g|³ ≤ 1, and 8 ulp of a gradient of at most 1 over h.
    assert ((input.grad - g - 2 * curve).abs() <= 2 * (h**2 + 16 * 2.0**-52 / h)).all()


# Saved tensors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_bits(kind, reduction, reentrant):
    input, target, options = example(kind)

    def loss(v):
        return cross_entropy(v * 0.7, target, reduction=reduction, **options).sum()

    (want,) = torch.autograd.grad(loss(input), input)
    checkpoint(loss, input, use_reentrant=reentrant).backward()
    assert same_bits(input.grad, want)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tensors_may_be_packed(kind):
    input, target, options = example(kind)
    (want,) = torch.autograd.grad(cross_entropy(input, target, **options), input)
    packed = []

    def pack(x):
        packed.append(x.numel())
        return io.BytesIO(pickle.dumps(x.detach()))

    with saved_tensors_hooks(pack, pickle.load):
        loss = cross_entropy(input * 1, target, **options)
    (found,) = torch.autograd.grad(loss, input)
    assert same_bits(found, want)
    assert packed.count(N * V) == (2 if kind == "distribution" else 1)
    with save_on_cpu():
        loss = cross_entropy(input, target, **options)
    assert loss.grad_fn.ready is None  # beside what is saved nothing of the logits' size is kept
    assert cross_entropy(input, target, **options).grad_fn.ready is not None
    assert same_bits(torch.autograd.grad(loss, input)[0], want)


# Without a gradient -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_gradient(kind):
    input, target, options = example(kind)
    want = cross_entropy(input, target, **options)
    assert want.requires_grad
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            loss = cross_entropy(input, target, **options)
        assert not loss.requires_grad
        assert torch.equal(loss, want.detach())
    frozen = cross_entropy(input.detach(), target, **options)
    assert not frozen.requires_grad
    assert torch.equal(frozen, want.detach())
    with torch.inference_mode():
        logits = input * 1
        assert torch.equal(cross_entropy(logits, target, **options), want)


@pytest.mark.parametrize("kind", ["distribution", "sparse"])
def test_a_target_with_a_gradient_over_frozen_logits(kind):
    input, target, options = example(kind)
    given = {"target": target, **options}
    name = "target" if kind == "distribution" else "target_prob"
    given[name].requires_grad_()
    cross_entropy(input.detach(), **given).backward()
    # log p, weighted: every entry of a mean's gradient is (lse − z)/N > 0.
    assert (given[name].grad > 0).all()
    assert input.grad is None


# Modules ------------------------------------------------------------------------------------------


OPTIONS = {
    "weight": torch.linspace(0.5, 2, V),
    "ignore_index": 3,
    "reduction": "sum",
    "label_smoothing": 0.1,
    "z_loss": 1e-3,
    "logit_scale": 0.7,
    "softcap": 9.0,
    "dim": -1,
}


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_a_module_may_be_copied_and_pickled(copied):
    input, target, _ = example()
    criterion = CrossEntropyLoss(**OPTIONS)
    again = copied(criterion)
    assert repr(again) == repr(criterion)
    assert torch.equal(again(input, target), criterion(input, target))
    assert torch.equal(criterion(input, target), cross_entropy(input, target, **OPTIONS))


def test_a_module_s_class_axis():
    input, target, _ = example()
    found = CrossEntropyLoss(dim=0)(input.T, target)
    assert torch.equal(found, cross_entropy(input, target))


def test_the_state_is_pytorch_s():
    theirs = torch.nn.CrossEntropyLoss(weight=torch.rand(V))
    criterion = CrossEntropyLoss(weight=torch.ones(V))
    criterion.load_state_dict(theirs.state_dict())
    assert torch.equal(criterion.weight, theirs.weight)
    theirs.load_state_dict(criterion.state_dict())
    assert not CrossEntropyLoss().state_dict()
    assert isinstance(criterion, torch.nn.CrossEntropyLoss)
    assert criterion.double().weight.dtype is torch.float64


def test_a_module_pickled_as_pytorch_s_opens_as_ours():
    state = torch.nn.CrossEntropyLoss(ignore_index=2).__getstate__()
    criterion = CrossEntropyLoss.__new__(CrossEntropyLoss)
    criterion.__setstate__(state)
    input, target, _ = example()
    assert torch.equal(criterion(input, target), cross_entropy(input, target, ignore_index=2))


def test_statistics_are_saved_and_checkpointed_likewise():
    input, target, _ = example()

    def entropy(v):
        return cross_entropy_stats(v, target).entropy.sum()

    (want,) = torch.autograd.grad(entropy(input), input)
    checkpoint(entropy, input, use_reentrant=False).backward()
    assert same_bits(input.grad, want)
    loss = entropy(work := input * 1)
    with torch.no_grad():
        work.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
