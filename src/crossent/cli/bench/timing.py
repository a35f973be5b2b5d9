"""Timing of several contenders in turn, so that what slows the machine slows all of them.

Design.
A. Every round gives each contender one turn, in an order drawn anew. Medians over the rounds are
   compared, with their quartiles; a slow contender stops after fewer rounds.
B. Threads of OpenMP go on spinning after their work, for milliseconds, and would take the CPUs from
   the next contender. A turn begins once the process uses no CPU any more.
C. After such a rest threads are asleep and caches cold, as they are not in a loop that trains. A
   quick call is therefore made once untimed first.
D. A call too short for the clock is timed in a loop of `inner` calls. What a call returns is
   released within the timed span, as a loop that trains releases it.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

Call = Callable[[], Any]
Key = TypeVar("Key", bound=Hashable)

METHOD = (
    "Contenders take turns, one call a round, in an order drawn anew for each round; a turn begins "
    "once no thread of the process runs any more, and calls under 20 ms are made once untimed "
    "before. Calls shorter than 5 ms are timed in a loop. Times are medians with quartiles, and "
    "include the release of what a call returned."
)
_SHORT = 5e-3  # seconds that a timed span should last at least
_QUICK = 20e-3
_LONGEST_REST = 0.1


@dataclass(frozen=True)
class Effort:
    """How long to measure each contender: `seconds`, within `least` and `most` rounds.

    One that has taken four times as long after three rounds needs no more of them.
    """

    seconds: float
    least: int
    most: int

    def enough(self, rounds: int, spent: float) -> bool:
        """Tell whether a contender has had its share."""
        if rounds < self.least:
            return rounds >= 3 and spent > 4 * self.seconds
        return rounds >= self.most or spent > self.seconds


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median and quartiles of `n` spans of `inner` calls each."""

    median: float
    lower: float
    upper: float
    n: int
    inner: int

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        return (self.upper - self.lower) / (2 * self.median)


def interleaved(calls: Mapping[Key, Call], effort: Effort) -> dict[Key, Timing]:
    """Return the timing of every call.

    Parameters
    ----------
    calls : mapping
        Functions without arguments, all of which have run once before.
    effort : Effort
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        return _interleaved(calls, effort)
    finally:
        if enabled:
            gc.enable()


def _interleaved(calls: Mapping[Key, Call], effort: Effort) -> dict[Key, Timing]:
    expected = {key: _expected(call) for key, call in calls.items()}
    inner = {key: max(1, math.ceil(_SHORT / seconds)) for key, seconds in expected.items()}
    found: dict[Key, list[float]] = {key: [] for key in calls}
    spent = dict.fromkeys(calls, 0.0)
    order, draw = list(calls), random.Random(0)
    for turn in range(effort.most):
        draw.shuffle(order)
        for key in order:
            if effort.enough(turn, spent[key]):
                continue
            _rest()
            if expected[key] < _QUICK:
                calls[key]()
            seconds = _seconds(calls[key], inner[key])
            spent[key] += seconds
            found[key].append(seconds / inner[key])
    return {key: summary(samples, inner[key]) for key, samples in found.items()}


def summary(samples: list[float], inner: int) -> Timing:
    """Return median and quartiles of seconds a call.

    Examples
    --------
    >>> summary([3.0, 1.0, 2.0, 5.0, 4.0], 1)
    Timing(median=3.0, lower=2.0, upper=4.0, n=5, inner=1)
    """
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1, inner)
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, lower, upper, len(samples), inner)


def _expected(call: Call) -> float:
    """Return about how long a call takes, once warm."""
    seconds = _seconds(call, 1)
    return min(_seconds(call, 1), seconds) if seconds < _QUICK else seconds


def _seconds(call: Call, inner: int) -> float:
    turns = range(inner)
    began = time.perf_counter()
    for _ in turns:
        call()
    return time.perf_counter() - began


def _rest() -> None:
    """Sleep until the process has used next to no CPU for a millisecond."""
    end = time.perf_counter() + _LONGEST_REST
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(1e-3)
        if time.process_time() - before < 2e-4:
            return
