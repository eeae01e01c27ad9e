"""The committed results of the protocol, and the paper's printed values: what every table reads."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umiad.report import percent

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAPER = ROOT / "benchmarks" / "paper"
DATASETS = ("busi", "brain_mri", "head_ct")
SHOWN_PRESET = {"egmf": "paper"}
"""The preset of a detector that tables show, where it is not "default"."""

Result = dict[str, Any]


def load_results() -> list[Result]:
    """All committed runs of the protocol."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    return [each for each in found if "metrics" in each]


def select(
    results: Sequence[Result],
    *,
    dataset: str,
    detector: str,
    variant: str = "main",
    preset: str | None = None,
) -> list[Result]:
    """The runs of one row of a table, by seed. Two results for one seed are an error: one of them is stale."""
    wanted = (dataset, detector, preset or SHOWN_PRESET.get(detector, "default"), variant)
    found = [r for r in results if (r["dataset"], r["detector"], r["preset"], r["variant"]) == wanted]
    seeds = [run["seed"] for run in found]
    if len(set(seeds)) < len(seeds):
        raise SystemExit(f"{' '.join(wanted)}: two results for one seed; delete the stale one")
    return sorted(found, key=lambda run: int(run["seed"]))


def paper_table(number: int) -> list[dict[str, str]]:
    """The printed rows of a table of the paper, with the columns `suspect` and `why`."""
    with (PAPER / f"table{number}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def cell(metric: dict[str, Any] | None) -> str:
    """A value in percent with its interval, or a dash."""
    if metric is None or metric["value"] is None:
        return "-"
    low, high = metric["ci95"] or (None, None)
    return percent(metric["value"]) + (f" [{percent(low)}, {percent(high)}]" if low is not None else "")


def spread(values: Sequence[float]) -> str:
    """Mean and range over seeds: "86.8 (78.3 to 92.4, n = 5)"; a dash for fewer than two."""
    if len(values) < 2:
        return "-"
    mean = percent(sum(values) / len(values))
    return f"{mean} ({percent(min(values))} to {percent(max(values))}, n = {len(values)})"
