import itertools
import os
import signal

import numpy as np
import pytest
import torch

from umiad import detectors, nonfinite
from umiad.config import Preprocessing
from umiad.detectors.check import clean_images, fit_quickly
from umiad.detectors.fanogan import FAnoGan, FAnoGanConfig
from umiad.errors import ConfigError
from umiad.features import FeatureCache
from umiad.interrupt import Interrupted
from umiad.phantoms import draw_phantom
from umiad.preprocess import to_input
from umiad.training import TrainingRun, train
from umiad.types import Image

SIZE = 64
TRAINING = {"epochs": 4, "batch_size": 3, "learning_rate": 1e-3, "clip_norm": None}


def build(size=SIZE, **settings):
    small = {"edge": 32, "width": 2, "latent": 8, "critic_steps": 2, "training": TRAINING}
    config = detectors.preset_config("fanogan", "paper", size=size, **{**small, **settings})
    return detectors.make("fanogan", config.canonical(), None)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def weights(detector):
    return {name: [p.detach().clone() for p in part.parameters()] for name, part in detector.parts().items()}


def changed_by_each_step(detector, prepared):
    """Names of the networks whose parameters each step of one batch changes, with the training loop's optimiser."""
    adam = torch.optim.Adam(detector.param_groups(), lr=1e-3)
    found = []
    for losses in detector.steps(prepared, rng()):
        assert all(p.requires_grad for p in detector.module.parameters())
        before = weights(detector)
        adam.zero_grad()
        losses["total"].backward()
        adam.step()
        after = weights(detector)
        found.append([n for n in before if any(map(differ, before[n], after[n]))])
    return found


def differ(first, second):
    return not torch.equal(first, second)


def test_each_step_changes_its_own_network_and_the_encoder_comes_last():
    detector = build()
    prepared = detector.prepare(clean_images(3, size=SIZE))
    gan = [["critic"], ["critic"], ["generator"]]
    for epoch in (1, 2, 2):  # 2 of 4 epochs, however many batches they have
        detector.begin_epoch(epoch)
        assert changed_by_each_step(detector, prepared) == gan
    statistics = detector.generator.norm.running_mean.clone()
    for epoch in (3, 4):
        detector.begin_epoch(epoch)
        assert changed_by_each_step(detector, prepared) == [["latent_encoder"]]
    assert torch.equal(detector.generator.norm.running_mean, statistics)


def test_alongside_the_encoder_learns_in_both_phases():
    detector = build(alongside=True, critic_steps=1)
    prepared = detector.prepare(clean_images(3, size=SIZE))
    found = []
    for epoch in (1, 2, 3):
        detector.begin_epoch(epoch)
        found.append(changed_by_each_step(detector, prepared))
    assert found == [[["critic"], ["generator"], ["latent_encoder"]]] * 2 + [[["latent_encoder"]]]


@pytest.mark.parametrize(
    ("epochs", "share", "expected"), [(4, 0.5, 2), (4, 0.01, 1), (4, 0.99, 3), (2, 0.5, 1), (100, 0.3, 30)]
)
def test_every_phase_has_an_epoch(epochs, share, expected):
    config = FAnoGanConfig(training={**TRAINING, "epochs": epochs}, gan_share=share)
    assert config.gan_epochs == expected


def test_one_epoch_is_enough_only_alongside():
    one = {**TRAINING, "epochs": 1}
    with pytest.raises(ConfigError, match="at least 2 epochs, or 'alongside'"):
        FAnoGanConfig.parse({"training": one})
    assert FAnoGanConfig.parse({"training": one, "alongside": True}).gan_epochs == 1


def test_a_batch_of_one_image_has_finite_losses_in_both_phases():
    detector = fit_quickly(build(), clean_images(1, size=SIZE), steps=4)
    assert detector.epoch == 4
    nonfinite.check_tensors(detector.state(), what="tensor")


def run_of(detector, *, folder=None, on_epoch=None, images=None):
    images = clean_images(6, size=SIZE).numpy() if images is None else images
    keys = [f"image{k}" for k in range(len(images))]
    cache = FeatureCache(keys).fill(
        detector, ((key, image, (SIZE, SIZE)) for key, image in zip(keys, images, strict=True))
    )
    return TrainingRun(
        cache,
        train=range(len(keys) - 1),
        holdout=[len(keys) - 1],
        training=detector.config.training,
        seed=1,
        folder=folder,
        on_epoch=on_epoch,
    )


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_resumed_fit_ends_bit_equal_whichever_phase_was_interrupted(tmp_path, epoch):
    whole = build()
    expected = train(whole, run_of(whole))
    assert whole.epoch == 4

    def stop(row):
        if row["epoch"] == epoch:
            os.kill(os.getpid(), signal.SIGINT)

    first = build()
    with pytest.raises(Interrupted):
        train(first, run_of(first, folder=tmp_path, on_epoch=stop))
    assert first.epoch == epoch
    resumed = build()
    rows = train(resumed, run_of(resumed, folder=tmp_path), resume=True)
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]
    assert all(torch.equal(whole.state()[key], value) for key, value in resumed.state().items())


@pytest.mark.parametrize("equal", [False, True])
def test_each_phase_has_its_epochs_and_leaves_the_other_networks_alone(equal):
    """Five images in batches of 3, 2 of 4 epochs each; whether images are there more than once does not matter."""
    states, detector = [], build()
    images = clean_images(6, size=SIZE).numpy()

    def note(row):
        states.append({key: value.clone() for key, value in detector.state().items()})

    train(detector, run_of(detector, on_epoch=note, images=images[[0] * 6] if equal else images))
    changed = [
        {key.split(".")[0] for key in one if differ(one[key], other[key])}
        for one, other in itertools.pairwise(states)
    ]
    assert changed == [{"generator", "critic"}, {"latent_encoder"}, {"latent_encoder"}]


@pytest.mark.slow
def test_training_restores_images_better():
    quick = detectors.preset_config("fanogan", "quick", size=SIZE, edge=32)
    detector = detectors.make("fanogan", quick.canonical(), None)
    draw = np.random.default_rng(0)
    heads = [draw_phantom(draw, size=SIZE, lesions=0)[0] for _ in range(25)]
    images = [to_input(Image(each[None], "head"), Preprocessing(size=SIZE)) for each in heads]
    rows = train(detector, run_of(detector, images=images))
    assert rows[-1]["mse_per_dim"] < 0.6 * rows[0]["mse_per_dim"]
    assert rows[-1]["holdout_mse_per_dim"] < 0.6 * rows[0]["holdout_mse_per_dim"]


def test_scores_by_hand():
    detector = fit_quickly(build(edge=64, kappa=0.5), clean_images(4, size=SIZE), steps=2)
    images = clean_images(2, size=SIZE, seed=9)
    scores = detector.score(images)
    detector.module.eval()
    with torch.no_grad():
        real = 2 * (images * torch.tensor([0.229, 0.224, 0.225])[:, None, None]) - 1
        real = (real + 2 * torch.tensor([0.485, 0.456, 0.406])[:, None, None]).mean(1, keepdim=True)
        restored = detector.generator(detector.encoder(real))
        f, g = detector.critic.features(real), detector.critic.features(restored)
        expected = ((real - restored) ** 2).mean((1, 2, 3)) + 0.5 * ((f - g) ** 2).mean((1, 2, 3))
    assert torch.allclose(scores.anomaly_map, (real - restored).abs()[:, 0], atol=1e-5)
    assert torch.allclose(scores.image_score, expected, rtol=1e-4)


def test_the_encoder_minimises_the_score():
    detector = build(training={**TRAINING, "epochs": 2})
    prepared = detector.prepare(clean_images(4, size=SIZE))
    list(detector.steps(prepared, rng()))
    detector.begin_epoch(2)
    [step] = detector.steps(prepared, rng())
    detector.encoder.train()
    with torch.no_grad():
        detector.generator.eval()
        restored = detector.generator(detector.encoder(prepared["grey"]))
        expected = detector._distance(prepared["grey"], restored).mean()
    assert float(step["total"].detach()) == pytest.approx(float(expected), rel=1e-5)


def test_scoring_twice_gives_the_same_and_more_images_than_pass_at_once():
    detector = fit_quickly(build(), clean_images(4, size=SIZE), steps=3)
    images = clean_images(35, size=SIZE, seed=3)
    first, second = detector.score(images), detector.score(images)
    assert torch.equal(first.anomaly_map, second.anomaly_map)
    assert torch.equal(first.image_score, second.image_score)
    assert torch.allclose(detector.score(images[33:]).image_score, first.image_score[33:], rtol=1e-4)


@pytest.mark.parametrize("value", [0.0, -1e3, 1e3])
def test_constant_images_give_finite_losses_and_scores(value):
    detector = build()
    images = torch.full((2, 3, SIZE, SIZE), value)
    fit_quickly(detector, images, steps=4)
    scores = detector.score(images)
    assert torch.isfinite(scores.anomaly_map).all()
    assert torch.isfinite(scores.image_score).all()
    nonfinite.check_tensors(detector.state(), what="tensor")


def test_the_origin_of_what_is_not_finite_is_found():
    detector = build()
    prepared = detector.prepare(clean_images(3, size=SIZE))
    assert nonfinite.origin(detector, prepared, rng()) is None
    with torch.no_grad():
        detector.critic.end.weight[0, 0] = float("nan")
    assert nonfinite.origin(detector, prepared, rng()) == "critic"


@pytest.mark.parametrize(("size", "edge", "expected"), [(64, 128, 64), (128, 128, 128), (96, 128, 64)])
def test_images_smaller_than_the_edge_are_taken_at_the_power_of_two_below(size, edge, expected):
    detector = build(size=size, edge=edge)
    prepared = detector.prepare(clean_images(2, size=size))
    assert prepared["grey"].shape == (2, 1, expected, expected)
    detector.fitted = True
    assert detector.score_prepared(prepared).anomaly_map.shape == (2, size, size)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"edge": 100}, "edge"),
        ({"width": 65}, "width"),
        ({"latent": 4096}, "latent"),
        ({"critic_steps": 0}, "critic_steps"),
        ({"gan_share": 1.0}, "gan_share"),
        ({"kappa": -1.0}, "kappa"),
        ({"widht": 3}, "did you mean 'width'"),
    ],
)
def test_impossible_settings_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        FAnoGanConfig.parse(values)


def test_the_paper_preset_has_the_published_constants():
    config = detectors.preset_config("fanogan", "paper", size=256)
    assert config == FAnoGanConfig(size=256, preset="paper")
    assert (config.edge, config.width, config.latent, config.critic_steps) == (64, 64, 128, 5)
    assert (config.penalty, config.kappa, config.sigma) == (10, 1, 0)
    assert (config.bounded, config.alongside) == (True, False)
    training = config.training
    assert (training.batch_size, training.learning_rate, training.clip_norm) == (64, 1e-4, None)
    generator, critic, encoder = build(training={**TRAINING, "learning_rate": 1e-4}).param_groups()
    assert generator["betas"] == critic["betas"] == (0.0, 0.9)
    assert encoder["lr"] == pytest.approx(5e-5)


def test_the_published_size_of_the_networks():
    detector = FAnoGan(FAnoGanConfig(), None)
    assert detector.generator.start.out_features == 4 * 4 * 512
    assert detector.critic.end.in_features == detector.encoder.end.in_features == 4 * 4 * 512
