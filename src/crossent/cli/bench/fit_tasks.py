"""What is fitted: four tasks, how their rows are made, and their files for processes of their own.

Every task is made anew in each run, the same on every machine but for the text, which is the
standard library of the Python that runs this.
"""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossent.cli import data

_FOLD = 10  # a quick run takes every tenth row, at least
_LINES = 10  # of a snippet
_FEWEST = 100  # snippets of a package that is a class


@dataclass(frozen=True)
class FitProblem:
    """One problem: minimise C Σᵢ λᵢ + ½‖W‖² over W and the intercepts b, which are not penalised.

    Parameters
    ----------
    features : ndarray or sparse CSR matrix (N, D)
        Float32 or float64; every solver computes in that dtype.
    labels : ndarray of int64 (N,)
        0 to V − 1, each at least once.
    c : float
    """

    features: Any
    labels: NDArray[np.int64]
    c: float

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Return the numbers of rows, features and classes."""
        rows, columns = self.features.shape
        return int(rows), int(columns), int(self.labels.max()) + 1

    @property
    def dtype(self) -> str:
        """Return the name of the features' dtype."""
        return str(self.features.dtype.name)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the features."""
        if isinstance(self.features, np.ndarray):
            return self.features.nbytes
        parts = (self.features.data, self.features.indices, self.features.indptr)
        return sum(part.nbytes for part in parts)

    @property
    def density(self) -> float:
        """Return the share of the features that is held; 1 where all are."""
        rows, columns, _ = self.sizes
        dense = isinstance(self.features, np.ndarray)
        return 1.0 if dense else float(self.features.nnz / (rows * columns))


@dataclass(frozen=True)
class FitTask:
    """A task by its name.

    Parameters
    ----------
    name, use : str
    about : str
        What the rows are, for the page.
    make : callable
        Returns the problem; it takes whether the run is a quick one.
    """

    name: str
    use: str
    about: str
    make: Callable[[bool], FitProblem]


def _digits(quick: bool) -> FitProblem:
    found = data.load("digits")
    return _few(FitProblem(found.features.astype(np.float64) / 16, found.labels, 1.0), quick, 300)


def _fashion_mnist(quick: bool) -> FitProblem:
    found = data.load("fashion-mnist")
    train = slice(-found.own_test_rows)
    labels = found.labels[train]
    if quick:
        train = slice(len(labels) // _FOLD**2)
    pixels = found.features[train].astype(np.float32) / np.float32(255)
    return FitProblem(pixels, labels[: len(pixels)], data.FASHION_MNIST_C)


def _many_classes(quick: bool) -> FitProblem:
    rows, columns, classes = (1000, 16, 50) if quick else (10_000, 128, 1000)
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((classes, columns), dtype=np.float32)
    labels = np.arange(rows) % classes
    noise = rng.standard_normal((rows, columns), dtype=np.float32)
    return FitProblem(centres[labels] / np.float32(4) + noise, labels, 1.0)


def _library_text(quick: bool) -> FitProblem:
    from sklearn.feature_extraction.text import TfidfVectorizer

    by_package: dict[str, list[str]] = {}
    for package, snippet in library_snippets(Path(sysconfig.get_path("stdlib"))):
        by_package.setdefault(package, []).append(snippet)
    step = _FOLD if quick else 1
    snippets, labels = [], []
    large = (found for _, found in sorted(by_package.items()) if len(found) >= _FEWEST)
    for number, found in enumerate(large):
        snippets += found[::step]
        labels += [number] * len(found[::step])
    words = TfidfVectorizer(lowercase=False, min_df=2, sublinear_tf=True, dtype=np.float64)
    return FitProblem(words.fit_transform(snippets), np.array(labels, np.int64), 1.0)


def library_snippets(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield a package or module of the standard library and ten lines of it, in sorted order.

    Its package `test` is no part, nor are the last lines of a file where they are fewer than ten.
    """
    for path in sorted(folder.rglob("*.py")):
        package = path.relative_to(folder).parts[0].removesuffix(".py")
        if package not in sys.stdlib_module_names:
            continue
        lines = path.read_text("utf-8", errors="replace").splitlines()
        for begin in range(0, len(lines) - _LINES + 1, _LINES):
            yield package, "\n".join(lines[begin : begin + _LINES])


TASKS = (
    FitTask(
        "digits",
        "handwritten digits",
        "scikit-learn's 1797 images of 8×8, pixels/16; C = 1.",
        _digits,
    ),
    FitTask(
        "fashion-mnist",
        "Fashion-MNIST",
        "The 60,000 training images of 28×28, pixels/255; C = 0.01.",
        _fashion_mnist,
    ),
    FitTask(
        "text",
        "text, large sparse vocabulary",
        "Which package or module of Python's standard library ten lines come from (those with at "
        "least 100 such pieces): TF-IDF, sublinear, of the words that at least two pieces have, in "
        "CSR; C = 1. The sizes depend on the version of Python.",
        _library_text,
    ),
    FitTask(
        "many-classes",
        "many classes (made data)",
        "Made: ten normal points about each of 1000 centres, these normal too with a "
        "quarter of the standard deviation; C = 1.",
        _many_classes,
    ),
)


def _few(problem: FitProblem, quick: bool, rows: int) -> FitProblem:
    if not quick:
        return problem
    return FitProblem(problem.features[:rows], problem.labels[:rows], problem.c)


def tiny(problem: FitProblem) -> FitProblem:
    """Return a problem of the same kind and dtype that a solver is done with at once."""
    rng = np.random.default_rng(0)
    features: Any = rng.standard_normal((30, 4)).astype(problem.dtype)
    if not isinstance(problem.features, np.ndarray):
        from scipy import sparse

        features = sparse.csr_matrix(features)
    return FitProblem(features, np.arange(30) % 3, 1.0)


def save(problem: FitProblem, folder: Path) -> None:
    """Write a problem to a folder that exists."""
    np.save(folder / "labels.npy", problem.labels)
    if isinstance(problem.features, np.ndarray):
        np.save(folder / "features.npy", problem.features)
    else:
        from scipy import sparse

        sparse.save_npz(folder / "features.npz", problem.features, compressed=False)
    (folder / "c.json").write_text(json.dumps(problem.c), "ascii")


def load(folder: Path) -> FitProblem:
    """Return the problem that `save` wrote."""
    dense = folder / "features.npy"
    if dense.exists():
        features = np.load(dense)
    else:
        from scipy import sparse

        features = sparse.load_npz(folder / "features.npz")
    c = json.loads((folder / "c.json").read_text("ascii"))
    return FitProblem(features, np.load(folder / "labels.npy"), c)
