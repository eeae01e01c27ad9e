import itertools
import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from umiad import detectors
from umiad.detectors import patchcore
from umiad.detectors.check import clean_images
from umiad.detectors.patchcore import Bank, Reservoir, fibres_of, greedy_coreset
from umiad.errors import ModelFileError, TrainingError


def build(preset="default", **settings):
    config = detectors.preset_config("patchcore", preset, size=64, **settings)
    return detectors.make("patchcore", config.canonical(), None)


def fitted(detector, images):
    detector.collect(detector.prepare(images))
    detector.finish(torch.Generator().manual_seed(0))
    return detector


def points(count, dimensions, *, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimensions, dtype=torch.float64, generator=rng)


def bank_of(items):
    bank = Bank(items.shape[1]).to(items.dtype)
    bank.fibres = items
    return bank


def radius(distances, chosen):
    return distances[:, list(chosen)].min(1).max()


@pytest.mark.parametrize("seed", range(4))
def test_the_coreset_covers_within_twice_the_optimum_and_better_than_chance(seed):
    cloud = points(11, 2, seed=seed)
    distances = cdist(cloud, cloud)
    for count in (1, 2, 3):
        found = radius(distances, greedy_coreset(cloud, count).tolist())
        best = min(radius(distances, some) for some in itertools.combinations(range(11), count))
        assert found <= 2 * best + 1e-12
    cloud, rng = points(300, 3, seed=seed), np.random.default_rng(seed)
    distances = cdist(cloud, cloud)
    found = radius(distances, greedy_coreset(cloud, 30).tolist())
    assert all(found <= radius(distances, rng.choice(300, 30, replace=False)) for _ in range(20))


def slow_greedy(cloud, count):
    distances = cdist(cloud, cloud)
    chosen = [int(np.linalg.norm(cloud - cloud.mean(0), axis=1).argmax())]
    while len(chosen) < count:
        chosen.append(int(distances[:, chosen].min(1).argmax()))
    return chosen


def test_the_coreset_equals_a_slow_reference():
    cloud = points(200, 7)
    assert greedy_coreset(cloud, 50).tolist() == slow_greedy(cloud.numpy(), 50)


def test_no_point_is_taken_twice_even_among_copies():
    cloud = points(5, 3).repeat(4, 1).float()
    chosen = greedy_coreset(cloud, 20).tolist()
    assert sorted(chosen) == list(range(20))
    assert len({index % 5 for index in chosen[:5]}) == 5


@pytest.mark.parametrize("pairs", [1, 100, patchcore.PAIRS_AT_ONCE])
def test_nearest_distances_equal_scipys_however_they_are_blocked(monkeypatch, pairs):
    monkeypatch.setattr(patchcore, "PAIRS_AT_ONCE", pairs)
    items, fibres = points(30, 8), points(17, 8, seed=1)
    distances, index = bank_of(items).nearest(fibres)
    expected = cdist(fibres, items)
    np.testing.assert_allclose(distances, expected.min(1), rtol=1e-12)
    assert index.tolist() == expected.argmin(1).tolist()


def test_scoring_compares_no_more_pairs_at_once_than_allowed(monkeypatch):
    blocks, addmm = [], torch.addmm

    def spied(*arguments, **keywords):
        result = addmm(*arguments, **keywords)
        blocks.append(result.numel())
        return result

    monkeypatch.setattr(patchcore, "PAIRS_AT_ONCE", 1000)
    monkeypatch.setattr(torch, "addmm", spied)
    bank_of(points(30, 8)).nearest(points(500, 8, seed=1))
    assert max(blocks) <= 1000
    assert sum(blocks) == 30 * 500


def direct_weight(fibre, items, neighbours):
    """The paper's Eq. 7 as it is written."""
    to_items = np.linalg.norm(items - fibre, axis=1)
    nearest = to_items.argmin()
    around = np.linalg.norm(items - items[nearest], axis=1).argsort()[:neighbours]
    return 1 - math.exp(to_items[nearest]) / sum(math.exp(to_items[m]) for m in around)


def test_the_weight_equals_a_direct_implementation():
    items, fibres = points(40, 5), points(12, 5, seed=1)
    bank = bank_of(items)
    _, index = bank.nearest(fibres)
    weights = bank.weight(fibres, index, neighbours=9)
    expected = [direct_weight(fibre, items.numpy(), 9) for fibre in fibres.numpy()]
    np.testing.assert_allclose(weights, expected, rtol=1e-10)
    assert ((weights > 0) & (weights < 1)).all()


def test_the_weight_survives_distances_whose_exponential_overflows():
    items, fibres = 1e4 * points(40, 5), 1e4 * points(3, 5, seed=1)
    bank = bank_of(items)
    weights = bank.weight(fibres, bank.nearest(fibres)[1], neighbours=9)
    assert torch.isfinite(weights).all()
    assert ((weights >= 0) & (weights <= 1)).all()


def test_without_neighbours_nothing_is_reweighted():
    bank = bank_of(points(40, 5))
    assert bank.weight(points(2, 5), torch.tensor([0, 1]), neighbours=1).tolist() == [1, 1]
    assert bank_of(points(1, 5)).weight(points(2, 5), torch.tensor([0, 0]), neighbours=9).tolist() == [1, 1]


def test_the_image_score_is_the_largest_distance_times_its_weight():
    images, new = clean_images(4, size=64), clean_images(3, size=64, seed=9)
    detector, plain = (fitted(build(fraction=0.5, neighbours=n), images) for n in (9, 1))
    items = detector.bank.fibres.double().numpy()
    for row, features in enumerate(detector.prepare(new)["features"]):
        fibres = features.double().flatten(1).T.numpy()
        distances = cdist(fibres, items).min(1)
        weight = direct_weight(fibres[distances.argmax()], items, 9)
        # float32 distances against float64
        assert float(plain.score(new).image_score[row]) == pytest.approx(distances.max(), rel=1e-5)
        assert float(detector.score(new).image_score[row]) == pytest.approx(
            weight * distances.max(), rel=1e-4
        )


def test_a_bank_of_everything_gives_distance_zero_on_the_fitted_images():
    detector, images = build(fraction=1.0), clean_images(4, size=64)
    fitted(detector, images)
    assert len(detector.bank.fibres) == 4 * 64
    assert detector.score(images).anomaly_map.abs().max() == 0
    assert detector.score(clean_images(1, size=64, seed=9)).anomaly_map.min() > 0


def test_the_bank_holds_a_fraction_of_the_fibres_up_to_its_limit():
    images = clean_images(4, size=64)  # 256 fibres
    assert len(fitted(build(fraction=0.1), images).bank.fibres) == 26
    assert len(fitted(build(fraction=0.1, bank_limit=10), images).bank.fibres) == 10
    assert len(fitted(build(fraction=0.5, max_fibres=100), images).bank.fibres) == 50
    assert len(fitted(build(fraction=1e-9), images).bank.fibres) == 1


def test_the_bank_consists_of_fibres_of_the_images():
    detector, images = build(), clean_images(4, size=64)
    every = {tuple(row) for row in fibres_of(detector.prepare(images)["features"]).tolist()}
    assert {tuple(row) for row in fitted(detector, images).bank.fibres.tolist()} <= every


@pytest.mark.parametrize("projection", [None, 1000])
def test_without_projection_the_bank_is_the_coreset_of_the_features(projection):
    detector, images = build(projection=projection), clean_images(4, size=64)
    fibres = fibres_of(detector.prepare(images)["features"])
    assert torch.equal(fitted(detector, images).bank.fibres, fibres[greedy_coreset(fibres, 26)])


def test_the_projection_is_drawn_from_the_generator_it_is_given():
    images, banks = clean_images(4, size=64), []
    for seed in (0, 0, 1):
        detector = build(projection=2)
        detector.collect(detector.prepare(images))
        detector.finish(torch.Generator().manual_seed(seed))
        banks.append(detector.bank.fibres)
    assert torch.equal(banks[0], banks[1])
    assert not torch.equal(banks[0], banks[2])


def test_the_order_of_images_changes_neither_bank_nor_scores():
    images, order = clean_images(5, size=64), torch.tensor([3, 0, 4, 1, 2])
    detector, other = fitted(build(), images), fitted(build(), images[order])
    assert sorted(detector.bank.fibres.tolist()) == sorted(other.bank.fibres.tolist())
    new = clean_images(5, size=64, seed=9)
    scores, mixed = detector.score(new), other.score(new[order])
    torch.testing.assert_close(mixed.image_score, scores.image_score[order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed.anomaly_map, scores.anomaly_map[order], rtol=1e-5, atol=1e-5)


def numbered(count):
    return torch.arange(count, dtype=torch.float32)[:, None]


def test_a_reservoir_keeps_everything_until_it_is_full():
    reservoir = Reservoir(10, like=numbered(1), seed=0)
    for part in numbered(9).split(4):
        reservoir.add(part)
    assert (reservoir.seen, reservoir.kept) == (9, 9)
    assert torch.equal(reservoir.fibres, numbered(9))


def test_a_reservoir_is_bounded_and_holds_each_fibre_at_most_once():
    reservoir = Reservoir(10, like=numbered(1), seed=0)
    block = reservoir._fibres.data_ptr()
    for part in numbered(1000).split(7):
        reservoir.add(part)
        assert len(reservoir.fibres) <= 10
    assert (reservoir.seen, reservoir.kept) == (1000, 10)
    assert reservoir._fibres.data_ptr() == block
    kept = reservoir.fibres[:, 0].tolist()
    assert len(set(kept)) == 10
    assert set(kept) <= set(range(1000))


def test_a_reservoir_is_a_uniform_sample():
    counts = torch.zeros(60)
    runs = 2000
    for seed in range(runs):
        reservoir = Reservoir(12, like=numbered(1), seed=seed)
        for part in numbered(60).split(25):
            reservoir.add(part)
        counts[reservoir.fibres[:, 0].long()] += 1
    expected, spread = runs * 12 / 60, math.sqrt(runs * 0.2 * 0.8)
    # the largest of 60 deviations; 4.5 standard deviations are left with a probability of 4e-4
    assert (counts - expected).abs().max() < 4.5 * spread


def test_one_batch_larger_than_the_reservoir_is_sampled_too():
    reservoir = Reservoir(10, like=numbered(1), seed=0)
    reservoir.add(numbered(500))
    assert reservoir.kept == 10
    assert reservoir.fibres.max() > 10


def test_no_image_is_not_enough_and_one_is():
    detector = build()
    with pytest.raises(TrainingError, match="at least 1 normal image, got 0"):
        detector.finish(torch.Generator())
    fitted(detector, clean_images(1, size=64))
    assert torch.isfinite(detector.score(clean_images(1, size=64, seed=9)).anomaly_map).all()


def test_a_bank_of_any_length_is_loaded_and_scores_the_same():
    detector, fresh = fitted(build(), clean_images(4, size=64)), build()
    fresh.load_state({key: value.clone() for key, value in detector.state().items()})
    new = clean_images(2, size=64, seed=9)
    assert torch.equal(fresh.score(new).anomaly_map, detector.score(new).anomaly_map)
    shorter = {**detector.state(), patchcore.BANK: detector.bank.fibres[:3].clone()}
    fresh.load_state(shorter)
    assert fresh.bank.fibres.shape == (3, 384)


@pytest.mark.parametrize("shape", [(0, 384), (5, 383), (384,), (1, 5, 384)])
def test_a_bank_of_another_shape_is_refused_and_nothing_changes(shape):
    detector = fitted(build(), clean_images(2, size=64))
    before = detector.bank.fibres.clone()
    wrong = {**detector.state(), patchcore.BANK: torch.zeros(shape)}
    with pytest.raises(ModelFileError, match=r"bank.fibres.*expected \(M, 384\), M >= 1"):
        detector.load_state(wrong)
    assert torch.equal(detector.bank.fibres, before)


def test_a_state_without_a_bank_is_refused():
    detector = build()
    state = {key: value for key, value in detector.state().items() if key != patchcore.BANK}
    with pytest.raises(ModelFileError, match="bank.fibres' is missing"):
        detector.load_state(state)


def test_the_monitor_is_zero_on_what_the_bank_holds():
    detector, images = build(fraction=1.0), clean_images(2, size=64)
    prepared = detector.prepare(images)
    assert detector.monitor(prepared) == {}
    fitted(detector, images)
    assert detector.monitor(prepared) == {"distance_per_dim": 0.0}
    assert detector.monitor(detector.prepare(clean_images(2, size=64, seed=9)))["distance_per_dim"] > 0
