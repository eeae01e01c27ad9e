"""Render the committed results beside the paper's numbers, into README.md and docs/parameters.md.

    python benchmarks/tables.py

Nothing is typed by hand: values come from benchmarks/results/*.json and benchmarks/paper/*.csv.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from umiad.charts import training_curves
from umiad.parameters import parameter_table
from umiad.report import percent

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = ("det_auroc", "det_ap", "seg_auroc", "seg_aupro")
ROWS = (
    ("egmf", "paper", "main", "egmf, preset paper"),
    ("egmf", "paper", "full-likelihood", "egmf, the same network, full likelihood per position"),
    ("padim", "paper", "main", "padim, preset paper (layers 1 to 3)"),
    ("padim", "default", "main", "padim, preset default (layers 2 and 3)"),
)
DATASETS = ("busi", "brain_mri", "head_ct")
PAPER_PARTS = {"egmf": "14 M in all (the paper's Table 4)"}


def load_results() -> list[dict[str, Any]]:
    """All committed runs of the protocol."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    return [each for each in found if "metrics" in each]


def paper_row(dataset: str, method: str = "UMIAD-EGMF") -> dict[str, str]:
    """The printed row of the paper's Table 3."""
    with (ROOT / "benchmarks" / "paper" / "table3.csv").open(newline="", encoding="utf-8") as file:
        return next(
            row for row in csv.DictReader(file) if (row["dataset"], row["method"]) == (dataset, method)
        )


def cell(metric: dict[str, Any]) -> str:
    """A value in percent with its interval, or a dash."""
    if metric["value"] is None:
        return "-"
    low, high = metric["ci95"] or (None, None)
    return percent(metric["value"]) + (f" [{percent(low)}, {percent(high)}]" if low is not None else "")


def results_table(results: list[dict[str, Any]], *, seed: int = 0) -> str:
    """Markdown: the paper's printed values and ours of one seed, per data set, whoever wins."""
    lines = [
        "| data (test normal / abnormal) | method | " + " | ".join(COLUMNS) + " | epochs | commit |",
        "| --- | --- |" + " --- |" * (len(COLUMNS) + 2),
    ]
    for dataset in DATASETS:
        printed = paper_row(dataset)
        mark = " (suspect)" if printed["suspect"] == "yes" else ""
        values = " | ".join(printed.get(name) or "-" for name in COLUMNS)
        lines.append(f"| {dataset} | the paper's UMIAD-EGMF, as printed{mark} | {values} | 100 | |")
        for row in ROWS:
            lines += [run_row(run, row[3]) for run in select(results, dataset, row) if run["seed"] == seed]
    return "\n".join([*lines, "", footnote(results, seed), "", *spread_lines(results)])


def select(
    results: list[dict[str, Any]], dataset: str, row: tuple[str, str, str, str]
) -> list[dict[str, Any]]:
    """The runs of one row of the table on one data set, by seed."""
    wanted = (dataset, *row[:3])
    found = [r for r in results if (r["dataset"], r["detector"], r["preset"], r["variant"]) == wanted]
    return sorted(found, key=lambda run: int(run["seed"]))


def spread_lines(results: list[dict[str, Any]]) -> Iterator[str]:
    """Mean and range over seeds (splits and channel draws), where there are several."""
    for row in ROWS:
        parts = []
        for dataset in DATASETS:
            values = [run["metrics"]["det_auroc"]["value"] for run in select(results, dataset, row)]
            if len(values) > 1:
                mean = percent(sum(values) / len(values))
                parts.append(
                    f"{dataset} {mean} ({percent(min(values))} to {percent(max(values))}, n = {len(values)})"
                )
        if parts:
            yield f"Spread over seeds, det_auroc, {row[3]}: {'; '.join(parts)}."


def run_row(run: dict[str, Any], title: str) -> str:
    """One line of the table."""
    counts = f"{run['counts']['n_normal']} / {run['counts']['n_abnormal']}"
    cells = " | ".join(cell(run["metrics"][name]) for name in COLUMNS)
    epochs = run["epochs"] or "closed form"
    return f"| {run['dataset']} ({counts}) | {title} | {cells} | {epochs} | {run['commit']} |"


def footnote(results: list[dict[str, Any]], seed: int) -> str:
    """Provenance of all rows in words."""
    labels = ", ".join(sorted({run["weights"] for run in results}))
    return (
        f"Percent, 95 % bootstrap intervals in brackets. Weights label: {labels}; seed {seed}; 256 px; hold-out 0; the "
        "paper's training sizes; no test image used for any choice. A dash: the set has no lesion masks, or the paper "
        "prints none. With 10 test normals (brain_mri, head_ct) one image moves det_auroc by up to 10 points. "
        "Suspect: see [decision 1](docs/decisions/0001-what-the-paper-leaves-open.md). Made by `make tables`."
    )


def parameters_page() -> str:
    """Markdown: parameter counts per part beside the paper's."""
    lines = [
        "# Parameter counts",
        "",
        "Made by `make tables` from the networks themselves (preset `paper`, 256 px). The encoder is frozen and",
        "has no fully connected layer. Gaussian statistics are buffers and do not count; the flows' permutation",
        "indices are parameters to their library, hence total above trainable. The paper prints 14 M for",
        "UMIAD-EGMF without a counting rule; the trainable parts here come to the same.",
        "",
        "| detector | part | total | trainable | paper |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for row in parameter_table():
        for part, counts in row["parts"].items():
            lines.append(f"| {row['name']} | {part} | {counts['total']:,} | {counts['trainable']:,} | |")
        paper = PAPER_PARTS.get(row["name"], "")
        lines.append(f"| {row['name']} | **all** | {row['total']:,} | {row['trainable']:,} | {paper} |")
    return "\n".join(lines) + "\n"


def replace_between(text: str, name: str, content: str) -> str:
    """Put `content` between the markers `name:start` and `name:end` of a Markdown text."""
    pattern = re.compile(rf"(<!-- {name}:start -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"README.md: markers {name}:start and {name}:end are missing")
    return pattern.sub(lambda match: match[1] + content + "\n" + match[2], text)


def main() -> None:
    """Write the table, the parameter page and the picture of the loss curves."""
    results = load_results()
    readme = ROOT / "README.md"
    readme.write_text(
        replace_between(readme.read_text(encoding="utf-8"), "results", results_table(results)),
        encoding="utf-8",
    )
    (ROOT / "docs" / "parameters.md").write_text(parameters_page(), encoding="utf-8")
    for run in results:
        if run["variant"] == "holdout" and run["log"]:
            picture = ROOT / "docs" / "images" / f"curves-{run['dataset']}-{run['detector']}.png"
            picture.parent.mkdir(exist_ok=True)
            picture.write_bytes(training_curves(run["log"]))


if __name__ == "__main__":
    main()
