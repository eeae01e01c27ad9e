"""Convolutional encoder, decoder and critic of a variational autoencoder with dense latents on square grey images."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

CELLS = 8
"""Edge in cells of the coarsest map."""
SLOPE = 0.2
"""Slope of the leaky ReLU below 0."""


def widths(edge: int, width: int) -> list[int]:
    """Channels of the maps of edge / 2, edge / 4, ..., 8 cells: `width`, doubled each time up to 4 * width."""
    steps = (edge // CELLS).bit_length() - 1
    return [width * min(4, 1 << k) for k in range(steps)]


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence in nats of N(mean, exp(log_variance)) from N(0, I), both [B,latent] -> [B]."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)


def _after(conv: nn.Module, channels: int) -> list[nn.Module]:
    """A convolution, LayerNorm over the whole map of an image, leaky ReLU."""
    return [conv, nn.GroupNorm(1, channels), nn.LeakyReLU(SLOPE)]


def _halving(edge: int, width: int) -> nn.Sequential:
    """Convolutions of 5x5 cells with stride 2 from images [B,1,edge,edge] to maps [B,C,8,8]."""
    layers: list[nn.Module] = []
    for before, after in pairwise([1, *widths(edge, width)]):
        layers += _after(nn.Conv2d(before, after, 5, stride=2, padding=2), after)
    return nn.Sequential(*layers)


class GaussianEncoder(nn.Module):
    """Images [B,1,edge,edge] -> mean and log variance of the latents, both [B,latent]."""

    def __init__(self, edge: int, *, width: int, latent: int) -> None:
        super().__init__()
        narrow = max(1, width // 2)
        self.maps = _halving(edge, width)
        self.narrow = nn.Conv2d(widths(edge, width)[-1], narrow, 1)
        self.mean = nn.Linear(narrow * CELLS * CELLS, latent)
        self.log_variance = nn.Linear(narrow * CELLS * CELLS, latent)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance."""
        values = self.narrow(self.maps(images)).flatten(1)
        return self.mean(values), self.log_variance(values)


class Decoder(nn.Module):
    """Latents [B,latent] -> images [B,1,edge,edge] of any value: the encoder's layers in reverse."""

    def __init__(self, edge: int, *, width: int, latent: int) -> None:
        super().__init__()
        narrow, channels = max(1, width // 2), widths(edge, width)[::-1]
        self.start = nn.Linear(latent, narrow * CELLS * CELLS)
        layers = _after(nn.Conv2d(narrow, channels[0], 1), channels[0])
        for before, after in pairwise([channels[0], *channels]):
            conv = nn.ConvTranspose2d(before, after, 5, stride=2, padding=2, output_padding=1)
            layers += _after(conv, after)
        self.maps = nn.Sequential(*layers)
        self.end = nn.Conv2d(channels[-1], 1, 1)

    def forward(self, latents: Tensor) -> Tensor:
        """The images."""
        images: Tensor = self.end(self.maps(self.start(latents).unflatten(1, (-1, CELLS, CELLS))))
        return images


class ConvolutionalCritic(nn.Module):
    """Images [B,1,edge,edge] -> [B], higher for those that look real to it. No image depends on its batch."""

    def __init__(self, edge: int, *, width: int) -> None:
        super().__init__()
        self.maps = _halving(edge, width)
        self.end = nn.Linear(widths(edge, width)[-1] * CELLS * CELLS, 1)

    def forward(self, images: Tensor) -> Tensor:
        """The critic's values."""
        values: Tensor = self.end(self.maps(images).flatten(1))
        return values[:, 0]


def sample(mean: Tensor, log_variance: Tensor, *, rng: torch.Generator) -> Tensor:
    """Latents [B,latent] from N(mean, exp(log_variance)) by reparametrisation; `rng` draws on the CPU."""
    noise = torch.randn(mean.shape, generator=rng).to(mean)
    return mean + (0.5 * log_variance).exp() * noise
