import itertools

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from scipy.stats import multivariate_normal

from umiad import detectors
from umiad.detectors import posgauss
from umiad.detectors.check import clean_images
from umiad.detectors.posgauss import Gaussians, Moments, held_out_nats, rank_within
from umiad.errors import ConfigError, ModelFileError, TrainingError
from umiad.nn.affine import spectrum

POSITIONS = [0, 5, 15]


def build(preset="default", **settings):
    config = detectors.preset_config("posgauss", preset, size=64, **settings)
    return detectors.make("posgauss", config.canonical(), None)


def fitted(detector, images, *, at_once=3):
    prepared = detector.prepare(images)
    for start in range(0, len(images), at_once):
        detector.collect({k: v[start : start + at_once] for k, v in prepared.items()})
    detector.finish(torch.Generator())
    return prepared


def views(prepared, position):
    """Fibres of all images and mirror images at one position, float64 [n,C]."""
    return np.concatenate([v.flatten(2)[:, :, position].double().numpy() for v in prepared.values()])


def random_covariances(count, channels, *, n):
    rng = torch.Generator().manual_seed(1)
    fibres = torch.randn(count, n, channels, generator=rng, dtype=torch.float64)
    fibres *= torch.rand(channels, generator=rng, dtype=torch.float64) + 0.1
    return fibres.mT @ fibres / n


@pytest.mark.parametrize("scales", [(3,), (2, 3)])
def test_distances_equal_scipys_mahalanobis_with_the_dense_covariance(scales):
    detector = build(scales=scales, epsilon=0.1, flips=True, megabytes=1000.0)
    prepared = fitted(detector, clean_images(7, size=64))
    new = detector.prepare(clean_images(2, size=64, seed=9))
    distance = detector._distance(new["features"]).flatten(1)
    every = torch.cat(list(prepared.values())).double()
    unit = float(every.var(0, correction=0).mean())
    channels = every.shape[1]
    for position in POSITIONS:
        fibres = views(prepared, position)
        covariance = np.cov(fibres.T, bias=True) + 0.1 * unit * np.eye(channels)
        for image in range(2):
            fibre = new["features"].flatten(2)[image, :, position].double().numpy()
            expected = mahalanobis(fibre, fibres.mean(0), np.linalg.inv(covariance))
            # float32 factors; the two terms of the distance cancel to a few digits
            assert float(distance[image, position]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("rank", [1, 5, 11, 12])
def test_the_low_rank_distance_is_that_of_the_matrix_it_stands_for(rank):
    epsilon, channels = 0.01, 12
    covariance = random_covariances(3, channels, n=40)
    values, vectors, rest = spectrum(covariance, rank)
    floor = rest + epsilon
    gaussians = Gaussians(3, channels, rank=rank, candidates=0).double()
    gaussians.floor.copy_(floor)
    gaussians.whitener.copy_(vectors * (1 / floor[:, None] - 1 / (values + epsilon)).sqrt()[:, None])
    excess = (values + epsilon - floor[:, None])[:, None]  # l of Sigma = floor I + U diag(l) U^T
    dense = floor[:, None, None] * torch.eye(channels).double() + (vectors * excess) @ vectors.mT
    fibres = torch.randn(3, 6, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = (fibres * torch.linalg.solve(dense, fibres.mT).mT).sum(-1)
    torch.testing.assert_close(gaussians.squared_distance(fibres), expected, rtol=1e-10, atol=1e-10)
    trace = covariance.diagonal(dim1=1, dim2=2).sum(-1) + channels * epsilon
    torch.testing.assert_close(dense.diagonal(dim1=1, dim2=2).sum(-1), trace, rtol=1e-10, atol=0)
    if rank == channels:
        full = covariance + epsilon * torch.eye(channels).double()
        torch.testing.assert_close(dense, full, rtol=1e-10, atol=1e-10)


def test_moments_do_not_depend_on_how_images_are_batched_and_survive_a_large_mean():
    rng = torch.Generator().manual_seed(3)
    fibres = 1e6 + torch.randn(2, 9, 4, dtype=torch.float64, generator=rng)
    whole, parts = (Moments(fibres[:, :3].mean(1), groups=2) for _ in range(2))
    whole.add(fibres)
    for start in (0, 4, 7):
        parts.add(fibres[:, start : start + {0: 4, 4: 3, 7: 2}[start]], group=start % 2)
    expected = torch.stack([torch.cov(each.T, correction=0) for each in fibres])
    for moments, groups in ((whole, [0]), (parts, [0, 1])):
        mean, covariance = moments.gaussian(groups)
        # the offset keeps 1e6 out of the products: what is lost is the rounding of the values themselves
        torch.testing.assert_close(covariance, expected, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(moments.offset + mean, fibres.mean(1), rtol=1e-12, atol=0)
    assert whole.variance(0) == pytest.approx(float(fibres.var(1, correction=0).mean()), rel=1e-8)


def slow_nats(prepared, *, epsilons, count, positions):
    """The cross-validation spelled out with scipy: fold = image number modulo 5, mirror images only fitted."""
    every = torch.cat(list(prepared.values())).double()
    unit, channels = float(every.var(0, correction=0).mean()), every.shape[1]
    total = np.zeros(len(epsilons))
    for position, fold in itertools.product(positions, range(min(5, count))):
        held = np.arange(count) % 5 == fold
        fibres = views(prepared, position)
        train = fibres[np.tile(~held, len(prepared))]
        for k, epsilon in enumerate(epsilons):
            covariance = np.cov(train.T, bias=True) + epsilon * unit * np.eye(channels)
            density = multivariate_normal(train.mean(0), covariance)
            total[k] -= np.sum(density.logpdf(fibres[:count][held]))
    return total / (count * channels * len(positions))


@pytest.mark.parametrize("flips", [True, False])
@pytest.mark.parametrize("count", [3, 11])
def test_epsilon_is_the_likeliest_on_held_out_normal_images(monkeypatch, flips, count):
    monkeypatch.setattr(posgauss, "PROBED", 4)
    epsilons = (0.03, 0.3, 1.0, 3.0)
    detector = build(flips=flips, epsilons=epsilons, megabytes=1000.0)
    prepared = fitted(detector, clean_images(count, size=64))
    positions = detector._probed(torch.zeros(1)).tolist()
    assert len(positions) == 4
    expected = slow_nats(prepared, epsilons=epsilons, count=count, positions=positions)
    np.testing.assert_allclose(detector.gaussians.nats_per_dim.numpy(), expected, rtol=1e-5)
    assert float(detector.gaussians.epsilon) == pytest.approx(epsilons[int(expected.argmin())])


def test_held_out_likelihood_of_a_truncated_gaussian_is_that_of_its_matrix():
    rng = torch.Generator().manual_seed(4)
    fibres = torch.randn(1, 30, 6, dtype=torch.float64, generator=rng) * torch.arange(1.0, 7.0)
    moments = Moments(fibres[:, :5].mean(1), groups=2)
    moments.add(fibres[:, :20])
    moments.add(fibres[:, 20:], group=1)
    epsilons = torch.tensor([0.1, 1.0], dtype=torch.float64)
    found = held_out_nats(moments, train=[0], held=[1], epsilons=epsilons, rank=2)
    train = fibres[0, :20]
    values, vectors, rest = spectrum(torch.cov(train.T, correction=0)[None], 2)
    for epsilon, nats in zip(epsilons.tolist(), found.tolist(), strict=True):
        dense = (rest + epsilon) * torch.eye(6).double()
        dense = dense + ((vectors[0] * (values[0] - rest)) @ vectors[0].mT)
        density = multivariate_normal(train.mean(0).numpy(), dense.numpy())
        assert nats == pytest.approx(-density.logpdf(fibres[0, 20:].numpy()).mean() / 6, rel=1e-10)


def test_a_given_epsilon_is_taken_and_nothing_is_cross_validated():
    detector = build(epsilon=0.25)
    fitted(detector, clean_images(4, size=64))
    assert float(detector.gaussians.epsilon) == 0.25
    assert detector.gaussians.nats_per_dim.numel() == 0


def test_epsilon_scales_with_the_features():
    plain, loud = build(epsilon=0.1), build(epsilon=0.1)
    prepared = plain.prepare(clean_images(6, size=64))
    for detector, factor in ((plain, 1.0), (loud, 8.0)):
        detector.collect({name: factor * values for name, values in prepared.items()})
        detector.finish(torch.Generator())
    distances = plain._distance(prepared["features"])
    torch.testing.assert_close(loud._distance(8 * prepared["features"]), distances, rtol=1e-4, atol=1e-4)


def test_mirror_images_double_the_number_of_images():
    counts = []
    for flips in (False, True):
        detector = build(flips=flips)
        detector.collect(detector.prepare(clean_images(3, size=64)))
        counts.append(detector._moments.count)
    assert counts == [[3], [6]]


def test_images_fitted_with_their_mirror_images_score_as_their_mirror_images_do():
    detector = build(epsilon=0.1)
    images = clean_images(5, size=64)
    fitted(detector, torch.cat([images, images.flip(-1)]))
    plain = build(epsilon=0.1)
    fitted(plain, images)
    new = clean_images(2, size=64, seed=9)
    # the same fibres, each twice: mean and covariance are those of one set
    torch.testing.assert_close(
        detector.score(new).anomaly_map, plain.score(new).anomaly_map, rtol=1e-4, atol=1e-4
    )


def test_scoring_does_not_pay_for_the_mirror_image():
    detector = build()
    fitted(detector, clean_images(4, size=64))
    passes = []
    detector.pyramid.register_forward_hook(lambda *_: passes.append(1))
    detector.score(clean_images(1, size=64))
    assert len(passes) == 1
    assert set(detector.prepare(clean_images(1, size=64))) == {"features", "mirrored"}
    assert set(build(flips=False).prepare(clean_images(1, size=64))) == {"features"}


# size, scales -> positions, channels
SHAPES = [
    (256, (3,), 256, 256),
    (256, (2, 3), 1024, 384),
    (256, (1, 2, 3), 4096, 448),
    (512, (3,), 1024, 256),
    (512, (2, 3), 4096, 384),
]


@pytest.mark.parametrize(("size", "scales", "positions", "channels"), SHAPES)
def test_the_state_stays_below_the_megabytes_asked_for(size, scales, positions, channels):
    config = detectors.preset_config("posgauss", "default", size=size, scales=scales)
    state = detectors.make("posgauss", config.canonical(), None).state()
    assert state["gaussians.mean"].shape == (positions, channels)
    used = sum(each.numel() * each.element_size() for each in state.values())
    assert used < 100e6
    rank = state["gaussians.whitener"].shape[2]
    assert rank == channels or used + 4 * positions * channels + posgauss.RESERVED_BYTES > 100e6


def test_a_rank_is_limited_by_bytes_and_by_the_channels():
    fixed = 4 * 10 * 8 + 4 * 10 + posgauss.RESERVED_BYTES
    common = {"backbone_bytes": 0, "positions": 10, "channels": 8}
    assert rank_within((fixed + 3 * 320) / 1e6, **common) == 3
    assert rank_within(100.0, **common) == 8


@pytest.mark.parametrize("settings", [{"megabytes": 40.0}, {"size": 512, "scales": (1, 2, 3)}])
def test_too_few_megabytes_are_refused_and_the_least_is_named(settings):
    config = detectors.preset_config("posgauss", "default", **{"size": 64, **settings})
    with pytest.raises(ConfigError, match="expected at least (45|104) ") as caught:
        detectors.make("posgauss", config.canonical(), None)
    least = float(str(caught.value).split("at least ")[1].split()[0])
    enough = config.model_copy(update={"megabytes": least})
    assert detectors.make("posgauss", enough.canonical(), None).gaussians.whitener.shape[2] >= 1


@pytest.mark.parametrize("scales", [(3, 2), (2, 2), (), (0,), (5,)])
def test_scales_that_make_no_sense_are_refused(scales):
    with pytest.raises(ConfigError, match="scales"):
        detectors.preset_config("posgauss", "default", scales=scales)


def test_a_saved_state_scores_as_the_fitted_detector_does():
    detector, fresh = build(), build()
    fitted(detector, clean_images(4, size=64))
    fresh.load_state({key: value.clone() for key, value in detector.state().items()})
    new = clean_images(2, size=64, seed=9)
    assert torch.equal(fresh.score(new).anomaly_map, detector.score(new).anomaly_map)
    assert torch.equal(fresh.gaussians.nats_per_dim, detector.gaussians.nats_per_dim)
    with pytest.raises(ModelFileError, match="shape"):
        build(megabytes=46.0).load_state(detector.state())


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_are_not_enough(count):
    detector = build()
    if count:
        detector.collect(detector.prepare(clean_images(1, size=64)))
    with pytest.raises(TrainingError, match=f"at least 2 normal images, got {count}"):
        detector.finish(torch.Generator())


def test_two_images_are_enough():
    detector = build()
    fitted(detector, clean_images(2, size=64))
    assert torch.isfinite(detector.score(clean_images(1, size=64, seed=9)).anomaly_map).all()


def test_equal_images_are_refused():
    detector = build(flips=False)
    prepared = detector.prepare(clean_images(1, size=64))
    detector.collect({name: torch.zeros_like(values).repeat(2, 1, 1, 1) for name, values in prepared.items()})
    with pytest.raises(TrainingError, match="that differ, got 2"):
        detector.finish(torch.Generator())


def test_the_monitor_reports_the_distance_and_the_chosen_epsilon():
    detector = build(epsilon=0.5)
    prepared = detector.prepare(clean_images(6, size=64))
    assert detector.monitor(prepared) == {}
    fitted(detector, clean_images(6, size=64))
    found = detector.monitor(prepared)
    squared = detector._distance(prepared["features"]).square().mean()
    assert found == {"distance_per_dim": pytest.approx(float(squared) / 256), "epsilon": 0.5}


def test_the_probed_positions_are_bounded_and_lie_on_the_grid():
    for size, scales in ((64, (3,)), (256, (3,)), (256, (2, 3)), (256, (1, 2, 3))):
        config = detectors.preset_config("posgauss", "default", size=size, scales=scales)
        detector = detectors.make("posgauss", config.canonical(), None)
        probed = detector._probed(torch.zeros(1))
        assert 0 < len(probed) <= posgauss.PROBED
        assert len(set(probed.tolist())) == len(probed)
        assert 0 <= probed.min() <= probed.max() < len(detector.gaussians.mean)
        needed = 2 * posgauss.FOLDS * len(probed) * 8 * detector._channels**2
        assert needed <= posgauss.PROBE_BYTES
