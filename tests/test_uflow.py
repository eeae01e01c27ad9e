import math

import numpy as np
import pytest
import torch

from umiad import detectors
from umiad.detectors import uflow
from umiad.detectors.check import clean_images, fit_quickly
from umiad.detectors.uflow import UFlowConfig, UFlowNetwork, carried_channels
from umiad.errors import ConfigError

SIZE = 64
PRECISE = 1e-10  # float64; a correct log-determinant or inverse is within about 1e-12 at these sizes
CHANNELS, CELLS = (4, 8, 8), ((8, 8), (4, 4), (2, 2))


def build(preset="quick", **settings):
    config = detectors.preset_config("uflow", preset, size=SIZE, **{"blocks": 2, **settings})
    return detectors.make("uflow", config.canonical(), None)


def tiny(norm="none"):
    """A network of 416 dimensions in float64 whose parameters are far from their start."""
    config = UFlowConfig(blocks=2, norm=norm)
    network = UFlowNetwork(config, channels=CHANNELS, cells=CELLS).double()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in network.flows.parameters() if p.requires_grad):
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64, generator=rng))
    return network


def features(batch, *, seed=1):
    rng = torch.Generator().manual_seed(seed)
    shapes = [(batch, c, *cells) for c, cells in zip(CHANNELS, CELLS, strict=True)]
    return tuple(torch.randn(shape, dtype=torch.float64, generator=rng) for shape in shapes)


@pytest.fixture(scope="module")
def fitted():
    return fit_quickly(build(), clean_images(6, size=SIZE), steps=10)


def test_the_log_det_of_the_whole_u_equals_autograds():
    network, zs = tiny(), features(1)

    def flat(vector):
        parts = vector.split([z.numel() for z in zs])
        us = network([p.reshape(z.shape) for p, z in zip(parts, zs, strict=True)]).us
        return torch.cat([u.flatten() for u in us])

    jacobian = torch.autograd.functional.jacobian(flat, torch.cat([z.flatten() for z in zs]), vectorize=True)
    expected = np.linalg.slogdet(jacobian.numpy())[1]
    log_det = network(zs).log_det
    assert log_det.shape == (1,)
    assert abs(expected) > 1
    assert float(log_det.detach()) == pytest.approx(expected, abs=PRECISE)


@torch.no_grad()
def test_the_inverse_of_the_whole_u_gives_the_features_back():
    network, zs = tiny(), features(3)
    us = network(zs).us
    assert [u.shape[-1] for u in us] == [8, 4, 2]
    assert sum(u.numel() for u in us) == sum(z.numel() for z in zs)
    back = network.inverse(us)
    assert max(float((b - z).abs().max()) for b, z in zip(back, zs, strict=True)) < PRECISE


@torch.no_grad()
def test_latents_of_one_image_do_not_depend_on_its_batch():
    network, zs = tiny("plain"), features(3)
    together = network(zs)
    for k in range(3):
        alone = network([z[k : k + 1] for z in zs])
        assert torch.allclose(alone.log_det, together.log_det[k : k + 1], atol=PRECISE)
        for one, all_of_them in zip(alone.us, together.us, strict=True):
            assert torch.allclose(one[0], all_of_them[k], atol=PRECISE)


@torch.no_grad()
def test_what_is_coarse_informs_what_is_fine_and_not_the_reverse():
    network, (f1, f2, f3) = tiny(), features(1)
    first = network((f1, f2, f3)).us
    finer = network((f1 + 1, f2, f3)).us
    assert [torch.equal(a, b) for a, b in zip(first, finer, strict=True)] == [False, True, True]
    coarser = network((f1, f2, f3 + 1)).us
    assert [torch.equal(a, b) for a, b in zip(first, coarser, strict=True)] == [False, False, False]


def test_each_stage_passes_on_about_a_half_in_multiples_of_four():
    assert carried_channels((64, 128, 256)) == (20, 32, 0)
    assert carried_channels((256, 512, 1024)) == (80, 128, 0)
    assert carried_channels((4, 8, 11)) == (1, 1, 0)
    detector = build()
    us = detector._latents(detector.prepare(clean_images(1, size=SIZE))).us
    assert [tuple(u.shape) for u in us] == [(1, 84, 16, 16), (1, 80, 8, 8), (1, 128, 4, 4)]


def test_too_few_channels_to_pass_on_is_an_error():
    with pytest.raises(ConfigError, match="7 channels, expected at least 8"):
        carried_channels((4, 8, 7))


def test_kernels_alternate_between_three_and_one():
    network = UFlowNetwork(UFlowConfig(), channels=CHANNELS, cells=CELLS)
    for flow in network.flows:
        kernels = [block.subnet[0].kernel_size[0] for block in flow.blocks]
        assert kernels == [3, 1, 3, 1]


@torch.no_grad()
def test_norms_see_one_image_at_a_time_and_start_alike():
    zs = features(2)
    plain, affine, none = (tiny(norm)(zs) for norm in ("plain", "affine", "none"))
    normalised = [(z - z.mean((1, 2, 3), keepdim=True)) for z in zs]
    normalised = [z / (z.square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt() for z in normalised]
    by_hand = tiny("none")(normalised)
    for a, b, c in zip(plain.us, affine.us, by_hand.us, strict=True):
        assert torch.allclose(a, b, atol=PRECISE)
        assert torch.allclose(a, c, atol=1e-9)
    assert not torch.allclose(plain.us[2], none.us[2])


def test_the_monitor_sees_the_trainable_norm_collapse():
    detector = build(norm="affine")
    prepared = detector.prepare(clean_images(2, size=SIZE))
    assert detector.monitor(prepared)["norm_gain"] == pytest.approx(1)
    fit_quickly(detector, clean_images(6, size=SIZE), steps=5)
    assert detector.monitor(prepared)["norm_gain"] < 1  # smaller gains are the cheapest likelihood
    for norm in ("plain", "none"):
        assert set(build(norm=norm).monitor(prepared)) == {"nats_per_dim"}


def test_the_loss_is_the_undivided_negative_log_likelihood(fitted):
    prepared = fitted.prepare(clean_images(3, size=SIZE, seed=5))
    (losses,) = fitted.steps(prepared, torch.Generator())
    latents = fitted._latents(prepared)
    us = [u.detach().double().numpy().reshape(3, -1) for u in latents.us]
    per_image = sum(0.5 * (u**2).sum(1) for u in us) - latents.log_det.detach().double().numpy()
    dimensions = 64 * 256 + 128 * 64 + 256 * 16
    assert float(losses["total"].detach()) == pytest.approx(per_image.mean(), rel=1e-5)  # float32 sums
    per_dim = per_image.mean() / dimensions + 0.5 * math.log(2 * math.pi)
    assert float(losses["nats_per_dim"].detach()) == pytest.approx(per_dim, rel=1e-5)
    assert fitted.monitor(prepared)["nats_per_dim"] == pytest.approx(per_dim, rel=1e-5)


def test_training_lowers_the_negative_log_likelihood():
    detector = build()
    prepared = detector.prepare(clean_images(8, size=SIZE))
    before = detector.monitor(prepared)["nats_per_dim"]
    fit_quickly(detector, clean_images(8, size=SIZE), steps=10)
    assert detector.monitor(prepared)["nats_per_dim"] < before


def up(values, size):
    """Bilinear on pixel centres, by numpy: along columns, then along rows."""

    def along(row):
        return np.interp((np.arange(size) + 0.5) * len(row) / size - 0.5, np.arange(len(row)), row)

    rows = np.array([along(row) for row in values])
    return np.array([along(column) for column in rows.T]).T


def test_scores_equal_the_published_formulas(fitted):
    images = clean_images(3, size=SIZE, seed=6)
    prepared = fitted.prepare(images)
    scores = fitted.score(images)
    us = [u.detach().double().numpy() for u in fitted._latents(prepared).us]
    for k in range(3):
        p = sum(up(np.exp(-0.5 * (u[k] ** 2).mean(0)), SIZE) for u in us) / 3
        np.testing.assert_allclose(scores.anomaly_map[k].numpy(), 1 - p, atol=1e-5)  # latents are float32
        # the published image score is the maximum of the map; ours is the same on another scale
        assert -math.expm1(-float(scores.image_score[k])) == pytest.approx((1 - p).max(), abs=1e-5)


def test_very_abnormal_images_do_not_tie(fitted, monkeypatch):
    shapes = [(2, 84, 16, 16), (2, 80, 8, 8), (2, 128, 4, 4)]
    scale = torch.tensor([20.0, 30.0])[:, None, None, None]  # 200 and 450 nats
    us = tuple(scale * torch.ones(shape) for shape in shapes)
    monkeypatch.setattr(fitted, "_latents", lambda prepared: uflow.Latents(us, torch.zeros(2)))
    scores = fitted.score_prepared({})
    assert scores.anomaly_map.amax(dim=(1, 2)).tolist() == [1.0, 1.0]
    assert scores.image_score.tolist() == pytest.approx([200, 450], rel=1e-6)
    monkeypatch.setattr(
        fitted, "_latents", lambda prepared: uflow.Latents(tuple(100 * u for u in us), torch.zeros(2))
    )
    assert torch.isfinite(fitted.score_prepared({}).image_score).all()


def test_smoothing_changes_the_map_only(fitted):
    smoothed = build(sigma=4.0)
    smoothed.load_state(fitted.state())
    images = clean_images(2, size=SIZE, seed=8)
    before, after = fitted.score(images), smoothed.score(images)
    assert after.anomaly_map.std() < before.anomaly_map.std()
    assert torch.equal(before.image_score, after.image_score)


def test_only_the_paper_preset_trains_its_norm():
    paper, default = (build(preset) for preset in ("paper", "default"))
    assert any(p.requires_grad for p in paper.parts()["norms"].parameters())
    assert not list(default.parts()["norms"].parameters())
    training = paper.config.training
    assert (training.epochs, training.weight_decay, training.schedule) == (200, 1e-5, "linear")
    assert (training.learning_rate, training.clip_norm) == (1e-4, None)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"norm": "afine"}, "did you mean 'affine'"),
        ({"norm": "batch"}, "known: affine, none, plain"),
        ({"blocks": 0}, "greater than or equal to 1"),
        ({"hidden_ratio": 0.0}, "greater than 0"),
    ],
)
def test_wrong_configurations_say_what_is_wrong(values, words):
    with pytest.raises(ConfigError, match=words):
        UFlowConfig.parse(values)
