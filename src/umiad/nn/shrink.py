"""Images and maps on another grid of cells."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from umiad.nn.encoder import grid

SMALLEST_EDGE = 64
"""Pixels of an edge below which the deepest maps of a network with stride 32 have 1 x 1 cells: BatchNorm cannot be
trained on those with one image in the batch."""


def shrink(images: Tensor, edge: int | None) -> Tensor:
    """Images [B,C,S,S] reduced to [B,C,edge,edge] by area averaging; `edge` None, or S and more, keeps them."""
    if edge is None or edge >= images.shape[-1]:
        return images
    return F.interpolate(images, size=(edge, edge), mode="area")


def stretch(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [B,C,h,w] -> [B,C,*size], bilinear with the corners kept in place (align_corners=True)."""
    if grid(maps) == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)


__all__ = ["SMALLEST_EDGE", "shrink", "stretch"]
