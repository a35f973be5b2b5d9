"""Class labels: from a column of strings, integers, booleans or whole floats to class codes."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crossent.cli.errors import InputError, rows_text

if TYPE_CHECKING:
    import polars as pl

Label = str | int | bool
Codes = NDArray[np.int64]


def class_name(label: Label) -> str:
    """Return the label as CSV writes it: booleans in lower case.

    Examples
    --------
    >>> class_name(True), class_name(3), class_name("cat")
    ('true', '3', 'cat')
    """
    return str(label).lower() if isinstance(label, bool) else str(label)


def encode_labels(column: "pl.Series", where: str) -> tuple[list[Label], Codes]:
    """Return the sorted classes of a target column and each row's position among them.

    Parameters
    ----------
    column : polars.Series, shape (N,)
        Strings, integers, booleans, or floats that are whole numbers.
    where : str
        How error texts name the column.

    Returns
    -------
    classes : list of str, int or bool, length V
    codes : ndarray of int64, shape (N,)

    Raises
    ------
    InputError
        For missing labels, fractional numbers, or fewer than two classes.

    Examples
    --------
    >>> import polars as pl
    >>> classes, codes = encode_labels(pl.Series(["b", "a", "b"]), "target 'kind'")
    >>> classes, codes.tolist()
    (['a', 'b'], [1, 0, 1])
    """
    column = _discrete(column, where)
    classes: list[Label] = column.unique().sort().to_list()
    if len(classes) < 2:
        only = f"only the class {class_name(classes[0])!r}" if classes else "no rows"
        raise InputError(f"{where} holds {only}; a classifier needs at least two classes")
    positions = {label: position for position, label in enumerate(classes)}
    codes = np.array([positions[label] for label in column.to_list()], np.int64)
    return classes, codes


def _discrete(column: "pl.Series", where: str) -> "pl.Series":
    import polars as pl

    missing = column.is_null()
    if column.dtype.is_float():
        missing = missing | column.is_nan()
    if missing.any():
        raise InputError(
            f"{where} has no class in {rows_text(missing.to_numpy())}; "
            "fill it in or remove such rows"
        )
    if column.dtype.is_float() or column.dtype.is_decimal():
        column = _whole(column, where)
    try:
        if column.dtype.is_integer():
            return column.cast(pl.Int64)
        return column if column.dtype == pl.Boolean else column.cast(pl.String)
    except pl.exceptions.PolarsError:
        raise InputError(
            f"{where} has the type {column.dtype}; "
            "a class must be a string, an integer or a boolean"
        ) from None


def _whole(column: "pl.Series", where: str) -> "pl.Series":
    import polars as pl

    numbers = column.cast(pl.Float64)
    fractional = ~(numbers.is_finite() & (numbers == numbers.round()) & (numbers.abs() < 2**53))
    if not fractional.any():
        return numbers.cast(pl.Int64)
    raise InputError(
        f"{where} holds numbers that are not whole ({numbers.filter(fractional)[0]:g}, "
        f"{numbers.n_unique()} distinct): that is a quantity for regression, and crossent "
        "classifies; name a column of classes, or put the numbers into classes first"
    )
