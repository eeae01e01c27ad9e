"""The paper's Figures 3, 8 and 9 from our models and results, and one it lacks: the EGM's gates at a blurred border.

python benchmarks/figures.py --data ../shared/data --weights FILE [3 8 9 gates]

Writes docs/images/paper-*.png and benchmarks/results/figures.json. Figures 3 and 9 show, of each set, the abnormal
test images at one eighth and seven eighths of all, ordered by lesion size (where nobody drew lesions: in the order of
files), and the normal one in the middle: chosen by labels and lesions alone. Models are fitted with a hold-out of 0.2,
which gives their thresholds; --models FOLDER keeps them. No detector was chosen or changed after these pictures. What
Figure 9 outlines was: see `figure_maps.PIXEL_FPR`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from rich.console import Console
from torch.nn.functional import adaptive_avg_pool2d

import figure_gates
import figure_maps
from figure_common import Job, Parts, canvas, grey, interval, save, span
from paper_protocol import CODE, RESULTS, write
from printed import reasons
from results_store import DATASETS, Result, load_named, load_results, paper_table, presets, select, title
from table3 import BESIDE, METHODS
from umiad.api import build
from umiad.charts import BLUE, GREY, VERMILION
from umiad.config import Preprocessing
from umiad.fitting import case_image
from umiad.nn.edge import sobel_target
from umiad.preprocess import to_input
from umiad.progress import RichReporter

Numbers = dict[str, Any]
SCALES = ("F1", "F2", "F3", "F4")
SCORES = (
    ("det_auroc", "detection AUROC"),
    ("seg_auroc", "pixel AUROC"),
    ("seg_aupro", "AUPRO, false-positive rate up to 0.3"),
)
DOT: Numbers = {"marker": "o", "linestyle": "", "color": BLUE, "zorder": 3}
INTERVAL: Numbers = {"color": BLUE, "linewidth": 6, "alpha": 0.35, "zorder": 1, "solid_capstyle": "butt"}
SPREAD: Numbers = {"color": BLUE, "linewidth": 1.2, "zorder": 2}
PRINTED: Numbers = {
    "marker": "D",
    "linestyle": "",
    "markersize": 7,
    "markerfacecolor": "none",
    "markeredgewidth": 1.6,
    "color": VERMILION,
    "zorder": 4,
}
DOUBTED: Numbers = {**PRINTED, "color": "#8a8a8a"}
LEGEND = (
    (DOT, "ours, seed 0"),
    (INTERVAL, "its 95 % interval over test images"),
    (SPREAD, "lowest to highest of all seeds"),
    (PRINTED, "paper, as printed"),
    (DOUBTED, "paper, suspect value"),
)


# Figure 3


def figure3(job: Job, sets: Sequence[str]) -> Numbers:
    """Feature heat maps F1..F4 of one image per set, and how much they follow its edges."""
    detector: Any = build("egmf", preset="ablation", weights=job.weights, size=job.size)
    figure, label = canvas(1580, 90 + 300 * len(sets)), detector.config.weights
    axes = figure.subplots(len(sets), 1 + len(SCALES), squeeze=False)
    rows, panel = {}, None
    for line, name in zip(axes, sets, strict=True):
        parts = Parts(job, name)
        shown = parts.chosen()[1]
        norms, _ = _norms(detector, [shown.image], job.size)
        normal = [case_image(case) for case in parts.cases("train")]
        agreement = [interval(each) for each in _agreement(*_norms(detector, normal, job.size))]
        rows[name] = {**shown.facts(), "r_with_sobel_on_normal": dict(zip(SCALES, agreement, strict=True))}
        line[0].imshow(grey(shown.image), cmap="gray", vmin=0, vmax=1)
        line[0].set_title(f"{name}, {shown.role}\n{shown.case.path.name}", fontsize=10, parse_math=False)
        for axis, scale, (cells,), found in zip(line[1:], SCALES, norms, agreement, strict=True):
            extent = (0, shown.image.size[1], shown.image.size[0], 0)
            top = _inner(cells).max()
            panel = axis.imshow(
                cells / top, cmap="magma", vmin=0, vmax=1, extent=extent, interpolation="nearest"
            )
            sides = " x ".join(map(str, cells.shape))
            axis.set_title(f"{scale}, {sides} cells\nr with edges {span(found)}", fontsize=10)
    for axis in axes.flat:
        axis.set_axis_off()
    words = "length of the feature vector / its largest value off the outermost cells"
    figure.colorbar(panel, ax=axes, location="right", shrink=0.6, aspect=40, pad=0.02, label=words)
    figure.suptitle(
        "Figure 3: what the frozen ResNet18 responds to. r: correlation of the map with the image's Sobel edges on the "
        "same cells,\nmean [95 %] over the normal images fitted on, without the outermost cells (bright from zero "
        f"padding). Weights {label}; {job.size} px.",
        fontsize=11,
    )
    save(figure, "fig3-features")
    return {"sets": rows, "weights": label, "seed": 0, "epochs": 0, "size": job.size}


def _inner(cells: np.ndarray) -> np.ndarray:
    """All but the outermost ring of cells; all where nothing else is left."""
    return cells[..., 1:-1, 1:-1] if min(cells.shape[-2:]) > 3 else cells


def _norms(detector: Any, images: Sequence[Any], size: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Length of the feature vector per cell, per scale [N,h,w], and Sobel edges [N,S/4,S/4] of images."""
    preprocessing = Preprocessing(size=size)
    found: list[list[np.ndarray]] = [[] for _ in SCALES]
    edges = []
    for image in images:
        inputs = torch.from_numpy(to_input(image, preprocessing))[None]
        prepared = detector.prepare(inputs)
        for place, scale in enumerate(SCALES):
            found[place].append(torch.linalg.vector_norm(prepared[scale.lower()][0], dim=0).numpy())
        edges.append(sobel_target(inputs.mean(1, keepdim=True), (size // 4, size // 4))[0, 0].numpy())
    return [np.stack(each) for each in found], np.stack(edges)


def _agreement(norms: Sequence[np.ndarray], edges: np.ndarray) -> list[list[float]]:
    """Pearson's r of each image's map and its edges averaged to the same cells, per scale."""
    rows = []
    for scale in norms:
        pooled = adaptive_avg_pool2d(torch.from_numpy(edges)[None], scale.shape[1:])[0].numpy()
        pairs = zip(_inner(scale), _inner(pooled), strict=True)
        rows.append([float(np.corrcoef(a.ravel(), b.ravel())[0, 1]) for a, b in pairs])
    return rows


# Figure 8


def figure8(results: Sequence[Result]) -> Numbers:
    """Ours with intervals beside what the paper prints, per set and metric."""
    lines = _lines()
    figure = canvas(1580, 1720)
    axes = figure.subplots(len(SCORES), len(DATASETS), sharey=True, sharex="row", squeeze=False)
    numbers: Numbers = {}
    for row, (metric, words) in zip(axes, SCORES, strict=True):
        for axis, dataset in zip(row, DATASETS, strict=True):
            found = {
                label: _values(results, dataset, detector, preset, metric)
                for label, _, detector, preset in lines
            }
            numbers[f"{dataset} {metric}"] = _draw_scores(axis, lines, found, (dataset, metric))
            axis.set_title(f"{dataset}: {words}", fontsize=11)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=10)
    used = [run for dataset in DATASETS for line in lines for run in _runs(results, dataset, *line[2:])]
    figure.suptitle(
        "Figure 8: detectors on the three public sets, in percent (of AUROC, 50 is chance). The paper prints no "
        "intervals;\nits value is grey where it is suspect (docs/results.md says why). Rows without a diamond are not "
        "in the paper, detectors without a dot are not run, or not built, here.",
        fontsize=11,
    )
    save(figure, "fig8-performance")
    facts = {key: sorted({str(run[key]) for run in used}) for key in ("weights", "seed", "epochs")}
    return {"panels": numbers, "commits_of_runs": sorted({run["commit"] for run in used}), **facts}


def _lines() -> list[tuple[str, str, str, str]]:
    """Label, the paper's name of it ("" = not in the paper), our detector ("" = not built), preset."""
    found = []
    for method, detector in (*METHODS[::-1], *(("", each) for each in BESIDE)):
        for preset in presets(detector) if detector else ("",):
            ours = method and (preset == presets(detector)[-1] if detector else True)
            found.append(
                (title(detector, preset) if detector else method, method if ours else "", detector, preset)
            )
    return found


def _runs(results: Sequence[Result], dataset: str, detector: str, preset: str) -> list[Result]:
    return select(results, dataset=dataset, detector=detector, preset=preset) if detector else []


def _values(
    results: Sequence[Result], dataset: str, detector: str, preset: str, metric: str
) -> dict[str, Any] | None:
    """Seed 0 with its interval and the range over seeds, in percent; None without a run that has it."""
    runs = [
        run for run in _runs(results, dataset, detector, preset) if metric == "det_auroc" or run["localises"]
    ]
    known = [run for run in runs if run["metrics"][metric]["value"] is not None]
    first = next((run["metrics"][metric] for run in known if run["seed"] == 0), None)
    if first is None:
        return None
    every = [100 * float(run["metrics"][metric]["value"]) for run in known]
    return {
        "seed0": round(100 * first["value"], 2),
        "ci95": first["ci95"] and [round(100 * end, 2) for end in first["ci95"]],
        "over_seeds": [round(min(every), 2), round(max(every), 2)],
        "n_seeds": len(every),
    }


def _draw_scores(
    axis: Axes, lines: Sequence[tuple[str, ...]], ours: dict[str, Any], place: tuple[str, str]
) -> Numbers:
    """One panel; returns its numbers."""
    dataset, metric = place
    printed = {row["method"]: row for row in paper_table(3) if row["dataset"] == dataset}
    numbers: Numbers = {}
    for height, (label, method, _, _) in enumerate(reversed(lines)):
        axis.axhline(height, color="#eeeeee", linewidth=0.8, zorder=0)
        if (found := ours[label]) is not None:
            axis.plot(found["ci95"] or [], [height] * len(found["ci95"] or []), **INTERVAL)
            axis.plot(found["over_seeds"], [height] * 2, **SPREAD)
            axis.plot(found["seed0"], height, **DOT)
        row = printed.get(method)
        if row is not None:
            axis.plot(float(row[metric]), height, **(DOUBTED if reasons(row, metric) else PRINTED))
        paper = row and {"printed": float(row[metric]), "suspect": reasons(row, metric)}
        numbers[label] = {"ours": found, "paper": paper}
    for look, words in LEGEND:
        axis.plot([], [], **look, label=words)
    axis.set_yticks(range(len(lines)), [line[0] for line in reversed(lines)], parse_math=False)
    if not any(ours.values()):
        words = "no lesion masks in the public set:\nours cannot be measured"
        axis.text(0.03, 0.03, words, fontsize=10, color=GREY, transform=axis.transAxes)
    axis.grid(visible=True, axis="x", color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    return numbers


def main() -> None:
    """Draw the figures asked for, and record their numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", nargs="*", help="which of: 3 8 9 gates (all)")
    parser.add_argument("--data", type=Path, required=True, help="folder with busi, brain_mri, head_ct")
    parser.add_argument("--weights", required=True, help="backbone weights, as in umiad fit")
    parser.add_argument("--models", type=Path, help="keep fitted models here, and use those that are there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, RichReporter(Console(stderr=True)) as reporter:
        job = Job(options.data, options.weights, options.models or Path(folder), reporter=reporter)
        drawn: dict[str, Callable[[], Numbers]] = {
            "3": lambda: figure3(job, DATASETS),
            "8": lambda: figure8(load_results()),
            "9": lambda: figure_maps.figure9(job, DATASETS, figure_maps.DETECTORS),
            "gates": lambda: figure_gates.gates(job, "busi", "ablation"),
        }
        for name in options.figures or drawn:
            if name not in drawn:
                parser.error(f"unknown figure {name!r}, expected one of {', '.join(drawn)}")
            record(name, drawn[name]())


def record(name: str, numbers: Numbers) -> None:
    """Put the numbers of one figure into benchmarks/results/figures.json, beside the others'."""
    known = load_named("figures") or {}
    write(RESULTS / "figures.json", {**known, f"figure {name}": {"commit": CODE, **numbers}})


if __name__ == "__main__":
    main()
