"""How far an exported graph is from the model it was made from, on images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

import numpy as np

from umiad.agreement import map_difference, share
from umiad.calibration import Calibration
from umiad.cases import expand
from umiad.data import list_images
from umiad.errors import InputError
from umiad.exported import Parity
from umiad.fitted import FittedModel
from umiad.fitting import usable_images
from umiad.phantoms import draw_phantom
from umiad.preprocess import from_array, original_size, to_input
from umiad.runtimes import Run
from umiad.types import Case, Image

BOUND = 1e-4
"""Largest difference, as a share of a map's range and of an image score, with which a model is exported."""
BATCH = 3
MOST_IMAGES = 64
"""Of the images that are named, so many are compared, evenly chosen."""
PHANTOMS = 12


def phantom_images(size: int) -> list[Image]:
    """Generated images, the second half with lesions, for where no image is named."""
    drawn = (
        draw_phantom(np.random.default_rng([size, k]), size=size, lesions=k // (PHANTOMS // 2))[0]
        for k in range(PHANTOMS)
    )
    return [image for k, pixels in enumerate(drawn) for image in from_array(pixels, name=f"phantom {k}")]


def named_images(model: FittedModel, paths: Sequence[str | os.PathLike[str]]) -> list[Image]:
    """Up to MOST_IMAGES of the images among files and folders, read as the model reads them.

    Raises InputError where there is none, or where one cannot be read.
    """
    options = model.file_options()
    found, _ = list_images(paths, follow=options.follow)
    cases = expand((Case(file) for file in found), options)
    if not cases:
        raise InputError(os.fspath(paths[0]), "no images found, expected some to compare on")
    step = max(1.0, len(cases) / MOST_IMAGES)
    chosen = [cases[int(k * step)] for k in range(min(len(cases), MOST_IMAGES))]
    return list(usable_images(chosen))


def measure(
    model: FittedModel, run: Run, images: Sequence[Image], *, source: Literal["images", "phantoms"]
) -> Parity:
    """Score images with both, in batches of 1 and of 3, and compare maps, image scores and decisions."""
    preprocessing = model.config.preprocessing
    inputs = np.stack([to_input(image, preprocessing) for image in images])
    sizes = [original_size(image, preprocessing) for image in images]
    rows = []
    for batch in (1, BATCH):
        for start in range(0, len(images), batch):
            part = slice(start, start + batch)
            rows += _differences(
                model.run(inputs[part], sizes[part]), run(inputs[part]), model.config.calibration
            )
    maps, scores, decisions = zip(*rows, strict=True)
    verdicts = [verdict for each in decisions for verdict in each]
    return Parity(
        images=len(images),
        source=source,
        batch=BATCH,
        map_relative=max(maps),
        score_relative=max(scores),
        decisions=len(verdicts),
        same_decisions=verdicts.count("same"),
        ties=verdicts.count("tie"),
        bound=BOUND,
    )


def _differences(
    expected: tuple[np.ndarray, np.ndarray],
    found: tuple[np.ndarray, np.ndarray],
    calibration: Calibration | None,
) -> list[tuple[float, float, list[str]]]:
    """Per image of a batch: difference of map and score, and the verdict on each decision."""
    rows = []
    for map_, score, other_map, other_score in zip(*expected, *found, strict=True):
        decisions = []
        if calibration is not None:
            decisions = [
                _verdict(float(score), float(other_score), calibration.image_threshold),
                _verdict(float(map_.max()), float(other_map.max()), calibration.map_threshold),
            ]
        far = share(abs(float(other_score) - float(score)), abs(float(score)))
        rows.append((map_difference(map_, other_map), far, decisions))
    return rows


def _verdict(expected: float, found: float, threshold: float) -> str:
    if (expected > threshold) == (found > threshold):
        return "same"
    near = abs(expected - threshold) <= BOUND * max(abs(threshold), abs(expected))
    return "tie" if near else "different"
