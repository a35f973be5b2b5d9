"""Who is timed: what every contender is given, and which peers there are.

A peer answers a `Problem` with one `Contender` for each way in which it can hand out the result. It
is checked against crossent before it is timed, so a peer that computes something else is left out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from crossent.cli.bench.timing import Call

Task = Literal["loss+gradient", "loss", "softmax", "log_softmax", "stats", "fit"]
Output = Literal["fresh", "kept", "none"]
Arrays = tuple[NDArray[Any], ...]
TASKS: tuple[Task, ...] = ("loss+gradient", "loss", "softmax", "log_softmax", "stats")
SAMPLED = 64  # rows at most, of those of a large array that are compared


class Unserved(Exception):  # noqa: N818  (an answer, not an error)
    """A peer has nothing for this problem; the text says why."""


class Question(Protocol):
    """What the timing of any problem needs to know of it."""

    @property
    def task(self) -> Task:
        """As in `Problem`."""

    @property
    def dtype(self) -> str:
        """The name of the dtype."""

    @property
    def threads(self) -> int:
        """As in `Problem`."""

    @property
    def text(self) -> str:
        """What is computed, in words."""

    def sample(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return in float64 what is compared of an array that a contender returned."""


@dataclass(frozen=True)
class Problem:
    """What is to be computed.

    Parameters
    ----------
    task
        "loss+gradient": the mean cross-entropy of index targets and its gradient in the logits.
    logits : ndarray of any shape
        Classes along `axis`.
    target : ndarray of int64, the rows' shape
    axis : int
    kept : ndarray of the logits' shape and dtype
        An output that exists already, for those who can write to one.
    threads : int
    """

    task: Task
    logits: NDArray[Any]
    target: NDArray[np.int64]
    axis: int
    kept: NDArray[Any]
    threads: int

    @property
    def picked(self) -> NDArray[np.int64]:
        """Return the targets with an axis of length 1 for the classes."""
        return np.expand_dims(self.target, self.axis)

    @property
    def dtype(self) -> str:
        """Return the name of the logits' dtype."""
        return self.logits.dtype.name

    @property
    def text(self) -> str:
        """Return what is computed, in words."""
        return f"{self.task} of {self.dtype} {self.logits.shape}"

    def sample(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return single numbers, and of an array like the logits some of the rows."""
        if array.shape != self.logits.shape:
            return np.array(array, np.float64)
        rows = np.moveaxis(array, self.axis, -1)
        index = np.linspace(0, self.target.size - 1, SAMPLED).round().astype(np.int64)
        found: NDArray[Any] = rows[np.unravel_index(index, self.target.shape)].astype(np.float64)
        return found

    def require_dtype(self, *names: str) -> None:
        """Raise `Unserved` for logits of another dtype."""
        if self.dtype not in names:
            raise Unserved(f"takes {', '.join(names)}")


def as_arrays(result: Any) -> Arrays:
    """Return a result, one array or a tuple of them, as NumPy arrays."""
    parts = result if isinstance(result, tuple) else (result,)
    return tuple(np.asarray(part) for part in parts)


@dataclass(frozen=True)
class Contender:
    """One call to time: where its output goes, and how its result becomes NumPy arrays."""

    output: Output
    call: Call
    read: Callable[[Any], Arrays] = as_arrays


P = TypeVar("P", bound=Question)
_P = TypeVar("_P", bound=Question, contravariant=True)


class Peer(Protocol[_P]):
    """A library that computes the same."""

    name: str
    """As on the command line."""
    title: str
    """As in tables."""
    package: str
    """Whose version is told."""
    modules: tuple[str, ...]
    """What must be installed."""
    how: str
    """The call that is timed."""

    def prepare(self, threads: int) -> None:
        """Import what is needed and set the number of threads."""

    def contenders(self, problem: _P) -> list[Contender]:
        """Return what to time; raise `Unserved` where there is nothing."""


def missing(peer: Peer[Any]) -> list[str]:
    """Return the modules that a peer needs and that are not installed."""
    return [name for name in peer.modules if importlib.util.find_spec(name) is None]


def all_peers() -> list[Peer[Problem]]:
    """Return every peer, installed or not."""
    from crossent.cli.bench.peers_arrays import NumPyPeer, ScikitLearn, SciPyPeer
    from crossent.cli.bench.peers_frameworks import Compiled, Eager, Jitted

    return [Eager(), Compiled(), Jitted(), ScikitLearn(), NumPyPeer(), SciPyPeer()]
