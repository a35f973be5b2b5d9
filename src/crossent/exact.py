"""Numbers for `crossent.reference`: one code for floating arrays and for mpmath numbers.

A floating array is computed in its own dtype (float16 and bfloat16 in float32, integers in
float64), an object array of mpmath numbers at the precision mpmath is set to.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any, ParamSpec, TypeAlias, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array: TypeAlias = NDArray[Any]
P = ParamSpec("P")
R = TypeVar("R")


def exact(array: ArrayLike) -> Array:
    """Convert floating numbers to mpmath's, without rounding, as an object array.

    Parameters
    ----------
    array
        Numbers that float64 holds, of any shape.

    Examples
    --------
    >>> import mpmath
    >>> import numpy as np
    >>> from crossent import reference
    >>> with mpmath.workdps(60):
    ...     a = reference.softmax(reference.exact(np.array([0.0, 1000.0])))
    >>> print(mpmath.nstr(a[0], 12))
    5.07595889755e-435
    """
    mpf = _mpmath().mpf
    array = np.asarray(array)
    out = np.empty(array.size, dtype=object)
    out[:] = [mpf(float(x)) for x in array.flat]
    return out.reshape(array.shape)


def computable(array: ArrayLike) -> Array:
    """Return `array` in the dtype that is computed in."""
    array = np.asarray(array)
    if array.dtype.kind in "iub":
        return array.astype(np.float64)
    return array.astype(np.float32) if array.dtype.itemsize < 4 else array


def cast(x: ArrayLike, dtype: np.dtype[Any]) -> Array:
    """Bring numbers of a plan, or of a caller, to the dtype that is computed in."""
    x = np.asarray(x)
    if dtype.kind != "O":
        return np.asarray(x, dtype)
    return x if x.dtype.kind == "O" else exact(x)


def elementwise(name: str, x: Array) -> Array:
    """Apply exp, log1p or tanh to every entry."""
    function = getattr(_mpmath(), name) if x.dtype.kind == "O" else None
    result: Array = getattr(np, name)(x) if function is None else np.frompyfunc(function, 1, 1)(x)
    return result


def zero_where(mask: Array, x: Array) -> Array:
    """Return a copy of `x` with zeros, not products with zero, where `mask` holds."""
    out = np.array(x)
    out[mask] = cast(0.0, x.dtype)
    return out


def quiet(function: Callable[P, R]) -> Callable[P, R]:
    """Let overflow and NaN pass in silence: here they are answers."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with np.errstate(over="ignore", invalid="ignore"):
            return function(*args, **kwargs)

    return call


def _mpmath() -> ModuleType:
    import mpmath  # an extra, wanted for exact numbers alone

    module: ModuleType = mpmath
    return module
