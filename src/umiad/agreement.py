"""How far one way of scoring is from another, map by map; for what runs in another precision or runtime."""

from __future__ import annotations

import math

import numpy as np

from umiad.calibration import Calibration

FLAT = 1e-6
"""A map whose range is a smaller share of its largest value is flat: differences are then taken of that value."""


def map_difference(expected: np.ndarray, found: np.ndarray) -> float:
    """Largest difference of a value of two maps [S,S], as a share of the range of `expected`; infinite for NaN."""
    highest, spread = float(np.abs(expected).max()), float(np.ptp(expected))
    return share(float(np.abs(found - expected).max()), spread if spread > FLAT * highest else highest)


def changed_decisions(
    expected: tuple[np.ndarray, np.ndarray], found: tuple[np.ndarray, np.ndarray], calibration: Calibration
) -> int:
    """Of maps [N,S,S] and image scores [N] in two ways: how many decisions differ, of an image or of its map."""
    (maps, scores), (other_maps, other_scores) = expected, found
    images = (scores > calibration.image_threshold) != (other_scores > calibration.image_threshold)
    peaks, other_peaks = (each.max(axis=(1, 2)) for each in (maps, other_maps))
    anywhere = (peaks > calibration.map_threshold) != (other_peaks > calibration.map_threshold)
    return int(images.sum() + anywhere.sum())


def share(difference: float, whole: float) -> float:
    """`difference` as a share of `whole`; infinite where it is no number, or a difference from nothing."""
    if difference == 0:
        return 0.0
    return difference / whole if math.isfinite(difference) and whole > 0 else math.inf
