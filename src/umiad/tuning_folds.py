"""Folds of normal images with synthetic anomalies planted in them, and how a candidate is judged on one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from umiad.bootstrap import resample_scores
from umiad.comparison_result import COMPARED
from umiad.metrics import det_auroc, evaluate_maps, measure
from umiad.splits import SplitEntry, fold_numbers
from umiad.synthetic import FAMILIES, SyntheticAnomaly, synthetic_set
from umiad.tuning_result import PARTS, SIZES, Exhibit, TuneOptions

SHOWN_AREA, SHOWN_NORMALS = 0.03, 2
"""Of each family the anomaly next to that share of the image is shown; and so many normal images."""


@dataclass(frozen=True, eq=False)
class Fold:
    """The held-out normals of a fold, then their synthetic anomalies (N images in all): equal for all candidates.

    `fitted`, `held_out`: places among the training normals; `groups` [N] of the source images; `masks` [N,S,S].
    """

    number: int
    fitted: tuple[int, ...]
    held_out: tuple[int, ...]
    anomalies: tuple[SyntheticAnomaly, ...]
    groups: list[str]
    masks: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """0 held-out normal, 1 synthetic anomaly, [N]."""
        return np.repeat((0, 1), (len(self.held_out), len(self.anomalies)))

    def members(self, part: str) -> np.ndarray:
        """Which of the synthetic anomalies belong to a family or size class, [N - normals]."""
        if part in FAMILIES:
            return np.array([each.family == part for each in self.anomalies])
        low, high = SIZES[part]
        return np.array([low <= each.area < high for each in self.anomalies])


def make_folds(
    entries: Sequence[SplitEntry], greys: Sequence[np.ndarray], options: TuneOptions
) -> Iterator[Fold]:
    """Cut normal images (float32 [S,S] in 0..1, one of each entry) into folds and plant anomalies, fold by fold.

    The anomalies of a fold depend on its images and the seed alone; patches come from its own images.
    """
    numbers = fold_numbers(entries, options.folds, seed=options.seed)
    for number in range(options.folds):
        held_out = tuple(place for place, fold in enumerate(numbers) if fold == number)
        seed = int(np.random.SeedSequence((options.seed, number)).generate_state(1)[0])
        pixels = [greys[place] for place in held_out]
        anomalies = tuple(synthetic_set(pixels, per_image=options.per_image, seed=seed))
        groups = [entries[place].group or entries[place].name for place in held_out]
        planted = [group for group in groups for _ in range(options.per_image)]
        masks = np.zeros((len(held_out) + len(anomalies), *pixels[0].shape), dtype=bool)
        masks[len(held_out) :] = [each.mask for each in anomalies]
        fitted = tuple(place for place, fold in enumerate(numbers) if fold != number)
        yield Fold(number, fitted, held_out, anomalies, groups + planted, masks)


def shown_rows(fold: Fold) -> list[int]:
    """Which of the N images of a fold a report shows, whatever the results: one of each family, two normals."""
    first = len(fold.held_out)
    rows = []
    for family in FAMILIES:
        places = np.flatnonzero(fold.members(family)).tolist()
        places.sort(key=lambda place: abs(np.log(fold.anomalies[place].area / SHOWN_AREA)))
        rows += [first + place for place in places[:1]]
    return [*rows, *range(min(SHOWN_NORMALS, first))]


def exhibits(fold: Fold, entries: Sequence[SplitEntry], greys: Sequence[np.ndarray]) -> Iterator[Exhibit]:
    """The images of `shown_rows`, in that order."""
    first = len(fold.held_out)
    for row in shown_rows(fold):
        if row < first:
            place = fold.held_out[row]
            yield Exhibit(greys[place], None, "normal", 0.0, entries[place].name)
        else:
            each = fold.anomalies[row - first]
            place = fold.held_out[(row - first) * first // len(fold.anomalies)]
            yield Exhibit(each.pixels, each.mask, each.family, each.area, entries[place].name)


def judge_fold(
    fold: Fold, scores: np.ndarray, maps: np.ndarray | None, *, n_resamples: int
) -> dict[str, Any]:
    """Metrics, parts, scores and resamples of a fold from image scores [N] and maps [N,S,S] (None: no map).

    A resample draws source images (groups): a normal image and what was planted in it come together. Equal folds
    give equal draws, so candidates are compared in pairs. Raises InputError for scores that are not finite.
    """
    labels = fold.labels
    masks = None if maps is None else fold.masks
    metrics, draws = resample_scores(
        scores, labels, fold.groups, maps, masks, n_resamples=n_resamples, seed=fold.number
    )
    parts, counts = {}, {}
    for part in PARTS:
        chosen = np.concatenate([np.ones(len(fold.held_out), dtype=bool), fold.members(part)])
        counts[part] = int(chosen.sum()) - len(fold.held_out)
        parts[part] = _part(fold, chosen, scores, maps) if counts[part] else dict.fromkeys(COMPARED)
    return {
        "metrics": {name: metrics[name]["value"] for name in COMPARED},
        "parts": parts,
        "counts": counts,
        "normal_scores": tuple(scores[labels == 0].tolist()),
        "synthetic_scores": tuple(scores[labels == 1].tolist()),
        "draws": {name: tuple(draws[name].tolist()) for name in COMPARED if name in draws},
    }


def _part(
    fold: Fold, chosen: np.ndarray, scores: np.ndarray, maps: np.ndarray | None
) -> dict[str, float | None]:
    """The metrics of COMPARED on some images of a fold, bool [N]."""
    found: dict[str, float | None] = dict.fromkeys(COMPARED)
    found["det_auroc"] = measure(lambda: det_auroc(scores[chosen], fold.labels[chosen])).value
    if maps is not None:
        pixels = evaluate_maps(maps[chosen], fold.masks[chosen])
        found |= {name: pixels[name].value for name in COMPARED[1:]}
    return found
