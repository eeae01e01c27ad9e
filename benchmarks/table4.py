"""The paper's Table 4 beside ours: parameters (total, used, trainable) and time per image as a ratio."""

from __future__ import annotations

from typing import Any

from results_store import SHOWN_PRESETS, load_speed, paper_table, title
from table3 import METHODS
from umiad.parameters import parameter_table
from umiad.report import Block, Table, Text

PAPER_NAMES = {detector: method for method, detector in METHODS if detector}


def counted_rows() -> list[dict[str, Any]]:
    """Parameters of every detector at preset "paper", and of each other preset that tables show."""
    rows = []
    more = [
        row for preset in _more_presets() for row in parameter_table(preset=preset, names=_shown_with(preset))
    ]
    for row in parameter_table():
        rows += [each for each in more if each["name"] == row["name"]]
        rows.append(row)
    return rows


def row_title(row: dict[str, Any]) -> str:
    """The name of a row of `counted_rows`, with its preset where tables show several."""
    return title(row["name"], row["preset"]) if row["name"] in SHOWN_PRESETS else str(row["name"])


def table4(rows: list[dict[str, Any]] | None = None) -> list[Block]:
    """Parameters of the published constants (preset "paper"), speed of the presets that Table 3 shows."""
    printed = {row["method"]: row for row in paper_table(4)}
    counted = counted_rows() if rows is None else rows
    lines = [_line(row, printed) for row in counted]
    ours = {PAPER_NAMES.get(row["name"]) for row in counted}
    for method, paper in printed.items():
        if method not in ours:
            mark = " (suspect)" if paper["suspect"] == "yes" else ""
            figures = f"{paper['params_million']}{mark}"
            lines.append(
                (f"{method}, not built yet", "-", "-", "-", figures, "-", "-", paper["ms_per_image"])
            )
    header = (
        "detector",
        "total (M)",
        "used in scoring (M)",
        "trainable (M)",
        "paper (M)",
        "time, times the encoder",
        "preset timed",
        "paper (ms)",
    )
    caption = (
        "Parameters: preset paper at 256 px, egmf's preset default in a row of its own; "
        "the backbone is a frozen ResNet18 without classifier; memory banks and "
        "Gaussian statistics are no parameters. medvit has 29.58 M with the publication's unused parameters "
        "(`official_layout`, decision 9). Time: one image at batch 1 and 256 px, median of alternating calls in "
        f"one run, divided by the bare encoder's ({_measured()}); the paper's milliseconds are of its own machine."
    )
    return [Table("Table 4", header, lines, caption), _reasons(printed)]


def _line(row: dict[str, Any], printed: dict[str, dict[str, str]]) -> tuple[str, ...]:
    """One of our rows; the paper's figures stand beside the preset "paper"."""
    published = row["name"] not in SHOWN_PRESETS or row["preset"] == "paper"
    paper = printed.get(PAPER_NAMES.get(row["name"], ""), {}) if published else {}
    mark = " (suspect)" if paper.get("suspect") == "yes" else ""
    timed = row["preset"] if row["name"] in SHOWN_PRESETS else "default"
    ratio = load_speed().get((row["name"], timed), {}).get("ratio")
    return (
        row_title(row),
        *(f"{row[key] / 1e6:.2f}" for key in ("total", "used", "trainable")),
        f"{paper['params_million']}{mark}" if paper else "-",
        "-" if ratio is None else f"{ratio:.2f}",
        timed,
        f"{paper['ms_per_image']}" if paper else "-",
    )


def _more_presets() -> list[str]:
    return sorted({preset for shown in SHOWN_PRESETS.values() for preset in shown if preset != "paper"})


def _shown_with(preset: str) -> list[str]:
    return [name for name, shown in SHOWN_PRESETS.items() if preset in shown]


def _measured() -> str:
    """Threads and commits of the timings."""
    found = sorted({f"{row['threads']} threads, commit {row['commit']}" for row in load_speed().values()})
    return "; ".join(found) or "not measured yet: make bench"


def _reasons(printed: dict[str, dict[str, str]]) -> Text:
    lines = [f"{row['method']}: {row['why']}." for row in printed.values() if row["suspect"] == "yes"]
    return Text("Suspect cells of the paper's Table 4", lines)
