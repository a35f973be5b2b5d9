"""What figures depend on: the machine, the versions of what ran, and the CPUs it ran on."""

from __future__ import annotations

import contextlib
import math
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import crossent
from crossent import _native
from crossent.cli.errors import InputError

_CPU = Path("/sys/devices/system/cpu/cpu0/cache")
_HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_PACKAGES = ("numpy", "scipy", "scikit-learn", "torch", "jax", "jaxlib", "optax", "ml_dtypes")


def machine() -> dict[str, Any]:
    """Return the processor, its caches, the memory and the system; nothing that names a host."""
    return {
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "cpus": os.cpu_count(),
        "cpus_usable": _native.available_cpus(),
        "caches": _caches(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "huge_pages": huge_pages(),
        "system": f"{_distribution()}, {platform.system()} {platform.release().partition('-')[0]}",
        "isa": _native.isa(),
        "isas": _native.available_isas(),
    }


def versions() -> dict[str, str]:
    """Return the version of crossent, Python, the C library and every peer that is installed."""
    found = {"crossent": crossent.__version__, "python": platform.python_version()}
    found["libc"] = " ".join(platform.libc_ver())
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def huge_pages() -> str:
    """Return how Linux hands out huge pages: always, madvise or never; "unknown" elsewhere."""
    text = _read(_HUGE)
    return text[text.find("[") + 1 : text.find("]")] if "[" in text else "unknown"


def available_bytes() -> float:
    """Return the memory that is free to use; infinity where the system does not say."""
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    return math.inf


@contextlib.contextmanager
def on_cpus(threads: int | None) -> Iterator[int]:
    """Let this thread, and threads it starts, use as many CPUs as there are to be threads.

    That, and nothing else, makes XLA and every other pool that counts CPUs start as many threads.

    Parameters
    ----------
    threads
        None for what `crossent.get_num_threads` says.

    Raises
    ------
    InputError
        For more threads than CPUs: they would measure the scheduler.
    """
    usable = _native.available_cpus()
    wanted = min(crossent.get_num_threads(), usable) if threads is None else threads
    if not 1 <= wanted <= usable:
        raise InputError(
            f"--threads is {wanted}, but this process may use {usable} CPUs; give 1 to {usable}"
        )
    before, cpus = crossent.get_num_threads(), sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cpus[:wanted])
    crossent.set_num_threads(wanted)
    try:
        yield wanted
    finally:
        os.sched_setaffinity(0, cpus)
        crossent.set_num_threads(before)


def _cpu_model() -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model", "Hardware"):
            return value.strip()
    return platform.processor() or platform.machine()


def _caches() -> list[str]:
    folders = sorted(_CPU.glob("index*"))
    return [
        f"L{_read(folder / 'level')} {_read(folder / 'type').lower()} {_read(folder / 'size')}"
        for folder in folders
    ]


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return "unknown distribution"


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except OSError:
        return ""
