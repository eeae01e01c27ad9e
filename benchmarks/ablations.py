"""The paper's Tables 5 to 8 beside ours (`studies`): values, paired differences, and whether a part helps.

Missing runs are named, with the command that makes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from printed import METRICS, Notes, can_occur
from results_store import (
    DATASETS,
    Difference,
    Result,
    cell,
    difference,
    known,
    mean_of,
    over_seeds,
    provenance,
)
from studies import (
    MODULES,
    PUBLISHED,
    SIZE,
    STUDIES,
    Row,
    Step,
    Study,
    printed_row,
    published,
    row_named,
    runs_of,
)
from umiad.report import Block, Table, Text
from win_table import missing

GRID = "python benchmarks/paper_protocol.py --data DATA --weights FILE"
SLOTS = ("edge", "aggregate", "fusion")
SAM = "not run: no SAM checkpoint"
GET_SAM = (
    f"Row SAM: {SAM}. It needs Meta's segment anything model as a folder that the library transformers reads offline "
    "(config.json and model.safetensors; sam-vit-base, Apache-2.0, is published in that form), fetched beforehand, and "
    "pip install 'umiad[sam]'; `python benchmarks/paper_protocol.py` with --sam FOLDER then runs variant sam of "
    "benchmarks/ablation.toml, and its results stand here. No other edge detector is shown under this name."
)
READING = (
    "Percent; ours: mean over seeds (lowest to highest, n = number of seeds); seed 0 with its 95 % bootstrap interval. "
    "Verdict: ours against the row named before it; the differences follow. Preset ablation is the paper's network "
    "with fewer epochs (their number stands under each table). Reachable: whether any ranking of the paper's own test "
    "images (its Table 1) has the printed det_auroc, which must be a multiple of 0.5 / (normal x abnormal). Notes say "
    "why a printed value is suspect. brain_mri and head_ct have no lesion masks in public: the paper's pixel figures "
    "of these sets cannot be checked."
)
PAIRED = (
    "Differences: percentage points, on the seeds that both rows have, 95 % interval in brackets. det_auroc: paired "
    "bootstrap over the common seeds and, for each drawn seed, over groups of test images (1000 resamples), with one "
    "seed over images alone; the abnormal test images are the same under every seed, and three seeds are few: an "
    "interval that ends near 0 decides nothing. Pixel figures: Student's interval over the seeds, which says nothing "
    "of other images, hence '(these images)'; with fewer than three seeds ahead or behind only where the unpaired "
    "intervals of seed 0 lie apart, '(seed 0)'. 'No difference shown' is not 'no difference': it may be too small for "
    "these images and seeds. Not corrected for the number of comparisons."
)


def ablation_blocks(results: Sequence[Result]) -> list[Block]:
    """Everything of Tables 5 to 8."""
    blocks: list[Block] = [Text("How to read Tables 5 to 8", [READING, PAIRED])]
    return blocks + [block for study in STUDIES for block in study_blocks(results, study)]


def study_blocks(results: Sequence[Result], study: Study) -> list[Block]:
    """One of the paper's tables: values per set, differences, what they say, notes, what is missing."""
    notes = Notes()
    blocks: list[Block] = [values(results, study, dataset, notes) for dataset in DATASETS]
    blocks += [differences(results, study), answers(results, study)]
    if study.costs:
        blocks.append(costs(results, study))
    remarks = notes.lines()
    if any(row.variant == "sam" and not _all_runs(results, row) for row in study.rows):
        remarks.append(GET_SAM)
    if remarks:
        blocks.append(Text(f"Notes on the paper's Table {study.number}", remarks))
    if lacking := "; ".join(_lacking(results, study)):
        blocks.append(
            missing(f"Table {study.number}: runs without results", lacking, f"{GRID} {study.lists}")
        )
    return blocks


# Values


def values(results: Sequence[Result], study: Study, dataset: str, notes: Notes) -> Table:
    """The paper's printed values and ours, a line per row of the paper and metric."""
    lines, used = list[tuple[str, ...]](), list[Result]()
    for row in study.rows:
        runs, printed = runs_of(results, dataset, row), printed_row(study, dataset, row)
        used += runs
        for metric in METRICS:
            paper = (notes.mark(printed, metric), can_occur(printed[metric], dataset, metric))
            own = _own(runs, metric) if runs else (SAM if row.variant == "sam" else "not run", "-")
            lines.append((row.name, metric, *paper, *own, *_verdict(results, study, dataset, row, metric)))
    if study.number == MODULES.number and (runs := published(results, dataset)):
        used += runs
        name = f"all, preset {PUBLISHED} ({runs[0]['epochs']} epochs)"
        lines += [(name, metric, "as above", "", *_own(runs, metric), "", "") for metric in METRICS]
    header = (study.title, "metric", "paper", "reachable?", "ours", "ours, seed 0", "against", "verdict")
    return Table(f"Table {study.number}, {study.title}, {dataset}", header, lines, _caption(study, used))


def _own(runs: Sequence[Result], metric: str) -> tuple[str, str]:
    """Mean over seeds with range; seed 0 with its interval; dashes where there is no value."""
    first = [cell(run["metrics"][metric]) for run in runs if run["seed"] == 0]
    return over_seeds(known(runs, metric)) if known(runs, metric) else "-", *(first or ["-"])


def _verdict(results: Sequence[Result], study: Study, dataset: str, row: Row, metric: str) -> tuple[str, str]:
    """The row that the row's first comparison is with, and what it says, in words."""
    for step in study.steps:
        if step.of == row.name:
            gap = compare(results, study, step, dataset, metric)
            return step.against, "-" if gap is None else gap.verdict
    return "", ""


def _caption(study: Study, used: Sequence[Result]) -> str:
    """What the rows are, and where the numbers come from."""
    if not used:
        return f"{study.about} No results yet."
    tested = sorted({(run["counts"]["n_normal"], run["counts"]["n_abnormal"]) for run in used})
    counts = " and ".join(f"{n} normal, {a} abnormal" for n, a in tested)
    parts = {
        row.name: [run for run in used if (run["variant"], run["size"]) == (row.variant, row.size)]
        for row in study.rows
    }
    slots = "; ".join(f"{name}: {_parts(runs)}" for name, runs in parts.items() if runs)
    return f"Percent. {study.about} Edge / aggregate / fusion: {slots}. Tested: {counts}. {provenance(used)}"


def _parts(runs: Sequence[Result]) -> str:
    found = {" / ".join(str(run["config"][slot]) for slot in SLOTS) for run in runs}
    return " or ".join(sorted(found))


def costs(results: Sequence[Result], study: Study) -> Table:
    """What a run of each row costs on each set, and how that compares with the table's usual size."""
    lines, used = [], list[Result]()
    for dataset in DATASETS:
        seconds = {row.name: _seconds(runs_of(results, dataset, row)) for row in study.rows}
        usual = next((seconds[row.name] for row in study.rows if row.size == SIZE), None)
        for row in study.rows:
            used += runs_of(results, dataset, row)
            if own := seconds[row.name]:
                times = f"{sum(own) / sum(usual):.1f}" if usual else "-"
                lines.append((dataset, row.name, *(f"{each:.0f}" for each in own), times))
    threads = ", ".join(sorted({str(run["threads"]) for run in used})) or "no run yet, -"
    header = ("set", study.title, "fit seconds", "scoring seconds", f"both, times those of {SIZE} px")
    caption = f"Mean of the runs there are; threads: {threads}; other work beside."
    return Table(f"Table {study.number}, {study.title}: cost of a run", header, lines, caption)


def _seconds(runs: Sequence[Result]) -> tuple[float, float] | None:
    if not runs:
        return None
    fit, score = (mean_of([run[key] for run in runs]) for key in ("fit_seconds", "score_seconds"))
    return fit, score


# Differences


def differences(results: Sequence[Result], study: Study) -> Table:
    """Every comparison of the study: the paper's difference, ours with its interval, and the verdict."""
    lines, used = [], list[Result]()
    for step in study.steps:
        for dataset in DATASETS:
            pair = [row_named(study, name) for name in (step.of, step.against)]
            of, against = (printed_row(study, dataset, row) for row in pair)
            used += [run for row in pair for run in runs_of(results, dataset, row)]
            for metric in METRICS:
                claimed = f"{float(of[metric]) - float(against[metric]):+.2f}"
                gap = compare(results, study, step, dataset, metric)
                own = _no_gap(used, dataset, metric) if gap is None else (gap.text, _seeds(gap), gap.verdict)
                lines.append((step.words, dataset, metric, claimed, *own))
    header = ("comparison", "set", "metric", "paper's difference", "ours", "seeds", "verdict")
    caption = f"Percentage points. {provenance(used) if used else 'No results yet.'}"
    return Table(f"Table {study.number}, {study.title}: differences", header, lines, caption)


def _no_gap(used: Sequence[Result], dataset: str, metric: str) -> tuple[str, str, str]:
    runs = [run for run in used if run["dataset"] == dataset]
    without = metric != "det_auroc" and runs and not any(run["counts"]["n_masked"] for run in runs)
    return ("-", "none", "no lesion masks" if without else "not measured")


def _seeds(gap: Difference) -> str:
    return " ".join(map(str, gap.seeds))


def compare(
    results: Sequence[Result], study: Study, step: Step, dataset: str, metric: str
) -> Difference | None:
    """The step's gain on a set, paired over common seeds; None without a common seed that has the metric."""
    first, second = (runs_of(results, dataset, row_named(study, name)) for name in (step.of, step.against))
    return difference(first, second, metric)


def answers(results: Sequence[Result], study: Study) -> Text:
    """Each comparison in words: on how much of what was measured it is ahead, behind, or shows nothing."""
    lines = []
    for step in study.steps:
        found = verdicts(results, study, step)
        if not found:
            lines.append(f"{step.words}: not measured.")
            continue
        parts = []
        for word in ("ahead", "behind", "no difference shown", "no interval"):
            places = [place for place, verdict in found.items() if verdict.startswith(word)]
            named = f" ({', '.join(places)})" if places and len(places) < len(found) else ""
            parts += [f"{word} in {len(places)} of {len(found)}{named}"] if places else []
        judged = _claim(step, found)
        lines.append(f"{step.words} ({step.of} against {step.against}): {'; '.join(parts)}. {judged}")
    return Text(f"Table {study.number}, {study.title}: in words", lines)


def verdicts(results: Sequence[Result], study: Study, step: Step) -> dict[str, str]:
    """A place, "set metric" -> the verdict of `step` there, for what is measured."""
    gaps = (
        (f"{dataset} {metric}", compare(results, study, step, dataset, metric))
        for dataset in DATASETS
        for metric in METRICS
    )
    return {place: gap.verdict for place, gap in gaps if gap is not None}


def _claim(step: Step, found: Mapping[str, str]) -> str:
    """The conclusion of a step's verdicts."""
    ahead, behind = (sum(v.startswith(word) for v in found.values()) for word in ("ahead", "behind"))
    if ahead and behind:
        return "Better in some, worse in others."
    if ahead or behind:
        better = "better" if ahead else "worse"
        return f"{step.of} is {better} where a difference shows."
    return "No difference shown anywhere."


def _all_runs(results: Sequence[Result], row: Row) -> list[Result]:
    return [run for dataset in DATASETS for run in runs_of(results, dataset, row)]


def _lacking(results: Sequence[Result], study: Study) -> Iterator[str]:
    """Rows without all their seeds: "MFF (variant mff, 256 px: busi 1 2, head_ct 0 1 2)"; SAM has its own note."""
    for row in study.rows:
        if row.variant == "sam" and not _all_runs(results, row):
            continue
        sets = []
        for dataset in DATASETS:
            have = {run["seed"] for run in runs_of(results, dataset, row)}
            if seeds := [str(seed) for seed in row.seeds if seed not in have]:
                sets.append(f"{dataset} {' '.join(seeds)}")
        if sets:
            yield f"{row.name} (variant {row.variant}, {row.size} px: {', '.join(sets)})"
