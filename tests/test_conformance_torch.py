"""`crossent` against `torch.nn.functional.cross_entropy`: what is the same, what differs and why.

The agreement is over a grid of PyTorch's own options in float64. Differences are tested one by one,
PyTorch's side included where it is stable; docs/conformance.md lists them under the tests' names.
"""

import itertools
import math

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from torch.nn.functional import cross_entropy as torch_cross_entropy

import crossent

V = 5
LAYOUTS = {  # shapes of the logits; PyTorch's class axis is 1, or 0 for one row
    "(C,)": (V,),
    "(N,C)": (6, V),
    "(N,C,d1)": (3, V, 4),
    "(N,C,d1,d2)": (2, V, 3, 4),
    "(N,C,d1,d2,d3)": (2, V, 2, 1, 3),
}
WEIGHTS = {
    "unweighted": None,
    "positive": [0.3, 1.0, 2.5, 0.7, 1.2],
    "zeros": [0.0, 1.0, 0.0, 0.7, 1.2],
    "negatives": [-0.3, 1.0, 2.5, -0.1, 1.2],
}
SMOOTHING = (0.0, 0.1, 1.0)
REDUCTIONS = ("mean", "sum", "none")
INF, NAN = math.inf, math.nan

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def peer(input, target, *, dtype=torch.float64, upstream=None, **options):
    """Return PyTorch's loss and its gradient in the logits, times `upstream`."""
    logits = torch.tensor(np.asarray(input, np.float64), dtype=dtype, requires_grad=True)
    if options.get("weight") is not None:
        options["weight"] = torch.tensor(options["weight"], dtype=dtype)
    loss = torch_cross_entropy(logits, torch.tensor(np.asarray(target)), **options)
    loss.backward(torch.ones_like(loss) if upstream is None else torch.tensor(upstream))
    return loss.detach().numpy(), logits.grad.numpy()


def ours(input, target, *, dtype=np.float64, upstream=None, **options):
    input = np.asarray(input, dtype)
    return crossent.cross_entropy_value_and_grad(
        input, np.asarray(target), axis=min(1, input.ndim - 1), grad_output=upstream, **options
    )


def assert_same(input, target, *, rng, **options):
    """Compare loss and gradient within what PyTorch's float64 arithmetic can lose.

    A row's loss is a sum of V products q_j·(lse − z_j), its gradient Q·p − q. With L the largest
    lse − z_j the log-probabilities carry 2L + V roundings, hence p a relative error of as many.
    The largest |Σ_j q_j·…| of all rows stands for each; "mean" divides a sum of N such rows.
    """
    reduction = options["reduction"]
    axis = min(1, input.ndim - 1)
    log_prob = torch.log_softmax(torch.tensor(input), axis).numpy()
    rows = log_prob.size // V
    shape = log_prob.max(axis).shape if reduction == "none" else ()
    upstream = rng.uniform(0.5, 2.0, shape)
    expected_loss, expected_grad = peer(input, target, upstream=upstream, **options)
    loss, grad = ours(input, target, upstream=upstream, **options)

    weight = np.ones(V) if options["weight"] is None else np.array(options["weight"])
    mass = np.abs(weight).max() * (
        1 if target.dtype == np.int64 else np.abs(target).sum(axis).max()
    )
    if reduction == "mean" and target.dtype == np.int64:
        divisor = abs(weight[target[target != options["ignore_index"]]].sum())
    else:
        divisor = rows if reduction == "mean" else 1
    depth = np.abs(log_prob).max()
    unit = np.finfo(np.float64).eps * (2 * depth + V + rows) * mass
    summed = 1 if reduction == "none" else rows / divisor
    np.testing.assert_allclose(loss, expected_loss, rtol=0, atol=unit * depth * summed)
    grad_atol = 2 * unit * upstream.max() / (1 if reduction == "none" else divisor)
    np.testing.assert_allclose(grad, expected_grad, rtol=0, atol=grad_atol)


@pytest.mark.parametrize("shape", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("ignore_index", [-100, 2, -1, 12])
def test_agrees_on_indices(shape, weight, ignore_index):
    rng = np.random.default_rng(0)
    input = 3 * rng.normal(size=shape)
    axis = min(1, len(shape) - 1)
    target = np.asarray(rng.integers(V, size=shape[:axis] + shape[axis + 1 :]))
    if target.ndim:
        target.flat[::4] = ignore_index  # some ignored, wherever the index lies
        target.flat[1] = 1  # and one kept with a weight that is not 0
    else:
        target[()] = 3
    for label_smoothing, reduction in itertools.product(SMOOTHING, REDUCTIONS):
        assert_same(
            input,
            target,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            rng=rng,
        )


@pytest.mark.parametrize("shape", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("normalised", [True, False])
def test_agrees_on_probabilities(shape, weight, normalised):
    """Also where a distribution is negative somewhere or does not sum to 1."""
    rng = np.random.default_rng(1)
    input = 3 * rng.normal(size=shape)
    axis = min(1, len(shape) - 1)
    target = rng.normal(size=shape)
    if normalised:
        target = crossent.softmax(target, axis=axis)
    for label_smoothing, reduction in itertools.product(SMOOTHING, REDUCTIONS):
        assert_same(
            input,
            target,
            weight=weight,
            label_smoothing=label_smoothing,
            reduction=reduction,
            rng=rng,
        )


@pytest.mark.parametrize(
    ("input", "target"),
    [
        ([[NAN, 2.0], [1.0, 3.0]], [0, 1]),
        ([[INF, 2.0], [1.0, 3.0]], [0, 1]),
        ([[-INF, -INF], [1.0, 3.0]], [0, 1]),
        ([[-INF, 2.0], [1.0, 3.0]], [0, 1]),
        ([[-INF, 2.0], [1.0, 3.0]], [1, 1]),
        ([[-INF, 2.0], [1.0, 3.0]], [[0.25, 0.75], [0.5, 0.5]]),
    ],
    ids=["nan", "+inf", "all -inf", "target -inf", "other -inf", "probability at -inf"],
)
def test_agrees_on_logits_that_are_not_finite(input, target):
    loss, grad = ours(input, target, reduction="none")
    expected_loss, expected_grad = peer(input, target, reduction="none")
    tolerance = 8 * np.finfo(np.float64).eps
    np.testing.assert_allclose(loss, expected_loss, rtol=tolerance)
    np.testing.assert_allclose(grad, expected_grad, rtol=tolerance)


def test_agrees_that_kept_rows_over_a_divisor_of_0_are_nan():
    for loss, grad in (f([[1.0, 2.0]], [0], weight=[0.0, 1.0]) for f in (ours, peer)):
        assert np.isnan(loss)
        assert np.isnan(grad).all()


# Differences ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 3])
def test_differs_mean_of_no_kept_row(rows):
    input, target = np.ones((rows, V)), np.full(rows, -100)
    loss, grad = ours(input, target)
    assert loss == 0
    np.testing.assert_array_equal(grad, np.zeros((rows, V)))
    assert np.isnan(peer(input, target)[0])


def test_differs_weights_that_cancel_to_a_divisor_of_0():
    input, target, weight = [[1.0, 2.0], [1.0, 3.0]], [0, 1], [-1.0, 1.0]
    loss, grad = ours(input, target, weight=weight)
    assert np.isnan(loss)
    assert np.isnan(grad).all()
    assert np.isinf(peer(input, target, weight=weight)[0])


def test_differs_nan_in_an_ignored_row():
    input, target = [[NAN, 2.0], [1.0, 3.0]], [-100, 1]
    _, grad = ours(input, target)
    np.testing.assert_array_equal(grad[0], [0, 0])
    assert np.isnan(peer(input, target)[1][0]).all()


MASKED = {
    "distribution": ([[-INF, 2.0, 1.0]], [[0.0, 0.5, 0.5]], {}),
    "smoothing": ([[-INF, 2.0, 1.0]], [1], {"label_smoothing": 0.1, "weight": [0.0, 1.0, 1.0]}),
    "target": ([[-INF, 2.0, 1.0], [1.0, 2.0, 3.0]], [0, 1], {"weight": [0.0, 1.0, 1.0]}),
}


@pytest.mark.parametrize(("input", "target", "options"), MASKED.values(), ids=MASKED)
def test_differs_minus_inf_at_a_class_of_no_weight(input, target, options):
    """0·(−inf) is 0 here: the loss is that of any finite logit too low to count."""
    far = np.where(np.isinf(input), -1e6, input)
    loss, grad = ours(input, target, **options)
    expected_loss, expected_grad = peer(far, target, **options)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-15)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-15)
    assert np.isnan(peer(input, target, **options)[0])


@pytest.mark.parametrize(
    ("dtype", "peer_dtype", "margin"),
    [(np.float32, torch.float32, 17.5), (np.float64, torch.float64, 40.0)],
    ids=["float32", "float64"],
)
def test_differs_confident_row(dtype, peer_dtype, margin):
    """The loss is log1p(e^−margin), the target's gradient minus the other class's probability."""
    loss, grad = ours([[margin, 0.0]], [0], dtype=dtype)
    tolerance = 4 * np.finfo(dtype).eps
    np.testing.assert_allclose(loss, math.log1p(math.exp(-margin)), rtol=tolerance)
    other = 1 / (1 + math.exp(margin))
    np.testing.assert_allclose(grad, [[-other, other]], rtol=tolerance)
    loss, grad = peer([[margin, 0.0]], [0], dtype=peer_dtype)
    assert loss == 0
    assert grad[0, 0] == 0
    assert grad[0, 1] > 0


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_differs_dtype_of_a_16_bit_loss(name):
    dtype = np.float16 if name == "float16" else pytest.importorskip("ml_dtypes").bfloat16
    loss, grad = ours([[1.0, 2.0]], [0], dtype=dtype)
    assert loss.dtype == np.float32
    assert grad.dtype == dtype
    assert loss == pytest.approx(math.log1p(math.e), rel=2**-22)
    logits = torch.tensor([[1.0, 2.0]], dtype=getattr(torch, name))
    assert torch_cross_entropy(logits, torch.tensor([0])).dtype == logits.dtype


def test_differs_float16_beyond_its_range():
    """65,520 rows and 8192·ε/V terms do not fit float16's range of 65,504; float32's they do."""
    rows = 65520
    loss, _ = ours(np.zeros((rows, 2)), np.zeros(rows, int), dtype=np.float16)
    assert loss == pytest.approx(math.log(2), rel=2**-22)
    loss, _ = ours(np.zeros((1, 8192)), [0], dtype=np.float16, label_smoothing=0.1)
    assert loss == pytest.approx(math.log(8192), rel=2**-22)


@pytest.mark.parametrize("value", [-0.1, NAN])
def test_differs_label_smoothing_out_of_range(value):
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\]"):
        ours([[1.0, 2.0]], [0], label_smoothing=value)
    accepted, _ = peer([[1.0, 2.0]], [0], label_smoothing=value)
    np.testing.assert_array_equal(accepted, peer([[1.0, 2.0]], [0])[0])


@pytest.mark.parametrize("value", [INF, NAN])
def test_differs_weight_that_is_not_finite(value):
    with pytest.raises(ValueError, match=r"weight must be finite in float64, but weight\[1\]"):
        ours([[1.0, 2.0]], [0], weight=[1.0, value])
    peer([[1.0, 2.0]], [0], weight=[1.0, value])


@pytest.mark.parametrize("target", [2, -1])
def test_differs_text_of_an_out_of_range_target(target):
    """Both raise IndexError; here it names the row, the value and the classes."""
    with pytest.raises(IndexError, match=rf"target\[1\] is {target}, but there are 2 classes"):
        ours([[1.0, 2.0], [1.0, 2.0]], [0, target])
    with pytest.raises(IndexError, match=f"Target {target} is out of bounds"):
        peer([[1.0, 2.0], [1.0, 2.0]], [0, target])


def test_differs_ignore_index_beside_probabilities():
    input, target = [[1.0, 2.0]], [[0.5, 0.5]]
    np.testing.assert_array_equal(ours(input, target, ignore_index=1)[0], ours(input, target)[0])
    with pytest.raises(RuntimeError, match="ignore_index"):
        peer(input, target, ignore_index=1)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
def test_differs_integer_dtype_of_indices(dtype):
    input = [[1.0, 2.0]]
    assert ours(input, np.array([1], dtype))[0] == ours(input, [1])[0]
    with pytest.raises(RuntimeError, match="expected target dtype"):
        peer(input, np.array([1], dtype))


def test_differs_integer_logits():
    assert crossent.cross_entropy([[1, 2]], [0]) == crossent.cross_entropy([[1.0, 2.0]], [0])
    with pytest.raises(NotImplementedError):
        torch_cross_entropy(torch.tensor([[1, 2]]), torch.tensor([0]))


def test_differs_default_class_axis():
    input, target = np.random.default_rng(2).normal(size=(2, 3, 3)), np.array([[0, 1, 2]] * 2)
    last = crossent.cross_entropy(input, target)
    np.testing.assert_array_equal(last, ours(np.moveaxis(input, -1, 1), target)[0])
    assert last != ours(input, target)[0]
