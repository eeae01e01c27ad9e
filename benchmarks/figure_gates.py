"""What the paper does not show: the EGM's weights and edge features, and what becomes of them at a blurred border.

The paper says that the EGM attends to edges, with weights that adapt (Eq. 1-5). Here a lesion's border is blurred and
everything else left as it is; if the weights follow edges, they must change there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from figure_common import HOLDOUT, SEED, Job, Parts, Shown, canvas, interval, save, span
from umiad.api import build
from umiad.config import Preprocessing
from umiad.detectors.guards import evaluating
from umiad.preprocess import to_input

MEASURED, BAND, BLUR = 40, 1 / 32, 1 / 40
"""Images measured; half width of the border band and the blur's standard deviation, as a share of the image's edge."""
INSIDE, OUTSIDE = 0.5, 0.0
"""Share of a cell that the band must cover to count as border, and may cover to count as elsewhere."""
FIELDS = ("sobel", "gate_fine", "gate_coarse", "f_edge")
READ, TEXT = "readout", 3
"""Edges read out of F_edge; the column with words in place of a difference, since the two weights add up to 1."""
WORDS = {
    "sobel": "Sobel edges (training target)",
    "gate_fine": "weight of F1' (fine)",
    "gate_coarse": "weight of F2 (coarse)",
    "f_edge": "length of F_edge",
}


def gates(job: Job, dataset: str, preset: str) -> dict[str, Any]:
    """Draw one lesion before and after its border is blurred; measure over many, trained and untrained."""
    parts = Parts(job, dataset)
    ranks = np.linspace(0, 1, min(MEASURED, len(parts.abnormal)))
    cases = [parts.at(float(rank), "abnormal") for rank in ranks]
    if cases[0].mask is None:
        raise SystemExit(f"{dataset}: no lesion masks, expected a set that has them")
    model = job.model(dataset, "egmf", preset)
    trained: Any = model.detector
    untrained: Any = build(
        "egmf", preset=preset, weights=job.weights, size=job.size, seed=SEED, settings=job.settings
    )
    numbers = {
        name: measure(detector, cases, job.size)
        for name, detector in (("trained", trained), ("untrained", untrained))
    }
    shown = parts.chosen()[1]
    facts = {
        "dataset": dataset,
        "preset": preset,
        "epochs": model.info["epochs"],
        "weights": model.info["weights"],
        "seed": SEED,
        "holdout": HOLDOUT,
        "size": job.size,
        "shown": shown.facts(),
        "blur_sigma_px": job.size * BLUR,
        "band_half_width_px": band_width(job.size),
    }
    draw(trained, shown, numbers, facts)
    return {**facts, **numbers}


def band_width(size: int) -> int:
    """Half width of the border band in pixels of the network's input."""
    return max(2, round(size * BAND))


def border(mask: np.ndarray) -> np.ndarray:
    """The band along the outline of mask bool [S,S]."""
    steps = band_width(len(mask))
    grown = ndimage.binary_dilation(mask, iterations=steps)
    return grown & ~ndimage.binary_erosion(mask, iterations=steps)


def blurred(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Image [3,S,S] with the border of the lesion blurred by a Gaussian, blended in softly; float32."""
    size = len(mask)
    soft = ndimage.gaussian_filter(border(mask).astype(np.float64), size * BLUR / 2)
    soft = np.clip(soft / max(soft.max(), 1e-9), 0, 1)
    smooth = ndimage.gaussian_filter(image, (0, size * BLUR, size * BLUR))
    mixed: np.ndarray = (image + soft * (smooth - image)).astype(np.float32)
    return mixed


def fields(detector: Any, image: np.ndarray) -> dict[str, np.ndarray]:
    """Sobel edges, both weights, the length of F_edge and the edges read out of it, of one input [3,S,S].

    Each [S/8,S/8]. What reads them out is the head that trains the EGM (`umiad.nn.guidance.StopGradient`).
    """
    prepared = detector.prepare(torch.from_numpy(image)[None])
    edge = detector.network.edge
    with evaluating(detector.module):
        f1p = edge.down(prepared["f1"])
        weights: Tensor = edge.gates(f1p, prepared["f2"])[0]
        f_edge = edge(prepared["f1"], prepared["f2"])
        length = torch.linalg.vector_norm(f_edge[0], dim=0)
        readout = detector.network.guidance.edge_head.project(f_edge)[0, 0]
        found = dict(zip((*FIELDS, READ), (prepared["edges"][0, 0], *weights, length, readout), strict=True))
    return {name: values.detach().numpy() for name, values in found.items()}


def cells(mask: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Cells bool [side,side] that count as border of mask bool [S,S], and those that the blur does not touch."""
    share = border(mask).reshape(side, len(mask) // side, side, -1).mean((1, 3))
    near = ndimage.binary_dilation(share > OUTSIDE, iterations=3)
    return share >= INSIDE, ~near


def measure(detector: Any, cases: Sequence[Shown], size: int) -> dict[str, Any]:
    """Over images: the fields at the border, elsewhere, what blurring changes, and how they follow Sobel edges."""
    rows = [row for each in cases if (row := _one(detector, each, size))]
    return {key: interval([row[key] for row in rows]) for key in rows[0]} if rows else {}


def _one(detector: Any, shown: Shown, size: int) -> dict[str, float]:
    image, mask = to_input(shown.image, Preprocessing(size=size)), shown.mask_at(size)
    before, after = fields(detector, image), fields(detector, blurred(image, mask))
    at, away = cells(mask, len(before["sobel"]))
    if not at.any() or not away.any():
        return {}
    row: dict[str, float] = {}
    for name in ("sobel", "gate_fine", "f_edge", READ):
        row[f"{name} at border"] = float(before[name][at].mean())
        row[f"{name} elsewhere"] = float(before[name][away].mean())
        row[f"{name} change at border"] = float((after[name] - before[name])[at].mean())
        row[f"{name} change elsewhere"] = float((after[name] - before[name])[away].mean())
    for name in ("gate_fine", "f_edge", READ):
        row[f"{name} r with sobel"] = _r(before[name], before["sobel"])
        change, edges = (after[name] - before[name])[at], (after["sobel"] - before["sobel"])[at]
        row[f"{name} size of change at border"] = float(np.abs(change).mean())
        row[f"{name} change r with change of sobel"] = _r(change, edges)
    row["gate_fine spread in image"] = float(before["gate_fine"].std())
    return row


def _r(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation; 0 where one of both does not vary."""
    if min(first.size, second.size) < 2 or not (np.ptp(first) and np.ptp(second)):
        return 0.0
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])


def draw(detector: Any, shown: Shown, numbers: dict[str, Any], facts: dict[str, Any]) -> None:
    """Three lines: as it is, border blurred, difference; then the numbers in words."""
    size = facts["size"]
    image, mask = to_input(shown.image, Preprocessing(size=size)), shown.mask_at(size)
    pair = [image, blurred(image, mask)]
    found = [fields(detector, each) for each in pair]
    figure = canvas(1590, 960)
    axes = figure.subplots(3, 1 + len(FIELDS), gridspec_kw={"width_ratios": [1.3, 1.1, 1.1, 1.35, 1.1]})
    band = border(mask)
    low, high = float(image.mean(0).min()), float(image.mean(0).max())
    for line, each, words in zip(axes, pair, ("as it is", "border blurred"), strict=False):
        line[0].imshow(each.mean(0), cmap="gray", vmin=low, vmax=high)
        line[0].contour(band, [0.5], colors="#00e640", linewidths=0.9)
        line[0].set_title(f"{words}\n(green: border band)", fontsize=10)
    for column, name in enumerate(FIELDS, start=1):
        values = [each[name] for each in found]
        bottom, top = min(map(np.min, values)), max(map(np.max, values))
        change = values[1] - values[0]
        reach = float(np.abs(change).max()) or 1.0
        looks = [(each, "magma", bottom, top) for each in values]
        looks += [(change, "RdBu_r", -reach, reach)] if column != TEXT else []
        for axis, (each, colours, start, end) in zip(axes[:, column], looks, strict=False):
            panel = axis.imshow(each, cmap=colours, vmin=start, vmax=end, extent=(0, size, size, 0))
            axis.contour(
                np.arange(size) + 0.5, np.arange(size) + 0.5, band, [0.5], colors="#00e640", linewidths=0.7
            )
            figure.colorbar(panel, ax=axis, shrink=0.75)
        axes[0, column].set_title(WORDS[name], fontsize=10)
        axes[2, column].set_title("" if column == TEXT else "blurred - as it is", fontsize=10)
    for axis in axes.flat:
        axis.set_axis_off()
    for column, words in zip((0, TEXT), _summary(numbers), strict=True):
        place = axes[2, column]
        place.text(0, 1, words, va="top", fontsize=8, transform=place.transAxes, in_layout=False)
    figure.suptitle(
        f"Does the EGM attend to edges? {shown.name} ({facts['dataset']}); egmf, preset {facts['preset']}, "
        f"{facts['epochs']} epochs, seed {SEED}, weights {facts['weights']}, {size} px, "
        f"{len(found[0]['sobel'])} x {len(found[0]['sobel'])} cells.\nThe lesion's border alone is blurred (Gaussian, "
        f"sigma {facts['blur_sigma_px']:.1f} px). The two weights add up to 1 in every cell.",
        fontsize=11,
    )
    save(figure, "gates-blurred-border")


def _summary(numbers: dict[str, Any]) -> tuple[str, str]:
    """The measurements in words, for the picture: edges and weights, and edge features with the verdict."""
    trained, plain = numbers["trained"], numbers["untrained"]
    net = trained["gate_fine change at border"]
    shown = net["ci95"] is not None and (net["ci95"][0] > 0 or net["ci95"][1] < 0)
    weights = (
        f"Mean [95 %] over {net['n']} lesions",
        f"Sobel at border {span(trained['sobel at border'])}",
        f"  change by blur {span(trained['sobel change at border'])}",
        "",
        f"Weight of F1' at border {span(trained['gate_fine at border'])}",
        f"  elsewhere {span(trained['gate_fine elsewhere'])}",
        f"  net change by blur {span(net, 3)}",
        f"  mean |change| {span(trained['gate_fine size of change at border'])}",
        f"  r with Sobel's change {span(trained['gate_fine change r with change of sobel'])}",
        f"  r with Sobel {span(trained['gate_fine r with sobel'])}",
        f"  untrained: r {span(plain['gate_fine r with sobel'])}",
    )
    features = (
        f"Length of F_edge at border {span(trained['f_edge at border'])}",
        f"  net change by blur {span(trained['f_edge change at border'])}",
        f"  r with Sobel {span(trained['f_edge r with sobel'])}",
        f"  untrained: r {span(plain['f_edge r with sobel'])}",
        "",
        f"Edges read out of F_edge: r {span(trained['readout r with sobel'])}",
        f"  net change by blur {span(trained['readout change at border'], 3)}",
        "",
        "A net shift of the weights is shown" if shown else "No net shift of the weights is shown",
        "where the border is blurred.",
    )
    return "\n".join(weights), "\n".join(features)
