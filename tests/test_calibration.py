from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from umiad.calibration import Calibration, find_regions, fit_calibration, make_finding
from umiad.errors import ConfigError, InputError
from umiad.types import Region


def calibrated(n: int = 19, fpr: float = 0.05) -> Calibration:
    """Image scores 1..n and map maxima 10, 20..10 n."""
    scores = np.arange(n, 0, -1.0)
    return fit_calibration(scores, 10 * scores, fpr=fpr, source="holdout")


# Thresholds


@pytest.mark.parametrize(
    ("n", "fpr", "rank"),
    [
        (19, 0.05, 19),  # 20 * 0.95 = 19 exactly; in floats 20 * (1 - 0.05) = 19.0 but 1 - 0.05 is inexact
        (99, 0.01, 99),
        (99, 0.05, 95),
        (9, 0.1, 9),
        (9, 0.7, 3),  # floats: 10 * (1 - 0.7) = 3.0000000000000004, whose ceiling is 4
        (20, 0.05, 20),
        (100, 0.05, 96),
        (1, 0.5, 1),
    ],
)
def test_the_threshold_is_the_finite_sample_quantile(n, fpr, rank):
    calibration = calibrated(n, fpr)
    assert calibration.image_threshold == rank
    assert calibration.map_threshold == 10 * rank
    assert calibration.fpr_bound is None
    assert f"number {rank} of {n}" in calibration.rule


@pytest.mark.parametrize(("n", "fpr"), [(18, 0.05), (1, 0.05), (9, 0.09)])
def test_too_few_images_bound_the_rate_by_the_largest(n, fpr):
    calibration = calibrated(n, fpr)
    assert calibration.image_threshold == n
    assert calibration.fpr_bound == 1 / (n + 1)
    assert "too few images" in calibration.rule


def test_scores_are_kept_in_ascending_order():
    calibration = fit_calibration([3, 1, 2], [0.5, 0.7, 0.6], fpr=0.3, source="calibrate")
    assert calibration.image_scores == (1.0, 2.0, 3.0)
    assert calibration.map_maxima == (0.5, 0.6, 0.7)
    assert calibration.source == "calibrate"


@pytest.mark.parametrize("fpr", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_rates_outside_0_to_1_are_refused(fpr):
    with pytest.raises(ConfigError, match="fpr"):
        fit_calibration([1.0], [1.0], fpr=fpr, source="holdout")


@pytest.mark.parametrize(
    ("scores", "maxima", "message"),
    [
        ([], [], "at least 1 normal image"),
        ([[1.0]], [[1.0]], r"expected \[n\]"),
        ([1.0, math.nan], [1.0, 2.0], "image scores: 1 are NaN"),
        ([1.0, 2.0], [1.0, math.inf], "map maxima: 1 are NaN"),
        ([1.0, 2.0], [1.0], "2 image scores and 1 map maxima"),
    ],
)
def test_unusable_scores_are_refused(scores, maxima, message):
    with pytest.raises(InputError, match=message):
        fit_calibration(scores, maxima, source="holdout")


# Statistics


def test_the_false_positive_rate_holds_in_simulation():
    rng = np.random.default_rng(0)
    for n, fpr in ((19, 0.05), (30, 0.1), (12, 0.05)):
        scores = rng.lognormal(size=(4000, n + 1))
        above = 0
        for *held_out, new in scores.tolist():
            above += fit_calibration(held_out, held_out, fpr=fpr, source="holdout").is_above(new)
        bound = max(fpr, 1 / (n + 1))
        # expected at most `bound`; 4 standard deviations of a share of 4000 trials
        assert above / 4000 <= bound + 4 * math.sqrt(bound / 4000)


def test_p_values_of_normal_images_are_uniform():
    rng = np.random.default_rng(1)
    scores = rng.standard_normal((4000, 20))
    found = np.array(
        [fit_calibration(row[:-1], row[:-1], source="holdout").p_value(row[-1]) for row in scores]
    )
    counts = np.bincount(np.round(found * 20).astype(int), minlength=21)[1:]
    # 20 equally likely values, 200 each; chi-squared with 19 degrees exceeds 50 once in 7,000 times
    assert ((counts - 200) ** 2 / 200).sum() < 50


def test_p_values_stay_valid_with_ties():
    rng = np.random.default_rng(2)
    scores = rng.integers(0, 4, size=(4000, 20)).astype(float)
    found = np.array(
        [fit_calibration(row[:-1], row[:-1], source="holdout").p_value(row[-1]) for row in scores]
    )
    for level in (0.05, 0.1, 0.25, 0.5):
        assert (found <= level).mean() <= level + 4 * math.sqrt(level / 4000)


@given(
    st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=30),
    st.integers(-6, 6).map(float),
    st.sampled_from([0.01, 0.05, 0.1, 0.3, 0.5, 0.9]),
)
def test_p_value_and_threshold_tell_the_same_story(scores, new, fpr):
    calibration = fit_calibration(scores, scores, fpr=fpr, source="holdout")
    p = calibration.p_value(new)
    assert p == (1 + sum(score >= new for score in scores)) / (len(scores) + 1)
    if calibration.fpr_bound is None:
        # tolerance: the p-value is one float division
        assert calibration.is_above(new) == (p <= fpr + 1e-12)
    else:
        assert calibration.is_above(new) == (p == calibration.fpr_bound)


def test_equal_to_the_threshold_is_not_above():
    calibration = calibrated()
    assert not calibration.is_above(19.0)
    assert calibration.is_above(math.nextafter(19.0, 20.0))
    assert calibration.p_value(1e9) == 1 / 20
    assert calibration.p_value(-1e9) == 1.0


@pytest.mark.parametrize("method", ["p_value", "is_above"])
def test_nan_is_no_score(method):
    with pytest.raises(InputError, match="NaN"):
        getattr(calibrated(), method)(math.nan)


# Stored form


def test_it_survives_json():
    calibration = calibrated(12)
    assert Calibration.parse(json.loads(json.dumps(calibration.canonical()))) == calibration


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_scores": [2.0, 1.0, 3.0]}, "image_scores is not in ascending order"),
        ({"map_maxima": [1.0, 2.0]}, "map_maxima holds 2 numbers, expected n = 3"),
        ({"n": 0}, "n: "),
        ({"fpr": 1.5}, "fpr: "),
        ({"image_threshold": math.nan}, "image_threshold"),
        ({"source": "guess"}, "source: "),
        ({"thresold": 1.0}, "unknown key"),
    ],
)
def test_altered_calibrations_are_refused(change, message):
    values = calibrated(3, 0.5).canonical()
    with pytest.raises(ConfigError, match=message):
        Calibration.parse(values | change)


# Regions


def test_regions_are_8_connected_and_sorted_by_peak():
    anomaly_map = np.zeros((6, 8))
    anomaly_map[0, 0], anomaly_map[1, 1] = 2.0, 3.0  # diagonal neighbours: one region
    anomaly_map[4:6, 5:8] = 5.0
    regions = find_regions(anomaly_map, 1.0)
    assert regions == (Region((5, 4, 8, 6), 6, 5.0), Region((0, 0, 2, 2), 2, 3.0))


def test_a_region_inside_the_box_of_another_keeps_its_own_peak_and_area():
    anomaly_map = np.zeros((7, 7))
    anomaly_map[0], anomaly_map[:, 0] = 1.0, 1.0
    anomaly_map[4, 4] = 9.0
    assert find_regions(anomaly_map, 0.5) == (Region((4, 4, 5, 5), 1, 9.0), Region((0, 0, 7, 7), 13, 1.0))


def test_equal_peaks_are_ordered_by_area_and_place():
    anomaly_map = np.zeros((1, 8))
    anomaly_map[0, [0, 3, 6, 7]] = 1.0
    assert [region.box[0] for region in find_regions(anomaly_map, 0.0)] == [6, 0, 3]


def test_only_strictly_above_counts():
    assert find_regions(np.ones((3, 3)), 1.0) == ()
    assert find_regions(np.full((3, 3), 0.1, dtype=np.float32), 0.1) != ()  # float32(0.1) > 0.1


def test_small_regions_can_be_left_out():
    anomaly_map = np.zeros((4, 4))
    anomaly_map[0, 0], anomaly_map[2:, 2:] = 9.0, 1.0
    assert [region.area for region in find_regions(anomaly_map, 0.5, min_area=2)] == [4]


@pytest.mark.parametrize(
    ("anomaly_map", "message"),
    [
        (np.zeros((2, 2, 2)), r"\[2, 2, 2\], expected \[H,W\]"),
        (np.zeros((0, 4)), r"expected \[H,W\]"),
        (np.array([[np.nan]]), "NaN or infinity"),
    ],
)
def test_unusable_maps_are_refused(anomaly_map, message):
    with pytest.raises(InputError, match=message):
        find_regions(anomaly_map, 0.0)


def test_unusable_settings_are_refused():
    with pytest.raises(ConfigError, match="min_area 0"):
        find_regions(np.zeros((2, 2)), 0.0, min_area=0)
    with pytest.raises(InputError, match="map threshold"):
        find_regions(np.zeros((2, 2)), math.nan)


# Findings


def test_a_finding_says_what_the_calibration_says():
    anomaly_map = np.zeros((4, 5))
    anomaly_map[1, 2] = 191.0
    finding = make_finding("a.png", 19.5, anomaly_map, calibrated(), notes=("alpha removed",))
    assert (finding.name, finding.image_score, finding.p_value) == ("a.png", 19.5, 1 / 20)
    assert finding.above_threshold is True
    assert finding.threshold == 19.0
    assert finding.regions == (Region((2, 1, 3, 2), 1, 191.0),)
    assert finding.reason == ""
    assert finding.notes == ("alpha removed",)
    assert finding.anomaly_map.dtype == np.float32
    assert json.loads(json.dumps(finding.to_json()))["above_threshold"] is True


def test_min_area_reaches_the_regions():
    anomaly_map = np.zeros((4, 5))
    anomaly_map[1, 2] = 191.0
    assert make_finding("a.png", 1.0, anomaly_map, calibrated(), min_area=2).regions == ()


def test_without_calibration_a_finding_has_a_reason():
    finding = make_finding("a.png", 3.0, np.ones((2, 2)), None)
    assert finding.p_value is finding.above_threshold is finding.threshold is None
    assert finding.regions == ()
    assert "--holdout 0" in finding.reason


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_finding_needs_a_finite_score(score):
    with pytest.raises(InputError, match=r"b\.png: the image score is"):
        make_finding("b.png", score, np.ones((2, 2)), None)
