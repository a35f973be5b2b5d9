"""A run of a benchmark: every problem is made, timed, printed as it comes, and written down."""

from __future__ import annotations

import datetime
import importlib.util
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from crossent.cli.bench import show
from crossent.cli.bench.benchmark import Benchmark
from crossent.cli.bench.contest import contest
from crossent.cli.bench.machine import available_bytes, machine, on_cpus, versions
from crossent.cli.bench.peers import Peer, Problem, missing
from crossent.cli.bench.results import Group, Report
from crossent.cli.bench.shapes import Shape, chosen, names
from crossent.cli.bench.timing import METHOD, Effort
from crossent.cli.errors import InputError
from crossent.cli.output import new_folder, require_new_folder, unused

SCALE = 3.0  # standard deviation of the logits
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

    def effort(self) -> Effort:
        """Return how long each contender is measured."""
        if self.repeats is not None:
            return Effort(math.inf, self.repeats, self.repeats)
        return Effort(0.02, 3, 5) if self.quick else Effort(self.seconds, 5, 31)


def run(benchmark: Benchmark, settings: Settings, console: Console) -> Report:
    """Time everything, print it as it comes, and write the folder with the results.

    Raises
    ------
    InputError
        For a name that does not exist, more threads than CPUs, a folder that cannot be made, or
        where nothing of ours can run.
    """
    words = benchmark.words
    for module in benchmark.needs:
        if importlib.util.find_spec(module) is None:
            raise InputError(f"bench {words.name} needs {module}; pip install 'crossent[{module}]'")
    tasks = settings.tasks if benchmark.tasks is None else benchmark.tasks
    shapes = chosen(settings.shapes, settings.dtypes, tasks, settings.quick)
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
            for group in _measured(benchmark, shape, peers, threads, settings.effort(), console):
                console.print(show.block(group, words))
                groups.append(group)
    method = f"{METHOD} Logits are normal with standard deviation {SCALE:g}. {THREADS}"
    report = Report(
        words=words,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
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
    console.print(show.summary(report))
    _write(folder, settings.force, report)
    console.print(f"written to {folder}: {', '.join(sorted(words.files))}")
    return report


def _measured(
    benchmark: Benchmark,
    shape: Shape,
    peers: list[Peer],
    threads: int,
    effort: Effort,
    console: Console,
) -> Iterator[Group]:
    """Yield the timings of one shape in each of its dtypes and tasks."""
    for dtype, tasks in shape.measured().items():
        if dtype == "bfloat16" and not importlib.util.find_spec("ml_dtypes"):
            console.print(f"\n{shape.name} {dtype}: skipped, ml_dtypes is not installed")
            continue
        logits, target = inputs(shape, dtype)
        if benchmark.held * logits.nbytes > available_bytes():
            need = benchmark.held * logits.nbytes / 1e9
            console.print(
                f"\n{shape.name} {dtype}: skipped, its peers need {need:.1f} GB of memory"
            )
            continue
        kept = output_like(logits)
        for task in tasks:
            problem = Problem(task, logits, target, shape.axis, kept, threads)
            with console.status(f"{shape.name} {dtype} {task}") as status:
                times, skipped = contest(benchmark, problem, peers, effort, status.update)
            yield Group(
                shape=shape.name,
                use=shape.use,
                logits=shape.logits,
                axis=shape.axis,
                dtype=dtype,
                task=task,
                nbytes=logits.nbytes,
                times=times,
                skipped=skipped,
            )


def inputs(shape: Shape, dtype: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return logits and targets, the same in every run."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(shape.logits, dtype=np.float32)
    logits *= SCALE
    rows = np.delete(shape.logits, shape.axis)
    target = rng.integers(0, shape.logits[shape.axis], tuple(rows))
    if dtype == "bfloat16":
        import ml_dtypes

        return logits.astype(ml_dtypes.bfloat16), target
    return logits.astype(dtype, copy=False), target


def output_like(logits: NDArray[Any]) -> NDArray[Any]:
    """Return an output whose pages exist and that lies in its first page where `logits` do.

    Of NumPy's large arrays that is true anyway. Small ones lie anywhere, and where two places
    differ by little modulo the size of a page some processors copy at a tenth of the speed
    (https://lunnova.dev/articles/ryzen-slow-short-rep-mov).
    """
    page = 4096
    memory = np.ones(logits.nbytes + page, np.uint8)
    start = (logits.ctypes.data - memory.ctypes.data) % page
    return memory[start : start + logits.nbytes].view(logits.dtype).reshape(logits.shape)


def _write(folder: Path, force: bool, report: Report) -> None:
    from crossent.cli.bench.picture import draw

    words = report.words
    with new_folder(folder, force, words.files) as staging:
        text = json.dumps(report.as_json(), indent=1, ensure_ascii=False, allow_nan=False)
        (staging / f"{words.name}.json").write_text(text + "\n", encoding="utf-8")
        (staging / f"{words.name}.md").write_text(show.markdown(report), encoding="utf-8")
        draw(report, staging / f"{words.name}.png")
