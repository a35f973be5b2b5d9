"""`crossent train`: from a data set to a folder with the model, its metrics and a report."""

import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from crossent.cli import data, model_file
from crossent.cli.errors import InputError, first_line
from crossent.cli.metrics import calibration, evaluate
from crossent.cli.output import new_folder, require_new_folder, unused
from crossent.cli.report import ReportData, write_report
from crossent.cli.scaling import fit_scaling
from crossent.cli.training_metrics import not_converged_advice, training_metrics

if TYPE_CHECKING:
    from crossent.sklearn import FitProgress, SoftmaxClassifier

METRICS_NAME = "metrics.json"
REPORT_NAME = "report.html"
FILES = frozenset({model_file.FILE_NAME, METRICS_NAME, REPORT_NAME})


@dataclass(frozen=True)
class TrainSettings:
    """What a user can choose about `crossent train`; None stands for the data set's default.

    Parameters
    ----------
    source, target, data_dir, drop
        As in `crossent.cli.data.load`.
    test_size, seed
        As in `crossent.cli.data.split`.
    scale : {"standard", "minmax", "pixel", "none"}, optional
    C, max_iter, tol
        As in `crossent.sklearn.SoftmaxClassifier`.
    output : Path, optional
        New folder; if not given `crossent-<data>`, with a number where that exists already.
    force : bool
        Whether an older folder of ours may be replaced.
    """

    source: str
    target: str | None = None
    data_dir: Path | None = None
    drop: tuple[str, ...] = ()
    test_size: float | None = None
    seed: int = 0
    scale: str | None = None
    C: float | None = None
    max_iter: int = 1000
    tol: float | None = None
    output: Path | None = None
    force: bool = False


def train(settings: TrainSettings, console: Console) -> Path:
    """Fit a softmax layer, write its folder and say how well it does.

    Parameters
    ----------
    settings : TrainSettings
    console : rich.console.Console
        Where progress and results are printed.

    Returns
    -------
    Path
        The new folder.

    Raises
    ------
    InputError
        For anything about the data or the output folder that cannot be used.
    """
    dataset = data.load(settings.source, settings.target, settings.data_dir, settings.drop)
    folder = settings.output or Path(f"crossent-{dataset.name}")
    if not settings.output and not settings.force:
        folder = unused(folder)
    require_new_folder(folder, settings.force, FILES)
    train_rows, test_rows = data.split(dataset, settings.test_size, settings.seed)
    scale = settings.scale or dataset.default_scale
    train_features, train_labels = dataset.features[train_rows], dataset.labels[train_rows]
    scaling = fit_scaling(scale, train_features, dataset.pixel_max)
    C = dataset.default_c if settings.C is None else settings.C
    tol = dataset.default_tol if settings.tol is None else settings.tol
    console.print(
        f"{dataset.name}: {len(train_rows)} training rows, {len(test_rows)} test rows, "
        f"{len(dataset.feature_names)} features, {len(dataset.classes)} classes\n"
        f"scale {scale}, C {C:g}, seed {settings.seed}"
    )
    scaled = scaling(train_features).astype(dataset.dtype, copy=False)
    classifier, fit = _fit(scaled, train_labels, C, tol, settings.max_iter, console)
    model = model_file.SavedModel(
        coef=classifier.coef_.astype(np.float64),
        intercept=classifier.intercept_.astype(np.float64),
        scaling=scaling,
        classes=dataset.classes,
        feature_names=dataset.feature_names,
        image_shape=dataset.image_shape,
    )
    on_train = evaluate(model, train_features, train_labels)
    on_test = evaluate(model, dataset.features[test_rows], dataset.labels[test_rows])
    reliability = calibration(on_test.probabilities, on_test.labels)
    chosen = _split_and_scale(dataset, settings, scale)
    metrics = training_metrics(dataset, chosen, fit, on_train, on_test, reliability)
    report = ReportData(dataset, model, metrics, test_rows, on_test, reliability)
    _write(folder, settings.force, report)
    console.print(_summary(metrics, folder))
    return folder


def _fit(
    features: Any, labels: Any, C: float, tol: float, max_iter: int, console: Console
) -> "tuple[SoftmaxClassifier, dict[str, Any]]":
    """Return the fitted classifier and what metrics.json says about the fit."""
    from sklearn.exceptions import ConvergenceWarning

    from crossent.sklearn import SoftmaxClassifier

    began = time.perf_counter()
    with console.status("fitting") as status, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        classifier = SoftmaxClassifier(
            C=C,
            tol=tol,
            max_iter=max_iter,
            callback=_progress(console, status.update),
        )
        try:
            classifier.fit(features, labels)
        except ValueError as error:
            raise InputError(f"the fit failed: {first_line(error)}") from error
    last = classifier.history_[-1]
    return classifier, {
        "C": C if math.isfinite(C) else None,  # JSON has no infinity
        "tol": tol,
        "max_iter": max_iter,
        "iterations": last.iteration,
        "converged": not any(issubclass(each.category, ConvergenceWarning) for each in caught),
        "objective": last.objective,
        "gradient_norm": last.gradient_norm,
        "seconds": time.perf_counter() - began,
        "history": [record._asdict() for record in classifier.history_],
    }


def _progress(console: Console, update: Callable[[str], None]) -> "Callable[[FitProgress], None]":
    """Return a callback that rewrites one line on a terminal, and elsewhere prints few lines."""

    def show(record: "FitProgress") -> None:
        line = (
            f"iteration {record.iteration:>4}  loss with penalty {record.objective:.6f}  "
            f"gradient {record.gradient_norm:.1e}  {record.seconds:.1f} s"
        )
        if console.is_terminal:
            update(line)
        elif record.iteration & (record.iteration - 1) == 0:  # 0 and the powers of two
            console.print(line)

    return show


def _split_and_scale(dataset: data.Dataset, settings: TrainSettings, scale: str) -> dict[str, Any]:
    if dataset.own_test_rows:
        split: dict[str, Any] = {"split": "the data set's own", "test_size": None, "seed": None}
    else:
        test_size = settings.test_size or data.DEFAULT_TEST_SIZE
        split = {
            "split": "stratified at random",
            "test_size": test_size,
            "seed": settings.seed,
        }
    return split | {"scale": scale}


def _write(folder: Path, force: bool, report: ReportData) -> None:
    with new_folder(folder, force, FILES) as staging:
        model_file.save(report.model, staging / model_file.FILE_NAME)
        text = json.dumps(report.metrics, indent=2, ensure_ascii=False, allow_nan=False)
        (staging / METRICS_NAME).write_text(text + "\n", encoding="utf-8")
        write_report(report, staging / REPORT_NAME)


def _summary(metrics: dict[str, Any], folder: Path) -> str:
    fit, test = metrics["fit"], metrics["test"]
    ended = "converged" if fit["converged"] else f"not converged ({not_converged_advice(fit)})"
    return (
        f"{ended} after {fit['iterations']} iterations, {fit['seconds']:.1f} s\n"
        f"test accuracy {test['accuracy']:.2%}, loss {test['loss']:.4f}, "
        f"calibration error (ECE) {test['expected_calibration_error']:.2%}\n"
        f"written to {folder}: {', '.join(sorted(FILES))}"
    )
