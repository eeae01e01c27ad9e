import itertools
import math
import os
import signal

import pytest
import torch
from torch.nn import functional as F

from umiad import detectors
from umiad.config import TrainingConfig
from umiad.detectors.adfa import Adfa, AdfaConfig, AdfaNetwork
from umiad.detectors.check import clean_images, fit_quickly
from umiad.errors import ConfigError
from umiad.features import FeatureCache
from umiad.interrupt import Interrupted
from umiad.nn.topk import prices, soft_topk
from umiad.parameters import count
from umiad.training import TrainingRun, train

SIZE = 64


def build(preset="quick", **settings):
    settings = {"backbone": "resnet-tiny", **settings}
    config = detectors.preset_config("adfa", preset, size=SIZE, **settings)
    return detectors.make("adfa", config.canonical(), None)


def rows(prepared, part):
    return {name: values[part] for name, values in prepared.items()}


def descriptors_of(detector, prepared):
    """Trained descriptors [B,n,C'], by the definition."""
    maps = detector.network.descriptor(detector._joined(prepared))
    return maps.flatten(2).transpose(1, 2)


def factors_of(described, centroids, config):
    """KL(softmax centroids || softmax descriptors) over channels, summed over cells, of each image: [B,1,1]."""
    if not config.times_divergence:
        return torch.ones(len(described), 1, 1, dtype=described.dtype)
    mean, own = centroids.softmax(1), described.detach().softmax(2)
    return (mean * (mean / own).log()).sum((1, 2))[:, None, None]


def multiplied(described, centroids, config):
    """Squared distances of all cells to all centroids times their image's factor, [B,n,n]."""
    distances = (described[:, :, None] - centroids).square().sum(3)
    return factors_of(described, centroids, config) * distances


def costs_of(described, centroids, scale, config):
    distances = multiplied(described, centroids, config)
    return (soft_topk(distances, k=config.k, eps=config.eps, scale=scale) * distances).sum(2)


def highest_prices(described, centroids, config):
    return prices(multiplied(described.detach(), centroids, config)).amax((1, 2))


@pytest.mark.parametrize(
    ("backbone", "expected"),
    # (channels + 2 coordinates) x a quarter of the channels + its biases + 9 of the attention
    [("resnet18", 450 * 112 + 112 + 9), ("resnet-tiny", 50_521), ("resnet50", 1794 * 448 + 448 + 9)],
)
def test_parameters_of_the_descriptor(backbone, expected):
    """0.05 M for ResNet18; 0.804 M for 1,792 channels, which WideResNet50 has as well as ResNet50."""
    network = AdfaNetwork(AdfaConfig(size=SIZE, backbone=backbone))
    assert count(network) == {"total": expected, "trainable": expected}


def test_parameters_of_the_whole():
    """2.78 M of ResNet18 up to layer 3, and nothing that is never used."""
    detector = Adfa(AdfaConfig(size=SIZE), None)
    counts = {name: count(part)["total"] for name, part in detector.parts().items()}
    assert counts == {"encoder": 2_782_784, "descriptor": 50_521}
    assert count(detector.module)["total"] == sum(counts.values())


def test_the_paper_preset_has_the_published_constants():
    config = detectors.preset_config("adfa", "paper", size=256)
    assert (config.side, config.k, config.eps, config.times_divergence, config.sigma) == (
        64,
        3,
        0.1,
        True,
        4.0,
    )
    training = config.training
    assert (training.epochs, training.batch_size, training.clip_norm) == (200, 10, None)
    assert (training.learning_rate, training.weight_decay, training.schedule) == (1e-3, 5e-4, "constant")
    assert config.training == AdfaConfig().training
    [group] = build("paper").param_groups()
    assert (group["amsgrad"], group["decoupled_weight_decay"]) == (True, True)


@pytest.mark.parametrize("preset", ["default", "quick"])
def test_cut_presets_end_their_schedule_and_keep_the_rest(preset):
    config = detectors.preset_config("adfa", preset, size=256)
    paper = detectors.preset_config("adfa", "paper", size=256)
    assert config.training.schedule == "cosine"
    same = {"epochs": paper.training.epochs, "schedule": paper.training.schedule}
    assert config.training.model_copy(update=same) == paper.training
    assert config.model_copy(update={"grid": 64, "preset": "paper", "training": paper.training}) == paper


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"grid": 1}, "grid"),
        ({"grid": 129}, "grid"),
        ({"k": 0}, "k: "),
        ({"grid": 4, "k": 17}, "k is 17, but 4 x 4 cells have 16 centroids"),
        ({"eps": 0.0}, "eps"),
        ({"eps": math.inf}, "eps"),
    ],
)
def test_impossible_settings_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        AdfaConfig.parse({"size": SIZE, **values})


def test_scales_are_averaged_kept_no_finer_than_the_grid_and_joined_on_it():
    images = clean_images(2, size=SIZE)
    for grid, sides in ((32, (16, 8, 4)), (16, (16, 8, 4)), (8, (8, 8, 4)), (2, (2, 2, 2))):
        detector = build(grid=grid)
        prepared = detector.prepare(images)
        assert tuple(values.shape[-1] for values in prepared.values()) == sides
        side = detector.config.side
        assert side == min(grid, SIZE // 4)
        assert detector._joined(prepared).shape == (2, 448, side, side)
    pyramid = build().pyramid(images, depth=3)
    padded = F.pad(pyramid[1], (1, 1, 1, 1))
    mean = sum(padded[:, :, r : r + 8, c : c + 8] for r in range(3) for c in range(3)) / 9
    assert torch.allclose(build().prepare(images)["f2"], mean, atol=1e-5)
    halved = build(grid=8).prepare(images)["f1"]
    expected = build().prepare(images)["f1"].unflatten(3, (8, 2)).unflatten(2, (8, 2)).mean((3, 5))
    assert torch.allclose(halved, expected, atol=1e-5)


def one_epoch(detector, prepared, batches, optimiser=None):
    optimiser = optimiser or torch.optim.Adam(detector.param_groups(), lr=1e-2)
    for part in batches:
        for losses in detector.steps(rows(prepared, part), torch.Generator()):
            optimiser.zero_grad()
            losses["total"].backward()
            optimiser.step()


def test_centroids_are_the_mean_of_the_untrained_descriptor_in_whatever_order():
    images = clean_images(7, size=SIZE)
    untrained = build()
    prepared = untrained.prepare(images)
    with torch.no_grad():
        expected = descriptors_of(untrained, prepared).mean(0)
    for batches in ([[0, 1, 2], [3, 4, 5], [6]], [[6, 2], [1, 0, 4], [5, 3]]):
        detector = build()
        for epoch in range(1, 4):
            one_epoch(detector, prepared, batches)
            assert int(detector.network.shown) == 7 * epoch
            # sums of up to 21 float32 values of size 1
            assert torch.allclose(detector.network.centroids, expected, atol=1e-5)
        assert not torch.allclose(
            descriptors_of(detector, prepared), descriptors_of(untrained, prepared), atol=1e-2
        )


def test_looking_for_a_fault_moves_no_centroid():
    detector = build()
    prepared = detector.prepare(clean_images(2, size=SIZE))
    one_epoch(detector, prepared, [[0, 1]])
    before = {name: values.clone() for name, values in detector.state().items()}
    with torch.no_grad():
        list(detector.steps(rows(prepared, [0]), torch.Generator()))
    assert all(torch.equal(before[name], values) for name, values in detector.state().items())


@pytest.mark.parametrize("times_divergence", [True, False])
def test_the_loss_by_hand(times_divergence):
    detector = build(times_divergence=times_divergence, k=2, eps=0.2, grid=4)
    prepared = detector.prepare(clean_images(3, size=SIZE))
    one_epoch(detector, prepared, [[0, 1, 2]])
    [losses] = detector.steps(prepared, torch.Generator())
    described, centroids = descriptors_of(detector, prepared).double(), detector.network.centroids.double()
    price = highest_prices(described, centroids, detector.config).max()  # one for the batch
    costs = costs_of(described, centroids, price, detector.config)
    factors = factors_of(described, centroids, detector.config)[:, 0]
    assert float(factors.min()) > 0
    expected, per_dim = costs.mean(), (costs / factors).detach().mean() / (2 * 112)
    assert float(losses["total"].detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert float(losses["distance_per_dim"]) == pytest.approx(float(per_dim), rel=1e-4)
    parameters = list(detector.network.descriptor.parameters())
    found = torch.autograd.grad(losses["total"], parameters)
    for one, other in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        assert torch.allclose(one, other, rtol=1e-2, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("times_divergence", [True, False])
def test_the_map_is_the_root_of_the_soft_distance_with_a_scale_per_image(times_divergence):
    built = build(sigma=0.0, times_divergence=times_divergence)
    detector = fit_quickly(built, clean_images(4, size=SIZE), steps=3)
    images = torch.cat([clean_images(1, size=SIZE, seed=9), 20 * clean_images(1, size=SIZE, seed=8)])
    prepared = detector.prepare(images)
    scores = detector.score_prepared(prepared)
    with torch.no_grad():
        described, centroids = (
            descriptors_of(detector, prepared).double(),
            detector.network.centroids.double(),
        )
    tops = highest_prices(described, centroids, detector.config)
    assert tops[1] > 1.2 * tops[0]  # the scale would differ if it were the batch's
    costs = costs_of(described, centroids, tops[:, None, None], detector.config)
    side = detector.config.side
    cells = costs.sqrt().view(2, 1, side, side)
    maps = F.interpolate(cells, size=(SIZE, SIZE), mode="bilinear", align_corners=False)[:, 0]
    assert torch.allclose(scores.anomaly_map.double(), maps, rtol=1e-4)
    assert torch.equal(scores.image_score, scores.anomaly_map.amax((1, 2)))


def test_an_image_that_is_its_centroids_scores_nothing():
    """The divergence is 0 then, and never below, whatever rounding does to it."""
    detector = build()
    prepared = detector.prepare(clean_images(1, size=SIZE))
    detector.fitted = True
    detector.network.show(detector._joined(prepared))
    assert float(detector.network.divergence(descriptors_of(detector, prepared)).min()) >= 0
    scores = detector.score_prepared(prepared)
    assert float(scores.anomaly_map.max()) < 1e-2
    assert detector.monitor(prepared)["distance_per_dim"] >= 0


@pytest.mark.parametrize("times_divergence", [True, False])
def test_training_brings_descriptors_nearer_and_does_not_collapse_them(times_divergence):
    """At the published rate and decay; the centroids settle in the first epoch."""
    detector, images = build(times_divergence=times_divergence), clean_images(8, size=SIZE)
    prepared = detector.prepare(images)
    optimiser = torch.optim.Adam(detector.param_groups(), lr=1e-3, weight_decay=5e-4)
    distances = []
    for _ in range(20):
        one_epoch(detector, prepared, [[0, 1, 2, 3], [4, 5, 6, 7]], optimiser)
        distances.append(detector.monitor(prepared)["distance_per_dim"])
    assert distances[-1] < 0.9 * distances[0]
    maps = detector.score(clean_images(4, size=SIZE, seed=1)).anomaly_map
    assert float(maps.flatten(1).std(1).min()) > 3e-3 * float(maps.mean())  # within an image
    assert float(maps.mean((1, 2)).std()) > 3e-4 * float(maps.mean())  # and between images


@pytest.mark.parametrize("grid", [2, 5, 32])
def test_any_grid_takes_a_step_and_scores(grid):
    detector = fit_quickly(build(grid=grid), clean_images(3, size=SIZE), steps=2)
    assert detector.network.centroids.shape == (detector.config.side**2, 112)
    assert torch.isfinite(detector.score(clean_images(1, size=SIZE)).anomaly_map).all()


def cached(detector, number=5):
    images = clean_images(number, size=SIZE).numpy()
    keys = [f"image{k}" for k in range(number)]
    return FeatureCache(keys).fill(detector, zip(keys, images, itertools.repeat((SIZE, SIZE))))


def run_of(detector, **settings):
    training = TrainingConfig(epochs=4, batch_size=2, learning_rate=1e-3, weight_decay=5e-4, clip_norm=None)
    return TrainingRun(cached(detector), train=range(5), training=training, seed=1, **settings)


def test_a_resumed_run_ends_bit_equal_centroids_included(tmp_path):
    def stop(row):
        if row["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    whole, first, resumed = build(), build(), build()
    expected = train(whole, run_of(whole))
    with pytest.raises(Interrupted):
        train(first, run_of(first, folder=tmp_path, on_epoch=stop))
    assert train(resumed, run_of(resumed, folder=tmp_path), resume=True)[-1]["loss"] == expected[-1]["loss"]
    assert int(whole.network.shown) == 20
    state = whole.state()
    assert all(torch.equal(state[name], values) for name, values in resumed.state().items())
    assert not any("initial" in name for name in state)
