"""Figure 9: the same images under every fitted detector, map and outline at the detector's own threshold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
from PIL import ImageDraw, ImageFont

from figure_common import SEED, Job, Parts, Shown, save
from umiad.api import FittedModel
from umiad.fitting import case_image
from umiad.overlay import ColourScale, colour_scale, draw_image, draw_overlay
from umiad.preprocess import resize_map, resize_mask
from umiad.types import Case, Finding

DETECTORS = (
    ("egmf", "default"),
    ("egmf", "ablation"),
    ("patchcore", "default"),
    ("padim", "default"),
    ("posgauss", "default"),
    ("cflow", "quick"),
    ("uflow", "quick"),
    ("msflow", "quick"),
    ("fastflow", "quick"),
    ("intensity", "default"),
)
COLUMNS, CELL, HEAD, TITLE, GAP = 6, 240, 34, 66, 8
PIXEL_FPR = 0.01
"""Share of the pixels of held-out normal images above the threshold of the outlines.

A first picture of busi took the model's own map threshold, which holds for a whole image ("map_threshold" in the
results: on 19 or 20 held-out images their largest value). At it almost nothing is outlined by any detector, so that
maps could not be compared; this share was set then, once, for all detectors and sets.
"""
INK, QUIET, ALARM = (24, 24, 24), (96, 96, 96), (190, 40, 0)


def figure9(job: Job, sets: Sequence[str], detectors: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """One picture per set: each image with its ground truth, then every detector's map; all numbers."""
    numbers: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    for name in sets:
        parts = Parts(job, name)
        shown = parts.chosen()
        found: dict[str, list[Finding]] = {}
        scales: dict[str, ColourScale] = {}
        for detector, preset in detectors:
            model = job.model(name, detector, preset)
            label = f"{detector}, {preset}"
            found[label] = [finding(model, each) for each in shown]
            scales[label] = scale_of(model, parts.cases("holdout"))
            info = model.info
            facts[label] = {key: info[key] for key in ("preset", "epochs", "weights", "seed")}
            numbers.setdefault(name, {})[label] = {
                "pixel_threshold": scales[label].threshold,
                "map_threshold": info["map_threshold"],
                "image_threshold": info["image_threshold"],
                "images": [
                    judged(one, each, scales[label]) for one, each in zip(found[label], shown, strict=True)
                ],
            }
        numbers[name]["shown"] = [each.facts() for each in shown]
        weights = next(iter(facts.values()))["weights"]
        save(sheet(name, shown, found, scales, weights=str(weights)), f"fig9-{name}")
    return {"sets": numbers, "detectors": facts, "seed": SEED, "size": job.size, "weights": weights}


def finding(model: FittedModel, shown: Shown) -> Finding:
    """What a model says of one image, the map in the image's pixels."""
    (image, value, small_map) = next(iter(model.score_images([shown.image])))
    return model.finding(image, value, small_map)


def scale_of(model: FittedModel, normal: Sequence[Case]) -> ColourScale:
    """The model's one colour scale, tied to the value that `PIXEL_FPR` of the pixels of `normal` images exceed."""
    maps = np.stack([small_map for _, _, small_map in model.score_images(map(case_image, normal))])
    return colour_scale(float(np.quantile(maps, 1 - PIXEL_FPR)), model.config.map_reference)


def judged(found: Finding, shown: Shown, scale: ColourScale) -> dict[str, Any]:
    """Scores and the outline against the mask: share outlined, and Dice where there is a mask."""
    outlined = np.zeros(shown.image.size, dtype=bool)
    if scale.threshold is not None:
        outlined = found.anomaly_map > scale.threshold
    dice = None
    if shown.mask is not None:
        dice = round(float(2 * (outlined & shown.mask).sum() / (outlined.sum() + shown.mask.sum())), 4)
    return {
        "image_score": float(found.image_score),
        "flagged": found.above_threshold,
        "p_value": found.p_value,
        "map_maximum": float(found.anomaly_map.max()),
        "outlined_share": round(float(outlined.mean()), 5),
        "dice": dice,
    }


def sheet(
    name: str,
    shown: Sequence[Shown],
    found: dict[str, list[Finding]],
    scales: dict[str, ColourScale],
    *,
    weights: str,
) -> PIL.Image.Image:
    """All cells of one set: per image the original, then one cell per detector."""
    heights = [cell_size(each)[1] + HEAD for each in shown]
    lines = -(-(1 + len(found)) // COLUMNS)
    bands = [lines * height + GAP for height in heights]
    width = COLUMNS * (CELL + GAP) + GAP
    picture = PIL.Image.new("RGB", (width, TITLE + sum(bands)), "white")
    draw = ImageDraw.Draw(picture)
    _title(draw, name, weights)
    _legend(picture, draw, width)
    top = TITLE
    for row, (each, height, band) in enumerate(zip(shown, heights, bands, strict=True)):
        draw.line((0, top - 3, width, top - 3), fill=(200, 200, 200))
        cells = [
            _original(each),
            *(_judged_cell(label, found[label][row], each, scales[label]) for label in found),
        ]
        for place, (panel, heading, line, colour) in enumerate(cells):
            x, y = GAP + place % COLUMNS * (CELL + GAP), top + place // COLUMNS * height
            draw.text((x, y), heading, fill=INK, font=_font(13))
            draw.text((x, y + 16), line, fill=colour, font=_font(11))
            picture.paste(panel, (x, y + HEAD - 3))
        top += band
    return picture


def cell_size(shown: Shown) -> tuple[int, int]:
    """Width and height of a panel: the image fits into a square of `CELL`."""
    height, width = shown.image.size
    factor = CELL / max(height, width)
    return max(1, round(width * factor)), max(1, round(height * factor))


def _small(shown: Shown) -> Shown:
    """The picture and its mask at the size of a panel, so that lines drawn on them stay as wide as they are."""
    width, height = cell_size(shown)
    pixels = np.stack([resize_map(channel, (height, width)) for channel in shown.image.pixels])
    mask = None if shown.mask is None else resize_mask(shown.mask, (height, width))
    return dataclasses.replace(shown, image=dataclasses.replace(shown.image, pixels=pixels), mask=mask)


def _original(shown: Shown) -> tuple[PIL.Image.Image, str, str, tuple[int, int, int]]:
    small = _small(shown)
    panel = PIL.Image.fromarray(draw_image(small.image, mask=small.mask)).resize(cell_size(shown))
    if shown.role == "normal":
        line = "normal: nothing to be outlined"
    elif shown.share is None:
        line = "abnormal; nobody drew the lesion"
    else:
        line = f"{shown.role}: {100 * shown.share:.1f} % of the image"
    return panel, shown.name, line, QUIET


def _judged_cell(
    label: str, found: Finding, shown: Shown, scale: ColourScale
) -> tuple[PIL.Image.Image, str, str, tuple[int, int, int]]:
    small = _small(shown)
    anomaly_map = resize_map(found.anomaly_map, small.image.size)
    drawn = draw_overlay(small.image, anomaly_map, scale=scale, mask=small.mask, beside=False)
    height, width = draw_image(small.image).shape[:2]
    panel = PIL.Image.fromarray(drawn[:height, :width]).resize(cell_size(shown))
    facts = judged(found, shown, scale)
    dice = "" if facts["dice"] is None else f", Dice {facts['dice']:.2f}"
    flagged = "image flagged" if facts["flagged"] else "image not flagged"
    words = f"outlined {100 * facts['outlined_share']:.1f} %{dice}; {flagged}"
    return panel, label, words, ALARM if facts["flagged"] else QUIET


def _title(draw: ImageDraw.ImageDraw, name: str, weights: str) -> None:
    draw.text((GAP, 4), f"Figure 9, {name}: the same images under every detector", fill=INK, font=_font(17))
    draw.text(
        (GAP, 27),
        "Images chosen by label and lesion size alone. Dashed green: drawn lesion. White-black line: above the "
        f"detector's threshold, which {100 * PIXEL_FPR:.0f} % of the pixels",
        fill=QUIET,
        font=_font(11),
    )
    draw.text(
        (GAP, 42),
        f"of held-out normal images exceed. Flagged: image score above its threshold. Weights {weights}; seed {SEED}.",
        fill=QUIET,
        font=_font(11),
    )


def _legend(picture: PIL.Image.Image, draw: ImageDraw.ImageDraw, width: int) -> None:
    """One bar for all: colours stand for the same multiple of each detector's own threshold."""
    bar, left, top = 420, width - 420 - 3 * GAP - 90, 12
    scale = ColourScale(low=0.5, high=2.0, threshold=1.0)
    place = np.linspace(0.0, 1.0, bar)
    colour, opacity = scale.colours(place)
    strip = 96.0 + (colour - 96.0) * (opacity / opacity.max())[:, None]
    pixels = np.repeat(np.round(strip).astype(np.uint8)[None], 12, axis=0)
    picture.paste(PIL.Image.fromarray(pixels), (left, top))
    for where, words in ((0.0, "half or less"), (0.5, "threshold of the detector"), (1.0, "twice or more")):
        x = left + round(where * (bar - 1))
        draw.line((x, top + 12, x, top + 16), fill=INK)
        draw.text((x, top + 18), words, fill=INK, font=_font(11), anchor="ma")


def _font(size: int) -> Any:
    return ImageFont.load_default(size=size)
