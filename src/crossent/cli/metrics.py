"""Numbers about a fitted classifier on labelled rows: accuracy, loss, calibration, confusions."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crossent import cross_entropy, softmax
from crossent.cli.labels import Codes
from crossent.cli.model_file import SavedModel

Floats = NDArray[np.float64]
ECE_BINS = 15


@dataclass(frozen=True)
class Calibration:
    """A reliability diagram: rows binned by the probability of their predicted class.

    Parameters
    ----------
    edges : ndarray, shape (B + 1,)
    rows : ndarray of int64, shape (B,)
        Rows in each bin, the upper edge included.
    correct : ndarray of int64, shape (B,)
        Rows of each bin that are classified correctly.
    confidence : ndarray, shape (B,)
        Mean probability of the predicted class in each bin; 0 in an empty bin.
    """

    edges: Floats
    rows: Codes
    correct: Codes
    confidence: Floats

    @property
    def error(self) -> float:
        """Expected calibration error, Σ_b n_b/N·|accuracy_b − confidence_b| (Guo et al., 2017)."""
        gaps = np.abs(self.correct - self.rows * self.confidence)
        return float(gaps.sum() / self.rows.sum())


@dataclass(frozen=True)
class Evaluation:
    """What a classifier answers on labelled rows.

    Parameters
    ----------
    labels : ndarray of int64, shape (N,)
    probabilities : ndarray of float64, shape (N, V)
    loss : float
        Mean cross-entropy, in nats.
    """

    labels: Codes
    probabilities: Floats
    loss: float

    @property
    def predicted(self) -> Codes:
        """Most probable class of each row, shape (N,)."""
        best: Codes = self.probabilities.argmax(axis=1)
        return best

    @property
    def correct(self) -> int:
        """Number of rows classified correctly."""
        return int((self.predicted == self.labels).sum())

    @property
    def accuracy(self) -> float:
        """Share of rows classified correctly."""
        return self.correct / len(self.labels)

    def class_counts(self) -> tuple[Codes, Codes, Codes]:
        """Return rows of each class, rows predicted as it, and rows of both, each shape (V,)."""
        classes = self.probabilities.shape[1]
        hits = self.labels[self.predicted == self.labels]
        rows, predicted, correct = (
            np.bincount(codes, minlength=classes) for codes in (self.labels, self.predicted, hits)
        )
        return rows, predicted, correct


def evaluate(model: SavedModel, features: NDArray[np.generic], labels: Codes) -> Evaluation:
    """Return the answers of a model for unscaled features `(N, D)` with labels `(N,)`."""
    logits = model.logits(features)
    return Evaluation(labels, softmax(logits), float(cross_entropy(logits, labels)))


def calibration(probabilities: Floats, labels: Codes, bins: int = ECE_BINS) -> Calibration:
    """Return the reliability of predictions in `bins` bins of equal width.

    Parameters
    ----------
    probabilities : ndarray, shape (N, V)
    labels : ndarray of int64, shape (N,)
    bins : int

    Examples
    --------
    >>> p = np.array([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8]])
    >>> round(calibration(p, np.array([0, 1, 1])).error, 6)
    0.333333
    """
    top = probabilities.max(axis=1)
    hits = probabilities.argmax(axis=1) == labels
    bin_of = np.clip(np.ceil(top * bins).astype(np.int64) - 1, 0, bins - 1)
    rows = np.bincount(bin_of, minlength=bins)
    total = np.bincount(bin_of, weights=top, minlength=bins)
    return Calibration(
        edges=np.linspace(0, 1, bins + 1),
        rows=rows,
        correct=np.bincount(bin_of[hits], minlength=bins),
        confidence=total / np.maximum(rows, 1),
    )


def wilson_interval(correct: int, rows: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share (Wilson's score interval).

    Examples
    --------
    >>> low, high = wilson_interval(90, 100)
    >>> round(low, 3), round(high, 3)
    (0.826, 0.945)
    """
    z = 1.959963984540054
    centre = (correct + z * z / 2) / (rows + z * z)
    half = z / (rows + z * z) * np.sqrt(correct * (rows - correct) / rows + z * z / 4)
    return float(max(centre - half, 0)), float(min(centre + half, 1))


def confusions(predicted: Codes, labels: Codes, classes: int) -> list[tuple[int, int, int]]:
    """Return (true class, predicted class, rows) of every kind of mistake, the commonest first.

    Examples
    --------
    >>> confusions(np.array([0, 1, 1, 1]), np.array([0, 0, 0, 1]), 2)
    [(0, 1, 2)]
    """
    wrong = predicted != labels
    pairs, counts = np.unique(labels[wrong] * classes + predicted[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [
        (int(pairs[place] // classes), int(pairs[place] % classes), int(counts[place]))
        for place in order
    ]
