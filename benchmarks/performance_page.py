"""Render docs/performance.md and its plot from performance.json and the results beside it.

python benchmarks/performance.py --data ../shared/data --weights FILE       (`make bench`)
python benchmarks/compact_features.py --data ../shared/data --weights FILE
python benchmarks/same_scores.py --data ../shared/data --weights FILE
python benchmarks/performance_page.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figure_common import canvas

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE, PLOT = ROOT / "docs" / "performance.md", ROOT / "docs" / "images" / "performance-growth.png"


@dataclass(frozen=True)
class Goal:
    """A figure that is asked for: where it is found in the results, and what it may be at most."""

    words: str
    part: str
    key: str
    most: float
    unit: str = "x R1"


GOALS = (
    Goal("scoring a folder of 496 images, model loaded, nothing written", "folder", "nothing written", 1.0),
    Goal(
        "the same by the command `umiad score`, start-up included", "folder", "command, nothing written", 1.0
    ),
    Goal("the same folder by an export to ONNX Runtime, loaded", "folder", "export, nothing written", 1.0),
    Goal("the same by the command, start-up included", "folder", "export, command", 1.0),
    Goal("8 arrays of 256 px from Python", "arrays", "8, over r1", 1.0),
    Goal("8 arrays of 256 px from Python", "arrays", "8, over r2", 1.3, "x R2"),
    Goal("one array of 256 px from Python", "arrays", "1, over r1", 1.2),
    Goal("one array of 256 px from Python, preset quick", "arrays", "1, quick, over r1", 1.2),
    Goal("8 arrays of 256 px from Python, preset quick", "arrays", "8, quick, over r1", 1.0),
    Goal("one array of 256 px from Python, export to ONNX Runtime", "arrays", "1, export, over r1", 1.2),
    Goal("8 arrays of 256 px from Python, export to ONNX Runtime", "arrays", "8, export, over r1", 1.0),
    Goal("memory of scoring above the imports", "memory", "above the imports", 1000, "MB"),
    Goal("fit of the default on the normal images of busi", "fitting", "seconds", 180, "s"),
    Goal("`umiad --help`", "startup", "help", 0.3, "s"),
    Goal("`umiad score` of one image, cold", "startup", "score one image", 3.0, "s"),
    Goal("the same by an export to ONNX Runtime", "startup", "score one image by an export", 3.0, "s"),
)
HEAD = """# Performance: where the time goes

Made by `benchmarks/performance_page.py` from what `make bench` measured; nothing here is typed by hand but the words.
Times are multiples of a reference that took turns with them in the same run: **R1** is the plain ResNet18 (all four
layers, float32, PyTorch's default layout) on as many images in the same batches, **R2** the fastest float32 form of
it that we know (BatchNorm folded, channels-last). So a figure says how far a task is from the bare encoder, on any
machine; seconds are of the machine that measured."""
BUFFERED = "Reading runs ahead in a thread of its own, so its stage is hidden where a second core is free."
READING_GROWTH = """Cost as a power of the number, least squares of the logarithms: an exponent of 1 means
that twice as many cost twice as much. Below 1 there is a part that does not grow; the edge in pixels would have 2 if
only pixels counted."""


SAME = """What makes scoring fast must leave scores as they were. The default (256 px, hold-out 0.2, seed 0) on test
images, evenly chosen, as it ships and in three other ways: the plain network (nothing folded, PyTorch's default
layout), one image at a time instead of eight, and the backbone in bfloat16. Maps: largest difference as a share of
that map's range, median and largest over images; scores: as a share of the scores' standard deviation. In float32
1e-4 is allowed; bfloat16 is used by `--precision auto` only where eight of the very images keep 2 % and every
decision."""
BACKBONE = """Ways to run the three layers that the default needs, at 256 px, all with the same maps (within 1e-4).
The default judges an image and its mirror image, so it takes at least twice the shipped row; `quick` takes it once.
Compiling is measured here and not offered by `umiad score`: it has to gain more than the seconds it takes. An exported
model is what is faster (Runtimes, below)."""
RUNTIMES = """Eight arrays of 256 px from Python, by the model and by what `umiad export` makes of it (docs/export.md),
where the packages of the extras `onnx` and `openvino` are installed."""
FITS = """Trained detectors, preset default, 100 images of 256 px: minutes of a whole fit, from two epochs and what is
beside them (`benchmarks/fit_cost.py`). Asked for: at most 15. Closed forms take seconds to a minute."""
EXPORTED = """Every detector exported for both runtimes and compared with itself on 24 images of busi at 128 px
(`benchmarks/export_parity.py`; quick fits on 60 normal images). 1e-4 is allowed; beyond it nothing is written."""
COMPACT = """`umiad fit --compact-features` keeps what the frozen parts yield in float16: half the memory, or disk.
Fitted with and without on the same split (seed 0), judged on the test images with features as they are; "scores
apart": the largest difference of an image score, as a share of the scores' standard deviation. The rows with epochs
are trained by gradients: they take other steps after the first rounding, so scores drift apart in the course of it."""
JOBS = """A fit of the default (hold-out 0.2) and `umiad evaluate` on its test part (exact metrics, 1000 resamples),
each once. Time between two messages of progress is counted to the stage of the later one."""
TRAINING = """One batch of 16 images of the published training (`egmf`, preset `paper`, 256 px). "Cached" is what
`umiad fit` does: the frozen parts run once per image, not in every epoch."""
STARTUP = """Seconds of a fresh process, files in the system's cache; `import torch` by itself beside them."""


LISTS = ("speed_metrics", "compact_features", "same_scores", "export_parity", "fit_cost")
NOT_MEASURED = "Not measured yet: `make bench`."


def load(name: str) -> Any:
    """A committed result, or an empty one."""
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def page(
    found: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    compact: Sequence[Mapping[str, Any]] = (),
    same: Sequence[Mapping[str, Any]] = (),
    exported: Sequence[Mapping[str, Any]] = (),
    fits: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Markdown of the whole page; parts that were not measured say so."""
    parts = [HEAD, "## Asked for and reached", _goals(found, metrics)]
    parts += ["## The backbone, in other ways", BACKBONE, _part(found, "backbone", _backbone)]
    parts += [
        "## Stages of scoring",
        _part(found, "stages", _stages),
        "## Stages of a fit and of an evaluation",
        JOBS,
        _part(found, "jobs", _jobs),
    ]
    parts += [
        "## A step of training",
        TRAINING,
        _part(found, "training", _training),
        "## Fits",
        FITS,
        _fits(fits),
    ]
    parts += ["## Start-up", STARTUP, _part(found, "startup", _startup)]
    parts += ["## Growth", _part(found, "growth", _growth)]
    parts += ["## Runtimes", RUNTIMES, _part(found, "runtimes", _runtimes)]
    parts += ["## Exported and compared", EXPORTED, _exported(exported)]
    parts += ["## Same scores", SAME, _same(same)]
    parts += ["## Compact features", COMPACT, _compact(compact), "## How it was measured"]
    return "\n\n".join([*parts, _facts(found)]) + "\n"


def _part(found: Mapping[str, Any], name: str, shown: Callable[[Mapping[str, Any]], str]) -> str:
    """A part as `shown` writes it, or that it was not measured."""
    values = found.get(name, {}).get("values")
    return NOT_MEASURED if values is None else shown(values)


def _goals(found: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    rows = [("what", "reached", "asked for")]
    for goal in GOALS:
        value = found.get(goal.part, {}).get("values", {}).get(goal.key)
        rows.append((goal.words, _number(value, goal.unit), f"at most {goal.most:g} {goal.unit}"))
    for each in metrics:
        reached = f"{each['seconds']:g} s, {each['peak_gb']:g} GB"
        asked = " and ".join(
            f"{each[key]:g} {unit}"
            for key, unit in (("goal_seconds", "s"), ("goal_gb", "GB"))
            if each.get(key)
        )
        rows.append((str(each["what"]), reached, f"at most {asked}" if asked else "-"))
    beside = found.get("folder", {}).get("values", {})
    if "maps and pictures" in beside:
        rows.append(
            ("the same folder with maps and pictures", _number(beside["maps and pictures"], "x R1"), "-")
        )
    return _table(rows)


def _backbone(values: Mapping[str, Any]) -> str:
    counts = [key for key in values if key.isdigit()]
    rows = [("form", *(f"x R1, batch of {count}" for count in counts))]
    rows += [(name, *(f"{values[count][name]:.2f}" for count in counts)) for name in values[counts[0]]]
    compiling = [f"{value:g} s" for name, value in values.items() if name.startswith("seconds to compile")]
    return f"{_table(rows)}\n\nCompiling took {', '.join(compiling) or 'no time: there is no C++ compiler'}."


def _stages(values: Mapping[str, Any]) -> str:
    rows = [
        ("stage, one image", "x R1"),
        *((name, f"{value:.2f}") for name, value in values.items() if name != "r2"),
    ]
    note = f"R2 is {values['r2']:.2f} of R1 here. {BUFFERED}"
    return f"{_table(rows)}\n\n{note}"


def _jobs(values: Mapping[str, Any]) -> str:
    rows = [("job", "images", "seconds", "stage", "share")]
    for name, each in values.items():
        stages = sorted(each["shares"].items(), key=lambda pair: -pair[1])
        for stage, share in stages:
            rows.append((name, str(each["images"]), f"{each['seconds']:g}", stage, f"{share:.0%}"))
    return _table(rows)


def _training(values: Mapping[str, Any]) -> str:
    rows = [("part, one batch", "x R1"), *((name, f"{value:.2f}") for name, value in values.items())]
    faster = values["whole step, uncached"] / values["whole step, cached"]
    return f"{_table(rows)}\n\nAn epoch without the cache takes {faster:.2f} times one with it."


def _fits(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "Not measured yet: `benchmarks/fit_cost.py`."
    keys = (
        "detector",
        "minutes",
        "epochs",
        "seconds_per_epoch",
        "seconds_beside",
        "threads",
        "weights",
        "commit",
    )
    return _table(
        [
            tuple(key.replace("_", " ") for key in keys),
            *(tuple(str(row[key]) for key in keys) for row in rows),
        ]
    )


def _startup(values: Mapping[str, Any]) -> str:
    return _table([("process", "seconds"), *((name, f"{value:.2f}") for name, value in values.items())])


def _growth(values: Mapping[str, Any]) -> str:
    rows = [("number of", "from", "to", "cost of the largest, smallest = 1", "exponent")]
    for name, law in values.items():
        points = _points(law)
        (first, _), (last, cost) = points[0], points[-1]
        rows.append((name, f"{first}", f"{last}", f"{cost:.1f}", f"{law['exponent']:.2f}"))
    return f"{READING_GROWTH}\n\n{_table(rows)}\n\n![growth of costs](images/{PLOT.name})"


def _points(law: Mapping[str, Any]) -> list[tuple[int, float]]:
    """Number and cost, by rising number; JSON sorts its keys as words."""
    return sorted((int(number), cost) for number, cost in law["points"].items())


def _runtimes(values: Mapping[str, Any]) -> str:
    shown = {name: value for name, value in values.items() if name != "r2"}
    rows = [(name, f"{value:.2f}", f"{value / shown['torch']:.2f}") for name, value in shown.items()]
    return _table([("scored by", "x R1", "x torch"), *rows])


def _exported(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "Not measured yet: `benchmarks/export_parity.py`."
    table = [
        ("detector", "runtime", "maps differ by", "image scores by", "decisions alike", "weights", "commit")
    ]
    for row in rows:
        ends = (row["weights"], row["commit"])
        name = f"{row['detector']}, {row['preset']}"
        if found := row.get("parity"):
            alike = f"{found['same_decisions']} of {found['decisions']}"
            alike += f", {found['ties']} ties" if found["ties"] else ""
            far = (f"{found['map_relative']:.1e}", f"{found['score_relative']:.1e}", alike)
        else:
            far = (f"refused: {row['refused']}", "-", "-")
        table.append((name, row["runtime"], *far, *ends))
    return _table(table)


def _same(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "Not measured yet: `benchmarks/same_scores.py`."
    table = [
        ("data", "images", "scored by", "maps, median", "maps, most", "scores, most", "decisions changed")
    ]
    table[0] += ("image AUROC", "commit")
    for row in rows:
        for name, each in row["compared"].items():
            before, after = each["det_auroc"]
            far = (f"{each[key]:.1e}" for key in ("map_median", "map_most", "score_most"))
            changed = f"{each['decisions_changed']} of {each['decisions']}"
            ends = (changed, f"{before:.2f} -> {after:.2f}", str(row["commit"]))
            table.append((str(row["dataset"]), str(row["images"]), name, *far, *ends))
    return _table(table)


def _compact(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "Not measured yet: `benchmarks/compact_features.py`."
    names = (
        "data",
        "detector",
        "epochs",
        "image AUROC",
        "pixel AUROC",
        "AUPRO",
        "scores apart",
        "weights",
        "commit",
    )
    table = [names]
    for row in rows:
        exact, packed = (row["metrics"][name] for name in ("float32", "float16"))
        cells = (
            "-" if exact[key] is None else f"{exact[key]:.2f} -> {packed[key]:.2f}"
            for key in ("det_auroc", "seg_auroc", "seg_aupro")
        )
        name = f"{row['detector']}, {row['preset']}"
        ends = (f"{row['scores_apart']:.1e}", row["weights"], row["commit"])
        table.append((row["dataset"], name, str(row["epochs"]), *cells, *ends))
    return _table(table)


def _facts(found: Mapping[str, Any]) -> str:
    rows = [("part", "images", "threads", "turns", "weights", "torch", "commit")]
    for name, each in found.items():
        facts = each["facts"]
        rows.append(
            (name, *(str(facts[key]) for key in ("images", "threads", "turns", "weights", "torch", "commit")))
        )
    return _table(rows)


def _number(value: float | None, unit: str) -> str:
    return (
        "not measured yet"
        if value is None
        else f"{value:.3g} {unit}"
        if value < 100
        else f"{value:.0f} {unit}"
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(each)} |" for each in lines)


def plot(found: Mapping[str, Any]) -> None:
    """docs/images/performance-growth.png: cost against number, both logarithmic."""
    values = found.get("growth", {}).get("values")
    if values is None:
        return
    figure = canvas(720, 480)
    axes = figure.subplots()
    for name, law in values.items():
        x, costs = zip(*_points(law), strict=True)
        axes.loglog([each / x[0] for each in x], costs, "o-", label=f"{name} ({x[0]} to {x[-1]})")
    ends = axes.get_xlim()
    axes.loglog(ends, ends, ":", color="0.5", label="in proportion")
    axes.set(xlabel="multiple of the smallest number", ylabel="multiple of its cost")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3, which="both")
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT)


def main() -> None:
    """Write the page and the plot."""
    found = load("performance.json")
    lists = (load(f"{name}.json") or [] for name in LISTS)
    PAGE.write_text(page(found, *lists), encoding="utf-8")
    plot(found)


if __name__ == "__main__":
    main()
