"""The fused head: weighted sums, softmax, loss and gradients, a chunk of rows at a time.

    z = x Wᵀ + b        g = ∂λ/∂z        ∂λ/∂x = g W        ∂λ/∂W = gᵀ x        ∂λ/∂b = Σ g

Notation: N rows, V classes, D features; x ``(N, D)``, W ``(V, D)``, b ``(V,)``.

Design:
  a. A chunk's logits live in the workspace; the row kernel turns them into their gradient where
     they lie, so every option works here that works for logits. How many rows a chunk has depends
     on the shapes, the dtype and the workspace, never on the threads.
  b. Few enough rows that chunk and features stay in the last cache, if that leaves enough of them
     to make the products worth while; otherwise as many as the workspace holds, since each chunk
     reads and writes all of ∂λ/∂W.
  c. Rows that are dropped are left out before anything is multiplied, and products that nobody
     asked for are not made.
  d. 16-bit features and weights are multiplied as float32; their gradients are summed in float32
     and rounded once.

Free of any framework: NumPy arrays in and out, bfloat16 as uint16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crossent import products, rows
from crossent.backends import Planned, backend_named
from crossent.products import TILE_BYTES, Product, native_product
from crossent.rows import RowPlan
from crossent.runtime import workspace_bytes

_CACHED_BYTES = 8 * 2**20
_ENOUGH_ROWS = 512


class LinearGrad(NamedTuple):
    """Gradients of a head, or directions in its arguments; None where there is none."""

    input: Any
    linear_weight: Any
    linear_bias: Any


class _Chunk(NamedTuple):
    """Some of the rows that are kept."""

    rows: slice | NDArray[np.int64]  # their positions among all rows
    n: int
    features: Any  # (n, D), dense or CSR
    planned: Planned


class Head:
    """One call's features, weights and plan.

    Parameters
    ----------
    where
        The public function's name, for messages.
    features, weight, bias
        x ``(N, D)``, an array of any strides or a SciPy CSR matrix; W ``(V, D)``; b ``(V,)`` or
        None; all of `dtype`, bfloat16 as uint16.
    plan
        Of N rows and V classes, the class axis last.
    dtype
        "float64", "float32", "float16" or "bfloat16".
    workspace
        Bytes to use beside the outputs, None for what the environment says; one row's logits and
        `TILE_BYTES` are used in any case.
    product
        What multiplies; None for this library's own kernels.
    """

    def __init__(
        self,
        where: str,
        features: Any,
        weight: NDArray[Any],
        bias: NDArray[Any] | None,
        plan: RowPlan,
        dtype: str,
        *,
        workspace: int | None = None,
        product: Product | None = None,
    ) -> None:
        self.where = where
        self.features, self.weight, self.plan = features, weight, plan
        self.sparse = not isinstance(features, np.ndarray)
        self.compute_dtype = np.dtype(np.float64 if dtype == "float64" else np.float32)
        self.backend = backend_named(self.compute_dtype.name)
        self.bias = None if bias is None else self._numbers(bias)
        self.product = native_product if product is None else product
        self.workspace = workspace_bytes() if workspace is None else workspace
        self.kept = rows.kept(plan)
        self.n_kept = plan.n_rows if self.kept is None else len(self.kept)
        self.distribution = rows.distribution(plan, self.compute_dtype)

    def loss(self) -> NDArray[np.float64] | float:
        """Return the rows' losses ``(N,)`` with reduction "none", else their sum."""
        losses = _Losses(self.plan)
        logits = self._buffer(1)
        for chunk in self._chunks(len(logits)):
            z = self._logits(chunk, logits)
            losses.add(chunk, self.backend.cross_entropy(z, chunk.planned, None, None))
        return losses.found()

    def value_and_grad(
        self, upstream: Any, wrt: tuple[bool, bool, bool]
    ) -> tuple[NDArray[np.float64] | float, LinearGrad]:
        """Return the loss and its gradients in x, W and b, as far as `wrt` wants them.

        `upstream` multiplies the gradients: None, a float, or float64 ``(N,)``.
        """
        if not any(wrt):
            return self.loss(), LinearGrad(None, None, None)
        losses, sums = _Losses(self.plan), _Sums(self, wrt)
        logits = self._buffer(1)
        for chunk in self._chunks(len(logits)):
            z = self._logits(chunk, logits)
            given = _part(upstream, chunk)
            losses.add(chunk, self.backend.cross_entropy(z, chunk.planned, given, z))
            sums.add(chunk, (z, chunk.features, self.weight))
            sums.round(chunk)
        return losses.found(), sums.found()

    def hvp(self, upstream: Any, vector: LinearGrad) -> LinearGrad:
        """Return the Hessian in x, W and b times `vector`, whose None parts are held fixed.

        With z' = x' Wᵀ + x W'ᵀ + b' and h = (∂²λ/∂z²) z': h W + g W', hᵀ x + gᵀ x' and Σ h.
        """
        sums = _Sums(self, tuple(part is not None for part in vector))
        both = vector.input is not None and vector.linear_weight is not None
        logits, along = self._buffer(2), self._buffer(2)
        for chunk in self._chunks(len(logits)):
            z = self._logits(chunk, logits)
            along_x = None if vector.input is None else vector.input[chunk.rows]
            h = self._along(chunk, along_x, vector, along)
            given = _part(upstream, chunk)
            self.backend.hvp(z, chunk.planned, given, h, h)
            sums.add(chunk, (h, chunk.features, self.weight))
            if both:
                self.backend.cross_entropy(z, chunk.planned, given, z)
                sums.add(chunk, (z, along_x, vector.linear_weight), more=True)
            sums.round(chunk)
        return sums.found()

    def stats(self) -> tuple[NDArray[Any], ...]:
        """Return logsumexp, target_logprob, entropy, argmax and target_rank, each ``(N,)``."""
        n = self.plan.n_rows
        found = (
            *(np.full(n, math.nan) for _ in range(3)),
            *(np.full(n, -1, np.int64) for _ in range(2)),
        )
        logits = self._buffer(1)
        for chunk in self._chunks(len(logits)):
            z = self._logits(chunk, logits)
            for whole, some in zip(found, self.backend.stats(z, chunk.planned), strict=True):
                whole[chunk.rows] = some
        return found

    # Chunks and their logits ----------------------------------------------------------------------

    def _buffer(self, n: int) -> NDArray[Any]:
        """Return one of `n` buffers for a chunk's logits."""
        return np.empty((self._chunk_rows(n), self.plan.n_classes), self.compute_dtype)

    def _chunk_rows(self, n_buffers: int) -> int:
        n_classes, n_features = self.weight.shape
        size = self.compute_dtype.itemsize
        # Beside its logits a row may need its features, gathered, and their gradient unrounded.
        row = (n_buffers + self.sparse) * n_classes * size + n_features * 2 * size
        most = max(1, (self.workspace - TILE_BYTES) // max(1, row))
        cached = _CACHED_BYTES // max(1, (n_buffers * n_classes + n_features) * size)
        n = min(most, cached) if cached >= _ENOUGH_ROWS else most
        return -(-self.n_kept // max(1, -(-self.n_kept // n)))

    def _chunks(self, n: int) -> Iterator[_Chunk]:
        for i in range(0, self.n_kept, max(1, n)):
            end = min(self.n_kept, i + n)
            some = slice(i, end) if self.kept is None else self.kept[i:end]
            planned = rows.part(self.plan, some), self._distribution(some)
            yield _Chunk(some, end - i, self.features[some], planned)

    def _distribution(self, some: slice | NDArray[np.int64]) -> NDArray[Any] | None:
        if self.distribution is None:
            return None
        target: NDArray[Any] = self.distribution.reshape(-1, self.plan.n_classes)[some]
        return target

    def _numbers(self, array: Any) -> NDArray[Any]:
        return np.ascontiguousarray(products.as_compute(array, self.compute_dtype))

    def _logits(self, chunk: _Chunk, buffer: NDArray[Any]) -> NDArray[Any]:
        z = buffer[: chunk.n]
        self._times_weight(chunk.features, self.weight, z, bias=self.bias)
        return z

    def _along(
        self, chunk: _Chunk, along_x: Any, vector: LinearGrad, buffer: NDArray[Any]
    ) -> NDArray[Any]:
        """Return z' = x' Wᵀ + x W'ᵀ + b'."""
        along = buffer[: chunk.n]
        bias = None if vector.linear_bias is None else self._numbers(vector.linear_bias)
        if vector.linear_weight is not None:
            self._times_weight(chunk.features, vector.linear_weight, along, bias=bias)
            bias = None
        elif along_x is None:
            along[...] = 0 if bias is None else bias
            return along
        if along_x is not None:
            more = vector.linear_weight is not None
            self._times_weight(along_x, self.weight, along, accumulate=more, bias=bias)
        return along

    def _times_weight(
        self,
        features: Any,
        weight: NDArray[Any],
        out: NDArray[Any],
        *,
        accumulate: bool = False,
        bias: NDArray[Any] | None = None,
    ) -> None:
        if isinstance(features, np.ndarray):
            self.product(features, weight.T, out, accumulate=accumulate, bias=bias)
            return
        for some in self._tiles(len(weight)):
            tile = features @ products.as_compute(weight[some], self.compute_dtype).T
            out[:, some] = tile if bias is None else tile + bias[some]

    def _tiles(self, n_classes: int) -> Iterator[slice]:
        """Cut the classes so that D numbers each, copied, take `TILE_BYTES`."""
        n_features = self.weight.shape[1]
        n = max(1, TILE_BYTES // max(1, n_features * self.compute_dtype.itemsize))
        return (slice(i, i + n) for i in range(0, n_classes, n))

    def add_to_weight(
        self, g: NDArray[Any], features: Any, out: NDArray[Any], *, accumulate: bool
    ) -> None:
        """Write or add gᵀ x."""
        if isinstance(features, np.ndarray):
            self.product(g.T, features, out, accumulate=accumulate)
            return
        for some in self._tiles(len(out)):
            tile = (features.T @ g[:, some]).T
            if accumulate:
                out[some] += tile
            else:
                out[some] = tile


class _Losses:
    """The rows' losses, or their sum, chunk by chunk."""

    def __init__(self, plan: RowPlan) -> None:
        self._each = np.zeros(plan.n_rows) if plan.reduction == "none" else None
        self._sums: list[float] = []

    def add(self, chunk: _Chunk, found: NDArray[np.float64] | float) -> None:
        if self._each is not None:
            self._each[chunk.rows] = found
        else:
            self._sums.append(float(found))

    def found(self) -> NDArray[np.float64] | float:
        if self._each is not None:
            return self._each
        try:
            return math.fsum(self._sums)
        except (OverflowError, ValueError):  # beyond float64, or infinities of both signs
            return float(np.sum(self._sums))


class _Sums:
    """The gradients in x, W and b that are wanted, chunk by chunk."""

    def __init__(self, head: Head, wrt: tuple[bool, ...]) -> None:
        n_classes, n_features = head.weight.shape
        dtype = head.weight.dtype
        self._head, compute = head, head.compute_dtype
        self._wide = dtype == compute  # outputs take the sums as they are
        shape = head.plan.n_rows, n_features
        all_kept = head.kept is None
        self._input = (np.empty if all_kept else np.zeros)(shape, dtype) if wrt[0] else None
        self._weight = np.empty((n_classes, n_features), compute) if wrt[1] else None
        self._bias = np.empty((1, n_classes), compute) if wrt[2] else None
        self._rows: NDArray[Any] | None = None  # of the chunk's gradient in x
        self._first = True

    def add(self, chunk: _Chunk, given: tuple[Any, Any, Any], *, more: bool = False) -> None:
        """Add g W, gᵀ x and Σ g of ``(g, x, W)``; `more`: to the same rows, and no Σ g."""
        g, features, weight = given
        head, later = self._head, more or not self._first
        if self._input is not None:
            if not more:
                direct = self._wide and isinstance(chunk.rows, slice)
                new = (chunk.n, weight.shape[1])
                self._rows = (
                    self._input[chunk.rows] if direct else np.empty(new, head.compute_dtype)
                )
            assert self._rows is not None
            head.product(g, weight, self._rows, accumulate=more)
        if self._weight is not None:
            head.add_to_weight(g, features, self._weight, accumulate=later)
        if self._bias is not None and not more:
            head.product(np.ones((1, chunk.n), g.dtype), g, self._bias, accumulate=later)
        self._first = False

    def round(self, chunk: _Chunk) -> None:
        """Put the chunk's gradient in x in its place, if it is not made there."""
        rows, self._rows = self._rows, None
        if rows is None or self._input is None or rows.base is self._input:
            return
        if self._wide:
            self._input[chunk.rows] = rows
        else:
            rounded = np.empty(rows.shape, self._input.dtype)
            products.store(rows, rounded)
            self._input[chunk.rows] = rounded

    def found(self) -> LinearGrad:
        bias = None if self._bias is None else self._bias[0]
        return LinearGrad(self._input, self._rounded(self._weight), self._rounded(bias))

    def _rounded(self, sums: NDArray[Any] | None) -> NDArray[Any] | None:
        if sums is None:
            return None
        if self._first:
            sums[...] = 0  # no row was kept
        if self._wide:
            return sums
        rounded = np.empty(sums.shape, self._head.weight.dtype)
        n = max(1, TILE_BYTES // (8 * max(1, sums[0].size)))
        for i in range(0, len(sums), n):
            products.store(sums[i : i + n], rounded[i : i + n])
        return rounded


def _part(upstream: Any, chunk: _Chunk) -> Any:
    return upstream[chunk.rows] if isinstance(upstream, np.ndarray) else upstream
