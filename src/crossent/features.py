"""Features, and distributions, as rows of which a chunk is taken at a time.

N rows of D numbers lie in an array ``(…, D)`` of any strides or in a SciPy CSR matrix ``(N, D)``.
A chunk is a view wherever there can be one, so that nothing of size N·D is made. SciPy is not
imported here: whoever passes one of its matrices has done so.
"""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossent.products import as_compute

Rows = slice | NDArray[np.int64]
"""Some of the rows: a slice of step 1, or their positions."""


def is_sparse(value: object) -> bool:
    """Tell SciPy's sparse matrices and arrays."""
    scipy_sparse = sys.modules.get("scipy.sparse")
    return scipy_sparse is not None and bool(scipy_sparse.issparse(value))


def readable(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return an array as kernels read it, aligned and in `dtype`; silently, as they are."""
    with np.errstate(all="ignore"):
        return np.require(array, dtype, "A")


class DenseRows:
    """Rows of an array ``(…, D)``, the rows' axes in C order, aligned and of one dtype."""

    def __init__(self, array: NDArray[Any], dtype: np.dtype[Any]) -> None:
        """Take numbers in `dtype`, chunk by chunk where they are not."""
        self.dtype = dtype
        self._lead, self._array = array.shape[:-1], array
        self._joined = _joins(array)
        if self._joined:
            self._array = array.reshape(math.prod(self._lead), array.shape[-1])
        self._ready = self._joined and dtype == array.dtype and array.flags.aligned

    def take(self, rows: Rows) -> NDArray[Any]:
        """Return n rows ``(n, D)``: a view of a slice where the array allows it."""
        if self._joined:
            taken = self._array[rows]
        else:
            every = range(math.prod(self._lead))
            at = np.asarray(every[rows]) if isinstance(rows, slice) else rows
            taken = self._array[np.unravel_index(at, self._lead)]
        return taken if self._ready else readable(taken, self.dtype)

    def copied_bytes(self, dropped: bool) -> int:
        """Return what a row taken may need, `dropped` telling whether some rows are left out."""
        copies = (dropped or not self._joined) + (not self._ready)
        return int(copies * self._array.shape[-1] * self.dtype.itemsize)


class SparseRows:
    """Rows of a CSR matrix, their numbers in the compute dtype."""

    def __init__(self, matrix: Any, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self._matrix = matrix

    def take(self, rows: Rows) -> Any:
        """Return n rows as a CSR matrix ``(n, D)``; a slice shares what it can."""
        matrix = self._matrix
        if isinstance(rows, slice):
            first, last = (int(matrix.indptr[i]) for i in (rows.start, rows.stop))
            numbers, columns = matrix.data[first:last], matrix.indices[first:last]
            starts = matrix.indptr[rows.start : rows.stop + 1] - first
        else:
            taken = matrix[rows]
            numbers, columns, starts = taken.data, taken.indices, taken.indptr
        shape = len(starts) - 1, matrix.shape[1]
        with np.errstate(all="ignore"):
            numbers = numbers.astype(self.dtype, copy=False)
        return type(matrix)((numbers, columns, starts), shape=shape, copy=False)

    def copied_bytes(self, dropped: bool) -> int:
        """Return what a row taken may need, `dropped` telling whether some rows are left out."""
        matrix = self._matrix
        entries = int(np.diff(matrix.indptr).max(initial=0))
        entry = self.dtype.itemsize if matrix.dtype != self.dtype else 0
        return int(entries * (entry + (matrix.indices.itemsize + matrix.dtype.itemsize) * dropped))


def sparse_times_weight(
    features: Any,
    weight: NDArray[Any],
    out: NDArray[Any],
    bias: NDArray[Any] | None,
    tile_bytes: int,
) -> None:
    """Write x Wᵀ + b to out ``(n, V)``, a tile of classes at a time."""
    with np.errstate(all="ignore"):
        for some in _tiles(features.shape, len(weight), out.dtype, tile_bytes):
            tile = features @ np.ascontiguousarray(as_compute(weight[some], out.dtype).T)
            out[:, some] = tile if bias is None else tile + bias[some]


def sparse_add_to_weight(
    g: NDArray[Any], features: Any, out: NDArray[Any], accumulate: bool, tile_bytes: int
) -> None:
    """Write gᵀ x to out ``(V, D)``, or add it, a tile of classes at a time."""
    with np.errstate(all="ignore"):
        for some in _tiles(features.shape, len(out), out.dtype, tile_bytes):
            tile = (features.T @ np.ascontiguousarray(g[:, some])).T
            if accumulate:
                out[some] += tile
            else:
                out[some] = tile


def _tiles(
    shape: tuple[int, int], n_classes: int, dtype: np.dtype[Any], tile_bytes: int
) -> list[slice]:
    """Cut the classes so that three copies of W's part and two of the logits' fit."""
    n, n_features = shape
    each = max(1, tile_bytes // max(1, (3 * n_features + 2 * n) * dtype.itemsize))
    return [slice(i, min(i + each, n_classes)) for i in range(0, n_classes, each)]


def _joins(array: NDArray[Any]) -> bool:
    """Tell whether all axes but the last make one of one stride, without a copy."""
    axes = list(zip(array.shape, array.strides, strict=True))[:-1]
    axes = [(n, stride) for n, stride in axes if n > 1]
    return array.size == 0 or all(outer == n * inner for (_, outer), (n, inner) in pairwise(axes))
