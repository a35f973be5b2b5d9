"""The fused head from PyTorch: bad arguments get the texts of the NumPy functions."""

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from torch.nn import functional

import crossent
from crossent.torch import linear_cross_entropy, linear_cross_entropy_stats

X, W, B, Y = np.zeros((4, 3)), np.zeros((5, 3)), np.zeros(5), np.array([0, 1, 2, 4])
IDS, PROB = Y[:, None], np.ones((4, 1))
BAD = {
    "no feature axis": (np.zeros(()), W, Y, {}),
    "weights of other features": (X, np.zeros((5, 2)), Y, {}),
    "weights turned": (X, W.T, Y, {}),
    "weights of one axis": (X, np.zeros(3), Y, {}),
    "no class": (X, np.zeros((0, 3)), Y, {}),
    "bias too long": (X, W, Y, {"linear_bias": np.zeros(6)}),
    "bias of one class": (X, W, Y, {"linear_bias": np.zeros(())}),
    "indices of another length": (X, W, Y[:3], {}),
    "indices of the features' shape": (X, W, np.zeros((4, 3), int), {}),
    "probabilities of the features' shape": (X, W, X, {}),
    "indices as floats": (X, W, Y.astype(float), {}),
    "booleans": (X, W, Y > 0, {}),
    "sparse of two shapes": (X, W, IDS, {"target_prob": np.ones((4, 2))}),
    "sparse without a class axis": (X, W, Y, {"target_prob": np.ones(4)}),
    "class weights too short": (X, W, Y, {"weight": np.ones(3)}),
    "row weights too short": (X, W, Y, {"sample_weight": np.ones(3)}),
    "smoothing": (X, W, Y, {"label_smoothing": 1.5}),
    "divisor": (X, W, Y, {"divisor": 2.0, "reduction": "sum"}),
    "reduction": (X, W, Y, {"reduction": "avg"}),
}
BAD_NUMBERS = {
    "above": (X, W, Y + 1, {}),
    "below": (X, W, Y - 1, {}),
    "sparse": (X, W, IDS + 1, {"target_prob": PROB}),
    "class weight": (X, W, Y, {"weight": np.array([1.0, np.inf, 1.0, 1.0, 1.0])}),
}


def tensor(value):
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def told(function, x, w, target, options):
    with pytest.raises((TypeError, ValueError, IndexError)) as caught:
        function(x, w, target, **options)
    return type(caught.value), str(caught.value)


def by_torch(x, w, target, **options):
    return linear_cross_entropy(
        tensor(x), tensor(w), tensor(target), **{k: tensor(v) for k, v in options.items()}
    )


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_shapes_dtypes_and_options_have_the_error_of_numpy(case):
    want = told(crossent.linear_cross_entropy, *case)

    def under_vjp(x, w, target, **options):
        torch.func.vjp(lambda x: by_torch(x, w, target, **options), tensor(x))

    assert told(by_torch, *case) == want
    assert told(under_vjp, *case) == want


@pytest.mark.parametrize("case", BAD_NUMBERS.values(), ids=BAD_NUMBERS)
def test_numbers_have_the_error_of_numpy(case):
    want = told(crossent.linear_cross_entropy, *case)
    assert told(by_torch, *case) == want
    x, w, target, options = case
    weighted = {"sample_weight": torch.ones((), requires_grad=True), **options}
    assert told(by_torch, x, w, target, weighted) == want


def test_more_axes_have_errors_that_name_the_logits():
    w, y = torch.zeros(5, 2, 3), torch.zeros(4, 2, dtype=torch.int64)
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"class indices for logits of shape \(4, 5, 2\) must"):
        linear_cross_entropy(x, w, y[:, 0])
    with pytest.raises(IndexError, match=r"^linear_cross_entropy: target\[3, 1\] is 5, but"):
        linear_cross_entropy(x, w, torch.tensor([[0, 0], [1, 1], [2, 2], [3, 5]]))
    with pytest.raises(ValueError, match=r"input must have shape \(N, 3\), since linear_weight"):
        linear_cross_entropy(x[0], w, y[0])
    with pytest.raises(ValueError, match=r"linear_bias must have shape \(5, 2\), that of"):
        linear_cross_entropy(x, w, y, linear_bias=torch.zeros(10))
    with pytest.raises(ValueError, match=r"^linear_cross_entropy_stats: linear_weight must have"):
        linear_cross_entropy_stats(x, w, y)


@pytest.mark.parametrize("name", ["linear_weight", "linear_bias"])
def test_operands_have_one_dtype_and_device(name):
    """As `linear` wants them; it has no other text for it than of its matrices."""
    x, y = tensor(X), tensor(Y)
    given = {"linear_weight": tensor(W), "linear_bias": tensor(B)}
    with pytest.raises(TypeError, match=f"{name} must have the dtype of input, float64, got fl"):
        linear_cross_entropy(x, target=y, **given | {name: given[name].float()})
    with pytest.raises(RuntimeError, match="dtype"):
        functional.linear(x, *(given | {name: given[name].float()}).values())
    with pytest.raises(ValueError, match=f"{name} must be on cpu, as input is, got a tensor on me"):
        linear_cross_entropy(x, target=y, **given | {name: given[name].to("meta")})
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got "):
        linear_cross_entropy(x, target=y, **given | {name: [[1.0]]})


def test_other_arguments_that_are_no_tensors():
    x, w, y = tensor(X), tensor(W), tensor(Y)
    for bad in ((X, w, y), (x, w, Y), (x, w, None)):
        with pytest.raises(TypeError, match="must be a tensor"):
            linear_cross_entropy(*bad)
    text = r"input must be float64, float32, float16 or bfloat16, got int64; convert it first, for "
    with pytest.raises(TypeError, match=text + r"example with input\.float\(\)$"):
        linear_cross_entropy(x.long(), w.long(), y)
    with pytest.raises(TypeError, match="target must hold class indices"):
        linear_cross_entropy_stats(x, w, torch.zeros(4, 5))


@pytest.mark.parametrize("name", ["weight", "divisor", "logit_scale", "z_loss", "softcap"])
def test_what_would_get_no_gradient_is_refused(name):
    value = torch.ones(5 if name == "weight" else ()).double().requires_grad_()
    with pytest.raises(ValueError, match=f"^linear_cross_entropy: {name} requires a gradient"):
        by_torch(X, W, Y, **{name: value})
