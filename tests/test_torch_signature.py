"""The PyTorch front end's signatures, its error texts, and what it takes that PyTorch does not."""

import inspect
import math
from inspect import Parameter

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import crossent
import crossent.torch
from crossent.options import OPTION_NAMES, Options

pytestmark = pytest.mark.usefixtures("one_torch_thread")

PER_CALL = ("sample_weight", "divisor", "target_prob")  # in a module's call, not its constructor


# Signatures ---------------------------------------------------------------------------------------


def test_public_names():
    assert set(crossent.torch.__all__) == {
        "CrossEntropyLoss",
        "LinearCrossEntropyLoss",
        "RowStats",
        "cross_entropy",
        "cross_entropy_stats",
        "linear_cross_entropy",
        "linear_cross_entropy_stats",
    }


def parameters(function, kind):
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in found if p.kind is kind and p.name != "self"]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (crossent.torch.cross_entropy, torch.nn.functional.cross_entropy),
        (crossent.torch.CrossEntropyLoss.__init__, torch.nn.CrossEntropyLoss.__init__),
        (crossent.torch.CrossEntropyLoss.forward, torch.nn.CrossEntropyLoss.forward),
    ],
    ids=["function", "constructor", "forward"],
)
def test_the_positional_arguments_are_pytorch_s(ours, theirs):
    positional = Parameter.POSITIONAL_OR_KEYWORD
    assert parameters(ours, positional) == parameters(theirs, positional)
    kinds = {p.kind for p in inspect.signature(ours).parameters.values()}
    assert kinds <= {positional, Parameter.KEYWORD_ONLY}


def test_the_other_options_come_by_name_with_the_defaults_of_options():
    defaults = {name: getattr(Options(), name) for name in OPTION_NAMES}
    named = dict(parameters(crossent.torch.cross_entropy, Parameter.KEYWORD_ONLY))
    positional = dict(parameters(crossent.torch.cross_entropy, Parameter.POSITIONAL_OR_KEYWORD))
    given = {k: v for k, v in (positional | named).items() if k in OPTION_NAMES}
    assert given == defaults
    assert named.keys() - OPTION_NAMES == {"dim"}
    assert named["dim"] is None
    loss = crossent.torch.CrossEntropyLoss
    made = dict(parameters(loss.__init__, Parameter.KEYWORD_ONLY))
    called = dict(parameters(loss.forward, Parameter.KEYWORD_ONLY))
    assert made | called == named
    assert tuple(called) == PER_CALL


def test_the_statistics_take_the_options_that_mean_something_to_them():
    theirs = dict(parameters(crossent.cross_entropy_stats, Parameter.KEYWORD_ONLY))
    ours = dict(parameters(crossent.torch.cross_entropy_stats, Parameter.KEYWORD_ONLY))
    assert theirs.pop("axis") == -1
    assert ours.pop("dim") is None
    assert ours == theirs
    assert crossent.torch.RowStats._fields == crossent.RowStats._fields


@pytest.mark.parametrize(
    ("size_average", "reduce", "reduction"),
    [(True, None, "mean"), (False, None, "sum"), (None, False, "none"), (False, True, "sum")],
)
def test_pytorch_s_deprecated_arguments_work_in_their_places(size_average, reduce, reduction):
    input, target = torch.randn(3, 4), torch.tensor([0, 1, 3])
    given = (input, target, None, size_average, -100, reduce)
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        found = crossent.torch.cross_entropy(*given)
    want = crossent.torch.cross_entropy(input, target, reduction=reduction)
    assert torch.equal(found, want)
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        criterion = crossent.torch.CrossEntropyLoss(None, size_average, -100, reduce)
    assert torch.equal(criterion(input, target), want)


def test_a_subclass_may_take_the_call_over():
    class Noted(torch.Tensor):
        calls = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.calls.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    input, target = torch.randn(2, 3), torch.tensor([0, 1])
    found = crossent.torch.cross_entropy(input.as_subclass(Noted), target)
    assert Noted.calls[0] is crossent.torch.cross_entropy
    assert torch.equal(found.as_subclass(torch.Tensor), crossent.torch.cross_entropy(input, target))


def test_statistics_of_a_subclass():
    class Mine(torch.Tensor):
        pass

    input, target = torch.randn(2, 3, requires_grad=True), torch.tensor([0, 1])
    mine = crossent.torch.cross_entropy_stats(input.as_subclass(Mine), target)
    for found, plain in zip(mine, crossent.torch.cross_entropy_stats(input, target), strict=True):
        assert torch.equal(torch.Tensor(found), plain)
    (slope,) = torch.autograd.grad(mine.entropy.sum(), input)
    assert slope.abs().sum() > 0


def test_a_view_with_its_sign_pending():
    input = torch.randn(4, 3, dtype=torch.complex64).conj().imag
    assert input.is_neg()
    target = torch.tensor([0, 1, 2, 0])
    found = crossent.torch.cross_entropy(input.requires_grad_(), target)
    plain = input.detach().clone().requires_grad_()
    assert torch.equal(found, crossent.torch.cross_entropy(plain, target))
    found.backward()


def test_zeros_without_memory():
    zeros = torch._efficientzerotensor((4, 3), dtype=torch.float32)
    target = torch.tensor([0, 1, 2, 0])
    assert torch.equal(
        crossent.torch.cross_entropy(zeros, target),
        crossent.torch.cross_entropy(torch.zeros(4, 3), target),
    )


@pytest.mark.parametrize("name", ["target", "weight", "sample_weight"])
def test_floats_nobody_reads(name):
    given = {"target": torch.tensor([0, 1]), name: torch.ones(3).to(torch.float8_e5m2)}
    with pytest.raises(TypeError, match=f"^cross_entropy: {name} must be float64, float32"):
        crossent.torch.cross_entropy(torch.zeros(2, 3), **given)


def test_a_target_is_needed():
    with pytest.raises(TypeError, match=r"^cross_entropy: target must be a tensor, got None"):
        crossent.torch.cross_entropy(torch.zeros(2, 3), None)


# Errors -------------------------------------------------------------------------------------------

X, Y = np.zeros((4, 3)), np.array([0, 1, 2, 0])
IDS, PROB = Y[:, None], np.ones((4, 1))
BAD_SHAPES = {
    "indices of another length": (X, Y[:3], {}),
    "indices of the logits' shape": (X, np.zeros((4, 3), int), {}),
    "probabilities of another shape": (X, np.zeros((4, 2)), {}),
    "indices as floats": (X, Y.astype(float), {}),
    "indices as float32": (X, Y.astype(np.float32), {}),
    "booleans": (X, Y > 0, {}),
    "complex": (X, Y + 0j, {}),
    "sparse without a class axis": (X, Y, {"target_prob": np.ones(4)}),
    "sparse of two shapes": (X, IDS, {"target_prob": np.ones((4, 2))}),
    "sparse with floats for ids": (X, IDS.astype(float), {"target_prob": PROB}),
    "sparse with booleans for ids": (X, IDS > 0, {"target_prob": PROB}),
    "target_prob of integers' complex": (X, IDS, {"target_prob": PROB + 0j}),
    "target_prob of booleans": (X, IDS, {"target_prob": PROB > 0}),
    "weight too short": (X, Y, {"weight": np.ones(2)}),
    "weight of rows": (X, Y, {"weight": np.ones((4, 3))}),
    "weight of booleans": (X, Y, {"weight": np.ones(3, bool)}),
    "weight of complex numbers": (X, Y, {"weight": np.ones(3, complex)}),
    "sample_weight too short": (X, Y, {"sample_weight": np.ones(3)}),
    "sample_weight of booleans": (X, Y, {"sample_weight": np.ones(4, bool)}),
    "no class": (np.zeros((4, 0)), Y, {}),
    "no dimension": (np.zeros(()), np.array(0), {}),
}
BAD_OPTIONS = [
    {"label_smoothing": 1.5},
    {"label_smoothing": math.nan},
    {"label_smoothing": "0.1"},
    {"label_smoothing": None},
    {"z_loss": -1},
    {"z_loss": True},
    {"logit_scale": 0.0},
    {"softcap": -2.0},
    {"divisor": math.inf},
    {"divisor": 2.0, "reduction": "sum"},
    {"reduction": "avg"},
    {"reduction": None},
    {"ignore_index": 1.5},
    {"ignore_index": 2**63},
    {"axis": 2},
    {"axis": 1.0},
    {"axis": True},
]
BAD_NUMBERS = {
    "above": (X, np.array([0, 1, 2, 3]), {}),
    "below": (X, np.array([0, -1, 2, 0]), {}),
    "one class": (np.zeros((2, 1)), np.array([0, 1]), {}),
    "places": (np.zeros((2, 3, 2)), np.array([[0, 1], [2, 7]]), {}),
    "unsigned": (X, np.array([0, 1, 2, 200], np.uint8), {}),
    "unsigned and huge": (X, np.array([0, 1, 2, 2**64 - 100], np.uint64), {}),
    "sparse": (X, IDS + 1, {"target_prob": PROB}),
    "weight not finite": (X, Y, {"weight": np.array([1.0, np.inf, 1.0])}),
    "sample_weight not finite": (X, Y, {"sample_weight": np.array([1.0, 1.0, np.nan, 1.0])}),
}


def from_numpy(value):
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def told(function, input, target, options):
    with pytest.raises((TypeError, ValueError, IndexError)) as caught:
        function(input, target, **options)
    return type(caught.value), str(caught.value)


def by_torch(input, target, options):
    options = {k: from_numpy(v) for k, v in options.items()}
    if "axis" in options:
        options["dim"] = options.pop("axis")

    def function(input, target, **options):
        return crossent.torch.cross_entropy(from_numpy(input), from_numpy(target), **options)

    def under_vjp(input, target, **options):
        torch.func.vjp(lambda v: function(v, target, **options), from_numpy(input))

    return [told(f, input, target, options) for f in (function, under_vjp)]


@pytest.mark.parametrize(("input", "target", "options"), BAD_SHAPES.values(), ids=BAD_SHAPES)
def test_shapes_and_dtypes_have_the_error_of_numpy(input, target, options):
    want = told(crossent.cross_entropy, input, target, options)
    assert by_torch(input, target, options) == [want, want]


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=str)
def test_options_have_the_error_of_numpy(options):
    want = told(crossent.cross_entropy, X, Y, options)
    assert by_torch(X, Y, options) == [want, want]


@pytest.mark.parametrize(("input", "target", "options"), BAD_NUMBERS.values(), ids=BAD_NUMBERS)
def test_numbers_have_the_error_of_numpy(input, target, options):
    """Where no transform hides them; in every eager route."""
    axis = {"axis": 1} if input.ndim > 2 else {}
    want = told(crossent.cross_entropy, input, target, options | axis)
    given = {k: from_numpy(v) for k, v in options.items()}
    for more in ({}, {"sample_weight": torch.ones((), requires_grad=True)}):
        if "sample_weight" in options and more:
            continue  # a row weight that requires a gradient goes another way
        found = told(
            crossent.torch.cross_entropy, from_numpy(input), from_numpy(target), given | more
        )
        assert found == want


@pytest.mark.parametrize("target", [np.array([[0.5, 0.5]]), np.array([[0, 1]])])
def test_statistics_have_the_error_of_numpy(target):
    want = told(crossent.cross_entropy_stats, np.zeros((1, 2)), target, {})
    given = torch.zeros(1, 2).double(), torch.from_numpy(target)
    assert told(crossent.torch.cross_entropy_stats, *given, {}) == want


@pytest.mark.parametrize("options", [o for o in BAD_OPTIONS if "axis" not in o], ids=str)
def test_a_module_refuses_an_option_as_it_is_made(options):
    if "divisor" in options:
        return
    name = next(iter(options))
    with pytest.raises((TypeError, ValueError), match=f"^CrossEntropyLoss: {name} must be"):
        crossent.torch.CrossEntropyLoss(**options)


def test_a_tensor_is_wanted_and_on_one_device():
    x, y = torch.zeros(2, 3), torch.tensor([0, 1])
    call = crossent.torch.cross_entropy
    with pytest.raises(TypeError, match=r"target must be a tensor, got .*torch.as_tensor"):
        call(x, [0, 1])
    with pytest.raises(TypeError, match="weight must be a tensor"):
        call(x, y, [1.0, 2.0, 3.0])
    with pytest.raises(TypeError, match="sample_weight must be a tensor"):
        call(x, y, sample_weight=2.0)
    for name, value in (("target", y), ("weight", torch.ones(3))):
        with pytest.raises(
            ValueError, match=f"{name} must be on cpu, as input is, got a tensor on"
        ):
            call(x, **{"target": y} | {name: value.to("meta")})


# What PyTorch does not take -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint64]
)
def test_indices_of_any_integer_dtype(dtype):
    input, target = torch.randn(3, 4), torch.tensor([0, 3, 1])
    want = crossent.torch.cross_entropy(input, target)
    assert torch.equal(crossent.torch.cross_entropy(input, target.to(dtype)), want)
    found, _ = torch.func.vjp(lambda v: crossent.torch.cross_entropy(v, target.to(dtype)), input)
    # Forty operations on numbers below 8, none off by more than an ulp.
    assert abs(found - want) <= 40 * 8 * 2.0**-23


def test_ignore_index_does_not_apply_to_probabilities():
    input, target = torch.randn(3, 4), torch.rand(3, 4)
    found = crossent.torch.cross_entropy(input, target, ignore_index=1)
    assert torch.equal(found, crossent.torch.cross_entropy(input, target))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_arrays_of_other_dtypes_are_rounded_to_the_loss_s(dtype):
    input, w, t = torch.randn(3, 4), torch.rand(4).to(dtype), torch.rand(3, 4).to(dtype)
    found = crossent.torch.cross_entropy(input, t, w)
    assert found.dtype is torch.float32
    # Probabilities of float64 are read as they are, and the row is summed in float32.
    want = crossent.torch.cross_entropy(input, t.float(), w.float())
    assert abs(found - want) <= 16 * 2.0**-23 * want
