"""From the network's input back to grey pixels in 0..1, for detectors that work on the image itself."""

from __future__ import annotations

import torch
from torch import Tensor

from umiad.nn.shrink import shrink

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""ImageNet's mean and standard deviation per channel: what `umiad.config.Preprocessing` normalises by, unless told
otherwise (then the grey values are another linear scale of the same image)."""


def grey(images: Tensor, edge: int | None = None) -> Tensor:
    """Normalised images [B,3,S,S] -> their mean channel in 0..1, [B,1,edge,edge]; `edge` None, or S and more, keeps S.

    Reduced by area averaging. Values are not clipped.
    """
    mean = torch.tensor(MEAN, dtype=images.dtype, device=images.device)[:, None, None]
    std = torch.tensor(STD, dtype=images.dtype, device=images.device)[:, None, None]
    return shrink((images.detach() * std + mean).mean(1, keepdim=True), edge)
