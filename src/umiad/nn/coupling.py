"""Flows of all-in-one coupling blocks, the building material of the rival flow detectors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TypeAlias

from FrEIA.modules import AllInOneBlock
from torch import Tensor, nn

from umiad.nn.encoder import seeded

Subnet: TypeAlias = Callable[[int, int], nn.Module]
"""Builds the network of one coupling from its numbers of input and output channels."""


class AllInOneFlow(nn.Module):
    """An invertible map of z to u of the same shape, given a condition c (or none).

    One FrEIA `AllInOneBlock` per entry of `subnets`: affine coupling on a split ceil(C/2) / floor(C/2), where
    the first part and the condition give log-scale (bounded by `clamp`) and shift of the second, then a learned
    scale and offset per channel, then a fixed permutation of the channels, or with `soft` a fixed rotation.
    Rotations of more than 512 channels take seconds to build. Everything random is drawn from `seed`. `spatial`:
    z is [B,C,h,w] and c [B,P,h,w], of any h and w; else z is [N,C] and c [N,P], and the subnets must be linear
    layers. Keep it in float32 or float64.

    Source: FrEIA 0.2; Kingma and Dhariwal, Glow, 2018. The log-scale is clamp * tanh(0.1 * raw), small at the
    start, so an unfitted flow is near a permutation (rotation).
    """

    def __init__(
        self,
        channels: int,
        subnets: Sequence[Subnet],
        *,
        condition_channels: int = 0,
        clamp: float = 1.9,
        soft: bool = False,
        spatial: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        ones = (1, 1) if spatial else ()  # FrEIA: any h, w if declared 1 x 1
        conditions = [(condition_channels, *ones)] if condition_channels else []
        with seeded(seed), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Soft permutation", category=UserWarning)
            self.blocks = nn.ModuleList(
                AllInOneBlock(
                    [(channels, *ones)],
                    dims_c=conditions,
                    subnet_constructor=subnet,
                    affine_clamping=clamp,
                    global_affine_type="SOFTPLUS",
                    permute_soft=soft,
                )
                for subnet in subnets
            )

    def forward(self, z: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map z -> (u, log_det [B]): the natural log of abs(det du/dz), one value per image (or fibre)."""
        log_det = z.new_zeros(z.shape[0])
        conditions = [] if c is None else [c]
        for block in self.blocks:
            (z,), part = block((z,), c=conditions)
            log_det = log_det + part
        return z, log_det

    def inverse(self, u: Tensor, c: Tensor | None = None) -> Tensor:
        """The z that `forward` maps to u under the same condition."""
        conditions = [] if c is None else [c]
        for block in reversed(self.blocks):
            (u,), _ = block((u,), c=conditions, rev=True)
        return u


def convolutions(*, kernel: int = 3, hidden_ratio: float = 1.0) -> Subnet:
    """Subnets conv - ReLU - conv with `hidden_ratio` times as many hidden as input channels."""

    def subnet(inputs: int, outputs: int) -> nn.Module:
        hidden = max(1, round(hidden_ratio * inputs))
        return nn.Sequential(
            nn.Conv2d(inputs, hidden, kernel, padding=kernel // 2),
            nn.ReLU(),
            nn.Conv2d(hidden, outputs, kernel, padding=kernel // 2),
        )

    return subnet
