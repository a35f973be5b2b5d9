"""One fit in a process of its own, which the system ends when it takes too long or too much.

The child loads the rows, makes a tiny fit of the same kind, so that threads and libraries are
there, and then the fit that counts: its time, what it adds to the resident set at its peak, and its
coefficients. An alarm of the system's ends it after the limit, in the middle of whatever it calls;
beyond the limit on memory its allocations fail.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crossent.cli.bench import fit_tasks
from crossent.cli.bench.fit_solvers import SOLVERS, Fitted
from crossent.cli.bench.peak import peak_of
from crossent.cli.errors import first_line

_POOLS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "CROSSENT_NUM_THREADS")
_PATIENCE = 300  # seconds to load and to be warm


@dataclass(frozen=True)
class Limits:
    """What a fit may take: seconds, and bytes beyond what the rows and the libraries take."""

    seconds: float
    nbytes: float


@dataclass(frozen=True)
class Done:
    """A fit that ended within its limits.

    Parameters
    ----------
    fitted : Fitted
    seconds : float
    nbytes : int
        Added to the resident set at its peak.
    how : str
        How that was measured.
    """

    fitted: Fitted
    seconds: float
    nbytes: int
    how: str


class Unfinished(Exception):  # noqa: N818  (an answer, not an error)
    """A fit came to no end; the text says why."""


class TooLong(Unfinished):
    """A fit took more than its seconds."""


def fit(folder: Path, solver: str, tol: float, threads: int, limits: Limits) -> Done:
    """Return what a fit of the problem in `folder` came to, made by a child.

    Raises
    ------
    Unfinished
        Where it takes more than the limits, or fails.
    """
    asked = {
        "folder": str(folder),
        "solver": solver,
        "tol": tol,
        "seconds": limits.seconds,
        "nbytes": limits.nbytes,
    }
    command = [sys.executable, "-m", "crossent.cli.bench.fit_process", json.dumps(asked)]
    environment = os.environ | dict.fromkeys(_POOLS, str(threads))
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=limits.seconds + _PATIENCE,
            env=environment,
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        raise Unfinished(f"failed: {type(error).__name__}") from None
    if done.returncode == -signal.SIGALRM:
        raise TooLong(f"takes more than {limits.seconds:g} s")
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise Unfinished(f"failed: its process ended with status {done.returncode}") from None
    if "why" in found:
        raise Unfinished(found["why"])
    with np.load(folder / "fitted.npz") as arrays:
        fitted = Fitted(arrays["coef"], arrays["intercept"], found["iterations"])
    return Done(fitted, found["seconds"], found["nbytes"], found["how"])


def measured(folder: Path, solver: str, tol: float, limits: Limits) -> Done:
    """Return what a fit comes to in this process, which the limits end."""
    (who,) = (each for each in SOLVERS if each.name == solver)
    problem = fit_tasks.load(folder)
    who.fit(fit_tasks.tiny(problem), tol)

    def timed() -> tuple[Fitted, float]:
        signal.setitimer(signal.ITIMER_REAL, limits.seconds)
        began = time.perf_counter()
        fitted = who.fit(problem, tol)
        taken = time.perf_counter() - began
        signal.setitimer(signal.ITIMER_REAL, 0)
        return fitted, taken

    _limit_memory(limits.nbytes)
    (fitted, seconds), nbytes, how = peak_of(timed)
    return Done(fitted, seconds, nbytes, how)


def _limit_memory(more: float) -> None:
    """Let allocations fail that go beyond what the process has now and `more`, where Linux can."""
    pages = Path("/proc/self/statm")
    if not pages.exists():
        return
    data = int(pages.read_text("ascii").split()[5]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    wanted = data + int(more)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


def _main() -> None:
    asked = json.loads(sys.argv[1])
    folder, limits = Path(asked["folder"]), Limits(asked["seconds"], asked["nbytes"])
    found: dict[str, Any]
    try:
        done = measured(folder, asked["solver"], asked["tol"], limits)
        np.savez(folder / "fitted.npz", coef=done.fitted.coef, intercept=done.fitted.intercept)
    except MemoryError:
        found = {"why": f"takes more than {limits.nbytes / 2**30:.3g} GB of memory"}
    except Exception as error:  # whatever a solver may raise
        found = {"why": f"failed: {first_line(error)}"}
    else:
        found = {"iterations": done.fitted.iterations, "seconds": done.seconds}
        found |= {"nbytes": done.nbytes, "how": done.how}
    print(json.dumps(found))


if __name__ == "__main__":
    _main()
