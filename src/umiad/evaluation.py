"""Cases with labels and masks x fitted model -> metrics with intervals, curves and telling examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from umiad.bootstrap import resample_scores
from umiad.cases import case_masks
from umiad.data import DataSet
from umiad.duplicates import CaseHashes
from umiad.errors import InputError
from umiad.fitted import FittedModel
from umiad.fitting import Data, as_dataset, usable_images
from umiad.metrics import Curve, UndefinedMetric, pro_curve, roc_points
from umiad.pixel_set import pixel_set
from umiad.preprocess import resize_mask
from umiad.progress import Reporter, Silent
from umiad.rows import Rows
from umiad.scorer import Scorer
from umiad.scoring import common
from umiad.streamed_metrics import MAPS_AT_ONCE, PixelSummary, summarise_pixels
from umiad.types import ABNORMAL, NORMAL, Case, FileOptions, Image, Scores

EXAMPLES = 6
"""Abnormal and normal images each that a report shows of the best and of the worst cases."""


@dataclass(frozen=True)
class CaseResult:
    """One test case: its score and what the model's threshold says about it."""

    name: str
    kind: str
    label: int
    group: str
    image_score: float
    p_value: float | None
    above_threshold: bool | None
    has_mask: bool


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` returns; `to_json` is what `metrics.json` holds.

    `metrics`: name -> {"value", "ci95", "n_resamples", "reason"}, fractions; undefined = null with a reason.
    `roc` and `pro`: points (x, y) for drawing. `best`, `worst`: the cases worth looking at: abnormal ones with
    the highest (lowest) scores, then normal ones with the lowest (highest). `draws`: every metric's resamples,
    paired between evaluations of the same test part (see `umiad.bootstrap.resample_scores`).
    """

    metrics: dict[str, dict[str, Any]]
    counts: dict[str, int]
    provenance: dict[str, Any]
    notes: tuple[str, ...]
    cases: tuple[CaseResult, ...]
    roc: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    pro: tuple[list[float], list[float]] | None = None
    best: tuple[Case, ...] = ()
    worst: tuple[Case, ...] = ()
    draws: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Metrics, counts, provenance, notes, points of the curves and one row per case, as plain values."""
        cases = [vars(case) for case in self.cases]
        return {
            "metrics": self.metrics,
            "counts": self.counts,
            "provenance": self.provenance,
            "notes": list(self.notes),
            "curves": {"roc": self.roc, "pro": self.pro},
            "cases": cases,
        }


@dataclass(frozen=True, eq=False)
class ScoredTest:
    """The test part of a data set with what one model says about it.

    `cases`, `groups`, `image_scores` [N], `maps` [N,S,S] and `masks` (bool [S,S]; None where an abnormal case has
    none) in one order; `rule` says how the test part was found, `notes` what a reader should know.
    """

    cases: tuple[Case, ...]
    groups: tuple[str, ...]
    rule: str
    notes: tuple[str, ...]
    image_scores: np.ndarray
    maps: np.ndarray
    masks: list[np.ndarray | None]

    @property
    def labels(self) -> np.ndarray:
        """0 normal, 1 abnormal, [N]."""
        return np.array([case.label for case in self.cases])

    def common(self, *, smoothed: float) -> ScoredTest:
        """The same under the common post-processing; `smoothed`: see `umiad.scoring.common`."""
        maps = Rows(len(self.maps), self.maps.shape[1:], self.maps.dtype, memory_limit=MAPS_AT_ONCE)
        scores = []
        for k in range(0, len(self.maps), 32):
            own = Scores(
                torch.from_numpy(self.maps[k : k + 32]), torch.from_numpy(self.image_scores[k : k + 32])
            )
            part = common(own, smoothed=smoothed)
            scores.append(part.image_score)
            for each in part.anomaly_map.numpy():
                maps.append(each)
        return replace(self, image_scores=torch.cat(scores).double().numpy(), maps=maps.array())


def evaluate_model(
    model: FittedModel,
    data: Data,
    *,
    n_resamples: int = 1000,
    seed: int = 0,
    files: FileOptions | None = None,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Score the test part of `data` and compute every metric with its 95 % interval.

    The test part is the official one where the data has it, else the one of the split stored in the
    model (by content hash), else, for data the model never saw, all of it. Raises InputError when an image
    that shaped the model (fitted, held out or calibrated on) is in the test part, or when it is empty.
    `files`: how files are found and which frames are taken (as fitting did, where None); windows are the model's.
    """
    reporter = reporter or Silent()
    test = score_test(model, data, files=files, reporter=reporter)
    return judge(model, test, n_resamples=n_resamples, seed=seed, reporter=reporter)


def score_test(
    model: FittedModel,
    data: Data,
    *,
    files: FileOptions | None = None,
    reporter: Reporter | None = None,
) -> ScoredTest:
    """Score the test part of `data`; which that is and what is raised: see `evaluate_model`."""
    cases, groups, rule, notes = _test_part(model, as_dataset(data, model.file_options(files)))
    scores, maps, masks = score_cases(model, cases, reporter=reporter)
    return ScoredTest(cases, groups, rule, notes, scores, maps, masks)


def judge(
    model: FittedModel,
    test: ScoredTest,
    *,
    n_resamples: int = 1000,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Metrics with 95 % intervals, curves and telling cases of a scored test part."""
    reporter = reporter or Silent()
    calibration = model.config.calibration
    reporter.stage("metrics", 0, 1)
    summary = _summary(test)
    metrics, draws = resample_scores(
        test.image_scores,
        test.labels,
        list(test.groups),
        test.maps,
        test.masks,
        image_threshold=calibration.image_threshold if calibration else None,
        map_threshold=calibration.map_threshold if calibration else None,
        n_resamples=n_resamples,
        seed=seed,
        summary=summary,
    )
    roc, pro = _curves(test, summary)
    reporter.stage("metrics", 1, 1)
    best, worst = _examples(test.cases, test.image_scores)
    return Evaluation(
        metrics=metrics,
        counts=_counts(test),
        provenance={**model.info, "test_part": test.rule, "bootstrap_seed": seed},
        notes=test.notes,
        cases=tuple(_results(model, test)),
        roc=roc,
        pro=pro,
        best=best,
        worst=worst,
        draws=draws,
    )


def _test_part(
    model: FittedModel, dataset: DataSet
) -> tuple[tuple[Case, ...], tuple[str, ...], str, tuple[str, ...]]:
    """Cases, groups, the rule that chose them, and notes."""
    labelled = [case for case in dataset.cases if case.label is not None]
    known_files = CaseHashes()
    hashes = {case: known_files.of(case) for case in labelled}
    known = {entry.sha256: entry for entry in model.split.entries}
    if any(case.split for case in labelled):
        chosen, rule = [case for case in labelled if case.split == "test"], "official test part of the data"
    elif any(digest in known for digest in hashes.values()):
        chosen = [case for case in labelled if (e := known.get(hashes[case])) and e.part == "test"]
        rule = "test part of the split stored in the model"
    else:
        chosen, rule = labelled, "all images: the model has seen none of this data"
    if not chosen:
        raise InputError(
            dataset.root,
            "no labelled image belongs to the test part",
            "evaluate the data the model was fitted on, or data with normal and abnormal images it never saw",
        )
    fitted = model.fitted_hashes()
    if leaked := [case.name for case in chosen if hashes[case] in fitted]:
        raise InputError(
            leaked[0],
            f"{len(leaked)} images of the test part were fitted, held out or calibrated on, expected none: "
            + ", ".join(leaked[:5]),
        )
    new = sum(1 for digest in hashes.values() if digest not in known)
    notes = list(dataset.notes)
    if new and len(chosen) < len(labelled) and rule.startswith("test part"):
        notes.append(
            f"{new} images are not in the model's split and were left out; evaluate them as a folder"
        )
    groups = tuple(entry.group if (entry := known.get(hashes[case])) else case.group for case in chosen)
    return tuple(chosen), groups, rule, tuple(notes)


def score_cases(
    model: Scorer, cases: Sequence[Case], *, reporter: Reporter | None = None
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray | None]]:
    """Image scores [N], maps [N,S,S] and masks (None where an abnormal case has none).

    More maps than MAPS_AT_ONCE bytes lie in a temporary file, and so do their masks. Raises DiskError when it is full.
    """
    reporter = reporter or Silent()
    size = model.config.preprocessing.size
    scores = np.empty(len(cases))
    maps = Rows(len(cases), (size, size), np.float32, memory_limit=MAPS_AT_ONCE)
    drawn = Rows(len(cases), (size, size), np.bool_, memory_limit=MAPS_AT_ONCE // maps.itemsize)
    known: list[bool] = []

    def images() -> Iterator[Image]:
        own = [replace(each, reading=model.config.preprocessing.reading) for each in cases]
        for case, image in zip(own, usable_images(own), strict=True):
            mask = case_mask(case, image, size)
            known.append(mask is not None)
            drawn.append(np.zeros((size, size), dtype=bool) if mask is None else mask)
            yield image

    for row, (_, score, small_map) in enumerate(model.score_images(images())):
        scores[row] = score
        maps.append(small_map)
        reporter.stage("scoring", row + 1, len(cases))
    masks = [mask if has else None for mask, has in zip(drawn.array(), known, strict=True)]
    return scores, maps.array(), masks


def case_mask(case: Case, image: Image, size: int) -> np.ndarray | None:
    """The case's united mask, bool [size,size]; all False for a normal one without, None where nobody drew one."""
    if case.masks:
        return resize_mask(case_masks(case, image.size), (size, size))
    return np.zeros((size, size), dtype=bool) if case.label == NORMAL else None


def _counts(test: ScoredTest) -> dict[str, int]:
    abnormal = [mask for case, mask in zip(test.cases, test.masks, strict=True) if case.label == ABNORMAL]
    return {
        "n_normal": len(test.cases) - len(abnormal),
        "n_abnormal": len(abnormal),
        "n_masked": sum(mask is not None and bool(mask.any()) for mask in abnormal),
    }


def _results(model: FittedModel, test: ScoredTest) -> Iterator[CaseResult]:
    calibration = model.config.calibration
    scores = test.image_scores.tolist()
    for case, group, score, mask in zip(test.cases, test.groups, scores, test.masks, strict=True):
        yield CaseResult(
            name=case.name,
            kind=case.kind,
            label=int(case.label or 0),
            group=group,
            image_score=score,
            p_value=calibration.p_value(score) if calibration else None,
            above_threshold=calibration.is_above(score) if calibration else None,
            has_mask=mask is not None and bool(mask.any()),
        )


def _judged(maps: np.ndarray, masks: Sequence[np.ndarray | None]) -> tuple[np.ndarray, np.ndarray] | None:
    """Maps and masks of the cases that count for pixel metrics; None where no lesion has a mask."""
    rows = [row for row, mask in enumerate(masks) if mask is not None]
    chosen = [mask for mask in masks if mask is not None]
    if not any(mask.any() for mask in chosen):
        return None
    return (maps if len(rows) == len(maps) else maps[rows]), np.stack(chosen)


def _summary(test: ScoredTest) -> PixelSummary | None:
    """Pixel metrics in bounded memory; None where the maps are few enough to be ranked at once, or have no lesion."""
    pixels, _ = pixel_set(test.maps, test.masks, test.labels == ABNORMAL)
    return summarise_pixels(pixels.parts) if pixels is not None and pixels.nbytes > MAPS_AT_ONCE else None


def _curves(
    test: ScoredTest, summary: PixelSummary | None
) -> tuple[dict[str, tuple[list[float], list[float]]], tuple[list[float], list[float]] | None]:
    """ROC of images and of pixels, and PRO, for drawing; those that exist."""
    two = len(set(test.labels.tolist())) == 2
    roc = {"images": _listed(roc_points(test.image_scores, test.labels))} if two else {}
    if summary is not None:
        pixels, pro = summary.roc, summary.pro
    elif (judged := _judged(test.maps, test.masks)) is None:
        pixels = pro = None
    else:
        pixels = roc_points(judged[0].ravel(), judged[1].ravel()) if two else None
        pro = _pro(*judged)
    if two and pixels is not None:
        roc["pixels"] = _listed(pixels)
    return roc, None if pro is None else _listed(pro)


def _pro(maps: np.ndarray, masks: np.ndarray) -> Curve | None:
    try:
        return pro_curve(maps, masks)
    except UndefinedMetric:
        return None


def _listed(points: Iterable[Any]) -> tuple[list[float], list[float]]:
    xs, ys = (np.asarray(part, dtype=float).tolist() for part in points)
    return xs, ys


def _examples(cases: Sequence[Case], scores: np.ndarray) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """The cases worth looking at: how the model succeeds, and how it fails."""
    ranked = [cases[k] for k in np.argsort(-scores, kind="stable")]
    abnormal = [case for case in ranked if case.label == ABNORMAL]
    normal = [case for case in ranked if case.label == NORMAL]
    best = abnormal[:EXAMPLES] + normal[::-1][:EXAMPLES]
    worst = abnormal[::-1][:EXAMPLES] + normal[:EXAMPLES]
    return tuple(best), tuple(worst)
