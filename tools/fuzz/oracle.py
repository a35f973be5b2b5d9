"""What a call must give: `crossent.reference` in extended precision, and how far off it may be.

Design:
  a. The terms of the formulas come from `reference.rows` with longdouble logits (64 bits of
     mantissa, and an exponent that nothing here over- or underflows). The meaning of the options is
     worked out a second time, from the design page, and held against the plan's.
  b. Tolerances are the promises of the design page: 4 ulp for a plain row, else 8 ulp of the parts
     that are subtracted. A soft cap adds what the rounding of z = cap·tanh(x) does to exp(z).
     16-bit results may be half a unit of their own further off.
  c. NaN and infinity must stand exactly where they stand in the exact result; a finite one may be
     infinite only within a rounding error of the largest number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from cases import Case

from crossent import reference
from crossent.options import OPTION_NAMES, Options
from crossent.rows import lower

Wide = np.longdouble
PRECISION = {  # bits of the mantissa, and the exponent of the smallest number
    "float64": (53, -1074),
    "float32": (24, -149),
    "float16": (11, -24),
    "bfloat16": (8, -133),
}
LARGEST = {
    name: Wide(2) ** exponent
    for name, exponent in {"float64": 1024, "float32": 128, "float16": 16, "bfloat16": 128}.items()
}
OPTION_SET = frozenset(OPTION_NAMES)


def ulp(x: Any, dtype: str) -> Any:
    """Distance of neighbouring numbers of `dtype` at x."""
    bits, lowest = PRECISION[dtype]
    _, exponent = np.frexp(x)
    return np.ldexp(Wide(1), np.maximum(exponent - bits, lowest))


def differs(got: Any, exact: Any, tolerance: Any, dtype: str) -> str | None:
    """Say where `got` is not `exact` within `tolerance`; `dtype` is what `got` was rounded to."""
    if np.shape(got) != np.shape(exact):
        return f"shape {np.shape(got)}, expected {np.shape(exact)}"
    x = np.asarray(got).astype(Wide)
    with np.errstate(all="ignore"):
        good = np.abs(x - exact) <= tolerance
        good |= x == exact
        good |= np.isnan(x) & np.isnan(exact)
        # The last rounding to the dtype: half its unit, and infinity past its largest number.
        edge = LARGEST[dtype] * (1 - Wide(2) ** -(PRECISION[dtype][0] + 1))
        good |= np.isinf(x) & (np.abs(exact) + tolerance >= edge) & (np.sign(x) == np.sign(exact))
    if good.all():
        return None
    at = tuple(int(k) for k in np.argwhere(~np.atleast_1d(good))[0])
    worst = [np.atleast_1d(np.broadcast_to(a, good.shape))[at] for a in (x, exact, tolerance)]
    return (
        f"at {at}: got {worst[0]!s}, exact {worst[1]!s}, allowed difference {float(worst[2]):.3g}"
    )


class Expected:
    """The exact values of one valid case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.dtype = case.dtype.name
        self.compute = case.compute_dtype.name
        self.logits = np.asarray(case.args[0]).astype(Wide)

    def softmax(self, got: Any, *, log: bool) -> Iterator[str | None]:
        """Judge softmax and log_softmax."""
        function = reference.log_softmax if log else reference.softmax
        with np.errstate(all="ignore"):
            exact = function(self.logits, self.case.axis)
            yield differs(got, exact, self._stored(4 * ulp(exact, self.compute), exact), self.dtype)

    def jacobian(self, got: Any) -> Iterator[str | None]:
        """Judge softmax_jacobian."""
        with np.errstate(all="ignore"):
            exact = reference.softmax_jacobian(self.logits)
            p = reference.softmax(self.logits)
            room = self._plainly(p) * self._unit() * np.abs(exact) + 4 * ulp(Wide(0), self.compute)
            yield differs(got, exact, room, self.compute)

    def loss(self, got_loss: Any, got_grad: Any = None) -> Iterator[str | None]:
        """Judge a loss, and its gradient."""
        t = self._terms()
        plan = self.plan
        if self._extreme(t):
            return
        with np.errstate(all="ignore"):
            surprise = np.where(t.q == 0, 0, t.gap) + t.log_sum[:, None]
            largest_lse = np.abs(t.lse - t.log_sum) + t.log_sum
            pieces = np.abs(t.q) * surprise
            exact = (t.q * surprise).sum(axis=-1)
            size = pieces.sum(axis=-1)
            if plan.z_loss:
                exact = exact + plan.z_loss * t.Q * t.lse**2
                # Σ|q|, not |Q|: each q is a rounded product, and q of both signs may cancel.
                weight = np.abs(t.q).sum(axis=-1)
                size = size + plan.z_loss * weight * largest_lse**2
            exact, size = t.r * exact, np.abs(t.r) * size
            tolerance = self._ulps * ulp(size, self.compute) + 2 * self._lean(t) * (
                np.abs(t.r) * (np.abs(t.q).sum(axis=-1) + plan.z_loss * np.abs(t.Q) * largest_lse)
            )
            tolerance = np.where(size == 0, 0, tolerance)
            if plan.reduction == "none":
                shape = plan.rows_shape
                yield differs(
                    got_loss, exact.reshape(shape), tolerance.reshape(shape), self.compute
                )
            else:
                # One rounding of the sum more; an infinite row makes its tolerance meaningless.
                total = exact.sum()
                room = np.nansum(tolerance) + ulp(total, self.compute) + ulp(size.sum(), "float64")
                yield differs(got_loss, total, room, self.compute)
            if got_grad is not None:
                exact, room = self._gradient(t)
                yield differs(got_grad, self._back(exact), self._back(room), self.dtype)

    def hvp(self, got: Any) -> Iterator[str | None]:
        """Judge a Hessian-vector product."""
        t = self._terms()
        plan = self.plan
        if self._extreme(t) or np.isnan(t.q).any():
            return
        with np.errstate(all="ignore"):
            vector = np.asarray(self.case.args[2]).astype(self.case.dtype).astype(Wide)
            exact = reference.hvp(self.logits, plan, vector, self._upstream())
            x = np.where(t.kept[:, None], self._rows(vector), 0)
            y = np.abs(t.slope * x)
            mean = (t.p * y).sum(axis=-1, keepdims=True)
            top = np.take_along_axis(y, np.argmax(t.p, axis=-1, keepdims=True), axis=-1)
            largest_lse = (np.abs(t.lse - t.log_sum) + t.log_sum)[:, None]
            q = np.abs(t.q).sum(axis=-1, keepdims=True)
            spread = q * (1 + 2 * plan.z_loss * largest_lse) * (y + top + mean)
            size = np.abs(t.slope) * t.p * (spread + 2 * plan.z_loss * q * mean)
            room = 16 * size * (self._unit() + self._lean(t)[:, None])
            u = np.abs(self._upstream_rows(t))[:, None]
            if plan.softcap:
                units = 32 * self._unit() + 2 * self._lean(t)[:, None]
                room = room + units * self._grad_z(t)[1] * np.abs(t.curvature * x)
            room = u * room
            room = self._stored(room + 4 * ulp(Wide(0), self.compute), self._rows(exact))
            yield differs(got, exact, self._back(room), self.dtype)

    def hessian(self, got: Any) -> Iterator[str | None]:
        """Judge a Hessian."""
        t = self._terms()
        if self._extreme(t):
            return
        with np.errstate(all="ignore"):
            exact = reference.hessian(self.logits, self.plan)
            n = self.case.n_classes
            # Computed plainly in the compute dtype: argument errors of exp, and sums of q.
            largest_lse = (np.abs(t.lse - t.log_sum) + t.log_sum)[:, None, None]
            q = np.abs(t.q).sum(axis=-1)[:, None, None]
            size = q * (1 + 2 * self.plan.z_loss * (1 + largest_lse))
            s = np.abs(t.slope)[:, :, None] * np.abs(t.slope)[:, None, :]
            size = size * s * np.minimum(t.p[:, :, None], 1) * np.minimum(t.p[:, None, :] + 1, 1)
            size = size + np.abs(t.curvature)[:, :, None] * q * (
                1 + 2 * self.plan.z_loss * largest_lse
            )
            units = self._unit() * self._plainly(t.p)
            below = ulp(Wide(0), self.compute) * (1 + size)
            room = np.abs(t.r)[:, None, None] * (size * units + below) + below
            shape = (*self.plan.rows_shape, n, n)
            yield differs(got, exact.reshape(shape), room.reshape(shape), self.compute)

    def stats(self, got: Any) -> Iterator[str | None]:
        """Judge row statistics."""
        target = self.case.args[1]
        t = self._terms(np.zeros(self.case.rows_shape, np.int64) if target is None else target)
        with np.errstate(all="ignore"):
            exact = reference.stats(self.logits, self.plan)
            if target is None:
                yield (
                    None if got[1] is None and got[4] is None else "no target, but an answer on it"
                )
            shape = self.plan.rows_shape
            lean = self._lean(t).reshape(shape)
            largest = (np.abs(t.lse - t.log_sum) + t.log_sum).reshape(shape)
            yield differs(got[0], exact[0], 4 * ulp(largest, self.compute) + lean, self.compute)
            if target is not None:
                room = 4 * ulp(exact[1], self.compute) + 2 * lean
                yield differs(got[1], exact[1], room, self.compute)
                yield differs(got[4], exact[4], 0, "float64")
            # A relative error d of p turns p·gap by d·p·gap; those of the cap by lean·p·(1 + gap).
            gap = np.where(t.p == 0, 0, t.gap)
            turned = (t.p * (1 + gap)).sum(axis=-1).reshape(shape) * 2 * lean
            # exp is floored at 2^-1085 (exp.h): times a gap of up to 1000 a class.
            turned = turned + self.case.n_classes * Wide(2) ** -1075
            yield differs(got[2], exact[2], 8 * ulp(exact[2], self.compute) + turned, self.compute)
            yield differs(got[3], exact[3], 0, "float64")

    def _terms(self, target: Any = None) -> Any:
        case = self.case
        given = {name: case.kwargs[name] for name in OPTION_SET & case.kwargs.keys()}
        if case.function == "cross_entropy_stats":
            given["reduction"] = "none"
            if case.args[1] is None:
                given.pop("ignore_index", None)
        target = case.args[1] if target is None else target
        array = np.asarray(target)
        if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
            with np.errstate(all="ignore"):
                target = array.astype(case.compute_dtype)
        axis = case.axis % len(case.shape)
        options = Options(**given)
        self.plan = lower("fuzz", case.shape, axis, case.compute_dtype, target, options)
        if self.plan.kind == "distribution":
            self.plan = replace(self.plan, target=self.plan.target.astype(Wide))
        plan = self.plan
        plain = (
            plan.kind == "index" and plan.class_weight is None and plan.off == 0
            and plan.z_loss == 0 and plan.logit_scale == 1 and plan.softcap == 0
        )  # fmt: skip
        self._ulps = 4 if plain else 8
        return reference.rows(self.logits, plan)

    def _extreme(self, t: Any) -> bool:
        """Float64 numbers whose products leave float64's range, or targets without a meaning."""
        plan = self.plan
        if (
            np.isinf(t.q).any()
            or np.isinf(np.asarray(self.case.kwargs.get("grad_output", 0.0), Wide)).any()
        ):
            return True
        largest = np.asarray([plan.divisor or 1.0, plan.softcap, plan.logit_scale], Wide)
        if self.compute == "float32":
            largest = np.abs(largest[(largest != 0) & ~np.isnan(largest)])
            return bool(((largest < 1e-60) | (largest > 1e60)).any())
        sizes = np.abs(np.concatenate([t.lse, t.gap.ravel()]))
        reach = sizes[np.isfinite(sizes)].max(initial=0)
        if max(reach, plan.z_loss * reach**2) > 1e290:
            return True
        numbers = [plan.z_loss, plan.logit_scale, plan.softcap, plan.divisor, plan.off]
        arrays = [np.asarray(numbers), t.q.ravel(), t.r, self._upstream_rows(t)]
        arrays += [a for a in (plan.class_weight, plan.row_weight) if a is not None]
        every = np.abs(np.concatenate([np.asarray(a, Wide).ravel() for a in arrays]))
        every = every[(every != 0) & ~np.isnan(every)]
        return bool(((every < 1e-60) | (every > 1e60)).any())

    def _upstream(self) -> Any:
        u = self.case.kwargs.get("grad_output")
        if u is None:
            return None
        u = np.asarray(u).astype(np.float64)
        scalar = u.ndim == 0 and self.plan.reduction == "none"
        return np.broadcast_to(u, self.plan.rows_shape) if scalar else u

    def _upstream_rows(self, t: Any) -> Any:
        u = self._upstream()
        if u is None:
            return t.r
        u = np.broadcast_to(u.reshape(-1) if u.ndim else u, t.r.shape)
        return np.where(t.kept, u, 0) * t.r

    def _grad_z(self, t: Any) -> tuple[Any, Any]:
        """A row's gradient in z, and the largest of what is subtracted in it."""
        a, b = t.p * t.others_q, t.q * t.others_p
        # |q| for q, as the promise says: weights of both signs cancel in a sum of rounded numbers.
        size = np.maximum(np.abs(t.p) * reference.sum_of_others(np.abs(t.q)), np.abs(b))
        exact = a - b
        if self.plan.z_loss:
            lse = (np.abs(t.lse - t.log_sum) + t.log_sum)[:, None]
            q = np.abs(t.q).sum(axis=-1, keepdims=True)
            exact = exact + 2 * self.plan.z_loss * t.lse[:, None] * t.Q[:, None] * t.p
            size = np.maximum(size, 2 * self.plan.z_loss * lse * q * t.p)
        return exact, size

    def _gradient(self, t: Any) -> tuple[Any, Any]:
        u = self._upstream_rows(t)[:, None]
        in_z, size = self._grad_z(t)
        exact, size = u * in_z * t.slope, np.abs(u * t.slope) * size
        gap = np.where(t.p == 0, 0, t.gap)
        room = self._ulps * ulp(size, self.compute) + size * (
            2 * self._lean(t)[:, None] + gap * Wide(2) ** -62
        )
        if self.plan.softcap:  # 4 E / (1 + E)² carries the rounding of 2|x| in E = exp(−2|x|)
            x = np.abs(self._rows(self.logits)) * self.plan.logit_scale / self.plan.softcap
            room = room + size * np.where(np.isfinite(x), 8 * x, 0) * Wide(2) ** -53
        # Products of gradual underflow: p, u·r and their like are rounded to float64's last unit.
        below = ulp(Wide(0), "float64") * (1 + np.abs(u) * (self.plan.logit_scale + 1))
        room = room + below * (1 + np.abs(t.q).sum(axis=-1, keepdims=True))
        # Below 2^-16445 extended precision rounds as well, in `exact` or in `size`.
        nothing = (size == 0) & (exact == 0)
        room = np.where(nothing | ~np.isfinite(room), 0, room)
        if self.plan.softcap:  # E is never below 2^-1021 (exp.h)
            floor = Wide(2) ** -1018 * np.abs(u) * self.plan.logit_scale * np.abs(in_z)
            room = room + np.nan_to_num(floor)
        return exact, self._stored(room, exact)

    def _lean(self, t: Any) -> Any:
        """How far a soft cap's rounding may shift a row's z: 4 units of its largest |z|."""
        if not self.plan.softcap:
            return np.zeros(len(t.p), Wide)
        z = np.where(np.isfinite(t.z), np.abs(t.z), 0)
        return 4 * z.max(axis=-1) * Wide(2) ** -52

    def _plainly(self, p: Any) -> Any:
        """Units of error of the plain formulas: exp of an argument rounded where p still shows."""
        return 64 + 8 * p.shape[-1] + 4 * 800

    def _unit(self) -> Any:
        return Wide(2) ** (1 - PRECISION[self.compute][0])

    def _stored(self, room: Any, exact: Any) -> Any:
        return (
            room if self.dtype == self.compute else room + ulp(np.abs(exact) + room, self.dtype) / 2
        )

    def _rows(self, x: Any) -> Any:
        return np.moveaxis(x, self.case.axis, -1).reshape(-1, self.case.n_classes)

    def _back(self, x: Any) -> Any:
        """From rows to the logits' shape."""
        shape = (*self.plan.rows_shape, self.case.n_classes)
        x = np.broadcast_to(x, (self.plan.n_rows, self.case.n_classes))
        return np.moveaxis(x.reshape(shape), -1, self.case.axis)
