"""Which implementation serves which device and dtype: one list, which the tests iterate.

Every backend takes logits as ``(outer, V, inner)``, where inner is 1 also as ``(N, V)``, and a
`RowPlan` from `rows.py`; row ``i = o·inner + k``. To add one, write its functions and append it to
`BACKENDS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from crossent import _native
from crossent.rows import RowPlan

Planned = tuple[RowPlan, NDArray[Any] | None]
"""A plan, and its distribution target, seen as the logits are, if that is its kind."""


Layer = tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]
"""x, W and b."""


Places = tuple[NDArray[Any] | None, NDArray[Any] | None, NDArray[Any] | None]
"""Where a layer's gradients in x, W and b go; None: not wanted."""

Along = tuple[NDArray[Any] | None, NDArray[Any] | None]
"""The same of W and b alone, or a direction in them; None: held fixed."""


class Backend(Protocol):
    """The functions that serve one (device, dtype); float64 results unless they are given `out`."""

    @property
    def device(self) -> str:
        """Where the arrays lie."""

    @property
    def dtype(self) -> str:
        """Name of the logits' dtype."""

    def cross_entropy(
        self, logits: NDArray[Any], plan: Planned, upstream: Any, out: NDArray[Any] | None
    ) -> NDArray[np.float64] | float:
        """Return the rows' losses ``(N,)``, or their sum unless the plan's reduction is "none".

        Writes the gradient to `out`, if given.
        """

    def softmax(self, logits: NDArray[Any], out: NDArray[Any], log: bool) -> None:
        """Write softmax or log-softmax to `out`."""

    def hvp(
        self,
        logits: NDArray[Any],
        plan: Planned,
        upstream: Any,
        vector: NDArray[Any],
        out: NDArray[Any],
    ) -> None:
        """Write the Hessian-vector product to `out`."""

    def thin_head(
        self,
        layer: Layer,
        plan: Planned,
        upstream: Any,
        places: Places,
        accumulate: bool,
    ) -> NDArray[np.float64] | float:
        """Return what `cross_entropy` does of the logits of a layer (x, W, b) of few classes.

        Writes its gradients to `places`, or adds those in W and b.
        """

    def thin_hvp(
        self,
        layer: Layer,
        plan: Planned,
        upstream: Any,
        along: Along,
        places: Along,
        accumulate: bool,
    ) -> None:
        """Write the Hessian in W and b times `along` to `places`, or add it."""

    def stats(self, logits: NDArray[Any], plan: Planned) -> tuple[NDArray[Any], ...]:
        """Return logsumexp, target_logprob, entropy, argmax and target_rank, each ``(N,)``."""


@dataclass(frozen=True, slots=True)
class NativeBackend:
    """The C++ kernels on the CPU."""

    dtype: str
    device: str = "cpu"

    def cross_entropy(
        self, logits: NDArray[Any], plan: Planned, upstream: Any, out: NDArray[Any] | None
    ) -> NDArray[np.float64] | float:
        if self.dtype == "bfloat16":
            logits, out = bits(logits), None if out is None else bits(out)
        each = plan[0].reduction == "none"
        return _native.cross_entropy(logits, _arguments(plan, upstream), out, each)

    def softmax(self, logits: NDArray[Any], out: NDArray[Any], log: bool) -> None:
        _native.softmax(bits(logits), bits(out), log, 1.0)

    def hvp(
        self,
        logits: NDArray[Any],
        plan: Planned,
        upstream: Any,
        vector: NDArray[Any],
        out: NDArray[Any],
    ) -> None:
        _native.hvp(bits(logits), _arguments(plan, upstream), bits(vector), bits(out))

    def thin_head(
        self,
        layer: Layer,
        plan: Planned,
        upstream: Any,
        places: Places,
        accumulate: bool,
    ) -> NDArray[np.float64] | float:
        each = plan[0].reduction == "none"
        return _native.thin_head(*layer, _arguments(plan, upstream), each, *places, accumulate)

    def thin_hvp(
        self,
        layer: Layer,
        plan: Planned,
        upstream: Any,
        along: Along,
        places: Along,
        accumulate: bool,
    ) -> None:
        _native.thin_hvp(*layer, _arguments(plan, upstream), *along, *places, accumulate)

    def stats(self, logits: NDArray[Any], plan: Planned) -> tuple[NDArray[Any], ...]:
        row, _ = plan
        found: tuple[NDArray[Any], ...] = _native.stats(
            bits(logits), row.target, row.row_weight, row.skip, row.logit_scale, row.softcap
        )
        return found


def bits(array: NDArray[Any]) -> NDArray[Any]:
    """Return bfloat16 as uint16: the buffer protocol knows no such dtype."""
    return array.view(np.uint16) if array.dtype.kind == "V" else array


def _arguments(plan: Planned, upstream: Any) -> tuple[Any, ...]:
    """Return the plan in the order in which the native module takes it apart."""
    row, distribution = plan
    for_all = isinstance(upstream, float)
    return (
        None if distribution is not None else row.target,
        row.target_prob,
        None if distribution is None else bits(distribution),
        row.class_weight,
        row.row_weight,
        row.skip,
        row.on,
        row.off,
        row.divisor,
        row.z_loss,
        row.logit_scale,
        row.softcap,
        upstream if for_all else 1.0,
        None if for_all else upstream,
    )


BACKENDS: list[Backend] = [
    NativeBackend(dtype) for dtype in ("float64", "float32", "float16", "bfloat16")
]
_BY_NAME = {backend.dtype: backend for backend in BACKENDS if backend.device == "cpu"}
_BY_DTYPE = {np.dtype(name): _BY_NAME[name] for name in ("float64", "float32", "float16")}


def backend_for(dtype: np.dtype[Any]) -> Backend:
    """Return the backend of NumPy arrays of `dtype`."""
    return _BY_DTYPE.get(dtype) or _BY_NAME[dtype.name]


def backend_named(dtype: str) -> Backend:
    """Return the CPU's backend of the dtype of this name; its bfloat16 may come as uint16."""
    return _BY_NAME[dtype]
