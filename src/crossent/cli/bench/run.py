"""A run of a benchmark: every problem is made, timed, printed as it comes, and written down."""

from __future__ import annotations

import datetime
import importlib.util
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from crossent.cli.bench import show
from crossent.cli.bench.benchmark import Benchmark, Found
from crossent.cli.bench.contest import contest
from crossent.cli.bench.machine import available_bytes, machine, on_cpus, versions
from crossent.cli.bench.peers import P, Peer, missing
from crossent.cli.bench.results import Group, Report
from crossent.cli.bench.shapes import SCALE, Shape, chosen, names
from crossent.cli.bench.timing import METHOD, Effort
from crossent.cli.errors import InputError
from crossent.cli.output import new_folder, require_new_folder, unused

THREADS = (
    "The process is bound to as many CPUs as there are to be threads, before any peer is imported: "
    "XLA, and any pool that counts CPUs, then starts as many threads. crossent, torch and "
    "scikit-learn are told the number as well."
)


@dataclass(frozen=True)
class Settings:
    """What the command line asks for; None where it does not say."""

    threads: int | None = None
    repeats: int | None = None
    seconds: float = 0.5
    shapes: str | None = None
    dtypes: str | None = None
    tasks: str | None = None
    peers: str | None = None
    output: Path | None = None
    force: bool = False
    quick: bool = False
    memory: bool = True

    def effort(self) -> Effort:
        """Return how long each contender is measured."""
        if self.repeats is not None:
            return Effort(math.inf, self.repeats, self.repeats)
        return Effort(0.02, 3, 5) if self.quick else Effort(self.seconds, 5, 31)


def run(benchmark: Benchmark[P], settings: Settings, console: Console) -> Report:
    """Time everything, print it as it comes, and write the folder with the results.

    Raises
    ------
    InputError
        For a name that does not exist, more threads than CPUs, a folder that cannot be made, or
        where nothing of ours can run.
    """
    words, kinds = benchmark.words, benchmark.kinds
    for module in benchmark.needs:
        if importlib.util.find_spec(module) is None:
            raise InputError(f"bench {words.name} needs {module}; pip install 'crossent[{module}]'")
    tasks = settings.tasks if benchmark.tasks is None else benchmark.tasks
    shapes = chosen(
        settings.shapes, settings.dtypes, tasks, settings.quick, kinds.shapes, kinds.tasks
    )
    known = {peer.name: peer for peer in benchmark.peers()}
    wanted = names("--peers", settings.peers, tuple(known))
    absent = {
        name: "not asked for" if name not in wanted else f"{lacking[0]} is not installed"
        for name, peer in known.items()
        if (lacking := missing(peer)) or name not in wanted
    }
    peers = [peer for name, peer in known.items() if name not in absent]
    folder = settings.output or unused(Path(f"crossent-bench-{words.name}"))
    require_new_folder(folder, settings.force, words.files)
    groups: list[Group] = []
    with on_cpus(settings.threads) as threads:
        about = machine()
        console.print(show.heading(about, threads, absent))
        for shape in shapes:
            for group in _measured(benchmark, shape, peers, threads, settings, console):
                console.print(show.block(group, words))
                groups.append(group)
    method = f"{METHOD} Logits are normal with standard deviation {SCALE:g}. {THREADS}"
    report = Report(
        words=words,
        date=now(),
        threads=threads,
        machine=about,
        versions=versions(),
        method=f"{method} {words.method}".rstrip(),
        quick=settings.quick,
        peers=tuple(
            {"name": name, "title": peer.title, "how": peer.how, "skipped": absent.get(name)}
            for name, peer in known.items()
        ),
        groups=tuple(groups),
    )
    finish(report, folder, settings.force, console)
    return report


def now() -> str:
    """Return the time, to the second, as reports tell it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def finish(report: Report, folder: Path, force: bool, console: Console) -> None:
    """Print a report's summary and write its folder."""
    console.print(show.summary(report))
    _write(folder, force, report)
    console.print(f"written to {folder}: {', '.join(sorted(report.words.files))}")


def _measured(
    benchmark: Benchmark[P],
    shape: Shape,
    peers: list[Peer[P]],
    threads: int,
    settings: Settings,
    console: Console,
) -> Iterator[Group]:
    """Yield the results of one shape in each of its dtypes and tasks."""
    kinds = benchmark.kinds
    for dtype, tasks in shape.measured().items():
        if dtype == "bfloat16" and not importlib.util.find_spec("ml_dtypes"):
            console.print(f"\n{shape.name} {dtype}: skipped, ml_dtypes is not installed")
            continue
        need = kinds.need(shape, dtype)
        if need > available_bytes():
            need /= 1e9
            console.print(
                f"\n{shape.name} {dtype}: skipped, its peers need {need:.1f} GB of memory"
            )
            continue
        problem_of = kinds.problems(shape, dtype, threads)
        for task in tasks:
            problem = problem_of(task)
            with console.status(f"{shape.name} {dtype} {task}") as status:
                tell = status.update
                times, skipped = contest(benchmark, problem, peers, settings.effort(), tell)
                found = Found(times, skipped, peers, tell, settings.memory)
                group = kinds.group(shape, problem, found)
            yield group


def _write(folder: Path, force: bool, report: Report) -> None:
    from crossent.cli.bench.picture import draw

    words = report.words
    with new_folder(folder, force, words.files) as staging:
        text = json.dumps(report.as_json(), indent=1, ensure_ascii=False, allow_nan=False)
        (staging / f"{words.name}.json").write_text(text + "\n", encoding="utf-8")
        (staging / f"{words.name}.md").write_text(show.markdown(report), encoding="utf-8")
        draw(report, staging / f"{words.name}.png")
