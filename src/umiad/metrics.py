"""Exact metrics of anomaly scores and maps: AUROC, AP, AUPRO, Dice and their curves.

Every distinct score is a threshold; equal scores are passed together. Scores are used as they are, never
rescaled: only their order matters, and `float64` stays `float64`. Arrays and torch tensors are accepted.
A pixel counts as found when its score lies strictly above the threshold, as in `umiad.calibration`.

Method: negatives are sorted once; only positives keep their identity. Between two neighbouring positive
scores all curves are straight (only false positives are added), so the vertices at the distinct positive
scores carry the exact curves, at a fraction of the memory that sorting indices of all pixels needs.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from umiad.errors import ConfigError, InputError, UmiadError
from umiad.regions import region_areas
from umiad.score_order import descending, keys_of, scores_of

Array = NDArray[Any]
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]

FPR_LIMIT = 0.3
"""AUPRO integrates up to this false-positive rate (Bergmann et al., 2020)."""
CURVE_POINTS = 1000
"""A curve for drawing has at most this many points."""
THREADS = 2
"""Parts that are copied, sorted and counted side by side; NumPy lets other threads run meanwhile."""
BLOCK = 1 << 17
"""Scores whose places among the negatives are looked for together."""
GRID_NEGATIVE, GRID_POSITIVE = 4096, 2048
"""Quantile thresholds kept for the bootstrap, from the normal and from the abnormal pixels."""


class UndefinedMetric(UmiadError):
    """A metric that does not exist for this data; `reason` says why. Never replaced by NaN or 0.5."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True)
class Measure:
    """A metric's value, or None with the reason why it is undefined."""

    value: float | None
    reason: str | None = None


@dataclass(frozen=True, eq=False)
class Ranking:
    """The order of all pixels, as counts at the G distinct scores of positive ones, highest first.

    `scores` [G]; `hits` [G]: positives with at least that score; `above`, `at_least` [G]: negatives strictly
    above, and at least at, that score; `overlap` [G]: mean over the regions of the share with at least that
    score (without regions: of all positives); `grid` [T]: quantiles of negatives and positives, ascending,
    lowest and highest score included.
    """

    scores: Array
    hits: NDArray[np.int64]
    above: NDArray[np.int64]
    at_least: NDArray[np.int64]
    overlap: NDArray[np.float64]
    n_negative: int
    grid: Array

    @property
    def n_positive(self) -> int:
        """Number of positives."""
        return int(self.hits[-1]) if len(self.hits) else 0


def as_array(values: Any) -> Array:
    """A NumPy array from an array, sequence or torch tensor, without importing torch.

    float32 and float64 keep their type, bool stays bool, all else becomes float64.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values.float() if str(values.dtype) == "torch.bfloat16" else values).numpy()
    array = np.asarray(values)
    return array if array.dtype in (np.float32, np.float64, np.bool_) else array.astype(np.float64)


def checked(scores: Any, truth: Any, *, ndim: int, name: str) -> tuple[Array, NDArray[np.bool_]]:
    """Scores and truth of equal shape with `ndim` axes: finite numbers, and bool (or 0 and 1).

    Raises InputError naming what was found and what was expected.
    """
    scores, truth = as_array(scores), as_array(truth)
    if scores.shape != truth.shape or scores.ndim != ndim:
        expected = "[N]" if ndim == 1 else "[N,H,W]"
        found = f"shapes {list(scores.shape)} and {list(truth.shape)}"
        raise InputError(name, f"{found}, expected two equal shapes {expected}")
    if scores.dtype == np.bool_:
        scores = scores.astype(np.float64)
    if not np.isfinite(scores).all():
        wrong = scores.size - int(np.isfinite(scores).sum())
        raise InputError(
            name, f"{wrong} of {scores.size} scores are NaN or infinite, expected finite numbers"
        )
    if truth.dtype != np.bool_:
        if not np.isin(truth, (0, 1)).all():
            raise InputError(name, "labels or masks hold other values than 0 and 1, expected bool or 0 and 1")
        truth = truth.astype(np.bool_)
    return scores, truth


def measure(compute: Callable[[], float]) -> Measure:
    """The value of `compute()`, or the reason of its UndefinedMetric."""
    try:
        return Measure(float(compute()))
    except UndefinedMetric as error:
        return Measure(None, error.reason)


def rank_pixels(maps: Any, masks: Any) -> Ranking:
    """Rank the pixels of maps [N,H,W] (finite, higher = more anomalous) against masks [N,H,W].

    Regions are the 8-connected components of each image's mask. Raises InputError on unequal shapes,
    NaN, or masks that are not binary.
    """
    maps, masks = checked(maps, masks, ndim=3, name="anomaly maps and masks")
    hits = np.cumsum([np.count_nonzero(mask) for mask in masks], dtype=np.int64)
    n_positive = int(hits[-1]) if len(hits) else 0
    positive, negative = np.empty(n_positive, maps.dtype), np.empty(maps.size - n_positive, maps.dtype)
    areas = np.empty(n_positive, dtype=np.uint32)

    def take(rows: range) -> int:
        """Copy the pixels of some images to their places; the number of their regions."""
        n_regions = 0
        for row in rows:
            mask, stop = masks[row], int(hits[row])
            start = stop - int(np.count_nonzero(mask))
            positive[start:stop] = maps[row][mask]
            negative[row * mask.size - start : (row + 1) * mask.size - stop] = maps[row][~mask]
            areas[start:stop], count = region_areas(mask)
            n_regions += count
        return n_regions

    middle = len(maps) // 2
    with ThreadPoolExecutor(THREADS) as pool:
        counts = list(pool.map(take, (range(middle), range(middle, len(maps)))))
    return _rank(negative, positive, areas, sum(counts))


def _rank(negative: Array, positive: Array, areas: NDArray[np.uint32], n_regions: int) -> Ranking:
    """Rank scores; the arrays given are overwritten; `areas`: pixels in the region of each positive."""
    with ThreadPoolExecutor(THREADS) as pool:
        sorting = pool.submit(negative.sort)
        keys, areas = descending(keys_of(positive), areas)
        last = np.flatnonzero(np.append(keys[1:] != keys[:-1], np.ones(min(1, len(keys)), bool)))
        scores = scores_of(keys[last])
        overlap = 1.0 / areas
        np.cumsum(overlap, out=overlap)
        overlap = overlap[last] / max(1, n_regions)
        sorting.result()
        above, at_least = np.empty((2, len(scores)), dtype=np.int64)

        def place(start: int) -> None:
            """Count the negatives above, and at least at, a block of scores."""
            block = slice(start, start + BLOCK)
            above[block], at_least[block] = _passed(negative, scores[block])

        list(pool.map(place, range(0, len(scores), BLOCK)))
    return Ranking(
        scores=scores,
        hits=last + 1,
        above=above,
        at_least=at_least,
        overlap=overlap,
        n_negative=len(negative),
        grid=np.union1d(
            negative[quantile_ranks(len(negative), GRID_NEGATIVE)],
            scores_of(keys[::-1][quantile_ranks(len(keys), GRID_POSITIVE)]),
        ),
    )


def _passed(negative: Array, scores: Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of negatives (ascending) strictly above, and at least at, each of the falling `scores`."""
    ascending = scores[::-1]
    upto = np.searchsorted(negative, ascending, side="right")
    below = upto.copy()
    tied = np.flatnonzero(upto)
    tied = tied[negative[upto[tied] - 1] == ascending[tied]]
    below[tied] = np.searchsorted(negative, ascending[tied], side="left")
    return (len(negative) - upto)[::-1], (len(negative) - below)[::-1]


def quantile_ranks(total: int, count: int) -> NDArray[np.int64]:
    """At most `count` ranks, evenly spaced in 0 .. total - 1, both ends included; all of them where they fit."""
    if total <= count:
        return np.arange(total)
    return np.linspace(0, total - 1, count).round().astype(np.int64)


def require_both(n_positive: int, n_negative: int, *, unit: str = "pixel") -> None:
    """Raise UndefinedMetric when there is no positive, or no negative."""
    if not n_positive:
        raise UndefinedMetric(f"no abnormal {unit} among the test images")
    if not n_negative:
        raise UndefinedMetric(f"no normal {unit} among the test images")


def _vertices(ranking: Ranking) -> Curve:
    """False-positive rate and overlap at every vertex, from (0, 0) to (1, 1)."""
    rates = np.zeros(2 * len(ranking.scores) + 2)
    heights = np.zeros_like(rates)
    rates[1:-1:2] = ranking.above / ranking.n_negative
    rates[2:-1:2] = ranking.at_least / ranking.n_negative
    heights[2:-1:2] = ranking.overlap
    heights[3:-1:2] = ranking.overlap[:-1]
    rates[-1] = heights[-1] = 1.0
    return rates, heights


def _cut(rates: Array, heights: Array, limit: float) -> Curve:
    """The curve up to `limit`, its last point interpolated linearly."""
    stop = int(np.searchsorted(rates, limit, side="right"))
    return np.append(rates[:stop], limit), np.append(heights[:stop], np.interp(limit, rates, heights))


def _thin(rates: Array, heights: Array) -> Curve:
    """At most CURVE_POINTS of the vertices, even along the curve: none is further off than 2/998."""
    if len(rates) <= CURVE_POINTS:
        return rates, heights
    length = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(rates)) + np.abs(np.diff(heights)))])
    chosen = np.searchsorted(length, np.linspace(0, length[-1], CURVE_POINTS - 1))
    chosen = np.unique(np.append(chosen, len(rates) - 1))
    return rates[chosen], heights[chosen]


def ranked_auroc(ranking: Ranking) -> float:
    """Probability that a positive outranks a negative, ties counting half (Mann-Whitney)."""
    require_both(ranking.n_positive, ranking.n_negative)
    new = np.diff(ranking.hits, prepend=0)
    doubled = int(np.sum(new * (2 * ranking.n_negative - ranking.above - ranking.at_least)))
    return doubled / (2 * ranking.n_positive * ranking.n_negative)


def ranked_ap(ranking: Ranking) -> float:
    """Average precision: sum over thresholds of recall step times precision (as scikit-learn)."""
    require_both(ranking.n_positive, ranking.n_negative)
    new = np.diff(ranking.hits, prepend=0)
    return float(np.sum(new * (ranking.hits / (ranking.hits + ranking.at_least))) / ranking.n_positive)


def ranked_aupro(ranking: Ranking, *, fpr_limit: float = FPR_LIMIT) -> float:
    """Area under overlap against false-positive rate up to `fpr_limit`, divided by `fpr_limit`."""
    check_limit(fpr_limit)
    require_both(ranking.n_positive, ranking.n_negative)
    rates, heights = _cut(*_vertices(ranking), fpr_limit)
    return float(np.trapezoid(heights, rates)) / fpr_limit


def ranked_f1(ranking: Ranking) -> dict[str, float]:
    """The best F1 over all thresholds: {threshold, precision, recall, dice}; an oracle, it saw the masks.

    `score > threshold` is the best segmentation; of equally good ones the one with fewest pixels.
    """
    require_both(ranking.n_positive, ranking.n_negative)
    dice = 2 * ranking.hits / (ranking.n_positive + ranking.hits + ranking.at_least)
    best = int(np.argmax(dice))
    hits, false = int(ranking.hits[best]), int(ranking.at_least[best])
    with np.errstate(over="ignore"):  # below the lowest float of its type lies -inf
        threshold = np.nextafter(ranking.scores[best], ranking.scores.dtype.type(-np.inf))
    return {
        "threshold": float(threshold),
        "precision": hits / (hits + false),
        "recall": hits / ranking.n_positive,
        "dice": float(dice[best]),
    }


def check_limit(fpr_limit: float) -> None:
    """Raise ConfigError unless the false-positive rate is in (0, 1]."""
    if not 0 < fpr_limit <= 1:
        raise ConfigError(f"fpr_limit {fpr_limit}, expected a rate above 0 and at most 1")


def _ranked_images(scores: Any, labels: Any) -> tuple[Array, NDArray[np.bool_]]:
    scores, truth = checked(scores, labels, ndim=1, name="image scores and labels")
    require_both(int(truth.sum()), int((~truth).sum()), unit="image")
    return scores.astype(np.float64), truth


def det_auroc(scores: Any, labels: Any) -> float:
    """Area under the ROC of image scores [N] against labels [N] (1 = abnormal), by scikit-learn.

    Raises UndefinedMetric with one class only, InputError on NaN or unequal lengths.
    """
    from sklearn.metrics import roc_auc_score

    scores, truth = _ranked_images(scores, labels)
    return float(roc_auc_score(truth, scores))


def det_ap(scores: Any, labels: Any) -> float:
    """Average precision of image scores [N] against labels [N], by scikit-learn. Raises as `det_auroc`."""
    from sklearn.metrics import average_precision_score

    scores, truth = _ranked_images(scores, labels)
    return float(average_precision_score(truth, scores))


def roc_points(scores: Any, labels: Any) -> Curve:
    """(false-positive rate, true-positive rate) of scores [N] against labels [N], at most 1000 points.

    Works for images and for flattened maps. Raises as `det_auroc`.
    """
    scores, truth = checked(scores, labels, ndim=1, name="scores and labels")
    ranking = _rank_alone(scores, truth)
    require_both(ranking.n_positive, ranking.n_negative, unit="case")
    return _thin(*_vertices(ranking))


def _rank_alone(scores: Array, truth: NDArray[np.bool_]) -> Ranking:
    """Rank without regions: every positive weighs the same."""
    positive = scores[truth]
    return _rank(scores[~truth], positive, np.full(len(positive), len(positive), dtype=np.uint32), 1)


def seg_auroc(maps: Any, masks: Any) -> float:
    """Exact AUROC over all pixels of maps [N,H,W] against masks [N,H,W].

    Raises UndefinedMetric without lesion or normal pixels, InputError as `rank_pixels`.
    """
    return ranked_auroc(_rank_alone(*checked(maps, masks, ndim=3, name="anomaly maps and masks")))


def seg_ap(maps: Any, masks: Any) -> float:
    """Exact average precision over all pixels of maps [N,H,W]. Raises as `seg_auroc`."""
    return ranked_ap(_rank_alone(*checked(maps, masks, ndim=3, name="anomaly maps and masks")))


def aupro(maps: Any, masks: Any, *, fpr_limit: float = FPR_LIMIT) -> float:
    """Exact area under the per-region-overlap curve up to `fpr_limit`, divided by `fpr_limit`: 0..1.

    Maps [N,H,W], masks [N,H,W]. Overlap: mean over all 8-connected regions of the whole test set of the
    share of the region at or above the threshold; false-positive rate: over all normal pixels of all images,
    normal images included; linear between thresholds and at the limit. Perfect maps give 1.0, constant maps
    fpr_limit / 2 (0.15). Source: Bergmann et al., CVPR 2020, section 5.

    Raises UndefinedMetric without a region or a normal pixel, InputError as `rank_pixels`, ConfigError when
    `fpr_limit` is not in (0, 1].
    """
    check_limit(fpr_limit)
    return ranked_aupro(rank_pixels(maps, masks), fpr_limit=fpr_limit)


def pro_curve(maps: Any, masks: Any, *, fpr_limit: float = FPR_LIMIT) -> Curve:
    """(false-positive rate, mean overlap) from 0 to `fpr_limit`, at most 1000 points. Raises as `aupro`."""
    check_limit(fpr_limit)
    ranking = rank_pixels(maps, masks)
    require_both(ranking.n_positive, ranking.n_negative)
    return _thin(*_cut(*_vertices(ranking), fpr_limit))


def f1_max_threshold(maps: Any, masks: Any) -> float:
    """The threshold whose segmentation `map > threshold` has the highest F1 over all pixels: an oracle.

    Exact; it lies just below one of the scores. Raises as `seg_auroc`.
    """
    ranking = _rank_alone(*checked(maps, masks, ndim=3, name="anomaly maps and masks"))
    return ranked_f1(ranking)["threshold"]


def pixel_counts(anomaly_map: Array, mask: NDArray[np.bool_], threshold: float) -> tuple[int, int, int]:
    """(true positives, false positives, positives) of `anomaly_map > threshold`, compared in float64."""
    segmentation = anomaly_map > np.float64(threshold)
    hits = int(np.count_nonzero(segmentation & mask))
    return hits, int(np.count_nonzero(segmentation)) - hits, int(np.count_nonzero(mask))


def pixel_rule(maps: Any, masks: Any, threshold: float) -> dict[str, Measure]:
    """Precision, recall and Dice over all pixels of `maps > threshold`; undefined ones carry a reason.

    Maps [N,H,W], masks [N,H,W]. Raises InputError as `rank_pixels`, or when the threshold is NaN.
    """
    maps, masks = checked(maps, masks, ndim=3, name="anomaly maps and masks")
    if np.isnan(threshold):
        raise InputError("map threshold", "it is NaN, expected a number")
    counts = [pixel_counts(each, mask, threshold) for each, mask in zip(maps, masks, strict=True)]
    hits, false, positive = (sum(column) for column in zip((0, 0, 0), *counts, strict=True))
    return counted_rule(hits, false, positive)


def counted_rule(hits: int, false: int, positive: int) -> dict[str, Measure]:
    """Precision, recall and Dice from the counts of true positives, false positives and positives."""
    return {
        "precision": _share(hits, hits + false, "no pixel lies above the threshold"),
        "recall": _share(hits, positive, "no abnormal pixel among the test images"),
        "dice": _share(2 * hits, hits + false + positive, "no abnormal pixel, and none above the threshold"),
    }


def _share(part: int, whole: int, reason: str) -> Measure:
    return Measure(part / whole) if whole else Measure(None, reason)


def ranked_measures(ranking: Ranking, *, fpr_limit: float = FPR_LIMIT) -> dict[str, Measure]:
    """All metrics that need no threshold, from one ranking; names as in `evaluate_maps`."""
    found = {
        "seg_auroc": measure(lambda: ranked_auroc(ranking)),
        "seg_ap": measure(lambda: ranked_ap(ranking)),
        "seg_aupro": measure(lambda: ranked_aupro(ranking, fpr_limit=fpr_limit)),
    }
    names = {"f1_precision": "precision", "f1_recall": "recall", "dice": "dice", "threshold": "threshold"}
    try:
        best = ranked_f1(ranking)
    except UndefinedMetric as error:
        return found | {f"oracle_{name}": Measure(None, error.reason) for name in names}
    return found | {f"oracle_{name}": Measure(best[key]) for name, key in names.items()}


def evaluate_maps(
    maps: Any, masks: Any, *, threshold: float | None = None, fpr_limit: float = FPR_LIMIT
) -> dict[str, Measure]:
    """Every pixel metric of maps [N,H,W] against masks [N,H,W], sorting the pixels once.

    Keys: seg_auroc, seg_ap, seg_aupro; precision, recall, dice at `threshold`; oracle_f1_precision,
    oracle_f1_recall, oracle_dice and oracle_threshold at the F1-best threshold (chosen on these masks).
    Raises InputError as `rank_pixels`, ConfigError when `fpr_limit` is not in (0, 1].
    """
    check_limit(fpr_limit)
    found = ranked_measures(rank_pixels(maps, masks), fpr_limit=fpr_limit)
    if threshold is None:
        return found | {name: Measure(None, "no map threshold") for name in ("precision", "recall", "dice")}
    return found | pixel_rule(maps, masks, threshold)
