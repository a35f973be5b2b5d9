"""`LinearCrossEntropyLoss`: copied, pickled, moved, trained; its state and PyTorch's."""

import copy
import io
import pickle

import pytest

pytest.importorskip("torch")
import torch

from crossent.torch import LinearCrossEntropyLoss, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("one_torch_thread")

N, D, V = 6, 4, 5
OPTIONS = {
    "bias": True,
    "weight": torch.linspace(0.5, 2, V),
    "ignore_index": 3,
    "reduction": "sum",
    "label_smoothing": 0.1,
}
MORE = {"z_loss": 1e-3, "logit_scale": 0.7, "softcap": 9.0}
peer = getattr(torch.nn, "LinearCrossEntropyLoss", None)
with_peer = pytest.mark.skipif(peer is None, reason="this PyTorch has no LinearCrossEntropyLoss")


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(N, D), torch.tensor([0, 1, 2, 3, 4, 0])


def stored(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_it_is_the_function_with_its_own_weights(batch):
    module = LinearCrossEntropyLoss(D, V, **OPTIONS, **MORE)
    options = {k: v for k, v in OPTIONS.items() if k != "bias"}
    weights = module.linear.weight, module.linear.bias
    want = linear_cross_entropy(
        batch[0], weights[0], batch[1], linear_bias=weights[1], **options, **MORE
    )
    assert torch.equal(module(*batch), want)
    varying = {"sample_weight": torch.rand(N), "target_prob": torch.rand(N, 1)}
    want = linear_cross_entropy(
        batch[0],
        weights[0],
        batch[1][:, None],
        linear_bias=weights[1],
        **options | MORE | varying | {"reduction": "mean", "divisor": 2.5},
    )
    module.reduction = "mean"
    assert torch.equal(module(batch[0], batch[1][:, None], divisor=2.5, **varying), want)


@pytest.mark.parametrize("out_features", [(), (2,)])
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), stored]
)
def test_a_module_may_be_copied_and_pickled(copied, out_features, batch):
    x, y = batch
    y = y.reshape(N, *(1 for _ in out_features)).expand(N, *out_features)
    module = LinearCrossEntropyLoss(D, V, out_features=out_features, **OPTIONS, **MORE)
    again = copied(module)
    assert repr(again) == repr(module)
    assert torch.equal(again(x, y), module(x, y))
    again(x, y).backward()
    assert again.linear.weight.grad.any()
    if copied is not copy.copy:
        assert module.linear.weight.grad is None


@with_peer
@pytest.mark.parametrize("out_features", [(), (2,)])
def test_the_state_is_pytorch_s_both_ways(out_features, batch):
    x, y = batch
    y = y.reshape(N, *(1 for _ in out_features)).expand(N, *out_features)
    ours = LinearCrossEntropyLoss(D, V, out_features=out_features, **OPTIONS)
    theirs = peer(D, V, out_features=out_features, **OPTIONS)
    assert isinstance(ours, peer)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    want = theirs(x, y)
    # Sums of some hundred products of numbers below 4 in float32.
    assert abs(ours(x, y) - want) <= 200 * 16 * 2.0**-23
    with torch.no_grad():
        ours.linear.weight.mul_(2)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.linear.weight, ours.linear.weight)
    assert torch.equal(theirs.weight, ours.weight)


@with_peer
def test_a_module_pickled_as_pytorch_s_opens_as_ours(batch):
    theirs = peer(D, V, **OPTIONS)
    module = LinearCrossEntropyLoss.__new__(LinearCrossEntropyLoss)
    module.__setstate__(theirs.__getstate__())
    assert abs(module(*batch) - theirs(*batch)) <= 200 * 16 * 2.0**-23


def test_dtypes_and_devices_go_with_it(batch):
    x, y = batch
    module = LinearCrossEntropyLoss(D, V, **OPTIONS).double()
    assert module.weight.dtype is module.linear.weight.dtype is torch.float64
    assert module(x.double(), y).dtype is torch.float64
    with pytest.raises(TypeError, match="linear_weight must have the dtype of input, float32"):
        module(x, y)
    module = module.bfloat16()
    assert module(x.bfloat16(), y).dtype is torch.float32
    module = module.to("meta")
    assert module(x.bfloat16().to("meta"), y.to("meta")).device.type == "meta"


def test_a_few_steps_of_training(batch):
    module = LinearCrossEntropyLoss(D, V, bias=True)
    # Convex, with a Hessian of at most max |(x, 1)|²/2: a step of its inverse goes down.
    curvature = (batch[0].square().sum(dim=1).max().item() + 1) / 2
    steps = torch.optim.SGD(module.parameters(), lr=1 / curvature)
    losses = []
    for _ in range(20):
        steps.zero_grad()
        loss = module(*batch)
        loss.backward()
        steps.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
