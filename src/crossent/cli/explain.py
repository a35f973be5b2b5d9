"""One example worked through, number by number: what `crossent explain` prints.

Notation as in the course note, "Derivative of the Categorical Cross-Entropy Function" (J. Purcell,
2021): weighted sums z, outputs a = σ(z), desired outputs â, loss λ; V classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

import crossent
from crossent import reference

Array = NDArray[np.float64]

LARGEST_LOGIT = 1e6


def explain(logits: Sequence[float], target: int, *, console: Console) -> None:
    """Print one example worked through: the loss, the chain rule term by term, and a check.

    Parameters
    ----------
    logits
        z ``(V,)``, finite numbers.
    target
        The desired class, 0 … V − 1.
    console
        Where to print. Matrices wider than the console are printed in blocks of columns.

    Raises
    ------
    ValueError
        If there is no logit, or one is NaN or infinite.
    IndexError
        If `target` is not a class.

    Examples
    --------
    >>> from rich.console import Console
    >>> from crossent.cli.explain import explain
    >>> explain([2.0, 1.0, 0.1], 0, console=Console(width=80))  # doctest: +ELLIPSIS
    One example worked through: 3 classes, target class 0
    ...
    """
    z = _checked_logits(logits)
    _check_target(target, len(z))
    wanted = np.zeros(len(z))
    wanted[target] = 1.0
    a = crossent.softmax(z)
    loss, gradient = crossent.cross_entropy_value_and_grad(z, target)
    terms = reference.chain_rule_terms(a, wanted)  # (V, V)

    page = _Page(console)
    classes = "1 class" if len(z) == 1 else f"{len(z)} classes"
    page.say(f"One example worked through: {classes}, target class {target}\n")
    _outputs(page, z, a, wanted)
    _loss(page, a, target, float(loss))
    _jacobian(page, z)
    _chain_rule(page, terms)
    _gradient(page, terms.sum(axis=0), gradient)
    _finite_difference(page, z, target, gradient)


def _checked_logits(logits: Sequence[float]) -> Array:
    z = np.array(logits, dtype=np.float64)
    if z.ndim != 1 or len(z) == 0:
        raise ValueError(
            "explain: logits must be the numbers of one example, one for each class, "
            f"got shape {z.shape}; for example 2,1,0.1"
        )
    for i in np.flatnonzero(~np.isfinite(z)):
        raise ValueError(
            f"explain: logits[{i}] must be a finite number, got {z[i]}; "
            "for a class that is ruled out use a large negative one, such as -1000"
        )
    for i in np.flatnonzero(np.abs(z) > LARGEST_LOGIT):
        raise ValueError(
            f"explain: logits[{i}] is {z[i]:g}, too far out for a finite difference to mean "
            f"anything; stay within ±{LARGEST_LOGIT:g}"
        )
    return z


def _check_target(target: int, n_classes: int) -> None:
    if not 0 <= target < n_classes:
        known = (
            "is 1 class (0)"
            if n_classes == 1
            else f"are {n_classes} classes (0 to {n_classes - 1})"
        )
        raise IndexError(f"explain: target is {target}, but there {known}; name one of them")


# The steps ----------------------------------------------------------------------------------------


def _outputs(page: _Page, z: Array, a: Array, wanted: Array) -> None:
    page.say("z   the weighted sums: what the final layer computes, one for each class")
    page.say("a   the outputs aᵢ = exp(zᵢ) / Σₖ exp(zₖ), the softmax: positive, their sum is 1")
    page.say("â   the desired outputs: 1 at the target class, 0 elsewhere")
    page.by_class({"z": z, "exp(z − max z)": np.exp(z - z.max()), "a": a, "â": wanted})


def _loss(page: _Page, a: Array, target: int, loss: float) -> None:
    output = f"a{str(target).translate(_SUBSCRIPTS)}"
    page.say("λ   the loss, −Σᵢ âᵢ ln aᵢ (eq. 1 of the note); only the target's term is left:")
    page.say(f"\n  λ = −ln {output} = {_aligned([loss])[0]}\n")
    if a[target] == 1 and loss > 0:
        page.say(
            f"{output} rounds to 1, yet λ does not vanish: it is computed as ln(1 + s), where s is "
            "the sum of exp(zₖ − z) over the other classes k.\n"
        )


def _jacobian(page: _Page, z: Array) -> None:
    page.say(
        "∂aᵢ/∂zⱼ = aᵢ(δᵢⱼ − aⱼ), the Jacobian: what output i does when sum j grows. δᵢⱼ is 1 where "
        "i = j and 0 elsewhere; the note has the two the other way round."
    )
    page.matrix(reference.softmax_jacobian(z))


def _chain_rule(page: _Page, terms: Array) -> None:
    page.say(
        "−(âᵢ/aᵢ)·∂aᵢ/∂zⱼ, the terms of the chain rule (eq. 2): their sum down column j is ∂λ/∂zⱼ. "
        "Where âᵢ = 0 a term is exactly 0."
    )
    page.matrix(terms, total=True)


def _gradient(page: _Page, sums: Array, gradient: Array) -> None:
    page.say(
        "a − â, the gradient: what the column sums simplify to. (Expanding the sum, the note loses "
        "its leading minus sign, easily done, and ends with â − a: that is the way downhill, what "
        "a training step adds to z.)"
    )
    page.by_class({"column sum": sums, "a − â": gradient, "sum − (a − â)": sums - gradient})


def _finite_difference(page: _Page, z: Array, target: int, gradient: Array) -> None:
    # Truncation grows as h², rounding as 1/h: the two meet near the cube root of the precision.
    step = np.cbrt(np.finfo(np.float64).eps) * np.maximum(1.0, np.abs(z))  # (V,)
    shifts = np.diag(step)
    classes = np.full(len(z), target)
    ahead = crossent.cross_entropy(z + shifts, classes, reduction="none")
    behind = crossent.cross_entropy(z - shifts, classes, reduction="none")
    # What was really added: z ± h is rounded.
    measured = (ahead - behind) / np.diag((z + shifts) - (z - shifts))
    page.say(
        "(λ(z + h) − λ(z − h)) / 2h, the check: each sum is moved a little both ways and the loss "
        "computed anew, with no calculus."
    )
    page.by_class({"a − â": gradient, "measured": measured, "error": measured - gradient})


# The page -----------------------------------------------------------------------------------------

_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def _aligned(values: Sequence[float] | Array) -> list[str]:
    """Write numbers in one form: six decimals where these show each of them, else powers of ten."""
    fixed = all(1e-4 <= abs(x) < 1e5 or (x == round(x, 6) and abs(x) < 1e12) for x in values)
    return [(f"{x:.6f}" if fixed else f"{x:.3e}") if x else "0" for x in values]


class _Page:
    """Text and aligned columns on a console."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=False)

    def by_class(self, columns: dict[str, Array]) -> None:
        """Print vectors ``(V,)`` side by side, one class a line."""
        self.say("")
        written = [_aligned(values) for values in columns.values()]
        n_classes = len(written[0])
        self._table(
            ["class", *columns],
            [[str(i), *(numbers[i] for numbers in written)] for i in range(n_classes)],
            gap=3,
        )

    def matrix(self, values: Array, *, total: bool = False) -> None:
        """Print a matrix ``(V, V)``, i down and j across; `total` adds the sum of each column."""
        self.say("")
        labels = [f"i = {i}" for i in range(len(values))]
        if total:
            labels.append("sum")
            values = np.vstack([values, values.sum(axis=0)])
        written = np.array(_aligned(values.ravel())).reshape(values.shape)
        cell = max(len(f"j = {values.shape[1] - 1}"), *map(len, written.ravel()))
        room = self.console.width - max(map(len, labels)) - 2  # 2: the margin
        # Narrower only where that keeps the matrix in one piece.
        gap = 1 if cell + 1 <= room / values.shape[1] < cell + 2 else 2
        in_block = max(1, room // (cell + gap))
        for start in range(0, values.shape[1], in_block):
            block = range(start, min(start + in_block, values.shape[1]))
            self._table(
                ["", *(f"j = {j}" for j in block)],
                [
                    [label, *row[block.start : block.stop]]
                    for label, row in zip(labels, written.tolist(), strict=True)
                ],
                gap=gap,
                cell=cell,
            )

    def _table(self, heads: list[str], lines: list[list[str]], *, gap: int, cell: int = 0) -> None:
        widths = [
            max(cell if k else 0, *map(len, cells))
            for k, cells in enumerate(zip(heads, *lines, strict=True))
        ]
        for line in (heads, *lines):
            cells = (text.rjust(width) for text, width in zip(line, widths, strict=True))
            self.console.print(
                (" " * gap).join(cells), markup=False, highlight=False, soft_wrap=True
            )
        self.console.print()
