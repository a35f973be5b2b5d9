"""What sets one benchmark apart from another: who takes part, and how its results are told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic

from crossent.cli.bench.peers import TASKS, Contender, Output, P, Peer, Task

if TYPE_CHECKING:
    from crossent.cli.bench.results import Group, Timed
    from crossent.cli.bench.shapes import Shape


@dataclass(frozen=True)
class Column:
    """A ratio in the summary.

    Parameters
    ----------
    head : str
        Above the column.
    over : str
        As in `Ratio`.
    output
        Where ours put its result.
    name : str
        Which of ours.
    """

    head: str
    over: str
    output: Output = "fresh"
    name: str = "crossent"


@dataclass(frozen=True)
class Words:
    """How results are told.

    Parameters
    ----------
    name : str
        Of the command and of the files.
    columns : tuple of Column
        Of the summary.
    base, base_text : str
        What tables divide by, a contender's name or "fastest copy", and how heads call it.
    axis, axis_text : str
        The same for the picture.
    title, caption : str
        Of the picture; the caption's last sentences.
    packages : tuple of str
        Whose versions the caption tells.
    ratios, times : str
        What the page says above the ratios and above the times.
    method : str
        What one call is, after what is said of timing in general.
    leader : str
        Which of ours the picture holds against the best peer.
    sizes : str
        What the sizes in the summary are of.
    mark : tuple of str
        What else the picture marks, as `base`, and what its legend calls it; nothing if None.
    task, dtype : str
        What the picture shows of a run, where there is any; every dtype if None.
    first : str
        Above the first column of the summary.
    halves : bool
        The summary's last column tells the time over that in float32.
    """

    name: str
    columns: tuple[Column, ...]
    base: str
    base_text: str
    axis: str
    axis_text: str
    title: str
    caption: str
    packages: tuple[str, ...]
    ratios: str
    times: str
    method: str = ""
    leader: str = "crossent"
    sizes: str = "logits"
    mark: tuple[str, str] | None = ("fastest copy", "fastest copy")
    task: Task = "loss+gradient"
    dtype: str | None = "float32"
    first: str = "task"
    halves: bool = True

    @property
    def files(self) -> frozenset[str]:
        """Return the names of what a run writes."""
        return frozenset(f"{self.name}.{kind}" for kind in ("json", "md", "png"))


Copies = dict[str, tuple[str, Contender]]


def no_copies(problem: Any) -> Copies:
    """Return none: what a benchmark has that holds nobody against copies."""
    return {}


@dataclass(frozen=True)
class Found(Generic[P]):
    """What a contest came to: the times, why others have none, and who took part.

    Parameters
    ----------
    times : tuple of Timed
    skipped : dict
        Why the other peers do not take part.
    peers : list of Peer
        All that were asked for, timed or skipped.
    tell : callable
        Is told what goes on.
    memory : bool
        Whether memory is to be measured, where a benchmark does that.
    """

    times: tuple[Timed, ...]
    skipped: dict[str, str]
    peers: list[Peer[P]]
    tell: Callable[[str], object]
    memory: bool = True


@dataclass(frozen=True)
class Kinds(Generic[P]):
    """What is measured: shapes, their problems, and how a problem's results are kept.

    Parameters
    ----------
    shapes : tuple of Shape
        All there are.
    need : callable
        Returns the bytes that a shape needs in a dtype, at the greediest moment.
    problems : callable
        Returns the maker of a shape's problems, one for each task, on inputs made once; it takes
        the shape, the dtype and the number of threads.
    group : callable
        Returns what is kept of a problem's contest.
    tasks : tuple of Task
        All that may be asked for.
    """

    shapes: tuple[Shape, ...]
    need: Callable[[Any, str], float]
    problems: Callable[[Any, str, int], Callable[[Task], P]]
    group: Callable[[Any, P, Found[P]], Group]
    tasks: tuple[Task, ...] = TASKS


@dataclass(frozen=True)
class Benchmark(Generic[P]):
    """Who takes part.

    Parameters
    ----------
    words : Words
    kinds : Kinds
    peers : callable
        Returns every peer, installed or not. What is crossent's under another's compiler is one of
        them: it too may fail, or not be asked for.
    ours : callable
        Returns crossent's own calls; what the first returns is what the others must.
    copies : callable
        Returns the copies of the same bytes, by name, each with its title.
    needs : tuple of str
        Modules without which there is nothing to time.
    tasks : str, optional
        The only ones, as `--tasks` names them; None for what suits a shape.
    slack : float
        How far a result may be from ours, over what rows of logits may.
    """

    words: Words
    kinds: Kinds[P]
    peers: Callable[[], list[Peer[P]]]
    ours: Callable[[P], list[Contender]]
    copies: Callable[[P], Copies] = no_copies
    needs: tuple[str, ...] = ()
    tasks: str | None = None
    slack: float = 1.0
