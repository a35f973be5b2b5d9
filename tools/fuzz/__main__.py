"""Random calls of the public NumPy functions, each held to the exact answer: `make fuzz`.

    python tools/fuzz --cases 1000000 --jobs 2        seeds 0 … 999,999 in two processes
    python tools/fuzz --seed 4711 --cases 1 --show    one case again, with what it calls

A finding is a crash, a hang, a warning, an exception of the wrong kind or without the function's
name, a wrong call that passes, a right one that raises, a changed input, a byte written beside
`out`, a result that is not within tolerance of the exact one (oracle.py), or one that depends on
the number of threads. Every finding is printed with the command that repeats it; exit status 1.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import multiprocessing
import re
import sys
import time

import numpy as np
from worker import run

CRASHES = 20  # so many, and the rest of a process's seeds are left


def report(seed: int, text: str, kinds: collections.Counter[str], shown: int) -> None:
    """Print a finding unless many like it have been printed."""
    kind = re.sub(r"[-+]?\d[\d.e+-]*|\(.*?\)", "#", text.splitlines()[0])[:80]
    kinds[kind] += 1
    if kinds[kind] <= shown:
        print(f"python tools/fuzz --seed {seed} --cases 1 --show\n    {text}", flush=True)


def main() -> int:
    """Split the seeds over processes; start a crashed one again behind the seed that crashed it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--shown", type=int, default=3, help="findings of one kind to print")
    parser.add_argument("--show", action="store_true", help="print every call")
    options = parser.parse_args()
    start, kinds = time.monotonic(), collections.Counter[str]()
    context = multiprocessing.get_context("spawn")
    findings = context.SimpleQueue()
    ranges = [options.seed + options.cases * k // options.jobs for k in range(options.jobs + 1)]
    workers, crashes = [], 0

    def begin(first: int, last: int) -> None:
        at = context.Value("q", first)
        worker = context.Process(target=run, args=(first, last, at, findings, options.show))
        worker.start()
        workers.append((worker, at, last))

    for first, last in itertools.pairwise(ranges):
        begin(first, last)
    while workers:
        worker, at, last = workers.pop(0)
        worker.join(0.2)
        while not findings.empty():
            report(*findings.get(), kinds, options.shown)
        if worker.is_alive():
            workers.append((worker, at, last))
        elif worker.exitcode:
            report(at.value, f"crash or hang: exit status {worker.exitcode}", kinds, options.shown)
            crashes += 1
            if at.value + 1 < last and crashes < CRASHES:
                begin(at.value + 1, last)
    while not findings.empty():
        report(*findings.get(), kinds, options.shown)
    seconds = time.monotonic() - start
    print(
        f"{options.cases} cases in {seconds:.0f} s ({options.cases / seconds:.0f}/s), "
        f"NumPy {np.__version__}, seeds from {options.seed}: {sum(kinds.values())} findings"
    )
    for kind, count in kinds.most_common():
        print(f"{count:8} {kind}")
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main())
