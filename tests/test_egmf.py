import math

import pytest
import torch

from combinations import combinations
from umiad import detectors
from umiad.detectors.check import clean_images, fit_quickly
from umiad.detectors.egmf_network import PARTS, EGMFNetwork, NetworkConfig, nats_per_dim
from umiad.errors import ConfigError
from umiad.nn.encoder import CHANNELS

SIZE = 64


def build(**settings):
    config = detectors.preset_config("egmf", "paper", size=SIZE, blocks=2, **settings)
    return detectors.make("egmf", config.canonical(), None)


COMBINATIONS = combinations(*(PARTS[slot] for slot in ("edge", "aggregate", "guidance", "fusion")), every=4)


@pytest.fixture(scope="module")
def prepared():
    return build().prepare(clean_images(2, size=SIZE))


@pytest.mark.parametrize("parts", COMBINATIONS)
def test_every_combination_of_parts_takes_a_step(parts, prepared):
    detector = build(**dict(zip(("edge", "aggregate", "guidance", "fusion"), parts, strict=True)))
    for losses in detector.steps(prepared, torch.Generator()):
        losses["total"].backward()
        assert torch.isfinite(losses["total"])
    scores = detector.score_prepared(prepared)
    assert scores.anomaly_map.shape == (2, SIZE, SIZE)
    assert torch.isfinite(scores.anomaly_map).all()


def test_an_unknown_part_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'coupling'"):
        NetworkConfig.parse({"fusion": "couplin"})


def test_an_unfitted_flow_is_a_permutation_so_the_likelihood_is_that_of_the_features():
    detector = build(edge="none", aggregate="ignore")
    prepared = detector.prepare(clean_images(3, size=SIZE))
    latents = detector._latents(prepared)
    total = sum(y.square().flatten(1).sum(1) for y in latents.ys)
    dimensions = sum(y[0].numel() for y in latents.ys)
    expected = 0.5 * total / dimensions + 0.5 * math.log(2 * math.pi)
    assert torch.allclose(nats_per_dim(latents), expected, rtol=1e-5)


def test_the_density_is_exact_through_flows_and_fusion():
    """The parts have their own autograd tests; here: the loss adds them up, the fusion's included (float64)."""
    config = NetworkConfig(size=SIZE, blocks=2, edge="none", aggregate="ignore", guidance="joint", seed=3)
    network = EGMFNetwork(config).double()
    with torch.no_grad():
        rng = torch.Generator().manual_seed(1)
        for parameter in (p for p in network.parameters() if p.requires_grad):
            parameter.add_(0.02 * torch.randn(parameter.shape, dtype=torch.float64, generator=rng))
    shapes = [(1, c, s, s) for c, s in zip(CHANNELS, (16, 8, 4, 2), strict=True)]
    rng = torch.Generator().manual_seed(2)
    features = [torch.randn(shape, dtype=torch.float64, generator=rng) for shape in shapes]
    with torch.no_grad():
        latents = network(*features)
    log_det = sum(j.sum() for j in latents.log_dets) + latents.fusion_log_det.sum()
    energy = sum(0.5 * y.square().sum() for y in latents.ys)
    dimensions = sum(y.numel() for y in latents.ys)
    expected = (energy - log_det) / dimensions + 0.5 * math.log(2 * math.pi)
    assert float(nats_per_dim(latents)) == pytest.approx(float(expected), abs=1e-12)
    assert float(latents.fusion_log_det.abs().sum()) > 0


def test_training_lowers_the_negative_log_likelihood():
    detector = build()
    prepared = detector.prepare(clean_images(8, size=SIZE))
    detector.fitted = True
    before = detector.monitor(prepared)["nats_per_dim"]
    fit_quickly(detector, clean_images(8, size=SIZE), steps=20)
    assert detector.monitor(prepared)["nats_per_dim"] < before


def test_monitors_see_a_collapse():
    detector = build()
    prepared = detector.prepare(clean_images(4, size=SIZE))
    healthy = detector.monitor(prepared)
    assert healthy["var_ratio"] == pytest.approx(1, abs=1e-6)  # the EAM starts as the identity
    prepared["f4"] = prepared["f4"] * 1e-3
    shrunk = detector.monitor(prepared)
    assert shrunk["min_eigenvalue"] <= healthy["min_eigenvalue"] + 1e-12


def test_full_and_latent_likelihood_differ_in_scoring_only():
    latent, full = build(), build(likelihood="full")
    fit_quickly(latent, clean_images(6, size=SIZE), steps=10)
    full.load_state(latent.state())
    images = clean_images(2, size=SIZE, seed=4)
    assert not torch.allclose(latent.score(images).anomaly_map, full.score(images).anomaly_map)
    assert set(latent.state()) == set(full.state())


def test_the_papers_budget_of_trainable_parameters():
    config = detectors.preset_config("egmf", "paper", size=SIZE)
    detector = detectors.make("egmf", config.canonical(), None)
    parts = {
        k: sum(p.numel() for p in m.parameters() if p.requires_grad) for k, m in detector.parts().items()
    }
    assert parts["encoder"] == 0
    assert [parts[f"flow{k}"] for k in (1, 2, 3, 4)] == [185_472, 592_128, 2_068_992, 7_676_928]
    assert parts["fusion"] == 462_000
    assert 13.9e6 < sum(parts.values()) < 14.1e6
