"""The report's pictures as data URIs: charts in a light and a dark version, and small images."""

import base64
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter
from numpy.typing import NDArray

from crossent.cli.metrics import Calibration, wilson_interval


@dataclass(frozen=True)
class Theme:
    """Colours of a chart, the same as in report.css."""

    text: str
    muted: str
    grid: str
    line: str
    second: str
    paper: str


LIGHT = Theme("#1b2430", "#5a6675", "#dde2e8", "#1f63b4", "#c2571a", "#ffffff")
DARK = Theme("#e6eaf0", "#9aa7b6", "#323c49", "#79b4f5", "#f0a06a", "#1a212a")


def training_chart(history: list[dict[str, float]], tol: float) -> str:
    """Return the objective and the gradient norm over the iterations, down to the tolerance."""
    iterations = [record["iteration"] for record in history]

    def draw(figure: Figure, theme: Theme) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        marker = "o" if len(history) < 40 else ""
        for axes, key, colour, title in (
            (upper, "objective", theme.line, "loss with penalty (nats)"),
            (lower, "gradient_norm", theme.second, "largest gradient entry"),
        ):
            values = [record[key] for record in history]
            axes.plot(iterations, values, color=colour, marker=marker, markersize=4)
            axes.set_title(title, loc="left")
        upper.ticklabel_format(axis="y", useOffset=False)
        if min(record["gradient_norm"] for record in history) > 0:
            lower.set_yscale("log")
            lower.yaxis.set_minor_locator(NullLocator())
        if tol > 0:
            lower.axhline(tol, color=theme.muted, linestyle="--", linewidth=1)
            lower.annotate(
                "tolerance", (0, tol), (2, 3), textcoords="offset points", color=theme.muted, size=9
            )
        lower.set_xlabel("iteration")
        lower.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))

    return _chart(draw, (5, 4), "Loss and gradient norm by iteration; the numbers are below.")


def penalty_chart(path: list[dict[str, Any]], best: float, chosen: float) -> str:
    """Return held-out and training loss over C, with the best and the chosen C."""
    cs = [point["C"] for point in path]
    losses = np.array([point["loss"] for point in path])
    errors = np.array([point["standard_error"] for point in path])
    at_best, at_chosen = cs.index(best), cs.index(chosen)

    def draw(figure: Figure, theme: Theme) -> None:
        axes: Axes = figure.subplots()
        low, high = losses[at_best] - errors[at_best], losses[at_best] + errors[at_best]
        axes.axhspan(low, high, color=theme.line, alpha=0.14, linewidth=0)
        axes.axvline(chosen, color=theme.muted, linestyle="--", linewidth=1)
        axes.plot(
            cs,
            [point["train_loss"] for point in path],
            color=theme.second,
            linestyle=":",
            label="training rows",
        )
        axes.errorbar(
            cs,
            losses,
            np.minimum(errors, 0.95 * losses),  # a logarithmic axis has no 0
            fmt="-o",
            color=theme.line,
            elinewidth=1.2,
            capsize=2.5,
            markersize=4,
            label="held-out rows, ± standard error",
        )
        axes.plot(
            [chosen], [losses[at_chosen]], "o", markersize=9, color=theme.line, label="chosen C"
        )
        axes.set_xscale("log")
        axes.set_yscale("log")
        bottom, top = axes.get_ylim()  # far overfitted training rows would flatten the rest
        axes.set_ylim(max(bottom, (losses - errors).min() / 3), top)
        _plain_log_ticks(axes.xaxis, (1.0,))
        _plain_log_ticks(axes.yaxis, (1.0, 2.0, 5.0))
        axes.set_title("mean cross-entropy (nats)", loc="left")
        axes.set_xlabel("← stronger penalty      C      weaker penalty →")
        axes.legend(frameon=False, fontsize=10, labelcolor=theme.text)

    return _chart(
        draw,
        (5.6, 4),
        f"Held-out loss by C, lowest at {best:g}, with the standard error over the folds, and "
        "the loss on the training rows; the numbers are in the table below.",
        wide=True,
    )


def _plain_log_ticks(axis: Axis, digits: tuple[float, ...]) -> None:
    """Label these multiples of the powers of ten, as numbers and not as powers."""
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def reliability_chart(calibration: Calibration) -> str:
    """Return the share of correct answers by confidence, over the number of rows."""
    middles = (calibration.edges[1:] + calibration.edges[:-1]) / 2
    width = 0.92 / len(middles)
    held = calibration.rows > 0

    def draw(figure: Figure, theme: Theme) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.plot([0, 1], [0, 1], color=theme.muted, linestyle="--", linewidth=1)
        rows, correct = calibration.rows[held], calibration.correct[held]
        share, confidence = correct / rows, calibration.confidence[held]
        limits = np.array([wilson_interval(*pair) for pair in zip(correct, rows, strict=True)])
        spread = np.abs(limits - share[:, None]).T
        upper.errorbar(
            confidence, share, spread, fmt="o", color=theme.line, elinewidth=1.2, markersize=5
        )
        upper.set_title("correct answers, with 95 % intervals", loc="left")
        upper.set_ylim(-0.03, 1.03)
        upper.yaxis.set_major_formatter(PercentFormatter(1))
        lower.bar(middles, calibration.rows, width, color=theme.line)
        lower.set_title("test rows", loc="left")
        lower.set_xlabel("probability of the predicted class")
        lower.set_xlim(-0.03, 1.03)
        lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        lower.xaxis.set_major_formatter(PercentFormatter(1))

    return _chart(
        draw,
        (5, 4.6),
        "Share of correct answers by the probability of the predicted class, near the diagonal "
        "where probabilities can be trusted; the numbers are in the table below.",
    )


def confusion_chart(counts: NDArray[np.int64]) -> str:
    """Return a confusion matrix `(V, V)` of many classes as an image, true classes downwards."""

    def draw(figure: Figure, theme: Theme) -> None:
        axes: Axes = figure.subplots()
        colours = LinearSegmentedColormap.from_list(
            "rows", [theme.grid, theme.line, theme.text]
        ).with_extremes(bad=theme.paper)
        positive = np.ma.masked_equal(counts, 0)
        norm = LogNorm(vmin=1, vmax=max(int(counts.max()), 2))
        shown = axes.imshow(positive, cmap=colours, norm=norm, interpolation="nearest")
        axes.grid(False)
        axes.set_title("rows by true and predicted class", loc="left")
        axes.set_xlabel("predicted class, in the order of the model")
        axes.set_ylabel("true class")
        figure.colorbar(shown, ax=axes, shrink=0.8, format="%d").outline.set_visible(False)

    return _chart(
        draw,
        (5, 4.4),
        "Confusion matrix as an image: a strong diagonal means correct answers; the commonest "
        "confusions are in the table below.",
    )


def picture(row: NDArray[np.generic], shape: tuple[int, ...], white: float, alt: str) -> str:
    """Return one example `(D,)` as an image element; 0 is black and `white` is white."""
    levels = np.clip(row.reshape(shape).astype(float) / (white or 1.0), 0, 1)
    if levels.ndim == 3 and levels.shape[2] == 1:
        levels = levels[:, :, 0]
    file = io.BytesIO()
    imsave(file, levels, cmap="gray", vmin=0, vmax=1, format="png")
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return f'<img class="example" src="{source}" alt="{escape(alt)}">'


def _chart(
    draw: Callable[[Figure, Theme], None],
    inches: tuple[float, float],
    alt: str,
    wide: bool = False,
) -> str:
    light, dark = (_svg(draw, inches, theme) for theme in (LIGHT, DARK))
    width = "chart wide" if wide else "chart"
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img class="{width}" src="{light}" alt="{escape(alt)}" '
        f'width="{inches[0] * 100:.0f}" height="{inches[1] * 100:.0f}"></picture>'
    )


def _svg(draw: Callable[[Figure, Theme], None], inches: tuple[float, float], theme: Theme) -> str:
    with _styled(theme):
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure, theme)
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"


@contextmanager
def _styled(theme: Theme) -> Iterator[None]:
    settings: Any = {
        "font.size": 11,
        "axes.titlesize": 11,
        "axes.titlecolor": theme.muted,
        "axes.labelcolor": theme.muted,
        "axes.edgecolor": theme.grid,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.7,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "text.color": theme.text,
        "lines.linewidth": 1.8,
        "svg.fonttype": "path",
        "svg.hashsalt": "crossent",
    }
    with mpl.rc_context(settings):
        yield
