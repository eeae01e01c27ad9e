import math

import numpy as np
import pytest
import torch

from umiad import detectors
from umiad.detectors.check import clean_images, fit_quickly
from umiad.detectors.fastflow import NORMS, Fastflow, FastflowConfig, LevelFlow, nats
from umiad.errors import ConfigError, InputError

SIZE = 64


def build(**settings):
    config = detectors.preset_config("fastflow", "quick", size=SIZE, **{"blocks": 2, **settings})
    return detectors.make("fastflow", config.canonical(), None)


def shaken(network, amount=0.1):
    """Weights at which every coupling scales and shifts."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in network.parameters() if p.requires_grad):
            parameter.add_(amount * torch.randn(parameter.shape, dtype=parameter.dtype, generator=rng))
    return network


def tiny_level(norm, kernels="3-1"):
    """Scale 4 at 64 px is 512 channels on 2 x 2 cells: replaced by 6 channels to differentiate by hand."""
    config = FastflowConfig(size=SIZE, scales=(4,), blocks=3, norm=norm, kernels=kernels)
    level = LevelFlow(config, 4, channels=6).double()
    return shaken(level, amount=0.3)


def determinant(function, at):
    jacobian = torch.autograd.functional.jacobian(function, at).reshape(at.numel(), at.numel())
    return float(np.linalg.slogdet(jacobian.numpy())[1])


@pytest.mark.parametrize("kernels", ["3", "3-1"])
def test_the_log_det_of_a_level_equals_autograd(kernels):
    level = tiny_level("none", kernels)
    rng = torch.Generator().manual_seed(2)
    features = torch.randn(1, 6, 2, 2, dtype=torch.float64, generator=rng)
    expected = determinant(lambda z: level(z)[0], features)
    assert abs(level(features)[1].item() - expected) < 1e-10
    assert abs(expected) > 0.1


@pytest.mark.parametrize("norm", ["affine", "counted", "plain"])
def test_the_log_det_counts_what_follows_the_standardisation(norm):
    """`counted` also counts the trained factors: the map from standardised features to u is then exact."""
    level = tiny_level(norm)
    rng = torch.Generator().manual_seed(2)
    features = torch.randn(1, 6, 2, 2, dtype=torch.float64, generator=rng)
    plain = torch.nn.functional.layer_norm(features, [6, 2, 2])

    def after(z):
        if norm == "plain":
            return level.flow(z)[0]
        return level.flow(z * level.norm.weight + level.norm.bias)[0]

    assert torch.allclose(after(plain), level(features)[0], atol=1e-12)
    uncounted = level.norm.weight.detach().abs().log().sum().item() if norm == "affine" else 0.0
    found = level(features)[1].item() + uncounted
    assert abs(found - determinant(after, plain)) < 1e-10
    assert (norm == "affine") == (abs(uncounted) > 0.1)


def test_shrinking_the_factors_is_free_only_where_they_do_not_count():
    losses = {}
    for norm in ("affine", "counted"):
        level = tiny_level(norm)
        features = torch.randn(2, 6, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        losses[norm] = []
        with torch.no_grad():
            level.norm.bias.zero_()
            for factor in (1.0, 1e-1, 1e-1):  # 1, 0.1, 0.01
                level.norm.weight.mul_(factor)
                losses[norm].append(float(nats(*level(features)).mean()))
    assert losses["counted"][2] - losses["counted"][1] > 20  # 24 log 10 minus what the latents lose
    assert losses["affine"][2] < losses["affine"][0]


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_takes_a_step_and_scores(norm):
    detector = build(norm=norm)
    prepared = detector.prepare(clean_images(2, size=SIZE))
    [step] = detector.steps(prepared, torch.Generator())
    step["total"].backward()
    trainable = [p for group in detector.param_groups() for p in group["params"]]
    assert all(p.grad is not None for p in trainable)
    factors = [name for name, _ in detector.module.named_parameters() if "norm" in name]
    assert bool(factors) == (norm in ("affine", "counted"))
    assert torch.isfinite(detector.score_prepared(prepared).anomaly_map).all()


@torch.no_grad()
def test_the_standardisation_is_over_the_whole_map_of_a_level():
    detector = build(norm="plain")
    features = detector.prepare(clean_images(2, size=SIZE))["f2"]
    z = detector.flows[0].norm(features)
    assert torch.allclose(z.flatten(1).mean(1), torch.zeros(2), atol=1e-5)
    assert torch.allclose(z.flatten(1).std(1), torch.ones(2), atol=1e-3)
    assert torch.equal(build(norm="none").flows[0].norm(features), features)


def test_the_loss_is_the_sum_over_scales_of_the_mean_negative_log_likelihood():
    detector = build(scales=[1, 2, 3])
    shaken(detector.flows, amount=0.03)
    prepared = detector.prepare(clean_images(3, size=SIZE))
    [step] = detector.steps(prepared, torch.Generator())
    expected, dimensions = 0.0, 0
    with torch.no_grad():
        for scale, flow in zip((1, 2, 3), detector.flows.double(), strict=True):
            u, log_det = flow(prepared[f"f{scale}"].double())
            expected += float((0.5 * (u**2).sum((1, 2, 3)) - log_det).mean())
            dimensions += u[0].numel()
    total, per_dim = (float(step[name].detach()) for name in ("total", "nats_per_dim"))
    assert total == pytest.approx(expected, rel=1e-4)  # the detector works in float32
    expected = expected / dimensions + 0.5 * math.log(2 * math.pi)
    assert per_dim == pytest.approx(expected, rel=1e-4)
    detector.flows.float()
    assert detector.monitor(prepared) == {"nats_per_dim": pytest.approx(expected, rel=1e-4)}


def test_the_monitor_does_not_depend_on_how_many_images_it_is_given():
    detector = build()
    prepared = detector.prepare(clean_images(10, size=SIZE))  # more than pass a flow together
    halves = [
        detector.monitor({name: values[part] for name, values in prepared.items()})["nats_per_dim"]
        for part in (slice(0, 5), slice(5, 10))
    ]
    assert detector.monitor(prepared)["nats_per_dim"] == pytest.approx(sum(halves) / 2, rel=1e-5)


def test_the_map_is_one_minus_the_mean_over_scales_of_the_latents_likelihood():
    detector = fit_quickly(build(scales=[1, 2, 3]), clean_images(4, size=SIZE), steps=3)
    prepared = detector.prepare(clean_images(2, size=SIZE, seed=9))
    scores = detector.score_prepared(prepared)
    expected = torch.zeros(2, SIZE, SIZE)
    for features, flow in zip(prepared.values(), detector.flows, strict=True):
        u = flow(features)[0].detach()
        wide = torch.nn.functional.interpolate(
            torch.exp(-0.5 * (u**2).mean(1, keepdim=True)),
            size=(SIZE, SIZE),
            mode="bilinear",
            align_corners=False,
        )
        expected += (1 - wide[:, 0]) / 3
    assert torch.allclose(scores.anomaly_map, expected, atol=1e-6)
    assert 0 <= float(scores.anomaly_map.min()) <= float(scores.anomaly_map.max()) <= 1
    highest = scores.anomaly_map.double().amax((1, 2))
    assert torch.allclose(scores.image_score.double(), -torch.log(1 - highest), rtol=1e-4)


@torch.no_grad()
def test_images_are_told_apart_where_the_map_is_saturated():
    detector = build(norm="none")
    detector.fitted = True
    prepared = detector.prepare(clean_images(2, size=SIZE))
    level = {name: torch.ones_like(values[:1]) for name, values in prepared.items()}
    far = {name: torch.cat([8 * values, 9 * values]) for name, values in level.items()}
    scores = detector.score_prepared(far)
    assert scores.anomaly_map.unique().tolist() == [1]
    assert scores.image_score[0] < scores.image_score[1]


@torch.no_grad()
def test_scores_are_finite_for_absurd_features():
    detector = build(norm="none")
    detector.fitted = True
    prepared = detector.prepare(clean_images(1, size=SIZE))
    scores = detector.score_prepared({name: values * 1e6 + 1e6 for name, values in prepared.items()})
    assert torch.isfinite(scores.image_score).all()
    assert scores.anomaly_map.unique().tolist() == [1]


@pytest.mark.parametrize(("kernels", "expected"), [("3", [3, 3, 3]), ("3-1", [3, 1, 3])])
def test_kernels_follow_the_pattern(kernels, expected):
    detector = build(kernels=kernels, blocks=3, scales=[3])
    sizes = [block.subnet[0].kernel_size[0] for block in detector.flows[0].flow.blocks]
    assert sizes == expected
    assert [block.subnet[2].kernel_size[0] for block in detector.flows[0].flow.blocks] == expected


def test_images_of_another_size_are_refused_before_the_standardisation_sees_them():
    detector = fit_quickly(build(), clean_images(2, size=SIZE), steps=1)
    for call in (detector.prepare, detector.score):
        with pytest.raises(InputError, match=r"\(1, 3, 96, 96\), expected \[B,3,64,64\]"):
            call(clean_images(1, size=96))


def test_another_size_builds_a_standardisation_of_that_size():
    config = FastflowConfig(size=96, scales=(1, 3), blocks=1)
    detector = Fastflow(config, None)
    assert [list(flow.norm.normalized_shape) for flow in detector.flows] == [[64, 24, 24], [256, 6, 6]]
    detector.fitted = True
    assert detector.score(clean_images(1, size=96)).anomaly_map.shape == (1, 96, 96)


def test_images_of_a_batch_do_not_touch_each_other():
    detector = fit_quickly(build(), clean_images(4, size=SIZE), steps=3)
    images = clean_images(3, size=SIZE, seed=5)
    before = detector.score(images)
    images[1] = 5 * torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(6))
    after = detector.score(images)
    assert torch.allclose(after.anomaly_map[[0, 2]], before.anomaly_map[[0, 2]], atol=1e-6)
    assert not torch.allclose(after.anomaly_map[1], before.anomaly_map[1], atol=1e-2)


def test_training_lowers_the_negative_log_likelihood():
    detector = build()
    images = clean_images(6, size=SIZE)
    prepared = detector.prepare(images)
    before = detector.monitor(prepared)["nats_per_dim"]
    fit_quickly(detector, images, steps=10)
    assert detector.monitor(prepared)["nats_per_dim"] < before - 0.05


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"scales": []}, "scales"),
        ({"scales": [3, 2]}, "rising order"),
        ({"scales": [1, 5]}, "from 1 to 4"),
        ({"kernels": "1"}, "kernels"),
        ({"norm": "batch"}, "norm"),
    ],
)
def test_impossible_settings_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        FastflowConfig.parse(values)


def test_the_paper_preset_has_the_published_constants():
    config = detectors.preset_config("fastflow", "paper", size=SIZE)
    assert config == FastflowConfig(size=SIZE, preset="paper")
    assert (config.scales, config.kernels, config.norm, config.clamp) == ((1, 2, 3), "3", "affine", 2.0)
    training = config.training
    assert (training.epochs, training.batch_size, training.clip_norm) == (500, 32, None)
    assert (training.learning_rate, training.weight_decay, training.schedule) == (1e-3, 1e-5, "constant")
