"""MLFEU-net: a U-Net that enhances its finest maps and fuses several scales in its deepest one.

Source: Tang and Ning, Biomedical Signal Processing and Control, 2025, doi:10.1016/j.bspc.2024.106931, of which the
abstract names the parts. What is inside them is our reconstruction (docs/decisions/0008-mlfeu.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from umiad.nn.aggregate import SqueezeGate
from umiad.nn.encoder import grid, seeded
from umiad.nn.fibres import neighbourhood

LEVELS = 5
"""Levels of the U-Net; each but the first has half the cells along an edge and twice the channels of the one above."""
STRIDE = 1 << (LEVELS - 1)
"""An image's edge is a multiple of this."""
ENHANCED = 2
"""Levels, from the finest down, with low-level feature enhancement; the neck takes its shallow maps from them."""
RATES = (1, 2, 4, 8)
"""Dilations of the parallel convolutions of the neck."""


def normed(conv: nn.Module, channels: int) -> nn.Sequential:
    """A convolution to `channels` channels, BatchNorm, ReLU.

    BatchNorm and not GroupNorm, which takes from each image its own brightness and contrast: who is to restore grey
    values needs them.
    """
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


def _conv3(before: int, after: int, *, rate: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(before, after, 3, padding=rate, dilation=rate, bias=False)
    return normed(conv, after)


def _block(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(_conv3(before, after), _conv3(after, after))


def high_pass(maps: Tensor) -> Tensor:
    """Maps [B,C,h,w] minus the mean of the 3x3 cells around each (of those that exist, at a border): no weights."""
    return maps - neighbourhood(maps)


class Enhancement(nn.Module):
    """LFEB: details of maps [B,C,h,w] in three views, those that matter selected and added: [B,C,h,w].

    The views are a 3x3 convolution, one of dilation 2, and the fixed `high_pass`; a 1x1 convolution mixes them, a
    `SqueezeGate` weighs the channels of the mixture. With a closed gate the maps pass unchanged.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.near = _conv3(channels, channels)
        self.far = _conv3(channels, channels, rate=2)
        self.mix = nn.Conv2d(3 * channels, channels, 1)
        self.gate = SqueezeGate(channels)

    def forward(self, maps: Tensor) -> Tensor:
        """The maps with the selected details added."""
        details = self.mix(torch.cat([self.near(maps), self.far(maps), high_pass(maps)], dim=1))
        enhanced: Tensor = maps + self.gate(details) * details
        return enhanced


class Fusion(nn.Module):
    """PMFF, the neck: deep maps [B,D,h,w] seen through four dilations beside filtered shallow maps -> [B,D,h,w].

    `RATES` give one 3x3 convolution each, of `branch` channels. The shallow maps, with `shallow` channels in all, are
    averaged to h x w, brought to `branch` channels and weighed per position and channel by a gate that the deep maps
    decide. All of that and the deep maps themselves pass a 1x1 convolution.
    """

    def __init__(self, shallow: int, deep: int, *, branch: int) -> None:
        super().__init__()
        self.views = nn.ModuleList(_conv3(deep, branch, rate=rate) for rate in RATES)
        self.narrow = normed(nn.Conv2d(shallow, branch, 1, bias=False), branch)
        self.gate = nn.Conv2d(deep, branch, 1)
        self.mix = normed(nn.Conv2d((len(RATES) + 1) * branch + deep, deep, 1, bias=False), deep)

    def forward(self, shallow: Sequence[Tensor], deep: Tensor) -> Tensor:
        """Shallow maps [B,.,.,.] of any number and size, deep [B,D,h,w] -> [B,D,h,w]."""
        fine = torch.cat([F.adaptive_avg_pool2d(maps, grid(deep)) for maps in shallow], dim=1)
        filtered = torch.sigmoid(self.gate(deep)) * self.narrow(fine)
        fused: Tensor = self.mix(torch.cat([*(view(deep) for view in self.views), filtered, deep], dim=1))
        return fused


class NoEnhancement(nn.Module):
    """Null object of the slot `enhance`: the maps as they are."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, maps: Tensor) -> Tensor:
        """The maps."""
        return maps


class NoFusion(nn.Module):
    """Null object of the slot `neck`: the deep maps as they are."""

    def __init__(self, shallow: int, deep: int, *, branch: int) -> None:
        super().__init__()

    def forward(self, shallow: Sequence[Tensor], deep: Tensor) -> Tensor:
        """The deep maps; the shallow ones are not looked at."""
        return deep


ENHANCEMENTS: Mapping[str, Callable[[int], nn.Module]] = MappingProxyType(
    {"lfeb": Enhancement, "none": NoEnhancement}
)
NECKS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType({"pmff": Fusion, "none": NoFusion})


class MlfeuNet(nn.Module):
    """Images [B,1,h,w], edges multiples of 16, -> one value per pixel, [B,1,h,w], of any size.

    `width` channels on the finest level (a multiple of 4), `branch` in each view of the neck. `enhance` and `neck`
    are names from `ENHANCEMENTS` and `NECKS`; with "none" for both it is a plain U-Net (Ronneberger et al., MICCAI
    2015, padded, with normalisation). Weights are drawn from `seed`.
    """

    def __init__(
        self, *, width: int, branch: int, enhance: str = "lfeb", neck: str = "pmff", seed: int
    ) -> None:
        super().__init__()
        channels = [width << level for level in range(LEVELS)]
        with seeded(seed):
            self.down = nn.ModuleList(
                _block(before, after) for before, after in zip([1, *channels], channels, strict=False)
            )
            self.enhance = nn.ModuleList(ENHANCEMENTS[enhance](each) for each in channels[:ENHANCED])
            self.neck = NECKS[neck](sum(channels[:ENHANCED]), channels[-1], branch=branch)
            self.widen = nn.ModuleList(
                nn.ConvTranspose2d(2 * each, each, 2, stride=2) for each in channels[-2::-1]
            )
            self.up = nn.ModuleList(_block(2 * each, each) for each in channels[-2::-1])
            self.end = nn.Conv2d(width, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """The values."""
        levels = self._levels(images)
        maps = self.neck(levels[:ENHANCED], levels[-1])
        for widen, up, skip in zip(self.widen, self.up, levels[-2::-1], strict=True):
            maps = up(torch.cat([skip, widen(maps)], dim=1))
        values: Tensor = self.end(maps)
        return values

    def _levels(self, images: Tensor) -> list[Tensor]:
        """Maps of all levels, finest first."""
        levels: list[Tensor] = []
        for number, block in enumerate(self.down):
            maps = block(F.max_pool2d(levels[-1], 2) if levels else images)
            levels.append(self.enhance[number](maps) if number < ENHANCED else maps)
        return levels
