"""What a wrong argument gets: each error, with the text that tells the caller what to do.

Patterns are whole messages: a message that loses its where, what, or way out turns these red.
"""

import re

import numpy as np
import pytest

import crossent
from crossent.options import OPTION_NAMES, Options

X = np.zeros((4, 3))
Y = np.array([0, 1, 2, 0])
IDS, PROB = Y[:, None], np.ones((4, 1))


def refuse(error, message, *args, call="cross_entropy", **kwargs):
    with pytest.raises(error) as caught:
        getattr(crossent, call)(*args, **kwargs)
    assert type(caught.value) is error
    assert str(caught.value) == f"{call}: {message}"


# Scalars ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": -0.1}, "label_smoothing must be in [0, 1], got -0.1"),
        ({"label_smoothing": 1.5}, "label_smoothing must be in [0, 1], got 1.5"),
        ({"label_smoothing": np.nan}, "label_smoothing must be in [0, 1], got nan"),
        ({"z_loss": -1}, "z_loss must be finite and at least 0, got -1.0"),
        ({"z_loss": np.inf}, "z_loss must be finite and at least 0, got inf"),
        ({"logit_scale": 0}, "logit_scale must be finite and above 0, got 0.0"),
        ({"logit_scale": -2.0}, "logit_scale must be finite and above 0, got -2.0"),
        ({"softcap": 0.0}, "softcap must be finite and above 0, got 0.0"),
        ({"softcap": np.nan}, "softcap must be finite and above 0, got nan"),
        ({"divisor": np.inf}, "divisor must be finite, got inf"),
        ({"divisor": np.nan}, "divisor must be finite, got nan"),
        ({"z_loss": 10**400}, "z_loss must be finite and at least 0, got inf"),
    ],
)
def test_a_number_out_of_range(options, message):
    refuse(ValueError, message, X, Y, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"logit_scale": 1e-60},
            "logit_scale must be finite and above 0, got 1e-60 (0.0 in float32)",
        ),
        ({"z_loss": 1e60}, "z_loss must be finite and at least 0, got 1e+60 (inf in float32)"),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_number_out_of_the_compute_dtype_s_range(options, message, dtype):
    refuse(ValueError, message, X.astype(dtype), Y, **options)
    assert np.isfinite(crossent.cross_entropy(X, Y, **options))


@pytest.mark.parametrize("name", ["label_smoothing", "z_loss", "logit_scale", "softcap", "divisor"])
@pytest.mark.parametrize(
    ("value", "got"),
    [
        ("1", "'1' (str)"),
        (True, "True (bool)"),
        (1j, "1j (complex)"),
        ([0.5], "[0.5] (list)"),
        (np.array([0.5]), "an array of shape (1,) and dtype float64"),
    ],
)
def test_a_number_of_the_wrong_type(name, value, got):
    expected = {"label_smoothing": "in [0, 1]", "z_loss": "finite and at least 0"}
    expected |= {"divisor": "finite"}
    text = expected.get(name, "finite and above 0")
    refuse(TypeError, f"{name} must be a real number {text}, got {got}", X, Y, **{name: value})


@pytest.mark.parametrize("name", ["label_smoothing", "z_loss", "logit_scale"])
def test_none_is_not_a_number(name):
    with pytest.raises(TypeError, match=f"{name} must be a real number .*, got None"):
        crossent.cross_entropy(X, Y, **{name: None})


@pytest.mark.parametrize(
    ("value", "got"), [(1.0, "1.0 (float)"), (True, "True (bool)"), (None, "None (NoneType)")]
)
def test_ignore_index_is_an_integer(value, got):
    refuse(TypeError, f"ignore_index must be an integer, got {got}", X, Y, ignore_index=value)


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**30, np.uint64(2**63)])
def test_ignore_index_is_an_int64(value):
    message = f"ignore_index must be an integer that int64 holds, got {int(value)}"
    refuse(ValueError, message, X, Y, ignore_index=value)


@pytest.mark.parametrize("value", ["avg", "", None, "Mean", 1, ["mean"], np.array(["mean", "sum"])])
def test_an_unknown_reduction(value):
    message = f"reduction must be 'mean', 'sum' or 'none', got {value!r}"
    refuse(ValueError, message, X, Y, reduction=value)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_divisor_goes_with_mean_alone(reduction):
    message = (
        "divisor replaces the divisor of reduction='mean', but reduction is "
        f"{reduction!r}; leave divisor=None or use reduction='mean'"
    )
    refuse(ValueError, message, X, Y, reduction=reduction, divisor=2.0)


# Logits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (X > 0, "bool"),
        (X.astype(complex), "complex128"),
        (X.astype(object), "object"),
        (X.astype(np.longdouble), np.dtype(np.longdouble).name),
        ("text", "<U4"),
        (None, "object"),
        ([10**30, 1], "object"),
        (np.zeros(3, "M8[s]"), "datetime64[s]"),
    ],
)
def test_logits_of_a_dtype_nobody_computes(value, name):
    message = (
        f"input must be float64, float32, float16, bfloat16 or integers, got {name}; "
        "convert it first, for example with input.astype('float64')"
    )
    refuse(TypeError, message, value, call="softmax")
    refuse(TypeError, message, value, Y)


def test_logits_without_a_class():
    refuse(
        ValueError,
        "input must have a class axis (at least one dimension), got a 0-d array; "
        "pass the logits of one row as a 1-d array",
        3.0,
        call="softmax",
    )
    for shape, axis in (((4, 0), -1), ((0, 4), 0), ((0,), 0)):
        refuse(
            ValueError,
            f"input has shape {shape} and so no class along axis {axis % len(shape)}; "
            "softmax needs at least one",
            np.zeros(shape),
            call="softmax",
            axis=axis,
        )


@pytest.mark.parametrize("axis", [2, -3, 10**20])
def test_an_axis_that_is_not_there(axis):
    message = f"axis {axis} does not exist in an input of 2 dimensions; expected -2 to 1"
    refuse(ValueError, message, X, call="log_softmax", axis=axis)


@pytest.mark.parametrize("axis", [1.0, None, True, (0, 1)])
def test_an_axis_that_is_no_integer(axis):
    message = f"axis must be an integer, got {axis!r} ({type(axis).__name__})"
    refuse(TypeError, message, X, Y, axis=axis)


def test_rows_of_unlike_lengths():
    with pytest.raises(ValueError, match=r"^softmax: input is no array: .*inhomogeneous"):
        crossent.softmax([[1.0, 2.0], [3.0]])
    with pytest.raises(ValueError, match=r"^cross_entropy: target is no array: .*inhomogeneous"):
        crossent.cross_entropy(X, [[1, 2], [3]])


# Targets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis", "at"), [((4, 3), 1, (2,)), ((3,), 0, ()), ((2, 3, 4), 1, (1, 3))]
)
@pytest.mark.parametrize("value", [3, -1, -101, 2**62])
@pytest.mark.parametrize(
    "call", ["cross_entropy", "cross_entropy_value_and_grad", "cross_entropy_stats"]
)
def test_a_target_out_of_range(shape, axis, at, value, call):
    target = np.zeros(shape[:axis] + shape[axis + 1 :], int)
    target[at] = value
    place = f"[{', '.join(map(str, at))}]" if at else ""
    message = (
        f"target{place} is {value}, but there are 3 classes (0 to 2); "
        f"use ignore_index={value} to skip such rows"
    )
    refuse(IndexError, message, np.zeros(shape), target, call=call, axis=axis)
    given = getattr(crossent, call)(np.zeros(shape), target, axis=axis, ignore_index=value)
    assert given is not None


def test_the_first_target_out_of_range_is_named_also_in_a_dropped_row():
    message = (
        "target[1] is 7, but there are 3 classes (0 to 2); use ignore_index=7 to skip such rows"
    )
    refuse(IndexError, message, X, [0, 7, 9, 1])
    refuse(IndexError, message, X, [0, 7, 9, 1], sample_weight=0)


def test_one_class_is_spoken_of_as_one():
    message = "target[0] is 1, but there is 1 class (0); use ignore_index=1 to skip such rows"
    refuse(IndexError, message, np.zeros((2, 1)), [1, 0])


def test_a_huge_unsigned_target_does_not_wrap():
    value = 2**64 - 100  # −100 in int64
    target = np.array([0, 1, value, 2], np.uint64)
    message = (
        f"target[2] is {value}, but there are 3 classes (0 to 2); "
        "convert it to a signed dtype first"
    )
    for ignore_index in (-100, 2**63 - 1):
        refuse(IndexError, message, X, target, ignore_index=ignore_index)


@pytest.mark.parametrize("dtype", ["bool", "complex128", "<U1", "object"])
def test_a_target_of_a_dtype_that_says_nothing(dtype):
    message = (
        "target must hold class indices (an integer dtype) or probabilities (a floating dtype), "
        f"got {dtype}; convert it with target.astype('int64') or target.astype('float32')"
    )
    refuse(TypeError, message, X, np.zeros(4).astype(dtype))


def test_indices_of_the_wrong_shape():
    message = (
        "class indices for an input of shape (4, 3) must have shape (4,), "
        "got a target of shape (3,) and dtype int64"
    )
    refuse(ValueError, message, X, Y[:3])
    message = message.replace("(3,)", "(4, 1)")
    refuse(ValueError, message, X, Y[:, None])


def test_probabilities_of_the_wrong_shape():
    message = (
        "probabilities for an input of shape (4, 3) must have the same shape, "
        "got a target of shape {} and dtype float32"
    )
    refuse(ValueError, message.format((3, 4)), X, np.zeros((3, 4), np.float32))
    refuse(
        ValueError,
        message.format((4,))
        + "; if they are class indices, convert them with target.astype('int64')",
        X,
        Y.astype(np.float32),
    )


@pytest.mark.parametrize(
    ("target", "prob", "reason"),
    [
        (Y, np.ones(4), "got target (4,) and target_prob (4,) for an input of shape (4, 3)"),
        (
            IDS,
            np.ones((4, 2)),
            "got target (4, 1) and target_prob (4, 2) for an input of shape (4, 3)",
        ),
        (IDS.astype(float), PROB, "target has dtype float64"),
        (IDS, PROB.astype(complex), "target_prob has dtype complex128"),
    ],
)
def test_sparse_targets_that_do_not_fit(target, prob, reason):
    message = (
        "target_prob gives the probabilities of the class ids in target, so both must have one "
        f"shape (K ids a row on the class axis, integers and floats); {reason}"
    )
    refuse(ValueError, message, X, target, target_prob=prob)


@pytest.mark.parametrize(("axis", "place"), [(1, "1, 2"), (0, "2, 1")])
def test_a_sparse_id_out_of_range(axis, place):
    ids = np.zeros((2, 3), int)
    ids[1, 2] = 5
    x = np.zeros((2, 5))
    if axis == 0:
        ids, x = ids.T, x.T
    message = (
        f"target[{place}] is 5, but there are 5 classes (0 to 4); "
        "use ignore_index=5 to skip such rows"
    )
    refuse(IndexError, message, x, ids, target_prob=np.ones(ids.shape), axis=axis)


def test_stats_take_indices_alone():
    message = (
        "target must hold class indices (an integer dtype), got float64; "
        "convert it with target.astype('int64')"
    )
    refuse(TypeError, message, X, X, call="cross_entropy_stats")


# Arrays beside the logits -------------------------------------------------------------------------


def test_weights_of_the_wrong_shape():
    refuse(
        ValueError,
        "weight must have shape (3,), one for each class, got (2,)",
        X,
        Y,
        weight=[1, 2],
    )
    refuse(ValueError, "weight must have shape (3,), one for each class, got ()", X, Y, weight=2.0)
    for shape in ((3,), (4, 1), (4, 3)):
        refuse(
            ValueError,
            "sample_weight must have shape (4,), one for each row (or broadcast to it), "
            f"got {shape}",
            X,
            Y,
            sample_weight=np.ones(shape),
        )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_are_finite(value):
    message = (
        f"weight must be finite in float64, but weight[1] is {value}; "
        "use 0 to drop a row or a class"
    )
    refuse(ValueError, message, X, Y, weight=[1, value, 2])
    message = message.replace("weight", "sample_weight").replace("[1]", "")
    refuse(ValueError, message, X, Y, sample_weight=value)


def test_weights_are_finite_in_the_compute_dtype():
    message = (
        "weight must be finite in float32, but weight[2] is inf; use 0 to drop a row or a class"
    )
    refuse(ValueError, message, X.astype(np.float16), Y, weight=[1, 2, 1e300])


@pytest.mark.parametrize("name", ["weight", "sample_weight"])
@pytest.mark.parametrize("value", ["abc", [True, False, True], [1j, 2, 3]])
def test_weights_are_real(name, value):
    message = f"{name} must be an array of real numbers, got {value!r} ({type(value).__name__})"
    refuse(TypeError, message, X, Y, **{name: value})


@pytest.mark.parametrize("name", ["input", "target", "weight", "sample_weight", "grad_output"])
def test_a_mask_is_not_lost_in_silence(name):
    given = {"input": X, "target": Y, "weight": np.ones(3), "sample_weight": np.ones(4)}
    given |= {"grad_output": np.ones(4), "reduction": "none"}
    plain = crossent.cross_entropy_value_and_grad(**given)
    masked = np.ma.masked_array(given[name], mask=np.zeros(given[name].shape))
    nothing_masked = crossent.cross_entropy_value_and_grad(**given | {name: masked})
    np.testing.assert_array_equal(nothing_masked.grad, plain.grad)
    assert type(nothing_masked.grad) is np.ndarray
    masked[0] = np.ma.masked
    refuse(
        TypeError,
        f"{name} must not have masked entries, whose mask would be lost; "
        f"fill them with {name}.filled(value) and drop rows by sample_weight=0 or ignore_index",
        call="cross_entropy_value_and_grad",
        **given | {name: masked},
    )


def test_grad_output_has_the_loss_s_shape():
    message = (
        "grad_output must have no dimensions with reduction='mean' (the shape of the loss), "
        "got (4,)"
    )
    call = "cross_entropy_value_and_grad"
    refuse(ValueError, message, X, Y, call=call, grad_output=np.ones(4))
    message = (
        "grad_output must have the rows' shape (4,) with reduction='none' (the shape of the "
        "loss), got (1,)"
    )
    refuse(ValueError, message, X, Y, call=call, grad_output=np.ones(1), reduction="none")


@pytest.mark.parametrize("value", [True, "1", 1j])
def test_grad_output_is_real(value):
    message = f"grad_output must be real numbers, got {value!r} ({type(value).__name__})"
    refuse(TypeError, message, X, Y, call="cross_entropy_value_and_grad", grad_output=value)


def test_a_direction_has_the_input_s_shape():
    message = "vector must have shape (4, 3), the input's, got (3,)"
    refuse(ValueError, message, X, Y, X[0], call="cross_entropy_hvp")
    with pytest.raises(TypeError, match=r"^cross_entropy_hvp: vector must be float64, .* got bool"):
        crossent.cross_entropy_hvp(X, Y, X > 0)


# The options as such ------------------------------------------------------------------------------


def test_defaults_pass_as_they_are():
    options = Options()
    assert options.checked("call", np.dtype(np.float32)) is options


@pytest.mark.parametrize("name", ["ignore_index", "label_smoothing", "z_loss", "logit_scale"])
def test_a_default_given_in_another_type_is_still_checked(name):
    default = getattr(Options(), name)
    for other in (str(default), bool(default)):  # True == 1.0 and False == 0.0
        with pytest.raises(TypeError, match=re.escape(f"{name} must be")):
            crossent.cross_entropy(X, Y, **{name: other})
    assert crossent.cross_entropy(X, Y, **{name: np.array(default)}) == crossent.cross_entropy(X, Y)


@pytest.mark.parametrize(
    "call", ["cross_entropy", "cross_entropy_value_and_grad", "cross_entropy_hessian"]
)
def test_every_function_opens_its_messages_with_its_name(call):
    for name in OPTION_NAMES:
        with pytest.raises((TypeError, ValueError), match=f"^{call}: "):
            getattr(crossent, call)(X, Y, **{name: object()})
