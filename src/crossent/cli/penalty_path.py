"""`crossent train --select-penalty`: C by cross-validation along a path of warm-started fits.

Design: the path goes from the strongest penalty to the weakest. At each C every fold's training
part is fitted from that fold's solution at the C before, and then all training rows from theirs, as
cv.glmnet does it. So the model of the best C so far is always at hand: for the user who presses
Ctrl-C, and at the end, when there is nothing left to fit. It costs a quarter more with 5 folds.
Scaling is fitted to each training part alone; the test rows are not given to this module.

Numbers are glmnet's: the mean over folds weights each by its rows, and the standard error is
√(Σ_f w_f (loss_f − loss)² / (F − 1)) with w_f the share of the rows (cvm and cvsd of cv.glmnet).
"""

import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from crossent.cli.data import Dataset
from crossent.cli.errors import InputError
from crossent.cli.fit import HINT, KEEPING, Fit, Fitter
from crossent.cli.labels import Codes, class_name
from crossent.cli.metrics import evaluate
from crossent.cli.scaling import Scaling, fit_scaling

if TYPE_CHECKING:
    from crossent.sklearn import FitProgress

DEFAULT_CS = (*(float(f"{digit}e{power}") for power in range(-4, 4) for digit in (1, 3)), 1e4)
DEFAULT_FOLDS = 5
PATIENCE = 3  # Cs in a row with a rising loss, before the rest of the default grid is left out
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PathPoint:
    """What was found at one C.

    Parameters
    ----------
    fit : Fit
        Of all training rows.
    train_loss : float
        Mean cross-entropy of that fit on all training rows.
    fold_rows : ndarray of int64, shape (F,)
        Held-out rows.
    fold_losses, fold_accuracies : ndarray of float64, shape (F,)
        Mean cross-entropy of the held-out rows in nats, and the share classified correctly.
    fold_iterations : list of int
    folds_converged : int
    """

    fit: Fit
    train_loss: float
    fold_rows: Codes
    fold_losses: Floats
    fold_accuracies: Floats
    fold_iterations: list[int]
    folds_converged: int

    @property
    def C(self) -> float:  # noqa: N802  (scikit-learn's name)
        """Inverse strength of the penalty."""
        return self.fit.C

    @property
    def loss(self) -> float:
        """Mean held-out cross-entropy, over rows."""
        return float(np.average(self.fold_losses, weights=self.fold_rows))

    @property
    def accuracy(self) -> float:
        """Share of the held-out rows classified correctly."""
        return float(np.average(self.fold_accuracies, weights=self.fold_rows))

    @property
    def standard_error(self) -> float:
        """Of `loss`, from its spread over folds."""
        spread = np.average((self.fold_losses - self.loss) ** 2, weights=self.fold_rows)
        return float(np.sqrt(spread / (len(self.fold_losses) - 1)))


@dataclass
class PenaltyPath:
    """A path and the choice from it.

    Parameters
    ----------
    grid : tuple of float
        The Cs asked for, ascending: from the strongest penalty to the weakest.
    folds, seed : int
    one_se : bool
        Whether the strongest penalty within one standard error of the best is chosen.
    points : list of PathPoint
        Those that were finished, in the order of `grid`.
    rising, interrupted : bool
        Why the path ended before the end of the grid, if it did.
    seconds : float
    """

    grid: tuple[float, ...]
    folds: int
    seed: int
    one_se: bool
    points: list[PathPoint] = field(default_factory=list)
    rising: bool = False
    interrupted: bool = False
    seconds: float = 0.0

    @property
    def best(self) -> PathPoint:
        """The lowest mean held-out loss; the stronger penalty of two that tie."""
        return min(self.points, key=lambda point: point.loss)

    @property
    def chosen(self) -> PathPoint:
        """The best, or by the one-standard-error rule the strongest penalty that is as good."""
        best = self.best
        limit = best.loss + (best.standard_error if self.one_se else 0.0)
        return next(point for point in self.points if point.loss <= limit)

    @property
    def edge(self) -> str | None:
        """The end of the grid that the best C lies on: "strongest", "weakest" or None."""
        ends = {self.grid[0]: "strongest", self.grid[-1]: "weakest"}
        return ends.get(self.best.C)

    def has_risen(self) -> bool:
        """Whether the loss rose `PATIENCE` times in a row, to clearly more than the best."""
        last = [point.loss for point in self.points[-PATIENCE - 1 :]]
        rises = len(last) == PATIENCE + 1 and all(np.diff(last) > 0)
        return rises and last[-1] > self.best.loss + self.best.standard_error

    def metrics(self) -> dict[str, Any]:
        """Return what metrics.json says about the selection."""
        return {
            "rule": "one standard error" if self.one_se else "lowest loss",
            "folds": self.folds,
            "seed": self.seed,
            "best_C": self.best.C,
            "chosen_C": self.chosen.C,
            "best_on_edge": self.edge,
            "not_tried": list(self.grid[len(self.points) :]),
            "ended_by": "interrupt" if self.interrupted else "rise" if self.rising else "grid",
            "seconds": self.seconds,
            "path": [
                {
                    "C": point.C,
                    "loss": point.loss,
                    "standard_error": point.standard_error,
                    "accuracy": point.accuracy,
                    "train_loss": point.train_loss,
                    "fold_losses": point.fold_losses.tolist(),
                    "fold_iterations": point.fold_iterations,
                    "folds_converged": point.folds_converged,
                    "iterations": point.fit.iterations,
                    "converged": point.fit.converged,
                }
                for point in self.points
            ],
        }


@dataclass
class _Part:
    """Rows to fit and rows to judge by, with the classifier that goes along the path on them."""

    fitted: NDArray[np.int64]
    held_out: NDArray[np.int64]
    scaling: Scaling
    fitter: Fitter


def parse_cs(text: str) -> tuple[float, ...]:
    """Return the Cs of a list separated by commas, ascending.

    Raises
    ------
    InputError
        Unless they are two or more different finite numbers above 0.

    Examples
    --------
    >>> parse_cs("1, 0.01,1e2")
    (0.01, 1.0, 100.0)
    """
    try:
        values = sorted(float(number) for number in text.split(","))
    except ValueError:
        values = []
    usable = all(value > 0 and math.isfinite(value) for value in values)
    if not usable or len(values) < 2 or len(set(values)) < len(values):
        raise InputError(
            f"--Cs is {text!r}; give two or more different numbers above 0, separated by commas, "
            "as in 0.01,0.1,1"
        )
    return tuple(values)


def select_penalty(
    dataset: Dataset,
    rows: NDArray[np.int64],
    scale: str,
    path: PenaltyPath,
    tol: float,
    max_iter: int,
    console: Console,
    *,
    whole_grid: bool,
) -> None:
    """Fill `path`, one C after the other; Ctrl-C ends it and keeps what is finished.

    Parameters
    ----------
    dataset : Dataset
    rows : ndarray of int64, shape (N,)
        Row numbers of the training rows in `dataset`; no others are looked at.
    scale : {"standard", "minmax", "pixel", "none"}
    path : PenaltyPath
        Without points.
    tol, max_iter
        As in `crossent.sklearn.SoftmaxClassifier`, for every fit.
    console : rich.console.Console
        Where progress and a line for each C are printed.
    whole_grid : bool
        Whether to try every C, even where the loss only rises.

    Raises
    ------
    InputError
        If the classes have too few rows for the folds, or a fit fails.
    KeyboardInterrupt
        If Ctrl-C came before the first C was finished: no model is known to be any good.
    """
    began = time.perf_counter()
    try:
        with console.status("cutting folds") as status:
            watch = _Watch(console, status.update, path)
            folds, everything = _parts(dataset, rows, scale, path, tol, max_iter, watch)
            console.print(_HEADER)
            for C in path.grid:
                path.points.append(_point(dataset, C, folds, everything, watch))
                console.print(_line(path.points[-1], path.best))
                path.rising = not whole_grid and path.grid[-1] != C and path.has_risen()
                if path.rising:
                    break
    except KeyboardInterrupt:
        if not path.points:
            raise
        path.interrupted = len(path.points) < len(path.grid) and not path.rising
        console.print(KEEPING)
    path.seconds = time.perf_counter() - began
    console.print(_outcome(path))


class _Watch:
    """Shows where on the path the running fit is, on a terminal."""

    def __init__(self, console: Console, update: Any, path: PenaltyPath) -> None:
        self._console, self._update, self._path = console, update, path
        self.C, self.part = 0.0, ""

    def __call__(self, progress: "FitProgress") -> None:
        place = len(self._path.points) + 1
        self._update(
            f"C {self.C:g} ({place} of {len(self._path.grid)}), {self.part}, "
            f"iteration {progress.iteration}" + (HINT if self._path.points else "")
        )


def _parts(
    dataset: Dataset,
    rows: NDArray[np.int64],
    scale: str,
    path: PenaltyPath,
    tol: float,
    max_iter: int,
    watch: _Watch,
) -> tuple[list[_Part], _Part]:
    """Return the folds, and all training rows as a part of its own."""

    def part(fitted: NDArray[np.int64], held_out: NDArray[np.int64]) -> _Part:
        scaling = fit_scaling(scale, dataset.features[fitted], dataset.pixel_max)
        return _Part(fitted, held_out, scaling, Fitter(tol, max_iter, watch))

    folds = _folds(dataset, rows, path.folds, path.seed)
    return [part(rows[kept], rows[out]) for kept, out in folds], part(rows, rows)


def _folds(
    dataset: Dataset, rows: NDArray[np.int64], folds: int, seed: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    from sklearn.model_selection import StratifiedKFold

    labels = dataset.labels[rows]
    counts = np.bincount(labels, minlength=len(dataset.classes))
    if counts.min() < 2:
        name = class_name(dataset.classes[int(counts.argmin())])
        raise InputError(
            f"class {name!r} has a single training row, and --select-penalty needs two, one to "
            "fit and one to judge by; add rows, lower --test-size, or give --C"
        )
    if counts.max() < folds:
        raise InputError(
            f"--folds is {folds}, but no class has more than {counts.max()} training rows; "
            f"give at most {counts.max()}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class may have fewer rows than folds
        yield from StratifiedKFold(folds, shuffle=True, random_state=seed).split(labels, labels)


def _point(
    dataset: Dataset, C: float, folds: list[_Part], everything: _Part, watch: _Watch
) -> PathPoint:
    watch.C = C
    fits, judged = [], []
    for number, part in enumerate(folds, 1):
        watch.part = f"fold {number} of {len(folds)}"
        fits.append(_fit(dataset, part, C))
        judged.append(_judge(dataset, part, fits[-1]))
    watch.part = "all training rows"
    fit = _fit(dataset, everything, C)
    train_loss, _ = _judge(dataset, everything, fit)
    return PathPoint(
        fit=fit,
        train_loss=train_loss,
        fold_rows=np.array([len(part.held_out) for part in folds]),
        fold_losses=np.array([loss for loss, _ in judged]),
        fold_accuracies=np.array([accuracy for _, accuracy in judged]),
        fold_iterations=[each.iterations for each in fits],
        folds_converged=sum(each.converged for each in fits),
    )


def _fit(dataset: Dataset, part: _Part, C: float) -> Fit:
    # Scaled anew at every C: a pass over the data is little beside a fit, and the scaled copies of
    # all folds at once would be `folds` times the data.
    scaled = part.scaling(dataset.features[part.fitted])
    return part.fitter.fit(scaled.astype(dataset.dtype, copy=False), dataset.labels[part.fitted], C)


def _judge(dataset: Dataset, part: _Part, fit: Fit) -> tuple[float, float]:
    model = fit.model(dataset, part.scaling)
    rows = part.held_out
    answers = evaluate(model, dataset.features[rows], dataset.labels[rows])
    return answers.loss, answers.accuracy


_HEADER = f"{'C':>8}  held-out loss  standard error  accuracy  iterations"


def _line(point: PathPoint, best: PathPoint) -> str:
    iterations = sum(point.fold_iterations) + point.fit.iterations
    line = (
        f"{point.C:>8g}  {point.loss:>13.4f}  {point.standard_error:>14.4f}  "
        f"{point.accuracy:>8.2%}  {iterations:>10}"
    )
    return line + ("  best so far" if point is best else "")


def _outcome(path: PenaltyPath) -> str:
    best, chosen, count = path.best, path.chosen, len(path.grid) - len(path.points)
    left = f"{count} larger {'C' if count == 1 else 'Cs'} not tried"
    text = f"best C {best.C:g}: held-out loss {best.loss:.4f} ± {best.standard_error:.4f}"
    if path.one_se and chosen is best:
        text += "; no stronger penalty is within one standard error of it"
    elif path.one_se:
        text += f"; chosen C {chosen.C:g}, the strongest penalty within one standard error"
    if path.rising:
        text += f"\n{left}: the loss rose {PATIENCE} times in a row"
    if path.interrupted:
        text += f"\n{left}: interrupted"
    advice = edge_advice(path.edge)
    return text + (f"\n{advice}" if advice and not path.interrupted else "")


def edge_advice(edge: str | None) -> str | None:
    """Return what to do about a best C on the edge of the grid that `PenaltyPath.edge` names."""
    if edge is None:
        return None
    where, what = ("last", "larger") if edge == "weakest" else ("first", "smaller")
    return (
        f"the best C is the {where} of the grid, a {what} one may be better; "
        f"try {what} ones with --Cs"
    )
