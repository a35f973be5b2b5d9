"""The most memory that one call of a contender takes, measured in a process of its own.

The child imports what it needs, makes a call of a tiny problem, so that threads and libraries are
there, and makes the inputs; what is compiled is called once on them, as compiling takes memory too.
What the next call adds to the resident set at its peak, its result included, is what it takes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from dataclasses import replace

from crossent.cli.bench.head_problem import HeadProblem, HeadShape, head_problems
from crossent.cli.bench.peak import peak_of
from crossent.cli.bench.peers import Contender, Task
from crossent.cli.bench.peers_frameworks_head import head_peers, our_heads

METHOD = (
    "Memory is what one call adds to the resident set at its peak, its result included, in a "
    "process of its own, once inputs, threads and libraries (and what is compiled) are there."
)
_PATIENCE = 1800  # seconds


def in_a_process(name: str, problem: HeadProblem, shape: HeadShape) -> tuple[int | None, str]:
    """Return the extra bytes of a call of contender `name`, and how they were measured.

    None, and the reason, where the child did not answer.
    """
    asked = {
        "name": name,
        "task": problem.task,
        "dtype": problem.dtype,
        "logits": shape.logits,
        "features": shape.features,
        "frozen": shape.frozen,
        "threads": problem.threads,
    }
    command = [sys.executable, "-m", "crossent.cli.bench.memory", json.dumps(asked)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE, check=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, OSError, ValueError, IndexError) as error:
        return None, f"failed: {type(error).__name__}"
    return found["bytes"], found["how"]


def measured(name: str, task: Task, dtype: str, shape: HeadShape, threads: int) -> tuple[int, str]:
    """Return the extra bytes of a call in this process, and how they were measured."""
    import crossent

    crossent.set_num_threads(threads)
    peer = next((peer for peer in head_peers() if peer.name == name), None)
    if peer is not None:
        peer.prepare(threads)

    def contender(problem: HeadProblem) -> Contender:
        return (our_heads(problem) if peer is None else peer.contenders(problem))[0]

    if getattr(peer, "compiles", False):
        ready = contender(head_problems(shape, dtype, threads)(task))
        ready.call()
    else:
        tiny = replace(shape, logits=(8, 6), features=16)
        contender(head_problems(tiny, dtype, threads)(task)).call()
        ready = contender(head_problems(shape, dtype, threads)(task))
    result, taken, how = peak_of(ready.call)
    del result
    return taken, how


def _main() -> None:
    asked = json.loads(sys.argv[1])
    rows, classes = asked["logits"]
    shape = HeadShape("", "", (rows, classes), features=asked["features"], frozen=asked["frozen"])
    warnings.simplefilter("ignore")
    found, how = measured(asked["name"], asked["task"], asked["dtype"], shape, asked["threads"])
    print(json.dumps({"bytes": found, "how": how}))


if __name__ == "__main__":
    _main()
