"""The report's section on the choice of C: the path as a chart and as a table."""

from html import escape
from typing import Any

from crossent.cli.penalty_path import edge_advice
from crossent.cli.report_figures import penalty_chart
from crossent.cli.report_html import percent, scrollable, table


def penalty_section(selection: dict[str, Any] | None) -> str:
    """Return the section about "penalty_selection" of metrics.json, nothing where C was given."""
    if selection is None:
        return ""
    return (
        "<section><h2>Choice of the penalty</h2>"
        f"{penalty_chart(selection['path'], selection['best_C'], selection['chosen_C'])}"
        f"<p>{_choice(selection)}</p>{_remarks(selection)}"
        f"<details><summary>The path as a table</summary>{_table(selection)}</details></section>"
    )


def _choice(selection: dict[str, Any]) -> str:
    points = {point["C"]: point for point in selection["path"]}
    best, chosen = points[selection["best_C"]], points[selection["chosen_C"]]
    text = (
        f"<b>C = {chosen['C']:g}</b> was chosen, with a mean loss of {chosen['loss']:.4f} "
        f"± {chosen['standard_error']:.4f} on held-out rows: "
    )
    if selection["rule"] == "lowest loss":
        text += "the lowest"
    elif chosen is best:
        text += "the lowest, and no stronger penalty is within one standard error of it"
    else:
        text += (
            "the strongest penalty within one standard error of the lowest, "
            f"{best['loss']:.4f} at C = {best['C']:g}"
        )
    return (
        f"{text}. Each of {selection['folds']} parts of the training rows was held out in turn, "
        "scaling fitted on the rest; the test rows had no part in it. The band is one standard "
        "error about the lowest loss."
    )


def _remarks(selection: dict[str, Any]) -> str:
    remarks = []
    left = selection["not_tried"]
    if left:
        why = {
            "rise": "the held-out loss had risen three times in a row",
            "interrupt": "Ctrl-C came before",
        }[selection["ended_by"]]
        which = f"{left[0]:g}" if len(left) == 1 else f"from {left[0]:g} to {left[-1]:g}"
        remarks.append(f"C {which} was not tried: {why}.")
    advice = edge_advice(selection["best_on_edge"])
    if advice and selection["ended_by"] != "interrupt":
        remarks.append(f"{advice[0].upper()}{advice[1:]}.")
    loose = sum(_open_fits(selection, point) > 0 for point in selection["path"])
    if loose:
        remarks.append(
            f"At {loose} of the Cs a fit did not converge (see the table): raise --max-iter."
        )
    return "".join(f'<p class="muted">{escape(remark)}</p>' for remark in remarks)


def _table(selection: dict[str, Any]) -> str:
    rows = [
        [
            f"{point['C']:g}" + (" ✓" if point["C"] == selection["chosen_C"] else ""),
            f"{point['loss']:.4f}",
            f"{point['standard_error']:.4f}",
            percent(point["accuracy"]),
            f"{point['train_loss']:.4f}",
            f"{sum(point['fold_iterations']) + point['iterations']:,}",
            str(_open_fits(selection, point) or "–"),
        ]
        for point in selection["path"]
    ]
    return scrollable(
        "Choice of the penalty",
        table(
            "✓ is the chosen C; iterations are of all fits at a C",
            [
                "C",
                "Held-out loss",
                "Standard error",
                "Held-out accuracy",
                "Training loss",
                "Iterations",
                "Not converged",
            ],
            rows,
        ),
    )


def _open_fits(selection: dict[str, Any], point: dict[str, Any]) -> int:
    converged: int = point["folds_converged"] + point["converged"]
    return int(selection["folds"]) + 1 - converged
