"""Residual generator, critic and encoder of f-AnoGAN for square grey images whose edge is a power of two."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CELLS = 4
"""Edge in cells of the coarsest map, the one next to the latents."""
Norm = Callable[[int], nn.Module]
"""Makes what standardises maps of that many channels."""


def layer_norm(channels: int) -> nn.Module:
    """Standardises the whole map [C,h,w] of an image, then a trained factor and shift per channel."""
    return nn.GroupNorm(1, channels)


def widths(edge: int, width: int) -> list[int]:
    """Channels of the maps of `edge`, edge / 2, ..., 4 cells: `width`, doubled each time up to 8 * width."""
    steps = (edge // CELLS).bit_length()
    return [width * min(8, 1 << k) for k in range(steps)]


class ResidualBlock(nn.Module):
    """Norm, ReLU, 3x3, norm, ReLU, 3x3, and beside them a 1x1 shortcut (Gulrajani et al., 2017, Appendix F).

    `up`: [B,c,h,w] -> [B,out,2h,2w], each cell being repeated before the first convolution; else
    [B,c,h,w] -> [B,out,h/2,w/2], by 2x2 means after the second. Repeating cells or taking means, and the 3x3
    convolution next to it, are run as one convolution of 4x4 cells with stride 2: the same sums at less cost.
    """

    def __init__(self, channels: int, out: int, *, up: bool, norm: Norm) -> None:
        super().__init__()
        middle = out if up else channels
        self.up = up
        self.norm1, self.norm2 = norm(channels), norm(middle)
        self.conv1 = nn.Conv2d(channels, middle, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(middle, out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, out, 1)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")

    def forward(self, maps: Tensor) -> Tensor:
        """The maps at the next resolution."""
        inner = F.relu(self.norm1(maps))
        if self.up:
            kernel = 4 * _summed(self.conv1.weight.flip(2, 3)).transpose(0, 1)
            inner = F.conv_transpose2d(inner, kernel, stride=2, padding=1)
            inner = self.conv2(F.relu(self.norm2(inner)))
            return inner + F.interpolate(self.shortcut(maps), scale_factor=2.0, mode="nearest")
        inner = F.relu(self.norm2(self.conv1(inner)))
        inner = F.conv2d(inner, _summed(self.conv2.weight), self.conv2.bias, stride=2, padding=1)
        return inner + self.shortcut(F.avg_pool2d(maps, 2))


def _summed(kernel: Tensor) -> Tensor:
    """A kernel [a,b,3,3] followed by 2x2 means: [a,b,4,4]."""
    return F.avg_pool2d(F.pad(kernel, (1, 1, 1, 1)), 2, stride=1)


class Generator(nn.Module):
    """Latents [B,latent] -> images [B,1,edge,edge] in -1..1.

    A linear layer to 4x4 cells, residual blocks that double the edge, tanh. BatchNorm, as published: in training mode
    an image depends on its batch, in evaluation mode it does not.
    """

    def __init__(self, edge: int, *, width: int, latent: int) -> None:
        super().__init__()
        channels = widths(edge, width)[::-1]
        self.start = nn.Linear(latent, channels[0] * CELLS * CELLS)
        self.blocks = nn.Sequential(
            *(ResidualBlock(a, b, up=True, norm=nn.BatchNorm2d) for a, b in pairwise(channels))
        )
        self.norm = nn.BatchNorm2d(width)
        self.end = nn.Conv2d(width, 1, 3, padding=1)
        nn.init.xavier_normal_(self.start.weight)
        nn.init.xavier_normal_(self.end.weight)

    def forward(self, latents: Tensor) -> Tensor:
        """The images."""
        maps = self.blocks(self.start(latents).unflatten(1, (-1, CELLS, CELLS)))
        return torch.tanh(self.end(F.relu(self.norm(maps))))


class Reducer(nn.Module):
    """Images [B,1,edge,edge] -> numbers [B,outputs]: a convolution, blocks that halve the edge, a linear layer.

    `features` is what the linear layer sees. `norm`: `layer_norm` for a critic, `nn.BatchNorm2d` for an encoder.
    """

    def __init__(self, edge: int, *, width: int, outputs: int, norm: Norm) -> None:
        super().__init__()
        channels = widths(edge, width)
        self.start = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.Sequential(
            *(ResidualBlock(a, b, up=False, norm=norm) for a, b in pairwise(channels))
        )
        self.end = nn.Linear(channels[-1] * CELLS * CELLS, outputs)
        nn.init.xavier_normal_(self.start.weight)
        nn.init.xavier_normal_(self.end.weight)

    def features(self, images: Tensor) -> Tensor:
        """The coarsest maps [B,C,4,4]."""
        maps: Tensor = self.blocks(self.start(images))
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """The numbers."""
        numbers: Tensor = self.end(self.features(images).flatten(1))
        return numbers


class Critic(Reducer):
    """Images [B,1,edge,edge] -> [B], higher for what looks real to it. LayerNorm: no image depends on its batch."""

    def __init__(self, edge: int, *, width: int) -> None:
        super().__init__(edge, width=width, outputs=1, norm=layer_norm)

    def forward(self, images: Tensor) -> Tensor:
        """The critic's values."""
        return super().forward(images)[:, 0]


class LatentEncoder(Reducer):
    """Images [B,1,edge,edge] -> latents [B,latent], in -1..1 (tanh) where `bounded`. BatchNorm, as published."""

    def __init__(self, edge: int, *, width: int, latent: int, bounded: bool) -> None:
        super().__init__(edge, width=width, outputs=latent, norm=nn.BatchNorm2d)
        self.bounded = bounded

    def forward(self, images: Tensor) -> Tensor:
        """The latents."""
        latents = super().forward(images)
        return torch.tanh(latents) if self.bounded else latents
