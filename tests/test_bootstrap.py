from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy import ndimage

from umiad import bootstrap, metrics
from umiad.bootstrap import count_cases, evaluate_scores, resample_weights
from umiad.errors import ConfigError, InputError

QUANTILES = 1e-3  # promised error of resampled pixel metrics against exact ones
N_NORMAL, N_ABNORMAL = 6, 14


def study(seed: int = 0, *, size: int = 64):
    """Scores, labels, groups, maps and masks of a small test set."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1], [N_NORMAL, N_ABNORMAL])
    fields = ndimage.gaussian_filter(rng.standard_normal((len(labels), size, size)), (0, 4, 4))
    masks = (fields / fields.std() > 1.0) & (labels == 1)[:, None, None]
    noise = ndimage.gaussian_filter(rng.standard_normal(fields.shape), (0, 1.5, 1.5))
    maps = (noise / noise.std() + 1.2 * masks).astype(np.float32)
    return maps.max(axis=(1, 2)).astype(float), labels, [""] * len(labels), maps, masks


def weights_of(labels, groups, n_resamples=400, seed=0):
    truth = np.asarray(labels, dtype=bool)
    return resample_weights(truth, groups, n_resamples=n_resamples, rng=np.random.default_rng(seed))


# Resampling


def test_resamples_are_stratified_by_label():
    labels = np.array([0] * 3 + [1] * 7)
    weights = weights_of(labels, [""] * 10)
    assert (weights[:, labels == 0].sum(axis=1) == 3).all()
    assert (weights[:, labels == 1].sum(axis=1) == 7).all()
    assert len(np.unique(weights, axis=0)) > 300  # of 400


def test_groups_are_drawn_as_wholes():
    labels = [0, 0, 0, 1, 1, 1, 1, 1]
    groups = ["a", "a", "b", "c", "c", "c", "", ""]
    weights = weights_of(labels, groups)
    for name in "ac":
        members = [k for k, group in enumerate(groups) if group == name]
        assert (weights[:, members] == weights[:, members[:1]]).all()
    assert (weights[:, 6] != weights[:, 7]).any()  # empty groups are their own


def test_a_patient_with_both_labels_stays_one_patient():
    weights = weights_of([0, 1, 0, 1, 0, 1], ["a", "a", "b", "b", "", ""])
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 2] == weights[:, 3]).all()
    assert (weights[:, 0] + weights[:, 2] == 2).all()


def test_a_group_name_never_meets_an_empty_one():
    assert count_cases([0, 1, 1, 1], ["", "0", "1", "1"]) == {"n_normal": 1, "n_abnormal": 3, "n_groups": 3}


def test_resamples_come_from_the_seed():
    case = study()
    first, again, other = (evaluate_scores(*case, n_resamples=50, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first["det_auroc"]["ci95"] != other["det_auroc"]["ci95"]
    assert first["det_auroc"]["value"] == other["det_auroc"]["value"]


def test_the_global_random_state_is_left_alone():
    before = np.random.get_state()[1].copy()
    evaluate_scores(*study(), n_resamples=20)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


# Resampled metrics against metrics of the resampled images


def repeated(weights: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(weights)), weights.astype(int))


@pytest.mark.parametrize("levels", [0, 2])
def test_resampled_image_metrics_are_exact(levels):
    scores, labels, groups, *_ = study(1)
    scores = np.round(scores * levels) / levels if levels else scores
    truth = labels == 1
    weights = weights_of(labels, groups, n_resamples=20)
    draws = bootstrap._image_draws(scores, truth, weights, threshold=2.0)
    for row, weight in enumerate(weights):
        chosen = repeated(weight)
        # rounding of a handful of float64 sums
        assert draws["det_auroc"][row] == pytest.approx(
            metrics.det_auroc(scores[chosen], truth[chosen]), abs=1e-12
        )
        assert draws["det_ap"][row] == pytest.approx(metrics.det_ap(scores[chosen], truth[chosen]), abs=1e-12)
        above = scores[chosen] > 2.0
        assert draws["det_sensitivity"][row] == pytest.approx(above[truth[chosen]].mean(), abs=1e-12)
        assert draws["det_specificity"][row] == pytest.approx(1 - above[~truth[chosen]].mean(), abs=1e-12)


@pytest.mark.parametrize("transform", ["plain", "exp", "rounded", "constant", "perfect"])
def test_resampled_pixel_metrics_are_within_the_promised_error(transform):
    _, labels, groups, maps, masks = study(2)
    maps = {
        "plain": maps,
        "exp": np.exp(2.5 * maps.astype(float)),
        "rounded": np.round(maps),
        "constant": np.ones_like(maps),
        "perfect": masks.astype(np.float32),
    }[transform]
    weights = weights_of(labels, groups, n_resamples=6)
    pixels = bootstrap.PixelSet(maps, masks, np.arange(len(maps)))
    values, draws = bootstrap._pixel_results(pixels, weights, threshold=1.0)
    for row, weight in enumerate(weights):
        chosen = repeated(weight)
        exact = metrics.evaluate_maps(maps[chosen], masks[chosen], threshold=1.0)
        for name in ("seg_auroc", "seg_ap", "seg_aupro", "oracle_dice"):
            assert draws[name][row] == pytest.approx(exact[name].value, abs=QUANTILES), name
        for name in ("precision", "recall", "dice"):
            if exact[name].value is None:
                assert np.isnan(draws[name][row])
            else:
                assert draws[name][row] == pytest.approx(exact[name].value, abs=1e-12), name
    assert values == metrics.evaluate_maps(maps, masks, threshold=1.0)


def test_the_quantile_grid_is_finer_than_promised_where_pixels_abound():
    # 131,072 pixels and two regions, one of them tiny: the hardest case for overlaps between thresholds
    rng = np.random.default_rng(3)
    masks = np.zeros((2, 256, 256), dtype=bool)
    masks[0, :100, :100], masks[1, 5, 5] = True, True
    maps = rng.standard_normal(masks.shape).astype(np.float32) + 0.5 * masks
    ranking = metrics.rank_pixels(maps, masks)
    assert len(ranking.grid) >= 4096
    draws = bootstrap._curve_draws(
        bootstrap.PixelSet(maps, masks, np.arange(2)), ranking.grid, np.ones((1, 2))
    )
    for name, exact in metrics.ranked_measures(ranking).items():
        if name in draws and name not in ("oracle_f1_precision", "oracle_f1_recall"):
            assert draws[name][0] == pytest.approx(exact.value, abs=QUANTILES), name


def test_resamples_without_a_lesion_are_dropped_and_counted():
    scores, labels, groups, maps, masks = study(4)
    masks = masks.copy()
    masks[N_NORMAL + 1 :] = (
        False  # one image of fourteen has a lesion: missed by about a third of the resamples
    )
    found = evaluate_scores(scores, labels, groups, maps, masks, n_resamples=200)
    for name in ("seg_auroc", "seg_aupro", "oracle_dice"):
        assert 90 < found[name]["n_resamples"] < 170, name  # expected: 129
    assert found["det_auroc"]["n_resamples"] == 200


# Intervals


def test_intervals_cover_a_known_auroc():
    # normal scores N(0, 1), abnormal N(1, 1): AUROC = Phi(1 / sqrt 2) = 0.7602
    rng = np.random.default_rng(5)
    labels, covered, trials = np.repeat([0, 1], [60, 60]), 0, 100
    for _ in range(trials):
        scores = rng.standard_normal(120) + labels
        low, high = evaluate_scores(scores, labels, [""] * 120, None, None, n_resamples=200)["det_auroc"][
            "ci95"
        ]
        covered += low <= 0.7602 <= high
    assert covered >= 86  # binomial(100, 0.95) is below 86 once in 10,000 times


def test_intervals_widen_when_images_come_from_few_patients():
    rng = np.random.default_rng(6)
    patient = np.repeat(np.arange(20), 10)
    labels = (patient >= 10).astype(int)
    scores = 2 * rng.standard_normal(20)[patient] + labels + 0.1 * rng.standard_normal(200)
    widths = []
    for groups in ([""] * 200, [f"p{each}" for each in patient]):
        low, high = evaluate_scores(scores, labels, groups, None, None)["det_auroc"]["ci95"]
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]


def test_a_single_group_gives_no_interval_and_says_so():
    scores, labels, _, maps, masks = study(7)
    groups = ["one"] * N_NORMAL + [""] * N_ABNORMAL
    found = evaluate_scores(scores, labels, groups, maps, masks, n_resamples=20)
    assert found["det_auroc"]["value"] is not None
    assert found["det_auroc"] | {"value": 0} == {
        "value": 0,
        "ci95": None,
        "n_resamples": 0,
        "reason": bootstrap.NO_INTERVAL,
    }


def test_no_resamples_asked_for():
    found = evaluate_scores(*study(), n_resamples=0)
    assert found["seg_aupro"]["value"] is not None
    assert found["seg_aupro"]["ci95"] is None
    assert found["seg_aupro"]["reason"] is None


# Results


def test_values_are_the_exact_ones_and_json_holds_them():
    scores, labels, groups, maps, masks = study(8)
    found = evaluate_scores(
        scores, labels, groups, maps, masks, image_threshold=2.5, map_threshold=1.5, n_resamples=50
    )
    assert list(found) == [*bootstrap.DETECTION, *bootstrap.PIXEL]
    assert found["det_auroc"]["value"] == metrics.det_auroc(scores, labels)
    assert found["det_ap"]["value"] == metrics.det_ap(scores, labels)
    assert found["det_sensitivity"]["value"] == np.mean(scores[labels == 1] > 2.5)
    assert found["det_specificity"]["value"] == np.mean(scores[labels == 0] <= 2.5)
    for name, each in metrics.evaluate_maps(maps, masks, threshold=1.5).items():
        assert name == "oracle_threshold" or found[name]["value"] == each.value
    for each in found.values():
        assert each["ci95"][0] <= each["value"] + 0.05
        assert each["ci95"][1] >= each["value"] - 0.05
        assert each["n_resamples"] == 50
        assert each["reason"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_thresholds_are_optional():
    found = evaluate_scores(*study(), n_resamples=5)
    assert found["det_sensitivity"]["reason"] == found["det_specificity"]["reason"] == "no image threshold"
    assert {found[name]["reason"] for name in bootstrap.RULE} == {"no map threshold"}
    assert found["oracle_dice"]["value"] is not None


@pytest.mark.parametrize(
    ("label", "missing", "defined"),
    [(0, "no abnormal image", "det_specificity"), (1, "no normal image", "det_sensitivity")],
)
def test_one_class_only_is_null_with_a_reason(label, missing, defined):
    scores = np.arange(4.0)
    found = evaluate_scores(scores, [label] * 4, [""] * 4, None, None, image_threshold=1.5, n_resamples=10)
    assert found.pop(defined)["value"] == 0.5
    assert all(each["value"] is None and each["ci95"] is None and each["reason"] for each in found.values())
    assert missing in found["det_auroc"]["reason"]
    assert missing in found["det_ap"]["reason"]


@pytest.mark.parametrize("masks", [None, [np.zeros((64, 64), bool)] * N_NORMAL + [None] * N_ABNORMAL])
def test_no_lesion_masks_at_all(masks):
    scores, labels, groups, maps, _ = study()
    found = evaluate_scores(scores, labels, groups, maps, masks, map_threshold=1.0, n_resamples=5)
    assert {found[name]["reason"] for name in bootstrap.PIXEL} == {"no lesion masks"}
    assert found["det_auroc"]["value"] is not None


def test_no_maps_at_all():
    scores, labels, groups, _, masks = study()
    found = evaluate_scores(scores, labels, groups, None, masks, n_resamples=5)
    assert {found[name]["reason"] for name in bootstrap.PIXEL} == {"no anomaly maps"}


def test_abnormal_images_without_a_mask_are_left_out_of_pixel_metrics_only():
    scores, labels, groups, maps, masks = study(9)
    some: list[object] = list(masks)
    some[0] = None  # a normal image needs none
    some[-1] = None
    found = evaluate_scores(scores, labels, groups, maps, some, map_threshold=1.0, n_resamples=10)
    exact = metrics.evaluate_maps(maps[:-1], masks[:-1], threshold=1.0)
    for name in bootstrap.PIXEL:
        assert found[name]["value"] == exact[name].value
    assert found["det_auroc"]["value"] == metrics.det_auroc(scores, labels)


def test_masks_that_are_all_empty_are_undefined_not_an_error():
    scores, labels, groups, maps, masks = study()
    found = evaluate_scores(scores, labels, groups, maps, np.zeros_like(masks), n_resamples=5)
    assert "no abnormal pixel" in found["seg_aupro"]["reason"]


def test_tensors_give_the_same_results():
    scores, labels, groups, maps, masks = study(10)
    tensors = torch.from_numpy(maps), [torch.from_numpy(mask).to(torch.uint8) for mask in masks]
    found = evaluate_scores(torch.from_numpy(scores), labels, groups, *tensors, n_resamples=5)
    assert found == evaluate_scores(scores, labels, groups, maps, masks, n_resamples=5)


# Refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": np.full(20, np.nan)}, "NaN"),
        ({"scores": np.zeros(19)}, r"\[19\] and \[20\]"),
        ({"groups": [""] * 3}, "3 groups, expected one for each of 20 images"),
        ({"maps": np.zeros((19, 64, 64))}, r"expected \[N,H,W\]"),
        ({"maps": np.zeros((20, 64))}, r"expected \[N,H,W\]"),
        ({"maps": np.full((20, 64, 64), np.inf)}, "NaN or infinite"),
        ({"masks": [None] * 19}, "19 masks"),
        ({"masks": np.zeros((20, 64, 32), dtype=bool)}, r"mask 0 has shape \[64, 32\]"),
        ({"masks": np.full((20, 64, 64), 255)}, "mask 0 holds other values"),
        ({"masks": np.ones((20, 64, 64))}, "image 0 is labelled normal but its mask holds lesion pixels"),
    ],
)
def test_unusable_inputs_are_refused(change, message):
    values = dict(zip(("scores", "labels", "groups", "maps", "masks"), study(), strict=True)) | change
    with pytest.raises(InputError, match=message):
        evaluate_scores(*values.values(), n_resamples=2)


def test_a_negative_number_of_resamples_is_refused():
    with pytest.raises(ConfigError, match="n_resamples -1"):
        evaluate_scores(*study(), n_resamples=-1)


def test_resamples_of_two_detectors_are_paired():
    scores, labels, groups, maps, masks = study(3)
    _, first = bootstrap.resample_scores(scores, labels, groups, maps, masks, n_resamples=50)
    _, same = bootstrap.resample_scores(scores, labels, groups, maps, masks, n_resamples=50)
    shifted = np.exp(scores / 10)  # another detector with the same ranking
    _, other = bootstrap.resample_scores(shifted, labels, groups, maps, masks, n_resamples=50)
    for name in ("det_auroc", "seg_auroc", "seg_aupro"):
        np.testing.assert_array_equal(first[name], same[name])
        np.testing.assert_allclose(first[name] - other[name], 0, atol=1e-12)


def test_oracle_image_figures_are_those_of_the_f1_best_threshold():
    from sklearn.metrics import precision_recall_curve

    scores, labels, groups, *_ = study(4)
    found = evaluate_scores(scores, labels, groups, None, None, n_resamples=10)
    precision, recall, _ = precision_recall_curve(labels, scores)
    best = np.argmax(2 * precision * recall / np.maximum(precision + recall, 1e-12))
    f1 = 2 * precision[best] * recall[best] / (precision[best] + recall[best])
    p, r = (found[f"oracle_det_{name}"]["value"] for name in ("precision", "recall"))
    assert 2 * p * r / (p + r) == pytest.approx(f1)
    assert evaluate_scores([1.0, 2.0], [0, 0], ["", ""], None, None)["oracle_det_recall"]["value"] is None
