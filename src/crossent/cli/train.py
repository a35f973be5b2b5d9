"""`crossent train`: from a data set to a folder with the model, its metrics and a report."""

import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from crossent.cli import data, model_file
from crossent.cli.errors import InputError
from crossent.cli.fit import Fit, fit_or_keep
from crossent.cli.metrics import calibration, evaluate
from crossent.cli.output import new_folder, require_new_folder, unused
from crossent.cli.penalty_path import DEFAULT_CS, DEFAULT_FOLDS, PenaltyPath, select_penalty
from crossent.cli.report import ReportData, write_report
from crossent.cli.scaling import Scaling, fit_scaling
from crossent.cli.training_metrics import how_it_ended, training_metrics

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
    select_penalty : bool
        Whether C is chosen by cross-validation on the training rows; `C` is then None.
    Cs : tuple of float, optional
        The Cs to choose from, ascending; if not given `DEFAULT_CS`, whose end may be left out.
    folds : int, optional
        5 if not given.
    one_se : bool
        Whether to choose the strongest penalty within one standard error of the best.
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
    select_penalty: bool = False
    Cs: tuple[float, ...] | None = None
    folds: int | None = None
    one_se: bool = False
    output: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class Trained:
    """What `train` has made.

    Parameters
    ----------
    folder : Path
        The new folder.
    interrupted : bool
        Whether Ctrl-C ended the fitting, so that it holds the best model until then.
    """

    folder: Path
    interrupted: bool


def train(settings: TrainSettings, console: Console) -> Trained:
    """Fit a softmax layer, write its folder and say how well it does.

    Ctrl-C while models are fitted ends the fitting, and the best model so far is written.

    Parameters
    ----------
    settings : TrainSettings
    console : rich.console.Console
        Where progress and results are printed.

    Returns
    -------
    Trained

    Raises
    ------
    InputError
        For anything about the options, the data or the output folder that cannot be used.
    KeyboardInterrupt
        If Ctrl-C came when there was no model to keep yet, or a second time. Nothing is written.
    """
    _require_consistent(settings)
    dataset = data.load(settings.source, settings.target, settings.data_dir, settings.drop)
    folder = settings.output or Path(f"crossent-{dataset.name}")
    if not settings.output and not settings.force:
        folder = unused(folder)
    require_new_folder(folder, settings.force, FILES)
    train_rows, test_rows = data.split(dataset, settings.test_size, settings.seed)
    scale = settings.scale or dataset.default_scale
    console.print(
        f"{dataset.name}: {len(train_rows)} training rows, {len(test_rows)} test rows, "
        f"{len(dataset.feature_names)} features, {len(dataset.classes)} classes"
    )
    train_features, train_labels = dataset.features[train_rows], dataset.labels[train_rows]
    scaling = fit_scaling(scale, train_features, dataset.pixel_max)
    tol = dataset.default_tol if settings.tol is None else settings.tol
    fit, path = _fit(dataset, train_rows, settings, scale, scaling, tol, console)
    model = fit.model(dataset, scaling)
    on_train = evaluate(model, train_features, train_labels)
    on_test = evaluate(model, dataset.features[test_rows], dataset.labels[test_rows])
    reliability = calibration(on_test.probabilities, on_test.labels)
    fit_metrics = {
        "C": fit.C if math.isfinite(fit.C) else None,  # JSON has no infinity
        "tol": tol,
        "max_iter": settings.max_iter,
        "iterations": fit.iterations,
        "converged": fit.converged,
        "interrupted": fit.interrupted,
        "objective": fit.history[-1]["objective"],
        "gradient_norm": fit.history[-1]["gradient_norm"],
        "seconds": fit.seconds,
        "history": fit.history,
    }
    interrupted = fit.interrupted or (path is not None and path.interrupted)
    run = {
        "command": command_line(settings),
        "interrupted": interrupted,
        "penalty_selection": path.metrics() if path else None,
        "fit": fit_metrics,
    }
    chosen = _split_and_scale(dataset, settings, scale)
    metrics = training_metrics(dataset, chosen, run, on_train, on_test, reliability)
    report = ReportData(dataset, model, metrics, test_rows, on_test, reliability)
    _write(folder, settings.force, report)
    console.print(_summary(metrics, folder))
    return Trained(folder, interrupted)


def _require_consistent(settings: TrainSettings) -> None:
    """Raise an `InputError` for options of which one would be ignored."""
    if settings.select_penalty:
        if settings.C is not None:
            raise InputError(
                "--C gives the penalty that --select-penalty is to choose; leave one of them out"
            )
        return
    needless = {
        "--Cs": settings.Cs is not None,
        "--folds": settings.folds is not None,
        "--one-se": settings.one_se,
    }
    for option, given in needless.items():
        if given:
            raise InputError(
                f"{option} is about the choice of C; add --select-penalty, or leave it out"
            )


def _fit(
    dataset: data.Dataset,
    rows: NDArray[np.int64],
    settings: TrainSettings,
    scale: str,
    scaling: Scaling,
    tol: float,
    console: Console,
) -> tuple[Fit, PenaltyPath | None]:
    """Return the fit to the training rows, and the path it was chosen from if there was one."""
    if settings.select_penalty:
        path = PenaltyPath(
            grid=settings.Cs or DEFAULT_CS,
            folds=settings.folds or DEFAULT_FOLDS,
            seed=settings.seed,
            one_se=settings.one_se,
        )
        console.print(
            f"scale {scale}, C one of {len(path.grid)} from {path.grid[0]:g} to "
            f"{path.grid[-1]:g} by {path.folds}-fold cross-validation, seed {settings.seed}"
        )
        whole = settings.Cs is not None
        select_penalty(
            dataset, rows, scale, path, tol, settings.max_iter, console, whole_grid=whole
        )
        return path.chosen.fit, path
    C = dataset.default_c if settings.C is None else settings.C
    console.print(f"scale {scale}, C {C:g}, seed {settings.seed}")
    scaled = scaling(dataset.features[rows])
    scaled = scaled.astype(dataset.dtype, copy=False)
    return fit_or_keep(scaled, dataset.labels[rows], C, tol, settings.max_iter, console), None


def command_line(settings: TrainSettings) -> str:
    """Return the command that asks for these settings.

    Examples
    --------
    >>> command_line(TrainSettings("my flowers.csv", target="kind", C=0.1))
    "crossent train 'my flowers.csv' --target kind --C 0.1"
    """
    words = ["crossent", "train", settings.source]
    options: list[tuple[str, object]] = [
        ("--target", settings.target),
        *(("--drop", name) for name in settings.drop),
        ("--data-dir", settings.data_dir),
        ("--test-size", settings.test_size),
        ("--seed", settings.seed or None),
        ("--scale", settings.scale),
        ("--C", settings.C),
        ("--max-iter", None if settings.max_iter == TrainSettings.max_iter else settings.max_iter),
        ("--tol", settings.tol),
    ]
    if settings.select_penalty:
        words.append("--select-penalty")
        cs = settings.Cs and ",".join(f"{C:g}" for C in settings.Cs)
        options += [("--Cs", cs), ("--folds", settings.folds)]
    if settings.one_se:
        words.append("--one-se")
    for option, value in options:
        if value is not None:
            words += [option, f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)


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
    test = metrics["test"]
    return (
        f"{how_it_ended(metrics)}\n"
        f"test accuracy {test['accuracy']:.2%}, loss {test['loss']:.4f}, "
        f"calibration error (ECE) {test['expected_calibration_error']:.2%}\n"
        f"written to {folder}: {', '.join(sorted(FILES))}"
    )
