"""The images that the battery fits and scores: smooth random ones, and the same with something planted."""

from __future__ import annotations

import torch
from torch import Tensor


def clean_images(count: int, *, size: int, seed: int = 0) -> Tensor:
    """Smooth random images [B,3,size,size], alike enough to have an anomaly among them.

    Grey, mean about 0, standard deviation about 0.2 (images that a detector sees are normalised).
    """
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, 8, 8, generator=rng)
    grey = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=True)
    return (
        (0.3 * grey + 0.05 * torch.randn(count, 1, size, size, generator=rng))
        .expand(-1, 3, -1, -1)
        .contiguous()
    )


def blob_window(size: int) -> slice:
    """Rows, and columns, that the blob of `with_blob` covers in an image of edge `size`."""
    return slice(size // 2 - size // 8, size // 2 + size // 8)


def with_blob(images: Tensor, *, value: float = 2.0) -> Tensor:
    """The images with a bright checkered square in the middle: what anyone would call abnormal.

    Brighter than anything in `clean_images` on average (`value` / 2), and of another texture (0 and `value`).
    """
    marked, window = images.clone(), blob_window(images.shape[-1])
    board = torch.arange(window.start, window.stop)
    marked[:, :, window, window] = value * ((board[:, None] // 2 + board) % 2).float()
    return marked
