"""Every transform of `torch.func`, in float64, against the reference's formulas.

Tolerance: a result is a sum of terms whose sizes `sizes` bounds. Some forty operations make each of
them, none off by more than an ulp of its result; a softcap κ moves z by 7κu, so every term by 42κ
ulp more (as in test_laws.py).
"""

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from crossent import reference
from crossent.options import Options
from crossent.rows import lower
from crossent.torch import CrossEntropyLoss, cross_entropy, cross_entropy_stats

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    # PyTorch's own, as it first enters forward mode
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

N, V = 3, 4
U = 2.0**-52
WEIGHT = np.array([0.5, 1.0, 2.0, 0.3])
OPTIONS = {
    "none": {},
    "weight": {"weight": WEIGHT},
    "sample_weight": {"sample_weight": np.array([0.5, -1.5, 2.0])},
    "a dropped row": {"sample_weight": np.array([0.5, 0.0, 2.0])},
    "ignore_index": {"ignore_index": 1},
    "label_smoothing": {"label_smoothing": 0.3},
    "z_loss": {"z_loss": 0.2},
    "logit_scale": {"logit_scale": 1.7},
    "softcap": {"softcap": 2.0},
    "sum": {"reduction": "sum"},
    "rows": {"reduction": "none"},
    "divisor": {"divisor": 2.5},
    "every one": {
        "weight": WEIGHT,
        "sample_weight": np.array([0.5, 1.5, 2.0]),
        "ignore_index": 1,
        "label_smoothing": 0.3,
        "z_loss": 0.2,
        "logit_scale": 1.7,
        "softcap": 2.0,
    },
}
KINDS = ["index", "distribution", "sparse"]
cells = pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in KINDS for name in OPTIONS]
)


class Example:
    """Logits, a target and options as arrays, for the reference, and as tensors."""

    def __init__(self, kind="index", name="none"):
        rng = np.random.default_rng(0)
        self.v = rng.normal(size=(N, V))
        self.x = rng.normal(size=(N, V))
        self.options = dict(OPTIONS[name])
        self.target = np.array([2, 1, 0])
        if kind == "distribution":
            self.target = rng.dirichlet(np.ones(V), N)
        elif kind == "sparse":
            self.target = np.array([[2, 3], [1, 1], [0, 1]])
            self.options["target_prob"] = rng.uniform(size=(N, 2))
        options = Options(**self.options)
        self.plan = lower("test", self.v.shape, 1, np.dtype(np.float64), self.target, options)
        self.logits, self.direction = torch.from_numpy(self.v), torch.from_numpy(self.x)
        self.given = {
            k: torch.from_numpy(a) if isinstance(a, np.ndarray) else a
            for k, a in self.options.items()
        }

    def loss(self, v, target=None, **more):
        target = torch.from_numpy(self.target) if target is None else target
        return cross_entropy(v, target, **self.given | more)

    def sizes(self):
        """Bounds of what loss, gradient and Hessian add up, for a row; the largest row's."""
        t, plan = reference.rows(self.v, self.plan), self.plan
        mass = np.abs(t.r) * np.abs(t.q).sum(axis=1)
        lse, slope = np.abs(t.lse).max() + t.log_sum.max(), plan.logit_scale
        twice = 1 + 2 * plan.z_loss * lse
        loss = mass.sum() * (t.gap.max() + lse) * twice
        curvature = 2 * slope / plan.softcap if plan.softcap else 0
        return (
            loss,
            mass.max() * twice * slope,
            mass.max() * 2 * twice * slope * (slope + curvature),
        )

    def close(self, got, want, order, size=1.0):
        got = got.detach().numpy()
        assert got.shape == np.shape(want)
        room = (40 + 42 * self.plan.softcap) * U * self.sizes()[order] * size
        assert np.abs(got - want).max() <= room


@cells
def test_grad_and_vjp(kind, name):
    example = Example(kind, name)
    found = grad(lambda v: example.loss(v).sum())(example.logits)
    example.close(found, reference.grad(example.v, example.plan), 1)
    loss, back = vjp(example.loss, example.logits)
    example.close(loss, reference.loss(example.v, example.plan), 0)
    upstream = torch.rand(loss.shape, dtype=torch.float64) - 0.5
    (found,) = back(upstream)
    example.close(found, reference.grad(example.v, example.plan, upstream.numpy()), 1)


@cells
def test_jvp(kind, name):
    example = Example(kind, name)
    loss, along = jvp(example.loss, (example.logits,), (example.direction,))
    example.close(loss, reference.loss(example.v, example.plan), 0)
    each = reference.grad(example.v, example.plan) * example.x
    want = each.sum(axis=1) if example.plan.reduction == "none" else each.sum()
    example.close(along, want, 1, np.abs(example.x).sum())


@cells
def test_jacobians_and_the_hessian(kind, name):
    example = Example(kind, name)
    each = {"reduction": "none"}
    if name == "divisor":
        example.given["divisor"] = None
        example.plan.divisor = 1.0
    elif example.plan.reduction == "mean":
        example.plan.divisor = 1.0
    want = np.zeros((N, N, V))
    want[range(N), range(N)] = reference.grad(example.v, example.plan)
    for jacobian in (jacrev, jacfwd):
        found = jacobian(lambda v: example.loss(v, **each))(example.logits)
        example.close(found, want, 1)
    table = np.zeros((N, V, N, V))
    table[range(N), :, range(N)] = reference.hessian(example.v, example.plan)
    for second in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f))):
        found = second(lambda v: example.loss(v, **each).sum())(example.logits)
        example.close(found, table, 2)


@cells
def test_the_hessian_times_a_vector_both_ways(kind, name):
    example = Example(kind, name)
    slope = grad(lambda v: example.loss(v).sum())
    want = reference.hvp(example.v, example.plan, example.x)
    size = np.abs(example.x).sum()
    _, found = jvp(slope, (example.logits,), (example.direction,))
    example.close(found, want, 2, size)
    (found,) = vjp(slope, example.logits)[1](example.direction)
    example.close(found, want, 2, size)


@pytest.mark.parametrize("name", ["none", "weight", "label_smoothing", "every one", "divisor"])
@pytest.mark.parametrize("kind", KINDS)
def test_grad_in_target_and_row_weights(kind, name):
    example = Example(kind, name)
    s = example.options.get("sample_weight", np.array([0.5, 1.5, 2.0]))
    plan = example.plan = lower(
        "test",
        example.v.shape,
        1,
        np.dtype(np.float64),
        example.target,
        Options(**example.options | {"sample_weight": s}),
    )
    found = grad(lambda s: example.loss(example.logits, sample_weight=s))(torch.from_numpy(s))
    fixed = "divisor" in example.options
    want = reference.grad_sample_weight(example.v, plan, fixed_divisor=fixed)
    example.close(found, want, 0, 1 / np.abs(s).min())
    weights = {"sample_weight": torch.from_numpy(s)}
    if kind == "distribution":
        found = grad(lambda t: example.loss(example.logits, t, **weights))(
            torch.from_numpy(example.target)
        )
        want = reference.grad_target(example.v, plan)
    elif kind == "sparse":
        found = grad(lambda t: example.loss(example.logits, target_prob=t, **weights))(
            example.given["target_prob"]
        )
        want = reference.grad_target_prob(example.v, plan)
    else:
        return
    q = np.abs(reference.rows(example.v, plan).q).sum(axis=1)
    example.close(found, want, 0, WEIGHT.max() / q[q > 0].min())


# vmap ---------------------------------------------------------------------------------------------


def stack(batch, *shape):
    return torch.randn(batch, *shape, dtype=torch.float64, generator=torch.manual_seed(1))


@cells
def test_vmap_over_the_logits(kind, name):
    example = Example(kind, name)
    inputs = stack(5, N, V)
    found = vmap(example.loss)(inputs)
    slopes = vmap(grad(lambda v: example.loss(v).sum()))(inputs)
    for v, loss, slope in zip(inputs, found, slopes, strict=True):
        example.v = v.numpy()
        example.close(loss, reference.loss(example.v, example.plan), 0)
        example.close(slope, reference.grad(example.v, example.plan), 1)


@pytest.mark.parametrize("randomly_placed", [(0, 0), (1, 0), (2, 1)])
def test_vmap_over_logits_and_target(randomly_placed):
    example = Example()
    inputs = stack(5, N, V)
    targets = torch.randint(V, (5, N))
    moved = [x.movedim(0, at) for x, at in zip((inputs, targets), randomly_placed, strict=True)]
    found = vmap(example.loss, in_dims=randomly_placed)(*moved)
    for v, y, loss in zip(inputs, targets, found, strict=True):
        example.close(loss, cross_entropy(v, y).numpy(), 0, 2)


def test_gradients_of_each_sample():
    torch.manual_seed(0)
    model = torch.nn.Linear(6, V).double()
    criterion = CrossEntropyLoss(label_smoothing=0.1)
    data, target = stack(7, 6), torch.randint(V, (7,))

    def loss(parameters, x, y):
        return criterion(functional_call(model, parameters, (x[None],)), y[None])

    parameters = dict(model.named_parameters())
    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, data, target)
    for i in range(7):
        want = torch.autograd.grad(loss(parameters, data[i], target[i]), list(model.parameters()))
        for got, expected in zip(found.values(), want, strict=True):
            # A gradient of at most 1, times x.
            assert ((got[i] - expected).abs() <= 80 * U * data[i].abs().max().clamp(min=1)).all()


def test_vmap_of_a_mean_counts_each_one_s_kept_rows():
    inputs = stack(3, 4, V)
    targets = torch.tensor([[0, 1, 2, 3], [0, -100, -100, 3], [-100] * 4])
    inputs[1, 1] = torch.nan  # never read
    found = vmap(cross_entropy)(inputs, targets)
    slopes = vmap(grad(cross_entropy))(inputs, targets)
    for i in range(3):
        v = inputs[i].clone().requires_grad_()
        loss = cross_entropy(v, targets[i])
        loss.backward()
        assert abs(found[i] - loss) <= 80 * U * 10
        assert ((slopes[i] - v.grad).abs() <= 80 * U).all()
    assert found[2] == 0
    assert not slopes[2].any()
    assert not slopes[1, 1].any()


def test_vmap_over_weights():
    example, weights = Example(), torch.rand(5, N, dtype=torch.float64) + 0.5
    found = vmap(lambda s: example.loss(example.logits, sample_weight=s))(weights)
    for s, loss in zip(weights, found, strict=True):
        example.close(loss, example.loss(example.logits, sample_weight=s).numpy(), 0, 4)


def test_vmap_of_statistics():
    inputs, target = stack(5, N, V), torch.tensor([0, -100, 2])
    found = vmap(cross_entropy_stats, in_dims=(0, None))(inputs, target)
    for i in range(5):
        for got, want in zip(found, cross_entropy_stats(inputs[i], target), strict=True):
            assert got.dtype is want.dtype
            torch.testing.assert_close(got[i], want, rtol=80 * U, atol=80 * U, equal_nan=True)


# Targets out of range -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [V, -1, 2**40])
@pytest.mark.parametrize("kind", ["index", "sparse"])
def test_a_target_out_of_range_is_nan_where_nothing_can_raise(kind, value):
    target = torch.tensor([0, value, 2])
    more = {}
    if kind == "sparse":
        target, more = target[:, None], {"target_prob": torch.ones(N, 1, dtype=torch.float64)}

    def loss(v, target=target):
        return cross_entropy(v, target, reduction="none", **more)

    v = Example().logits
    with pytest.raises(IndexError, match=rf"target\[1(, 0)?\] is {value}, but there are 4 classes"):
        loss(v)
    for rows in (
        vmap(loss)(v[None])[0],
        vmap(loss, in_dims=(None, 0))(v, target[None])[0],
        jvp(loss, (v,), (v,))[0],
        jvp(loss, (v,), (v,))[1],
        vjp(loss, v)[0],
    ):
        assert rows.isnan().tolist() == [False, True, False]
    for slope in (
        grad(lambda v: loss(v).sum())(v),
        vmap(grad(lambda v: loss(v).sum()))(v[None])[0],
        vmap(grad(lambda v: loss(v)[1]))(v[None])[0, [0, 1, 2]],
    ):
        assert slope[1].isnan().all()
    assert grad(lambda v: loss(v).sum())(v)[::2].isfinite().all()
    assert vmap(lambda v: loss(v).sum())(v[None]).isnan().all()


@pytest.mark.parametrize("shape", [(N,), (N, 1)])
def test_a_huge_unsigned_target_does_not_wrap_to_ignore_index(shape):
    target = torch.from_numpy(np.array([0, 2**64 - 100, 2], np.uint64)).reshape(shape)
    more = {"target_prob": torch.ones(shape)} if len(shape) > 1 else {}
    found = vmap(lambda v: cross_entropy(v, target, reduction="none", **more))(
        Example().logits[None]
    )
    assert found[0].isnan().tolist() == [False, True, False]
