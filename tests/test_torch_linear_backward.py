"""How the fused head behaves in a graph: repeated, changed, checkpointed, frozen, stored."""

import io
import pickle
import threading

import pytest

pytest.importorskip("torch")
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from crossent.head import Head
from crossent.torch import (
    cross_entropy,
    linear_cross_entropy,
    linear_cross_entropy_stats,
    linear_native,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")

N, D, V = 6, 5, 11
U = 2.0**-23
KINDS = ["index", "distribution", "sparse"]
REDUCTIONS = ["mean", "sum", "none"]
NAMES = ["input", "linear_weight", "linear_bias"]


@pytest.fixture(autouse=True)
def expecting_one(monkeypatch):
    """Let no test expect what another's backward got."""
    torch.manual_seed(0)
    monkeypatch.setattr(linear_native, "EXPECTED", linear_native.Expected())


@pytest.fixture
def made(monkeypatch):
    """What every call of the head's gradients wanted of input, weight and bias, and times what."""
    seen, value_and_grad = [], Head.value_and_grad

    def spy(self, upstream, wrt):
        seen.append((upstream, tuple(wrt)))
        return value_and_grad(self, upstream, wrt)

    monkeypatch.setattr(Head, "value_and_grad", spy)
    return seen


def example(kind="index", dtype=torch.float32, wanted=NAMES):
    given = {
        "input": torch.randn(N, D),
        "linear_weight": torch.randn(V, D),
        "linear_bias": torch.randn(V),
    }
    given = {k: x.to(dtype).requires_grad_(k in wanted) for k, x in given.items()}
    if kind == "distribution":
        return given | {"target": torch.rand(N, V).softmax(1)}
    if kind == "sparse":
        return given | {"target": torch.randint(V, (N, 2)), "target_prob": torch.rand(N, 2)}
    return given | {"target": torch.randint(V, (N,))}


def operands(given):
    return [x for k, x in given.items() if k in NAMES and x.requires_grad]


def copies(given):
    """Return the same numbers as leaves of their own."""
    return {k: x.detach().clone().requires_grad_(x.requires_grad) for k, x in given.items()}


def same_bits(got, want):
    return all(
        a.dtype is b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(got, want, strict=True)
    )


# Backward once more -------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_backward_gives_the_same_bits(kind, reduction):
    given = example(kind)
    loss = linear_cross_entropy(**given, reduction=reduction).sum()
    first = torch.autograd.grad(loss, operands(given), retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.fill_(7)  # what the first caller does with it is nobody else's business
    second = torch.autograd.grad(loss, operands(given), retain_graph=True)
    assert same_bits(second, kept)
    for g in second:
        g.fill_(7)
    third = torch.autograd.grad(loss, operands(given), create_graph=True)
    assert same_bits([g.detach() for g in third], kept)
    loss.backward()
    assert same_bits([x.grad for x in operands(given)], kept)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_gradients_accumulate_and_are_not_written_to():
    given = example()
    linear_cross_entropy(**given).backward()
    once = [x.grad.clone() for x in operands(given)]
    linear_cross_entropy(**given).backward()
    assert same_bits([x.grad for x in operands(given)], [2 * g for g in once])


@pytest.mark.parametrize("changed", [*NAMES, "target", "target_prob", "sample_weight", "weight"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_before_backward_raises_or_does_not_matter(kind, changed):
    """Operands and targets are read again, and PyTorch notices; the rest is copied."""
    leaves = example(kind)
    if changed == "sample_weight":
        leaves["sample_weight"] = torch.rand(N)
    if changed == "weight":
        leaves["weight"] = torch.rand(V)
    if changed not in leaves:
        return
    for upstream in (1.0, 0.5):
        given = {k: x * 1 if x.requires_grad else x.clone() for k, x in leaves.items()}
        loss = linear_cross_entropy(**given)
        asked = operands(leaves), torch.tensor(upstream)
        want = torch.autograd.grad(loss, *asked, retain_graph=True)
        with torch.no_grad():
            given[changed].zero_()
        if changed in (*NAMES, "target"):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(loss, *asked)
        else:
            assert same_bits(torch.autograd.grad(loss, *asked), want)


# What is made, and when ---------------------------------------------------------------------------


def test_what_is_expected():
    expected = linear_native.Expected()
    assert expected.upstream() == 1.0
    expected.came(0.25)  # one surprise, and from then on what surprised
    assert expected.upstream() == 0.25
    expected.came(0.25)
    assert expected.upstream() == 0.25
    expected.came(0.5)
    assert expected.upstream() == 0.5
    expected.came(0.75)  # a second one in a row
    assert expected.upstream() is None
    expected.came(0.125)
    assert expected.upstream() is None
    expected.came(0.125)
    assert expected.upstream() == 0.125
    for extreme in (0.0, -0.0, 1e-30, 1e30, float("inf"), float("nan")):
        expected.came(extreme)
        expected.came(extreme)
        assert expected.upstream() is None
    expected.came(-2.0)
    expected.came(-2.0)
    assert expected.upstream() == -2.0


def test_the_sign_of_zero_and_nan_are_told_apart():
    assert linear_native.same(0.0, 0.0)
    assert linear_native.same(-1.5, -1.5)
    assert not linear_native.same(0.0, -0.0)
    assert not linear_native.same(float("nan"), float("nan"))
    assert not linear_native.same(1.0, None)


@pytest.mark.parametrize("scales", [[1.0] * 3, [4.0] * 3, [1.0, 4.0, 4.0, 1.0, 1.0]])
def test_gradients_are_computed_once_where_the_scale_is_constant(made, scales):
    given, last = example(), 1.0
    for scale in scales:
        made.clear()
        (linear_cross_entropy(**given) * scale).backward()
        whole = (True, True, True)
        assert made == [(last, whole)] + [(scale, whole)] * (scale != last)
        last = scale


def test_no_gradient_is_made_ahead_where_the_scale_varies(made):
    given = example()
    for scale in (0.5, 0.25, 0.75, 0.3):
        made.clear()
        (linear_cross_entropy(**given) * scale).backward()
    assert len(made) == 1


@pytest.mark.parametrize("wanted", [(n,) for n in NAMES] + [("input", "linear_bias")])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_product_is_made_for_what_is_frozen(made, wanted, reduction):
    given = example(wanted=wanted)
    loss = linear_cross_entropy(**given, reduction=reduction)
    (2 * loss).sum().backward(retain_graph=True)
    grads = torch.autograd.grad(loss.sum(), operands(given), create_graph=True)
    torch.autograd.grad(grads, operands(given), [torch.ones_like(g) for g in grads])
    assert {wrt for _, wrt in made} == {tuple(n in wanted for n in NAMES)}
    assert [given[n].grad is not None for n in NAMES] == [n in wanted for n in NAMES]
    # As where all is wanted.
    whole = {k: x.detach().requires_grad_(k in NAMES) for k, x in given.items()}
    want = torch.autograd.grad(
        2 * linear_cross_entropy(**whole, reduction=reduction).sum(), [whole[n] for n in wanted]
    )
    assert same_bits([given[n].grad for n in wanted], want)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_gradient(made, kind, context):
    given = example(kind)
    want = linear_cross_entropy(**given)
    assert want.requires_grad
    made.clear()
    with context():
        loss = linear_cross_entropy(**given)
        inside = {k: x * 1 for k, x in given.items()}
        assert torch.equal(linear_cross_entropy(**inside), want)
        linear_cross_entropy_stats(given["input"], given["linear_weight"])
    frozen = linear_cross_entropy(**{k: x.detach() for k, x in given.items()})
    assert not loss.requires_grad
    assert not frozen.requires_grad
    assert torch.equal(loss, want.detach())
    assert torch.equal(frozen, want.detach())
    assert not made


@pytest.mark.parametrize("name", ["sample_weight", "target", "target_prob"])
def test_gradients_of_targets_and_weights_over_frozen_operands(name):
    kind = {"target": "distribution", "target_prob": "sparse"}.get(name, "index")
    given = example(kind, torch.float64, wanted=()) | {"sample_weight": torch.rand(N).double()}
    given[name] = given[name].double().requires_grad_()
    linear_cross_entropy(**given).backward()
    found, given[name].grad = given[name].grad, None
    x, w, b = (given.pop(n) for n in NAMES)
    cross_entropy(functional.linear(x, w, b), **given).backward()
    assert found.any()
    assert ((found - given[name].grad).abs() <= 200 * 16 * 2.0**-52).all()


# Saved tensors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_bits(kind, reduction, reentrant):
    given = example(kind)

    def loss(x, w, b):
        more = {"input": x * 0.7, "linear_weight": w, "linear_bias": b, "reduction": reduction}
        return linear_cross_entropy(**given | more).sum()

    want = torch.autograd.grad(loss(*operands(given)), operands(given))
    checkpoint(loss, *operands(given), use_reentrant=reentrant).backward()
    assert same_bits([x.grad for x in operands(given)], want)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tensors_may_be_packed(kind, made):
    given = example(kind)
    want = torch.autograd.grad(linear_cross_entropy(**given), operands(given))
    packed = []

    def pack(x):
        packed.append(tuple(x.shape))
        return io.BytesIO(pickle.dumps(x.detach()))

    made.clear()
    with saved_tensors_hooks(pack, pickle.load):
        loss = linear_cross_entropy(**given)
    assert not made  # beside what is saved nothing is kept
    assert sorted(packed[:3]) == sorted([(N, D), (V, D), (V,)])
    assert packed[3:] == [tuple(given["target"].shape)]
    assert same_bits(torch.autograd.grad(loss, operands(given)), want)
    with save_on_cpu():
        loss = linear_cross_entropy(**given)
    assert same_bits(torch.autograd.grad(loss, operands(given)), want)


def test_statistics_are_saved_and_checkpointed_likewise():
    given = example()

    def entropy(x, w, b):
        return linear_cross_entropy_stats(x, w, given["target"], linear_bias=b).entropy.sum()

    want = torch.autograd.grad(entropy(*operands(given)), operands(given))
    checkpoint(entropy, *operands(given), use_reentrant=False).backward()
    assert same_bits([x.grad for x in operands(given)], want)
    for i in range(3):
        work = [x * 1 for x in operands(given)]
        loss = entropy(*work)
        with torch.no_grad():
            work[i].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_statistics_in_chunks_of_rows(monkeypatch):
    given = example()
    results, place = [], "crossent.torch.linear_formulas.workspace_bytes"
    for a_row_at_a_time in (False, True):
        if a_row_at_a_time:
            monkeypatch.setattr(place, lambda *_: 0)
        x, w, b = operands(given)
        found = linear_cross_entropy_stats(x, w, given["target"], linear_bias=b)
        results.append(torch.autograd.grad(found.entropy.sum() + found.logsumexp.sum(), (x, w, b)))
        loss = linear_cross_entropy(**given, reduction="none")
        upstream = torch.ones(N, requires_grad=True)
        grads = torch.autograd.grad(loss, (x, w, b), upstream, create_graph=True)
        results[-1] += torch.autograd.grad(grads, upstream, [g.detach() for g in grads])
    for a, b in zip(*results, strict=True):
        # Sums of some hundred terms below 4 in another order.
        assert ((a - b).abs() <= 200 * 4 * U).all()


def test_two_threads():
    """Each its own loss, scale and graph; what one expects does not change what another gets."""
    scales, found = (1.0, 3.0), {}
    heads = [example() for _ in scales]

    def work(i):
        got = []
        for _ in range(20):
            loss = linear_cross_entropy(**heads[i]) * scales[i]
            got.append(torch.autograd.grad(loss, operands(heads[i])))
        found[i] = got

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, scale in enumerate(scales):
        loss = linear_cross_entropy(**heads[i]) * scale
        want = torch.autograd.grad(loss, operands(heads[i]))
        assert all(same_bits(got, want) for got in found[i])
