"""What the fits of one task came to: times, and how near and at what cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from crossent.cli.bench.fit_contest import SLACK, Climb, Step, target
from crossent.cli.bench.fit_tasks import FitProblem, FitTask
from crossent.cli.bench.results import Group, Timed, megabytes
from crossent.cli.bench.timing import summary


@dataclass(frozen=True)
class FitGroup(Group):
    """The solvers of one task.

    Parameters
    ----------
    features : int
    density : float
        The share of the features that is held.
    c : float
    about : str
        What the rows are.
    slack : float
        How far above `goal` is near enough, relative to it.
    goal : float, optional
        The lowest objective that scikit-learn reached; of anybody where it came to no end.
    goal_of : str
        Whose, and at which tolerance.
    lowest : float, optional
        The lowest objective of all.
    lowest_of : str
        The same for it.
    fits : dict
        Every fit of each solver, by its name, and why it was asked for no more.
    reached : dict
        The fit of each solver that is near enough first.
    memory : dict
        The most bytes that such a fit added.
    memory_how : str
        How that was measured.
    late : tuple of Timed
        Who took too long before coming near enough, at the limit.
    """

    features: int = 1
    density: float = 1.0
    c: float = 1.0
    about: str = ""
    slack: float = SLACK
    goal: float | None = None
    goal_of: str = ""
    lowest: float | None = None
    lowest_of: str = ""
    fits: dict[str, dict[str, Any]] = field(default_factory=dict)
    reached: dict[str, Step] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    memory_how: str = ""
    late: tuple[Timed, ...] = ()

    @property
    def sizes(self) -> str:
        """Return rows, features and classes as in tables."""
        return f"{self.logits[0]}×{self.features}×{self.logits[1]}"

    @property
    def label(self) -> str:
        """Return the task's name."""
        return self.shape

    def left_out(self) -> dict[str, str]:
        """Return everybody without a time: who takes too long is a result as well."""
        return self.skipped

    def beyond(self) -> tuple[Timed, ...]:
        """Return who would have taken longer than the limit."""
        return self.late

    def rivals(self, ours: Timed) -> dict[str, Timed | None]:
        """Return none beside the peers."""
        return {}

    def base(self, name: str) -> Timed | None:
        """Return the fastest peer where it is asked for."""
        return next(iter(self.peers("fresh")), None) if name == "best peer" else super().base(name)

    def extra_heads(self) -> tuple[str, ...]:
        """Return the heads of the tolerance, the iterations, the distance and the memory."""
        return ("tol", "steps", "above", "memory")

    def extra(self, timed: Timed) -> tuple[str, ...]:
        """Return a solver's."""
        step = self.reached[timed.name]
        above = _above(step.objective, self.lowest)
        return (
            f"{step.tol:.0e}",
            str(step.iterations),
            f"{above:.0e}" if above else "0",
            megabytes(self.memory[timed.name]),
        )

    def note(self) -> str:
        """Return what the objective is, and how far from the lowest."""
        if self.goal is None or self.lowest is None:
            return self.about
        above = _above(self.goal, self.lowest)
        lowest = (
            f"The lowest of all, {self.lowest:.10g} ({self.lowest_of}), is {above:.1e} below it."
            if above
            else "Nobody went lower."
        )
        return (
            f"{self.about} To reach: {self.goal:.10g} ({self.goal_of}), and {self.slack:.0e} of it "
            f"more. {lowest} Above: over the lowest, relative. Memory beside X and y, of which X "
            f"is {megabytes(self.nbytes)}."
        )


def grouped(
    task: FitTask,
    problem: FitProblem,
    climbs: Sequence[Climb],
    skipped: dict[str, str],
    limit: float,
) -> FitGroup:
    """Return what is kept of a task's contest.

    Parameters
    ----------
    task : FitTask
    problem : FitProblem
    climbs : sequence of Climb
    skipped : dict
        Who did not take part, and why.
    limit : float
        The seconds that a fit might take.
    """
    goal = target(climbs)
    everybody = [(climb, step) for climb in climbs for step in climb.steps]
    lowest = min(everybody, key=lambda pair: pair[1].objective, default=None)
    rows, columns, classes = problem.sizes
    reached = {climb.solver.name: climb.again for climb in climbs if climb.reached}
    return FitGroup(
        shape=task.name,
        use=task.use,
        logits=(rows, classes),
        axis=-1,
        dtype=problem.dtype,
        task="fit",
        nbytes=problem.nbytes,
        times=tuple(
            _timed(climb, [step.seconds for step in climb.again])
            for climb in climbs
            if climb.reached
        ),
        skipped=skipped | {c.solver.name: _why(c, goal) for c in climbs if not c.reached},
        features=columns,
        density=problem.density,
        c=problem.c,
        about=task.about,
        goal=goal.objective if goal else None,
        goal_of=next((_whose(*pair) for pair in everybody if pair[1] is goal), ""),
        lowest=lowest[1].objective if lowest else None,
        lowest_of=_whose(*lowest) if lowest else "",
        fits={c.solver.name: {"steps": list(c.steps), "ended": c.ended} for c in climbs},
        reached={name: steps[0] for name, steps in reached.items()},
        memory={name: max(step.nbytes for step in steps) for name, steps in reached.items()},
        memory_how="; ".join(dict.fromkeys(climb.how for climb in climbs if climb.how)),
        late=tuple(_timed(c, [limit]) for c in climbs if c.late and not c.reached),
    )


def _timed(climb: Climb, seconds: list[float]) -> Timed:
    solver = climb.solver
    return Timed(solver.name, solver.title, solver.kind, "fresh", summary(seconds, 1))


def _why(climb: Climb, goal: Step | None) -> str:
    """Return why a solver has no time."""
    lowest = climb.lowest
    if lowest is None or goal is None:
        return climb.ended
    short = (
        f"its lowest objective, at tolerance {lowest.tol:.0e} after {lowest.seconds:.3g} s, is "
        f"{_above(lowest.objective, goal.objective):.1e} too high"
    )
    ended = climb.ended if climb.ended not in ("", "settled") else ""
    return f"{ended}; {short}" if ended else short


def _whose(climb: Climb, step: Step) -> str:
    return f"{climb.solver.title}, tolerance {step.tol:.0e}"


def _above(value: float, base: float | None) -> float:
    """Return how far an objective is above another, relative to that."""
    return 0.0 if base is None else (value - base) / abs(base)
