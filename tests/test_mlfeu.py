import os
import signal

import numpy as np
import pytest
import torch

from umiad import detectors, nonfinite
from umiad.detectors.check import CHECKS, Candidate, clean_images, fit_quickly
from umiad.detectors.mlfeu import MlfeuConfig
from umiad.detectors.mlfeu_objective import OBJECTIVES, plant
from umiad.errors import ConfigError
from umiad.features import FeatureCache
from umiad.interrupt import Interrupted
from umiad.nn.image_loss import structural_similarity
from umiad.nn.noise import coarse_noise, foreground
from umiad.nn.pixels import grey
from umiad.phantoms import draw_phantom
from umiad.training import TrainingRun, train

SIZE = 64
TRAINING = {"epochs": 3, "batch_size": 3, "learning_rate": 1e-3, "clip_norm": None}
SHARED = (  # checks that the objective can have an effect on; blob and localises are for the default one
    "losses",
    "gradients",
    "odd_batches",
    "batches",
    "leaves_alone",
    "no_files",
    "global_random",
    "seeds",
    "labels",
    "monitor",
    "round_trip",
)


def build(size=SIZE, **settings):
    small = {"width": 4, "branch": 4, "training": TRAINING}
    config = detectors.preset_config("mlfeu", "paper", size=size, **{**small, **settings})
    return detectors.make("mlfeu", config.canonical(), None)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def phantoms(count, *, seed=1):
    """Grey phantoms without lesions, [count,1,64,64] in 0..1."""
    images = [draw_phantom(np.random.default_rng([seed, k]), size=SIZE, lesions=0)[0] for k in range(count)]
    return torch.from_numpy(np.stack(images))[:, None]


def learnt(objective, images, *, steps):
    """A small detector after some steps on batches of 4 grey images [8,1,64,64], at a rate that falls to 0."""
    detector = build(objective=objective)
    detector.module.train()
    detector.fitted = True
    adam = torch.optim.Adam(detector.param_groups(), lr=1e-2)
    draws = rng()
    for k in range(steps):
        adam.param_groups[0]["lr"] = 1e-2 * (1 - k / steps)
        [losses] = detector.steps({"grey": images[4 * (k % 2) :][:4]}, draws)
        adam.zero_grad()
        losses["total"].backward()
        adam.step()
    detector.module.eval()
    return detector


@torch.no_grad()
def taken_away(detector, images, blob):
    """The share of a `blob` [64,64] added to `images` that the network does not restore."""
    with_blob, without = (x - detector.network(x) for x in (images + blob, images))
    return float(((with_blob - without) * blob).mean() / blob.square().mean())


@pytest.mark.slow
def test_without_noise_the_network_lets_a_blob_through_with_noise_it_takes_it_away():
    axis = torch.arange(SIZE) - 31.5
    blob = 0.25 * torch.exp(-(axis[:, None] ** 2 + axis**2) / 50)
    images, unseen = phantoms(8), phantoms(4, seed=2)
    plain, denoise = (learnt(name, images, steps=60) for name in ("plain", "denoise"))
    assert taken_away(denoise, unseen, blob) > 0.6
    assert taken_away(plain, unseen, blob) < 0.45
    before, after = (denoise.score_prepared({"grey": each}) for each in (unseen, unseen + blob))
    window = slice(24, 40)
    change = (after.anomaly_map - before.anomaly_map).abs()
    assert float(change[:, window, window].mean()) > 5 * float(change.mean())


def test_lesions_are_planted_in_a_share_of_the_images_and_masked():
    images = phantoms(40)
    planted, masks = plant(images, share=0.5, rng=rng(3))
    assert planted.shape == masks.shape == images.shape
    assert set(masks.unique().tolist()) == {0, 1}
    marked = masks.flatten(1).any(1)
    assert 12 <= int(marked.sum()) <= 28
    changed = planted != images
    assert torch.equal(changed.flatten(1).any(1), marked)
    inside = (planted - images).abs()[masks.bool()].mean()
    outside = (planted - images).abs()[masks.logical_not()].mean()
    assert inside > 10 * outside
    assert float(planted.min()) >= 0
    assert float(planted.max()) <= 1


def test_the_generator_decides_what_is_planted():
    images = phantoms(4)
    first, again, other = (plant(images, share=1.0, rng=rng(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])
    assert first[1].flatten(1).any(1).all()


def test_a_single_image_can_be_planted_in_and_values_are_clipped_first():
    images = 3 * phantoms(1) - 1
    for seed in range(12):
        planted, masks = plant(images, share=1.0, rng=rng(seed))
        assert masks.any()
        clean = masks.logical_not() & (planted == images.clamp(0, 1))
        assert clean.any()


def test_the_segmenter_learns_to_see_what_is_planted():
    images = phantoms(8)
    before = build(objective="lesions").monitor({"grey": images})["loss_per_dim"]
    detector = learnt("lesions", images, steps=40)
    assert detector.monitor({"grey": images})["loss_per_dim"] < 0.95 * before
    planted, masks = plant(phantoms(12, seed=2), share=1.0, rng=rng(1))
    maps = detector.score_prepared({"grey": planted}).anomaly_map
    assert 0 <= float(maps.min()) <= float(maps.max()) <= 1
    assert float(maps[masks[:, 0] > 0].mean()) > float(maps[masks[:, 0] == 0].mean()) + 0.02


def test_the_denoising_loss_by_hand():
    detector = build(ssim=0.3, noise=0.4, cells=8, foreground=0.2)
    detector.module.eval()
    images = phantoms(3)
    [losses] = detector.steps({"grey": images}, rng(5))
    with torch.no_grad():
        noise = coarse_noise(images, std=0.4, cells=8, rng=rng(5))
        seen = images + torch.where(foreground(images, level=0.2), noise, 0.0)
        restored = detector.network(seen)
        squared = float((restored - images).square().mean())
        unlike = 1 - float(structural_similarity(restored, images))
    assert float(losses["squared"].detach()) == pytest.approx(squared, rel=1e-5)
    assert float(losses["unlike"].detach()) == pytest.approx(unlike, rel=1e-5)
    assert float(losses["total"].detach()) == pytest.approx(squared + 0.3 * unlike, rel=1e-5)


def test_noise_is_on_the_foreground_only():
    detector, images = build(), phantoms(4)
    noisy = detector.objective.disturb(images, rng())
    shown = foreground(images, level=detector.config.foreground)
    assert 0.3 < float(shown.float().mean()) < 0.9
    assert torch.equal(noisy[~shown], images[~shown])
    assert float((noisy != images)[shown].float().mean()) > 0.99
    plain = build(objective="plain")
    assert plain.objective.disturb(images, rng()) is images


def test_scores_by_hand_without_noise():
    detector = fit_quickly(build(sigma=0.0, top_fraction=0.1), clean_images(4, size=SIZE), steps=2)
    images = clean_images(2, size=SIZE, seed=9)
    scores = detector.score(images)
    detector.module.eval()
    with torch.no_grad():
        expected = (grey(images) - detector.network(grey(images))).abs()[:, 0]
    assert torch.allclose(scores.anomaly_map, expected, atol=1e-6)
    highest = expected.flatten(1).sort(dim=1, descending=True).values[:, :410]  # a tenth of 4,096
    assert torch.allclose(scores.image_score, highest.mean(1), atol=1e-6)


def test_scoring_twice_gives_the_same_and_more_images_than_pass_at_once(monkeypatch):
    monkeypatch.setattr("umiad.detectors.mlfeu.PIXELS_AT_ONCE", 3 * SIZE * SIZE)
    detector = fit_quickly(build(), clean_images(4, size=SIZE), steps=3)
    images = clean_images(7, size=SIZE, seed=3)
    first, second = detector.score(images), detector.score(images)
    assert torch.equal(first.anomaly_map, second.anomaly_map)
    assert torch.equal(first.image_score, second.image_score)
    assert torch.allclose(detector.score(images[6:]).image_score, first.image_score[6:], rtol=1e-4)


@pytest.mark.parametrize(("size", "edge", "expected"), [(64, 256, 64), (96, 64, 64), (96, 96, 96)])
def test_images_are_reduced_to_the_edge_and_never_enlarged(size, edge, expected):
    detector = build(size=size, edge=edge)
    prepared = detector.prepare(clean_images(2, size=size))
    assert prepared["grey"].shape == (2, 1, expected, expected)
    detector.fitted = True
    assert detector.score_prepared(prepared).anomaly_map.shape == (2, size, size)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("value", [0.0, 1e3])
def test_constant_images_give_finite_losses_and_scores(value, objective):
    detector = build(objective=objective, ssim=1.0)
    images = torch.full((2, 3, SIZE, SIZE), value)
    fit_quickly(detector, images, steps=3)
    scores = detector.score(images)
    assert torch.isfinite(scores.anomaly_map).all()
    assert torch.isfinite(scores.image_score).all()
    nonfinite.check_tensors(detector.state(), what="tensor")


def run_of(detector, *, folder=None, on_epoch=None, count=6):
    images = clean_images(count, size=SIZE).numpy()
    keys = [f"image{k}" for k in range(count)]
    cache = FeatureCache(keys).fill(
        detector, ((key, image, (SIZE, SIZE)) for key, image in zip(keys, images, strict=True))
    )
    return TrainingRun(
        cache,
        train=range(count - 1),
        holdout=[count - 1],
        training=detector.config.training,
        seed=1,
        folder=folder,
        on_epoch=on_epoch,
    )


@pytest.mark.parametrize("objective", ["denoise", "lesions"])
def test_a_resumed_fit_ends_bit_equal(tmp_path, objective):
    whole = build(objective=objective)
    expected = train(whole, run_of(whole))

    def stop(row):
        if row["epoch"] == 1:
            os.kill(os.getpid(), signal.SIGINT)

    first = build(objective=objective)
    with pytest.raises(Interrupted):
        train(first, run_of(first, folder=tmp_path, on_epoch=stop))
    resumed = build(objective=objective)
    rows = train(resumed, run_of(resumed, folder=tmp_path), resume=True)
    assert rows[-1]["loss"] == expected[-1]["loss"]
    assert all(torch.equal(whole.state()[key], value) for key, value in resumed.state().items())


def test_the_log_tells_how_well_images_are_restored():
    training = {"epochs": 12, "batch_size": 4, "learning_rate": 1e-2, "clip_norm": None, "schedule": "cosine"}
    detector = build(training=training)
    rows = train(detector, run_of(detector, count=9))
    assert rows[-1]["loss"] == pytest.approx(rows[-1]["squared"])
    assert rows[-1]["loss_per_dim"] < 0.5 * rows[0]["loss_per_dim"]
    assert rows[-1]["holdout_loss_per_dim"] < 0.5 * rows[0]["holdout_loss_per_dim"]


@pytest.fixture(scope="module")
def candidate():
    return Candidate(lambda seed: build(objective="lesions", seed=seed), SIZE)


@pytest.mark.parametrize("check", SHARED)
def test_the_battery_with_planted_lesions(candidate, check):
    CHECKS[check](candidate)


def test_the_configuration_knows_every_objective():
    for name in OBJECTIVES:
        assert build(objective=name).config.objective == name
    allowed = MlfeuConfig.model_json_schema()["properties"]["objective"]["enum"]
    assert sorted(allowed) == sorted(OBJECTIVES)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"objective": "supervised"}, "objective: .*'denoise', 'lesions' or 'plain', got 'supervised'"),
        ({"enhance": "se"}, "enhance"),
        ({"neck": "aspp"}, "neck"),
        ({"edge": 100}, "edge"),
        ({"edge": 32}, "edge"),
        ({"edge": 2048}, "edge"),
        ({"width": 6}, "width"),
        ({"width": 128}, "width"),
        ({"branch": 0}, "branch"),
        ({"branch": 513}, "branch"),
        ({"noise": 0.0}, "noise"),
        ({"cells": 1}, "cells"),
        ({"foreground": 1.0}, "foreground"),
        ({"ssim": -1.0}, "ssim"),
        ({"planted": 0.0}, "planted"),
        ({"top_fraction": 0.0}, "top_fraction"),
        ({"objektive": "plain"}, "did you mean 'objective'"),
    ],
)
def test_impossible_settings_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        MlfeuConfig.parse(values)


@pytest.mark.parametrize(("preset", "millions"), [("paper", 12.29), ("default", 3.07), ("quick", 0.77)])
def test_weights_of_the_presets(preset, millions):
    config = detectors.preset_config("mlfeu", preset, size=256)
    detector = detectors.make("mlfeu", config.canonical(), None)
    assert sum(p.numel() for p in detector.parts()["network"].parameters()) / 1e6 == pytest.approx(
        millions, abs=0.005
    )


def test_the_presets():
    config = detectors.preset_config("mlfeu", "paper", size=256)
    assert config == MlfeuConfig(size=256, preset="paper")
    assert (config.edge, config.width, config.branch) == (256, 32, 192)
    assert (config.objective, config.noise, config.cells, config.ssim) == ("denoise", 0.2, 16, 0)
    assert (config.enhance, config.neck, config.top_fraction) == ("lfeb", "pmff", 0.01)
    training = config.training
    assert (training.batch_size, training.learning_rate, training.weight_decay) == (16, 1e-4, 1e-5)
    assert all(group["amsgrad"] for group in build().param_groups())
    for preset in ("default", "quick"):
        cut = detectors.preset_config("mlfeu", preset, size=256)
        assert (cut.objective, cut.edge, cut.training.schedule) == ("denoise", 128, "cosine")
        assert (cut.training.batch_size, cut.training.learning_rate) == (4, 2e-3)
    assert detectors.detector_class("mlfeu").info.fidelity == "adapted"


def test_impossible_settings_cost_nothing_at_the_largest():
    detector = build(size=1024, edge=1024, width=64, branch=512)
    assert sum(p.numel() for p in detector.network.parameters()) < 60e6
