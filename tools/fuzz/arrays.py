"""Arrays that hurt: special values, every layout in memory, every dtype."""

from __future__ import annotations

from random import Random
from typing import Any

import ml_dtypes
import numpy as np

FLOATS = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
INTEGERS = [np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)]
NONSENSE = [np.dtype(name) for name in ("?", "c8", "g", "O", "U3", "S2", "M8[s]", "m8[s]", "V4")]
CANARY = 0xA5


def values(random: Random, numbers: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Logits (float64) of `shape`, the classes along the last axis."""
    size = random.choice((0.01, 1.0, 3.0, 3.0, 3.0, 30.0, 300.0, 1e4))
    z = numbers.standard_normal(shape) * size
    kind = random.random()
    if kind < 0.45 or z.size == 0:
        return z
    if kind < 0.5:
        return np.round(z)  # ties
    if kind < 0.55:
        return np.full(shape, z.flat[0])
    if kind < 0.65:  # confident rows
        z[..., random.randrange(shape[-1])] += random.choice((10, 17, 37, 90, 750, 1e4))
        return z
    if kind < 0.72:  # a common offset
        return z + random.choice((1e2, -1e4, 1e6, -1e15, 1e30, -1e30))
    if kind < 0.85:  # masked classes, sometimes all of a row
        z[numbers.random(shape) < random.choice((0.1, 0.5, 0.9, 1.0))] = -np.inf
        return z
    if kind < 0.9:
        return z * random.choice((1e-40, 1e-310, 1e-320, 1e-6))
    if kind < 0.94:
        return np.where(numbers.random(shape) < 0.5, z * 1e36, -z * 1e36)
    special = random.choice((np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1.7e308, -1.7e308, 65504.0))
    z.flat[random.randrange(z.size)] = special
    return z


def converted(array: Any, dtype: np.dtype[Any]) -> Any:
    """`array` in `dtype`, out-of-range numbers and all."""
    with np.errstate(all="ignore"):
        if dtype.kind in "iu":
            limits = np.iinfo(dtype)
            low, high = max(limits.min, -1e6), min(limits.max, 1e6)
            return np.clip(np.nan_to_num(array), low, high).astype(dtype)
        if dtype.kind in "OUSMmV":
            return np.zeros(array.shape, dtype)
        return array.astype(dtype)


LAYOUTS = (
    "fortran",
    "strided",
    "negative",
    "broadcast",
    "unaligned",
    "readonly",
    "swapped",
    "list",
)


def laid_out(random: Random, array: Any, layout: str | None = None) -> Any:
    """`array`'s numbers in some layout; "broadcast" repeats some of them, "list" is a list."""
    if layout is None:
        layout = "plain" if random.random() < 0.55 else random.choice(LAYOUTS)
    if array.ndim == 0 or array.dtype.hasobject:
        return array
    if layout == "fortran":
        return np.asfortranarray(array)
    if layout == "negative":
        flip = tuple(slice(None, None, random.choice((1, -1))) for _ in array.shape)
        return array[flip].copy()[flip]
    if layout == "strided":
        return _strided(random, array)
    if layout == "broadcast" and array.size:
        axis = random.randrange(array.ndim)
        return np.broadcast_to(array.take([0], axis), array.shape)
    if layout == "unaligned":
        raw = bytearray([CANARY]) * (array.nbytes + 4)
        moved: Any = np.ndarray(array.shape, array.dtype, raw, offset=random.choice((1, 1, 4)))
        moved[...] = array
        return moved
    if layout == "readonly":
        array = array.copy()
        array.setflags(write=False)
        return array
    if layout == "swapped" and array.dtype.kind in "iuf" and array.dtype.name != "bfloat16":
        return array.astype(array.dtype.newbyteorder())
    if layout == "list" and array.size and array.dtype.kind in "iuf":
        return array.tolist()
    return array


def _strided(random: Random, array: Any) -> Any:
    steps = [random.choice((1, 1, 2, 3, -1, -2)) for _ in array.shape]
    room = [n * abs(step) + random.randrange(2) for n, step in zip(array.shape, steps, strict=True)]
    whole: Any = np.full((*room, array.dtype.itemsize), CANARY, np.uint8).view(array.dtype)[..., 0]
    if random.random() < 0.3 and array.ndim > 1:  # axes in another order in memory
        order = list(range(array.ndim))
        random.shuffle(order)
        whole = whole.transpose(order).copy().transpose(np.argsort(order))
    at = tuple(slice(None, None, step) for step in steps)
    view = whole[at][tuple(slice(0, n) for n in array.shape)]
    view[...] = array
    return view


def owner(array: Any) -> Any:
    """The bytes behind `array`, whatever view of them it is."""
    while isinstance(getattr(array, "base", None), np.ndarray):
        array = array.base
    if isinstance(array, np.ndarray) and isinstance(array.base, bytearray):
        return array.base
    return array


def snapshot(value: Any) -> bytes | str:
    """What must not change in an argument."""
    if isinstance(value, np.ndarray):
        whole = owner(value)
        if isinstance(whole, bytearray):
            return bytes(whole)
        return repr(whole) if whole.dtype.hasobject else whole.tobytes("A")
    return repr(value)
