"""A trained descriptor of single fibres that knows where they are and weighs its channels by the image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from umiad.nn.encoder import seeded


def coordinates(height: int, width: int) -> Tensor:
    """Column and row of every cell, from -1 in the first to 1 in the last: [2,height,width].

    Source: Liu et al., CoordConv, NeurIPS 2018, arXiv:1807.03247.
    """
    rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    return torch.stack([columns.expand(height, width), rows[:, None].expand(height, width)])


class ChannelAttention(nn.Module):
    """Maps [B,C,h,w] -> the same, each channel times a gate in 0..1 that the whole image decides.

    One convolution of `kernel` neighbouring channels, without bias, over each channel's mean and over its largest
    value; sigmoid of the sum of both.

    Source: Wang et al., ECA-Net, CVPR 2020, arXiv:1910.03151; the largest values beside the means are ADFA's.
    """

    def __init__(self, kernel: int = 9) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """As the class says."""
        pooled = torch.stack([maps.mean((2, 3)), maps.amax((2, 3))], dim=1)  # [B,2,C]
        gates = self.conv(pooled.flatten(0, 1)[:, None]).view_as(pooled).sum(1).sigmoid()
        return maps * gates[:, :, None, None]


class Descriptor(nn.Module):
    """Features [B,C,h,w] -> descriptors [B,C/4,h,w]: phi + `strength` * attention(phi), phi a 1 x 1 CoordConv.

    Weights are drawn from `seed`. Source: Huang et al., ADFA, ICIP 2023, arXiv:2308.15280.
    """

    def __init__(self, channels: int, *, seed: int, strength: float = 0.1) -> None:
        super().__init__()
        self.strength = strength
        with seeded(seed):
            self.conv = nn.Conv2d(channels + 2, channels // 4, 1)
            self.attention = ChannelAttention()

    def forward(self, features: Tensor) -> Tensor:
        """As the class says."""
        where = coordinates(*features.shape[2:]).to(features).expand(features.shape[0], -1, -1, -1)
        phi: Tensor = self.conv(torch.cat([features, where], dim=1))
        return phi + self.strength * self.attention(phi)
