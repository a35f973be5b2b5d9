"""What a run found, the ratios that follow from it, and its JSON."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from crossent.cli.bench.benchmark import Words
from crossent.cli.bench.peers import Output, Task
from crossent.cli.bench.timing import Timing

Kind = Literal["crossent", "peer", "copy", "bound"]
SCHEMA = 1


@dataclass(frozen=True)
class Timed:
    """One contender's time for one problem, or what it is held against."""

    name: str
    title: str
    kind: Kind
    output: Output
    timing: Timing


@dataclass(frozen=True)
class Ratio:
    """A contender of ours over something else: the quotient of two medians of one run.

    Parameters
    ----------
    name : str
        Which of ours.
    output
        Where ours put its result.
    over : str
        "best peer", a peer's title, "float32", or what else `Group.rivals` names.
    which : str
        The one that `over` came to be, as the tables call it.
    value : float
        Below 1 ours is faster.
    """

    name: str
    output: Output
    over: str
    which: str
    value: float


@dataclass(frozen=True)
class Group:
    """The contenders of one problem, timed in turn; `skipped` says who was left out and why."""

    shape: str
    use: str
    logits: tuple[int, ...]
    axis: int
    dtype: str
    task: Task
    nbytes: int
    times: tuple[Timed, ...]
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def sizes(self) -> str:
        """Return the sizes as in tables, 8192×1000."""
        return "×".join(map(str, self.logits))

    @property
    def label(self) -> str:
        """Return what the first column of the summary says."""
        return self.task

    def left_out(self) -> dict[str, str]:
        """Return who is to be named on the console for having no time, and why."""
        return {name: why for name, why in self.skipped.items() if why.startswith("failed")}

    def beyond(self) -> tuple[Timed, ...]:
        """Return who took longer than was allowed: no times, but what they are above."""
        return ()

    def extra_heads(self) -> tuple[str, ...]:
        """Return what else a table of times tells of a contender."""
        return ()

    def extra(self, timed: Timed) -> tuple[str, ...]:
        """Return that of one contender."""
        return ()

    def note(self) -> str:
        """Return what is to be said below a table of times."""
        return ""

    def rivals(self, ours: Timed) -> dict[str, Timed | None]:
        """Return what ours is held against beside the peers: the copies, fresh over fresh."""
        if ours.output == "fresh":
            return {"x.copy()": self.time("copy", "fresh")}
        return {
            "numpy.copyto": self.time("copyto", "kept"),
            "copy by all threads": self.time("threads", "kept"),
            "fastest copy": self.fastest_copy(),
        }

    def time(self, name: str, output: Output) -> Timed | None:
        """Return one contender's time."""
        return next((t for t in self.times if (t.name, t.output) == (name, output)), None)

    def fastest_copy(self) -> Timed | None:
        """Return the fastest copy into memory that exists already."""
        copies = (t for t in self.times if t.kind == "copy" and t.output == "kept")
        return min(copies, key=lambda t: t.timing.median, default=None)

    def base(self, name: str) -> Timed | None:
        """Return what times are shown over: a contender by its name, or the fastest copy."""
        if name == "fastest copy":
            return self.fastest_copy()
        return next((t for t in self.times if t.name == name), None)

    def peers(self, output: Output) -> list[Timed]:
        """Return the peers, the fastest first; a fresh output may stand in for a kept one."""
        allowed = ("kept", "fresh") if output == "kept" else (output,)
        peers = (t for t in self.times if t.kind == "peer" and t.output in allowed)
        return sorted(peers, key=lambda t: t.timing.median)

    def ratios(self) -> list[Ratio]:
        """Return our times over every peer's and over the copies', fresh over fresh."""
        found = []
        for ours in self.times:
            if ours.kind != "crossent":
                continue
            peers = self.peers(ours.output)
            rivals: dict[str, Timed | None] = {peer.title: peer for peer in reversed(peers)}
            rivals["best peer"] = peers[0] if peers else None
            rivals |= self.rivals(ours)
            found += [
                _ratio(ours, over, rival, rival.title)
                for over, rival in rivals.items()
                if rival is not None
            ]
        return found

    def ratio(self, output: Output, over: str, name: str = "crossent") -> Ratio | None:
        """Return one of `ratios`."""
        key = (name, output, over)
        return next((r for r in self.ratios() if (r.name, r.output, r.over) == key), None)


@dataclass(frozen=True)
class Report:
    """A whole run."""

    words: Words
    date: str
    threads: int
    machine: dict[str, Any]
    versions: dict[str, str]
    method: str
    quick: bool
    peers: tuple[dict[str, Any], ...]
    groups: tuple[Group, ...]

    def over_float32(self, group: Group) -> list[Ratio]:
        """Return our times in another dtype over those in float32, for the same shape and task."""
        if group.dtype == "float32":
            return []
        key = (group.shape, group.task, "float32")
        plain = next((g for g in self.groups if (g.shape, g.task, g.dtype) == key), None)
        pairs = ((t, plain.time(t.name, t.output)) for t in group.times) if plain else ()
        return [
            _ratio(ours, "float32", base, "crossent")
            for ours, base in pairs
            if ours.kind == "crossent" and base is not None
        ]

    def as_json(self) -> dict[str, Any]:
        """Return everything in plain types; times in seconds a call."""
        head = {
            "benchmark": self.words.name,
            "schema": SCHEMA,
            "date": self.date,
            "threads": self.threads,
            "isa": self.machine["isa"],
            "quick": self.quick,
            "machine": self.machine,
            "versions": self.versions,
            "method": self.method,
            "peers": list(self.peers),
        }
        return head | {"results": [self._group_as_json(group) for group in self.groups]}

    def _group_as_json(self, group: Group) -> dict[str, Any]:
        fields = dataclasses.asdict(group)
        times = [
            {name: value for name, value in each.items() if name != "timing"} | each["timing"]
            for each in fields.pop("times")
        ]
        ratios = [dataclasses.asdict(ratio) for ratio in group.ratios() + self.over_float32(group)]
        return fields | {"n_logits": math.prod(group.logits), "times": times, "ratios": ratios}


def megabytes(n: int) -> str:
    """Return bytes as tables tell them.

    Examples
    --------
    >>> megabytes(3 * 2**20), megabytes(1000)
    ('3 MB', '< 1 MB')
    """
    return f"{n / 2**20:.0f} MB" if n >= 2**20 else "< 1 MB"


def _ratio(ours: Timed, over: str, base: Timed, which: str) -> Ratio:
    return Ratio(ours.name, ours.output, over, which, ours.timing.median / base.timing.median)
