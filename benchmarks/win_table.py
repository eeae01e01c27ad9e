"""The default of egmf in docs/results.md: goals, rivals, ingredients, equal sharpness, learning curve, proxy.

Every table is of the official post-processing, and says which seeds it compares. What is not measured yet is
named, with the command that measures it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from results_store import (
    DATASETS,
    MIN_SEEDS,
    Difference,
    Result,
    cell,
    difference,
    image_difference,
    known,
    load_speed,
    mean_of,
    over_seeds,
    points,
    provenance,
    select,
    title,
    value,
)
from table3 import DESIGNS, POSGAUSS, all_detectors, who
from umiad.charts import DPI, STYLES
from umiad.report import Block, Table, Text, percent

OURS = ("egmf", "default")
SEEDS = (0, 1, 2, 3, 4)
SEGMENTATION = ("seg_auroc", "seg_aupro")
PROXIES = ("det_auroc", "rank_score", *SEGMENTATION)
METRICS = {"busi": ("det_auroc", *SEGMENTATION), "brain_mri": ("det_auroc",), "head_ct": ("det_auroc",)}
"""Per set what is compared; only busi has lesion masks."""
GOALS = (
    ("busi", "det_auroc", 0.97),
    ("busi", "seg_auroc", 0.86),
    ("busi", "seg_aupro", 0.72),
    ("head_ct", "det_auroc", 0.98),
    ("brain_mri", "det_auroc", 0.90),
)
FIT_SECONDS = 180.0
VARIANTS = {
    "maximum": "image score = the map's maximum (instead of the mean of its top 3 %)",
    "full-likelihood": "the log-determinant is added to the map (instead of the latent's length alone)",
    "no-mirror": "each position for itself only, no comparison with the mirrored side",
    "mirror-only": "comparison with the mirrored side only",
    "no-square-root": "features as they are (instead of their square roots)",
    "no-edges": "layer 3 alone, no edge features of layers 1 and 2",
    "edges-egm": "edge features of the paper's module (instead of layers 1 and 2 themselves)",
    "edges-prewitt": "edge features of a Prewitt filter (instead of layers 1 and 2 themselves)",
    "no-fusion": "edge features and layer 3 as if independent (instead of one joint density)",
    "no-prior": "each position's own covariance, not held back by the shared one",
    "shared-covariance": "one covariance for all positions, only the mean is each position's own",
}
"""The ablation's rows in their order: what is different from the default."""
COSTS = (
    ("model_mb", "tensors of the saved model, MB", 150.0),
    ("ratio_batch8", "scoring 8 images, times the encoder", 1.8),
)
LEARNING = "learning_curve-busi"
GRID = "python benchmarks/paper_protocol.py --data DATA --weights FILE --remember benchmarks/win.toml"
MORE = "benchmarks/more_seeds.toml (hours)."
LIST = "python benchmarks/paper_protocol.py --data DATA --weights FILE benchmarks/table3.toml"
CURVE = "python benchmarks/learning_curve.py --data DATA --weights FILE"
PAIRED = (
    "95 % interval in brackets: paired bootstrap over the common seeds and, for each drawn seed, over groups of test "
    "images (1000 resamples). The abnormal test images are the same under every seed and are drawn as if they were "
    "not, and five seeds are few: an interval that ends near 0 decides nothing. With one seed it is of images alone."
)


def win_blocks(results: Sequence[Result]) -> list[Block]:
    """Goals, rivals, ranking, ablation, equal sharpness."""
    what = f"{DESIGNS} This section asks what the default reaches, against whom, and by which of its parts. {POSGAUSS}."
    return [
        Text("The default of egmf", [what]),
        goals(results),
        *(against(results, dataset) for dataset in DATASETS),
        ranking(results),
        *ablation(results),
        equal_sharpness(results),
    ]


def ours(results: Sequence[Result], dataset: str, variant: str = "main") -> list[Result]:
    """The default's runs on a set, by seed."""
    return select(results, dataset=dataset, detector=OURS[0], preset=OURS[1], variant=variant)


def goals(results: Sequence[Result]) -> Block:
    """What was aimed at and what was reached; speed and size beside it."""
    found = {dataset: ours(results, dataset) for dataset in DATASETS}
    if not any(found.values()):
        return missing("The default of egmf: goals", "the default's runs", GRID)
    rows = [_goal_row(found[dataset], *goal) for goal in GOALS for dataset in goal[:1]]
    for dataset, runs in found.items():
        seconds = [run["fit_seconds"] for run in runs]
        first = [f"{run['fit_seconds']:.0f}" for run in runs if run["seed"] == 0]
        text, fast = "-", "not measured"
        if runs:
            text = f"{mean_of(seconds):.0f} ({min(seconds):.0f} to {max(seconds):.0f}, n = {len(runs)})"
            fast = _reached(max(seconds) <= FIT_SECONDS, runs)
        rows.append((dataset, "fit seconds", f"<= {FIT_SECONDS:.0f}", text, *(first or ["-"]), fast))
    speed = load_speed().get(OURS, {})
    for key, name, most in COSTS:
        figure = f"{speed[key]:.2f}" if key in speed else "not measured: make bench"
        met = ("yes" if speed[key] <= most else "no") if key in speed else "not measured"
        rows.append(("any", name, f"<= {most:g}", figure, "-", met))
    header = ("set", "figure", "goal", "mean over seeds", "seed 0", "reached")
    used = [run for runs in found.values() for run in runs]
    threads = ", ".join(sorted({str(run["threads"]) for run in used}))
    caption = (
        "Percent, mean (lowest to highest); judged by the mean over seeds, fit seconds by the highest. Fit seconds: "
        f"{threads} thread(s), other work beside; after a set's first run backbone features may have been "
        f"remembered, so the highest is nearest to a fit of its own. {provenance(used)}"
    )
    if any(_lacking(runs) for runs in found.values()):
        caption += f" Missing runs are made by: {GRID}"
    return Table("The default of egmf: goals", header, rows, caption)


def against(results: Sequence[Result], dataset: str) -> Block:
    """The default minus every other detector on one set."""
    name, own = f"The default of egmf against every other detector, {dataset}", ours(results, dataset)
    if not own:
        return missing(name, "the default's runs", GRID)
    rows, used = [], list(own)
    for metric in METRICS[dataset]:
        for detector, preset in _rivals(results):
            theirs = select(results, dataset=dataset, detector=detector, preset=preset)
            if not theirs or (metric != "det_auroc" and not theirs[0]["localises"]):
                continue
            used += theirs
            rows.append((metric, who(detector, preset), *_versus(own, theirs, metric)))
    header = ("metric", "rival", "seeds compared", "egmf", "rival's", "difference", "verdict")
    caption = (
        f"Percent; means over the seeds that both have; difference = egmf minus rival. det_auroc: {PAIRED} seg: no "
        "image's own pixels are kept; in brackets Student's 95 % interval over three or more seeds, whose abnormal "
        "images are the same: it says nothing of other images, hence '(these images)'; with fewer seeds ahead or "
        "behind only where the unpaired intervals of seed 0 lie apart, '(seed 0)'. Not corrected for the number of "
        f"comparisons. Rivals' other seeds: {MORE} {provenance(used)}"
    )
    return Table(name, header, rows, caption)


def ranking(results: Sequence[Result]) -> Block:
    """det_auroc over the three sets, of every detector that has results on all."""
    name, ranked, used, absent = "Mean det_auroc of the three sets", [], [], []
    for detector, preset in (OURS, *_rivals(results)):
        rows = [select(results, dataset=d, detector=detector, preset=preset) for d in DATASETS]
        if not all(rows):
            absent.append(title(detector, preset))
            continue
        used += [run for runs in rows for run in runs]
        means = [mean_of([value(run) for run in runs]) for runs in rows]
        same = [
            [value(run) for run in ours(results, d) if run["seed"] in {r["seed"] for r in runs}]
            for d, runs in zip(DATASETS, rows, strict=True)
        ]
        fair = percent(mean_of([mean_of(each) for each in same])) if all(same) else "-"
        shown = (*map(percent, means), " / ".join(str(len(runs)) for runs in rows), fair)
        ranked.append((mean_of(means), who(detector, preset), shown))
    if not ranked:
        return missing(name, "a detector with results on all three sets", LIST)
    left = (
        f" Without results on all three sets yet: {'; '.join(absent)}. Made by: {LIST} (rivals), {GRID}"
        if absent
        else ""
    )
    ranked.sort(key=lambda each: -each[0])
    lines = [(str(k), row, percent(mean), *shown) for k, (mean, row, shown) in enumerate(ranked, start=1)]
    header = ("rank", "detector", "mean", *DATASETS, "seeds per set", "egmf on the same seeds")
    caption = (
        "Percent; each set's mean over the seeds there are, then the mean of the sets. Rows with other seeds are not "
        f"comparable: the last column has egmf's default on the row's own seeds. {provenance(used)}{left}"
    )
    return Table(name, header, lines, caption)


def ablation(results: Sequence[Result]) -> list[Block]:
    """One row per ingredient: what the default gains by it on every set."""
    name, main = "The default of egmf: its ingredients", {d: ours(results, d) for d in DATASETS}
    if not any(main.values()):
        return [missing(name, "the default's runs", GRID)]
    columns = [(dataset, metric) for dataset in DATASETS for metric in METRICS[dataset]]
    alone = (over_seeds(known(main[d], m)) for d, m in columns)
    rows, lacking = [("main", "the default", *alone, "")], dict[str, dict[str, str]]()
    used = [run for runs in main.values() for run in runs]
    for variant, words in VARIANTS.items():
        cells, gains = [], {}
        for dataset, metric in columns:
            runs = ours(results, dataset, variant)
            used += runs
            gain = gains[dataset, metric] = difference(main[dataset], runs, metric)
            cells.append(_gain_cell(runs, metric, gain))
            if seeds := _lacking(runs):
                lacking.setdefault(variant, {})[dataset] = seeds
        rows.append((variant, words, *cells, _ingredient(gains)))
    figures = (f"{metric} {dataset}" for dataset, metric in columns)
    header = ("variant", "what is different", *figures, "ingredient")
    caption = (
        "Percent, mean over seeds; gain of the ingredient = main minus variant on the n seeds both have; above 0: "
        f"the default is better. det_auroc: {PAIRED} seg: lowest to highest over the seeds; 'higher' and 'lower' need "
        f"three seeds that all agree. {provenance(used)}"
    )
    blocks: list[Block] = [Table(name, header, rows, caption)]
    if lacking:
        seeds = "; ".join(
            f"{each} ({', '.join(map(' '.join, sets.items()))})" for each, sets in lacking.items()
        )
        blocks.append(missing("Ingredients without all seeds", f"runs of seeds {seeds}", GRID))
    return blocks


def equal_sharpness(results: Sequence[Result]) -> Block:
    """The default beside its rivals where every image has been made equally sharp."""
    name, rows, used = "The default of egmf at equal sharpness", [], []
    for dataset in DATASETS:
        own = ours(results, dataset, "equalised")
        for detector, preset in (OURS, *_rivals(results)):
            words = {"dataset": dataset, "detector": detector, "preset": preset}
            runs = select(results, **words, variant="equalised")
            if not runs:
                continue
            used += runs
            plain = [r for r in select(results, **words) if r["seed"] in {run["seed"] for run in runs}]
            first = [cell(run["metrics"]["det_auroc"]) for run in runs if run["seed"] == 0]
            gap = None if (detector, preset) == OURS else image_difference(own, runs)
            verdict = gap.text + f", {gap.verdict}" if gap else ""
            means = (over_seeds([value(run) for run in each]) for each in (runs, plain))
            rows.append((dataset, who(detector, preset), *(first or ["-"]), *means, verdict))
    if not any(row[1] == who(*OURS) for row in rows):
        return missing(name, "the default's runs of variant equalised", GRID)
    header = ("set", "detector", "seed 0", "over seeds", "not equalised", "egmf minus rival")
    caption = (
        "Percent, det_auroc; not equalised: on the same seeds. Every image reduced to 128 px by area averaging and "
        "brought back bicubically, then fitted and tested anew. Differences on common seeds. "
        f"{PAIRED} {provenance(used)}"
    )
    return Table(name, header, rows, caption)


def learning_block(learning: dict[str, Any] | None) -> Block:
    """Metrics over the number of normal images fitted."""
    name = "Learning curve of the default of egmf, busi"
    if not learning:
        return missing(name, "benchmarks/results/learning_curve-busi.json", CURVE)
    rows = [
        (detector, str(n), *(over_seeds(values[metric]) for metric in METRICS["busi"]))
        for (detector, n), values in sorted(_curve(learning).items())
    ]
    seeds = ", ".join(sorted({str(row["seed"]) for row in learning["rows"]}))
    caption = (
        "Percent, mean over seeds (lowest to highest) of n normal images fitted; each seed's test images are the same "
        f"for every n. Weights label {learning.get('weights', 'not stated')}; seeds {seeds}; epochs closed form; "
        f"commit {learning['commit']}."
    )
    return Table(name, ("detector", "n", *METRICS["busi"]), rows, caption)


def learning_picture(learning: dict[str, Any]) -> bytes:
    """The learning curve -> PNG: a panel per metric, percent over n, bars from the lowest to the highest seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.6), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    curve = _curve(learning)
    for axes, metric in zip(figure.subplots(1, 3), METRICS["busi"], strict=True):
        for (colour, dashes), detector in zip(STYLES, sorted({name for name, _ in curve}), strict=False):
            found = sorted((n, values[metric]) for (name, n), values in curve.items() if name == detector)
            drawn = [(n, 100 * np.array(values)) for n, values in found if values]
            means = np.array([values.mean() for _, values in drawn])
            low, high = (np.array([end(values) for _, values in drawn]) for end in (np.min, np.max))
            look = {"color": colour, "linestyle": dashes, "marker": "o", "capsize": 3, "label": detector}
            axes.errorbar([n for n, _ in drawn], means, yerr=[means - low, high - means], **look)
        axes.set(xlabel="normal images fitted", ylabel=f"{metric} (%)")
        axes.grid(visible=True, color="#dddddd", linewidth=0.6)
        axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


# Cells


def missing(name: str, what: str, command: str) -> Text:
    """A block that says what is not there yet, and what makes it."""
    return Text(name, [f"Missing: {what}. Made by: {command}"])


def _rivals(results: Sequence[Result]) -> list[tuple[str, str]]:
    return [each for each in all_detectors(results) if each != OURS]


def _lacking(runs: Sequence[Result]) -> str:
    """The seeds that are not there: "3 4", "all"; empty for none."""
    seeds = sorted(set(SEEDS) - {run["seed"] for run in runs})
    return "all" if len(seeds) == len(SEEDS) else " ".join(map(str, seeds))


def _reached(good: bool, runs: Sequence[Result]) -> str:
    part = f" (without seeds {_lacking(runs)})" if _lacking(runs) else ""
    return ("yes" if good else "no") + part


def _goal_row(runs: Sequence[Result], dataset: str, metric: str, goal: float) -> tuple[str, ...]:
    values = known(runs, metric)
    first = [cell(run["metrics"][metric]) for run in runs if run["seed"] == 0]
    reached = _reached(mean_of(values) >= goal, runs) if values else "not measured"
    return (dataset, metric, f">= {percent(goal)}", over_seeds(values), *(first or ["-"]), reached)


def _versus(own: Sequence[Result], theirs: Sequence[Result], metric: str) -> tuple[str, ...]:
    """Seeds compared, both means on them, difference, verdict."""
    gap = difference(own, theirs, metric)
    if gap is None:
        return ("none", "-", "-", "-", "no common seed")
    means = (percent(_common_mean(runs, metric, gap)) for runs in (own, theirs))
    return (" ".join(map(str, gap.seeds)), *means, gap.text, gap.verdict)


def _common_mean(runs: Sequence[Result], metric: str, gap: Difference) -> float:
    return mean_of([value(run, metric) for run in runs if run["seed"] in gap.seeds])


def _gain_cell(runs: Sequence[Result], metric: str, gain: Difference | None) -> str:
    if gain is None:
        return "-"
    mean = percent(_common_mean(runs, metric, gain))
    if metric == "det_auroc":
        return f"{mean}; gain {gain.text}, n = {len(gain.seeds)}"
    low, high = min(gain.values), max(gain.values)
    ends = f" ({points(low)} to {points(high)})" if len(gain.seeds) > 1 else ""
    return f"{mean}; gain {points(gain.mean)}{ends}, n = {len(gain.seeds)}"


def _ingredient(gains: dict[tuple[str, str], Difference | None]) -> str:
    """Whether the ingredient helps, in words."""
    parts = []
    for (dataset, metric), gain in gains.items():
        if gain is None:
            continue
        if metric == "det_auroc":
            word = {1: "helps", -1: "harms", 0: "no difference shown"}[gain.sign]
        elif len(gain.values) < MIN_SEEDS or min(gain.values) <= 0 <= max(gain.values):
            word = "no difference shown"
        else:
            word = f"{'higher' if gain.mean > 0 else 'lower'} with it on every seed"
        parts.append(f"{dataset} {metric}: {word}")
    return "; ".join(parts) or "no results yet"


def _curve(learning: dict[str, Any]) -> dict[tuple[str, int], dict[str, list[float]]]:
    """(detector, n) -> metric -> values over seeds."""
    curve: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in learning["rows"]:
        values = curve.setdefault((row.get("detector", "egmf"), row["n"]), {m: [] for m in METRICS["busi"]})
        for metric in METRICS["busi"]:
            if row[metric] is not None:
                values[metric].append(row[metric])
    return curve
