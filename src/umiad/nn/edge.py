"""Slot `edge`: the two fine scales -> edge features. Also pseudo-edges to train edge parts on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from umiad.nn.encoder import CHANNELS, grid, seeded

EDGE_CHANNELS = CHANNELS[1]
_FLAT = 1e-6  # a gradient magnitude below this (range 0..1) is rounding, not an edge


class EdgeGuidance(nn.Module):
    """EGM: f1 [B,64,S/4,S/4], f2 [B,128,S/8,S/8] -> f_edge [B,128,S/8,S/8].

    Paper, Eq. 1-5: each position mixes fine texture (F1') and coarse structure (F2) by two weights.
    The weights are drawn from `seed`.

    Deviation: the paper leaves three things open. F1' is a 3x3 convolution with stride 2, BatchNorm and
    ReLU; each gate has one channel, so it weighs positions; the softmax runs over the pair of gates
    (over all channels F_edge would nearly vanish). The swapped order of Eq. 2 adds no capacity.
    """

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        with seeded(seed):
            self.down = nn.Sequential(
                nn.Conv2d(CHANNELS[0], EDGE_CHANNELS, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(EDGE_CHANNELS),
                nn.ReLU(),
            )
            self.gate_fine = nn.Conv2d(2 * EDGE_CHANNELS, 1, 1)
            self.gate_coarse = nn.Conv2d(2 * EDGE_CHANNELS, 1, 1)

    def gates(self, f1p: Tensor, f2: Tensor) -> Tensor:
        """Weights of F1' and F2 per position, Eq. 1-4: two [B,128,h,w] -> [B,2,h,w], in 0..1, sum 1."""
        e1 = self.gate_fine(torch.cat([f1p, f2], dim=1))
        e2 = self.gate_coarse(torch.cat([f2, f1p], dim=1))
        return torch.cat([e1, e2], dim=1).softmax(dim=1)

    def forward(self, f1: Tensor, f2: Tensor) -> Tensor:
        """The mixture of F1' and F2, Eq. 5; shapes as in the class docstring."""
        f1p = self.down(f1)
        weight_fine, weight_coarse = self.gates(f1p, f2).split(1, dim=1)
        return weight_fine * f1p + weight_coarse * f2


class Prewitt(nn.Module):
    """The Prewitt operator in place of the EGM (Table 7), without parameters; same call, values >= 0.

    Our choice, as the paper does not say what the operator is applied to: the gradient magnitude of every
    channel of F1 (averaged to F2's grid, each channel used twice) and of F2, mixed half and half. That is
    Eq. 5 with equal gates and the operator in place of the learned parts.
    """

    _kernel: Tensor

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.register_buffer("_kernel", gradient_kernel((1.0, 1.0, 1.0)), persistent=False)

    def forward(self, f1: Tensor, f2: Tensor) -> Tensor:
        """f1 [B,64,S/4,S/4], f2 [B,128,S/8,S/8] -> f_edge [B,128,S/8,S/8]."""
        fine = F.adaptive_avg_pool2d(magnitude(f1, self._kernel), grid(f2))
        coarse = magnitude(f2, self._kernel)
        return 0.5 * (fine.repeat_interleave(f2.shape[1] // f1.shape[1], dim=1) + coarse)


class NoEdges(nn.Module):
    """Null object of the slot: f_edge is zero everywhere; `seed` is taken for the same call, not used."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()

    def forward(self, f1: Tensor, f2: Tensor) -> Tensor:
        """f1 [B,64,S/4,S/4], f2 [B,128,S/8,S/8] -> zeros [B,128,S/8,S/8]."""
        return torch.zeros_like(f2)


EDGES: dict[str, type[nn.Module]] = {"egm": EdgeGuidance, "prewitt": Prewitt, "none": NoEdges}


class FineScales(nn.Module):
    """F1 and F2 side by side on F2's grid, nothing mixed: the backbone's own fine features, nothing to train.

    Not in `EDGES`: it has 192 channels instead of 128.
    """

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()

    def forward(self, f1: Tensor, f2: Tensor) -> Tensor:
        """f1 [B,64,S/4,S/4], f2 [B,128,S/8,S/8] -> f_edge [B,192,S/8,S/8]; F1 is averaged."""
        return torch.cat([F.adaptive_avg_pool2d(f1, grid(f2)), f2], dim=1)


def sobel_target(grey: Tensor, size: tuple[int, int]) -> Tensor:
    """Pseudo-edges to train edge parts on: grey [B,1,S,S] -> [B,1,h,w] in 0..1, (h, w) = `size`.

    Sobel magnitude, blurred by a 5x5 binomial filter (about one pixel), divided by its maximum per image,
    averaged to `size`. Any affine change of an image's grey values leaves its target the same; an image
    without edges gives zeros.
    """
    strength = magnitude(grey, gradient_kernel((1.0, 2.0, 1.0)).to(grey))
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]).to(grey) / 16
    padded = F.pad(strength, (2, 2, 2, 2), mode="replicate")
    blurred = F.conv2d(padded, torch.outer(row, row)[None, None])
    peak = blurred.amax(dim=(2, 3), keepdim=True)
    return F.adaptive_avg_pool2d(blurred / peak.clamp_min(_FLAT), size)


def gradient_kernel(smooth: tuple[float, float, float]) -> Tensor:
    """Horizontal and vertical derivative [2,1,3,3], scaled so that a unit step has magnitude 1."""
    across = torch.tensor(smooth) / sum(smooth)
    horizontal = torch.outer(across, torch.tensor([-1.0, 0.0, 1.0]))
    return torch.stack([horizontal, horizontal.T])[:, None]


def magnitude(maps: Tensor, kernel: Tensor) -> Tensor:
    """Gradient magnitude of every channel, borders replicated: [B,C,H,W] -> [B,C,H,W]."""
    batch, channels, height, width = maps.shape
    padded = F.pad(maps, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[:, None]
    gradients = F.conv2d(padded, kernel)
    return torch.linalg.vector_norm(gradients, dim=1).reshape(batch, channels, height, width)
