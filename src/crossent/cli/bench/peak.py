"""The most memory that a call adds to this process's resident set.

Freed memory goes back to the system first. Linux tells the peak since a moment
(`/proc/self/clear_refs`, VmHWM); elsewhere only the peak since the start is known (`ru_maxrss`),
which what went before may hide.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_HWM = "VmHWM after a reset through /proc/self/clear_refs"
_MAXRSS = "ru_maxrss over the resident set before"


def peak_of(call: Callable[[], T]) -> tuple[T, int, str]:
    """Return a call's result, the bytes it added at its peak, and how they were measured."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what glibc has kept of what was freed
    how = _HWM if _reset_peak() else _MAXRSS
    before = _status("VmRSS") or _maxrss()
    result = call()
    peak = _status("VmHWM") if how == _HWM else _maxrss()
    return result, max(peak - before, 0), how


def _reset_peak() -> bool:
    """Begin to take the peak of the resident set anew; tell whether the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    except OSError:
        return False
    return _status("VmHWM") > 0


def _status(field: str) -> int:
    """Return a field of /proc/self/status in bytes; 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text("ascii").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0


def _maxrss() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
