"""`report.html`: one self-contained page about a training run, for a phone and for a desktop."""

from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossent.cli.data import Dataset
from crossent.cli.labels import class_name
from crossent.cli.metrics import ECE_BINS, Calibration, Evaluation
from crossent.cli.model_file import SavedModel
from crossent.cli.report_confusion import confusion_section
from crossent.cli.report_figures import picture, reliability_chart, training_chart
from crossent.cli.report_html import percent, scrollable, table
from crossent.cli.report_penalty import penalty_section
from crossent.cli.training_metrics import not_converged_advice

EXAMPLES = 12
CONTRIBUTIONS = 4
ITERATION_ROWS = 40


@dataclass(frozen=True)
class ReportData:
    """What the report shows.

    Parameters
    ----------
    dataset : Dataset
    model : SavedModel
    metrics : dict
        The content of metrics.json.
    test_rows : ndarray of int64, shape (N,)
        Row numbers of the test rows in `dataset`.
    on_test : Evaluation
        Of those rows.
    calibration : Calibration
        Of those rows.
    """

    dataset: Dataset
    model: SavedModel
    metrics: dict[str, Any]
    test_rows: NDArray[np.int64]
    on_test: Evaluation
    calibration: Calibration

    @property
    def names(self) -> list[str]:
        """Class names as text."""
        return [class_name(label) for label in self.model.classes]


def write_report(report: ReportData, path: Path) -> None:
    """Write the page to a new file."""
    title = escape(f"{report.dataset.name} · crossent")
    style = files("crossent.cli").joinpath("report.css").read_text(encoding="utf-8")
    body = "\n".join(
        [
            _header(report),
            _numbers(report.metrics),
            _warning(report.metrics),
            penalty_section(report.metrics["penalty_selection"]),
            '<div class="grid">',
            _training(report.metrics),
            _reliability(report),
            "</div>",
            confusion_section(report.names, report.on_test),
            _mistakes(report),
            _settings(report),
        ]
    )
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _header(report: ReportData) -> str:
    metrics = report.metrics
    return (
        f"<header><h1>{escape(report.dataset.name)}</h1>"
        f'<p class="muted">A softmax layer trained on {metrics["train"]["rows"]:,} rows and tested '
        f"on {metrics['test']['rows']:,}: {metrics['data']['features']:,} features, "
        f"{len(report.names):,} classes.</p></header>"
    )


def _numbers(metrics: dict[str, Any]) -> str:
    test = metrics["test"]
    low, high = test["accuracy_interval_95"]
    uniform = np.log(len(metrics["data"]["classes"]))
    cards = [
        (
            "Test accuracy",
            percent(test["accuracy"]),
            f"95 % interval {percent(low)} to {percent(high)}",
        ),
        ("Test loss", f"{test['loss']:.4f}", f"nats; a uniform guess has {uniform:.2f}"),
        (
            "Calibration error",
            percent(test["expected_calibration_error"]),
            f"ECE, {ECE_BINS} bins",
        ),
        (
            "Baseline accuracy",
            percent(test["baseline_accuracy"]),
            "always the commonest class",
        ),
        *_fit_numbers(metrics),
    ]
    items = "".join(
        f'<div><dt>{label}</dt><dd class="value">{value}</dd><dd>{note}</dd></div>'
        for label, value, note in cards
    )
    return f'<dl class="numbers">{items}</dl>'


def _fit_numbers(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    fit, selection = metrics["fit"], metrics["penalty_selection"]
    penalty = "none" if fit["C"] is None else f"C = {fit['C']:g}"
    iterations = _counted(fit["iterations"], "iteration")
    if selection is None:
        given = "weights are free" if fit["C"] is None else "inverse strength, as given"
        return [("Penalty", penalty, given), ("Fit", f"{fit['seconds']:.1f} s", iterations)]
    fits = len(selection["path"]) * (selection["folds"] + 1)
    return [
        ("Penalty", penalty, f"chosen by {selection['folds']}-fold cross-validation"),
        ("Fit", f"{selection['seconds']:.1f} s", f"{fits} fits; this one {iterations}"),
    ]


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def _warning(metrics: dict[str, Any]) -> str:
    fit, selection = metrics["fit"], metrics["penalty_selection"]
    steps = _counted(fit["iterations"], "iteration")
    if fit["interrupted"]:
        text = (
            f"<b>Interrupted.</b> Ctrl-C ended the fit after {steps}, with a largest gradient "
            f"entry of {fit['gradient_norm']:.1e} and a tolerance of {fit['tol']:g}. This is the "
            "model at that point; the command below, left to its end, makes the final one."
        )
    elif metrics["interrupted"]:
        tried = len(selection["path"])
        whole = tried + len(selection["not_tried"])
        text = (
            f"<b>Interrupted.</b> Ctrl-C ended the choice of the penalty after {tried} of {whole} "
            "Cs. This is the model of the best of them; a weaker penalty may be better."
        )
    elif not fit["converged"]:
        text = (
            f"<b>Not converged.</b> The fit stopped after {steps} with a largest gradient entry of "
            f"{fit['gradient_norm']:.1e}, above the tolerance of {fit['tol']:g}. "
            f"What to do: {escape(not_converged_advice(fit))}."
        )
    else:
        return ""
    return f'<p class="warning">{text}</p>'


def _training(metrics: dict[str, Any]) -> str:
    fit, selection = metrics["fit"], metrics["penalty_selection"]
    cs = [] if selection is None else [point["C"] for point in selection["path"]]
    place = cs.index(fit["C"]) if cs else 0
    start = f"It started from the solution for C = {cs[place - 1]:g}. " if place else ""
    fell = (
        "The mean loss with the L2 penalty's share fell from "
        f"{fit['history'][0]['objective']:.4f} to {fit['objective']:.4f} "
        f"in {_counted(fit['iterations'], 'iteration')}. "
    )
    return (
        "<section><h2>Training</h2>"
        f"{training_chart(fit['history'], fit['tol'])}"
        f"<p>{start}{fell}Mean loss on the training rows: {metrics['train']['loss']:.4f}, "
        f"accuracy {percent(metrics['train']['accuracy'])}.</p>{_iterations(fit)}</section>"
    )


def _iterations(fit: dict[str, Any]) -> str:
    if len(fit["history"]) > ITERATION_ROWS:
        return ""
    rows = [
        [
            str(record["iteration"]),
            f"{record['objective']:.6f}",
            f"{record['gradient_norm']:.1e}",
            f"{record['seconds']:.2f}",
        ]
        for record in fit["history"]
    ]
    caption = "Loss with penalty, largest gradient entry and time at each iteration; 0 is the start"
    numbers = table(caption, ["Iteration", "Loss", "Gradient", "Seconds"], rows)
    return f"<details><summary>The iterations as a table</summary>{numbers}</details>"


def _reliability(report: ReportData) -> str:
    rows = [
        [
            f"{entry['from']:.3f} to {entry['to']:.3f}",
            f"{entry['rows']:,}",
            percent(entry["mean_confidence"]),
            percent(entry["correct"] / entry["rows"]),
        ]
        for entry in report.metrics["test"]["calibration_bins"]
        if entry["rows"]
    ]
    numbers = table(
        "Test rows by the probability of their predicted class; empty bins are left out",
        ["Probability", "Rows", "Mean probability", "Correct"],
        rows,
    )
    return (
        "<section><h2>Reliability diagram</h2>"
        f"{reliability_chart(report.calibration)}"
        f"<p>Expected calibration error (ECE): <b>{percent(report.calibration.error)}</b>. It is "
        "the mean, over the test rows, of |share correct − mean probability| in "
        f"{ECE_BINS} equally wide bins of the predicted class's probability (Guo et al., 2017)."
        f"</p><details><summary>The bins as a table</summary>{numbers}</details></section>"
    )


def _mistakes(report: ReportData) -> str:
    on_test = report.on_test
    predicted = on_test.predicted
    confidence = on_test.probabilities[np.arange(len(predicted)), predicted]
    wrong = np.flatnonzero(predicted != on_test.labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:EXAMPLES]
    title = "<h2>Most confidently wrong</h2>"
    if not len(worst):
        return f"<section>{title}<p>Every test row is classified correctly.</p></section>"
    show = _mistake_table if report.model.image_shape is None else _mistake_images
    which = (
        f"All {len(wrong)} mistakes on {len(predicted):,} test rows, the most confident first."
        if 1 < len(wrong) == len(worst)
        else f"Of {_counted(len(wrong), 'mistake')} on {len(predicted):,} test rows, the "
        f"{len(worst)} in which the wrong class has the highest probability."
    )
    return f"<section>{title}<p>{which}</p>{show(report, worst)}</section>"


def _mistake_images(report: ReportData, worst: NDArray[np.int64]) -> str:
    shape = report.model.image_shape
    assert shape is not None
    figures = []
    for place in worst:
        true, answer, probability = _verdict(report, place)
        features = report.dataset.features[report.test_rows[place]]
        white = report.dataset.pixel_max or float(features.max())
        alt = f"Row {report.test_rows[place] + 1}: {true}, taken for {answer}"
        figures.append(
            f"<figure>{picture(features, shape, white, alt)}<figcaption>"
            f"taken for <b>{escape(answer)}</b> ({probability})<br>is <b>{escape(true)}</b>, "
            f"row {report.test_rows[place] + 1:,}</figcaption></figure>"
        )
    return f'<div class="examples">{"".join(figures)}</div>'


def _mistake_table(report: ReportData, worst: NDArray[np.int64]) -> str:
    rows = []
    for place in worst:
        true, answer, probability = _verdict(report, place)
        rows.append(
            [f"{report.test_rows[place] + 1:,}", true, answer, probability, _reasons(report, place)]
        )
    return scrollable(
        "Most confidently wrong test rows",
        table(
            "Rows are counted from 1 in the data. A contribution is what a feature's value, "
            "scaled, adds to the predicted class's weighted sum over the true class's",
            ["Row", "True", "Predicted", "Probability", "Largest contributions"],
            rows,
            text_columns=(1, 2, 4),
        ),
    )


def _verdict(report: ReportData, place: int) -> tuple[str, str, str]:
    true, answer = report.on_test.labels[place], report.on_test.predicted[place]
    probability = percent(report.on_test.probabilities[place, answer])
    return report.names[true], report.names[answer], probability


def _reasons(report: ReportData, place: int) -> str:
    weights = report.model.class_weights()
    row = report.dataset.features[report.test_rows[place]]
    true, answer = report.on_test.labels[place], report.on_test.predicted[place]
    scaled = report.model.scaling(row[None])[0]
    contributions = scaled * (weights[answer] - weights[true])
    largest = np.argsort(-contributions, kind="stable")[:CONTRIBUTIONS]
    return ", ".join(
        f"{report.model.feature_names[column]} = {row[column]:.4g} ({contributions[column]:+.2f})"
        for column in largest
        if contributions[column] > 0
    )


def _settings(report: ReportData) -> str:
    metrics = report.metrics
    data, fit = metrics["data"], metrics["fit"]
    own_test_set = data["test_size"] is None
    split = data["split"] + ("" if own_test_set else f", {data['test_size']:g} for testing")
    selection = metrics["penalty_selection"]
    penalty = "no penalty" if fit["C"] is None else f"{fit['C']:g}"
    if selection is not None:
        penalty += (
            f", chosen from {len(selection['path'])} by {selection['folds']} folds; "
            f"rule: {selection['rule']}"
        )
    rows = [
        ["Split", split],
        ["Seed", "none needed" if data["seed"] is None else str(data["seed"])],
        ["Feature scaling", f"{data['scale']}, fitted on the training rows, kept in the model"],
        ["C (inverse penalty)", penalty],
        ["Tolerance on the gradient", f"{fit['tol']:g}"],
        ["Most iterations", str(fit["max_iter"])],
        ["Versions", ", ".join(f"{name} {number}" for name, number in metrics["versions"].items())],
        ["Made", metrics["created"]],
    ]
    return (
        "<section><h2>What was run</h2>"
        f"<pre>{escape(metrics['command'])}</pre>"
        + table("How this model was trained", ["Setting", "Value"], rows, text_columns=(1,))
        + "</section><footer class='muted'>Apply the model to rows with the same features: "
        "<code>crossent predict FOLDER FILE</code>, with the folder that holds this page. "
        "All numbers are in <code>metrics.json</code>.</footer>"
    )
