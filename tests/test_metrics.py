from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from umiad import metrics
from umiad.errors import ConfigError, InputError
from umiad.metrics import UndefinedMetric

EXACT = 1e-12  # integer counts and one division: rounding only
SUMMED = 1e-9  # sums of up to a few thousand float64 terms


def pixels(seed: int = 0, *, levels: int = 0, shape: tuple[int, int, int] = (5, 12, 14)):
    """Maps and masks with lesions of several sizes and one normal image; `levels` > 0 makes ties."""
    rng = np.random.default_rng(seed)
    masks = np.zeros(shape, dtype=bool)
    masks[1:] = ndimage.gaussian_filter(rng.standard_normal((shape[0] - 1, *shape[1:])), (0, 1.5, 1.5)) > 0.15
    maps = rng.standard_normal(shape) + masks
    return (np.round(maps * levels) / levels if levels else maps), masks


def slow_auroc(scores: np.ndarray, truth: np.ndarray) -> float:
    """The definition: share of (abnormal, normal) pairs in the right order, ties half."""
    difference = scores[truth][:, None] - scores[~truth][None, :]
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


def slow_aupro(maps: np.ndarray, masks: np.ndarray, limit: float) -> float:
    """The definition: every distinct threshold, every region, one at a time."""
    regions = []
    for index, mask in enumerate(masks):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [(index, labels == number) for number in range(1, count + 1)]
    points = [(0.0, 0.0)]
    for threshold in np.unique(maps)[::-1]:
        found = maps >= threshold
        overlap = np.mean([found[index][region].mean() for index, region in regions])
        points.append((found[~masks].mean(), float(overlap)))
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 >= limit:
            break
        if x1 > limit:
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


@st.composite
def labelled(draw: st.DrawFn):
    """Scores that survive monotone maps exactly, with ties, and both labels."""
    n = draw(st.integers(2, 40))
    scores = draw(hnp.arrays(np.float64, n, elements=st.integers(-20, 20).map(float)))
    truth = draw(hnp.arrays(np.bool_, n).filter(lambda t: t.any() and not t.all()))
    return scores, truth


# Images


@pytest.mark.parametrize("levels", [0, 2])
def test_det_auroc_is_the_share_of_ordered_pairs(levels):
    rng = np.random.default_rng(1)
    scores, truth = rng.standard_normal(300), rng.random(300) < 0.3
    scores = np.round(scores * levels) / levels if levels else scores
    assert metrics.det_auroc(scores, truth) == pytest.approx(slow_auroc(scores, truth), abs=EXACT)


@given(labelled())
def test_auroc_survives_monotone_maps_and_turns_with_the_sign(case):
    scores, truth = case
    value = metrics.det_auroc(scores, truth)
    assert metrics.det_auroc(np.exp(scores), truth) == pytest.approx(value, abs=EXACT)
    assert metrics.det_auroc(8 * scores - 3, truth) == pytest.approx(value, abs=EXACT)
    assert metrics.det_auroc(-scores, truth) == pytest.approx(1 - value, abs=EXACT)


def test_large_scores_keep_their_order():
    scores = np.array([1e6 - 1, 1e6, 1e6, 1e6 + 1])
    assert metrics.det_auroc(scores, [0, 0, 1, 1]) == pytest.approx(0.875, abs=EXACT)
    assert metrics.det_ap(scores, [0, 0, 1, 1]) == pytest.approx(0.5 + 0.5 * 2 / 3, abs=EXACT)


def test_scores_far_apart_are_not_saturated():
    scores = np.concatenate([30 + np.linspace(0, 1, 50), 60 + np.linspace(0, 1, 50)])
    assert metrics.det_auroc(scores, np.arange(100) >= 50) == 1.0


@pytest.mark.parametrize("compute", [metrics.det_auroc, metrics.det_ap])
@pytest.mark.parametrize(("label", "missing"), [(0, "no abnormal image"), (1, "no normal image")])
def test_one_class_only_is_undefined_with_a_reason(compute, label, missing):
    with pytest.raises(UndefinedMetric, match=missing) as caught:
        compute([0.1, 0.2], [label, label])
    assert missing in caught.value.reason


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1.0, np.nan], [0, 1], "1 of 2 scores are NaN"),
        ([1.0, np.inf], [0, 1], "NaN or infinite"),
        ([1.0, 2.0], [0, 2], "expected bool or 0 and 1"),
        ([1.0, 2.0, 3.0], [0, 1], r"shapes \[3\] and \[2\]"),
        ([[1.0, 2.0]], [[0, 1]], r"expected two equal shapes \[N\]"),
    ],
)
def test_unusable_scores_are_refused(scores, labels, message):
    with pytest.raises(InputError, match=message):
        metrics.det_auroc(scores, labels)


def test_boolean_scores_and_integer_labels_are_fine():
    assert metrics.det_auroc(np.array([False, True]), np.array([0, 1])) == 1.0


# Curves


def test_roc_points_hold_the_vertices_of_the_roc():
    rng = np.random.default_rng(2)
    scores, truth = np.round(rng.standard_normal(200), 1), rng.random(200) < 0.4
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=True)
    found = metrics.roc_points(scores, truth)
    np.testing.assert_allclose(np.interp(fpr, *found), np.interp(fpr, fpr, tpr), atol=EXACT)
    assert np.trapezoid(found[1], found[0]) == pytest.approx(roc_auc_score(truth, scores), abs=EXACT)


def test_long_curves_are_thinned_but_stay_close():
    maps, masks = pixels(shape=(6, 80, 80))
    rates, heights = metrics.roc_points(maps.ravel(), masks.ravel())
    assert len(rates) <= 1000
    assert (rates[0], heights[0], rates[-1], heights[-1]) == (0, 0, 1, 1)
    fpr, tpr, _ = roc_curve(masks.ravel(), maps.ravel())
    # the vertices left out lie within 2/998 of the kept ones, counted along both axes
    assert np.abs(np.interp(fpr, rates, heights) - tpr).max() < 4 / 998


def test_roc_points_need_both_classes():
    with pytest.raises(UndefinedMetric, match="no normal case"):
        metrics.roc_points([1.0, 2.0], [1, 1])


def test_pro_curve_ends_at_the_limit_and_has_the_area_of_aupro():
    maps, masks = pixels()
    rates, heights = metrics.pro_curve(maps, masks, fpr_limit=0.2)
    assert rates[0] == heights[0] == 0.0
    assert rates[-1] == pytest.approx(0.2)
    assert (np.diff(rates) >= 0).all()
    assert (np.diff(heights) >= 0).all()
    area = np.trapezoid(heights, rates) / 0.2
    assert area == pytest.approx(metrics.aupro(maps, masks, fpr_limit=0.2), abs=SUMMED)


# Maps: AUROC and AP


@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pixel_auroc_and_ap_equal_scikit_learn(levels, dtype):
    maps, masks = pixels(3, levels=levels)
    maps = maps.astype(dtype)
    flat = masks.ravel(), maps.ravel().astype(float)
    assert metrics.seg_auroc(maps, masks) == pytest.approx(roc_auc_score(*flat), abs=EXACT)
    assert metrics.seg_ap(maps, masks) == pytest.approx(average_precision_score(*flat), abs=EXACT)


def test_float64_scores_are_not_rounded_to_float32():
    maps = np.full((1, 1, 4), 1.0)
    maps[0, 0, 2:] += 1e-12
    masks = np.array([[[False, False, True, True]]])
    assert metrics.seg_auroc(maps, masks) == 1.0
    assert metrics.seg_auroc(maps.astype(np.float32), masks) == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_are_accepted(dtype):
    maps, masks = pixels(4, levels=2)
    tensor = torch.from_numpy(maps).to(dtype).requires_grad_()
    assert metrics.aupro(tensor, torch.from_numpy(masks)) == metrics.aupro(maps, masks)


# Maps: AUPRO


def test_perfect_and_constant_maps():
    _, masks = pixels()
    assert metrics.aupro(masks.astype(np.float32), masks) == pytest.approx(1.0, abs=SUMMED)
    assert metrics.aupro(np.ones(masks.shape), masks) == pytest.approx(0.15, abs=SUMMED)
    assert metrics.aupro(-1.0 * masks, masks) == pytest.approx(0.0, abs=SUMMED)


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("levels", [0, 1, 3])
def test_aupro_equals_the_slow_definition(levels, limit):
    maps, masks = pixels(5, levels=levels)
    assert metrics.aupro(maps, masks, fpr_limit=limit) == pytest.approx(
        slow_aupro(maps, masks, limit), abs=SUMMED
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", [0, 1, 4])
def test_a_ranking_is_the_same_to_the_last_bit_in_any_order_of_the_images(dtype, levels, monkeypatch):
    maps, masks = pixels(3, levels=levels, shape=(9, 12, 14))
    maps = maps.astype(dtype)
    expected = metrics.rank_pixels(maps, masks)
    monkeypatch.setattr(metrics, "BLOCK", 7)
    order = np.random.default_rng(0).permutation(len(maps))
    found = metrics.rank_pixels(maps[order], masks[order])
    for name in ("scores", "hits", "above", "at_least", "overlap", "grid"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


@settings(max_examples=60)
@given(st.data())
def test_aupro_equals_the_slow_definition_on_small_maps(data):
    shape = data.draw(hnp.array_shapes(min_dims=3, max_dims=3, max_side=4))
    maps = data.draw(hnp.arrays(np.float32, shape, elements=st.integers(-3, 3).map(float)))
    masks = data.draw(hnp.arrays(np.bool_, shape))
    if not masks.any() or masks.all():
        with pytest.raises(UndefinedMetric):
            metrics.aupro(maps, masks)
        return
    limit = data.draw(st.sampled_from([0.01, 0.3, 0.5, 1.0]))
    value = metrics.aupro(maps, masks, fpr_limit=limit)
    assert value == pytest.approx(slow_aupro(maps, masks, limit), abs=SUMMED)
    assert metrics.aupro(np.exp(2.5 * maps.astype(float)), masks, fpr_limit=limit) == value


def test_one_hot_pixel_and_a_monotone_map_change_no_rank_metric():
    maps, masks = pixels(6)
    hot = maps.copy()
    hot[np.unravel_index(np.argmax(maps), maps.shape)] = 1e9
    assert metrics.aupro(hot, masks) == metrics.aupro(maps, masks)
    assert metrics.aupro(np.exp(2.5 * maps), masks) == metrics.aupro(maps, masks)


def test_diagonal_neighbours_are_one_region():
    # two diagonal pixels, one found, beside a far single pixel, found: 8-connected overlap (1/2 + 1) / 2
    mask = np.zeros((1, 5, 6), dtype=bool)
    mask[0, [0, 1, 4], [0, 1, 5]] = True
    found = np.zeros(mask.shape)
    found[0, [0, 4], [0, 5]] = 1.0
    rates, heights = metrics.pro_curve(found, mask)
    assert heights[rates == 0].max() == pytest.approx(0.75)


def test_small_and_large_regions_weigh_the_same():
    masks = np.zeros((2, 10, 10), dtype=bool)
    masks[0, :8, :8], masks[1, 0, 0] = True, True
    maps = np.zeros(masks.shape)
    maps[1, 0, 0] = 1.0  # only the single pixel is found: half of the regions
    rates, heights = metrics.pro_curve(maps, masks)
    assert heights[rates == 0].max() == pytest.approx(0.5)


def test_normal_images_count_for_the_false_positive_rate():
    maps, masks = pixels(7)
    noisy = maps.copy()
    noisy[0] += 100.0  # the normal image
    assert metrics.aupro(noisy, masks) < metrics.aupro(maps, masks)


@pytest.mark.parametrize("compute", [metrics.aupro, metrics.seg_auroc, metrics.seg_ap, metrics.pro_curve])
@pytest.mark.parametrize(("value", "missing"), [(False, "no abnormal pixel"), (True, "no normal pixel")])
def test_pixel_metrics_without_one_kind_of_pixel_are_undefined(compute, value, missing):
    with pytest.raises(UndefinedMetric, match=missing):
        compute(np.zeros((2, 3, 3)), np.full((2, 3, 3), value))


def test_no_images_at_all_are_undefined():
    with pytest.raises(UndefinedMetric, match="no abnormal pixel"):
        metrics.aupro(np.zeros((0, 4, 4)), np.zeros((0, 4, 4), dtype=bool))


@pytest.mark.parametrize("limit", [0.0, -0.1, 1.1, float("nan")])
@pytest.mark.parametrize("compute", [metrics.aupro, metrics.pro_curve, metrics.evaluate_maps])
def test_limits_outside_0_to_1_are_refused(compute, limit):
    with pytest.raises(ConfigError, match="fpr_limit"):
        compute(*pixels(), fpr_limit=limit)


@pytest.mark.parametrize(
    ("maps", "masks", "message"),
    [
        (np.full((1, 2, 2), np.nan), np.ones((1, 2, 2), dtype=bool), "4 of 4 scores are NaN"),
        (np.zeros((1, 2, 2)), np.zeros((1, 2, 3), dtype=bool), r"shapes \[1, 2, 2\] and \[1, 2, 3\]"),
        (np.zeros((2, 2)), np.zeros((2, 2), dtype=bool), r"\[N,H,W\]"),
        (np.zeros((1, 2, 2)), np.full((1, 2, 2), 255), "other values than 0 and 1"),
    ],
)
def test_unusable_maps_are_refused(maps, masks, message):
    with pytest.raises(InputError, match=message):
        metrics.aupro(maps, masks)


# Thresholds


def slow_f1(maps: np.ndarray, masks: np.ndarray) -> float:
    return max(2 * (masks & (maps >= t)).sum() / (masks.sum() + (maps >= t).sum()) for t in np.unique(maps))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", [0, 2])
def test_the_oracle_threshold_reaches_the_best_f1(dtype, levels):
    maps, masks = pixels(8, levels=levels)
    maps = maps.astype(dtype)
    rule = metrics.pixel_rule(maps, masks, metrics.f1_max_threshold(maps, masks))
    assert rule["dice"].value == pytest.approx(slow_f1(maps, masks), abs=EXACT)


@given(hnp.arrays(np.float32, (1, 3, 3), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_the_oracle_threshold_is_exact_for_any_floats(maps):
    masks = np.zeros(maps.shape, dtype=bool)
    masks[0, 0] = True
    rule = metrics.pixel_rule(maps, masks, metrics.f1_max_threshold(maps, masks))
    assert rule["dice"].value == pytest.approx(slow_f1(maps, masks), abs=EXACT)


def test_the_rule_counts_what_lies_strictly_above():
    maps = np.array([[[0.0, 1.0, 2.0, 3.0]]])
    masks = np.array([[[False, True, False, True]]])
    rule = metrics.pixel_rule(maps, masks, 1.0)
    assert (rule["precision"].value, rule["recall"].value, rule["dice"].value) == (0.5, 0.5, 0.5)


def test_float32_maps_are_compared_with_the_threshold_as_it_is():
    maps = np.array([[[0.1, 0.0]]], dtype=np.float32)  # float32(0.1) is a little above 0.1
    rule = metrics.pixel_rule(maps, np.array([[[True, False]]]), 0.1)
    assert rule["recall"].value == 1.0


def test_undefined_rules_name_their_reason():
    maps, empty = np.zeros((1, 2, 2)), np.zeros((1, 2, 2), dtype=bool)
    rule = metrics.pixel_rule(maps, empty, 5.0)
    assert {name: each.value for name, each in rule.items()} == dict.fromkeys(("precision", "recall", "dice"))
    assert rule["precision"].reason == "no pixel lies above the threshold"
    assert "no abnormal pixel" in str(rule["recall"].reason)
    assert "none above" in str(rule["dice"].reason)
    assert metrics.pixel_rule(maps, empty, -1.0)["dice"].value == 0.0
    assert metrics.pixel_rule(np.zeros((0, 2, 2)), np.zeros((0, 2, 2)), 0.0)["dice"].value is None


def test_a_threshold_that_is_nan_is_refused():
    with pytest.raises(InputError, match="map threshold"):
        metrics.pixel_rule(*pixels(), float("nan"))


# All at once


def test_evaluate_maps_agrees_with_the_single_metrics():
    maps, masks = pixels(9, levels=4)
    found = {name: each.value for name, each in metrics.evaluate_maps(maps, masks, threshold=0.5).items()}
    oracle = metrics.f1_max_threshold(maps, masks)
    best = metrics.pixel_rule(maps, masks, oracle)
    assert found["seg_auroc"] == pytest.approx(metrics.seg_auroc(maps, masks), abs=EXACT)
    assert found["seg_ap"] == pytest.approx(metrics.seg_ap(maps, masks), abs=EXACT)
    assert found["seg_aupro"] == pytest.approx(metrics.aupro(maps, masks), abs=EXACT)
    assert found["oracle_threshold"] == oracle
    assert found["oracle_f1_precision"] == best["precision"].value
    assert found["oracle_f1_recall"] == best["recall"].value
    assert found["oracle_dice"] == pytest.approx(best["dice"].value, abs=EXACT)
    for name, each in metrics.pixel_rule(maps, masks, 0.5).items():
        assert found[name] == each.value


def test_evaluate_maps_gives_a_reason_for_everything_undefined():
    found = metrics.evaluate_maps(np.zeros((2, 4, 4)), np.zeros((2, 4, 4), dtype=bool))
    assert all(each.value is None and each.reason for each in found.values())
    assert found["dice"].reason == "no map threshold"


def test_inputs_are_left_unchanged():
    maps, masks = pixels()
    before = maps.copy(), masks.copy()
    metrics.evaluate_maps(maps, masks, threshold=0.0)
    np.testing.assert_array_equal(maps, before[0])
    np.testing.assert_array_equal(masks, before[1])
