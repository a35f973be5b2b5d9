"""`crossent bench fit`: how long crossent and scikit-learn take to the same objective."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from crossent.cli.bench import fit_process, fit_tasks, show
from crossent.cli.bench.benchmark import Column, Words
from crossent.cli.bench.fit_contest import SLACK, TOLERANCES, contest
from crossent.cli.bench.fit_process import Done, Limits
from crossent.cli.bench.fit_results import FitGroup, grouped
from crossent.cli.bench.fit_solvers import SOLVERS, Solver
from crossent.cli.bench.fit_tasks import TASKS, FitProblem, FitTask
from crossent.cli.bench.machine import available_bytes, machine, on_cpus, versions
from crossent.cli.bench.results import Report
from crossent.cli.bench.run import finish, now
from crossent.cli.bench.shapes import names
from crossent.cli.bench.timing import Effort
from crossent.cli.errors import InputError
from crossent.cli.output import require_new_folder, unused

WORDS = Words(
    name="fit",
    columns=(
        Column("best of scikit-learn", "best peer"),
        Column("its lbfgs", "scikit-learn lbfgs"),
        Column("its newton-cg", "scikit-learn newton-cg"),
        Column("its newton-cholesky", "scikit-learn newton-cholesky"),
        Column("lbfgs / its best", "best peer", name="crossent-lbfgs"),
        Column("lbfgs / its lbfgs", "scikit-learn lbfgs", name="crossent-lbfgs"),
    ),
    base="best peer",
    base_text="the best of scikit-learn",
    axis="best peer",
    axis_text="the fastest of scikit-learn's solvers",
    title="Softmax regression to the same objective",
    caption="An arrow: over the limit on time. Missing: not near enough, or too much memory.",
    packages=("numpy", "scipy", "scikit-learn"),
    ratios='The first columns are of `SoftmaxClassifier`\'s "newton-cg", those named lbfgs of its '
    '"lbfgs". A dash: one of the two has no time, and the tables below say why.',
    times="the column after the spread is over the fastest of scikit-learn's solvers. tol: the "
    "tolerance that is timed. steps: the solver's iterations.",
    sizes="N×D×V",
    mark=None,
    task="fit",
    dtype=None,
    first="data",
    halves=False,
)
_QUICK = 10.0  # seconds
METHOD = (
    "Everybody minimises C Σ λ + ½‖W‖² from zero, in the dtype of X, intercepts without penalty. "
    "What is to be reached is the lowest objective of scikit-learn's solvers at any tolerance, and "
    f"{SLACK:.0e} of it more. Each solver is asked for the tolerances "
    f"{TOLERANCES[0]:.0e} to {TOLERANCES[-1]:.0e}, one a decade, until two in a row gain less than "
    f"{SLACK / 10:.0e}; its time is that of a whole fit at the first that comes near enough, "
    "thrice that tolerance tried as well. Objectives are computed in float64, by one function, "
    "from what a fit returned. "
    "Every fit has a process of its own, in which a tiny fit of the same kind has run before; at "
    "each tolerance the solvers take turns, in an order drawn anew. Times are medians with "
    "quartiles where there are several: a solver's fit is made again while it has taken less than "
    "the seconds given. Memory is what a fit adds to the resident set at its peak, its result "
    "included. The processes are bound to as many CPUs as there are to be threads, and BLAS, "
    "OpenMP and crossent are told the number; scikit-learn's own loss has one thread in "
    "LogisticRegression."
)


@dataclass(frozen=True)
class FitSettings:
    """What the command line asks for; None where it does not say.

    Parameters
    ----------
    threads : int, optional
    seconds : float
        Fits that count are made again until they have taken so long together.
    repeats : int, optional
        How often, in its place.
    limit : float
        Seconds a fit may take.
    memory : float
        GB that a fit may take beside its rows.
    tasks, peers : str, optional
        Names separated by commas.
    output : Path, optional
    force : bool
    quick : bool
    """

    threads: int | None = None
    seconds: float = 10.0
    repeats: int | None = None
    limit: float = 120.0
    memory: float = 4.0
    tasks: str | None = None
    peers: str | None = None
    output: Path | None = None
    force: bool = False
    quick: bool = False

    def effort(self) -> Effort:
        """Return how often the fits that count are made."""
        if self.repeats is not None:
            return Effort(math.inf, self.repeats, self.repeats)
        return Effort(0.0, 1, 1) if self.quick else Effort(self.seconds, 1, 5)

    def limits(self) -> Limits:
        """Return what a fit may take; no more memory than is free, in a quick run less time."""
        seconds = min(self.limit, _QUICK) if self.quick else self.limit
        return Limits(seconds, min(self.memory * 2**30, available_bytes()))


def run(settings: FitSettings, console: Console) -> Report:
    """Fit everything, print it as it comes, and write the folder with the results.

    Raises
    ------
    InputError
        For a name that does not exist, more threads than CPUs, a folder that cannot be made, or
        where there are no data for any of the tasks.
    """
    asked = names("--tasks", settings.tasks, tuple(task.name for task in TASKS))
    tasks = [task for task in TASKS if task.name in asked]
    rivals = SOLVERS[1:]
    wanted = names("--peers", settings.peers, tuple(solver.name for solver in rivals))
    absent = {each.name: "not asked for" for each in rivals if each.name not in wanted}
    solvers = [each for each in SOLVERS if each.name not in absent]
    folder = settings.output or unused(Path(f"crossent-bench-{WORDS.name}"))
    require_new_folder(folder, settings.force, WORDS.files)
    groups: list[FitGroup] = []
    with on_cpus(settings.threads) as threads:
        about = machine()
        console.print(show.heading(about, threads, absent))
        for task in tasks:
            try:
                problem = task.make(settings.quick)
            except InputError as error:
                if len(tasks) == 1:
                    raise
                console.print(f"\n{task.name}: skipped, {error}")
                continue
            group = _fitted(task, problem, solvers, threads, settings, console)
            console.print(show.block(group, WORDS))
            groups.append(group)
    limits = f" A fit may take {settings.limits().seconds:g} s and {settings.memory:g} GB."
    report = Report(
        words=WORDS,
        date=now(),
        threads=threads,
        machine=about,
        versions=versions(),
        method=METHOD + limits,
        quick=settings.quick,
        peers=tuple(
            {"name": s.name, "title": s.title, "how": s.how, "skipped": absent.get(s.name)}
            for s in SOLVERS
        ),
        groups=tuple(groups),
    )
    finish(report, folder, settings.force, console)
    return report


def _fitted(
    task: FitTask,
    problem: FitProblem,
    solvers: Sequence[Solver],
    threads: int,
    settings: FitSettings,
    console: Console,
) -> FitGroup:
    """Return the results of one task."""
    limits = settings.limits()
    needs = {solver.name: solver.need(problem.sizes, problem.dtype) for solver in solvers}
    skipped = {
        name: f"its Hessian takes {need / 2**30:.3g} GB, the limit is {limits.nbytes / 2**30:.3g}"
        for name, need in needs.items()
        if need > limits.nbytes
    }
    with (
        tempfile.TemporaryDirectory(prefix="crossent-fit-") as made,
        console.status(task.name) as status,
    ):
        folder = Path(made)
        fit_tasks.save(problem, folder)

        def fit(solver: Solver, tol: float) -> Done:
            return fit_process.fit(folder, solver.name, tol, threads, limits)

        able = [solver for solver in solvers if solver.name not in skipped]
        climbs = contest(
            problem,
            able,
            fit,
            TOLERANCES[1::2] if settings.quick else TOLERANCES,
            settings.effort(),
            lambda text: status.update(f"{task.name}: {text}"),
        )
    return grouped(task, problem, climbs, skipped, limits.seconds)
