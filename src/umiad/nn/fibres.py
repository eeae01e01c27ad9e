"""From maps of several scales to one fibre per position."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from umiad.errors import InputError


def neighbourhood(features: Tensor) -> Tensor:
    """Replace every fibre by the mean of its 3 x 3 neighbourhood: [B,C,h,w] -> [B,C,h,w].

    At the border only the positions inside the map count, so a constant map stays as it is.
    """
    return F.avg_pool2d(features, kernel_size=3, stride=1, padding=1, count_include_pad=False)


def join(maps: Sequence[Tensor]) -> Tensor:
    """Bring maps [B,C_k,h_k,w_k] to the finest of their grids and concatenate them: [B,sum C_k,h,w].

    Coarser maps are interpolated bilinearly (align_corners=False). Raises InputError when there is no map, or
    when their batch sizes differ.
    """
    shapes = [list(each.shape) for each in maps]
    if not shapes or any(len(shape) != 4 or shape[0] != shapes[0][0] for shape in shapes):
        raise InputError("maps to join", f"shapes {shapes}, expected at least one [B,C,h,w], all of one B")
    size = max((each.shape[2], each.shape[3]) for each in maps)
    finest = [
        each if tuple(each.shape[2:]) == size else F.interpolate(each, size=size, mode="bilinear")
        for each in maps
    ]
    return torch.cat(finest, dim=1)
