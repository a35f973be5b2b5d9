"""What bounds the row kernels on this machine, shape by shape, as tables in Markdown.

    python benchmarks/profile_rows.py [--threads N] [--shapes imagenet,vocab-32k]

Loss and gradient in float32. Times are medians of interleaved rounds, as in `crossent bench rows`.
"""

from __future__ import annotations

import argparse
import math
import resource
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import crossent
from crossent.call import Call
from crossent.cli.bench.bench_rows import copies
from crossent.cli.bench.inputs import inputs, output_like
from crossent.cli.bench.machine import huge_pages, machine, on_cpus
from crossent.cli.bench.peers import Problem
from crossent.cli.bench.shapes import Shape, chosen
from crossent.cli.bench.timing import Effort, interleaved
from crossent.options import Options

EFFORT = Effort(0.5, 5, 31)
SMALL = 96 << 10  # bytes of logits that, with their gradient, stay in any L2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--shapes", help="names, separated by commas")
    parser.add_argument("--quick", action="store_true", help="few rows, to see that all works")
    arguments = parser.parse_args()
    shapes = chosen(arguments.shapes, None, None, arguments.quick)
    with on_cpus(arguments.threads) as threads:
        about = machine()
        print(
            f"{about['cpu']}, {threads} threads, {about['isa']}; {', '.join(about['caches'])}; "
            f"huge pages: {huge_pages()}\n"
        )
        for title, table in (
            ("Memory and arithmetic", bounds),
            ("Fresh outputs and page faults", faults),
        ):
            print(f"## {title}\n")
            print_table(table(shapes, threads))
        print("## A tiny call\n")
        print_table(call_parts())


def bounds(shapes: tuple[Shape, ...], threads: int) -> Iterator[tuple[str, ...]]:
    """Yield, for each shape, the time that memory needs, that arithmetic needs, and the kernel's.

    Memory: the fastest copy of the logits into the kept gradient. Arithmetic: one thread's time for
    logits of as many classes that stay in its L2 (one row, where that is longer), shared out.
    """
    yield (
        *("logits", "bytes moved", "fastest copy", "GB/s", "ns a logit in cache"),
        *("arithmetic alone", "kernel, out=", "GB/s", "over the copy", "bound by"),
    )
    for shape in shapes:
        logits, target = inputs(shape, "float32")
        problem = Problem("loss+gradient", logits, target, shape.axis, output_like(logits), threads)
        calls: dict[str, Callable[[], Any]] = {"kernel": kernel(problem)}
        for name, (_, contender) in copies(problem).items():
            if contender.output == "kept":
                calls[name] = contender.call
        for call in calls.values():
            call()
        times = {name: t.median for name, t in interleaved(calls, EFFORT).items()}
        ours = times.pop("kernel")
        copy, moved = min(times.values()), 2 * logits.nbytes
        each = nanoseconds_in_cache(shape)
        arithmetic = each * logits.size / threads * 1e-9
        yield (
            *(shape.text, f"{moved / 1e6:.1f} MB", milliseconds(copy), f"{moved / copy / 1e9:.1f}"),
            *(f"{each:.3f}", milliseconds(arithmetic), milliseconds(ours)),
            *(f"{moved / ours / 1e9:.1f}", f"{ours / copy:.2f}"),
            bound(ours, copy, arithmetic),
        )


def bound(ours: float, copy: float, arithmetic: float) -> str:
    """Name what the kernel waits for, if one of the two explains most of its time."""
    what, most = max(("memory", copy), ("arithmetic", arithmetic), key=lambda pair: pair[1])
    if min(copy, arithmetic) > 0.8 * most:
        what = "both"
    return what if most > 0.7 * ours else f"neither ({what} {100 * most / ours:.0f} %)"


def nanoseconds_in_cache(shape: Shape) -> float:
    """Return one thread's time for each logit of a small problem with as many classes."""
    classes = shape.logits[shape.axis]
    rows = max(1, SMALL // (4 * classes))
    sizes = (rows, classes) if shape.axis == -1 else (1, classes, rows)
    small = Shape("", "", sizes, shape.axis)
    logits, target = inputs(small, "float32")
    call = kernel(Problem("loss+gradient", logits, target, shape.axis, output_like(logits), 1))
    threads = crossent.get_num_threads()
    crossent.set_num_threads(1)
    call()
    seconds = interleaved({"": call}, EFFORT)[""].median
    crossent.set_num_threads(threads)
    return (seconds - overhead()) / logits.size * 1e9


def overhead() -> float:
    """Return the time of a call with one logit."""
    logits, target = inputs(Shape("", "", (1, 1)), "float32")
    call = kernel(Problem("loss+gradient", logits, target, -1, np.empty_like(logits), 1))
    call()
    return interleaved({"": call}, EFFORT)[""].median


def kernel(problem: Problem) -> Callable[[], Any]:
    """Return the backend's call with everything prepared: what the front end adds is left out."""
    call = Call("profile", problem.logits, problem.axis)
    plan, out = call.viewed(call.plan(problem.target, Options())), call.seen(problem.kept)
    return lambda: call.backend.cross_entropy(call.view, plan, None, out)


def faults(shapes: tuple[Shape, ...], threads: int) -> Iterator[tuple[str, ...]]:
    """Yield, for each shape, what a new output costs: page faults, and time beside a kept one."""
    yield (
        *("logits", "output", "4 KiB pages", "faults, crossent", "faults, x.copy()"),
        *("crossent, out=", "crossent, fresh", "x.copy()", "for being new"),
    )
    for shape in shapes:
        logits, target = inputs(shape, "float32")
        kept, axis = output_like(logits), shape.axis

        def fresh(x: Any = logits, t: Any = target, axis: int = axis) -> Any:
            return crossent.cross_entropy_value_and_grad(x, t, axis=axis)

        def again(x: Any = logits, t: Any = target, axis: int = axis, out: Any = kept) -> Any:
            return crossent.cross_entropy_value_and_grad(x, t, axis=axis, out=out)

        calls: dict[str, Callable[[], Any]] = {"fresh": fresh, "kept": again, "copy": logits.copy}
        for call in calls.values():
            call()
        times = {name: t.median for name, t in interleaved(calls, EFFORT).items()}
        extra = times["fresh"] - times["kept"]
        counted = {name: faults_of(call) for name, call in calls.items()}
        yield (
            *(shape.text, f"{logits.nbytes / 1e6:.1f} MB", str(math.ceil(logits.nbytes / 4096))),
            *(f"{counted['fresh']:.0f}", f"{counted['copy']:.0f}"),
            *(milliseconds(times[name]) for name in ("kept", "fresh", "copy")),
            f"{100 * extra / times['fresh']:.0f} %",
        )


def faults_of(call: Callable[[], Any], n: int = 5) -> float:
    """Return the minor page faults of one call."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n):
        call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / n


def call_parts() -> Iterator[tuple[str, ...]]:
    """Yield where the time of a call with 32×10 logits goes, each part timed by itself."""
    logits, target = inputs(Shape("", "", (32, 10)), "float32")
    kept = np.empty_like(logits)
    problem = Problem("loss+gradient", logits, target, -1, kept, 1)
    call = Call("profile", logits, -1)
    options = Options()
    plan = call.plan(target, options)
    found = call.backend.cross_entropy(call.view, call.viewed(plan), None, call.seen(kept))
    value_and_grad = crossent.cross_entropy_value_and_grad
    parts: dict[str, Callable[[], Any]] = {
        "the whole call": lambda: value_and_grad(logits, target),
        "the whole call, out=": lambda: value_and_grad(logits, target, out=kept),
        "loss alone": lambda: crossent.cross_entropy(logits, target),
        "native call": kernel(problem),
        "seeing the logits": lambda: Call("profile", logits, -1),
        "reading the options": Options,
        "options and target to a plan": lambda: call.plan(target, options),
        "a new output": call.output,
        "checking out=": lambda: call.checked_out(kept, (target,)),
        "the loss as a scalar": lambda: call.loss(plan, found),
        "an empty Python call": lambda: None,
    }
    for part in parts.values():
        part()
    times = interleaved(parts, Effort(0.1, 11, 31))
    whole = times["the whole call"].median
    yield ("part", "time", "share of the whole call")
    for name, found in times.items():
        share = f"{100 * found.median / whole:.0f} %"
        yield (name, f"{found.median * 1e6:.2f} µs", share)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def print_table(lines: Iterator[tuple[str, ...]]) -> None:
    for k, line in enumerate(lines):
        print("| " + " | ".join(line) + " |", flush=True)
        if k == 0:
            print("|---" + "|---:" * (len(line) - 1) + "|")
    print()


if __name__ == "__main__":
    main()
