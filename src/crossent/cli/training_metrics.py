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
    run: dict[str, Any],
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
    run : dict
        The command, whether it was interrupted, how C was chosen ("penalty_selection"; None where
        it was given), the classifier's parameters and how its fit went ("fit").
    on_train, on_test : Evaluation
    calibration : Calibration
        Of `on_test`.
    """
    names = [class_name(label) for label in dataset.classes]
    return run | {
        "data": {
            "name": dataset.name,
            "rows": len(dataset.labels),
            "features": len(dataset.feature_names),
            "classes": names,
            "image_shape": dataset.image_shape,
        }
        | chosen,
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
    if fit["interrupted"]:
        return "let it end"
    if fit["iterations"] >= fit["max_iter"]:
        return "raise --max-iter"
    return f"no step lowers the loss further, a --tol of {fit['gradient_norm']:.0e} is in reach"


def how_it_ended(metrics: dict[str, Any]) -> str:
    """Return one line about how the fit, and the selection before it, came to an end."""
    fit, selection = metrics["fit"], metrics["penalty_selection"]
    steps = f"{fit['iterations']} iteration{'' if fit['iterations'] == 1 else 's'}"
    if fit["interrupted"]:
        return f"interrupted after {steps}, {fit['seconds']:.1f} s: the model so far is kept"
    ended = "converged" if fit["converged"] else f"not converged ({not_converged_advice(fit)})"
    if selection is None:
        return f"{ended} after {steps}, {fit['seconds']:.1f} s"
    tried = len(selection["path"])
    whole = tried + len(selection["not_tried"])
    text = (
        f"C {selection['chosen_C']:g}, chosen from {tried} in {selection['seconds']:.1f} s, {ended}"
    )
    if selection["ended_by"] == "interrupt":
        return f"interrupted after {tried} of {whole} Cs: {text}"
    return text


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
