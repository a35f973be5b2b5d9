"""The four gzip IDX files in which MNIST and Fashion-MNIST are distributed.

Format: http://yann.lecun.com/exdb/mnist (magic number, dimensions, unsigned bytes).
"""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crossent.cli.errors import InputError, first_line

FILES = {
    part: (f"{stem}-images-idx3-ubyte.gz", f"{stem}-labels-idx1-ubyte.gz")
    for part, stem in (("train", "train"), ("test", "t10k"))
}
MAX_BYTES = 4 << 30
Bytes = NDArray[np.uint8]


def read_part(folder: Path, part: str) -> tuple[Bytes, Bytes]:
    """Return the images `(N, height, width)` and labels `(N,)` of the part "train" or "test"."""
    images, labels = (
        read_idx(folder / name, dimensions)
        for name, dimensions in zip(FILES[part], (3, 1), strict=True)
    )
    if len(images) != len(labels):
        raise InputError(
            f"{folder}: {FILES[part][0]} has {len(images)} images and {FILES[part][1]} has "
            f"{len(labels)} labels; fetch the files again"
        )
    return images, labels


def read_idx(path: Path, dimensions: int) -> Bytes:
    """Return the array of unsigned bytes in one gzip IDX file."""
    if not path.is_file():
        raise InputError(
            f"no such file: {path}; install Debian's dataset-fashion-mnist, or name a folder "
            f"that holds {', '.join(name for names in FILES.values() for name in names)}"
        )
    try:
        with gzip.open(path) as file:
            header = file.read(4 + 4 * dimensions)
            magic, *shape = struct.unpack(f">{1 + dimensions}I", header)
            size = int(np.prod(shape, dtype=object))
            if magic != 0x800 + dimensions or size > MAX_BYTES:
                raise InputError(f"{path} is no IDX file of {dimensions} dimensions")
            content = file.read(size + 1)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise InputError(f"{path} cannot be read as gzip IDX: {first_line(error)}") from None
    if len(content) != size:
        raise InputError(f"{path} does not hold the {size} bytes it declares; fetch it again")
    return np.frombuffer(content, np.uint8).reshape(shape)
