"""Metrics of a test set with 95 % bootstrap intervals; whole patients are drawn, normal and abnormal apart.

Values are exact (`umiad.metrics`). Intervals are percentiles of resampled metrics. A resample gives each
image a weight, so resampled image metrics are exact too; resampled pixel metrics come from counts per image
at about 6000 quantile thresholds, with an error below 1e-3 (AUROC and AUPRO by construction: a step between
neighbouring thresholds holds at most 1/4095 of the normal pixels), far below the width of any interval.
Memory beside the inputs: about 150 kB per resample, and a few copies of the maps up to MAPS_AT_ONCE bytes; larger
sets are streamed (`umiad.streamed_metrics`), with the same results and no copy, so that maps may lie in a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from umiad.errors import ConfigError, InputError
from umiad.metrics import (
    FPR_LIMIT,
    THREADS,
    Array,
    Measure,
    as_array,
    checked,
    counted_rule,
    det_ap,
    det_auroc,
    measure,
    pixel_counts,
    rank_pixels,
    ranked_measures,
)
from umiad.pixel_set import IMAGES_AT_ONCE, PixelSet, pixel_set
from umiad.regions import region_weights
from umiad.streamed_metrics import MAPS_AT_ONCE, PixelSummary, summarise_pixels

Draws = dict[str, NDArray[np.float64]]
"""Metric -> its value in every resample; NaN where the resample leaves it undefined (dropped later)."""

ORACLE_DETECTION = ("oracle_det_precision", "oracle_det_recall")
DETECTION = ("det_auroc", "det_ap", "det_sensitivity", "det_specificity", *ORACLE_DETECTION)
"""Image metrics; sensitivity and specificity at the stated image threshold, `oracle` ones at the F1-best."""
RULE = ("precision", "recall", "dice")
"""Pixel metrics at the stated map threshold."""
PIXEL = ("seg_auroc", "seg_ap", "seg_aupro", *RULE, "oracle_f1_precision", "oracle_f1_recall", "oracle_dice")
"""All pixel metrics; `oracle` ones at the F1-best threshold of the test masks (resampled: its own)."""
NO_INTERVAL = "no interval: the normal or the abnormal images are one single group"
RESAMPLES_AT_ONCE = 64
PERCENTILES = (2.5, 97.5)


def evaluate_scores(
    image_scores: Any,
    labels: Any,
    groups: Sequence[str],
    maps: Any,
    masks: Sequence[Any] | Array | None,
    *,
    image_threshold: float | None = None,
    map_threshold: float | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Every metric of a test set with its interval, without the resamples: see `resample_scores`."""
    metrics, _ = resample_scores(
        image_scores,
        labels,
        groups,
        maps,
        masks,
        image_threshold=image_threshold,
        map_threshold=map_threshold,
        n_resamples=n_resamples,
        seed=seed,
    )
    return metrics


def resample_scores(
    image_scores: Any,
    labels: Any,
    groups: Sequence[str],
    maps: Any,
    masks: Sequence[Any] | Array | None,
    *,
    image_threshold: float | None = None,
    map_threshold: float | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
    summary: PixelSummary | None = None,
) -> tuple[dict[str, dict[str, Any]], Draws]:
    """Every metric of a test set: name -> {"value", "ci95": [lo, hi], "n_resamples", "reason"}, fractions.

    Beside them every metric's resamples (NaN where undefined). Equal labels, groups and seed give the same
    resamples of images, so the differences of two detectors' draws are a paired bootstrap.

    `image_scores`, `labels` [N] (1 = abnormal), `groups` [N] (patient or near-duplicate cluster; empty = its
    own), `maps` [N,H,W] or None, `masks` one [H,W] or None per image: an abnormal image without mask is left
    out of the pixel metrics, a normal one needs none. Keys: see DETECTION and PIXEL. What does not exist is
    None with a reason; `n_resamples` counts the resamples behind the interval. `summary`: of the same maps and
    masks, where it was made before.

    Raises InputError on unequal lengths, NaN, or a normal image with lesion pixels, ConfigError on a
    negative number of resamples.
    """
    scores, truth = checked(image_scores, labels, ndim=1, name="image scores and labels")
    if len(groups) != len(scores):
        raise InputError("groups", f"{len(groups)} groups, expected one for each of {len(scores)} images")
    if n_resamples < 0:
        raise ConfigError(f"n_resamples {n_resamples}, expected 0 or more")
    scores = scores.astype(np.float64)
    pixels, reason = pixel_set(maps, masks, truth)
    weights = resample_weights(truth, groups, n_resamples=n_resamples, rng=np.random.default_rng(seed))
    values = _image_values(scores, truth, image_threshold)
    draws = _image_draws(scores, truth, weights, threshold=image_threshold)
    if pixels is None:
        values |= {name: Measure(None, reason) for name in PIXEL}
    else:
        pixel_values, pixel_draws = _pixel_results(
            pixels, weights[:, pixels.rows], threshold=map_threshold, summary=summary
        )
        values |= pixel_values
        draws |= pixel_draws
    without = NO_INTERVAL if n_resamples and not len(weights) else None
    names = (*DETECTION, *PIXEL)
    return {name: _metric(values[name], draws.get(name), without=without) for name in names}, draws


def count_cases(labels: Any, groups: Sequence[str]) -> dict[str, int]:
    """{"n_normal", "n_abnormal", "n_groups"} of labels [N] (1 = abnormal); an empty group is its own."""
    truth = as_array(labels).astype(bool)
    abnormal = int(truth.sum())
    n_groups = len(set(_named(groups)))
    return {"n_normal": len(truth) - abnormal, "n_abnormal": abnormal, "n_groups": n_groups}


def resample_weights(
    truth: NDArray[np.bool_], groups: Sequence[str], *, n_resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """How often each image occurs in each resample: [n_resamples, N].

    Groups are drawn with replacement and as wholes, separately from those with normal images only, abnormal
    only, and both: every resample holds both classes where the test set does. No rows are returned when a
    class has a single group, which says nothing about its spread.
    """
    code = {name: index for index, name in enumerate(dict.fromkeys(_named(groups)))}
    member = np.array([code[name] for name in _named(groups)], dtype=np.intp)
    holds = np.zeros((2, len(code)), dtype=bool)
    holds[truth.astype(np.intp), member] = True
    if not len(member) or (holds.sum(axis=1) == 1).any():
        return np.zeros((0, len(member)))
    drawn = np.zeros((n_resamples, len(code)))
    kind = holds[0] + 2 * holds[1]
    for each in np.unique(kind):
        stratum = np.flatnonzero(kind == each)
        shares = np.full(len(stratum), 1 / len(stratum))
        drawn[:, stratum] = rng.multinomial(len(stratum), shares, size=n_resamples)
    return drawn[:, member]


def _named(groups: Sequence[str]) -> list[tuple[str, int]]:
    return [(group, -1) if group else ("", index) for index, group in enumerate(groups)]


def _metric(value: Measure, draws: NDArray[np.float64] | None, *, without: str | None) -> dict[str, Any]:
    """The result of one metric; `without`: why there are no resamples."""
    usable = np.zeros(0) if draws is None else draws[np.isfinite(draws)]
    if value.value is None or len(usable) == 0:
        return {"value": value.value, "ci95": None, "n_resamples": 0, "reason": value.reason or without}
    ends = [float(end) for end in np.percentile(usable, PERCENTILES)]
    return {"value": value.value, "ci95": ends, "n_resamples": len(usable), "reason": None}


# Images


def _image_values(scores: Array, truth: NDArray[np.bool_], threshold: float | None) -> dict[str, Measure]:
    found = {
        "det_auroc": measure(lambda: det_auroc(scores, truth)),
        "det_ap": measure(lambda: det_ap(scores, truth)),
    }
    at_best = _rank_draws(scores, truth, np.ones((1, len(scores))))
    for name in ORACLE_DETECTION:
        reason = found["det_auroc"].reason
        found[name] = Measure(None, reason) if reason else Measure(float(at_best[name][0]))
    for name, members, kind in (
        ("det_sensitivity", truth, "abnormal"),
        ("det_specificity", ~truth, "normal"),
    ):
        if threshold is None:
            found[name] = Measure(None, "no image threshold")
        elif not members.any():
            found[name] = Measure(None, f"no {kind} image among the test images")
        else:
            found[name] = Measure(float(np.mean((scores[members] > threshold) == truth[members])))
    return found


def _image_draws(
    scores: Array, truth: NDArray[np.bool_], weights: Array, *, threshold: float | None
) -> Draws:
    """Resampled image metrics; exact, ties included."""
    parts = [_rank_draws(scores, truth, weights[rows]) for rows in _chunks(len(weights), RESAMPLES_AT_ONCE)]
    draws = _joined(parts)
    if threshold is not None:
        right = (scores > threshold) == truth
        for name, members in (("det_sensitivity", truth), ("det_specificity", ~truth)):
            draws[name] = _ratio(weights @ (right & members).astype(float), weights @ members.astype(float))
    return draws


def _rank_draws(scores: Array, truth: NDArray[np.bool_], weights: Array) -> Draws:
    """AUROC and AP of weighted images [R,N]: the curves of `_curve_draws` at every distinct score."""
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.inf))
    counts = [np.add.reduceat(weights[:, order] * side[order], starts, axis=1) for side in (~truth, truth)]
    negative, positive = (np.cumsum(each, axis=1) for each in counts)
    precision, recall, _ = _best_f1(negative, positive)
    return {
        "det_auroc": _auroc(negative, positive),
        "det_ap": _ap(negative, positive),
        "oracle_det_precision": precision,
        "oracle_det_recall": recall,
    }


# Pixels


def _pixel_results(
    pixels: PixelSet, weights: Array, *, threshold: float | None, summary: PixelSummary | None = None
) -> tuple[Mapping[str, Measure], Draws]:
    """Exact values and resampled ones; `weights` [R,n] of the images that count in `pixels`."""
    if summary is None and pixels.nbytes > MAPS_AT_ONCE:
        summary = summarise_pixels(pixels.parts)
    if summary is None:
        ranking = rank_pixels(*pixels.whole())
        values, grid = ranked_measures(ranking), ranking.grid
    else:
        values, grid = summary.measures, summary.grid
    draws = _curve_draws(pixels, grid, weights) if len(weights) else {}
    if threshold is None:
        return values | {name: Measure(None, "no map threshold") for name in RULE}, draws
    rule, rule_draws = _rule(pixels, weights, threshold)
    return values | rule, draws | rule_draws


def _rule(pixels: PixelSet, weights: Array, threshold: float) -> tuple[dict[str, Measure], Draws]:
    """Precision, recall and Dice at a fixed threshold, and resampled; both exact."""
    if np.isnan(threshold):
        raise InputError("map threshold", "it is NaN, expected a number")
    pairs = (pair for part in pixels.parts() for pair in zip(*part, strict=True))
    counts = np.array([pixel_counts(each, mask, threshold) for each, mask in pairs], dtype=np.int64)
    hits, false, positive = (weights @ counts.astype(float)).T
    draws = {
        "precision": _ratio(hits, hits + false),
        "recall": _ratio(hits, positive),
        "dice": _ratio(2 * hits, hits + false + positive),
    }
    return counted_rule(*counts.sum(axis=0).tolist()), draws


def image_curve(anomaly_map: Array, mask: NDArray[np.bool_], grid: Array) -> tuple[Array, int]:
    """Counts of one image at thresholds `grid` (ascending): ([3,T], number of regions).

    Rows: negatives, positives, and summed shares of the regions, with at least that score; highest threshold
    first, so that each row ascends.
    """
    weight, n_regions = region_weights(mask)
    negative, positive = np.sort(anomaly_map[~mask]), anomaly_map[mask]
    order = np.argsort(positive)
    covered = np.concatenate([np.cumsum(weight[order][::-1])[::-1], [0.0]])
    below = np.searchsorted(positive[order], grid)
    false = len(negative) - np.searchsorted(negative, grid)
    return np.stack([false, len(positive) - below, covered[below]])[:, ::-1], n_regions


def _curve_draws(pixels: PixelSet, grid: Array, weights: Array) -> Draws:
    """Resampled metrics without threshold, from weighted sums of the images' curves."""
    from scipy.linalg.blas import dgemm

    totals = np.zeros((len(weights), 3 * len(grid))).T  # column-major, as BLAS adds to it in place
    regions = np.zeros(len(weights))
    with ThreadPoolExecutor(THREADS) as pool:
        for rows, part in zip(_chunks(len(pixels), IMAGES_AT_ONCE), pixels.parts(), strict=True):
            found = pool.map(partial(image_curve, grid=grid), *part)
            curves, counts = zip(*found, strict=True)
            each = np.stack(curves).reshape(len(curves), -1)
            totals = dgemm(1.0, each.T, weights[:, rows].T, beta=1.0, c=totals, overwrite_c=True)
            regions += weights[:, rows] @ np.array(counts, dtype=float)
    shaped = totals.T.reshape(len(weights), 3, len(grid))
    return _joined(
        [_summary(shaped[rows], regions[rows]) for rows in _chunks(len(weights), RESAMPLES_AT_ONCE)]
    )


def _summary(curves: Array, regions: Array) -> Draws:
    """Metrics of summed curves [R,3,T]: negatives, positives, region shares; and number of regions [R]."""
    negative, positive = curves[:, 0], curves[:, 1]
    overlap = _ratio(curves[:, 2], regions[:, None])
    precision, recall, dice = _best_f1(negative, positive)
    defined = (positive[:, -1] > 0) & (negative[:, -1] > 0)
    found = {
        "seg_auroc": _auroc(negative, positive),
        "seg_ap": _ap(negative, positive),
        "seg_aupro": _area(_ratio(negative, negative[:, -1:]), overlap, FPR_LIMIT) / FPR_LIMIT,
        "oracle_f1_precision": precision,
        "oracle_f1_recall": recall,
        "oracle_dice": dice,
    }
    return {name: np.where(defined, each, np.nan) for name, each in found.items()}


# Curves of many resamples at once: cumulative counts [R,T], highest threshold first, last column = all


def _auroc(negative: Array, positive: Array) -> NDArray[np.float64]:
    return _area(_ratio(negative, negative[:, -1:]), _ratio(positive, positive[:, -1:]), 1.0)


def _ap(negative: Array, positive: Array) -> NDArray[np.float64]:
    steps = np.diff(positive, axis=1, prepend=0)
    precision = _ratio(positive, positive + negative, empty=0.0)  # nothing found yet: the step is 0 as well
    return _ratio((steps * precision).sum(axis=1), positive[:, -1])


def _best_f1(negative: Array, positive: Array) -> tuple[Array, Array, Array]:
    """Precision, recall and F1 (= Dice) [R] at each curve's own best threshold."""
    dice = _ratio(2 * positive, positive + negative + positive[:, -1:])
    best = np.argmax(dice, axis=1, keepdims=True)
    hits, false, top = (np.take_along_axis(each, best, axis=1)[:, 0] for each in (positive, negative, dice))
    return _ratio(hits, hits + false), _ratio(hits, positive[:, -1]), top


def _area(rates: Array, heights: Array, limit: float) -> NDArray[np.float64]:
    """Trapezoids under curves [R,T] from rate 0 to `limit`, cut linearly there."""
    start = np.zeros((len(rates), 1))
    rates, heights = np.hstack([start, rates]), np.hstack([start, heights])
    width, rise = np.diff(rates, axis=1), np.diff(heights, axis=1)
    inside = np.clip(limit - rates[:, :-1], 0.0, width)
    slope = _ratio(rise, width, empty=0.0)
    return (inside * (heights[:, :-1] + 0.5 * inside * slope)).sum(axis=1)


def _ratio(part: Array, whole: Array, *, empty: float = np.nan) -> NDArray[np.float64]:
    """Quotients; `empty` where whole is 0."""
    shape = np.broadcast_shapes(part.shape, whole.shape)
    return np.divide(part, whole, out=np.full(shape, empty), where=np.broadcast_to(whole, shape) != 0)


def _chunks(count: int, length: int) -> list[slice]:
    return [slice(start, start + length) for start in range(0, count, length)]


def _joined(parts: Sequence[Draws]) -> Draws:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
