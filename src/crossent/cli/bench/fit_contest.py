"""How long each solver takes to scikit-learn's own objective.

Design.
A. Not every solver can be watched while it fits, so each is asked for smaller and smaller
   tolerances, a fit from zero each time, timed whole. Its time is that of the first tolerance whose
   result is near enough; one half a decade larger is tried last.
B. What is near enough is known once all have come down: `SLACK` above the lowest objective of
   scikit-learn's solvers, whichever found it. So all go on past it, until two tolerances in a row
   gain less than a tenth of `SLACK`, a fit takes more than the limits, or no tolerance is left.
C. Objectives are computed by one function, in float64, from what each fit returned.
D. At each tolerance the solvers take turns, in an order drawn anew, and so they do when the fits
   that count are made again.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from crossent.cli.bench.fit_process import Done, TooLong, Unfinished
from crossent.cli.bench.fit_solvers import Fitted, Solver
from crossent.cli.bench.fit_tasks import FitProblem
from crossent.cli.bench.timing import Effort

SLACK = 1e-6
TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
_SETTLED = SLACK / 10
_BLOCK = 2**20  # logits, or numbers of X, at a time

Fit = Callable[[Solver, float], Done]


@dataclass(frozen=True)
class Step:
    """One fit: its tolerance, what it took, and the objective it ended at."""

    tol: float
    seconds: float
    nbytes: int
    iterations: int
    objective: float


@dataclass
class Climb:
    """What a solver did.

    Parameters
    ----------
    solver : Solver
    steps : list of Step
        Each tolerance that ended, the largest first.
    ended : str
        Why no smaller tolerance was tried.
    late : bool
        Because a fit took too long.
    reached : Step, optional
        The first that is near enough.
    again : list of Step
        That one, and the same fit made again.
    how : str
        How memory was measured.
    """

    solver: Solver
    steps: list[Step] = field(default_factory=list)
    ended: str = ""
    late: bool = False
    reached: Step | None = None
    again: list[Step] = field(default_factory=list)
    how: str = ""

    @property
    def lowest(self) -> Step | None:
        """Return the fit with the lowest objective."""
        return min(self.steps, key=lambda step: step.objective, default=None)

    def settled(self) -> bool:
        """Tell whether the last two tolerances gained next to nothing."""
        last = [step.objective for step in self.steps[-3:]]
        if len(last) < 3:
            return False
        return all(
            above - below <= _SETTLED * abs(below) for above, below in itertools.pairwise(last)
        )


def objective(problem: FitProblem, fitted: Fitted) -> float:
    """Return C Σᵢ λᵢ + ½‖W‖² in float64, the objective of scikit-learn's LogisticRegression."""
    from scipy.special import logsumexp

    coef, intercept = fitted.coef.astype(np.float64), fitted.intercept.astype(np.float64)
    rows, columns, classes = problem.sizes
    size = max(_BLOCK // max(classes, round(columns * problem.density)), 1)
    total = 0.0
    for begin in range(0, rows, size):
        block = slice(begin, begin + size)
        labels = problem.labels[block]
        logits = problem.features[block].astype(np.float64) @ coef.T + intercept
        total += float((logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels]).sum())
    return problem.c * total + float((coef**2).sum()) / 2


def contest(
    problem: FitProblem,
    solvers: Sequence[Solver],
    fit: Fit,
    tolerances: Sequence[float],
    effort: Effort,
    tell: Callable[[str], object],
) -> list[Climb]:
    """Return what each solver did.

    Parameters
    ----------
    problem : FitProblem
    solvers : sequence of Solver
    fit : callable
        Makes a fit; raises `Unfinished`.
    tolerances : sequence of float
        The largest first.
    effort : Effort
        How often the fits that count are made.
    tell : callable
        Is told what goes on.
    """
    climbs = [Climb(solver) for solver in solvers]
    draw = random.Random(0)

    def step(climb: Climb, tol: float) -> Step:
        tell(f"{climb.solver.title}, tolerance {tol:.0e}")
        done = fit(climb.solver, tol)
        climb.how = done.how
        value = objective(problem, done.fitted)
        return Step(tol, done.seconds, done.nbytes, done.fitted.iterations, value)

    for tol in tolerances:
        for climb in draw.sample(climbs, len(climbs)):
            if climb.ended:
                continue
            try:
                climb.steps.append(step(climb, tol))
            except Unfinished as why:
                climb.ended = f"{why} at tolerance {tol:.0e}"
                climb.late = isinstance(why, TooLong)
            else:
                climb.ended = "settled" if climb.settled() else ""
    goal = target(climbs)
    if goal is not None:
        for climb in climbs:
            _find(climb, goal, step)
        _again([climb for climb in climbs if climb.reached], step, effort, draw)
    return climbs


def target(climbs: Sequence[Climb]) -> Step | None:
    """Return the fit whose objective all are to reach.

    That is the lowest of the peers', of all where no peer came to an end.
    """
    lowest = [(climb.solver.kind != "peer", climb.lowest) for climb in climbs]
    found = [(ours, step) for ours, step in lowest if step is not None]
    peers = [step for ours, step in found if not ours] or [step for _, step in found]
    return min(peers, key=lambda step: step.objective, default=None)


def near(step: Step, goal: Step) -> bool:
    """Tell whether a fit's objective is at most `SLACK` above the goal's, or below it."""
    return step.objective - goal.objective <= SLACK * abs(goal.objective)


def _find(climb: Climb, goal: Step, step: Callable[[Climb, float], Step]) -> None:
    """Set the first fit that is near enough, having tried half a decade more."""
    first = next((k for k, found in enumerate(climb.steps) if near(found, goal)), None)
    if first is None:
        return
    climb.reached = climb.steps[first]
    try:
        half = step(climb, float(f"{3 * climb.reached.tol:.0e}"))
    except Unfinished:
        return
    climb.steps.insert(first, half)
    if near(half, goal):
        climb.reached = half


def _again(
    climbs: list[Climb],
    step: Callable[[Climb, float], Step],
    effort: Effort,
    draw: random.Random,
) -> None:
    """Make the fits that count again, in turn, as often as `effort` says."""
    done: set[str] = set()
    for climb in climbs:
        assert climb.reached is not None
        climb.again.append(climb.reached)
    for turn in range(1, effort.most):
        for climb in draw.sample(climbs, len(climbs)):
            spent = sum(each.seconds for each in climb.again)
            if climb.solver.name in done or effort.enough(turn, spent):
                continue
            try:
                climb.again.append(step(climb, climb.again[0].tol))
            except Unfinished:  # so close to the limit that it has had its share
                done.add(climb.solver.name)
