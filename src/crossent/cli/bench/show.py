"""How results look: blocks of lines on the console while they come, and a page of Markdown."""

from __future__ import annotations

from typing import Any

from crossent.cli.bench.benchmark import Words
from crossent.cli.bench.peers import Output
from crossent.cli.bench.results import Group, Ratio, Report, Timed
from crossent.cli.bench.timing import Timing


def heading(machine: dict[str, Any], threads: int, absent: dict[str, str]) -> str:
    """Return what is true of the whole run."""
    lines = [
        f"{machine['cpu']}, {threads} thread{'s' if threads > 1 else ''}, {machine['isa']}",
        *(f"{name}: skipped, {why}" for name, why in absent.items() if why != "not asked for"),
    ]
    return "\n".join(lines)


def block(group: Group, words: Words) -> str:
    """Return one problem's times, each over the benchmark's base, the fastest contender first."""
    base = group.base(words.base)
    heads = "".join(f"  {head:>8}" for head in group.extra_heads())
    title = f"{group.task}, {group.dtype}, {group.sizes}: {group.use} ({group.shape})"
    lines = [f"\n{title:65}{heads}".rstrip()]
    for each in sorted(group.times, key=lambda each: each.timing.median):
        timing = each.timing
        over = f"{timing.median / base.timing.median:8.2f} ×" if base else ""
        lines.append(
            f"  {label(each):32} {_time(timing):>10}  ±{100 * timing.spread:3.0f} % {over:>12}"
            + "".join(f"  {cell:>8}" for cell in group.extra(each))
        )
    lines += [f"  {name}: skipped, {why}" for name, why in group.left_out().items()]
    return "\n".join(lines)


def label(timed: Timed) -> str:
    """Return a contender's name with where its output goes, if that is not a new array.

    Examples
    --------
    >>> from crossent.cli.bench.timing import summary
    >>> label(Timed("crossent", "crossent", "crossent", "kept", summary([1.0], 1)))
    'crossent, out='
    """
    kept = timed.output == "kept" and timed.kind in ("crossent", "peer")
    return f"{timed.title}, out=" if kept else timed.title


def summary(report: Report) -> str:
    """Return the ratios of the main task as a table for the console."""
    lines = [_summary_heads(report.words), *_summary_lines(report)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join(cell.ljust(w) if k < 3 else cell.rjust(w) for k, (cell, w) in enumerate(pairs))
        for pairs in (tuple(zip(line, widths, strict=True)) for line in lines)
    ]
    return "\n".join(["\nTime of crossent over …", *(line.rstrip() for line in table)])


def markdown(report: Report) -> str:
    """Return the page that goes with the JSON: ratios, times, the machine and the method."""
    machine, versions, words = report.machine, report.versions, report.words
    caches = ", ".join(machine["caches"])
    parts = [
        f"# crossent bench {words.name}, {report.date[:10]}\n",
        f"{machine['cpu']} ({machine['architecture']}, {machine['cpus_usable']} CPUs; {caches}; "
        f"{machine['memory_gib']} GiB; huge pages: {machine['huge_pages']}), {machine['system']}. "
        f"**{report.threads} threads, {machine['isa']}.** "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + ".\n",
    ]
    if report.quick:
        parts.append("**A quick run with few rows: these figures mean little.**\n")
    parts += [
        f"![Time of each contender over {words.axis_text}]({words.name}.png)\n",
        "## crossent's time over others'\n",
        f"Below 1 crossent is faster. {words.ratios}\n",
        _table([_summary_heads(report.words), *_summary_lines(report)], 3),
        "## Times\n",
        f"Medians ± half the distance of the quartiles; {words.times}\n",
    ]
    parts += [_group(group, words) for group in report.groups]
    parts += ["## Who, and how\n", _who(report), "\n" + report.method]
    return "\n".join(parts) + "\n"


def _summary_heads(words: Words) -> tuple[str, ...]:
    heads = (words.first, "dtype", words.sizes, *(column.head for column in words.columns))
    return (*heads, "float32") if words.halves else heads


def _summary_lines(report: Report) -> list[tuple[str, ...]]:
    lines = []
    for group in report.groups:
        cells = []
        for column in report.words.columns:
            outputs: tuple[Output, ...] = (column.output, "none")
            found = (group.ratio(output, column.over, column.name) for output in outputs)
            cells.append(_ratio(next(filter(None, found), None)))
        other = [ratio for ratio in report.over_float32(group) if ratio.name == "crossent"]
        if report.words.halves:
            cells.append(_ratio(other[-1] if other else None))
        lines.append((group.label, group.dtype, group.sizes, *cells))
    return lines


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return "–"
    text = f"{ratio.value:.2f}"
    return f"{text} ({ratio.which})" if ratio.over == "best peer" else text


def _group(group: Group, words: Words) -> str:
    base = group.base(words.base)
    heads = ("", "time", "spread", f"over {words.base_text}")
    lines: list[tuple[str, ...]] = [(*heads, *group.extra_heads())]
    for each in sorted(group.times, key=lambda each: each.timing.median):
        over = f"{each.timing.median / base.timing.median:.2f}" if base else "–"
        name = f"**{label(each)}**" if each.kind == "crossent" else label(each)
        spread = f"± {100 * each.timing.spread:.0f} %"
        lines.append((name, _time(each.timing), spread, over, *group.extra(each)))
    axis = "" if group.axis == -1 else f", axis={group.axis}"
    title = f"### {group.task} of {group.sizes}, {group.dtype}{axis}: {group.use}\n\n"
    left_out = "; ".join(f"{name}: {why}" for name, why in group.skipped.items())
    note = f"\n{group.note()}\n" if group.note() else ""
    return title + _table(lines, 1) + note + (f"\nLeft out: {left_out}.\n" if left_out else "")


def _who(report: Report) -> str:
    lines: list[tuple[str, ...]] = [("peer", "what is timed", "left out")]
    for peer in report.peers:
        lines.append((peer["title"], peer["how"], peer["skipped"] or ""))
    return _table(lines, 3)


def _table(lines: list[tuple[str, ...]], left: int) -> str:
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    rule = "|" + "|".join("---" if k < left else "---:" for k in range(len(lines[0]))) + "|"
    return "\n".join([head, rule, *body]) + "\n"


def _time(timing: Timing) -> str:
    """Return seconds in a unit that suits them.

    Examples
    --------
    >>> from crossent.cli.bench.timing import summary
    >>> _time(summary([0.01234], 1)), _time(summary([3.2e-6], 1))
    ('12.3 ms', '3.20 µs')
    """
    value, unit = timing.median * 1e3, "ms"
    if value < 0.1:
        value, unit = value * 1e3, "µs"
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} {unit}"
