"""The paper's Table 4 beside ours: parameters (total, used, trainable) and time per image as a ratio."""

from __future__ import annotations

import json
from typing import Any

from results_store import RESULTS, SHOWN_PRESET, paper_table
from umiad.parameters import parameter_table
from umiad.report import Block, Table, Text

PAPER_NAMES = {"cflow": "CFlow", "msflow": "MSFlow", "egmf": "UMIAD-EGMF"}


def table4(rows: list[dict[str, Any]] | None = None) -> list[Block]:
    """Parameters of the published constants (preset "paper"), speed of the preset that Table 3 shows."""
    printed = {row["method"]: row for row in paper_table(4)}
    speed = _speed()
    lines = []
    for row in parameter_table() if rows is None else rows:
        paper = printed.get(PAPER_NAMES.get(row["name"], ""), {})
        mark = " (suspect)" if paper.get("suspect") == "yes" else ""
        ratio = speed.get("detectors", {}).get(row["name"], {}).get("ratio")
        lines.append(
            (
                row["name"],
                *(f"{row[key] / 1e6:.2f}" for key in ("total", "used", "trainable")),
                f"{paper['params_million']}{mark}" if paper else "-",
                "-" if ratio is None else f"{ratio:.2f}",
                SHOWN_PRESET.get(row["name"], "default"),
                f"{paper['ms_per_image']}" if paper else "-",
            )
        )
    ours = {PAPER_NAMES[row[0]] for row in lines if row[0] in PAPER_NAMES}
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
        "Parameters: preset paper at 256 px; the backbone is a frozen ResNet18 without classifier; memory banks and "
        "Gaussian statistics are no parameters. Time: one image at batch 1 and 256 px, median of alternating calls in "
        f"one run, divided by the bare encoder's ({speed.get('threads', '?')} threads, commit "
        f"{speed.get('commit', 'none yet')}); the paper's milliseconds are of its own machine."
    )
    return [Table("Table 4", header, lines, caption), _reasons(printed)]


def _speed() -> dict[str, Any]:
    path = RESULTS / "speed_scoring.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def _reasons(printed: dict[str, dict[str, str]]) -> Text:
    lines = [f"{row['method']}: {row['why']}." for row in printed.values() if row["suspect"] == "yes"]
    return Text("Suspect cells of the paper's Table 4", lines)
