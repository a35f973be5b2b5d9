"""PyTorch's own samples of its cross-entropy, through both: the same losses and gradients.

Documented differences: the loss of 16-bit logits is float32, and a mean without a kept row is 0.
"""

import random

import pytest

pytest.importorskip("torch")
pytest.importorskip("expecttest")  # which PyTorch's samples import
import torch
from torch.nn.functional import cross_entropy as peer

from crossent.torch import CrossEntropyLoss, cross_entropy

pytestmark = pytest.mark.usefixtures("one_torch_thread")

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def entry():
    """PyTorch's entry for the function; what holds it takes seconds to import."""
    from torch.testing._internal.common_methods_invocations import op_db

    (found,) = (entry for entry in op_db if entry.name == "nn.functional.cross_entropy")
    return found


@pytest.fixture(scope="module")
def module_entry():
    from torch.testing._internal.common_modules import module_db

    (found,) = (entry for entry in module_db if entry.module_cls is torch.nn.CrossEntropyLoss)
    return found


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    random.seed(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("judge", ["own dtype", "float64"])
def test_the_function_s_samples(entry, judge, dtype):
    count = 0
    for count, sample in enumerate(entry.sample_inputs("cpu", dtype, requires_grad=True), 1):  # noqa: B007
        assert_agree(cross_entropy, sample.input, *sample.args, sample.kwargs, judge=judge)
    assert count >= 21


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_module_s_samples(module_entry, dtype):
    samples = module_entry.module_inputs_func(
        module_entry, device="cpu", dtype=dtype, requires_grad=True, training=True
    )
    assert len(samples) >= 105
    for sample in samples:
        options = sample.constructor_input.kwargs
        criterion = CrossEntropyLoss(**options)
        given = sample.forward_input.args

        def function(input, target, weight=None, *, criterion=criterion, **_):
            criterion.weight = weight
            return criterion(input, target)

        assert_agree(function, *given, options, judge="own dtype")
        assert_agree(function, *given, options, judge="float64")


def test_the_module_s_error_samples(module_entry):
    samples = module_entry.module_error_inputs_func(
        module_entry, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    )
    assert samples
    for sample in samples:
        made = sample.module_error_input
        given = made.forward_input.args
        if "ignore_index is not supported" in sample.error_regex:
            continue  # here it has no effect on probabilities: a documented difference
        with pytest.raises(sample.error_type, match=sample.error_regex):
            torch.nn.CrossEntropyLoss(**made.constructor_input.kwargs)(*given)
        with pytest.raises((TypeError, ValueError), match=r"^(cross_entropy|CrossEntropyLoss): "):
            CrossEntropyLoss(**made.constructor_input.kwargs)(*given)


@pytest.mark.parametrize(
    ("input", "target", "options"),
    [
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), {}),
        (torch.zeros(2, 3), torch.zeros(2, 4), {}),
        (torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64), {}),
        (torch.zeros(2, 3), torch.tensor([0, 3]), {}),
        (torch.zeros(2, 3), torch.tensor([0, -1]), {}),
        (torch.zeros(2, 3), torch.tensor([0, 1]), {"weight": torch.ones(4)}),
        (torch.zeros(2, 3), torch.tensor([0, 1]), {"label_smoothing": 1.1}),
        (torch.zeros(2, 3), torch.tensor([0, 1]), {"reduction": "average"}),
        (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 1]), {}),
        (torch.zeros(2, 3, dtype=torch.complex64), torch.tensor([0, 1]), {}),
        ([[0.0, 1.0]], torch.tensor([0]), {}),
        (torch.zeros(2, 3), [0, 1], {}),
        (torch.zeros(2, 3), torch.tensor([True, False]), {}),
        (torch.zeros(()), torch.tensor(0), {}),
    ],
    ids=repr,
)
def test_what_pytorch_refuses_is_refused(input, target, options):
    for function in (peer, cross_entropy):
        with pytest.raises((IndexError, RuntimeError, TypeError, ValueError)):
            function(input, target, **options)


def test_a_mean_without_a_kept_row_is_0_and_pytorch_s_is_nan():
    input, target = torch.randn(2, 3, requires_grad=True), torch.tensor([-100, -100])
    loss = cross_entropy(input, target)
    loss.backward()
    assert loss == 0
    assert not input.grad.any()
    assert peer(input, target).isnan()


# The comparison -----------------------------------------------------------------------------------


def assert_agree(function, input, target, options, *, judge):
    """Compare loss and gradients with PyTorch's, on the same numbers in its own dtype or float64.

    Rounding unit u; L the largest lse − z_j of all rows. A log-probability carries 2L + V
    roundings, and p relatively as many; a row's loss weighs them by Σ|q| ≤ mass; N rows are added.
    "mean" divides by D, known to N·Σ|w_y|·u, where w may have both signs.
    """
    dtype = input.dtype
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    judging = dtype if judge == "own dtype" else torch.float64
    u = max(torch.finfo(compute).eps, torch.finfo(judging).eps)

    args = [input, target]
    given = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in args]
    loss = function(*given, **options)
    assert loss.dtype is compute
    upstream = torch.rand(loss.shape, dtype=judging).to(dtype) + 0.5
    wanted = [y for y in given if y.requires_grad]
    grads = torch.autograd.grad(loss, wanted, upstream.to(loss.dtype))

    def judged(x):
        return x.detach().to(judging) if x.is_floating_point() else x

    theirs = [judged(x).requires_grad_(x.is_floating_point()) for x in args]
    converted = {k: judged(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    want = peer(*theirs, **converted)
    want_grads = torch.autograd.grad(
        want, [y for y in theirs if y.requires_grad], upstream.to(judging)
    )

    axis = min(1, input.dim() - 1)
    n_classes = input.shape[axis]
    n_rows = input.numel() // n_classes
    depth = -input.detach().double().log_softmax(axis).min()
    weight = options.get("weight")
    weight = torch.ones(n_classes).double() if weight is None else weight.detach().double()
    mass = weight.abs().max()
    divisor = torch.ones(()).double()
    unsure = 0.0  # of the divisor
    if target.is_floating_point():
        mass = mass * target.detach().double().abs().sum(axis).max().clamp(min=1)
    reduction = options.get("reduction", "mean")
    if reduction == "mean" and not target.is_floating_point():
        counted = weight[target[target != options.get("ignore_index", -100)]]
        if not counted.numel():
            assert want.isnan()
            assert loss == 0
            return
        divisor = counted.sum().abs()
        unsure = u * n_rows * counted.abs().sum() / divisor
    elif reduction == "mean":
        divisor = divisor * n_rows
    room = u * (2 * depth + n_classes + n_rows) * mass / divisor
    summed = 1 if reduction == "none" else n_rows

    def assert_close(got, want, room):
        want = want.double()
        own = torch.finfo(got.dtype)
        rounded = own.eps / 2 * want.abs() + own.smallest_normal * own.eps
        assert ((got.double() - want).abs() <= room + unsure * want.abs() + rounded).all()

    assert_close(loss.detach(), want.detach(), room * summed * depth.clamp(min=1))
    for i, (got, expected) in enumerate(zip(grads, want_grads, strict=True)):
        assert got.dtype is dtype
        assert got.shape == expected.shape
        size = depth.clamp(min=1) if i else 1  # ∂/∂target_j holds lse − z_j
        assert_close(got, expected, 2 * room * upstream.double().abs().max() * size)
