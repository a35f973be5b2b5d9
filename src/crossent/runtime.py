"""Threads and instruction sets: what the environment says, and how to change it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import sys
import warnings

import numpy as np

from crossent import _native
from crossent import options as errors


def set_num_threads(n: int) -> None:
    """Let the kernels use at most `n` threads from now on; results do not depend on it.

    Parameters
    ----------
    n : int
        From 1 to 32,768.

    Raises
    ------
    TypeError, ValueError
        If `n` is no integer in that range.

    Examples
    --------
    >>> before = get_num_threads()
    >>> set_num_threads(1)
    >>> get_num_threads()
    1
    >>> set_num_threads(before)
    """
    is_integer = isinstance(n, int | np.integer) and not isinstance(n, bool)
    if not is_integer or not 1 <= n <= errors.MAX_THREADS:
        raise errors.bad_threads("set_num_threads", n)
    _native.set_num_threads(int(n))


def get_num_threads() -> int:
    """Return the number of threads the kernels use at most.

    By default ``CROSSENT_NUM_THREADS``, else ``OMP_NUM_THREADS``, else the CPUs this process may
    use; 1 in a child of `multiprocessing` or of `os.fork` (a data loader's worker) unless
    ``CROSSENT_NUM_THREADS`` is set.

    Returns
    -------
    int
        At least 1.
    """
    return int(_native.num_threads())


def register_threadpoolctl() -> None:
    """Make the pool of threads known to threadpoolctl, for `threadpool_info` and its limits.

    Importing crossent does this where threadpoolctl has been imported before, and importing
    ``crossent.sklearn`` does it always. Call it where threadpoolctl comes later. A second call
    changes nothing.

    ``threadpool_limits(1)`` then limits crossent along with BLAS and OpenMP, and
    ``threadpool_limits(1, user_api="crossent")`` crossent alone; both for the whole process, not
    for the calling thread alone.

    Raises
    ------
    ImportError
        If threadpoolctl is absent, or older than 3.5.

    Examples
    --------
    >>> from threadpoolctl import threadpool_info, threadpool_limits
    >>> register_threadpoolctl()
    >>> [pool["version"] for pool in threadpool_info() if pool["user_api"] == "crossent"]
    ['0.1.0']
    >>> with threadpool_limits(1, user_api="crossent"):
    ...     get_num_threads()
    1
    """
    from crossent import _threadpoolctl  # noqa: F401  (importing it registers)


def register_with_loaded_threadpoolctl() -> None:
    """Do so where threadpoolctl has been imported and can."""
    if "threadpoolctl" in sys.modules:
        with contextlib.suppress(ImportError):  # too old
            register_threadpoolctl()


def read_environment() -> None:
    """Apply ``CROSSENT_ISA``, and say which variables are passed over and why."""
    isa = os.environ.get("CROSSENT_ISA")
    if isa and not _native.set_isa(isa):
        expected = "one of " + ", ".join(_native.available_isas())
        warnings.warn(errors.bad_environment("CROSSENT_ISA", isa, expected), stacklevel=2)
    threads = os.environ.get("CROSSENT_NUM_THREADS")
    if threads:
        # What the native part takes: it reads the variable itself, at first use and after a fork.
        digits = re.fullmatch(r"\s*\+?([0-9]+)\s*", threads, re.ASCII)
        if digits is None or not 1 <= int(digits[1]) < 2**31:
            text = errors.bad_environment(
                "CROSSENT_NUM_THREADS", threads, f"an integer from 1 to {2**31 - 1}"
            )
            warnings.warn(text, stacklevel=2)
    # A spawned worker that imports us from its main module has its name, but no parent yet.
    elif multiprocessing.current_process().name != "MainProcess":
        _native.set_num_threads(1)


def workspace_bytes(where: str, workspace_mb: float | None) -> int:
    """Return how much memory a fused head may use beside its outputs.

    `workspace_mb`, else ``CROSSENT_WORKSPACE_MB`` as it was at import, else 128; in units of 2**20
    bytes.
    """
    if workspace_mb is None:
        return _workspace_bytes
    return int(errors.positive_number(where, "workspace_mb", workspace_mb) * 2**20)


def _environment_workspace() -> int:
    text = os.environ.get("CROSSENT_WORKSPACE_MB")
    if text:
        with contextlib.suppress(ValueError):
            if 0 < float(text) < 2**40:
                return int(float(text) * 2**20)
        expected = "a number of megabytes above 0"
        text = errors.bad_environment("CROSSENT_WORKSPACE_MB", text, expected)
        warnings.warn(text, stacklevel=2)
    return 128 * 2**20


read_environment()
_workspace_bytes = _environment_workspace()
register_with_loaded_threadpoolctl()
