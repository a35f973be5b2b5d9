"""NPZ files: named arrays read without unpickling and without trusting their declared sizes."""

import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from crossent.cli.errors import InputError, existing_file, first_line, shortened

MAX_ARRAY_BYTES = 8 << 30
# Deflate reaches 1000:1 on zeros; real data beyond this size stays far under 100:1.
MAX_UNCHECKED_BYTES = 256 << 20
MAX_RATIO = 100
FORMAT_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    tokenize.TokenError,
    EOFError,
    OSError,
    RuntimeError,
    SyntaxError,
    ValueError,
)


def read_arrays(path: Path, names: list[str]) -> list[NDArray[np.generic]]:
    """Return the named arrays of an NPZ file.

    Raises
    ------
    InputError
        If the file is missing or damaged, lacks an array, holds Python objects, or declares a
        size that its content does not have or that is absurd.
    """
    existing_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            absent = [name for name in names if name not in members]
            if absent:
                raise InputError(
                    f"{path} has no array named {absent[0]!r}; it has {shortened(list(members))}"
                )
            return [_read_member(archive, members[name], f"{path}: {name}") for name in names]
    except InputError:
        raise
    except FORMAT_ERRORS as error:
        raise InputError(f"{path} cannot be read as NPZ: {first_line(error)}") from None


def _read_member(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str
) -> NDArray[np.generic]:
    ratio = info.file_size / max(info.compress_size, 1)
    suspicious = info.file_size > MAX_UNCHECKED_BYTES and ratio > MAX_RATIO
    if info.file_size > MAX_ARRAY_BYTES or suspicious:
        raise InputError(
            f"{where} would unpack to {info.file_size / 2**30:.1f} GiB from "
            f"{info.compress_size} bytes; that is refused, save a smaller or uncompressed array"
        )
    with archive.open(info) as file:
        shape, fortran_order, dtype = _read_header(file, where)
        size = dtype.itemsize
        for length in shape:
            size *= length
        content = file.read()
    if len(content) != size:
        raise InputError(
            f"{where} declares the shape {shape} of {dtype}, which takes {size} bytes, "
            f"but holds {len(content)}; the file is damaged"
        )
    return np.ndarray(shape, dtype, content, order="F" if fortran_order else "C")


def _read_header(file: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise InputError(f"{where} is in version {version} of the NPY format; save it again")
    if dtype.hasobject or dtype.kind not in "biufUS":
        raise InputError(
            f"{where} has the type {dtype}; only numbers, booleans and strings are read, "
            "and nothing is unpickled"
        )
    return shape, fortran_order, dtype
