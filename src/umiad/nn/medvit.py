"""MedViTV2 (Manzari et al., 2025) in plain torch: a hybrid of convolutions, attention and KAN layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from umiad.nn.encoder import seeded
from umiad.nn.kan import kan
from umiad.nn.neighbourhood import NeighbourhoodAttention

HEAD = 32
"""Channels per head of every attention, and per group of every grouped convolution."""
GLOBAL_SHARE = 0.75
"""Share of a GFP block's channels that come from its global attention, rounded to heads."""
STEM = ((64, 2), (32, 1), (64, 1), (64, 2))
"""Channels and stride of the first four convolutions."""
STRIDES = (4, 8, 16, 32)
"""Pixels per cell of the maps of the four stages."""
REDUCTIONS = (8, 4, 2, 1)
"""In the stages' global attention, so many squared positions, one after another, are averaged to one key."""
KERNELS = (7, 3, 3, 3)
"""Of the depthwise convolutions in the stages' LFP blocks."""
INIT_STD = 0.02
"""Standard deviation of the initial weights, a normal distribution."""


@dataclass(frozen=True)
class Design:
    """Blocks and channels of the four stages, and the published rate of DropPath."""

    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]
    drop_path: float


DESIGNS: Mapping[str, Design] = MappingProxyType(
    {
        "tiny": Design((2, 2, 6, 1), (64, 128, 192, 384), 0.1),
        "small": Design((2, 2, 6, 2), (64, 128, 256, 512), 0.1),
        "base": Design((2, 2, 6, 2), (96, 192, 384, 768), 0.2),
        "large": Design((2, 2, 6, 2), (96, 256, 512, 1024), 0.2),
    }
)
"""The four published sizes."""


class Features(NamedTuple):
    """Maps of the four stages, [B,C_k,S/4,S/4] to [B,C_k,S/32,S/32], and the pooled `embedding` [B,C_4]."""

    maps: tuple[Tensor, ...]
    embedding: Tensor


def drop_path(branch: Tensor, rate: float, rng: torch.Generator | None) -> Tensor:
    """Leave out the branch [B,...] of an image with probability `rate`, else divide it by 1 - rate.

    Nothing happens without `rng` (scoring) or at rate 0. Huang et al., Deep Networks with Stochastic Depth, 2016.
    """
    if rng is None or rate == 0:
        return branch
    kept = (torch.rand(len(branch), generator=rng) >= rate).to(branch) / (1 - rate)
    return branch * kept.reshape(-1, *(1,) * (branch.ndim - 1))


def to_fibres(maps: Tensor, *, official: bool) -> Tensor:
    """Maps [B,C,h,w] -> [B,h,w,C]: the fibres, or where `official` the same numbers merely cut up otherwise."""
    count, channels, h, w = maps.shape
    return maps.reshape(count, h, w, channels) if official else maps.movedim(1, -1)


def to_maps(fibres: Tensor, *, official: bool) -> Tensor:
    """The inverse of `to_fibres`: [B,h,w,C] -> [B,C,h,w]."""
    count, h, w, channels = fibres.shape
    return fibres.reshape(count, channels, h, w) if official else fibres.movedim(-1, 1)


class Embedding(nn.Sequential):
    """Other channels, and half the grid at stride 2: 2 x 2 average, 1 x 1 convolution, BatchNorm; or nothing."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        layers: list[nn.Module] = [nn.AvgPool2d(2)] if stride == 2 else []
        if stride == 2 or inputs != outputs:
            layers += [nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        super().__init__(*layers)


class Excite(nn.Module):
    """Each channel times a number in 0..1 that the channels' means decide, by way of `hidden` units."""

    def __init__(self, channels: int, *, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Hardsigmoid()
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [B,C,h,w] -> the same shape."""
        return maps * self.gate(maps.mean((2, 3)))[:, :, None, None]


class LocalFeedForward(nn.Module):
    """x + f(x) with f: 1 x 1 to `expand` times the channels, depthwise convolution, excitation, 1 x 1 back."""

    def __init__(self, channels: int, *, expand: int, kernel: int) -> None:
        super().__init__()
        hidden = channels * expand
        self.layers = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            Excite(hidden, hidden=expand),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [B,C,h,w] -> the same shape."""
        out: Tensor = maps + self.layers(maps)
        return out


class GlobalAttention(nn.Module):
    """Self-attention over all N positions, whose keys are the means of `reduction`^2 successive positions.

    Fibres [B,N,C] -> [B,N,C]. Successive in reading order, so an average covers a stretch of a row, not a square:
    as published, and before in Next-ViT (Li et al., 2022). Keys left over at the end of the map are dropped.
    """

    def __init__(self, channels: int, *, reduction: int) -> None:
        super().__init__()
        self.heads, self.reduction = channels // HEAD, reduction
        self.query, self.key, self.value, self.proj = (nn.Linear(channels, channels) for _ in range(4))
        self.norm = nn.BatchNorm1d(channels) if reduction > 1 else nn.Identity()

    def forward(self, fibres: Tensor) -> Tensor:
        """Fibres [B,N,C] -> [B,N,C]; N is at least `reduction`^2."""
        seen = fibres
        if self.reduction > 1:
            seen = self.norm(F.avg_pool1d(fibres.mT, self.reduction**2)).mT
        q, k, v = (
            layer(values).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, values in ((self.query, fibres), (self.key, seen), (self.value, seen))
        )
        taken = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(taken.transpose(1, 2).flatten(2))
        return out


class ConvAttention(nn.Sequential):
    """What the publication calls multi-head convolutional attention: 3 x 3 in groups, BatchNorm, ReLU, 1 x 1."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels // HEAD, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1, bias=False),
        )


@dataclass(frozen=True)
class Place:
    """Where a block stands: channels in and out, stride, number of its stage (0..3), and its rate of DropPath."""

    inputs: int
    outputs: int
    stride: int
    stage: int
    drop_path: float


class LocalBlock(nn.Module):
    """LFP, "local feature perception": neighbourhood attention, then a local feed-forward.

    The feed-forward has a residual connection of its own and is added to what went in, as published.
    """

    def __init__(self, place: Place, *, official: bool) -> None:
        super().__init__()
        channels, self.rate, self.official = place.outputs, place.drop_path, official
        self.embed = Embedding(place.inputs, channels, stride=place.stride)
        self.norm1 = nn.BatchNorm2d(channels)
        self.attention = NeighbourhoodAttention(channels, heads=channels // HEAD)
        self.norm2 = nn.BatchNorm2d(channels)
        self.feed_forward = LocalFeedForward(channels, expand=3, kernel=KERNELS[place.stage])

    def forward(self, maps: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Maps [B,inputs,h,w] -> [B,outputs,h/stride,w/stride]."""
        maps = self.embed(maps)
        seen = self.attention(to_fibres(self.norm1(maps), official=self.official))
        maps = maps + drop_path(to_maps(seen, official=self.official), self.rate, rng)
        out: Tensor = maps + self.feed_forward(self.norm2(maps))
        return out


class GlobalBlock(nn.Module):
    """GFP, "global feature perception": global attention beside convolutional attention, then KAN layers.

    Where `official`, `unused` holds the feed-forward that the published code builds and never calls, frozen.
    """

    def __init__(self, place: Place, *, official: bool) -> None:
        super().__init__()
        channels, self.rate, self.official = place.outputs, place.drop_path, official
        far = rounded(channels * GLOBAL_SHARE)
        self.embed = Embedding(place.inputs, far, stride=place.stride)
        self.norm1 = nn.BatchNorm2d(far)
        self.attention = GlobalAttention(far, reduction=REDUCTIONS[place.stage])
        self.project = Embedding(far, channels - far)
        self.convolution = ConvAttention(channels - far)
        self.norm2 = nn.BatchNorm2d(channels)
        self.kan = kan([channels, 2 * channels, channels])
        if official:
            self.unused = LocalFeedForward(channels, expand=2, kernel=3).requires_grad_(False)

    def forward(self, maps: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Maps [B,inputs,h,w] -> [B,outputs,h/stride,w/stride]."""
        maps = self.embed(maps)
        fibres = self.norm1(maps).flatten(2).mT  # in the right order in the published code, too
        seen = self.attention(fibres).mT.unflatten(2, maps.shape[2:])
        maps = maps + drop_path(seen, self.rate * GLOBAL_SHARE, rng)
        near = self.project(maps)
        near = near + drop_path(self.convolution(near), self.rate * (1 - GLOBAL_SHARE), rng)
        maps = torch.cat([maps, near], dim=1)
        values = self.kan(to_fibres(self.norm2(maps), official=self.official))
        return maps + drop_path(to_maps(values, official=self.official), self.rate, rng)


class MedVitNetwork(nn.Module):
    """Stem, four stages, BatchNorm, mean over positions, and a linear layer of `classes` outputs.

    Images [B,3,S,S], S a multiple of 32 and at least 64. `design`: a name from `DESIGNS`; `drop_rate` of the last
    block's DropPath, rising in a line from 0 at the first (None = the published rate). `official`: as the published
    code computes. That cuts maps into vectors of C numbers without moving the channels to the end, before the
    neighbourhood attention and before the KAN layers, so that a "fibre" there is a stretch of one channel's rows;
    and it has parameters that nothing uses. Without it there are fibres, and no such parameters.
    Initial weights are drawn from `seed`.

    Parameters in millions with two classes, `official` (as published) and not: tiny 11.34 and 10.35, small 29.58
    and 26.83, base 66.23 and 60.09, large 117.27 and 106.39.
    """

    def __init__(
        self, design: str, *, classes: int, seed: int, official: bool = False, drop_rate: float | None = None
    ) -> None:
        super().__init__()
        dims, chosen = DESIGNS[design].dims, DESIGNS[design]
        highest = chosen.drop_path if drop_rate is None else drop_rate
        rates = (highest * k / (sum(chosen.depths) - 1) for k in range(sum(chosen.depths)))
        with seeded(seed):
            self.stem = _stem()
            self.stages = nn.ModuleList()
            inputs = STEM[-1][0]
            for stage, depth in enumerate(chosen.depths):
                blocks = nn.ModuleList()
                for number in range(depth):
                    stride = 2 if stage > 0 and number == 0 else 1
                    place = Place(inputs, dims[stage], stride, stage, next(rates))
                    kind = GlobalBlock if _is_global(stage, number, depth) else LocalBlock
                    blocks.append(kind(place, official=official))
                    inputs = dims[stage]
                self.stages.append(blocks)
            self.norm = nn.BatchNorm2d(inputs)
            self.head: nn.Module = nn.Linear(inputs, classes)
            self.apply(_start)

    def without_classifier(self) -> Self:
        """This network, less what no feature depends on: the head, and the published code's unused feed-forwards."""
        self.head = nn.Identity()
        for part in self.modules():
            if isinstance(part, GlobalBlock) and hasattr(part, "unused"):
                del part.unused
        return self

    def forward(self, images: Tensor, rng: torch.Generator | None = None) -> Features:
        """Images [B,3,S,S] -> maps and embedding; with `rng`, which draws it, DropPath is on."""
        maps, found = self.stem(images), []
        for stage in self.stages:
            for block in stage:  # type: ignore[attr-defined] # a ModuleList of ModuleLists
                maps = block(maps, rng)
            found.append(maps)
        return Features(tuple(found), self.norm(maps).mean((2, 3)))

    def classify(self, embedding: Tensor) -> Tensor:
        """Embedding [B,C] -> logits [B,classes]."""
        logits: Tensor = self.head(embedding)
        return logits


def rounded(channels: float) -> int:
    """The nearest multiple of 32, at least 32; halves go up."""
    return max(HEAD, int(channels + HEAD / 2) // HEAD * HEAD)


def _is_global(stage: int, number: int, depth: int) -> bool:
    """Stage 1 has LFP blocks only, stage 2 ends with a GFP, in stage 3 every third is one, in stage 4 all are."""
    return (False, number == depth - 1, number % 3 == 2, True)[stage]


def _stem() -> nn.Sequential:
    layers: list[nn.Module] = []
    inputs = 3
    for channels, stride in STEM:
        convolution = nn.Conv2d(inputs, channels, 3, stride=stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
        inputs = channels
    return nn.Sequential(*layers)


def _start(part: nn.Module) -> None:
    """Initial weights of one module, as published."""
    if isinstance(part, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(part.weight, std=INIT_STD)
        if part.bias is not None:
            nn.init.zeros_(part.bias)
    elif isinstance(part, NeighbourhoodAttention):
        nn.init.trunc_normal_(part.bias, std=INIT_STD)
