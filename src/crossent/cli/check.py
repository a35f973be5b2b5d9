"""The installed kernels against the exact values on this machine: what `crossent check` prints."""

from __future__ import annotations

import importlib.util
import math
import platform
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
from rich.console import Console

import crossent
from crossent import _native
from crossent.accuracy import DIGITS, Measured, measure
from crossent.hard_cases import Case, index_cases, option_cases, special_case

_HEADS = ("dtype", "quantity", "inputs", "numbers", "worst", "bound", "")


def check(*, quick: bool = False, console: Console) -> bool:
    """Compare the kernels with the exact values and print the worst errors in ulp.

    Parameters
    ----------
    quick
        Fewer sizes and options.
    console
        Where to print.

    Returns
    -------
    bool
        Whether every error is within its bound.
    """
    _say(console, _machine())
    measured: list[Measured] = []
    for dtype in _dtypes(console):
        with console.status(f"checking {dtype.name}"):
            measured += (found for case in _cases(dtype, quick) for found in measure(case))
    _say(console, f"\nWorst errors in ulp, against {DIGITS} digits by mpmath:\n")
    _table(console, measured)
    _say(
        console,
        "\nplain: index targets without options, in ulp of the exact value. options: every kind "
        "of target with every option, in ulp of the largest term (a sum may cancel). softcap: the "
        "same with softcap=, whose tanh adds to the bound. The loss of 16-bit logits is float32.",
    )
    failed = [found for found in measured if not found.ok]
    for found in failed:
        _say(console, _failure(found))
    return not failed


def _machine() -> str:
    isas = ", ".join(_native.available_isas())
    return (
        f"crossent {version('crossent')}, NumPy {np.__version__}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}\n"
        f"instruction set: {_native.isa()} in use, of {isas} (CROSSENT_ISA chooses)\n"
        f"threads: {crossent.get_num_threads()} (CROSSENT_NUM_THREADS chooses)"
    )


def _dtypes(console: Console) -> Iterator[np.dtype[Any]]:
    yield from (np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16))
    if importlib.util.find_spec("ml_dtypes"):
        import ml_dtypes

        yield np.dtype(ml_dtypes.bfloat16)
    else:
        _say(console, "bfloat16: not checked; pip install ml_dtypes gives NumPy this dtype")


def _cases(dtype: np.dtype[Any], quick: bool) -> Iterator[Case]:
    sizes = (1, 2, 3, 8, 17) if quick else (1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 100)
    yield special_case(dtype)
    yield from index_cases(dtype, sizes, limit=150 if quick else 400)
    yield from option_cases(dtype, 8, 5 if quick else 9, together=1)


def _table(console: Console, measured: list[Measured]) -> None:
    lines: list[tuple[str, ...]] = [_HEADS]
    groups: dict[tuple[str, ...], list[Measured]] = {}
    for found in measured:
        truth = found.truth
        # A loss of float16 logits is float32: the logits' dtype names the line.
        key = (truth.case.logits.dtype.name, truth.quantity, truth.group)
        groups.setdefault(key, []).append(found)
    for name, members in groups.items():
        worst = max(members, key=lambda found: found.error / found.bound)
        numbers = sum(found.truth.value.size for found in members)
        verdict = "ok" if all(found.ok for found in members) else "FAIL"
        bound = f"{worst.bound:.4g}"
        lines.append((*name, str(numbers), f"{worst.error:.3f}", bound, verdict))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            text.ljust(width) if k < 3 else text.rjust(width)
            for k, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        _say(console, "  ".join(cells).rstrip())


def _failure(found: Measured) -> str:
    truth = found.truth
    error = "NaN or infinity amiss" if math.isinf(found.error) else f"{found.error:.3g} ulp"
    return (
        f"FAIL: {truth.case.logits.dtype.name} {truth.quantity}, {truth.case.name}, at "
        f"{found.place}: {error}, {found.bound:.4g} allowed"
    )


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False)
