"""What a run of the head found, beside times: memory, errors, and what products would take."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from crossent.cli.bench import memory
from crossent.cli.bench.benchmark import Found, Kinds
from crossent.cli.bench.head_problem import (
    HEADS,
    HeadProblem,
    HeadShape,
    answer,
    head_problems,
)
from crossent.cli.bench.peers import Arrays, Contender, Peer
from crossent.cli.bench.peers_frameworks_head import our_heads
from crossent.cli.bench.results import Group, Timed, megabytes
from crossent.cli.bench.shapes import MAIN
from crossent.cli.bench.yardsticks import held_against

_ERRORS = {"loss": "loss", "input": "dx", "linear_weight": "dW"}


@dataclass(frozen=True)
class HeadGroup(Group):
    """The contenders of one head.

    Parameters
    ----------
    features : int
    wrt : tuple of str
        What the gradients are in.
    operations : int
        In the products it takes.
    rates : dict
        Operations a second of square products in float32, by who makes them.
    memory : dict
        Each contender's extra memory in bytes; None where it could not be measured.
    memory_how : str
        How, or why not.
    outputs : int
        Bytes of the gradients, which are among them.
    errors : dict
        Each contender's errors, on a head of the sizes `errors_of`: the norm of the difference to
        the answer in float64 over the norm of that answer.
    """

    features: int = 0
    wrt: tuple[str, ...] = ()
    operations: int = 0
    rates: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int | None] = field(default_factory=dict)
    memory_how: str = ""
    outputs: int = 0
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    errors_of: tuple[int, int, int] = (0, 0, 0)

    @property
    def sizes(self) -> str:
        """Return rows, features and classes as in tables."""
        return f"{self.logits[0]}×{self.features}×{self.logits[1]}"

    def rivals(self, ours: Timed) -> dict[str, Timed | None]:
        """Return the products and the read of the features."""
        return {"products": self.base("products"), "read of x": self.base("read")}

    def extra_heads(self) -> tuple[str, ...]:
        """Return the heads of memory and errors."""
        return ("memory", *(f"err. {_ERRORS[name]}" for name in ("loss", *self.wrt)))

    def extra(self, timed: Timed) -> tuple[str, ...]:
        """Return a contender's memory and errors."""
        taken, errors = self.memory.get(timed.name), self.errors.get(timed.name, {})
        found = (errors.get(_ERRORS[name]) for name in ("loss", *self.wrt))
        return (
            "–" if taken is None else megabytes(taken),
            *("–" if error is None else f"{error:.1e}" for error in found),
        )

    def note(self) -> str:
        """Return what the figures are of."""
        gradients = f", the gradients, {megabytes(self.outputs)}, among it" if self.outputs else ""
        memory = f"Memory beside the inputs{gradients}. " if self.memory else ""
        rates = ", ".join(f"{title} {rate / 1e9:.1f}" for title, rate in self.rates.items())
        sizes = "×".join(map(str, self.errors_of))
        return f"{memory}Errors on {sizes}. GFLOP/s of a product of square matrices: {rates}."


def _need(shape: HeadShape, dtype: str) -> float:
    """Return what the greediest contender holds, in bytes, above what is there for all.

    Six arrays of the logits' size, four of which may be in float32; x and W, the gradients, and
    both once more, since every framework may make them its own.
    """
    rows, classes = shape.logits
    logits = shape.nbytes("float32" if dtype != "float64" else dtype)
    given = shape.nbytes(dtype) / (rows * classes) * shape.features * (rows + classes)
    return 6 * logits + 6 * given


def _group(shape: HeadShape, problem: HeadProblem, found: Found[HeadProblem]) -> HeadGroup:
    times, rates = held_against(problem, found.times)
    timed = [each.name for each in times if each.kind in ("crossent", "peer")]
    taken: dict[str, int | None] = {}
    how: dict[str, None] = {} if found.memory else {"not asked for": None}
    if found.memory:
        for name in timed:
            found.tell(f"memory of {name}: {problem.text}")
            taken[name], by = memory.in_a_process(name, problem, shape)
            how[by if taken[name] is not None else f"{name} {by}"] = None
    found.tell(f"errors: {problem.text}")
    few = shape.affordable()
    small = head_problems(few, problem.dtype, problem.threads)(problem.task)
    rows, classes = few.logits
    outputs = {"input": problem.x, "linear_weight": problem.weight}
    return HeadGroup(
        shape=shape.name,
        use=shape.use,
        logits=shape.logits,
        axis=-1,
        dtype=problem.dtype,
        task=problem.task,
        nbytes=shape.nbytes(problem.dtype),
        times=times,
        skipped=found.skipped,
        features=shape.features,
        wrt=problem.wrt,
        operations=problem.operations,
        rates=rates,
        memory=taken,
        memory_how="; ".join(how),
        outputs=sum(outputs[name].nbytes for name in problem.wrt),
        errors=_errors(small, [peer for peer in found.peers if peer.name in timed]),
        errors_of=(rows, shape.features, classes),
    )


def _errors(problem: HeadProblem, peers: list[Peer[HeadProblem]]) -> dict[str, dict[str, float]]:
    """Return the errors of crossent and of `peers`, all of which have solved a larger problem."""
    right = answer(problem)
    found = {"crossent": _error(our_heads(problem)[0], problem, right)}
    for peer in peers:
        found[peer.name] = _error(peer.contenders(problem)[0], problem, right)
    return found


def _error(contender: Contender, problem: HeadProblem, right: Arrays) -> dict[str, float]:
    parts = contender.read(contender.call())
    names = (_ERRORS[name] for name in ("loss", *problem.wrt))
    return {
        name: float(np.linalg.norm(part.astype(np.float64) - exact) / np.linalg.norm(exact))
        for name, part, exact in zip(names, parts, right, strict=True)
    }


HEAD_KINDS = Kinds(HEADS, _need, head_problems, _group, tasks=(MAIN, "loss"))
