"""`metrics.json`: every number about a training run."""

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np

from crossent.cli.data import Dataset
from crossent.cli.labels import class_name
from crossent.cli.metrics import Calibration, Evaluation, confusions, wilson_interval

PACKAGES = ("crossent", "numpy", "scipy", "scikit-learn", "polars")


def training_metrics(
    dataset: Dataset,
    chosen: dict[str, Any],
    fit: dict[str, Any],
    on_train: Evaluation,
    on_test: Evaluation,
    calibration: Calibration,
) -> dict[str, Any]:
    """Return the content of metrics.json, ready for JSON.

    Parameters
    ----------
    dataset : Dataset
    chosen : dict
        How the data were split and scaled.
    fit : dict
        The classifier's parameters and how its fit went.
    on_train, on_test : Evaluation
    calibration : Calibration
        Of `on_test`.
    """
    names = [class_name(label) for label in dataset.classes]
    return {
        "data": {
            "name": dataset.name,
            "rows": len(dataset.labels),
            "features": len(dataset.feature_names),
            "classes": names,
            "image_shape": dataset.image_shape,
        }
        | chosen,
        "fit": fit,
        "train": {
            "rows": len(on_train.labels),
            "accuracy": on_train.accuracy,
            "loss": on_train.loss,
        },
        "test": _on_test(names, on_test, calibration),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in PACKAGES},
    }


def not_converged_advice(fit: dict[str, Any]) -> str:
    """Return what to do about a fit that ended above its tolerance."""
    if fit["iterations"] >= fit["max_iter"]:
        return "raise --max-iter"
    return f"no step lowers the loss further, a --tol of {fit['gradient_norm']:.0e} is in reach"


def _on_test(names: list[str], on_test: Evaluation, calibration: Calibration) -> dict[str, Any]:
    rows, predicted, correct = on_test.class_counts()
    total = len(on_test.labels)
    return {
        "rows": total,
        "accuracy": on_test.accuracy,
        "accuracy_interval_95": wilson_interval(on_test.correct, total),
        "baseline_accuracy": int(rows.max()) / total,
        "loss": on_test.loss,
        "expected_calibration_error": calibration.error,
        "calibration_bins": _bins(calibration),
        "classes": [
            {"name": name, "rows": held, "predicted": answered, "correct": hit}
            for name, held, answered, hit in zip(
                names, rows.tolist(), predicted.tolist(), correct.tolist(), strict=True
            )
        ],
        "confusions": [
            {"class": names[true], "predicted": names[answer], "rows": count}
            for true, answer, count in confusions(on_test.predicted, on_test.labels, len(names))
        ],
    }


def _bins(calibration: Calibration) -> list[dict[str, float]]:
    columns = {
        "from": calibration.edges[:-1],
        "to": calibration.edges[1:],
        "rows": calibration.rows,
        "correct": calibration.correct,
        "mean_confidence": calibration.confidence,
    }
    values: list[tuple[float, ...]] = list(
        zip(*(np.asarray(column).tolist() for column in columns.values()), strict=True)
    )
    return [dict(zip(columns, row, strict=True)) for row in values]
