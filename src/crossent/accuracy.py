"""How far the kernels' numbers are from the exact ones, in ulp; mpmath judges, at 60 digits.

Notation: N rows, V classes; u = 2^−p the rounding unit of a dtype with p bits.

Design:
  a. ulp(x) is the dtype's spacing at |x|, at the bottom that of denormal numbers. An error counts
     in ulp of the exact value for index targets without options and for the softmax, otherwise in
     ulp of its scale: what the formula adds up, without its signs (`_gradient_scale`).
  b. Bounds: 4 ulp of the exact value, 8 ulp of the scale. float16 and bfloat16 are computed in
     float32 and rounded once: half an ulp of theirs, and 4 or 8 of float32.
  c. NaN and infinity must be where the exact result has them: elsewhere the error is infinite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import mpmath
import numpy as np

import crossent
from crossent import reference
from crossent.exact import Array, exact, zero_where
from crossent.hard_cases import Case
from crossent.options import OPTION_NAMES, Options
from crossent.reference import RowTerms
from crossent.rows import RowPlan, lower

DIGITS = 60
# Bits of the significand, the hidden one counted; exponent of the least normal number.
_FORMATS = {
    "float64": (53, -1022),
    "float32": (24, -126),
    "float16": (11, -14),
    "bfloat16": (8, -126),
}

Quantity = Literal["loss", "gradient", "softmax", "log_softmax"]
Group = Literal["plain", "options", "softcap"]


@dataclass(frozen=True, slots=True, eq=False)
class Truth:
    """What one quantity of a case is, what its errors are counted in, and their bound in ulp."""

    case: Case
    quantity: Quantity
    group: Group
    dtype: str
    value: Array
    scale: Array
    bound: Array


@dataclass(frozen=True, slots=True)
class Measured:
    """The error of one quantity of a case that is worst for its bound, in ulp, and its place."""

    truth: Truth
    error: float
    bound: float
    place: tuple[int, ...]

    @property
    def ok(self) -> bool:
        """Whether the error is within the bound."""
        return self.error <= self.bound


def measure(case: Case) -> list[Measured]:
    """Say how far the kernels are from exact for each quantity of a case."""
    results = computed(case)
    return [compare(truth, results[truth.quantity]) for truth in truths(case)]


def computed(case: Case) -> dict[Quantity, Array]:
    """Return what the NumPy front end makes of a case."""
    loss, gradient = crossent.cross_entropy_value_and_grad(
        case.logits, case.target, **{"reduction": "none"} | case.options
    )
    return {
        "loss": np.asarray(loss),
        "gradient": gradient,
        "softmax": crossent.softmax(case.logits),
        "log_softmax": crossent.log_softmax(case.logits),
    }


def truths(case: Case) -> list[Truth]:
    """Return the exact loss and gradient and, for a case without options, both softmaxes."""
    plan = _plan(case)
    upstream = case.options.get("grad_output")
    with mpmath.workdps(DIGITS):
        v = exact(case.logits)
        terms = reference.rows(v, plan)
        values: dict[Quantity, Array] = {
            "loss": np.asarray(reference.loss(v, plan), object),
            "gradient": reference.grad(v, plan, upstream),
        }
        group = _group(case, plan)
        if group == "plain":
            if terms.kept.all():
                values["softmax"] = terms.p
                values["log_softmax"] = -(terms.gap + terms.log_sum[:, None])
            scales = values
        else:
            scales = {
                "loss": _loss_scale(terms, plan),
                "gradient": _gradient_scale(terms, plan, upstream),
            }
        return [
            _truth(case, plan, group, quantity, value, scales[quantity])
            for quantity, value in values.items()
        ]


def compare(truth: Truth, got: Array) -> Measured:
    """Find the worst error of a result, in ulp."""
    pairs = zip(exact(got).flat, truth.value.flat, truth.scale.flat, strict=True)
    with mpmath.workdps(DIGITS):
        errors = [_ulp_between(x, value, scale, truth.dtype) for x, value, scale in pairs]
    error, bound = np.array(errors).reshape(got.shape), np.broadcast_to(truth.bound, got.shape)
    worst = np.unravel_index(int(np.argmax(error / bound)), got.shape)
    place = tuple(int(i) for i in worst)
    return Measured(truth, float(error[place]), float(bound[place]), place)


def _plan(case: Case) -> RowPlan:
    compute = np.dtype(np.float64 if case.logits.dtype == np.float64 else np.float32)
    options = {name: value for name, value in case.options.items() if name in OPTION_NAMES}
    target = case.target if case.target.dtype.kind == "i" else case.target.astype(compute)
    lowered = Options(**{"reduction": "none"} | options)
    return lower("measure", case.logits.shape, 1, compute, target, lowered)


def _group(case: Case, plan: RowPlan) -> Group:
    if plan.softcap:
        return "softcap"
    return "options" if case.options or plan.kind != "index" else "plain"


def _truth(
    case: Case, plan: RowPlan, group: Group, quantity: Quantity, value: Array, scale: Array
) -> Truth:
    dtype = case.logits.dtype.name
    bound = np.array(4.0 if group == "plain" else 8.0)
    if group == "softcap" and dtype == "float64":
        bound = bound + _softcap_allowance(case.logits, plan, quantity)
    if quantity == "loss":
        dtype = "float64" if dtype == "float64" else "float32"
        if plan.reduction != "none":
            # Σ k ulp(sᵢ) ≤ 2k ulp(Σ sᵢ), as u·x ≤ ulp(x) ≤ 2u·x; then N − 1 additions.
            bound = 2 * bound.max() + plan.n_rows
    if dtype in ("float16", "bfloat16"):
        bound = 0.5 + bound * 2.0 ** (_FORMATS[dtype][0] - _FORMATS["float32"][0])
        scale = np.maximum(np.abs(scale), np.abs(value))
    return Truth(case, quantity, group, dtype, value, scale, np.asarray(bound))


def _ulp_between(got: Any, value: Any, scale: Any, dtype: str) -> float:
    if mpmath.isfinite(got) and mpmath.isfinite(value):
        return float(abs(got - value) / ulp(scale, dtype))
    same = got == value or (mpmath.isnan(got) and mpmath.isnan(value))
    return 0.0 if same else np.inf


def ulp(x: Any, dtype: str) -> Any:
    """Return the spacing of a dtype's numbers at the mpmath number |x|."""
    bits, least = _FORMATS[dtype]
    exponent = max(mpmath.mag(x) - 1, least) if x else least
    return mpmath.ldexp(1, int(exponent) - bits + 1)


# What the 8 ulp are counted in --------------------------------------------------------------------


def _loss_scale(t: RowTerms, plan: RowPlan) -> Array:
    """|r|·(Σ|q|·(lse − z) + c·|Q|·(|m| + ln S)²), of the loss's shape."""
    surprise = zero_where(t.q == 0, t.gap) + t.log_sum[:, None]
    size = abs(t.lse - t.log_sum) + t.log_sum
    each = abs(t.r) * ((abs(t.q) * surprise).sum(axis=1) + plan.z_loss * abs(t.Q) * size**2)
    return each if plan.reduction == "none" else np.asarray(each.sum(), object)


def _gradient_scale(t: RowTerms, plan: RowPlan, upstream: Any) -> Array:
    """|u·r|·slope·max(A, B, C) with |q| for q and |m| + ln S for |lse|, ``(N, V)``."""
    q = abs(t.q)
    size = abs(t.lse - t.log_sum) + t.log_sum
    a = t.p * reference.sum_of_others(q)
    b = q * t.others_p
    c = (2 * plan.z_loss * size * q.sum(axis=1))[:, None] * t.p
    u = 1 if upstream is None else abs(exact(upstream).reshape(-1, 1))
    return np.asarray(abs(t.r)[:, None] * u * t.slope * np.maximum(np.maximum(a, b), c))


def _softcap_allowance(v: Array, plan: RowPlan, quantity: Quantity) -> Array:
    """Return what z = κ·tanh(x), x = τv/κ, may add to the error in float64, in ulp.

    x is off by 2u relatively, which moves tanh by no more; tanh itself is good to 2 ulp, and the
    product rounds: 7u·κ in z at most, 14κ·u relatively in every p and complement. The loss's
    −ln p is the difference of two such z only where it is above ln 2, so 14κ·u/ln 2 there. The
    slope, 4w/(1 + w)² with w = exp(−2|x|), adds 4|x|·u and a few roundings. (float32 has its
    softcap in float64: nothing to add.)
    """
    if quantity == "loss":
        return np.asarray(21 * plan.softcap)
    return np.asarray(14 * plan.softcap + 4 * np.abs(plan.logit_scale * v / plan.softcap) + 4)
