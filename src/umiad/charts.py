"""Charts as PNG bytes: training curves, ROC, PRO, score histogram; for colour-blind eyes too.

matplotlib is imported when a chart is drawn and used through `Figure` objects only: no window, no global
state, safe in threads. Lines differ in style as well as in colour (palette of Okabe and Ito, 2008).
Points that are not finite are left out; with nothing left to draw the picture says so.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

DPI = 120
WIDE, SQUARE = (7.0, 4.2), (5.4, 5.4)
BLUE, VERMILION, GREEN, PURPLE, ORANGE, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#555555",
)
SKY, BROWN, BLACK = "#56B4E9", "#8B4513", "#000000"
_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BROWN, BLACK)
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (9, 2)), (0, (1, 1)), (0, (7, 2, 2, 2)))
STYLES = tuple((_COLOURS[n % 8], _DASHES[(n + n // 8 * 3) % 8]) for n in range(24))
"""Colour and dashes of a line by its number: neighbours differ in both, 24 lines in at least one."""
MAX_BINS = 40
MARKED = 30
"""Up to so many points a line shows each of them (one epoch is a dot, not an invisible line)."""
FLOOR = 1e-12
"""Smallest value drawn on the logarithmic axis of the collapse monitors."""
LIKELIHOODS = {"nats_per_dim": "normal images fitted on", "holdout_nats_per_dim": "held-out normal images"}
MONITORS = {
    "var_ratio": "variance ratio F_agg / F4",
    "min_eigenvalue": "smallest eigenvalue of cov(F_agg)",
    "var_y": "variance before fusion (y)",
    "var_yf": "variance after fusion (y_f)",
}

Series = dict[str, tuple[list[float], list[float]]]
"""Label -> (x, y) of one line."""


def training_curves(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw the training log: one row per epoch -> PNG.

    `rows` have "epoch" (else the row's number counts), "nats_per_dim" and, where normal images were held out,
    "holdout_nats_per_dim": negative log-likelihoods, lower = better fit. A second, logarithmic panel shows
    the collapse monitors (`MONITORS`) that the rows hold. Other keys are ignored.
    """
    likelihoods, monitors = _series(rows, LIKELIHOODS), _series(rows, MONITORS)
    panels = [series for series in (likelihoods, monitors) if series]
    if not panels:
        return _placeholder("no likelihood has been logged", WIDE)
    figure = _figure((WIDE[0], WIDE[1] + 2.8 * (len(panels) - 1)))
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    if likelihoods:
        _draw_lines(all_axes[0], likelihoods)
        _finish(all_axes[0], "", "negative log-likelihood (nats/dimension)", legend="upper right")
    if monitors:
        _draw_lines(
            all_axes[-1], {name: (xs, [max(y, FLOOR) for y in ys]) for name, (xs, ys) in monitors.items()}
        )
        all_axes[-1].set_yscale("log")
        _finish(all_axes[-1], "", f"collapse monitors (no unit, >= {FLOOR:g})", legend="best")
    low, high = all_axes[-1].get_xlim()
    all_axes[-1].set(xlabel="epoch", xlim=(min(low, high - 1), max(high, low + 1)))
    _whole_numbers(all_axes[-1].xaxis)
    return _png(figure)


def roc_chart(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str) -> bytes:
    """Draw ROC curves, name -> (false-positive rates, true-positive rates), fractions 0..1 -> PNG."""
    points = {name: _finite(*curve) for name, curve in curves.items()}
    points = {name: curve for name, curve in points.items() if curve[0]}
    if not points:
        return _placeholder("a ROC curve needs normal and abnormal images", SQUARE)
    figure = _figure(SQUARE)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (1, 3)), label="chance")
    _draw_lines(axes, points)
    axes.set_title(title, parse_math=False)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    _finish(axes, "false-positive rate (fraction)", "true-positive rate (fraction)", legend="lower right")
    return _png(figure)


def pro_chart(fpr: Sequence[float], pro: Sequence[float], *, limit: float = 0.3) -> bytes:
    """Draw the mean overlap per lesion (PRO) against the pixel false-positive rate -> PNG.

    `fpr` (ascending) and `pro` are fractions; the shaded area up to `limit`, divided by it, is AUPRO.
    """
    xs, ys = _finite(fpr, pro)
    if not xs:
        return _placeholder("a PRO curve needs abnormal images with lesion masks", WIDE)
    figure = _figure(WIDE)
    axes = figure.subplots()
    axes.plot(xs, ys, color=BLUE)
    axes.fill_between(xs, ys, where=[x <= limit for x in xs], color=BLUE, alpha=0.15, linewidth=0)
    axes.axvline(limit, color=VERMILION, linestyle="--", label=f"limit {limit:g}")
    axes.set(xlim=(0, limit * 1.05), ylim=(0, 1.01))
    _finish(
        axes,
        "false-positive rate (fraction of normal pixels)",
        "overlap per lesion (fraction)",
        legend="best",
    )
    return _png(figure)


def heat_chart(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    *,
    low: float = 0.0,
) -> bytes:
    """Draw a table of fractions [rows][columns] as coloured cells with their numbers in percent -> PNG.

    Colours run from `low` (and below) to 1, light = high; None is a grey cell with a dash.
    """
    import numpy as np

    table = np.array([[math.nan if v is None else v for v in row] for row in values], dtype=float)
    if not table.size:
        return _placeholder("no result", WIDE)
    figure = _figure((1.6 + 0.09 * max(map(len, rows)) + 0.72 * len(columns), 1.4 + 0.36 * len(rows)))
    axes = figure.subplots()
    axes.set_facecolor("#dddddd")
    axes.imshow(np.ma.masked_invalid(table), cmap="cividis", vmin=low, vmax=1.0, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        text = "-" if math.isnan(value) else f"{100 * value:.0f}"
        dark = value < low + 0.5 * (1.0 - low)
        axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black", fontsize=9)
    axes.set_title(title, parse_math=False)
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right", parse_math=False)
    axes.set_yticks(range(len(rows)), rows, parse_math=False)
    return _png(figure)


def score_histogram(
    scores: Sequence[float], labels: Sequence[int | bool], threshold: float | None = None
) -> bytes:
    """Draw how many normal (label 0) and abnormal (label 1) images have which score -> PNG.

    Scores have no unit; higher = more anomalous. `threshold` is drawn as a line where there is one.
    """
    pairs = [(s, bool(label)) for s, label in zip(scores, labels, strict=True) if math.isfinite(s)]
    if not pairs:
        return _placeholder("no image has been scored", WIDE)
    edges = _bin_edges([score for score, _ in pairs])
    figure = _figure(WIDE)
    axes = figure.subplots()
    looks = ((False, "normal", BLUE, ""), (True, "abnormal", VERMILION, "////"))
    for wanted, name, colour, hatch in looks:
        chosen = [score for score, label in pairs if label is wanted]
        if not chosen:
            continue
        axes.hist(
            chosen,
            bins=edges,
            histtype="stepfilled",
            edgecolor=colour,
            facecolor=(colour, 0.25),
            hatch=hatch,
            label=f"{name} ({len(chosen)})",
        )
    if threshold is not None and math.isfinite(threshold):
        axes.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:.5g}")
    _whole_numbers(axes.yaxis)
    _finish(axes, "image score (no unit; higher = more anomalous)", "number of images", legend="best")
    return _png(figure)


def _series(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> Series:
    """The columns `names` that hold at least one finite number; the epoch is "epoch" or the row's number."""
    found = {}
    for key, label in names.items():
        given = [
            (row.get("epoch", n), row[key]) for n, row in enumerate(rows, start=1) if row.get(key) is not None
        ]
        xs, ys = _finite([x for x, _ in given], [y for _, y in given])
        if xs:
            found[label] = (xs, ys)
    return found


def _draw_lines(axes: Axes, series: Series) -> None:
    for number, (name, (xs, ys)) in enumerate(series.items()):
        colour, style = STYLES[number % len(STYLES)]
        marker = "o" if len(xs) <= MARKED else ""
        axes.plot(xs, ys, color=colour, linestyle=style, marker=marker, markersize=3, label=name)


def _finite(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    pairs = [
        (float(x), float(y)) for x, y in zip(xs, ys, strict=True) if math.isfinite(x) and math.isfinite(y)
    ]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _bin_edges(scores: Sequence[float]) -> list[float]:
    """About 2 sqrt(n) equal bins over the scores, also where all are (almost) the same."""
    low, high = min(scores), max(scores)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        pad = 0.5 * max(abs(low), abs(high)) or 0.5
        low, high = low - pad, high + pad
    count = min(MAX_BINS, max(8, round(2 * math.sqrt(len(scores)))))
    step = (high - low) / count
    return [low + step * number for number in range(count)] + [high]


def _figure(inches: tuple[float, float]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _finish(axes: Axes, x_label: str, y_label: str, *, legend: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(loc=legend, frameon=True, fontsize="small").get_texts():
        text.set_parse_math(False)


def _whole_numbers(axis: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _placeholder(reason: str, inches: tuple[float, float]) -> bytes:
    figure = _figure(inches)
    figure.text(0.5, 0.5, f"Nothing to draw:\n{reason}", ha="center", va="center", color=GREY, fontsize=13)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
