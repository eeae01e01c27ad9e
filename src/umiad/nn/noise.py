"""Coarse noise for denoising autoencoders: blotches on what is imaged, not grain."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_WINDOW = 32
"""An edge has about this many windows over which an image is averaged before its foreground is told apart."""
_FLAT = 1e-6
"""A range of grey values below this is rounding."""


def foreground(images: Tensor, *, level: float) -> Tensor:
    """Grey images [B,1,h,w] -> bool [B,1,h,w]: what is brighter than the background. Each image is its own measure.

    Pixels whose surroundings are on average more than `level` (0..1) of the way from the image's darkest to its
    brightest surroundings. Surroundings and not pixels, so that dark speckle in tissue counts as tissue. In a
    constant image there is none.
    """
    radius = max(1, images.shape[-1] // (2 * _WINDOW))
    around = F.avg_pool2d(images, 2 * radius + 1, stride=1, padding=radius, count_include_pad=False)
    low, high = around.amin(dim=(2, 3), keepdim=True), around.amax(dim=(2, 3), keepdim=True)
    return around > low + (level * (high - low)).clamp_min(_FLAT)


def coarse_noise(images: Tensor, *, std: float, cells: int, rng: torch.Generator) -> Tensor:
    """Noise [B,1,h,w] for images [B,1,h,w]: Gaussian with mean 0 and `std` on a grid, smooth in between.

    The grid has `cells` x `cells` nodes over the image, upsampled bilinearly, which makes the noise weaker between
    nodes; each image's is rolled by a random shift, so that no pixel is always a node. `rng` draws on the CPU.
    Source: Kascenas et al., Denoising Autoencoders for Unsupervised Anomaly Detection in Brain MRI, MIDL 2022.
    """
    count, (height, width) = len(images), images.shape[-2:]
    nodes = std * torch.randn(count, 1, cells, cells, generator=rng)
    noise = F.interpolate(nodes, size=(height, width), mode="bilinear", align_corners=True)
    down = torch.randint(height, (count, 1), generator=rng)
    right = torch.randint(width, (count, 1), generator=rng)
    rows, columns = (torch.arange(height) + down) % height, (torch.arange(width) + right) % width
    number = torch.arange(count)[:, None, None]
    return noise[number, 0, rows[:, :, None], columns[:, None, :]][:, None].to(images)
