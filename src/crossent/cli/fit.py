"""One fit of the classifier: its progress on the console, its history, and what Ctrl-C leaves."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from crossent.cli.data import Dataset
from crossent.cli.errors import InputError, first_line
from crossent.cli.labels import Codes
from crossent.cli.model_file import SavedModel
from crossent.cli.scaling import Scaling

if TYPE_CHECKING:
    from crossent.sklearn import FitProgress

HINT = "\n  Ctrl-C keeps the best model so far"
KEEPING = "interrupted: keeping the best model so far (Ctrl-C again to end without it)"
RECORDED = ("iteration", "objective", "gradient_norm", "seconds")


@dataclass(frozen=True)
class Fit:
    """A fitted softmax layer and how it came about.

    Parameters
    ----------
    C : float
        Inverse strength of its penalty.
    coef : ndarray, shape (K, D)
        K is V, or 1 for two classes.
    intercept : ndarray, shape (K,)
    history : list of dict
        Iteration, objective, gradient_norm and seconds of the start and of each iteration.
    converged : bool
        Whether no entry of the gradient exceeds the tolerance.
    interrupted : bool
        Whether Ctrl-C ended the fit, so that this is its last iterate.
    seconds : float
    """

    C: float
    coef: NDArray[np.floating[Any]]
    intercept: NDArray[np.floating[Any]]
    history: list[dict[str, float]]
    converged: bool
    interrupted: bool
    seconds: float

    @property
    def iterations(self) -> int:
        """How many iterations it took; the start is none."""
        return len(self.history) - 1

    def model(self, dataset: Dataset, scaling: Scaling) -> SavedModel:
        """Return the layer together with its scaling and the data's names, ready to be saved."""
        return SavedModel(
            coef=self.coef.astype(np.float64),
            intercept=self.intercept.astype(np.float64),
            scaling=scaling,
            classes=dataset.classes,
            feature_names=dataset.feature_names,
            image_shape=dataset.image_shape,
        )


class Fitter:
    """A classifier that is fitted to the same rows once or, from where it was, for other penalties.

    Parameters
    ----------
    tol, max_iter
        As in `crossent.sklearn.SoftmaxClassifier`.
    show : callable
        Called with a `crossent.sklearn.FitProgress` at the start and after each iteration.
    """

    def __init__(self, tol: float, max_iter: int, show: "Callable[[FitProgress], None]") -> None:
        from crossent.sklearn import SoftmaxClassifier

        self._show = show
        self._history: list[dict[str, float]] = []
        self._last: FitProgress | None = None
        self._began = 0.0
        self._classifier = SoftmaxClassifier(
            tol=tol, max_iter=max_iter, warm_start=True, callback=self._note
        )

    def fit(self, features: NDArray[np.floating[Any]], labels: Codes, C: float) -> Fit:
        """Return the fit to scaled features `(N, D)` with labels `(N,)`.

        Raises
        ------
        InputError
            If a parameter is out of its range or the objective is not finite.
        """
        from sklearn.exceptions import ConvergenceWarning

        self._history, self._last, self._began = [], None, time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            try:
                self._classifier.set_params(C=C).fit(features, labels)
            except ValueError as error:
                raise InputError(f"the fit failed: {first_line(error)}") from error
        return Fit(
            C=C,
            coef=self._classifier.coef_,
            intercept=self._classifier.intercept_,
            history=self._history,
            converged=not any(issubclass(each.category, ConvergenceWarning) for each in caught),
            interrupted=False,
            seconds=time.perf_counter() - self._began,
        )

    def so_far(self) -> Fit | None:
        """Return the last iterate of a fit that was interrupted, or None before iteration 1."""
        last = self._last
        if last is None or last.iteration == 0:
            return None
        return Fit(
            C=self._classifier.C,
            coef=last.coef,
            intercept=last.intercept,
            history=self._history[: last.iteration + 1],
            converged=last.gradient_norm <= self._classifier.tol,
            interrupted=True,
            seconds=time.perf_counter() - self._began,
        )

    def _note(self, progress: "FitProgress") -> None:
        self._history.append({name: getattr(progress, name) for name in RECORDED})
        self._last = progress
        self._show(progress)


def fit_or_keep(
    features: NDArray[np.floating[Any]],
    labels: Codes,
    C: float,
    tol: float,
    max_iter: int,
    console: Console,
) -> Fit:
    """Return a fit, or what Ctrl-C has left of it; progress goes to the console.

    Parameters
    ----------
    features : ndarray, shape (N, D)
        Scaled.
    labels : ndarray of int64, shape (N,)
    C, tol, max_iter
        As in `crossent.sklearn.SoftmaxClassifier`.
    console : rich.console.Console

    Raises
    ------
    InputError
        If a parameter is out of its range or the objective is not finite.
    KeyboardInterrupt
        If Ctrl-C came before the first iteration had ended: there is no model to keep.
    """
    fitter: Fitter | None = None
    try:
        with console.status("fitting") as status:
            fitter = Fitter(tol, max_iter, _progress(console, status.update))
            return fitter.fit(features, labels, C)
    except KeyboardInterrupt:
        kept = fitter.so_far() if fitter else None
        if kept is None:
            raise
    console.print(KEEPING)
    return kept


def _progress(console: Console, update: Callable[[str], None]) -> "Callable[[FitProgress], None]":
    """Return a callback that rewrites one line on a terminal, and elsewhere prints few lines."""

    def show(record: "FitProgress") -> None:
        line = (
            f"iteration {record.iteration:>4}  loss with penalty {record.objective:.6f}  "
            f"gradient {record.gradient_norm:.1e}  {record.seconds:.1f} s"
        )
        if console.is_terminal:
            update(line + (HINT if record.iteration else ""))
        elif record.iteration & (record.iteration - 1) == 0:  # 0 and the powers of two
            console.print(line)

    return show
