"""The fused head: weighted sums, softmax, loss and gradients, a chunk of rows at a time.

    z = x Wᵀ + b        g = ∂λ/∂z        ∂λ/∂x = g W        ∂λ/∂W = gᵀ x        ∂λ/∂b = Σ g

Notation: N rows, V classes, D features, n rows of a chunk; x ``(N, D)``, W ``(V, D)``, b ``(V,)``.

Design:
  a. A chunk's logits live in the workspace; the row kernel turns them into their gradient where
     they lie, so every option works here that works for logits. How many rows a chunk has depends
     on the shapes, the dtypes and the workspace, never on the threads.
  b. Few enough rows that logits and features stay in the last cache, if that leaves enough of them
     to make the products worth while; otherwise as many as the workspace holds, since each chunk
     reads and writes all of ∂λ/∂W.
  c. Rows that are dropped are left out before anything is multiplied, and products that nobody
     asked for are not made.
  d. 16-bit features and weights are multiplied as the numbers they are; their gradients are summed
     in float32 and rounded once. The gradient of the logits is float32; a product that makes a
     gradient in bfloat16 from it and a bfloat16 operand may round it to that (gemm.h), as
     frameworks do that hold such logits. The Hessian's products may not: their parts can cancel.
  e. With few classes the products are too thin to be worth their reading: one native pass over the
     features (native/thin.h) makes loss and gradients, block by block in the cache, and so the
     Hessian times a direction in W and b. Directions in x take the products.

Free of any framework: NumPy arrays in and out, bfloat16 as uint16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crossent import _native, products, rows
from crossent.backends import Along, Places, Planned, backend_named, bits
from crossent.features import (
    DenseRows,
    Rows,
    SparseRows,
    is_sparse,
    readable,
    sparse_add_to_weight,
    sparse_times_weight,
)
from crossent.products import (
    Product,
    as_compute,
    scratch_bytes,
    scratch_bytes_a_row,
    store,
)
from crossent.rows import RowPlan
from crossent.runtime import workspace_bytes

_CACHED_BYTES = 8 * 2**20
_ENOUGH_ROWS = 512
_PASS_BYTES = 24 * 2**20
_OWN_PRODUCT = products.native


class LinearGrad(NamedTuple):
    """Gradients of a head in its three arguments, or directions in them; None: left out."""

    input: Any
    linear_weight: Any
    linear_bias: Any


@dataclass(slots=True)
class _Chunk:
    """Some of the rows that are kept."""

    rows: Rows  # where they are among all rows
    n: int
    features: Any  # (n, D), dense or CSR
    along: NDArray[Any] | None  # (n, D), of a direction in x
    planned: Planned
    buffers: list[NDArray[Any]]  # (n, V), for logits


class Head:
    """One call's features, weights and plan.

    Parameters
    ----------
    where
        The public function's name, for messages.
    features, weight, bias
        x ``(…, D)``, an array of any strides whose leading axes hold the N rows, or a SciPy CSR
        matrix ``(N, D)``; W ``(V, D)``; b ``(V,)`` or None. Floating, bfloat16 also as uint16; a
        CSR matrix or the rows of an array of integers become `dtype` chunk by chunk.
    plan
        Of N rows and V classes, the class axis last.
    dtype
        "float64" to compute in float64, as one of x and W then is, anything else for float32.
    workspace
        Bytes to use beside the outputs, None for what the environment says; one row's logits and
        what a product needs (a few MB) are used in any case.
    product
        What multiplies dense arrays; None for this library's own kernels.
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
        self.where, self.plan = where, plan
        name = "float64" if dtype == "float64" else "float32"
        self.compute_dtype = compute = np.dtype(name)
        self._backend = backend_named(name)
        self._product = products.native if product is None else product
        self._sparse = is_sparse(features)
        self._features = (
            SparseRows(features, compute)
            if self._sparse
            else DenseRows(bits(features), self._readable(features))
        )
        self._weight = bits(weight)
        self._bias = None if bias is None else self._numbers(bias)
        in_bias = compute if bias is None else bits(bias).dtype
        self.dtypes = self._features.dtype, self._weight.dtype, in_bias
        self._kept = rows.kept(plan)
        self._n_kept = plan.n_rows if self._kept is None else len(self._kept)
        self.shape, self.all_kept = self._weight.shape, self._kept is None
        self._workspace = workspace_bytes(where, None) if workspace is None else workspace
        n_classes, n_features = self.shape
        self._thin = self._product is _OWN_PRODUCT and not self._sparse
        self._thin = self._thin and _native.thin(n_classes, n_features, compute == np.float64)

    def loss(self) -> NDArray[np.float64] | float:
        """Return the rows' losses ``(N,)`` with reduction "none", else their sum."""
        losses = _Losses(self.plan)
        if self._thin:
            for chunk in self._chunks(0):
                losses.add(chunk, self._pass(chunk, None, (None, None, None), False))
            return losses.found()
        for chunk in self._chunks(1):
            z = self._logits(chunk)
            losses.add(chunk, self._backend.cross_entropy(z, chunk.planned, None, None))
        return losses.found()

    def value_and_grad(
        self, upstream: Any, wrt: tuple[bool, bool, bool]
    ) -> tuple[NDArray[np.float64] | float, LinearGrad]:
        """Return the loss and its gradients in x, W and b, as far as `wrt` wants them.

        `upstream` multiplies the gradients: None, a float, or float64 ``(N,)``. The gradient in x
        is ``(N, D)``; each is in its own argument's dtype.
        """
        if not any(wrt):
            return self.loss(), LinearGrad(None, None, None)
        losses, sums = _Losses(self.plan), _Sums(self, wrt, may_round=True)
        if self._thin:
            for chunk in self._chunks(0):
                given = _part(upstream, chunk)
                losses.add(chunk, self._pass(chunk, given, *sums.places(chunk)))
                sums.finish(chunk)
            return losses.found(), sums.found()
        for chunk in self._chunks(1):
            z = self._logits(chunk)
            given = _part(upstream, chunk)
            losses.add(chunk, self._backend.cross_entropy(z, chunk.planned, given, z))
            sums.add(chunk, z, chunk.features, self._weight)
            sums.finish(chunk)
        return losses.found(), sums.found()

    def hvp(self, upstream: Any, vector: LinearGrad) -> LinearGrad:
        """Return the Hessian in x, W and b times `vector`, whose None parts are held fixed.

        With z' = x' Wᵀ + x W'ᵀ + b' and h = (∂²λ/∂z²) z': h W + g W', hᵀ x + gᵀ x' and Σ h. The
        parts of `vector` have the dtypes of what they are directions in; x' may be ``(…, D)``.
        """
        wanted = vector.input is not None, vector.linear_weight is not None
        if not any(wanted) and vector.linear_bias is None:
            return vector
        sums = _Sums(self, (*wanted, vector.linear_bias is not None))
        along_x = None
        if wanted[0]:
            along_x = DenseRows(bits(vector.input), self._readable(vector.input))
        along_weight = bits(vector.linear_weight) if wanted[1] else None
        along_bias = None if vector.linear_bias is None else self._numbers(vector.linear_bias)
        if self._thin and along_x is None:
            for chunk in self._chunks(0):
                given = _part(upstream, chunk)
                self._pass_hvp(chunk, given, (along_weight, along_bias), *sums.places(chunk))
            return sums.found()
        for chunk in self._chunks(2, along_x):
            z, h, dx = self._logits(chunk), chunk.buffers[1], chunk.along
            if along_weight is not None:
                self._times(chunk.features, along_weight, h, along_bias)
            if dx is not None and along_weight is not None:
                self._product(dx, self._weight.T, h, accumulate=True)
            elif dx is not None:
                self._product(dx, self._weight.T, h, bias=along_bias)
            elif along_weight is None:
                h[...] = along_bias
            given = _part(upstream, chunk)
            self._backend.hvp(z, chunk.planned, given, h, h)
            sums.add(chunk, h, chunk.features, self._weight)
            if dx is not None and along_weight is not None:
                self._backend.cross_entropy(z, chunk.planned, given, z)
                sums.add(chunk, z, dx, along_weight, more=True)
            sums.finish(chunk)
            del dx  # as the chunk's own copies
        return sums.found()

    def stats(self) -> tuple[NDArray[Any], ...]:
        """Return logsumexp, target_logprob, entropy, argmax and target_rank, each ``(N,)``."""
        n = self.plan.n_rows
        floats, integers = [np.full(n, math.nan) for _ in "123"], [np.full(n, -1) for _ in "12"]
        for chunk in self._chunks(1):
            z = self._logits(chunk)
            found = self._backend.stats(z, chunk.planned)
            for whole, some in zip((*floats, *integers), found, strict=True):
                whole[chunk.rows] = some
        return *floats, *integers

    # Chunks and their logits ----------------------------------------------------------------------

    def _chunk_rows(self, n_buffers: int, along_x: DenseRows | None) -> int:
        n_classes, n_features = self._weight.shape
        compute, dropped = self.compute_dtype, self._kept is not None
        row = self._features.copied_bytes(dropped)
        if along_x is not None:
            row += along_x.copied_bytes(dropped)
        if self.plan.kind == "distribution":
            target = self.plan.target
            row += rows.distribution_rows(self.plan).copied_bytes(dropped)
            converts = self._readable(target) != bits(target).dtype or not target.flags.aligned
            row += converts * n_classes * compute.itemsize
        # Beside its logits a row may need its gradient in x before that is rounded, and copies.
        if n_buffers > 0 or row > 0 or self._features.dtype != compute:
            row += (n_buffers * n_classes + n_features) * compute.itemsize
        if n_buffers == 0:
            room = max(self._workspace - _PASS_BYTES, self._workspace // 4)
            return self._n_kept if row == 0 else self._equal(max(1, room // row))
        row += scratch_bytes_a_row(compute)
        if self._sparse:
            scratch = self._tile_bytes
        else:
            scratch = scratch_bytes(self._n_kept, n_classes, n_features, compute)
        room = max(self._workspace - scratch, self._workspace // 4)
        cached = _CACHED_BYTES // row
        n = max(1, min(room // row, cached) if cached >= _ENOUGH_ROWS else room // row)
        return self._equal(n)

    def _equal(self, most: int) -> int:
        """Return the length of chunks of about one length: none's products are slow then."""
        n_chunks: int = max(1, math.ceil(self._n_kept / most))
        return math.ceil(self._n_kept / n_chunks)

    def _chunks(self, n_buffers: int, along_x: DenseRows | None = None) -> Iterator[_Chunk]:
        n = self._chunk_rows(n_buffers, along_x)
        size = n, self.plan.n_classes
        buffers = [np.empty(size, self.compute_dtype) for _ in range(n_buffers)]
        for i in range(0, self._n_kept, max(1, n)):
            end = min(self._n_kept, i + n)
            some: Rows = slice(i, end)
            if self._kept is not None:
                some = self._kept[i:end]
                if some[-1] - some[0] == len(some) - 1:
                    some = slice(int(some[0]), int(some[-1]) + 1)
            chunk = _Chunk(
                some,
                end - i,
                self._features.take(some),
                None if along_x is None else along_x.take(some),
                self._planned(some),
                [buffer[: end - i] for buffer in buffers],
            )
            yield chunk
            # What was copied goes before the next is.
            chunk.features = chunk.along = chunk.planned = None  # type: ignore[assignment]

    def _planned(self, some: Rows) -> Planned:
        plan = rows.part(self.plan, some)
        if plan.kind != "distribution":
            return plan, None
        return plan, readable(bits(plan.target), self._readable(plan.target))

    def _readable(self, array: NDArray[Any]) -> np.dtype[Any]:
        """Return the dtype in which kernels read an array's numbers; bfloat16 as uint16."""
        dtype = bits(array).dtype
        known = rows.is_float(dtype) or dtype == np.uint16
        return dtype.newbyteorder("=") if known else self.compute_dtype

    def _numbers(self, array: Any) -> NDArray[Any]:
        with np.errstate(all="ignore"):
            return np.ascontiguousarray(as_compute(bits(array), self.compute_dtype))

    def _logits(self, chunk: _Chunk) -> NDArray[Any]:
        z = chunk.buffers[0]
        self._times(chunk.features, self._weight, z, self._bias)
        return z

    def _pass(
        self,
        chunk: _Chunk,
        upstream: Any,
        places: Places,
        accumulate: bool = False,
    ) -> NDArray[np.float64] | float:
        """Return the loss, and make the gradients, in one pass over the features."""
        layer = chunk.features, self._weight, self._bias
        return self._backend.thin_head(layer, chunk.planned, upstream, places, accumulate)

    def _pass_hvp(
        self, chunk: _Chunk, upstream: Any, along: Along, places: Places, accumulate: bool
    ) -> None:
        """Make the Hessian times `along`, directions in W and b, in one pass over the features."""
        layer = chunk.features, self._weight, self._bias
        self._backend.thin_hvp(layer, chunk.planned, upstream, along, places[1:], accumulate)

    # Products -------------------------------------------------------------------------------------

    @property
    def _tile_bytes(self) -> int:
        """Where x is sparse, what a tile of classes may take: SciPy copies what it multiplies."""
        return self._workspace // 4

    def _times(
        self, features: Any, weight: NDArray[Any], out: NDArray[Any], bias: NDArray[Any] | None
    ) -> None:
        """Write x Wᵀ + b."""
        if self._sparse:
            sparse_times_weight(features, weight, out, bias, self._tile_bytes)
        else:
            self._product(features, weight.T, out, bias=bias)

    def add_to_input(
        self,
        g: NDArray[Any],
        weight: NDArray[Any],
        out: NDArray[Any],
        accumulate: bool,
        may_round: bool,
    ) -> None:
        """Write or add g W."""
        self._product(g, weight, out, accumulate=accumulate, may_round=may_round)

    def add_to_weight(
        self, g: NDArray[Any], features: Any, out: NDArray[Any], accumulate: bool, may_round: bool
    ) -> None:
        """Write or add gᵀ x."""
        if self._sparse:
            sparse_add_to_weight(g, features, out, accumulate, self._tile_bytes)
        else:
            self._product(g.T, features, out, accumulate=accumulate, may_round=may_round)

    def add_to_bias(self, g: NDArray[Any], out: NDArray[Any], accumulate: bool) -> None:
        """Write or add the sum of the rows of g to out ``(1, V)``."""
        self._product(np.ones((1, len(g)), g.dtype), g, out, accumulate=accumulate)


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
            with np.errstate(all="ignore"):
                return float(np.sum(self._sums))


class _Sums:
    """The gradients in x, W and b that are wanted, chunk by chunk.

    `may_round`: what is multiplied may be rounded to bfloat16 for a gradient in bfloat16.
    """

    def __init__(
        self, head: Head, wrt: tuple[bool, bool, bool], *, may_round: bool = False
    ) -> None:
        self._head, self._compute, self._may_round = head, head.compute_dtype, may_round
        self._input_dtype, self._weight_dtype, self._bias_dtype = head.dtypes
        n_classes, n_features = head.shape
        make = np.empty if head.all_kept else np.zeros
        shape = head.plan.n_rows, n_features
        self._input = make(shape, self._input_dtype) if wrt[0] else None
        self._weight = np.empty((n_classes, n_features), self._compute) if wrt[1] else None
        self._bias = np.empty((1, n_classes), self._compute) if wrt[2] else None
        self._rows: NDArray[Any] | None = None  # of the chunk's gradient in x
        self._spare: NDArray[Any] | None = None  # for them, where they cannot lie in their place
        self._first = True

    def add(
        self,
        chunk: _Chunk,
        g: NDArray[Any],
        features: Any,
        weight: NDArray[Any],
        more: bool = False,
    ) -> None:
        """Add g W, gᵀ x and Σ g; `more`: to the same rows' g W, and no Σ g."""
        later = not self._first
        if self._input is not None:
            if not more:
                self._rows = self._place(self._input, chunk)
            assert self._rows is not None
            may_round = self._may_round and self._input_dtype == np.uint16
            self._head.add_to_input(g, weight, self._rows, more, may_round)
        if self._weight is not None:
            may_round = self._may_round and self._weight_dtype == np.uint16
            self._head.add_to_weight(g, features, self._weight, later, may_round)
        if self._bias is not None and not more:
            self._head.add_to_bias(g, self._bias, later)
        self._first = False

    def places(self, chunk: _Chunk) -> tuple[Places, bool]:
        """Return where gradients in x, W and b go, and whether the latter two are added there."""
        later, self._first = not self._first, False
        if self._input is not None:
            self._rows = self._place(self._input, chunk)
        return (self._rows, self._weight, self._bias), later

    def _place(self, whole: NDArray[Any], chunk: _Chunk) -> NDArray[Any]:
        if whole.dtype == self._compute and isinstance(chunk.rows, slice):
            return whole[chunk.rows]
        if self._spare is None or len(self._spare) < chunk.n:
            self._spare = np.empty((chunk.n, whole.shape[1]), self._compute)
        return self._spare[: chunk.n]

    def finish(self, chunk: _Chunk) -> None:
        """Put the chunk's gradient in x in its place, if it was not made there."""
        if self._input is None or self._rows is None or self._rows.base is self._input:
            return
        if isinstance(chunk.rows, slice):
            store(self._rows, self._input[chunk.rows])
        else:
            store(self._rows, self._input, chunk.rows)

    def found(self) -> LinearGrad:
        """Return the gradients, each in its argument's dtype."""
        bias = self._rounded(self._bias, self._bias_dtype)
        weight = self._rounded(self._weight, self._weight_dtype)
        return LinearGrad(self._input, weight, None if bias is None else bias[0])

    def _rounded(self, sums: NDArray[Any] | None, dtype: np.dtype[Any]) -> NDArray[Any] | None:
        if sums is None:
            return None
        if self._first:
            sums[...] = 0  # no row was kept
        if sums.dtype == dtype:
            return sums
        rounded = np.empty(sums.shape, dtype)
        store(sums, rounded)
        return rounded


def _part(upstream: Any, chunk: _Chunk) -> Any:
    return upstream[chunk.rows] if isinstance(upstream, np.ndarray) else upstream
