import os
import signal

import pytest
import torch

from umiad import detectors, nonfinite
from umiad.detectors.anovaegan import AnoVaeGan, AnoVaeGanConfig
from umiad.detectors.check import clean_images, fit_quickly
from umiad.errors import ConfigError
from umiad.features import FeatureCache
from umiad.interrupt import Interrupted
from umiad.nn.pixels import grey
from umiad.training import TrainingRun, train

SIZE = 64
TRAINING = {"epochs": 3, "batch_size": 3, "learning_rate": 1e-3, "clip_norm": None}


def build(size=SIZE, **settings):
    small = {"edge": 32, "width": 4, "latent": 8, "critic_steps": 2, "training": TRAINING}
    config = detectors.preset_config("anovaegan", "paper", size=size, **{**small, **settings})
    return detectors.make("anovaegan", config.canonical(), None)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def weights(detector):
    return {name: [p.detach().clone() for p in part.parameters()] for name, part in detector.parts().items()}


def differ(first, second):
    return not torch.equal(first, second)


def test_each_step_changes_its_own_networks():
    detector = build()
    prepared = detector.prepare(clean_images(3, size=SIZE))
    adam = torch.optim.Adam(detector.param_groups(), lr=1e-3)
    for _ in range(2):
        found = []
        for losses in detector.steps(prepared, rng()):
            assert all(p.requires_grad for p in detector.module.parameters())
            before = weights(detector)
            adam.zero_grad()
            losses["total"].backward()
            adam.step()
            after = weights(detector)
            found.append([n for n in before if any(map(differ, before[n], after[n]))])
        assert found == [["latent_encoder", "decoder"], ["decoder"], ["critic"], ["critic"]]


def test_the_first_loss_by_hand():
    detector = build()
    real = detector.prepare(clean_images(3, size=SIZE))["grey"]
    loss = next(detector.steps({"grey": real}, rng(5)))["total"]
    with torch.no_grad():
        mean, log_variance = detector.encoder(real)
        std = (0.5 * log_variance).exp()
        posterior = torch.distributions.Normal(mean, std)
        prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
        divergence = torch.distributions.kl_divergence(posterior, prior).sum(1)
        restored = detector.decoder(mean + std * torch.randn(3, 8, generator=rng(5)))
        error = (real - restored).abs().sum((1, 2, 3))
    assert float(loss.detach()) == pytest.approx(float((error + divergence).mean()) / 32, rel=1e-5)


def test_both_losses_of_the_decoder_pull_alike():
    """By an image, the first loss has a gradient of length 1 / B: the penalty wants the same of the critic's mean."""
    detector, seen = build(), []

    def keep(module, inputs, images):
        images.retain_grad()
        seen.append(images)

    detector.decoder.register_forward_hook(keep)
    prepared = detector.prepare(clean_images(3, size=SIZE))
    next(detector.steps(prepared, rng()))["total"].backward()
    assert torch.allclose(seen[0].grad.flatten(1).norm(dim=1), torch.full((3,), 1 / 3))


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


def test_a_resumed_fit_ends_bit_equal(tmp_path):
    whole = build()
    expected = train(whole, run_of(whole))

    def stop(row):
        if row["epoch"] == 1:
            os.kill(os.getpid(), signal.SIGINT)

    first = build()
    with pytest.raises(Interrupted):
        train(first, run_of(first, folder=tmp_path, on_epoch=stop))
    resumed = build()
    rows = train(resumed, run_of(resumed, folder=tmp_path), resume=True)
    assert rows[-1]["loss"] == expected[-1]["loss"]
    assert all(torch.equal(whole.state()[key], value) for key, value in resumed.state().items())


def test_training_restores_images_better():
    training = {**AnoVaeGan.presets["quick"]["training"], "epochs": 20}
    quick = detectors.preset_config("anovaegan", "quick", size=SIZE, training=training)
    detector = detectors.make("anovaegan", quick.canonical(), None)
    rows = train(detector, run_of(detector, count=17))
    assert rows[-1]["l1_per_dim"] < 0.5 * rows[0]["l1_per_dim"]
    assert rows[-1]["holdout_l1_per_dim"] < 0.5 * rows[0]["holdout_l1_per_dim"]
    assert rows[-1]["kl"] > 0


def test_scores_by_hand_from_the_mean_of_the_latents():
    detector = fit_quickly(build(edge=64, top_fraction=0.1), clean_images(4, size=SIZE), steps=2)
    images = clean_images(2, size=SIZE, seed=9)
    scores = detector.score(images)
    with torch.no_grad():
        real = grey(images)
        expected = (real - detector.decoder(detector.encoder(real)[0])).abs()[:, 0]
    assert torch.allclose(scores.anomaly_map, expected, atol=1e-6)
    highest = expected.flatten(1).sort(dim=1, descending=True).values[:, :410]  # a tenth of 4,096
    assert torch.allclose(scores.image_score, highest.mean(1), atol=1e-6)


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
        detector.decoder.end.bias[0] = float("nan")
    assert nonfinite.origin(detector, prepared, rng()) == "decoder"


@pytest.mark.parametrize(("size", "edge", "expected"), [(64, 128, 64), (128, 128, 128), (192, 256, 128)])
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
        ({"width": 129}, "width"),
        ({"latent": 0}, "latent"),
        ({"critic_steps": 21}, "critic_steps"),
        ({"top_fraction": 0.0}, "top_fraction"),
        ({"penalty": 0.0}, "penalty"),
        ({"egde": 64}, "did you mean 'edge'"),
    ],
)
def test_impossible_settings_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        AnoVaeGanConfig.parse(values)


def test_the_paper_preset_has_the_constants_of_the_description():
    config = detectors.preset_config("anovaegan", "paper", size=256)
    assert config == AnoVaeGanConfig(size=256, preset="paper")
    assert (config.edge, config.width, config.latent, config.critic_steps) == (128, 32, 128, 5)
    assert (config.penalty, config.sigma) == (10, 0)
    training = config.training
    assert (training.epochs, training.batch_size, training.learning_rate) == (1000, 8, 1e-4)
    assert training.clip_norm is None
    assert all(group["betas"] == (0.5, 0.9) for group in build().param_groups())
    assert AnoVaeGan(config, None).encoder.mean.in_features == 8 * 8 * 16
