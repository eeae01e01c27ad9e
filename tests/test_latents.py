import pytest
import torch
from torch.distributions import Normal

from umiad.nn.latents import Latents, energy, nats_per_dim


def test_the_density_is_that_of_standard_normal_latents():
    rng = torch.Generator().manual_seed(0)
    us = tuple(torch.randn(2, c, s, s, generator=rng, dtype=torch.float64) for c, s in ((3, 4), (5, 2)))
    log_det = torch.tensor([1.5, -2.0], dtype=torch.float64)
    normal = Normal(torch.zeros((), dtype=torch.float64), 1.0)
    log_p = sum(normal.log_prob(u).flatten(1).sum(1) for u in us) + log_det
    dimensions = 3 * 16 + 5 * 4
    assert torch.allclose(nats_per_dim(Latents(us, log_det)), -log_p / dimensions, atol=1e-12, rtol=0)
    expected = [0.5 * sum(float(u[b].square().sum()) for u in us) - float(log_det[b]) for b in range(2)]
    assert energy(Latents(us, log_det)).tolist() == pytest.approx(expected, abs=1e-10)
