"""How far an exported graph is from the model it was made from, on images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from scipy import stats

from umiad.agreement import changed_decisions, map_difference, share
from umiad.calibration import Calibration
from umiad.cases import expand
from umiad.config import Preprocessing
from umiad.data import list_images
from umiad.errors import InputError
from umiad.evaluation import judge, score_cases, score_test
from umiad.exported import BOUND, Loss, Parity
from umiad.fitted import FittedModel
from umiad.fitting import Data, usable_images
from umiad.phantoms import draw_phantom
from umiad.preprocess import from_array, original_size, to_input
from umiad.progress import Reporter
from umiad.runtimes import Run
from umiad.scorer import Scorer
from umiad.types import Case, Image

BATCH = 3
LEAST_OTHERS = 3
"""Images on which 8 bits are judged, at least: fewer have no spread of scores and no order."""
MOST_IMAGES = 64
"""Of the images that are named, so many are compared, evenly chosen."""
PHANTOMS = 12
METRICS = ("det_auroc", "seg_auroc", "seg_aupro")


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
    """Score images with both, in batches of 1 and of 3, and compare maps, image scores and decisions.

    One or two images are in a batch of 3 more than once.
    """
    preprocessing = model.config.preprocessing
    inputs = np.stack([to_input(image, preprocessing) for image in images])
    sizes = [original_size(image, preprocessing) for image in images]
    rows = []
    for batch in (1, BATCH):
        places = [number % len(images) for number in range(max(len(images), batch))]
        for start in range(0, len(places), batch):
            chosen = places[start : start + batch]
            expected = model.run(inputs[chosen], [sizes[place] for place in chosen])
            rows += _differences(expected, run(inputs[chosen]), model.config.calibration)
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


def others(images: Sequence[Image], seen: Sequence[np.ndarray], preprocessing: Preprocessing) -> list[Image]:
    """Those of `images` that do not look like any of `seen` (preprocessed) to the network.

    Raises InputError where fewer than `LEAST_OTHERS` are left: what was fitted to images cannot be judged on them.
    """
    known = {each.tobytes() for each in seen}
    found = [image for image in images if to_input(image, preprocessing).tobytes() not in known]
    if len(found) < LEAST_OTHERS:
        raise InputError(
            images[0].name,
            f"{len(found)} of {len(images)} images to compare on are not among those whose ranges 8 bits are fitted "
            f"to, expected {LEAST_OTHERS} or more others",
        )
    return found


def loss(
    model: FittedModel, run: Run, images: Sequence[Image], *, source: Literal["images", "phantoms"]
) -> Loss:
    """Score images with both, where the graph `run` is in 8 bits: how far they are apart."""
    expected, found = _all(model, images), _all(model, images, run=run)
    maps = [map_difference(*pair) for pair in zip(expected[0], found[0], strict=True)]
    spread = float(np.std(expected[1]))
    most = float(np.abs(found[1] - expected[1]).max())
    calibration, changed = model.config.calibration, 0
    if calibration is not None:
        changed = changed_decisions(expected, found, calibration)
    return Loss(
        images=len(images),
        source=source,
        map_median=float(np.median(maps)),
        map_most=max(maps),
        score_most=share(most, spread),
        rank_correlation=None if spread == 0 else _rank_correlation(expected[1], found[1]),
        decisions=0 if calibration is None else 2 * len(images),
        changed=changed,
    )


def _rank_correlation(expected: np.ndarray, found: np.ndarray) -> float:
    """Spearman's, of scores that are not all alike; 0 where `found` are, or are no numbers: no order is left."""
    if not np.isfinite(found).all() or np.ptp(found) == 0:
        return 0.0
    return float(stats.spearmanr(expected, found).statistic)


def accuracy(
    model: FittedModel, other: Scorer, data: Data, *, reporter: Reporter
) -> dict[str, tuple[float | None, float | None]]:
    """Metric -> value of the model and of `other` on the test part of labelled `data`; None where undefined.

    Raises InputError where that has no test part, or one that shaped the model (see `evaluation.evaluate_model`).
    """
    test = score_test(model, data, reporter=reporter)
    scores, maps, _ = score_cases(other, test.cases, reporter=reporter)
    both = [
        judge(model, each, n_resamples=0, reporter=reporter).metrics
        for each in (test, replace(test, image_scores=scores, maps=maps))
    ]
    return {name: (both[0][name]["value"], both[1][name]["value"]) for name in METRICS}


def _all(
    model: FittedModel, images: Sequence[Image], *, run: Run | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Maps [N,S,S] and scores [N] of images, by the model or by `run`, in batches of 3."""
    preprocessing, maps, scores = model.config.preprocessing, [], []
    for start in range(0, len(images), BATCH):
        part = images[start : start + BATCH]
        inputs = np.stack([to_input(image, preprocessing) for image in part])
        sizes = [original_size(image, preprocessing) for image in part]
        found = model.run(inputs, sizes) if run is None else run(inputs)
        maps.append(found[0])
        scores.append(found[1])
    return np.concatenate(maps), np.concatenate(scores)


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
