import os
import signal

import pytest
import torch
from torch.nn import functional as F

from umiad import detectors
from umiad.config import TrainingConfig
from umiad.detectors.check import clean_images, fit_quickly
from umiad.detectors.medvit import MedVit
from umiad.detectors.medvit_taught import TaughtConfig, TaughtMedVit
from umiad.errors import ConfigError, InputError, NotFittedError, TrainingError
from umiad.features import FeatureCache
from umiad.interrupt import Interrupted
from umiad.training import TrainingRun, train

SIZE = 64


def build(preset="quick", size=SIZE, **settings):
    config = detectors.preset_config("medvit", preset, size=size, **settings)
    return detectors.make("medvit", config.canonical(), None)


@pytest.fixture(scope="module")
def fitted():
    """Shared by tests that only score."""
    return fit_quickly(build(), clean_images(6, size=SIZE), steps=2)


def copied(detector, **settings):
    """The same fitted state under other settings that leave its shapes alone."""
    config = TaughtConfig.parse({**detector.config.canonical(), **settings})
    other = MedVit(config, None)
    other.load_state(detector.state())
    return other


def test_images_are_reduced_by_area_averaging_and_stay_normalised():
    detector = build(size=128)
    images = clean_images(2, size=128)
    expected = images.unflatten(2, (64, 2)).unflatten(4, (64, 2)).mean((3, 5))
    assert torch.allclose(detector.prepare(images)["image"], expected, atol=1e-6)
    assert torch.equal(build().prepare(images[..., :64, :64])["image"], images[..., :64, :64])


def test_the_loss_is_the_cross_entropy_of_three_versions_of_each_image():
    detector, rng = build(drop_path=0.0), torch.Generator().manual_seed(4)
    detector.module.train()
    seen = []
    detector.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    [step] = detector.steps(detector.prepare(clean_images(4, size=SIZE)), rng)
    [views] = seen
    assert views.shape == (12, 3, SIZE, SIZE)
    logits = detector.network.classify(detector.network(views).embedding)
    expected = F.cross_entropy(logits, torch.tensor([0] * 4 + [1] * 4 + [2] * 4))
    assert torch.allclose(step["total"], expected, rtol=1e-4)
    assert 0 <= float(step["accuracy"]) <= 1


def test_steps_depend_on_the_generator_alone():
    detector = build()
    detector.module.train()
    prepared = detector.prepare(clean_images(3, size=SIZE))
    losses = []
    for seed in (0, 0, 1):
        [step] = detector.steps(prepared, torch.Generator().manual_seed(seed))
        losses.append(float(step["total"].detach()))
    assert losses[0] == losses[1] != losses[2]


def test_scores_are_mahalanobis_distances_of_the_unaugmented_images(fitted):
    fitted = copied(fitted, sigma=0.0)
    images = clean_images(3, size=SIZE, seed=9)
    scores = fitted.score(images)
    with torch.no_grad():
        fitted.module.eval()
        found = fitted.network(images)
        apart = found.embedding - fitted.embedding.mean
        whole = (apart @ fitted.embedding.whitening[0].T).square().sum(1).sqrt()
        coarse = F.interpolate(found.maps[2], size=(8, 8), mode="bilinear")
        channels = torch.cat([found.maps[1], coarse], dim=1)[:, fitted.index].flatten(2)  # [B,d,P]
        centred = channels.permute(2, 0, 1) - fitted.positions.mean[:, None]
        cells = torch.einsum("pij,pbj->pbi", fitted.positions.whitening, centred).square().sum(2).sqrt()
        maps = F.interpolate(cells.T.reshape(3, 1, 8, 8), size=(SIZE, SIZE), mode="bilinear")[:, 0]
    assert torch.allclose(scores.image_score, whole, rtol=1e-3)
    assert torch.allclose(scores.anomaly_map, maps, rtol=1e-3)


def test_the_image_score_can_come_from_the_map(fitted):
    images = clean_images(2, size=SIZE, seed=9)
    by_map, by_embedding = copied(fitted, image_score="map").score(images), fitted.score(images)
    assert torch.equal(by_map.anomaly_map, by_embedding.anomaly_map)
    assert torch.equal(by_map.image_score, by_map.anomaly_map.amax((1, 2)))
    assert not torch.equal(by_map.image_score, by_embedding.image_score)


def test_fitted_normal_images_are_about_one_deviation_away_per_dimension():
    detector = build()
    images = clean_images(12, size=SIZE)
    fit_quickly(detector, images, steps=1)
    squared = detector.score(images).image_score.square().mean() / 384
    assert 0.02 < float(squared) < 1.1  # shrinkage makes it less than 11 / 384 could
    assert float(detector.score(images).anomaly_map.mean()) > 0


def test_nothing_is_dropped_and_no_statistics_move_while_scoring(fitted):
    images = clean_images(2, size=SIZE, seed=9)
    fitted.module.train()
    before = {key: value.clone() for key, value in fitted.state().items()}
    first, again = fitted.score(images), fitted.score(images)
    fitted.monitor(fitted.prepare(images))
    assert torch.equal(first.anomaly_map, again.anomaly_map)
    assert torch.equal(first.image_score, again.image_score)
    assert all(torch.equal(value, before[key]) for key, value in fitted.state().items())
    alone = fitted.score(images[1:])
    assert torch.allclose(alone.anomaly_map[0], first.anomaly_map[1], rtol=1e-4)


def test_collecting_does_not_depend_on_the_batches():
    images = clean_images(6, size=SIZE)
    found = []
    for sizes in ((6,), (1, 2, 3)):
        detector = build()
        detector.module.train()
        for part in images.split(list(sizes)):
            detector.collect(detector.prepare(part))
        detector.finish(torch.Generator())
        found.append(detector.score(images))
    assert torch.allclose(found[0].image_score, found[1].image_score, rtol=1e-3)
    assert torch.allclose(found[0].anomaly_map, found[1].anomaly_map, rtol=1e-3)


def test_one_image_makes_a_step_but_no_gaussian():
    detector = build()
    detector.module.train()
    prepared = detector.prepare(clean_images(1, size=SIZE))
    [step] = detector.steps(prepared, torch.Generator())
    step["total"].backward()
    assert bool(torch.isfinite(step["total"]))
    with pytest.raises(TrainingError, match="at least 2 normal images, got 0"):
        detector.finish(torch.Generator())
    detector.collect(prepared)
    with pytest.raises(TrainingError, match="at least 2 normal images, got 1"):
        detector.finish(torch.Generator())
    with pytest.raises(NotFittedError, match="medvit is not fitted"):
        detector.score_prepared(prepared)


@pytest.mark.slow
def test_training_lowers_the_loss():
    """On versions that are the same in each step; to learn from new ones takes minutes."""
    detector = build(drop_path=0.0)
    prepared, losses = detector.prepare(clean_images(2, size=SIZE)), []
    detector.module.train()
    optimiser = torch.optim.Adam(detector.param_groups(), lr=3e-4)
    for _ in range(12):
        for step in detector.steps(prepared, torch.Generator().manual_seed(0)):
            optimiser.zero_grad()
            step["total"].backward()
            optimiser.step()
            losses.append(float(step["total"].detach()))
    # the steps after the first few differ from processor to processor: rounding grows, a single loss tells little
    assert sum(losses[-4:]) / 4 < 0.8 * losses[0], losses


def test_the_monitor_tells_how_well_the_versions_are_told_apart():
    detector = build()
    prepared = detector.prepare(clean_images(3, size=SIZE))
    first = detector.monitor(prepared)
    assert first.keys() == {"label_nats_per_dim", "label_accuracy"}
    assert first["label_nats_per_dim"] == pytest.approx(1.0986, abs=0.2)  # log 3: it has not learnt yet
    assert detector.monitor(prepared) == first
    more = {"image": torch.cat([prepared["image"]] * 4)}
    assert detector.monitor(more) == detector.monitor({"image": more["image"][:8]})


@pytest.mark.slow
def test_a_resumed_run_ends_bit_equal(tmp_path):
    cache = FeatureCache([str(k) for k in range(3)])
    images = enumerate(clean_images(3, size=SIZE).numpy())
    cache.fill(build(), ((str(k), image, (SIZE, SIZE)) for k, image in images))
    training = TrainingConfig(epochs=2, batch_size=2, learning_rate=1e-3, clip_norm=None, schedule="cosine")

    def stop(row):
        if row["epoch"] == 1:
            os.kill(os.getpid(), signal.SIGINT)

    whole, first, resumed = build(), build(), build()
    rows = train(whole, TrainingRun(cache, range(3), training=training, holdout=[2]))
    assert {"loss", "accuracy", "label_accuracy", "holdout_label_nats_per_dim"} <= rows[-1].keys()
    with pytest.raises(Interrupted):
        train(first, TrainingRun(cache, range(3), training=training, folder=tmp_path, on_epoch=stop))
    train(resumed, TrainingRun(cache, range(3), training=training, folder=tmp_path), resume=True)
    state = resumed.state()
    assert all(torch.equal(value, state[key]) for key, value in whole.state().items())


def test_images_of_another_size_are_refused(fitted):
    with pytest.raises(InputError, match=r"\(1, 3, 96, 96\), expected \[B,3,64,64\]"):
        fitted.score(clean_images(1, size=96))


def test_the_official_layout_is_another_model_that_can_be_saved():
    ours, official = build(), build(official_layout=True)
    extra = official.state().keys() - ours.state().keys()
    assert extra
    assert all(".unused." in key for key in extra)
    images = clean_images(4, size=SIZE)
    fit_quickly(official, images, steps=1)
    optimised = {id(p) for group in official.param_groups() for p in group["params"]}
    assert optimised == {id(p) for p in official.module.parameters() if p.grad is not None}
    again = copied(official)
    assert torch.equal(again.score(images).image_score, official.score(images).image_score)


@pytest.mark.parametrize(("edge", "size", "side"), [(128, 256, 16), (224, 64, 8), (96, 96, 12)])
def test_maps_follow_the_smaller_of_edge_and_size(edge, size, side):
    config = TaughtConfig(edge=edge, size=size)
    assert (config.working_edge, config.positions) == (min(edge, size), side**2)


def test_channels_are_drawn_from_the_seed():
    first, again, other = (build(seed=seed, channels=20).index for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (len(first), int(first.max()) < 128 + 192) == (20, True)
    assert build(channels=400).index.tolist() == list(range(320))  # no more than there are


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"network": "huge"}, "network"),
        ({"edge": 32}, "edge"),
        ({"edge": 100}, "multiple of 32"),
        ({"edge": 1024}, "edge"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"channels": 0}, "channels"),
        ({"image_score": "logits"}, "image_score"),
        ({"edge": 512, "size": 512, "channels": 512}, "expected at most 67108864"),
    ],
)
def test_impossible_settings_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        TaughtConfig.parse(values)


def test_the_paper_preset_has_the_published_constants():
    config = detectors.preset_config("medvit", "paper", size=256)
    assert (config.network, config.working_edge, config.official_layout) == ("small", 224, False)
    assert (config.image_score, config.channels, config.sigma, config.drop_path) == (
        "embedding",
        100,
        4.0,
        None,
    )
    training = config.training
    assert (training.epochs, 3 * training.batch_size, training.learning_rate) == (100, 24, 1e-4)
    assert (training.weight_decay, training.clip_norm, training.schedule) == (0.05, None, "cosine")
    [group] = build().param_groups()
    assert (group["betas"], group["decoupled_weight_decay"]) == ((0.9, 0.999), True)


def test_the_other_presets_cut_edge_and_epochs():
    found = {name: detectors.preset_config("medvit", name, size=256) for name in ("default", "quick")}
    facts = {name: (c.network, c.edge, c.training.schedule) for name, c in found.items()}
    assert facts == {"default": ("tiny", 64, "cosine"), "quick": ("tiny", 64, "cosine")}
    assert found["quick"].training.epochs < found["default"].training.epochs < 100


def test_it_declares_itself_adapted_and_says_why():
    assert (MedVit.info.fidelity, MedVit.info.uses_backbone) == ("adapted", False)
    assert TaughtMedVit.__doc__.count("Our choice:") >= 4
    assert "docs/decisions/0009-medvit.md" in TaughtMedVit.__doc__
