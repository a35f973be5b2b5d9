"""What sets one benchmark apart from another: who takes part, and how its results are told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from crossent.cli.bench.peers import Contender, Output, Peer, Problem


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

    @property
    def files(self) -> frozenset[str]:
        """Return the names of what a run writes."""
        return frozenset(f"{self.name}.{kind}" for kind in ("json", "md", "png"))


Copies = dict[str, tuple[str, Contender]]


def no_copies(problem: Problem) -> Copies:
    """Return none: what a benchmark has that holds nobody against copies."""
    return {}


@dataclass(frozen=True)
class Benchmark:
    """Who takes part.

    Parameters
    ----------
    words : Words
    peers : callable
        Returns every peer, installed or not. What is crossent's under another's compiler is one of
        them: it too may fail, or not be asked for.
    ours : callable
        Returns crossent's own calls; what the first returns is what the others must.
    copies : callable
        Returns the copies of the same bytes, by name, each with its title.
    held : int
        Copies of the logits that are in memory at once, at the greediest moment.
    needs : tuple of str
        Modules without which there is nothing to time.
    tasks : str, optional
        The only ones, as `--tasks` names them; None for what suits a shape.
    """

    words: Words
    peers: Callable[[], list[Peer]]
    ours: Callable[[Problem], list[Contender]]
    copies: Callable[[Problem], Copies] = no_copies
    held: int = 7
    needs: tuple[str, ...] = ()
    tasks: str | None = None
