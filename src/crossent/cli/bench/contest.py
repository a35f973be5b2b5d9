"""One problem: crossent, the copies and the peers made ready, checked against crossent, timed."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np

from crossent.cli.bench.benchmark import Benchmark
from crossent.cli.bench.peers import Arrays, Contender, P, Peer, Question, Unserved
from crossent.cli.bench.results import Kind, Timed
from crossent.cli.bench.timing import Effort, interleaved
from crossent.cli.errors import first_line

# relative to each entry, and to the largest one: peers subtract from 1 and sum in the dtype
_TOLERANCE = {
    "float64": (1e-6, 1e-12),
    "float32": (1e-3, 1e-6),
    "float16": (1e-1, 1e-3),
    "bfloat16": (1e-1, 1e-2),
}


def contest(
    benchmark: Benchmark[P],
    problem: P,
    peers: list[Peer[P]],
    effort: Effort,
    tell: Callable[[str], object],
) -> tuple[tuple[Timed, ...], dict[str, str]]:
    """Return the times of everybody who solves `problem`, and why the other peers do not.

    Parameters
    ----------
    benchmark : Benchmark
    problem
    peers : list of Peer
        All installed.
    effort : Effort
    tell : callable
        Is told what goes on.
    """
    entered: dict[tuple[str, str], tuple[str, Kind, Contender]] = {}
    for contender in benchmark.ours(problem):
        entered["crossent", contender.output] = ("crossent", "crossent", contender)
    expected = _sampled(problem, next(iter(entered.values()))[2])
    skipped: dict[str, str] = {}
    for peer in peers:
        tell(f"preparing {peer.title}: {problem.text}")
        try:
            peer.prepare(problem.threads)
            contenders = peer.contenders(problem)
            for contender in contenders:
                _compare(_sampled(problem, contender), expected, problem, benchmark.slack)
        except Unserved as why:
            skipped[peer.name] = str(why)
        except Exception as error:  # whatever a peer, or the compiler it needs, may raise
            skipped[peer.name] = f"failed: {first_line(error)}"
        else:
            kind: Kind = "crossent" if peer.package == "crossent" else "peer"
            for contender in contenders:
                entered[peer.name, contender.output] = (peer.title, kind, contender)
    for name, (title, contender) in benchmark.copies(problem).items():
        entered[name, contender.output] = (title, "copy", contender)
        contender.call()
    tell(f"timing {problem.text}")
    gc.collect()
    timings = interleaved({key: entry[2].call for key, entry in entered.items()}, effort)
    times = tuple(
        Timed(key[0], title, kind, contender.output, timings[key])
        for key, (title, kind, contender) in entered.items()
    )
    return times, skipped


def _sampled(problem: Question, contender: Contender) -> Arrays:
    """Return what is compared of a contender's result."""
    return tuple(problem.sample(part) for part in contender.read(contender.call()))


def _compare(found: Arrays, expected: Arrays, problem: Question, slack: float) -> None:
    """Raise an `ArithmeticError` where a peer's result is not crossent's."""
    relative, absolute = _TOLERANCE[problem.dtype]
    for part, right in zip(found, expected, strict=True):
        error = np.abs(part - right) - relative * np.abs(right)
        worst = float(error.max() / np.abs(right).max())
        if not worst <= absolute * slack:
            raise ArithmeticError(f"its result is not crossent's (off by {worst:.1e})")
