"""The report's confusion matrix: a table of all classes, or a summary where they are many."""

from html import escape

import numpy as np
from numpy.typing import NDArray

from crossent.cli.metrics import Evaluation, confusions
from crossent.cli.report_figures import confusion_chart
from crossent.cli.report_html import percent, scrollable, table

MAX_TABLE_CLASSES = 20
MAX_IMAGE_CLASSES = 1000
SUMMARY_ROWS = 15
SHORT_NAME = 2


def confusion_section(names: list[str], on_test: Evaluation) -> str:
    """Return the section, with each class's recall and precision."""
    classes = len(names)
    rows, predicted, correct = on_test.class_counts()
    parts = ["<section><h2>Confusion matrix</h2>"]
    if classes <= MAX_IMAGE_CLASSES:
        counts = np.zeros((classes, classes), np.int64)
        np.add.at(counts, (on_test.labels, on_test.predicted), 1)
        few = classes <= MAX_TABLE_CLASSES
        parts.append(_matrix(names, counts) if few else confusion_chart(counts))
    parts.append('<div class="grid below"><div>')
    parts.append(_commonest(names, on_test, rows))
    parts.append("</div><div>")
    parts.append(_per_class(names, rows, predicted, correct))
    parts.append("</div></div></section>")
    return "".join(parts)


def _matrix(names: list[str], counts: NDArray[np.int64]) -> str:
    totals = np.maximum(counts.sum(axis=1), 1)
    head = "".join(
        f'<th scope="col" title="{escape(name)}">'
        f"<span{'' if len(name) <= SHORT_NAME else ' class=long'}>{escape(name)}</span></th>"
        for name in names
    )
    body = "".join(
        f'<tr><th scope="row" title="{escape(name)}">{escape(name)}</th>'
        + "".join(
            _cell(int(counts[true, answer]), counts[true, answer] / totals[true], true == answer)
            for answer in range(len(names))
        )
        + "</tr>"
        for true, name in enumerate(names)
    )
    matrix = (
        '<table class="confusion"><caption>Test rows by true class (down) and predicted class '
        f"(across)</caption><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>"
    )
    return scrollable("Confusion matrix", matrix)


def _cell(count: int, share: float, hit: bool) -> str:
    if count == 0:
        return '<td class="none">0</td>'
    strength = 100 * share if hit else min(100, 20 + 400 * share)  # a mistake of 20 % stands out
    return f'<td class="{"hit" if hit else "miss"}" style="--share:{strength:.0f}">{count}</td>'


def _commonest(names: list[str], on_test: Evaluation, rows: NDArray[np.int64]) -> str:
    found = confusions(on_test.predicted, on_test.labels, len(names))
    lines = [
        [names[true], names[answer], str(count), percent(count / rows[true])]
        for true, answer, count in found[:SUMMARY_ROWS]
    ]
    if not lines:
        return "<p>No class is taken for another.</p>"
    return table(
        f"Commonest confusions ({len(lines)} of {len(found)})",
        ["True class", "Taken for", "Rows", "Of the class"],
        lines,
        text_columns=(1,),
    )


def _per_class(
    names: list[str],
    rows: NDArray[np.int64],
    predicted: NDArray[np.int64],
    correct: NDArray[np.int64],
) -> str:
    recall = correct / np.maximum(rows, 1)
    shown = range(len(names))
    caption = "Each class: share of its rows found, share of its predictions right"
    if len(names) > MAX_TABLE_CLASSES:
        held = np.flatnonzero(rows)
        worst = held[np.argsort(recall[held], kind="stable")][:SUMMARY_ROWS]
        shown, caption = worst.tolist(), f"The {len(worst)} classes found least"
    lines = [
        [
            names[label],
            f"{rows[label]:,}",
            percent(recall[label]) if rows[label] else "–",
            percent(correct[label] / predicted[label]) if predicted[label] else "–",
        ]
        for label in shown
    ]
    return table(caption, ["Class", "Rows", "Recall", "Precision"], lines)
