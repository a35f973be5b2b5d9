"""What a wrong argument of the fused head gets; patterns are whole messages, as in test_options."""

import numpy as np
import pytest

import crossent
from crossent import LinearGrad

X, W, B, Y = np.zeros((4, 2)), np.zeros((3, 2)), np.zeros(3), np.array([0, 1, 2, 0])
CLASSES = "(V, 2), one row for each class and one column for each feature of input"


def refuse(error, message, *args, call="linear_cross_entropy", **kwargs):
    with pytest.raises(error) as caught:
        getattr(crossent, call)(*args, **kwargs)
    assert type(caught.value) is error
    assert str(caught.value) == f"{call}: {message}"


@pytest.mark.parametrize(
    ("error", "message", "args"),
    [
        (
            ValueError,
            "input must have a feature axis (at least one dimension), got a 0-d array; "
            "pass the features of one row as a 1-d array",
            (1.0, W, Y),
        ),
        (
            TypeError,
            "input must be float64, float32, float16, bfloat16 or integers, got complex128; "
            "convert it first, for example with input.astype('float64')",
            (X * 1j, W, Y),
        ),
        (
            TypeError,
            "linear_weight must be float64, float32, float16, bfloat16 or integers, got bool; "
            "convert it first, for example with linear_weight.astype('float64')",
            (X, W == 0, Y),
        ),
        (
            ValueError,
            f"linear_weight must have shape {CLASSES}, got (2, 3); pass linear_weight.T",
            (X, W.T, Y),
        ),
        (ValueError, f"linear_weight must have shape {CLASSES}, got (6,)", (X, W.reshape(6), Y)),
        (
            ValueError,
            "linear_weight must have at least one row (one for each class), got shape (0, 2)",
            (X, W[:0], Y),
        ),
        (
            ValueError,
            "class indices for logits of shape (4, 3) must have shape (4,), got a target of "
            "shape (3,) and dtype int64",
            (X, W, Y[:3]),
        ),
        (
            ValueError,
            "probabilities for logits of shape (4, 3) must have the same shape, got a target of "
            "shape (4, 2) and dtype float64",
            (X, W, X),
        ),
        (
            IndexError,
            "target[2] is 3, but there are 3 classes (0 to 2); "
            "use ignore_index=3 to skip such rows",
            (X, W, [0, 1, 3, 0]),
        ),
    ],
)
def test_arguments_that_do_not_fit(error, message, args):
    for name in ("", "_value_and_grad", "_stats"):
        if name == "_stats" and "probabilities" in message:
            continue
        refuse(error, message, *args, call=f"linear_cross_entropy{name}")
    refuse(error, message, *args, LinearGrad(None, None, None), call="linear_cross_entropy_hvp")


def test_options_that_do_not_fit():
    refuse(
        ValueError,
        "linear_bias must have shape (3,), one for each class, got (2,)",
        *(X, W, Y),
        linear_bias=B[:2],
    )
    refuse(
        ValueError,
        "target_prob gives the probabilities of the class ids in target, so both must have one "
        "shape (K ids a row on the class axis, integers and floats); got target (4, 1) and "
        "target_prob (4,) for logits of shape (4, 3)",
        *(X, W, Y[:, None]),
        target_prob=np.ones(4),
    )
    refuse(
        ValueError,
        "label_smoothing must be in [0, 1], got 2.0",
        *(X, W, Y),
        label_smoothing=2,
    )
    refuse(
        TypeError,
        "target must hold class indices (an integer dtype), got float64; convert it with "
        "target.astype('int64')",
        *(X, W, np.zeros((4, 3))),
        call="linear_cross_entropy_stats",
    )
    refuse(
        ValueError,
        "grad_output must have no dimensions with reduction='mean' (the shape of the loss), "
        "got (4,)",
        *(X, W, Y),
        call="linear_cross_entropy_value_and_grad",
        grad_output=np.ones(4),
    )


@pytest.mark.parametrize("wrt", ["bias", ("input", "target"), (0,)])
def test_gradients_in_something_else(wrt):
    refuse(
        ValueError,
        f"wrt must name some of 'input', 'linear_weight', 'linear_bias', got {wrt!r}; for "
        "gradients in other arguments use cross_entropy_value_and_grad or another front end",
        *(X, W, Y),
        call="linear_cross_entropy_value_and_grad",
        wrt=wrt,
    )


@pytest.mark.parametrize(
    ("error", "message", "vector"),
    [
        (
            TypeError,
            "vector must be a LinearGrad of directions in input, linear_weight and linear_bias "
            "(None: held fixed), got an array of shape (3, 2) and dtype float64",
            W,
        ),
        (
            ValueError,
            "vector.linear_bias is a direction in linear_bias, which is None; pass linear_bias, or "
            "None in vector",
            (None, None, B),
        ),
        (
            ValueError,
            "vector.linear_weight must have shape (3, 2), that of linear_weight, got (2, 3)",
            (None, W.T, None),
        ),
        (
            TypeError,
            "vector.input must be float64, float32, float16, bfloat16 or integers, got bool; "
            "convert it first, for example with vector.input.astype('float64')",
            (X == 0, None, None),
        ),
    ],
)
def test_directions_that_do_not_fit(error, message, vector):
    refuse(error, message, *(X, W, Y, vector), call="linear_cross_entropy_hvp")


def test_nothing_to_differentiate():
    found = crossent.linear_cross_entropy_hvp(X, W, Y, LinearGrad(None, None, None))
    assert found == LinearGrad(None, None, None)
