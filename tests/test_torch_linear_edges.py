"""The fused head from PyTorch at the edges: no rows, no features, odd memory, odd numbers."""

import pytest

pytest.importorskip("torch")
import torch
from torch.autograd import forward_ad
from torch.nn import functional

from crossent.torch import linear_cross_entropy, linear_cross_entropy_stats

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    # PyTorch's own, as it first enters forward mode
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

N, D, V = 5, 4, 6
# Sums of at most N·V·D products of numbers below 4, in some forty operations each (float64).
ROOM = 200 * 16 * 2.0**-52
KINDS = ["index", "distribution", "sparse"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def operands(*sizes, dtype=torch.float64):
    n, d, v = sizes or (N, D, V)
    found = torch.randn(n, d), torch.randn(v, d), torch.randn(v)
    return [x.to(dtype).requires_grad_() for x in found]


def head(x, w, b, target, **options):
    return linear_cross_entropy(x, w, target, linear_bias=b, **options)


def peer(x, w, b, target, **options):
    return functional.cross_entropy(functional.linear(x, w, b), target, **options)


def second(loss, wanted):
    """Return the gradients, and those of the sum of their squares."""
    grads = torch.autograd.grad(loss.sum(), wanted, create_graph=True)
    whole = sum(g.square().sum() for g in grads)
    return [*(g.detach() for g in grads), *torch.autograd.grad(whole, wanted)]


def close(found, want, size=1.0):
    for a, b in zip(found, want, strict=True):
        assert ((a - b).abs() <= ROOM * size).all()


# Sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 1), (0, 0, 1)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_rows_no_features_no_choice(dtype, kind, reduction, sizes):
    n, _, v = sizes
    x, w, b = operands(*sizes, dtype=dtype)
    target, options = torch.zeros(n, dtype=torch.int64), {"reduction": reduction}
    if kind == "distribution":
        target = torch.rand(n, v)
    elif kind == "sparse":
        target = torch.zeros(n, 2, dtype=torch.int64)
        options["target_prob"] = torch.rand(n, 2)

    def loss(x, w, b):
        return head(x, w, b, target, **options)

    found = second(loss(x, w, b), (x, w, b))
    assert [g.shape for g in found] == 2 * [x.shape, w.shape, b.shape]
    assert all(g.isfinite().all() for g in found)
    if v == 1:
        assert not any(g.any() for g in found)  # of no choice nothing depends on anything
    upstream = torch.ones_like(loss(x, w, b)).requires_grad_()
    grads = torch.autograd.grad(loss(x, w, b), (x, w, b), upstream, create_graph=True)
    (along,) = torch.autograd.grad(grads, upstream, [torch.ones_like(g) for g in grads])
    assert along.shape == upstream.shape
    bare = [t.detach() for t in (x, w, b)]
    value, back = torch.func.vjp(loss, *bare)
    assert value.shape == upstream.shape
    for got, want in zip(back(torch.ones_like(value)), found, strict=False):
        assert (got.float() - want.float()).abs().max().item() <= 2.0**-7 if got.numel() else True
    torch.func.jvp(loss, tuple(bare), tuple(bare))
    torch.func.hessian(lambda *o: loss(*o).sum(), argnums=(0, 1, 2))(*bare)
    stats = linear_cross_entropy_stats(x, w, None, linear_bias=b)
    stats.entropy.sum().backward()
    assert x.grad.isfinite().all()


# Memory -------------------------------------------------------------------------------------------


def negative(*shape):
    """Return a view whose sign is still to be changed, and the numbers it stands for."""
    view = torch.complex(*torch.randn(2, *shape, dtype=torch.float64)).conj().imag
    assert view.is_neg()
    return view, view.clone()


def test_views_of_the_other_sign():
    y, pairs = torch.randint(V, (N,)), [negative(*s) for s in ((N, D), (V, D), (V,), (N,), (N,))]
    along = [negative(*s) for s in ((N, D), (V, D), (V,))]
    found = []
    for i in range(2):
        x, w, b, s, upstream = (pair[i] for pair in pairs)
        leaves = [t.detach().requires_grad_() for t in (x, w, b)]
        assert leaves[0].is_neg() is (i == 0)
        loss = head(*leaves, y, sample_weight=s, reduction="none")
        grads = torch.autograd.grad(loss, leaves, upstream, create_graph=True)
        more = torch.autograd.grad(grads, leaves, [pair[i] for pair in along])
        found.append([loss.detach(), *(g.detach() for g in grads), *more])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_one_tensor_in_two_places():
    shared, y = operands(N, D, N)[0], torch.arange(N).flip(0)
    found, want = (second(f(shared, shared, None, y), [shared]) for f in (head, peer))
    close(found, want, 16)


@pytest.mark.parametrize("place", range(3))
def test_expanded_operands(place):
    given, y = operands(), torch.randint(V, (N,))
    shape = given[place].shape
    leaves = list(given)
    leaves[place] = given[place].detach()[:1].requires_grad_()
    results = []
    for function in (head, peer):
        expanded = list(leaves)
        expanded[place] = leaves[place].expand(shape)
        results.append(second(function(*expanded, y), leaves))
    close(*results, 16)


@pytest.mark.parametrize("layout", ["transposed", "strided", "backwards"])
def test_directions_and_upstream_gradients_of_any_strides(layout):
    moved = {
        "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
        "strided": lambda x: torch.stack([x, x], -1)[..., 0],
        "backwards": lambda x: x.flip(0).contiguous().flip(0),
    }[layout]
    leaves, y = operands(), torch.randint(V, (N,))
    along, upstream = [torch.randn_like(x).detach() for x in leaves], torch.rand(N).double()
    found = []
    for move in (moved, lambda x: x):
        loss = head(*leaves, y, reduction="none")
        grads = torch.autograd.grad(loss, leaves, move(upstream), create_graph=True)
        found.append(torch.autograd.grad(grads, leaves, [move(v) for v in along]))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


# Numbers ------------------------------------------------------------------------------------------


def test_float16_logits_beyond_float16():
    """z = ±270,000 there; sums and gradients in float32, rounded once."""
    x, w = torch.full((2, 3), 300.0).half(), torch.full((4, 3), 300.0).half()
    w[1] = -300
    target = torch.tensor([1, 0])
    want = peer(x.double(), w.double(), None, target)
    x, w = x.requires_grad_(), w.requires_grad_()
    loss = head(x, w, None, target)
    assert abs(loss - want) <= 2.0**-23 * want * 4
    loss.backward()
    assert x.grad.isfinite().all()
    assert w.grad.isfinite().all()
    also, _ = torch.func.vjp(lambda x: head(x, w, None, target), x.detach())
    assert abs(also - want) <= 2.0**-23 * want * 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_no_number_spoils_itself_alone(value):
    (x, w, b), y = operands(), torch.randint(V, (N,))
    x.data[1, 0] = value
    others = [True, False, True, True, True]
    loss = head(x, w, b, y, reduction="none")
    found = [loss, *second(loss, [x])]
    also, back = torch.func.vjp(lambda x: head(x, w, b, y, reduction="none"), x.detach())
    found += [also, *back(torch.ones_like(also))]
    for rows in found:
        assert rows.reshape(N, -1).isfinite().all(dim=1).tolist() == others


def test_a_dropped_row_spoils_nothing_in_any_derivative():
    (x, w, b), y = operands(), torch.randint(V, (N,))
    x.data[1], y[1] = torch.nan, -100
    leaves = x, w, b
    upstream = torch.ones(()).double().requires_grad_()
    grads = torch.autograd.grad(head(x, w, b, y), leaves, upstream, create_graph=True)
    # A direction that is no number in the dropped row is not read either.
    along = [torch.where(t.isnan(), t, 1.0).detach() for t in leaves]
    curves = torch.autograd.grad(grads, (*leaves, upstream), along, create_graph=True)
    thirds = torch.autograd.grad(curves[:3], leaves, along)
    for found in (*grads, *curves, *thirds):
        assert found.isfinite().all()
    for found in (grads[0], curves[0], thirds[0]):
        assert not found[1].any()
    stats = linear_cross_entropy_stats(x, w, y, linear_bias=b)
    for found in torch.autograd.grad(stats.entropy.nansum() + stats.logsumexp.nansum(), leaves):
        assert found.isfinite().all()
    bare = tuple(t.detach() for t in leaves)
    for derivative in torch.func.jvp(lambda *o: head(*o, y), bare, bare):
        assert derivative.isfinite()
    curves = torch.func.hessian(lambda *o: head(*o, y), argnums=(0, 1, 2))(*bare)
    assert all(table.isfinite().all() for row in curves for table in row)


def test_a_bias_of_minus_infinity_masks_a_class():
    (x, w, b), y = operands(), torch.tensor([0, 1, 2, 4, 5])
    b.data[3] = -torch.inf
    found = second(head(x, w, b, y), (x, w))
    keep = torch.arange(V) != 3
    want = second(peer(x, w[keep], b[keep], torch.tensor([0, 1, 2, 3, 4])), (x, w))
    close(found, want, 16)
    also = torch.func.grad(lambda x, w: head(x, w, b, y), argnums=(0, 1))(x, w)
    close([t.detach() for t in also], want[:2])


# Passes of other kinds ----------------------------------------------------------------------------


def test_batched_backward_passes():
    (x, w, b), y, found = operands(), torch.randint(V, (N,)), []
    for function in (head, peer):
        loss = function(x, w, b, y, reduction="none")
        rows = torch.eye(N).double()
        batch = torch.autograd.grad(loss, (x, w, b), rows, is_grads_batched=True, create_graph=True)
        grads = torch.autograd.grad(function(x, w, b, y), (x, w, b), create_graph=True)
        units = torch.eye(N * D).double().reshape(-1, N, D)
        curves = torch.autograd.grad(grads[0], (x, w, b), units, is_grads_batched=True)
        found.append([*batch, *curves])
    close(*found, 4)


def test_dual_numbers_in_operands_and_upstream_gradients():
    (x, w, b), y, found = operands(), torch.randint(V, (N,)), []
    for function in (head, peer):
        loss = function(x, w, b, y)
        with forward_ad.dual_level():
            one, two = torch.ones((), dtype=torch.float64), torch.full((), 2.0).double()
            grads = torch.autograd.grad(loss, (x, w, b), forward_ad.make_dual(one, two))
            dual = forward_ad.make_dual(x.detach(), w.detach()[:N])
            grads += torch.autograd.grad(function(dual, w, b, y), (w, b))
            found.append([part for g in grads for part in forward_ad.unpack_dual(g)])
    close(*found, 4)


def test_the_default_device_and_dtype_do_not_matter():
    (x, w, b), y = operands(dtype=torch.float32), torch.randint(V, (N,))

    def results():
        curves = second(head(x, w, b, y), (x, w, b))
        stats = linear_cross_entropy_stats(x, w, None, linear_bias=b).entropy
        (slope,) = torch.autograd.grad(stats.sum(), x)
        return [*curves, stats, slope, torch.func.grad(lambda x: head(x, w, b, y))(x)]

    want = results()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = results()
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(found, want, strict=True):
        assert a.dtype is b.dtype
        assert torch.equal(a, b)
