import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as reference

from umiad.nn.encoder import seeded
from umiad.nn.vae import ConvolutionalCritic, Decoder, GaussianEncoder, kl_divergence, sample, widths


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_the_published_widths_at_128_pixels():
    assert widths(128, 32) == [32, 64, 128, 128]
    assert widths(64, 8) == [8, 16, 32]
    assert widths(32, 8) == [8, 16]


def test_the_divergence_equals_that_of_torch():
    mean, log_variance = noise(4, 6, dtype=torch.float64), noise(4, 6, seed=1, dtype=torch.float64)
    posterior = Normal(mean, (0.5 * log_variance).exp())
    expected = reference(posterior, Normal(torch.zeros_like(mean), torch.ones_like(mean))).sum(1)
    assert torch.allclose(kl_divergence(mean, log_variance), expected, atol=1e-12)
    assert kl_divergence(torch.zeros(2, 6), torch.zeros(2, 6)).tolist() == [0, 0]


def test_samples_have_the_mean_and_variance_they_are_drawn_with():
    mean, log_variance = torch.full((20_000, 1), 3.0), torch.full((20_000, 1), 2.0)
    drawn = sample(mean, log_variance, rng=torch.Generator().manual_seed(0))
    assert float(drawn.mean()) == pytest.approx(3, abs=0.08)  # four standard errors of e / sqrt(20,000)
    assert float(drawn.var()) == pytest.approx(2.718**2, rel=0.04)  # four of sqrt(2 / 20,000)
    again = sample(mean, log_variance, rng=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)


def test_samples_pass_gradients_to_mean_and_variance():
    mean, log_variance = torch.zeros(1, 3, requires_grad=True), torch.zeros(1, 3, requires_grad=True)
    drawn = sample(mean, log_variance, rng=torch.Generator().manual_seed(0))
    drawn.sum().backward()
    assert mean.grad.tolist() == [[1, 1, 1]]
    assert torch.allclose(log_variance.grad, 0.5 * drawn.detach())


@pytest.mark.parametrize("edge", [32, 64, 128, 256])
def test_shapes(edge):
    with seeded(0):
        encoder = GaussianEncoder(edge, width=2, latent=5)
        decoder = Decoder(edge, width=2, latent=5)
        critic = ConvolutionalCritic(edge, width=2)
    images = noise(3, 1, edge, edge)
    mean, log_variance = encoder(images)
    assert mean.shape == log_variance.shape == (3, 5)
    assert encoder.maps(images).shape[2:] == (8, 8)
    assert decoder(mean).shape == images.shape
    assert critic(images).shape == (3,)


def test_no_network_looks_at_other_images_of_the_batch_also_in_training_mode():
    with seeded(0):
        parts = [GaussianEncoder(32, width=2, latent=5), Decoder(32, width=2, latent=5)]
        parts.append(ConvolutionalCritic(32, width=2))
    for network, inputs in zip(parts, (noise(4, 1, 32, 32), noise(4, 5), noise(4, 1, 32, 32)), strict=True):
        assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in network.modules())
        whole, single = network(inputs), network(inputs[:1])
        whole, single = (each[0] if isinstance(each, tuple) else each for each in (whole, single))
        assert torch.allclose(whole[:1], single, atol=1e-5)
