import itertools
import math

import numpy as np
import pytest
import torch

from umiad import detectors
from umiad.detectors import msflow
from umiad.detectors.check import clean_images, fit_quickly
from umiad.detectors.msflow import MSFlowConfig, MSFlowNetwork
from umiad.errors import ConfigError
from umiad.nn.encoder import pool
from umiad.nn.fusion import atan_bound, tanh_bound

SIZE = 64
PRECISE = 1e-10  # float64; a correct log-determinant or inverse is within about 1e-12 at these sizes
CHANNELS, CELLS = (2, 4, 6), ((8, 8), (4, 4), (2, 2))


def build(**settings):
    config = detectors.preset_config("msflow", "quick", size=SIZE, **{"blocks": [1, 1, 1], **settings})
    return detectors.make("msflow", config.canonical(), None)


def tiny(*, seed=0):
    """A network of 216 dimensions in float64 whose parameters are far from their start."""
    config = MSFlowConfig(blocks=(1, 2, 1), condition_channels=4, seed=seed)
    network = MSFlowNetwork(config, channels=CHANNELS, cells=CELLS).double()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in network.parameters() if p.requires_grad):
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64, generator=rng))
    return network


def features(batch, *, seed=1):
    rng = torch.Generator().manual_seed(seed)
    shapes = [(batch, c, *cells) for c, cells in zip(CHANNELS, CELLS, strict=True)]
    return tuple(torch.randn(shape, dtype=torch.float64, generator=rng) for shape in shapes)


@pytest.fixture(scope="module")
def fitted():
    return fit_quickly(build(), clean_images(6, size=SIZE), steps=10)


@pytest.mark.parametrize("part", ["whole", "fusion"])
def test_the_log_det_equals_autograds(part):
    network, zs = tiny(), features(1)

    def run(maps):
        if part == "fusion":
            return network.fusion(maps)
        latents = network(maps)
        return latents.us, latents.log_det

    def flat(vector):
        parts = vector.split([z.numel() for z in zs])
        us, _ = run(tuple(p.reshape(z.shape) for p, z in zip(parts, zs, strict=True)))
        return torch.cat([u.flatten() for u in us])

    jacobian = torch.autograd.functional.jacobian(flat, torch.cat([z.flatten() for z in zs]))
    expected = np.linalg.slogdet(jacobian.numpy())[1]
    _, log_det = run(zs)
    assert log_det.shape == (1,)
    assert abs(expected) > 1e-2
    assert float(log_det.detach()) == pytest.approx(expected, abs=PRECISE)


@torch.no_grad()
def test_the_inverse_gives_the_features_back():
    network, zs = tiny(), features(3)
    back = network.inverse(network(zs).us)
    assert max(float((b - z).abs().max()) for b, z in zip(back, zs, strict=True)) < PRECISE


@torch.no_grad()
def test_latents_of_one_image_do_not_depend_on_its_batch():
    network, zs = tiny(), features(3)
    together = network(zs)
    for k in range(3):
        alone = network(tuple(z[k : k + 1] for z in zs))
        assert torch.allclose(alone.log_det, together.log_det[k : k + 1], atol=PRECISE)
        for one, all_of_them in zip(alone.us, together.us, strict=True):
            assert torch.allclose(one[0], all_of_them[k], atol=PRECISE)


@torch.no_grad()
def test_the_fusion_starts_as_a_permutation_and_the_seed_draws_it():
    zs = features(2)
    fusion, again, other = (msflow.FusionFlow(CHANNELS, clamp=1.9, seed=seed).double() for seed in (1, 1, 2))
    ys, log_det = fusion(zs)
    assert float(log_det.abs().max()) == 0
    for y, z in zip(ys, zs, strict=True):
        assert torch.equal(y.sort(dim=1).values, z.sort(dim=1).values)
    assert all(torch.equal(a, b) for a, b in zip(ys, again(zs)[0], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(ys, other(zs)[0], strict=True))


def test_the_fusion_lets_levels_inform_each_other():
    network, zs = tiny(), tuple(z.requires_grad_() for z in features(1))
    latents = network(zs)
    for u in latents.us:
        gradients = torch.autograd.grad(u.sum(), zs, retain_graph=True)
        assert all(float(g.abs().max()) > 0 for g in gradients)


def test_log_scales_stay_within_the_clamp():
    raw = torch.tensor([-1e9, 0.0, 1e9], dtype=torch.float64)
    assert torch.allclose(tanh_bound(raw, 1.9), torch.tensor([-1.9, 0.0, 1.9], dtype=torch.float64))
    limit = 1.9 * 0.636 * math.pi / 2  # FrEIA's rounded 2 / pi
    assert torch.allclose(atan_bound(raw, 1.9), torch.tensor([-limit, 0.0, limit], dtype=torch.float64))
    small = torch.tensor(1e-6, dtype=torch.float64)
    assert float(atan_bound(small, 1.9) / small) == pytest.approx(0.636, rel=1e-9)


def test_features_are_the_pooled_maps_of_three_levels():
    detector, images = build(), clean_images(2, size=SIZE)
    prepared = detector.prepare(images)
    assert [tuple(prepared[f"z{k}"].shape) for k in (1, 2, 3)] == [
        (2, 64, 8, 8),
        (2, 128, 4, 4),
        (2, 256, 2, 2),
    ]
    assert torch.equal(prepared["z3"], pool(detector.pyramid(images, depth=3)[2]))


def test_the_loss_is_the_undivided_negative_log_likelihood(fitted):
    prepared = fitted.prepare(clean_images(3, size=SIZE, seed=5))
    (losses,) = fitted.steps(prepared, torch.Generator())
    latents = fitted._latents(prepared)
    us = [u.detach().double().numpy().reshape(3, -1) for u in latents.us]
    per_image = sum(0.5 * (u**2).sum(1) for u in us) - latents.log_det.detach().double().numpy()
    dimensions = 64 * 64 + 128 * 16 + 256 * 4
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
    """Bilinear with aligned corners, by numpy: along columns, then along rows."""
    h, w = values.shape
    rows = np.array([np.interp(np.linspace(0, w - 1, size), np.arange(w), row) for row in values])
    return np.array([np.interp(np.linspace(0, h - 1, size), np.arange(h), column) for column in rows.T]).T


def expected_maps(levels, size, *, normalise):
    """Both published maps of one image, literally."""
    own = [each - each.max() if normalise == "image" else each for each in levels]
    added = sum(up(np.exp(each), size) for each in own)
    total = sum(up(each, size) for each in levels)
    if normalise == "image":
        multiplied = np.exp(total - total.max())
        return added.max() - added, multiplied.max() - multiplied
    return len(levels) - added, 1 - np.exp(total)


@pytest.fixture(scope="module")
def levels():
    rng = np.random.default_rng(0)
    return [-rng.gamma(2.0, 0.5, size=(3, n, n)) for n in (8, 4, 2)]


@pytest.mark.parametrize("normalise", ["image", "none"])
def test_maps_equal_the_published_formulas(levels, normalise):
    top = msflow.TOPS[normalise]
    tensors = [torch.from_numpy(each) for each in levels]
    added = msflow.additive(tensors, 24, top).numpy()
    multiplied = -np.expm1(-msflow.multiplicative(tensors, 24, top).numpy())
    for k in range(3):
        expected = expected_maps([each[k] for each in levels], 24, normalise=normalise)
        np.testing.assert_allclose(added[k], expected[0], atol=1e-12)
        np.testing.assert_allclose(multiplied[k], expected[1], atol=1e-12)


@pytest.mark.parametrize("normalise", ["image", "none"])
def test_the_image_score_is_the_published_one_on_another_scale(levels, normalise):
    tensors = [torch.from_numpy(each) for each in levels]
    scores = msflow.top_nats(msflow.multiplicative(tensors, 24, msflow.TOPS[normalise]), 0.03)
    for k in range(3):
        _, multiplied = expected_maps([each[k] for each in levels], 24, normalise=normalise)
        published = np.sort(multiplied.ravel())[-round(0.03 * 24 * 24) :].mean()
        assert float(scores[k]) == pytest.approx(-math.log(1 - published), abs=1e-10)


def test_very_abnormal_images_do_not_tie():
    nats = torch.zeros(2, 10, 10, dtype=torch.float64)
    nats[0, :4], nats[1, :4] = 800.0, 900.0
    published = -torch.expm1(-nats).flatten(1).topk(3).values.mean(1).float()
    assert published[0] == published[1]
    assert msflow.top_nats(nats, 0.03).tolist() == pytest.approx([800, 900])


def test_scores_come_from_the_latents_and_the_configured_map(fitted):
    images = clean_images(2, size=SIZE, seed=7)
    maps = []
    for name, normalise in itertools.product(("add", "mul"), ("image", "none")):
        detector = build(map=name, normalise=normalise)
        detector.load_state(fitted.state())
        prepared = detector.prepare(images)
        scores = detector.score_prepared(prepared)
        us = [u.detach().double().numpy() for u in detector._latents(prepared).us]
        logs = [-0.5 * (u**2).mean(1) for u in us]
        for k in range(2):
            added, multiplied = expected_maps([each[k] for each in logs], SIZE, normalise=normalise)
            found = scores.anomaly_map[k].double().numpy()
            found, wanted = (found, added) if name == "add" else (-np.expm1(-found), multiplied)
            np.testing.assert_allclose(found, wanted, atol=1e-5)  # latents are float32
        maps.append(scores.anomaly_map)
    assert not any(torch.allclose(a, b, rtol=1e-3) for a, b in itertools.combinations(maps, 2))


def test_the_images_own_normalisation_ignores_a_shift_of_its_likelihood(levels):
    tensors = [torch.from_numpy(each) for each in levels]
    shifted = [each - 3 for each in tensors]
    for make in msflow.MAPS.values():
        plain, moved = (make(each, 24, msflow.image_top) for each in (tensors, shifted))
        assert torch.allclose(plain, moved, atol=1e-12)
        assert float(plain.amin(dim=(1, 2)).abs().max()) < 1e-12  # the most normal pixel has 0


def test_smoothing_changes_the_map_only(fitted):
    smoothed = build(sigma=4.0)
    smoothed.load_state(fitted.state())
    images = clean_images(2, size=SIZE, seed=8)
    before, after = fitted.score(images), smoothed.score(images)
    assert after.anomaly_map.std() < before.anomaly_map.std()
    assert torch.equal(before.image_score, after.image_score)


def test_the_published_number_of_parameters():
    config = detectors.preset_config("msflow", "paper", size=SIZE)
    detector = detectors.make("msflow", config.canonical(), None)
    trainable = sum(p.numel() for group in detector.param_groups() for p in group["params"])
    assert trainable == 9_187_152  # 9.19 M with ResNet18
    assert set(detector.parts()) == {"encoder", "flow1", "flow2", "flow3", "fusion"}


def test_the_paper_preset_holds_the_published_training():
    training = detectors.preset_config("msflow", "paper").training
    assert (training.epochs, training.batch_size, training.learning_rate) == (100, 8, 1e-4)
    assert (training.clip_norm, training.schedule, training.warmup_epochs) == (2.0, "steps", 12)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"map": "ad"}, "did you mean 'add'"),
        ({"normalise": "images"}, "did you mean 'image'"),
        ({"blocks": [2, 5]}, "blocks"),
        ({"blocks": [2, 5, 0]}, "greater than or equal to 1"),
        ({"top_fraction": 0.0}, "greater than 0"),
        ({"condition_channels": 6}, "multiple of 4"),
    ],
)
def test_wrong_configurations_say_what_is_wrong(values, words):
    with pytest.raises(ConfigError, match=words):
        MSFlowConfig.parse(values)
