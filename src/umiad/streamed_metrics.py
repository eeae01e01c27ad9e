"""The exact pixel metrics of `umiad.metrics` in bounded memory, for more maps than are ranked at once.

Pixels come in slabs by falling score (`umiad.pixel_slabs`). All counts are integers, so AUROC is exact; the other
figures are sums of float64 terms and differ from those of `umiad.metrics` by rounding only. Overlaps are summed
from counts per area of region and therefore do not drift however many pixels there are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from umiad.metrics import (
    CURVE_POINTS,
    FPR_LIMIT,
    GRID_NEGATIVE,
    GRID_POSITIVE,
    Array,
    Curve,
    Measure,
    UndefinedMetric,
    check_limit,
    quantile_ranks,
    require_both,
)
from umiad.pixel_slabs import Chunks, PixelSlabs, Slab, Tie, Totals, add_counts
from umiad.score_order import scores_of

MAPS_AT_ONCE = 1 << 28
"""Bytes of maps that are ranked at once (1024 of 256 x 256 in float32); more are streamed."""
BUDGET = 1 << 29
"""Bytes of pixels held at once while streaming."""
BLOCK = 1 << 16
"""Vertices of the curves computed together."""
NAMES = (
    "seg_auroc",
    "seg_ap",
    "seg_aupro",
    *(f"oracle_{n}" for n in ("f1_precision", "f1_recall", "dice", "threshold")),
)


@dataclass(frozen=True, eq=False)
class PixelSummary:
    """Pixel metrics and curves of many maps.

    `measures`: as `umiad.metrics.ranked_measures`; `grid` [T]: as in `umiad.metrics.Ranking`; `roc`, `pro`: at
    most 1000 points each, none further off than 2/998; None where undefined. `passes`: how often the maps were
    read; `held`: most bytes of pixels held at once.
    """

    measures: dict[str, Measure]
    grid: Array
    roc: Curve | None
    pro: Curve | None
    passes: int
    held: int


def summarise_pixels(chunks: Chunks, *, budget: int = BUDGET, fpr_limit: float = FPR_LIMIT) -> PixelSummary:
    """Exact AUROC, AP, AUPRO and best F1 of all pixels of `chunks`, holding at most `budget` bytes of them.

    `chunks`: pairs of maps [n,H,W] (finite, higher = more anomalous) and masks [n,H,W], as a sequence or as a
    function that starts a new reading; they are read several times. Equals `umiad.metrics.evaluate_maps` of all
    chunks joined. What does not exist is None with a reason.

    Raises InputError as `umiad.metrics.rank_pixels`, also when chunks differ in height or width or from one
    reading to the next; ConfigError when `fpr_limit` is not in (0, 1] or the budget is not positive.
    """
    check_limit(fpr_limit)
    slabs = PixelSlabs(chunks, budget=budget)
    totals = slabs.totals
    try:
        require_both(totals.n_positive, totals.n_negative)
    except UndefinedMetric as error:
        measures = {name: Measure(None, error.reason) for name in NAMES}
        ends = [totals.lowest, totals.highest] if totals.n_positive or totals.n_negative else []
        grid = scores_of(np.unique(np.array(ends, dtype=f"u{totals.dtype.itemsize}")))
        return PixelSummary(measures, grid, None, None, slabs.passes, slabs.held)
    curve = _Curve(totals, fpr_limit)
    for slab in slabs:
        if isinstance(slab, Tie):
            curve.add_tie(slab)
        else:
            curve.add_slab(slab)
        del slab  # before the next one is made
    measures, roc, pro = curve.finish()
    return PixelSummary(measures, curve.grid(), roc, pro, slabs.passes, slabs.held)


class _Vertices(NamedTuple):
    """Consecutive distinct scores of positives, highest first; all counts from the highest score on."""

    keys: Array
    hits: NDArray[np.int64]
    above: NDArray[np.int64]
    at_least: NDArray[np.int64]
    overlap: NDArray[np.float64]


class _Curve:
    """The curves so far, from the highest score down, and the sums that become the metrics."""

    def __init__(self, totals: Totals, fpr_limit: float) -> None:
        self._totals, self._limit = totals, fpr_limit
        self._hits = self._false = 0  # positives and negatives passed
        self._areas = np.zeros(1, dtype=np.int64)  # positives passed, by the area of their region
        self._doubled = 0
        self._precisions: list[float] = []
        self._trapezoids: list[float] = []
        self._best = (-1.0, 0, 0, np.zeros(1, dtype=f"u{totals.dtype.itemsize}"))
        self._end = (0.0, 0.0, 0.0)  # false-positive rate, true-positive rate, overlap
        self._roc, self._pro = _Drawn(2.0), _Drawn(1.0 + fpr_limit)
        self._quantiles = (
            _Quantiles(totals.n_negative, GRID_NEGATIVE),
            _Quantiles(totals.n_positive, GRID_POSITIVE),
        )

    def add_slab(self, slab: Slab) -> None:
        """Pass the pixels of a slab."""
        positive, areas, negative = slab.positive, slab.areas, slab.negative
        self._quantiles[0].take(negative, self._false)
        self._quantiles[1].take(positive[::-1], self._hits)
        ends = np.flatnonzero(np.append(positive[1:] != positive[:-1], np.ones(min(1, len(positive)), bool)))
        hits, start = self._hits, 0
        for place in range(0, len(ends), BLOCK):
            last = ends[place : place + BLOCK]
            stop = int(last[-1]) + 1
            keys, part = positive[last], areas[start:stop]
            covered = np.cumsum(1.0 / part)[last - start]
            below = [len(negative) - np.searchsorted(negative, keys, side=side) for side in ("right", "left")]
            self._extend(
                _Vertices(
                    keys,
                    hits + last + 1,
                    self._false + below[0],
                    self._false + below[1],
                    (self._covered() + covered) / self._totals.n_regions,
                )
            )
            self._areas = add_counts(self._areas, np.bincount(part))
            start = stop
        self._false += len(negative)

    def add_tie(self, tie: Tie) -> None:
        """Pass the equal pixels of one score."""
        n_positive = int(tie.areas.sum())
        self._quantiles[0].take(np.broadcast_to(tie.key, tie.n_negative), self._false)
        self._quantiles[1].take(np.broadcast_to(tie.key, n_positive), self._hits)
        self._areas = add_counts(self._areas, tie.areas)
        if n_positive:
            counts = (self._hits + n_positive, self._false, self._false + tie.n_negative)
            hits, above, at_least = (np.array([each]) for each in counts)
            overlap = np.array([self._covered() / self._totals.n_regions])
            self._extend(_Vertices(tie.key, hits, above, at_least, overlap))
        self._false += tie.n_negative

    def _covered(self) -> float:
        """Summed shares of all regions passed so far."""
        sizes = np.flatnonzero(self._areas)
        return math.fsum((self._areas[sizes] / sizes).tolist())

    def _extend(self, vertices: _Vertices) -> None:
        n_negative, n_positive = self._totals.n_negative, self._totals.n_positive
        _, hits, above, at_least, overlap = vertices
        new = np.diff(hits, prepend=self._hits)
        outranked = 2 * n_negative - above - at_least
        # the first alone may be a tie so large that its product needs more than 64 bits
        self._doubled += int(new[0]) * int(outranked[0]) + int(np.sum(new[1:] * outranked[1:]))
        self._precisions.append(float(np.sum(new * (hits / (hits + at_least)))))
        dice = 2 * hits / (n_positive + hits + at_least)
        best = int(np.argmax(dice))
        if dice[best] > self._best[0]:
            self._best = (
                float(dice[best]),
                int(hits[best]),
                int(at_least[best]),
                vertices.keys[best : best + 1],
            )
        rates = np.concatenate([[self._end[0]], np.stack([above, at_least], axis=1).ravel() / n_negative])
        self._draw(rates, _steps(self._end[1], hits / n_positive), _steps(self._end[2], overlap))
        self._hits = int(hits[-1])

    def _draw(self, rates: Array, found: Array, overlap: Array) -> None:
        """Append a piece of the curves that begins at the end of the last one."""
        self._roc.extend(rates, found)
        limit = self._limit
        if rates[0] < limit:
            if rates[-1] > limit:
                stop = int(np.searchsorted(rates, limit, side="right"))
                height = np.interp(limit, rates, overlap)
                inside = np.append(rates[:stop], limit), np.append(overlap[:stop], height)
            else:
                inside = rates, overlap
            self._trapezoids.append(float(np.trapezoid(inside[1], inside[0])))
            self._pro.extend(*inside)
        self._end = (float(rates[-1]), float(found[-1]), float(overlap[-1]))

    def finish(self) -> tuple[dict[str, Measure], Curve, Curve]:
        """Measures, ROC and PRO curve, after the last pixel."""
        n_negative, n_positive = self._totals.n_negative, self._totals.n_positive
        last = [np.array([each, 1.0]) for each in self._end]
        self._draw(*last)
        dice, hits, false, key = self._best
        score = scores_of(key)
        with np.errstate(over="ignore"):  # below the lowest float of its type lies -inf
            threshold = np.nextafter(score, score.dtype.type(-np.inf))
        values = (
            self._doubled / (2 * n_positive * n_negative),
            math.fsum(self._precisions) / n_positive,
            math.fsum(self._trapezoids) / self._limit,
            hits / (hits + false),
            hits / n_positive,
            dice,
            float(threshold[0]),
        )
        measures = {name: Measure(value) for name, value in zip(NAMES, values, strict=True)}
        return measures, self._roc.points(), self._pro.points()

    def grid(self) -> Array:
        """Quantiles of negatives and positives, ascending."""
        return scores_of(np.union1d(*(each.found() for each in self._quantiles)))


class _Drawn:
    """A thinned curve: the first vertex beyond each of at most 998 lengths, its first and its last point."""

    def __init__(self, length: float) -> None:
        self._lengths = np.linspace(0.0, length, CURVE_POINTS - 1)
        self._next = 0
        self._parts: list[NDArray[np.float64]] = []
        self._last = np.zeros((2, 1))

    def extend(self, rates: Array, heights: Array) -> None:
        """Append a piece that begins where the last one ended."""
        passed = rates + heights
        stop = int(np.searchsorted(self._lengths, passed[-1], side="right"))
        chosen = np.unique(np.searchsorted(passed, self._lengths[self._next : stop]))
        points = np.stack([rates, heights])
        self._parts.append(points[:, chosen])
        self._next, self._last = max(self._next, stop), points[:, -1:]

    def points(self) -> Curve:
        """(rates, heights), ascending."""
        rates, heights = np.hstack([*self._parts, self._last])
        keep = np.append(True, (np.diff(rates) != 0) | (np.diff(heights) != 0))
        return rates[keep], heights[keep]


class _Quantiles:
    """Order statistics at evenly spaced ranks, collected from the highest slab down."""

    def __init__(self, total: int, count: int) -> None:
        self._total = total
        self._ranks = quantile_ranks(total, count)
        self._parts: list[Array] = []

    def take(self, ascending: Array, passed: int) -> None:
        """Keep the wanted ones of a slab; `passed`: how many lie above it."""
        below = self._total - passed - len(ascending)
        first, stop = np.searchsorted(self._ranks, [below, self._total - passed])
        self._parts.append(ascending[self._ranks[first:stop] - below])

    def found(self) -> Array:
        """All of them, in any order."""
        return np.concatenate(self._parts)


def _steps(start: float, heights: Array) -> NDArray[np.float64]:
    """Heights at the vertices of a piece: flat to each score, then up (or slanted, with ties) at it."""
    steps = np.empty(2 * len(heights) + 1)
    steps[0] = steps[1] = start
    steps[3::2], steps[2::2] = heights[:-1], heights
    return steps
