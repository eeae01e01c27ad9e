"""Render the committed results beside the paper's numbers: README.md, docs/results.md, docs/parameters.md.

    python benchmarks/tables.py

The same as docs/results.md, with the figures inside, goes to build/tables.html, one page that needs nothing else.
Nothing is typed by hand: values come from benchmarks/results/*.json and benchmarks/paper/*.csv.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ablations import ablation_blocks
from opening import opening
from operating_point import operating_blocks
from page import IMAGES, Item, Shown, figures, markdown, write_html
from proxy_table import ideas_block, proxy_blocks
from results_store import (
    DATASETS,
    ROOT,
    Result,
    cell,
    load_named,
    load_results,
    paper_table,
    presets,
    select,
    spread,
)
from studies import PRESET as ABLATION
from table1 import table1_blocks
from table2 import table2_blocks
from table3 import BESIDE, DESIGNS, EXCEPT, METHODS, best_lines, table3
from table4 import counted_rows, row_title, table4
from umiad.charts import training_curves
from umiad.report import Table, Text, to_markdown
from win_table import LEARNING, learning_block, learning_picture, win_blocks

PICTURE = f"{LEARNING.replace('_', '-')}.png"
TITLE = "Results beside the paper's"
PAGE = ROOT / "build" / "tables.html"
COLUMNS = ("det_auroc", "seg_auroc", "seg_aupro")
PAPER_PARTS = {("egmf", "paper"): "14 M in all (the paper's Table 4)"}
ABOUT = (
    "Made by `make tables` from the committed results (benchmarks/results/*.json) and the paper's printed values "
    "(benchmarks/paper/*.csv); nothing here is typed by hand. Suspect: the printed value cannot be what it says, see "
    "the notes below and decision 1. `make tables` writes the same with all figures to build/tables.html, one page "
    "that needs no other file and no network; `make tables RUN=1` first runs what is missing (hours)."
)
LEAD = (
    "Every table of the paper with our numbers beside the printed ones, their spread, and whether the printed ones can "
    "be true."
)


def results_table(results: Sequence[Result], *, seed: int = 0) -> str:
    """Markdown for the README: our detectors on the three sets, one line each, whoever wins."""
    lines = [
        "| data (test normal / abnormal) | method | det_auroc | det_auroc over seeds | seg_auroc | seg_aupro "
        "| epochs | commit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    detectors = [detector for _, detector in METHODS if detector] + list(BESIDE)
    for dataset in DATASETS:
        printed = next(r for r in paper_table(3) if (r["dataset"], r["method"]) == (dataset, "UMIAD-EGMF"))
        mark = " (suspect)" if printed["suspect"] == "yes" else ""
        values = f"{printed['det_auroc']} | | {printed['seg_auroc']} | {printed['seg_aupro']} | 100 |"
        lines.append(f"| {dataset} | the paper's UMIAD-EGMF, as printed{mark} | {values} |")
        for detector in detectors:
            for preset in presets(detector):
                runs = select(results, dataset=dataset, detector=detector, preset=preset)
                lines += [_line(run, runs) for run in runs if run["seed"] == seed]
    return "\n".join([*lines, "", _footnote(results, seed)])


def _line(run: Result, runs: Sequence[Result]) -> str:
    counts = f"{run['counts']['n_normal']} / {run['counts']['n_abnormal']}"
    metrics = run["metrics"]
    cells = [cell(metrics[name]) if name == "det_auroc" or run["localises"] else "-" for name in COLUMNS]
    over = spread([each["metrics"]["det_auroc"]["value"] for each in runs])
    name = f"{run['detector']}, preset {run['preset']}"
    made = f"{run['epochs'] or 'closed form'} | {run['commit']}"
    return (
        f"| {run['dataset']} ({counts}) | {name} | {cells[0]} | {over} | {cells[1]} | {cells[2]} | {made} |"
    )


def _footnote(results: Sequence[Result], seed: int) -> str:
    labels = ", ".join(sorted({run["weights"] for run in results}))
    return (
        f"Percent, 95 % bootstrap intervals in brackets; each method's official post-processing; seed {seed}, and mean "
        "with range where several seeds were run (0 to 4 for the closed forms, fitted in seconds to minutes). "
        f"Weights label: {labels}; 256 px; hold-out 0; the paper's training sizes; no test image of seed 0 used for a "
        f"choice, {EXCEPT} {DESIGNS} "
        "A dash: no lesion masks, or no map. `size` and `intensity` are confounders, not methods. The common "
        "post-processing, equalised images and the paper's other rows: [docs/results.md](docs/results.md). "
        "Made by `make tables`."
    )


def shared(results: Sequence[Result]) -> list[Result]:
    """The runs that are no part of the ablation: they alone stand in Table 3 and in the section on the default."""
    return [run for run in results if run["preset"] != ABLATION]


def results_items(results: Sequence[Result], rows: list[dict[str, Any]] | None = None) -> list[Item]:
    """All that docs/results.md and the HTML page show, in order."""
    others = shared(results)
    best = list(best_lines(others))
    return [
        opening(results),
        Text("Where the numbers come from", [ABOUT]),
        *table1_blocks(),
        *table2_blocks(),
        Text("Who leads", best or ["No results yet."]),
        *table3(others),
        *table4(rows),
        *ablation_blocks(results),
        *operating_blocks(others),
        *default_items(others),
        *figures(),
    ]


def results_page(results: Sequence[Result], rows: list[dict[str, Any]] | None = None) -> str:
    """Markdown of docs/results.md."""
    return markdown(results_items(results, rows), title=TITLE)


def default_items(results: Sequence[Result]) -> list[Item]:
    """The default of egmf, its learning curve drawn too; how `umiad tune` ranks settings."""
    learning = load_named(LEARNING)
    drawn = [Shown(PICTURE, "Metrics over the number of normal images")] if learning else []
    proxies = [block for dataset in DATASETS for block in proxy_blocks(results, dataset)]
    return [*win_blocks(results), learning_block(learning), *drawn, *proxies, ideas_block()]


def default_section(results: Sequence[Result]) -> str:
    """Markdown of `default_items`."""
    return markdown(default_items(results))


def parameters_page(rows: list[dict[str, Any]] | None = None) -> str:
    """Markdown: parameter counts per part beside the paper's."""
    lines = []
    for row in counted_rows() if rows is None else rows:
        name = row_title(row)
        for part, counts in row["parts"].items():
            lines.append((name, part, f"{counts['total']:,}", f"{counts['trainable']:,}", "", ""))
        paper = PAPER_PARTS.get((row["name"], row["preset"]), "")
        lines.append((name, "all", f"{row['total']:,}", f"{row['trainable']:,}", f"{row['used']:,}", paper))
    caption = (
        "Made by `make tables` from the networks themselves (preset paper, 256 px; egmf's preset "
        "default too). The encoder is frozen and has no "
        "fully connected layer. Gaussian statistics and memory banks are buffers and do not count; the flows' "
        "permutations are parameters to their library, hence total above trainable. Used: in scoring one image. The "
        "paper prints 14 M for UMIAD-EGMF without a counting rule; the trainable parts here come to the same."
    )
    table = Table(
        "Counts per part", ("detector", "part", "total", "trainable", "used", "paper"), lines, caption
    )
    return "# Parameter counts\n\n" + to_markdown([table]) + "\n"


def replace_between(text: str, name: str, content: str) -> str:
    """Put `content` between the markers `name:start` and `name:end` of a Markdown text."""
    pattern = re.compile(rf"(<!-- {name}:start -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"README.md: markers {name}:start and {name}:end are missing")
    return pattern.sub(lambda match: match[1] + content + "\n" + match[2], text)


def main() -> None:
    """Write the pictures of the loss curves and the learning curve, then the tables and the pages."""
    results, rows = load_results(), counted_rows()
    _draw(results)
    readme = ROOT / "README.md"
    readme.write_text(
        replace_between(readme.read_text(encoding="utf-8"), "results", results_table(shared(results))),
        encoding="utf-8",
    )
    items = results_items(results, rows)
    (ROOT / "docs" / "results.md").write_text(markdown(items, title=TITLE), encoding="utf-8")
    (ROOT / "docs" / "parameters.md").write_text(parameters_page(rows), encoding="utf-8")
    write_html(PAGE, items, title=TITLE, lead=LEAD)


def _draw(results: Sequence[Result]) -> None:
    IMAGES.mkdir(exist_ok=True)
    for run in results:
        if run["variant"] == "holdout" and len(run["log"]) > 1:  # a closed form has no curve
            picture = IMAGES / f"curves-{run['dataset']}-{run['detector']}.png"
            picture.write_bytes(training_curves(run["log"]))
    if learning := load_named(LEARNING):
        (IMAGES / PICTURE).write_bytes(learning_picture(learning))


if __name__ == "__main__":
    main()
