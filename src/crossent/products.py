"""Matrix products for the fused head: this library's own, and the host's as fallback and oracle.

bfloat16 is uint16 here, whose upper half of a float32 it holds.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from crossent import _native

TILE_BYTES = 4 * 2**20
"""About what one copy may take that a product makes beside its operands."""
_SLAB_DEPTH = 256  # of the kernels' packed slab (native/gemm.cpp), which is TILE_BYTES or one block


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
        may_round: bool = False,
    ) -> None:
        """Write the product of a (M, K) and b (K, N), any strides, to out (M, N).

        a and b are float64, float32, float16 or bfloat16, out is float64 where one of them is and
        float32 otherwise, with contiguous rows; `bias` (N,), of out's dtype, is added. The numbers
        are multiplied as they are, except that a float32 operand beside a bfloat16 one may be
        rounded to bfloat16 first, by at most 2⁻⁸ of each number, if `may_round`.
        """


def native(
    a: NDArray[Any],
    b: NDArray[Any],
    out: NDArray[Any],
    *,
    accumulate: bool = False,
    bias: NDArray[Any] | None = None,
    may_round: bool = False,
) -> None:
    """Multiply by the C++ kernels: the same bits for any number of threads.

    With AVX512_BF16 bfloat16 operands are multiplied by its instruction, and `may_round` is used.
    """
    _native.matmul(a, b, out, accumulate, bias, may_round)


def host(
    a: NDArray[Any],
    b: NDArray[Any],
    out: NDArray[Any],
    *,
    accumulate: bool = False,
    bias: NDArray[Any] | None = None,
    may_round: bool = False,  # never needed
) -> None:
    """Multiply by `numpy.matmul`, tile by tile where something has to be copied."""
    dtype = out.dtype
    rows, columns = out.shape
    if accumulate or a.dtype != dtype:
        rows = _fitting(a.shape[1] + out.shape[1], dtype)
    if b.dtype != dtype:
        columns = _fitting(b.shape[0] + rows, dtype)
    with np.errstate(all="ignore"):  # the kernels say nothing of NaN and overflow either
        for j in range(0, out.shape[1], max(1, columns)):
            right = as_compute(b[:, j : j + columns], dtype)
            for i in range(0, out.shape[0], max(1, rows)):
                left, tile = as_compute(a[i : i + rows], dtype), out[i : i + rows, j : j + columns]
                if accumulate:
                    tile += left @ right
                else:
                    np.matmul(left, right, out=tile)
        if bias is not None:
            out += bias


def scratch_bytes(n: int, n_classes: int, n_features: int, dtype: np.dtype[Any]) -> int:
    """Return what a head's products may take beside their operands, whatever a chunk's rows.

    A packed slab, and about as much again for the threads' tiles, up to `TILE_BYTES`.
    """
    narrow = min(n_classes, n_features) * dtype.itemsize
    slab = max(TILE_BYTES, narrow * _SLAB_DEPTH)
    packed = min(slab, narrow * max(n, n_classes, n_features))
    return packed + min(packed, TILE_BYTES)


def scratch_bytes_a_row(dtype: np.dtype[Any]) -> int:
    """Return what each of a chunk's rows may add to that."""
    return _SLAB_DEPTH * dtype.itemsize


def as_compute(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return numbers in float32 or float64."""
    if array.dtype == np.uint16:
        wide = array.astype(np.uint32)
        wide <<= 16
        array = wide.view(np.float32)
    return array.astype(dtype, copy=False)


def store(numbers: NDArray[Any], out: NDArray[Any], rows: NDArray[np.int64] | None = None) -> None:
    """Round numbers (n, k) to those `rows` of out, or to out: to nearest, ties to even."""
    step = _fitting(4 * numbers.shape[1], numbers.dtype)
    with np.errstate(all="ignore"):
        for i in range(0, len(numbers), step):
            some = numbers[i : i + step]
            at = slice(i, i + step) if rows is None else rows[i : i + step]
            out[at] = _bfloat16(some) if out.dtype == np.uint16 else some


def _bfloat16(numbers: NDArray[Any]) -> NDArray[Any]:
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(numbers), bits >> 16 | 0x40, rounded)


def _fitting(n: int, dtype: np.dtype[Any]) -> int:
    """Return how many times `n` numbers fit into `TILE_BYTES`; at least 1."""
    return max(1, TILE_BYTES // max(1, n * dtype.itemsize))
