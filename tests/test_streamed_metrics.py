from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from umiad import metrics, pixel_slabs, streamed_metrics
from umiad.errors import ConfigError, InputError
from umiad.pixel_slabs import PixelSlabs, Slab, Tie
from umiad.regions import region_weights
from umiad.score_order import keys_of, scores_of
from umiad.streamed_metrics import summarise_pixels

EXACT = 1e-12  # the same integer counts; sums of float64 terms in another order
TINY = 300 * 4  # bytes: 300 normal pixels in float32, or 30 abnormal ones


def study(seed: int = 0, *, shape=(5, 24, 24), dtype=np.float32):
    """Maps and masks with lesions of several sizes and one normal image."""
    rng = np.random.default_rng(seed)
    masks = ndimage.gaussian_filter(rng.standard_normal(shape), (0, 1.5, 1.5)) > 0.2
    masks[0] = False
    return (rng.standard_normal(shape) + masks).astype(dtype), masks


def in_chunks(maps, masks, length: int = 2):
    return [(maps[k : k + length], masks[k : k + length]) for k in range(0, len(maps), length)]


def assert_equal(found, maps, masks, *, fpr_limit: float = metrics.FPR_LIMIT) -> None:
    """The summary says what metrics.py says of all maps at once."""
    ranking = metrics.rank_pixels(maps, masks)
    expected = metrics.ranked_measures(ranking, fpr_limit=fpr_limit)
    assert list(found.measures) == list(expected)
    for name, each in expected.items():
        assert found.measures[name].reason == each.reason, name
        if name.startswith("oracle") or each.value is None:
            assert found.measures[name].value == each.value, name
        else:
            assert found.measures[name].value == pytest.approx(each.value, rel=EXACT, abs=1e-300), name
    assert found.measures["seg_auroc"] == expected["seg_auroc"]  # integers: to the last bit
    if expected["seg_auroc"].value is not None:
        np.testing.assert_array_equal(found.grid, ranking.grid)
        assert found.grid.dtype == ranking.grid.dtype


VALUES = {
    "plain": lambda maps: maps,
    "one decimal": lambda maps: np.round(maps, 1),
    "three values": lambda maps: np.sign(np.round(maps)),
    "zeros of both signs": lambda maps: np.where(maps < 0, maps, np.copysign(0, maps - 0.7)),
    "constant": np.zeros_like,
    "far from zero": lambda maps: maps + maps.dtype.type(1e5),
    "huge and tiny": lambda maps: np.exp(maps * maps.dtype.type(20)) - maps.dtype.type(1),
    "ends of the type": lambda maps: np.where(maps > 1, np.finfo(maps.dtype).max, np.finfo(maps.dtype).min),
    "subnormal": lambda maps: maps * np.finfo(maps.dtype).smallest_subnormal * 9,
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("budget", [TINY, 1 << 29])
@pytest.mark.parametrize("values", VALUES)
def test_a_summary_equals_the_metrics_of_all_maps_at_once(values, budget, dtype):
    maps, masks = study(dtype=dtype)
    maps = VALUES[values](maps).astype(dtype)
    found = summarise_pixels(in_chunks(maps, masks), budget=budget)
    assert_equal(found, maps, masks)
    assert found.held <= budget
    assert found.passes == 3 if budget > TINY else found.passes >= (3 if values == "constant" else 4)


@settings(max_examples=60, deadline=None)
@given(
    maps=hnp.arrays(
        st.sampled_from([np.float32, np.float64]),
        (3, 4, 5),
        elements=st.one_of(
            st.integers(-3, 3).map(float), st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)
        ),
    ),
    masks=hnp.arrays(np.bool_, (3, 4, 5)),
    budget=st.integers(1, 3000),
    limit=st.sampled_from([0.01, 0.3, 1.0]),
)
def test_any_maps_masks_and_budget_give_the_metrics_of_all_at_once(maps, masks, budget, limit):
    found = summarise_pixels(in_chunks(maps, masks, 1), budget=budget, fpr_limit=limit)
    assert_equal(found, maps, masks, fpr_limit=limit)


def test_blocks_of_vertices_join_without_a_seam(monkeypatch):
    maps, masks = study(1)
    maps = np.round(maps, 2)
    monkeypatch.setattr(streamed_metrics, "BLOCK", 7)
    assert_equal(summarise_pixels(in_chunks(maps, masks)), maps, masks)


def test_the_size_of_chunks_and_their_types_do_not_matter():
    maps, masks = study(2)
    whole = summarise_pixels([(maps, masks)])
    for length in (1, 3):
        assert summarise_pixels(in_chunks(maps, masks, length)).measures == whole.measures
    mixed = [
        (torch.from_numpy(maps[:2]), torch.from_numpy(masks[:2]).to(torch.uint8)),
        (maps[2:].astype(np.float64), masks[2:].astype(int)),
    ]
    assert_equal(summarise_pixels(mixed), maps.astype(np.float64), masks)


def test_chunks_may_come_from_a_function():
    maps, masks = study(3)
    found = summarise_pixels(lambda: iter(in_chunks(maps, masks)), budget=TINY)
    assert_equal(found, maps, masks)


# Memory


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", [0, 1, 20])
def test_what_a_slab_takes_stays_below_what_it_was_given(dtype, levels, monkeypatch):
    monkeypatch.setattr(streamed_metrics, "BLOCK", 1024)  # what is needed beside the slabs: made small
    monkeypatch.setattr(pixel_slabs, "BIN_BITS", 12)
    maps, masks = study(4, shape=(40, 128, 128), dtype=dtype)
    maps = np.round(maps * levels) / levels if levels else maps
    chunks, budget, beside = in_chunks(maps, masks, 1), 1 << 20, 1_500_000
    assert maps.nbytes + masks.sum() * 36 > 4 * budget + beside  # all at once would not do
    summarise_pixels(chunks[:2])  # whatever is loaded late
    tracemalloc.start()
    found = summarise_pixels(chunks, budget=budget)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.held <= budget
    assert peak < found.held + beside
    assert found.passes > 4


def test_slabs_hold_every_pixel_once_by_falling_score():
    maps, masks = study(5)
    negative, positive = [], []
    slabs = PixelSlabs(in_chunks(maps, masks), budget=TINY)
    for slab in slabs:
        assert isinstance(slab, Slab)
        assert slab.negative.nbytes + slab.positive.nbytes + slab.areas.nbytes <= TINY
        negative += slab.negative[::-1].tolist()
        positive += slab.positive.tolist()
    assert negative == sorted(keys_of(maps[~masks]).tolist(), reverse=True)
    assert positive == sorted(keys_of(maps[masks]).tolist(), reverse=True)
    assert slabs.held <= TINY


def test_equal_pixels_beyond_the_budget_are_counted_not_kept():
    maps, masks = study(6)
    slabs = PixelSlabs(in_chunks(np.zeros_like(maps), masks), budget=TINY)
    (tie,) = slabs
    assert isinstance(tie, Tie)
    assert scores_of(tie.key).tolist() == [0.0]
    assert tie.n_negative == (~masks).sum()
    assert tie.areas.sum() == masks.sum()
    regions = sum(count for _, count in map(region_weights, masks))
    assert (tie.areas[1:] / np.arange(1, len(tie.areas))).sum() == pytest.approx(regions)
    assert slabs.held == 0


def test_a_tie_whose_product_needs_more_than_64_bits_is_exact():
    key, size = keys_of(np.zeros(1, np.float32)), 4 * 10**9
    totals = pixel_slabs.Totals(size, size, size, np.dtype(np.float32), int(key[0]), int(key[0]))
    curve = streamed_metrics._Curve(totals, 1.0)
    curve._quantiles = ()
    areas = np.array([0, size])
    curve._areas = areas
    vertices = streamed_metrics._Vertices(key, *(np.array([n]) for n in (size, 0, size)), overlap=np.ones(1))
    curve._extend(vertices)
    assert curve.finish()[0]["seg_auroc"].value == 0.5


# Keys


@given(hnp.arrays(np.float32, 20, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_keys_have_the_order_of_scores_and_lead_back(scores):
    for each in (scores, scores.astype(np.float64)):
        np.testing.assert_array_equal(scores_of(keys_of(each)), each)
        np.testing.assert_array_equal(np.sort(keys_of(each)), keys_of(np.sort(each)))


# Curves


@pytest.mark.parametrize("budget", [20_000, 1 << 29])
def test_drawn_curves_lie_on_the_exact_ones(budget):
    maps, masks = study(7, shape=(6, 48, 48))
    found = summarise_pixels(in_chunks(maps, masks), budget=budget)
    for curve, exact in (
        (found.roc, metrics.roc_points(maps.ravel(), masks.ravel())),
        (found.pro, metrics.pro_curve(maps, masks)),
    ):
        rates, heights = curve
        assert len(rates) <= metrics.CURVE_POINTS
        assert (rates[0], heights[0]) == (0, 0)
        assert (rates[-1], heights[-1]) == pytest.approx((exact[0][-1], exact[1][-1]))
        assert (np.diff(rates) >= 0).all()
        # points are functions of the way along the curve, of at most 2; a thinned one keeps one point in 2/998
        way = np.sum(exact, axis=0)
        assert np.abs(np.interp(way, rates + heights, rates) - exact[0]).max() < 0.01
        assert np.abs(np.interp(way, rates + heights, heights) - exact[1]).max() < 0.01


# Undefined and refused


@pytest.mark.parametrize(("fill", "reason"), [(False, "no abnormal pixel"), (True, "no normal pixel")])
def test_one_class_only_is_undefined_with_a_reason(fill, reason):
    maps, _ = study()
    masks = np.full(maps.shape, fill)
    found = summarise_pixels(in_chunks(maps, masks))
    assert_equal(found, maps, masks)
    assert reason in found.measures["seg_aupro"].reason
    assert found.roc is found.pro is None
    assert found.grid.tolist() == [maps.min(), maps.max()]


@pytest.mark.parametrize("chunks", [[], [(np.zeros((0, 4, 4)), np.zeros((0, 4, 4), bool))]])
def test_no_maps_at_all(chunks):
    found = summarise_pixels(chunks)
    assert "no abnormal pixel" in found.measures["seg_auroc"].reason
    assert len(found.grid) == 0


def bad_chunks():
    maps, masks = study()
    nan = maps.copy()
    nan[3, 0, 0] = np.nan
    return [
        (in_chunks(nan, masks), r"chunk 1: 1 of 1152 scores are NaN"),
        (in_chunks(np.where(np.isnan(nan), np.inf, nan), masks), "NaN or infinite"),
        ([(maps, masks[:2])], r"shapes \[5, 24, 24\] and \[2, 24, 24\]"),
        ([(maps[0], masks[0])], r"expected two equal shapes \[N,H,W\]"),
        ([(maps, masks * 255)], "other values than 0 and 1"),
        ([(maps, masks), (maps[:, :20], masks[:, :20])], r"chunk 1: maps of \[20, 24\], expected \[24, 24\]"),
        ([maps], "chunk 0: found ndarray, expected a pair"),
        (iter([(maps, masks)]), "found list_iterator, expected a sequence of chunks or a function"),
    ]


@pytest.mark.parametrize("case", range(8))
def test_unusable_chunks_are_refused(case):
    chunks, message = bad_chunks()[case]
    with pytest.raises(InputError, match=message):
        summarise_pixels(chunks)


@pytest.mark.parametrize("change", ["fewer", "other scores", "more"])
@pytest.mark.parametrize("reading", [2, 3])
def test_readings_that_differ_are_refused(change, reading):
    maps, masks = study()
    count = 0

    def chunks():
        nonlocal count
        count += 1
        if count < reading:
            return [(maps, masks)]
        return {
            "fewer": [(maps[:-1], masks[:-1])],
            "other scores": [(np.where(masks, maps + 100, maps - 100), masks)],
            "more": [(maps, masks), (maps[-1:], masks[-1:])],
        }[change]

    with pytest.raises(InputError, match=f"reading {reading} found .* normal and .* abnormal pixels"):
        summarise_pixels(chunks)


def test_equal_pixels_that_change_are_refused():
    maps, masks = study()
    count = 0

    def chunks():
        nonlocal count
        count += 1
        return [(np.zeros_like(maps), masks if count < 3 else ~masks)]

    with pytest.raises(InputError, match="reading 3 found"):
        summarise_pixels(chunks, budget=TINY)


def test_a_budget_or_limit_out_of_range_is_refused():
    maps, masks = study()
    with pytest.raises(ConfigError, match="budget 0"):
        summarise_pixels([(maps, masks)], budget=0)
    with pytest.raises(ConfigError, match="fpr_limit 0"):
        summarise_pixels([(maps, masks)], fpr_limit=0)
