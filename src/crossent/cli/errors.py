"""What the command line reports as one line on stderr with exit status 2."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class InputError(ValueError):
    """Something the user gave cannot be used; the text says what it is and what to do."""


def existing_file(path: Path) -> Path:
    """Return `path` if it is a file, else raise an `InputError` that says what is there."""
    if path.is_dir():
        raise InputError(f"{path} is a folder where a file was expected; name the file itself")
    if not path.exists():
        raise InputError(f"no such file: {path}; check the name and the folder you are in")
    return path


def first_line(error: BaseException, limit: int = 160) -> str:
    """Return the first line of another library's error text, cut to `limit` characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= limit else lines[0][: limit - 1] + "…"


def shortened(names: list[str], limit: int = 12) -> str:
    """Return `names` as one readable list that does not grow with a wide table."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, … ({len(names)} in all)"


def rows_text(flags: NDArray[np.bool_]) -> str:
    """Return where flags are set, by row numbers from 1.

    Examples
    --------
    >>> rows_text(np.array([False, True, True]))
    'row 2 and 1 more'
    """
    rows = np.flatnonzero(flags)
    return f"row {rows[0] + 1}" + (f" and {len(rows) - 1} more" if len(rows) > 1 else "")
