"""Thresholds, p-values and regions from the scores of normal images alone.

Split-conformal reasoning (Vovk et al., 2005; Lei et al., 2018): when n held-out normal images and a new
normal image are exchangeable, the new score lies strictly above the ceil((n + 1)(1 - fpr))-th smallest
held-out score with probability at most `fpr`, whatever the distribution. Nothing is above a threshold that
merely equals it.

With few normal images a hold-out leaves few scores. Scores by folds (source "folds") use them all: each image is
scored by a fit without its fold, as in cross-conformal prediction (Vovk, 2015). Deviation: a new image is scored by the
one model that was fitted on all of them, not by every fold's, so the rate is aimed at and no theorem keeps it; the
folds' fits have seen fewer images, which makes their scores of unseen ones rather higher (docs/decisions/0012).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, model_validator

from umiad.config import Config
from umiad.errors import ConfigError, InputError
from umiad.types import Finding, Region

NO_CALIBRATION = (
    "the model was fitted with --holdout 0: no held-out normal images to compare with "
    "(umiad calibrate sets a threshold)"
)


Source: TypeAlias = Literal["holdout", "folds", "calibrate"]


class Calibration(Config):
    """What the scores of `n` normal images that the detector was not fitted on say about new images.

    `source`: "holdout" (kept back from fitting), "folds" (each scored by a fit without its fold, see above) or
    "calibrate" (a site's own images); `fpr`: the wished false-positive rate per image; `image_scores`, `map_maxima`
    [n], ascending; a new normal image is above `image_threshold`, or its map above `map_threshold` anywhere, with
    probability at most `fpr` each (by folds: about `fpr`).
    `fpr_bound`: None, or, where n is too small for `fpr`, the 1 / (n + 1) that holds instead (the thresholds
    are then the largest scores). `rule`: how the thresholds were chosen, for people.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    source: Source
    fpr: float = Field(gt=0, lt=1)
    n: int = Field(ge=1)
    image_scores: tuple[float, ...]
    map_maxima: tuple[float, ...]
    image_threshold: float
    map_threshold: float
    fpr_bound: float | None
    rule: str

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, scores in (("image_scores", self.image_scores), ("map_maxima", self.map_maxima)):
            if len(scores) != self.n:
                raise ValueError(f"{name} holds {len(scores)} numbers, expected n = {self.n}")
            if any(first > second for first, second in pairwise(scores)):
                raise ValueError(f"{name} is not in ascending order")
        return self

    def p_value(self, score: float) -> float:
        """(1 + number of held-out normal images that score at least as high) / (n + 1), in 1/(n+1)..1.

        For a new normal image P(p_value <= a) <= a (by folds: about a). Raises InputError when `score` is NaN.
        """
        _check_number(score, "image score")
        return (1 + self.n - bisect_left(self.image_scores, score)) / (self.n + 1)

    def is_above(self, score: float) -> bool:
        """Whether `score` lies strictly above the image threshold; equal is not above, so the rate holds."""
        _check_number(score, "image score")
        return score > self.image_threshold


def fit_calibration(
    image_scores: Sequence[float],
    map_maxima: Sequence[float],
    *,
    fpr: float = 0.05,
    source: Source,
) -> Calibration:
    """Thresholds from the image scores [n] and map maxima [n] of normal images the detector never saw.

    Each threshold is the ceil((n + 1)(1 - fpr))-th smallest; where that exceeds n (n < 1 / fpr - 1) the
    largest, and `fpr_bound` says which rate holds. `fpr` is taken as the decimal number it is written as.

    Raises ConfigError when `fpr` is not in (0, 1), InputError on no, unequally many or non-finite scores.
    """
    if not 0 < fpr < 1:
        raise ConfigError(f"fpr {fpr}, expected a rate between 0 and 1, both excluded")
    scores, maxima = _ascending(image_scores, "image scores"), _ascending(map_maxima, "map maxima")
    if len(scores) != len(maxima):
        raise InputError(
            "calibration", f"{len(scores)} image scores and {len(maxima)} map maxima, expected as many"
        )
    n = len(scores)
    wished = math.ceil((n + 1) * (1 - Fraction(repr(float(fpr)))))
    rank = min(wished, n)
    bound = 1 / (n + 1) if wished > n else None
    return Calibration(
        source=source,
        fpr=float(fpr),
        n=n,
        image_scores=scores,
        map_maxima=maxima,
        image_threshold=scores[rank - 1],
        map_threshold=maxima[rank - 1],
        fpr_bound=bound,
        rule=_rule(rank, n, fpr=fpr, bound=bound, source=source),
    )


def _rule(rank: int, n: int, *, fpr: float, bound: float | None, source: Source) -> str:
    folds = source == "folds"
    kept = "about" if folds else "at most"
    rate = f"false-positive rate {kept} {fpr:g}"
    if bound is not None:
        rate = f"false-positive rate {kept} {bound:.3g}: too few images for {fpr:g}"
    scored = "normal images, each scored by a fit without its fold," if folds else "unseen normal images"
    return f"normal quantile: number {rank} of {n} scores of {scored} in ascending order ({rate})"


def _ascending(values: Sequence[float], name: str) -> tuple[float, ...]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise InputError(name, f"shape {list(array.shape)}, expected [n] with n of at least 1 normal image")
    if not np.isfinite(array).all():
        raise InputError(
            name, f"{np.count_nonzero(~np.isfinite(array))} are NaN or infinite, expected numbers"
        )
    return tuple(np.sort(array).tolist())


def _check_number(value: float, name: str) -> None:
    if math.isnan(value):
        raise InputError(name, "it is NaN, expected a number")


def find_regions(anomaly_map: Any, threshold: float, *, min_area: int = 1) -> tuple[Region, ...]:
    """The 8-connected regions of a map [H,W] strictly above `threshold`, highest peak first.

    Boxes (x0, y0, x1, y1) in pixels, x1 and y1 exclusive. Regions of fewer than `min_area` pixels are left
    out. Raises InputError on another shape or NaN, ConfigError when `min_area` is below 1.
    """
    if min_area < 1:
        raise ConfigError(f"min_area {min_area}, expected at least 1 pixel")
    _check_number(threshold, "map threshold")
    values = _checked_map(anomaly_map)
    above = values > np.float64(threshold)
    if not above.any():
        return ()
    from scipy import ndimage  # takes a fifth of a second, which most images need not wait for

    labels, count = ndimage.label(above, structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    regions = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        area = int(areas[number - 1])
        if area < min_area:
            continue
        window = (rows, columns)
        peak = float(values[window][labels[window] == number].max())
        regions.append(Region((columns.start, rows.start, columns.stop, rows.stop), area, peak))
    return tuple(sorted(regions, key=lambda region: (-region.peak, -region.area, region.box)))


def _checked_map(anomaly_map: Any) -> NDArray[Any]:
    values = np.asarray(anomaly_map)
    if values.ndim != 2 or not values.size:
        raise InputError("anomaly map", f"shape {list(values.shape)}, expected [H,W]")
    if not np.isfinite(values).all():
        raise InputError("anomaly map", "it holds NaN or infinity, expected finite numbers")
    return values


def make_finding(
    name: str,
    image_score: float,
    anomaly_map: Any,
    calibration: Calibration | None,
    *,
    min_area: int = 1,
    notes: tuple[str, ...] = (),
) -> Finding:
    """What a score and its map [H,W] (in the original image's pixels) mean beside normal images.

    Without calibration the finding has a reason instead of p-value, threshold and regions. Raises InputError
    and ConfigError as `find_regions`, InputError when the score is not finite.
    """
    if not math.isfinite(image_score):
        raise InputError(name, f"the image score is {image_score}, expected a finite number")
    anomaly_map = _checked_map(anomaly_map).astype(np.float32, copy=False)
    if calibration is None:
        return Finding(name, float(image_score), anomaly_map, None, None, None, (), NO_CALIBRATION, notes)
    return Finding(
        name=name,
        image_score=float(image_score),
        anomaly_map=anomaly_map,
        p_value=calibration.p_value(image_score),
        above_threshold=calibration.is_above(image_score),
        threshold=calibration.image_threshold,
        regions=find_regions(anomaly_map, calibration.map_threshold, min_area=min_area),
        notes=notes,
    )
