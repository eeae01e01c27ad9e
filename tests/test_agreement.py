import math

import numpy as np
import pytest

from umiad.agreement import changed_decisions, map_difference, share
from umiad.calibration import fit_calibration

RAMP = np.linspace(1.0, 3.0, 16, dtype=np.float32).reshape(4, 4)


def test_a_map_differs_by_a_share_of_its_range():
    assert map_difference(RAMP, RAMP) == 0
    assert map_difference(RAMP, RAMP + np.float32(0.5)) == pytest.approx(0.25)


def test_a_flat_map_differs_by_a_share_of_its_value():
    flat = np.full((4, 4), 2.0, dtype=np.float32)
    assert map_difference(flat, flat + np.float32(0.5)) == pytest.approx(0.25)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_infinitely_far(value):
    other = RAMP.copy()
    other[0, 0] = value
    assert map_difference(RAMP, other) == math.inf
    assert share(value, 1.0) == math.inf


def test_a_difference_from_nothing_is_infinite_and_none_is_none():
    assert (share(0.0, 0.0), share(1e-9, 0.0)) == (0.0, math.inf)


def test_decisions_of_an_image_and_of_its_map_are_counted_apart():
    calibration = fit_calibration([0.0, 1.0], [0.0, 2.0], fpr=0.5, source="holdout")
    above, below = calibration.map_threshold + 1, calibration.map_threshold - 1
    maps = np.full((3, 2, 2), below)
    scores = np.full(3, calibration.image_threshold)  # on the threshold is not above it
    other_maps, other_scores = maps.copy(), scores.copy()
    assert changed_decisions((maps, scores), (other_maps, other_scores), calibration) == 0
    other_maps[0, 1, 0] = above
    other_scores[:2] += 0.5
    assert changed_decisions((maps, scores), (other_maps, other_scores), calibration) == 3
