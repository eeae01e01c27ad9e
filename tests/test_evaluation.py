"""Evaluating many maps: from a file and in slabs, with the results of few maps in memory."""

import numpy as np
import pytest

import umiad
from make import tiny_set
from umiad import bootstrap, evaluation
from umiad.errors import DiskError

SIZE = 64


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A fitted model, its data, and what few maps in memory give."""
    data = tiny_set(tmp_path_factory.mktemp("data"), n_normal=20, n_abnormal=6, size=SIZE)
    (data / "masks" / sorted(p.name for p in (data / "masks").iterdir())[0]).unlink()  # an image without mask
    model = umiad.fit(umiad.build("intensity", size=SIZE), data)
    return model, data, umiad.evaluate(model, data, n_resamples=30)


@pytest.fixture
def at_once(monkeypatch):
    """No map may be ranked at once."""
    monkeypatch.setattr(evaluation, "MAPS_AT_ONCE", 0)
    monkeypatch.setattr(bootstrap, "MAPS_AT_ONCE", 0)


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, each in expected.items():
        for key in ("value", "ci95"):
            # sums of float64 terms in another order
            assert found[name][key] == (None if each[key] is None else pytest.approx(each[key], rel=1e-12)), (
                name
            )
        assert (found[name]["n_resamples"], found[name]["reason"]) == (each["n_resamples"], each["reason"]), (
            name
        )


@pytest.mark.usefixtures("at_once")
def test_many_maps_give_the_results_of_few(case):
    model, data, few = case
    many = umiad.evaluate(model, data, n_resamples=30)
    assert_same(many.metrics, few.metrics)
    assert many.metrics["seg_aupro"]["ci95"] is not None
    assert (many.counts, many.cases, many.best, many.worst) == (few.counts, few.cases, few.best, few.worst)
    for name in few.draws:
        np.testing.assert_array_equal(many.draws[name], few.draws[name])
    assert many.roc["images"] == few.roc["images"]
    for found, expected in ((many.roc["pixels"], few.roc["pixels"]), (many.pro, few.pro)):
        # points are functions of the way along the curve, of at most 2; a thinned one keeps one point in 2/998
        (found_way, way) = (np.sum(each, axis=0) for each in (found, expected))
        for axis in (0, 1):
            assert np.abs(np.interp(way, found_way, found[axis]) - expected[axis]).max() < 0.01
        assert (found[0][-1], found[1][-1]) == pytest.approx((expected[0][-1], expected[1][-1]))


@pytest.mark.usefixtures("at_once")
def test_many_maps_and_masks_lie_in_a_file(case):
    model, data, _ = case
    test = evaluation.score_test(model, data)
    assert isinstance(test.maps, np.memmap)
    assert all(mask is None or isinstance(mask, np.memmap) for mask in test.masks)
    assert sum(mask is None for mask in test.masks) == 1


def test_the_common_post_processing_of_many_maps_is_that_of_few(case, monkeypatch):
    model, data, _ = case
    few = evaluation.score_test(model, data).common(smoothed=0)
    monkeypatch.setattr(evaluation, "MAPS_AT_ONCE", 0)
    many = evaluation.score_test(model, data).common(smoothed=0)
    assert isinstance(many.maps, np.memmap)
    np.testing.assert_array_equal(many.maps, few.maps)
    np.testing.assert_array_equal(many.image_scores, few.image_scores)


@pytest.mark.usefixtures("at_once")
def test_a_disk_too_small_for_the_maps_is_said_before_scoring(case, monkeypatch):
    model, data, _ = case
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(DiskError, match="keeping anomaly maps needs"):
        umiad.evaluate(model, data, n_resamples=0)


def small(*, lesions: bool = True):
    """Scores, labels, groups, maps and masks of twelve images."""
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1], 6)
    masks = (rng.random((12, 16, 16)) < 0.1) & (labels == 1)[:, None, None] & lesions
    maps = rng.standard_normal(masks.shape) + masks
    return maps.max(axis=(1, 2)), labels, [""] * 12, maps, masks


@pytest.mark.parametrize("lesions", [True, False])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_the_bootstrap_streams_what_is_too_large_by_itself(lesions, threshold, monkeypatch):
    images = small(lesions=lesions)
    few, few_draws = bootstrap.resample_scores(*images, map_threshold=threshold, n_resamples=40)
    monkeypatch.setattr(bootstrap, "MAPS_AT_ONCE", 0)
    monkeypatch.setattr(bootstrap, "rank_pixels", None)  # not called
    many, draws = bootstrap.resample_scores(*images, map_threshold=threshold, n_resamples=40)
    assert_same(many, few)
    for name in few_draws:
        np.testing.assert_array_equal(draws[name], few_draws[name])


def test_a_summary_made_before_is_used(monkeypatch):
    images = small()
    summary = bootstrap.summarise_pixels([images[3:]])
    few = bootstrap.evaluate_scores(*images, n_resamples=10)
    monkeypatch.setattr(bootstrap, "rank_pixels", None)
    monkeypatch.setattr(bootstrap, "summarise_pixels", None)
    assert_same(bootstrap.resample_scores(*images, n_resamples=10, summary=summary)[0], few)
