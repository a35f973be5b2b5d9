"""Matrix products for the fused head: this library's own, and the host's as fallback and oracle."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from crossent import _native

TILE_BYTES = 8 * 2**20
"""What a product may use beside its operands: a packed slab and one tile a thread, or a tile that
has to be added to its place."""


class Product(Protocol):
    """Computes out = a b, or out += a b."""

    def __call__(
        self,
        a: NDArray[Any],
        b: NDArray[Any],
        out: NDArray[Any],
        *,
        accumulate: bool = False,
        bias: NDArray[Any] | None = None,
    ) -> None:
        """Write the product of a (M, K) and b (K, N), any strides, to out (M, N).

        a and b are float64, float32, float16 or bfloat16 (as uint16), out is float64 where one of
        them is and float32 otherwise, with contiguous rows; `bias` (N,), of out's dtype, is added.
        """


def native_product(
    a: NDArray[Any],
    b: NDArray[Any],
    out: NDArray[Any],
    *,
    accumulate: bool = False,
    bias: NDArray[Any] | None = None,
) -> None:
    """Multiply by the C++ kernels: the same bits for any number of threads."""
    _native.matmul(a, b, out, accumulate, bias)


def host_product(
    a: NDArray[Any],
    b: NDArray[Any],
    out: NDArray[Any],
    *,
    accumulate: bool = False,
    bias: NDArray[Any] | None = None,
) -> None:
    """Multiply by `numpy.matmul`, in tiles where the product has to be added to what is there."""
    a, b = as_compute(a, out.dtype), as_compute(b, out.dtype)
    if not accumulate:
        np.matmul(a, b, out=out)
        if bias is not None:
            out += bias
        return
    rows = max(1, TILE_BYTES // max(1, out.shape[1] * out.itemsize))
    for i in range(0, out.shape[0], rows):
        out[i : i + rows] += a[i : i + rows] @ b
    if bias is not None:
        out += bias


def as_compute(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return numbers in float32 or float64; uint16 is bfloat16."""
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(dtype, copy=False)


def store(numbers: NDArray[Any], out: NDArray[Any]) -> None:
    """Round float32 numbers to `out`'s dtype, uint16 being bfloat16: to nearest, ties to even."""
    if out.dtype != np.uint16:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            out[...] = numbers
        return
    bits = np.ascontiguousarray(numbers).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    out[...] = np.where(np.isnan(numbers), bits >> 16 | 0x40, rounded)
