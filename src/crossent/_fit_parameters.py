"""Checks a classifier's parameters."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np


def _is_bool(value: object) -> bool:
    return isinstance(value, (bool, np.bool_))


def is_number(value: object, kind: type[Real] | type[Integral] = Real) -> bool:
    return isinstance(value, kind) and not _is_bool(value)


PARAMETERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "C": (lambda v: is_number(v) and v > 0, "a number in (0, inf], inf for no penalty"),
    "fit_intercept": (_is_bool, "True or False"),
    "class_weight": (
        lambda v: v is None or isinstance(v, dict) or (isinstance(v, str) and v == "balanced"),
        "a dict of weights by class label, 'balanced' or None",
    ),
    "tol": (lambda v: is_number(v) and v >= 0, "a number in [0, inf]"),
    "max_iter": (lambda v: is_number(v, Integral) and v >= 1, "an integer of at least 1"),
    "solver": (
        lambda v: isinstance(v, str) and v in ("lbfgs", "newton-cg"),
        "'lbfgs' or 'newton-cg'",
    ),
    "warm_start": (_is_bool, "True or False"),
    "callback": (lambda v: v is None or callable(v), "a callable or None"),
}


def check_parameters(estimator: Any) -> None:
    """Raise ValueError for the first parameter that is not usable.

    ``label_smoothing`` is not among them: the loss checks its own options.
    """
    for name, (is_valid, expected) in PARAMETERS.items():
        value = getattr(estimator, name)
        if not is_valid(value):
            raise ValueError(
                f"The {name!r} parameter of {type(estimator).__name__} must be {expected}. "
                f"Got {value!r} instead."
            )
