"""PyTorch's own samples of its fused linear cross-entropy, through both.

Documented differences: the loss of 16-bit features is float32, a mean without a kept row is 0,
features may have any number of axes, and `ignore_index` does not apply to probabilities.
"""

import random

import pytest

pytest.importorskip("torch")
pytest.importorskip("expecttest")  # which PyTorch's samples import
import torch

from crossent.torch import LinearCrossEntropyLoss, linear_cross_entropy

peer = getattr(torch.nn.functional, "linear_cross_entropy", None)
pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.skipif(peer is None, reason="this PyTorch has no linear_cross_entropy"),
]

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def entries():
    """PyTorch's entries for the function, one of them for each way its rows may be cut."""
    from torch.testing._internal.common_methods_invocations import op_db

    return [entry for entry in op_db if entry.name == "nn.functional.linear_cross_entropy"]


@pytest.fixture(scope="module")
def module_entry():
    from torch.testing._internal.common_modules import module_db

    (found,) = (entry for entry in module_db if entry.module_cls is torch.nn.LinearCrossEntropyLoss)
    return found


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    random.seed(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_function_s_samples(entries, dtype):
    count = 0
    for entry in entries:
        for sample in entry.sample_inputs("cpu", dtype, requires_grad=True):
            assert_agree(linear_cross_entropy, sample.input, *sample.args, sample.kwargs)
            count += 1
    assert count >= 150


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_module_s_samples(module_entry, dtype):
    samples = module_entry.module_inputs_func(
        module_entry, device="cpu", dtype=dtype, requires_grad=True, training=True
    )
    assert len(samples) >= 300
    for sample in samples:
        made, given = sample.constructor_input, sample.forward_input.args
        module = LinearCrossEntropyLoss(*made.args, **made.kwargs)
        theirs = torch.nn.LinearCrossEntropyLoss(*made.args, **made.kwargs)
        theirs.load_state_dict(module.state_dict())
        assert repr(theirs.linear) == repr(module.linear)
        weight = module.linear.weight.detach()
        classes = (module.num_classes, *module.out_features)
        weight = weight.reshape(*classes, -1)
        options = {
            k: made.kwargs[k]
            for k in ("weight", "reduction", "ignore_index", "label_smoothing", "options")
        }
        if module.linear.bias is not None:
            options["linear_bias"] = module.linear.bias.detach().reshape(classes)

        def function(x, w, target, *, linear_bias=None, weight=None, module=module, **_):
            module.linear, module.weight = Given(w, linear_bias), weight
            return module(x, target)

        assert_agree(function, given[0], weight, given[1], options)


class Given(torch.nn.Module):
    """Weights that are no parameters, in the place of a module that owns them."""

    def __init__(self, weight, bias):
        super().__init__()
        self.in_features = weight.shape[-1]
        self.weight = weight.reshape(-1, self.in_features)
        self.bias = None if bias is None else bias.reshape(-1)


def test_what_pytorch_refuses_is_refused(entries, module_entry):
    samples = [(s.sample_input, s.error_regex) for s in entries[0].error_inputs("cpu")]
    assert len(samples) >= 6
    for sample, regex in samples:
        if "ignore_index cannot" in regex:
            continue
        with pytest.raises(RuntimeError, match=regex):
            peer(sample.input, *sample.args, **sample.kwargs)
        with pytest.raises((TypeError, ValueError), match=r"^linear_cross_entropy: "):
            linear_cross_entropy(sample.input, *sample.args, **sample.kwargs)
    samples = module_entry.module_error_inputs_func(
        module_entry, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    )
    assert len(samples) >= 5
    for sample in samples:
        made, given = sample.module_error_input.constructor_input, sample.module_error_input
        text = r"^(linear_cross_entropy|LinearCrossEntropyLoss): "
        with pytest.raises((TypeError, ValueError), match=text):
            LinearCrossEntropyLoss(*made.args, **made.kwargs)(*given.forward_input.args)


# The comparison -----------------------------------------------------------------------------------


def assert_agree(function, input, weight, target, options):
    """Compare loss and gradients with PyTorch's in float64, on the same numbers.

    u is twice the unit roundoff of what is computed in. A logit is off by at most
    δ = D·u·(|x||W|ᵀ + |b|), so a log-probability by 2δ and, with L the largest lse − z_j, by its
    own 2L + V roundings; p is off relatively as much. A row's loss and gradient weigh that by
    Σ|q|/divisor ≤ `mass`, and the products multiply it by Σ|W| and Σ|x|.
    """
    dtype = input.dtype
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    u = torch.finfo(compute).eps
    bias = options.get("linear_bias")

    def results(function, judging):
        def made(x):
            floating = x is not None and x.is_floating_point()
            return x if not floating else x.detach().to(judging).requires_grad_()

        given = {k: v.to(judging) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        args, given["linear_bias"] = [made(x) for x in (input, weight, target)], made(bias)
        loss = function(*args, **given)
        wanted = [x for x in (*args, given["linear_bias"]) if x is not None and x.requires_grad]
        upstream = torch.linspace(0.5, 1.5, max(1, loss.numel())).reshape(loss.shape)
        return loss.detach(), torch.autograd.grad(loss, wanted, upstream.to(loss.dtype))

    loss, grads = results(function, dtype)
    assert loss.dtype is compute
    options = {**options, "options": None}
    want, want_grads = results(peer, torch.float64)
    if want.dim() == 0 and want.isnan():
        assert loss == 0  # a mean of no row
        return

    x, w = input.detach().double(), weight.detach().double().flatten(0, -2)
    logits = x @ w.T
    delta = x.abs() @ w.abs().T
    if bias is not None:
        logits, delta = logits + bias.detach().double().reshape(-1), delta + bias.abs().max()
    logits = logits.reshape(*x.shape[:-1], *weight.shape[:-1])
    axis = x.dim() - 1
    depth = -logits.log_softmax(axis).min().clamp(max=-1)
    n_rows, n_classes = logits.numel() // weight.shape[0], weight.shape[0]
    given = options.get("weight")
    mass = 1.0 if given is None else given.detach().double().abs().max()
    if target.is_floating_point():
        mass = mass * target.detach().double().abs().sum(axis).max().clamp(min=1)
    if options.get("reduction", "mean") == "mean":
        # Every row's share, where not all have the same weight.
        smallest = 1.0 if given is None else given.detach().double().min()
        dropped = options.get("ignore_index")
        kept = n_rows if dropped is None else int((target != dropped).sum())
        mass = mass / (kept * smallest)
    slack = u * mass * (2 * x.shape[-1] * delta.max() + 2 * depth + n_classes + n_rows)
    summed = 1 if options.get("reduction") == "none" else n_rows

    def assert_close(got, want, room):
        assert got.shape == want.shape
        own = torch.finfo(got.dtype)
        rounded = own.eps / 2 * want.abs() + own.smallest_normal * own.eps
        assert ((got.double() - want).abs() <= room + rounded).all()

    assert_close(loss, want, 4 * slack * summed * depth)
    sizes = {"input": w.abs().sum(0).max(), "weight": x.abs().reshape(-1, x.shape[-1]).sum(0).max()}
    order = [sizes["input"], sizes["weight"]]
    order += [depth] if target.is_floating_point() else []
    order += [n_rows] if bias is not None else []
    for got, expected, size in zip(grads, want_grads, order, strict=True):
        assert got.dtype is dtype
        assert_close(got, expected, 4 * slack * size)
