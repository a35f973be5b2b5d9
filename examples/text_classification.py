"""Which package of Python's standard library does a piece of source come from? Text, never dense.

Pieces of 20 lines become rows of TF-IDF weights, one column a word, as a CSR matrix; from there to
the classifier's coefficients nothing is made dense. Whole files are set aside for the test, and
others for the choice of C: two pieces of one file share its names, its habits and its licence.

    python examples/text_classification.py --plot text-classification.png

docs/text-classification.md explains what it shows. The text is the standard library of the Python
that runs this; the plot needs matplotlib.

Shapes: N pieces, D words, V packages.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    from rich.console import Console
    from rich.table import Table
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics import confusion_matrix
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.naive_bayes import MultinomialNB
except ModuleNotFoundError as error:
    package = str(error.name).partition(".")[0]
    if package not in ("rich", "sklearn"):
        raise
    raise SystemExit(
        f"text_classification.py needs {package}; pip install 'crossent[cli]'"
    ) from None

from crossent.sklearn import SoftmaxClassifier

Array = NDArray[Any]
WORDS = r"[A-Za-z_]\w+|[^\w\s]+"  # names, keywords, the words of comments; runs of punctuation
TESTS = {"test", "tests", "idle_test"}  # folders that some installations leave out
C_PATH = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
TOLERANCE = 1e-6  # a word is in few pieces, so the mean loss's gradient in its weights is small


# Text ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pieces:
    """Pieces of source, and where each comes from; arrays (N,)."""

    text: Array
    package: Array
    file: Array
    group: Array  # pieces of one group stay together when the pieces are split

    def __len__(self) -> int:
        return len(self.text)

    def take(self, rows: Array) -> Pieces:
        """Return the pieces at these positions."""
        return Pieces(*(array[rows] for array in (self.text, self.package, self.file, self.group)))

    def split(self, seed: int) -> tuple[Pieces, Pieces]:
        """Return four fifths and one fifth, about so of each package, with no group in both."""
        folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
        larger, smaller = next(folds.split(self.text, self.package, self.group))
        return self.take(larger), self.take(smaller)


def library_files() -> dict[str, list[Path]]:
    """Return the files of each package of the standard library, its tests left out."""
    folder = Path(sysconfig.get_path("stdlib"))
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.py")):
        first, *rest = path.relative_to(folder).parts
        if rest and first in sys.stdlib_module_names and not TESTS & {first, *rest}:
            files.setdefault(first, []).append(path)
    return files


def cut(
    files: dict[str, list[Path]], lines: int, most: int, seed: int, *, apart: bool = False
) -> Pieces:
    """Cut files into pieces of some lines, and take at most so many of a file.

    Else one file of 3000 lines would decide what its package's share of the test says. Pieces of
    fewer than 20 words are left out. `apart` lets pieces of one file go separate ways in a split.
    """
    rng = np.random.default_rng(seed)
    found: list[tuple[str, str, str]] = []
    for package, paths in files.items():
        for path in paths:
            source = path.read_text("utf-8", errors="replace").splitlines()
            begins = range(0, len(source), lines)
            texts = ["\n".join(source[begin : begin + lines]) for begin in begins]
            texts = [text for text in texts if len(text.split()) >= 20]
            for i in sorted(rng.permutation(len(texts))[:most]):
                found.append((texts[i], package, str(path)))
    text, package, file = (np.array(column) for column in zip(*found, strict=True))
    return Pieces(text, package, file, np.arange(len(text)) if apart else file)


# Model --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What was fitted, and what it says of the test pieces."""

    words: TfidfVectorizer
    model: SoftmaxClassifier
    features: Any  # (N, D) CSR, of the training pieces
    path: list[tuple[float, float, float]]  # C, loss and accuracy on the pieces held out
    test_features: Any  # CSR

    def telling(self, pieces: Pieces, package: str, n: int) -> list[str]:
        """Return the words that add most to a package's logit, on average over its own pieces."""
        (row,) = np.flatnonzero(self.model.classes_ == package)
        present = self.features[pieces.package == package].mean(axis=0)  # (1, D): a vector at last
        added = np.asarray(present).ravel() * self.model.coef_[row]
        return list(self.words.get_feature_names_out()[np.argsort(-added)[:n]])


def fit(train: Pieces, test: Pieces, seed: int) -> Result:
    """Choose C by the loss on files held out of the training, then fit to all of it.

    The words and their weights are learnt from the training files alone, and for the choice of C
    from those of them that are not held out.
    """
    fitted, held_out = train.split(seed)
    words = new_words()
    features, held_features = words.fit_transform(fitted.text), words.transform(held_out.text)
    model = SoftmaxClassifier(tol=TOLERANCE, max_iter=1000, warm_start=True)
    path: list[tuple[float, float, float]] = []
    for C in C_PATH:  # from strong to weak: each fit starts where the last one ended
        model.set_params(C=C).fit(features, fitted.package)
        loss, accuracy = judge(model, held_features, held_out)
        path.append((C, loss, accuracy))
        if loss > min(path, key=lambda step: step[1])[1]:
            break
    C = min(path, key=lambda step: step[1])[0]

    words = new_words()
    features = words.fit_transform(train.text)
    model = SoftmaxClassifier(C=C, tol=TOLERANCE, max_iter=1000).fit(features, train.package)
    return Result(words, model, features, path, words.transform(test.text))


def new_words() -> TfidfVectorizer:
    return TfidfVectorizer(token_pattern=WORDS, lowercase=False, min_df=3, sublinear_tf=True)


def judge(model: Any, features: Any, pieces: Pieces) -> tuple[float, float]:
    """Return the mean loss and the accuracy of any model of scikit-learn's kind."""
    log_prob = model.predict_log_proba(features)  # (N, V): few columns
    own = np.searchsorted(model.classes_, pieces.package)
    return (
        float(-log_prob[np.arange(len(pieces)), own].mean()),
        float((log_prob.argmax(axis=1) == own).mean()),
    )


# Report -------------------------------------------------------------------------------------------


def report(result: Result, train: Pieces, test: Pieces) -> None:
    console = Console(highlight=False, width=100)
    features, model = result.features, result.model
    stored = sum(part.nbytes for part in (features.data, features.indices, features.indptr))
    files, test_files = {*train.file}, {*test.file}
    console.print(
        f"{len(train)} pieces of {len(files)} files to train on, {len(test)} of "
        f"{len(test_files)} files to test on, {len(files & test_files)} files in both\n"
        f"CSR {features.shape[0]} × {features.shape[1]}, {features.nnz} stored: "
        f"{stored / 1e6:.1f} MB; dense it would be "
        f"{np.prod(features.shape) * features.dtype.itemsize / 1e6:.0f} MB\n"
    )
    for C, loss, accuracy in result.path:
        chosen = "  ← chosen" if model.C == C else ""
        console.print(f"C {C:6g}   held-out loss {loss:.4f}   accuracy {accuracy:.1%}{chosen}")

    predicted = model.predict(result.test_features)
    right = predicted == test.package
    table = Table(box=None, pad_edge=False)
    for name, justify in (("", "left"), ("test pieces", "right"), ("found", "right")):
        table.add_column(name, justify=justify)
    table.add_column("most telling words", no_wrap=True)
    for package in model.classes_:
        of_it = test.package == package
        telling = " ".join(result.telling(train, package, 8))
        table.add_row(package, str(of_it.sum()), f"{right[of_it].mean():.0%}", telling)
    console.print()
    console.print(table, markup=False)

    mistaken = Counter(zip(test.package[~right], predicted[~right], strict=True))
    console.print("\nmost often mistaken: ", end="")
    console.print(", ".join(f"{a} for {b} ({n})" for (a, b), n in mistaken.most_common(4)))
    named = np.array([p in text for p, text in zip(test.package, test.text, strict=True)])
    console.print(
        f"pieces that spell their package's name: {named.mean():.0%}, "
        f"of these right {right[named].mean():.1%}; of the others {right[~named].mean():.1%}\n"
    )
    bayes = MultinomialNB(alpha=0.05).fit(features, train.package)
    often = np.unique(test.package, return_counts=True)[1].max()
    console.print(f"{'':24}{'accuracy':>9}{'loss':>8}")
    for name, other in (("SoftmaxClassifier", model), ("naive Bayes", bayes)):
        loss, accuracy = judge(other, result.test_features, test)
        console.print(f"{name:24}{accuracy:9.1%}{loss:8.3f}")
    console.print(f"{'best constant answer':24}{often / len(test):9.1%}")


def plot(result: Result, train: Pieces, test: Pieces, path: str) -> None:
    """Draw what became of each package's test pieces, and its most telling words beside them."""
    from matplotlib.figure import Figure

    names = result.model.classes_
    predicted = result.model.predict(result.test_features)
    shares = confusion_matrix(test.package, predicted, labels=names, normalize="true")
    figure = Figure(figsize=(11, 1.4 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.005:
            color = "white" if share > 0.5 else "black"
            axes.text(
                column, row, f"{share * 100:.0f}", ha="center", va="center", color=color, fontsize=9
            )
    for row, name in enumerate(names):
        telling = "   ".join(result.telling(train, name, 7)).replace("$", r"\$")
        axes.text(len(names) - 0.2, row, telling, va="center", family="monospace", fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(
        "test pieces of each package (row), percent said to be of each; its most telling words",
        fontsize=10,
        loc="left",
    )
    figure.savefig(path, dpi=110)


def at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        found = int(text)
        if found < least:
            raise argparse.ArgumentTypeError(f"{found} is less than {least}")
        return found

    return number


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Python's packages, told apart by their words.")
    parser.add_argument(
        "--packages", nargs="+", metavar="NAME", help="default: those of at least 12 files"
    )
    parser.add_argument("--lines", type=at_least(1), default=20, help="of a piece")
    parser.add_argument("--most", type=at_least(1), default=20, help="pieces of a file")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument(
        "--apart", action="store_true", help="split by pieces, not files: what not to do"
    )
    parser.add_argument("--plot", metavar="PATH", help="where to write the figure (.png or .svg)")
    args = parser.parse_args(argv)
    if args.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib; pip install 'crossent[cli]'")
    if args.plot and not Path(args.plot).parent.is_dir():
        parser.error(f"--plot: there is no folder {Path(args.plot).parent}")
    files = library_files()
    packages = args.packages or [name for name, paths in files.items() if len(paths) >= 12]
    few = [name for name in packages if len(files.get(name, [])) < 5]
    if few or len(set(packages)) < 3:
        parser.error(
            f"--packages: three or more of at least 5 files each; {few or packages} are not"
        )
    chosen = {name: files[name] for name in packages}
    pieces = cut(chosen, args.lines, args.most, args.seed, apart=args.apart)
    train, test = pieces.split(args.seed)
    result = fit(train, test, args.seed)
    report(result, train, test)
    if args.plot:
        plot(result, train, test, args.plot)


if __name__ == "__main__":
    main()
