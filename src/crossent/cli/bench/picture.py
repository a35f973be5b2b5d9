"""The picture of a run: each contender's time over a common base, one line a shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from crossent.cli.bench.benchmark import Words
from crossent.cli.bench.peers import Output
from crossent.cli.bench.results import Group, Report, Timed
from crossent.cli.bench.shapes import DTYPES
from crossent.cli.bench.show import label

_TEXT, _MUTED, _GRID, _OURS = "#1b2430", "#5a6675", "#dde2e8", "#1f63b4"
# marker, colour and size by (name, output)
_LOOKS: dict[tuple[str, str], tuple[str, str, float]] = {
    ("crossent", "kept"): ("D", _OURS, 12),
    ("crossent", "fresh"): ("o", _OURS, 8),
    ("crossent", "none"): ("o", _OURS, 8),
    ("crossent-compile", ""): ("h", "#6fa3dd", 9),
    ("crossent-torch", ""): ("D", "#0d3f80", 8),
    ("crossent-lbfgs", ""): ("D", "#6fa3dd", 8),
    ("torch", ""): ("s", "#c2571a", 7),
    ("torch-linear", ""): ("<", "#a3628a", 8),
    ("torch-chunked", ""): ("v", "#2a8f6d", 8),
    ("torch-compile", ""): ("P", "#e09a2b", 8),
    ("jax", ""): ("^", "#6f4ba0", 8),
    ("sklearn", ""): ("v", "#2a8f6d", 8),
    ("sklearn-lbfgs", ""): ("s", "#c2571a", 8),
    ("sklearn-newton-cg", ""): ("^", "#6f4ba0", 8),
    ("sklearn-newton-cholesky", ""): ("v", "#2a8f6d", 8),
    ("numpy", ""): ("X", "#7a8594", 8),
    ("scipy", ""): ("p", "#a3628a", 8),
}
_STYLE: Any = {
    "font.size": 11,
    "text.color": _TEXT,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "xtick.color": _MUTED,
    "ytick.color": _TEXT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


def draw(report: Report, path: Path) -> None:
    """Write the picture of the main task in float32 (of everything where that was not run)."""
    words = report.words
    dtypes = DTYPES if words.dtype is None else (words.dtype,)
    main = [g for g in report.groups if g.task == words.task and g.dtype in dtypes]
    groups = main or list(report.groups)
    with rc_context(_STYLE):
        figure = Figure(figsize=(10, 2.3 + 0.58 * len(groups)), dpi=150, layout="constrained")
        axes = figure.subplots()
        for place, group in enumerate(groups):
            _line(axes, place, group, words)
        _frame(axes, groups, words)
        _legend(figure, axes, _title(report, bool(main)))
        figure.supxlabel(_caption(report), x=0.01, ha="left", fontsize=8.5, color=_MUTED)
        figure.savefig(path, facecolor="white", metadata={"Software": None})


def _line(axes: Axes, place: int, group: Group, words: Words) -> None:
    """Draw one shape's contenders, the peers first and ours on top."""
    base = group.base(words.axis)
    if base is None:
        return
    unit = base.timing.median
    shown = [each for each in group.times if each.kind in ("crossent", "peer")]
    values = [each.timing.median / unit for each in shown]
    axes.plot([min(values), max(values)], [place, place], color=_GRID, linewidth=2.5, zorder=1)
    for each in sorted(shown, key=lambda each: each.kind == "crossent"):
        if each.kind == "peer" and each.output == "kept":
            continue  # beside its own fresh output it would only crowd the line
        marker, colour, size = _look(each)
        timing = each.timing
        axes.plot(
            [timing.lower / unit, timing.upper / unit], [place] * 2, color=colour, linewidth=1.5
        )
        ours = each.kind == "crossent"
        axes.plot(
            [timing.median / unit],
            [place],
            linestyle="",
            marker=marker,
            markersize=size,
            markerfacecolor="none" if ours and each.output == "kept" else colour,
            markeredgecolor=colour if ours else "white",
            markeredgewidth=1.6 if ours and each.output == "kept" else 0.8,
            label=_legend_label(each, group),
            zorder=4 if ours else 3,
        )
    for each in group.beyond():
        _arrow(axes, place, each, unit)
    marked = group.base(words.mark[0]) if words.mark else None
    if marked is not None and words.mark:
        _tick(axes, place, marked.timing.median / unit, words.mark[1])
    axes.text(
        *(1.01, place, _verdict(group, words.leader)),
        transform=axes.get_yaxis_transform(),
        va="center",
        fontsize=10,
        color=_OURS,
    )


def _verdict(group: Group, leader: str) -> str:
    """Return how ours with a new array compares with the fastest peer."""
    output: Output = "none" if group.task in ("loss", "stats") else "fresh"
    ratio = group.ratio(output, "best peer", leader) or group.ratio(output, "best peer")
    if ratio is None:
        return ""
    faster, much = ratio.value < 1, max(ratio.value, 1 / ratio.value)
    if much < 1.05:
        return f"as fast as\n{ratio.which}"
    return f"{much:.1f}× {'faster' if faster else 'slower'}\nthan {ratio.which}"


def _tick(axes: Axes, place: int, value: float, called: str) -> None:
    axes.plot(
        [value],
        [place],
        linestyle="",
        marker="|",
        markersize=17,
        markeredgewidth=1.5,
        color=_MUTED,
        label=called,
        zorder=2,
    )


def _arrow(axes: Axes, place: int, timed: Timed, unit: float) -> None:
    """Draw one who took longer than was allowed, hollow, with an arrow to the right."""
    marker, colour, size = _look(timed)
    at = timed.timing.median / unit
    axes.plot(
        [at],
        [place],
        linestyle="",
        marker=marker,
        markersize=size,
        markerfacecolor="white",
        markeredgecolor=colour,
        label=label(timed),
        zorder=3,
    )
    axes.annotate(
        "→", (at, place), (size / 2, 0), textcoords="offset points", va="center", color=colour
    )


def _look(timed: Timed) -> tuple[str, str, float]:
    return _LOOKS.get((timed.name, timed.output)) or _LOOKS[timed.name, ""]


def _legend_label(timed: Timed, group: Group) -> str:
    if (timed.kind, timed.output) == ("crossent", "fresh") and group.time(timed.name, "kept"):
        return f"{timed.title}, new array"
    return label(timed)


def _frame(axes: Axes, groups: list[Group], words: Words) -> None:
    axes.axvline(1, color=_MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    steps = (1, 2, 5) if high / low < 3000 else (1,)
    ticks = [m * 10.0**e for e in range(-4, 7) for m in steps if low <= m * 10.0**e <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.set_xlim(low, high)
    axes.grid(axis="x", color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    plain = all((group.task, group.dtype) == (words.task, words.dtype) for group in groups)
    told = "" if plain else " {0.dtype}" if words.dtype is None else " {0.dtype} {0.task}"
    axes.set_yticks(
        range(len(groups)),
        [f"{group.use}\n{group.sizes}{told.format(group)}" for group in groups],
        fontsize=10,
    )
    axes.set_ylim(max(len(groups), 1) - 0.5, -0.5)
    axes.set_xlabel(f"time over {words.axis_text} (log scale)")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _legend(figure: Figure, axes: Axes, title: str) -> None:
    handles, labels = axes.get_legend_handles_labels()
    first = dict(zip(reversed(labels), reversed(handles), strict=True))
    order = sorted(first, key=lambda text: (not text.startswith("crossent"), labels.index(text)))
    figure.legend(
        [first[text] for text in order],
        order,
        loc="outside upper left",
        ncols=(len(order) + 1) // 2 if len(order) > 5 else len(order),
        frameon=False,
        fontsize=10,
        title=title,
        title_fontsize=14,
        alignment="left",
    )


def _title(report: Report, main: bool) -> str:
    words = report.words
    title = words.title if words.dtype is None else f"{words.title}, {words.dtype}"
    what = title if main else "crossent and its peers"
    return f"{what}, {report.threads} thread{'s' if report.threads > 1 else ''}"


def _caption(report: Report) -> str:
    words = report.words
    found = ", ".join(
        f"{name} {report.versions[name]}" for name in words.packages if name in report.versions
    )
    quick = " A quick run: these figures mean little." if report.quick else ""
    return (
        f"{report.machine['cpu']}, {report.machine['isa']}; {found}; {report.date[:10]}.\n"
        f"Medians with quartiles. {words.caption}{quick}"
    )
