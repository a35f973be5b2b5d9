"""CSV and Parquet files: a table of numbers and a target column, read by polars."""

import contextlib
import csv
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crossent.cli.errors import InputError, existing_file, first_line, rows_text, shortened

if TYPE_CHECKING:
    import polars as pl

MAX_TABLE_BYTES = 8 << 30
MAX_HEADER_BYTES = 16 << 20
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "Zstandard", b"PK\x03\x04": "ZIP"}
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def read_table(path: Path) -> "pl.DataFrame":
    """Return the table in a .csv or .parquet file, with at least one row and named columns.

    Raises
    ------
    InputError
        If the file is missing, empty, damaged, of another kind or too large to hold.
    """
    existing_file(path)
    read = {".csv": _read_csv, ".parquet": _read_parquet}.get(path.suffix.lower())
    if read is None:
        raise InputError(f"{path}: unknown kind of file {path.suffix!r}; use .csv or .parquet")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty; expected a header line and rows")
    table = read(path)
    if table.height == 0:
        raise InputError(f"{path} has no rows, only the columns {shortened(table.columns)}")
    return table


def feature_matrix(table: "pl.DataFrame", columns: list[str], path: Path) -> NDArray[np.float64]:
    """Return the named columns as a matrix of finite numbers.

    Returns
    -------
    ndarray of float64, shape (N, D)
        Columns in the order of `columns`; booleans become 0 and 1.

    Raises
    ------
    InputError
        Naming the first column that is absent, text, or holds a missing or infinite value.
    """
    absent = [name for name in columns if name not in table.columns]
    if absent:
        raise InputError(
            f"{path} lacks {len(absent)} of the model's {len(columns)} feature columns: "
            f"{shortened(absent)}; it has {shortened(table.columns)}"
        )
    matrix = np.empty((table.height, len(columns)), order="F")
    for position, name in enumerate(columns):
        matrix[:, position] = _numbers(table[name], f"{path}: column {name!r}")
    return np.ascontiguousarray(matrix)


def _numbers(column: "pl.Series", where: str) -> NDArray[np.float64]:
    import polars as pl

    if not (column.dtype.is_numeric() or column.dtype in (pl.Boolean, pl.String, pl.Null)):
        raise InputError(f"{where} has the type {column.dtype}; a feature must be a number")
    numbers = column.cast(pl.Float64, strict=False)
    text = numbers.is_null() & column.is_not_null()
    if text.any():
        raise InputError(
            f"{where} holds text ({column.filter(text)[0][:40]!r} in {rows_text(text.to_numpy())}),"
            " and a feature must be a number: encode it (one 0/1 column for each value), or train "
            "without the column (train --drop)"
        )
    missing = (numbers.is_null() | numbers.is_nan().fill_null(True)).to_numpy()
    if missing.any():
        raise InputError(
            f"{where} has no value in {rows_text(missing)}; fill it in, remove such rows, or "
            "train without the column (train --drop)"
        )
    infinite = numbers.is_infinite().to_numpy()
    if infinite.any():
        raise InputError(
            f"{where} is infinite in {rows_text(infinite)}; every feature must be finite"
        )
    return numbers.to_numpy()


def _read_csv(path: Path) -> "pl.DataFrame":
    import polars as pl

    with path.open("rb") as file:
        header = file.readline(MAX_HEADER_BYTES)
    for mark, kind in COMPRESSED.items():
        if header.startswith(mark):
            raise InputError(f"{path} is {kind}-compressed; unpack it first")
    if header.startswith(UTF16_MARKS) or b"\0" in header:
        raise InputError(f"{path} is not UTF-8 text; save it as CSV in UTF-8")
    separator = max(",;\t", key=lambda mark: header.count(mark.encode()))
    try:
        table = pl.read_csv(
            path.absolute(), separator=separator, infer_schema_length=None, glob=False
        )
    except pl.exceptions.NoDataError:
        raise InputError(f"{path} is empty; expected a header line and rows") from None
    except (pl.exceptions.PolarsError, OSError) as error:
        if "more fields than defined" in str(error):
            raise InputError(
                f"{path} is ragged: a row has more fields than the header line; "
                "give every row the same number of fields"
            ) from None
        if "utf-8" in str(error).lower():
            raise InputError(f"{path} is not UTF-8 text; save it as CSV in UTF-8") from None
        raise InputError(
            f"{path} cannot be read as CSV: {first_line(error)}; check its quotes and line ends"
        ) from None
    try:
        names = next(csv.reader([header.decode("utf-8-sig")], delimiter=separator), [])
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: its header line cannot be read: {first_line(error)}") from None
    repeated = sorted(name for name, times in Counter(names).items() if times > 1)
    if repeated:
        raise InputError(f"{path} has two columns named {repeated[0]!r}; rename one")
    if len(names) == table.width:
        table.columns = names  # polars 2.1 leaves doubled quotes in its own names
    while table.height and all(value is None for value in table.row(-1)):  # blank last lines
        table = table.head(-1)
    return table


def _read_parquet(path: Path) -> "pl.DataFrame":
    import polars as pl

    # A damaged file can make polars panic: an exception outside `Exception`, after a report that
    # its Rust part writes straight to file descriptor 2.
    panic: type[BaseException] = getattr(pl.exceptions, "PanicException", pl.exceptions.PolarsError)
    failures = (pl.exceptions.PolarsError, OSError, ValueError, panic)
    try:
        with _silenced_stderr():
            scan = pl.scan_parquet(path.absolute(), glob=False)
            rows = scan.select(pl.len()).collect().item()
            columns = len(scan.collect_schema())
            if rows * columns * 8 <= MAX_TABLE_BYTES:
                return scan.collect()
    except failures as error:
        raise InputError(f"{path} cannot be read as Parquet: {first_line(error)}") from None
    raise InputError(
        f"{path} declares {rows} rows of {columns} columns, more than {MAX_TABLE_BYTES >> 30} GiB "
        "of numbers; train on a sample of the rows"
    )


@contextlib.contextmanager
def _silenced_stderr() -> Iterator[None]:
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
