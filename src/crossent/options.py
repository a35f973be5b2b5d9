"""The options: names, defaults, ranges, and the text of every error about an argument.

Design:
  a. A front end builds one ``Options`` from its keyword arguments; nobody else invents a default.
  b. ``where`` is the public function's name. It opens every message, so that the same bad input
     reads the same in every front end.
  c. A check returns the cleaned value or raises; the meaning of an option lives in ``rows.py``.
  d. Nobody changes an ``Options`` once it is made, yet it is not ``frozen``: to make ten frozen
     fields takes 1.5 µs more, as long as the kernels take for 32 rows. Given in order, not by name,
     they take another 0.5 µs less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Reduction = Literal["mean", "sum", "none"]


@dataclass(slots=True)
class Options:
    """The options of `cross_entropy`, as the caller gave them (arrays unconverted)."""

    weight: Any = None
    sample_weight: Any = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    logit_scale: float = 1.0
    softcap: float | None = None
    reduction: Reduction = "mean"
    divisor: float | None = None
    target_prob: Any = None

    def checked(self, where: str, compute_dtype: np.dtype[Any]) -> Options:
        """Return a copy whose scalar options are Python numbers rounded to the compute dtype.

        Raises
        ------
        TypeError, ValueError
            If an option has the wrong type, is out of range or NaN.
        """
        if (  # the common case, whose checks would cost more than a small loss
            type(self.label_smoothing) is type(self.z_loss) is type(self.logit_scale) is float
            and self.label_smoothing == 0.0
            and self.z_loss == 0.0
            and self.logit_scale == 1.0
            and type(self.ignore_index) is int
            and -(2**63) <= self.ignore_index < 2**63
            and self.softcap is None
            and self.divisor is None
            and type(self.reduction) is str
            and self.reduction in _REDUCTIONS
        ):
            return self
        if not isinstance(self.reduction, str) or self.reduction not in _REDUCTIONS:
            raise ValueError(
                f"{where}: reduction must be 'mean', 'sum' or 'none', got {self.reduction!r}"
            )
        if self.divisor is not None and self.reduction != "mean":
            raise ValueError(
                f"{where}: divisor replaces the divisor of reduction='mean', but reduction is "
                f"{self.reduction!r}; leave divisor=None or use reduction='mean'"
            )
        return Options(
            self.weight,
            self.sample_weight,
            _integer(where, "ignore_index", self.ignore_index),
            _number(where, compute_dtype, "label_smoothing", self.label_smoothing, "in [0, 1]"),
            _number(where, compute_dtype, "z_loss", self.z_loss, "finite and at least 0"),
            _number(where, compute_dtype, "logit_scale", self.logit_scale, "finite and above 0"),
            None
            if self.softcap is None
            else _number(where, compute_dtype, "softcap", self.softcap, "finite and above 0"),
            self.reduction,
            None
            if self.divisor is None
            else _number(where, compute_dtype, "divisor", self.divisor, "finite"),
            self.target_prob,
        )


MAX_THREADS = 2**15
OPTION_NAMES = tuple(field.name for field in fields(Options))
_REDUCTIONS = get_args(Reduction)
_FLOAT64 = np.dtype(np.float64)

_RANGES = {
    "in [0, 1]": lambda x: 0 <= x <= 1,
    "finite and at least 0": lambda x: 0 <= x < math.inf,
    "finite and above 0": lambda x: 0 < x < math.inf,
    "finite": math.isfinite,
}


def _number(
    where: str, compute_dtype: np.dtype[Any], name: str, value: object, expected: str
) -> float:
    given = value if type(value) is float else _as_float(where, name, value, expected)
    # The divisor is a count, kept exact: 2**24 + 1 tokens must not become 2**24.
    dtype = _FLOAT64 if name == "divisor" else compute_dtype
    if dtype is _FLOAT64 or given == 0.0 or given == 1.0:
        rounded = given
    elif 1e-30 < given < 1e30:  # float32 can hold it: no warning to silence
        rounded = float(dtype.type(given))
    else:
        with np.errstate(over="ignore", under="ignore"):
            rounded = float(dtype.type(given))
    fits = _RANGES[expected]
    if not (fits(given) and (rounded == given or fits(rounded))):
        same = rounded == given or math.isnan(given)
        in_dtype = "" if same else f" ({rounded} in {dtype.name})"
        raise ValueError(f"{where}: {name} must be {expected}, got {given}{in_dtype}")
    return rounded


def _as_float(where: str, name: str, value: object, expected: str) -> float:
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if not isinstance(value, Real) or isinstance(value, bool | np.bool_):
        raise TypeError(f"{where}: {name} must be a real number {expected}, got {_describe(value)}")
    huge: Any = value
    try:
        return float(value)
    except OverflowError:  # a huge Python integer or fraction
        return math.inf if huge > 0 else -math.inf


def _integer(where: str, name: str, value: object) -> int:
    if type(value) is int and -(2**63) <= value < 2**63:
        return value
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be an integer, got {_describe(value)}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{where}: {name} must be an integer that int64 holds, got {value}")
    return int(value)


def as_array(where: str, name: str, value: Any) -> NDArray[Any]:
    """Return `value` as a plain array.

    Raises
    ------
    TypeError
        If it has masked entries: a plain array would show what lies under them.
    ValueError
        If it is no array, as rows of different lengths are not.
    """
    if type(value) is np.ndarray:
        return value
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{where}: {name} is no array: {error}") from None
    if isinstance(value, np.ndarray) and np.ma.is_masked(value):
        raise TypeError(
            f"{where}: {name} must not have masked entries, whose mask would be lost; fill them "
            f"with {name}.filled(value) and drop rows by sample_weight=0 or ignore_index"
        )
    return array


def dtype_name(dtype: object) -> str:
    """Name a dtype of any framework as NumPy does."""
    return str(dtype).removeprefix("torch.")


def _describe(value: object) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, np.generic):
        return f"an array of shape {tuple(value.shape)} and dtype {dtype_name(value.dtype)}"
    return f"{value!r} ({type(value).__name__})"


# Logits -------------------------------------------------------------------------------------


def bad_input_dtype(where: str, name: str, dtype: object) -> TypeError:
    """Logits (or a vector like them) whose dtype no kernel computes."""
    return TypeError(
        f"{where}: {name} must be float64, float32, float16, bfloat16 or integers, "
        f"got {dtype_name(dtype)}; "
        f"convert it first, for example with {name}.astype('float64')"
    )


def bad_tensor_dtype(where: str, name: str, dtype: object) -> TypeError:
    """A tensor whose dtype no kernel computes."""
    return TypeError(
        f"{where}: {name} must be float64, float32, float16 or bfloat16, got {dtype_name(dtype)}; "
        f"convert it first, for example with {name}.float()"
    )


def bad_input_ndim(where: str) -> ValueError:
    """Logits without any axis."""
    return ValueError(
        f"{where}: input must have a class axis (at least one dimension), got a 0-d array; "
        "pass the logits of one row as a 1-d array"
    )


def no_classes(where: str, shape: tuple[int, ...], axis: int) -> ValueError:
    """Logits of zero classes."""
    return ValueError(
        f"{where}: input has shape {shape} and so no class along axis {axis}; "
        "softmax needs at least one"
    )


def bad_axis(where: str, axis: object, ndim: int) -> ValueError | TypeError:
    """A class axis that the logits do not have."""
    if isinstance(axis, int | np.integer) and not isinstance(axis, bool):
        return ValueError(
            f"{where}: axis {axis} does not exist in an input of {ndim} dimensions; "
            f"expected {-ndim} to {ndim - 1}"
        )
    return TypeError(f"{where}: axis must be an integer, got {_describe(axis)}")


# Targets ------------------------------------------------------------------------------------


def bad_target_dtype(where: str, dtype: object) -> TypeError:
    """A target that is neither class indices nor a distribution."""
    return TypeError(
        f"{where}: target must hold class indices (an integer dtype) or probabilities (a floating "
        f"dtype), got {dtype_name(dtype)}; convert it with target.astype('int64') or "
        "target.astype('float32')"
    )


def bad_target_shape(
    where: str,
    got: tuple[int, ...],
    dtype: object,
    rows: tuple[int, ...],
    full: tuple[int, ...],
    named: str = "an input",
) -> ValueError:
    """A target of no shape that fits the logits, which the message calls `named`."""
    if np.issubdtype(np.dtype(str(dtype)) if dtype != "bfloat16" else np.float32, np.integer):
        want = f"class indices for {named} of shape {full} must have shape {rows}"
        other = ""
    else:
        want = f"probabilities for {named} of shape {full} must have the same shape"
        other = (
            "; if they are class indices, convert them with target.astype('int64')"
            if got == rows
            else ""
        )
    return ValueError(f"{where}: {want}, got a target of shape {got} and dtype {dtype}{other}")


def target_out_of_range(
    where: str, position: tuple[int, ...], value: int, n_classes: int, way_out: str = ""
) -> IndexError:
    """A class index outside 0 … V − 1 that is not `ignore_index`."""
    place = f"[{', '.join(map(str, position))}]" if position else ""
    classes = (
        "is 1 class (0)" if n_classes == 1 else f"are {n_classes} classes (0 to {n_classes - 1})"
    )
    way_out = way_out or f"use ignore_index={value} to skip such rows"
    return IndexError(f"{where}: target{place} is {value}, but there {classes}; {way_out}")


def bad_target_prob(where: str, reason: str) -> ValueError | TypeError:
    """`target_prob` that does not go with its target."""
    return ValueError(
        f"{where}: target_prob gives the probabilities of the class ids in target, so both must "
        f"have one shape (K ids a row on the class axis, integers and floats); {reason}"
    )


# Arrays beside the logits -------------------------------------------------------------------


def bad_array(where: str, name: str, expected: str, value: object) -> TypeError:
    """An array option that is no array of real numbers."""
    return TypeError(f"{where}: {name} must be {expected}, got {_describe(value)}")


def bad_shape(
    where: str, name: str, expected: str, got: tuple[int, ...], hint: str = ""
) -> ValueError:
    """An array option of the wrong shape."""
    return ValueError(f"{where}: {name} must have shape {expected}, got {got}{hint}")


def not_finite(
    where: str, name: str, position: tuple[int, ...], value: float, dtype: str
) -> ValueError:
    """A NaN or an infinity where every value must be finite."""
    place = f"[{', '.join(map(str, position))}]" if position else ""
    return ValueError(
        f"{where}: {name} must be finite in {dtype}, but {name}{place} is {value}; "
        "use 0 to drop a row or a class"
    )


def bad_out(where: str, expected: str, got: str, hint: str) -> TypeError | ValueError:
    """`out=` that cannot take the result."""
    return ValueError(f"{where}: out must be {expected}, got {got}; {hint}")


def bad_grad_output(
    where: str, reduction: str, rows: tuple[int, ...], got: tuple[int, ...]
) -> ValueError:
    """An upstream gradient that does not have the loss's shape."""
    shape = f"the rows' shape {rows}" if reduction == "none" else "no dimensions"
    return ValueError(
        f"{where}: grad_output must have {shape} with reduction={reduction!r} (the shape of the "
        f"loss), got {got}"
    )


def bad_out_type(where: str, out: object) -> TypeError:
    """`out=` that is no array."""
    return TypeError(f"{where}: out must be a NumPy array, got {_describe(out)}")


def bad_target_dtype_for_stats(where: str, dtype: object) -> TypeError:
    """A distribution where class indices are wanted."""
    return TypeError(
        f"{where}: target must hold class indices (an integer dtype), got {dtype_name(dtype)}; "
        "convert it with target.astype('int64')"
    )


def bad_threads(where: str, value: object) -> ValueError | TypeError:
    """A number of threads out of range or of no integer type."""
    text = (
        f"{where}: the number of threads must be an integer from 1 to {MAX_THREADS}, "
        f"got {_describe(value)}"
    )
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return ValueError(text) if is_integer else TypeError(text)


def positive_number(where: str, name: str, value: object) -> float:
    """Return a finite number above 0, or raise."""
    number = _as_float(where, name, value, "above 0")
    if not 0 < number < math.inf:
        raise ValueError(f"{where}: {name} must be above 0 and finite, got {number}")
    return number


def bad_environment(name: str, value: str, expected: str) -> str:
    """Text of the warning about an environment variable that is passed over."""
    return f"crossent: {name}={value!r} is passed over: expected {expected}"


# The head -----------------------------------------------------------------------------------------


def bad_features_ndim(where: str, ndim: int, sparse: bool) -> ValueError:
    """Features without a feature axis, or a sparse array that is no matrix."""
    if sparse:
        return ValueError(
            f"{where}: a sparse input must be a matrix (N, D), got {ndim} dimensions; "
            "use input.reshape(1, -1)"
        )
    return ValueError(
        f"{where}: input must have a feature axis (at least one dimension), got a 0-d array; "
        "pass the features of one row as a 1-d array"
    )


def bad_linear_weight(where: str, got: tuple[int, ...], n_features: int) -> ValueError:
    """Weights that do not fit the features, or of no class."""
    expected = f"(V, {n_features}), one row for each class and one column for each feature of input"
    if len(got) == 2 and got[1] == n_features:
        return ValueError(
            f"{where}: linear_weight must have at least one row (one for each class), "
            f"got shape {got}"
        )
    turned = len(got) == 2 and got[0] == n_features
    hint = "; pass linear_weight.T" if turned else ""
    return bad_shape(where, "linear_weight", expected, got, hint)


def not_dense(where: str, name: str) -> TypeError:
    """A sparse matrix where only `input` may be one."""
    return TypeError(
        f"{where}: {name} must be a dense array, got a sparse one (only input may be sparse); "
        f"use {name}.toarray()"
    )


def bad_wrt(where: str, wrt: object, names: tuple[str, ...]) -> ValueError:
    """Gradients of something that has none."""
    return ValueError(
        f"{where}: wrt must name some of {', '.join(map(repr, names))}, got {wrt!r}; "
        "for gradients in other arguments use cross_entropy_value_and_grad or another front end"
    )


def sparse_gradient(where: str, asked: str, instead: str) -> ValueError:
    """A gradient in a sparse input, which would be dense."""
    return ValueError(
        f"{where}: {asked} a sparse input, whose gradient would be a dense array of its shape; "
        f"{instead}, or pass input.toarray()"
    )


def bad_vector(where: str, value: object) -> TypeError:
    """A direction that is no triple."""
    return TypeError(
        f"{where}: vector must be a LinearGrad of directions in input, linear_weight and "
        f"linear_bias (None: held fixed), got {_describe(value)}"
    )


def no_bias(where: str) -> ValueError:
    """A direction in a bias that there is not."""
    return ValueError(
        f"{where}: vector.linear_bias is a direction in linear_bias, which is None; "
        "pass linear_bias, or None in vector"
    )


# Tensors ------------------------------------------------------------------------------------------


def not_a_tensor(where: str, name: str, value: object) -> TypeError:
    """Something that the PyTorch front end wants as a tensor."""
    return TypeError(
        f"{where}: {name} must be a tensor, got {_describe(value)}; use torch.as_tensor({name})"
    )


def other_device(where: str, name: str, got: object, expected: object) -> ValueError:
    """A tensor that does not lie where the logits do."""
    return ValueError(
        f"{where}: {name} must be on {expected}, as input is, got a tensor on {got}; "
        f"use {name}.to(input.device)"
    )


def other_dtype(where: str, name: str, got: object, expected: object) -> TypeError:
    """A tensor of another dtype than the features."""
    return TypeError(
        f"{where}: {name} must have the dtype of input, {dtype_name(expected)}, "
        f"got {dtype_name(got)}; use {name}.to(input.dtype)"
    )


def more_than_rows(where: str, weight: tuple[int, ...], got: tuple[int, ...]) -> ValueError:
    """Weights of more axes than two, beside features that are no matrix."""
    expected = f"(N, {weight[-1]}), since linear_weight has shape {weight}"
    hint = "; use input.reshape(-1, input.shape[-1]), and a target to match"
    return bad_shape(where, "input", expected, got, hint)


def no_gradient(where: str, name: str) -> ValueError:
    """An option that requires a gradient and would not get one."""
    instead = {
        "logit_scale": "multiply input by it instead (a head's linear_bias as well)",
        "divisor": "divide the loss by it, with reduction='sum', instead",
        "z_loss": "add it times cross_entropy_stats(...).logsumexp squared instead",
    }.get(name, f"pass {name}.detach()")
    return ValueError(
        f"{where}: {name} requires a gradient, but the loss is not differentiable in it; {instead}"
    )
