"""Reverse distillation's networks: from three feature maps to one small embedding, and back to three maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from umiad.config import TINY
from umiad.nn.encoder import BACKBONES, seeded

LEVELS = 3
"""The teacher's maps F1, F2 and F3 are distilled."""
BASE = 64
"""Planes of a ResNet's first stage; each further stage has twice as many."""
DECODER_BLOCKS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {"resnet18": (2, 2, 2), "resnet34": (3, 4, 6), "resnet50": (3, 4, 6), TINY: (1, 1, 1)}
)
"""Backbone -> blocks of the decoder's stages, coarsest first (as published, for ours of the tests one each)."""
EMBEDDING_BLOCKS: Mapping[str, int] = MappingProxyType({"resnet18": 2, "resnet34": 3, "resnet50": 3, TINY: 1})
"""Backbone -> blocks of the embedding's residual stage."""

Resize = Literal["halve", "double", "keep"]


def expansion(backbone: str) -> int:
    """How many times wider than its planes the output of a block is: 1 (basic blocks) or 4 (bottlenecks)."""
    return BACKBONES[backbone][0] // BASE


class ReverseNetwork(nn.Module):
    """What is trained: the one-class embedding of the teacher's maps, and the decoder that restores them.

    F1 [B,64e,h,w], F2 [B,128e,h/2,w/2], F3 [B,256e,h/4,w/4] (e = 1, with ResNet50 4) -> maps of the same shapes,
    >= 0. h and w must be multiples of 8. Initial weights are drawn from `seed`: Kaiming normal (fan out) for
    convolutions, torch's own for transposed ones, as published. No convolution has a bias.

    Source: Deng and Li, Anomaly Detection via Reverse Distillation from One-Class Embedding, CVPR 2022.
    """

    def __init__(self, backbone: str, *, seed: int) -> None:
        super().__init__()
        e = expansion(backbone)
        with seeded(seed):
            self.embedding = OneClassEmbedding(e, blocks=EMBEDDING_BLOCKS[backbone])
            self.decoder = Decoder(e, blocks=DECODER_BLOCKS[backbone])
            for part in self.modules():
                if isinstance(part, nn.Conv2d):
                    nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The teacher's maps (F1, F2, F3) -> the decoder's (D1, D2, D3), finest first."""
        restored: list[Tensor] = self.decoder(self.embedding(features))
        return restored


class OneClassEmbedding(nn.Module):
    """Three maps fused and condensed: (F1, F2, F3) -> [B,512e,h/8,w/8], h and w the cells of F1.

    F1 and F2 are brought to F3's grid and channels by convolutions 3 x 3 with stride 2 (two and one), each with
    BatchNorm and ReLU; all three are concatenated, and a residual stage halves the grid once more.

    Deviation: the official code builds one more convolution with BatchNorm that it never calls (8.4 million
    parameters for WideResNet50); ours has none.
    """

    def __init__(self, e: int, *, blocks: int) -> None:
        super().__init__()
        widths = [BASE * 2**k * e for k in range(LEVELS)]
        self.reduce = nn.ModuleList(
            nn.Sequential(*(layer for k in range(first, LEVELS - 1) for layer in _halving(widths, k)))
            for first in range(LEVELS)
        )
        self.stage = _stage(LEVELS * widths[-1], 8 * BASE, e=e, blocks=blocks, resize="halve")

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """(F1, F2, F3) -> the embedding."""
        fused = [reduce(each) for reduce, each in zip(self.reduce, features, strict=True)]
        embedding: Tensor = self.stage(torch.cat(fused, dim=1))
        return embedding


class Decoder(nn.Module):
    """A ResNet in reverse: [B,512e,h/8,w/8] -> maps of the shapes of F1, F2, F3 (finest first), >= 0."""

    def __init__(self, e: int, *, blocks: Sequence[int]) -> None:
        super().__init__()
        planes = [BASE * 2**k for k in reversed(range(LEVELS))]
        inputs = [8 * BASE * e, *(each * e for each in planes[:-1])]
        self.stages = nn.ModuleList(
            _stage(i, p, e=e, blocks=count, resize="double")
            for i, p, count in zip(inputs, planes, blocks, strict=True)
        )

    def forward(self, embedding: Tensor) -> list[Tensor]:
        """The maps after the last ReLU of each stage."""
        maps = [embedding]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[:0:-1]


class Residual(nn.Module):
    """ReLU(path(z) + shortcut(z))."""

    def __init__(self, path: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.path, self.shortcut, self.act = path, shortcut, nn.ReLU(inplace=True)

    def forward(self, z: Tensor) -> Tensor:
        """Features z [B,C,h,w] -> [B,C',h',w'], >= 0."""
        out: Tensor = self.act(self.path(z) + self.shortcut(z))
        return out


def _stage(inputs: int, planes: int, *, e: int, blocks: int, resize: Resize) -> nn.Sequential:
    """Residual blocks with `planes` * e output channels, the first of which changes the grid."""
    first = _block(inputs, planes, e=e, resize=resize)
    return nn.Sequential(first, *(_block(planes * e, planes, e=e, resize="keep") for _ in range(blocks - 1)))


def _block(inputs: int, planes: int, *, e: int, resize: Resize) -> Residual:
    """A basic block (e = 1) or a bottleneck; the grid changes in its first, or its middle convolution."""
    outputs = planes * e
    if e == 1:
        layers = [_resizing(inputs, planes, resize), nn.Conv2d(planes, planes, 3, padding=1, bias=False)]
    else:
        layers = [
            nn.Conv2d(inputs, planes, 1, bias=False),
            _resizing(planes, planes, resize),
            nn.Conv2d(planes, outputs, 1, bias=False),
        ]
    widths = [planes] * (len(layers) - 1) + [outputs]
    normed = [
        part for pair in zip(layers, map(nn.BatchNorm2d, widths), strict=True) for part in (*pair, _relu())
    ]
    return Residual(nn.Sequential(*normed[:-1]), _shortcut(inputs, outputs, resize))


def _resizing(inputs: int, outputs: int, resize: Resize) -> nn.Module:
    """The convolution that changes the grid: 3 x 3, transposed 2 x 2 where it doubles."""
    if resize == "double":
        return nn.ConvTranspose2d(inputs, outputs, 2, stride=2, bias=False)
    return nn.Conv2d(inputs, outputs, 3, stride=2 if resize == "halve" else 1, padding=1, bias=False)


def _shortcut(inputs: int, outputs: int, resize: Resize) -> nn.Module:
    """What leads past a block: nothing, or a projection to its grid and channels with BatchNorm."""
    if resize == "keep":
        return nn.Identity()
    if resize == "double":
        return nn.Sequential(_resizing(inputs, outputs, resize), nn.BatchNorm2d(outputs))
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), nn.BatchNorm2d(outputs))


def _halving(widths: Sequence[int], k: int) -> Iterator[nn.Module]:
    """Convolution, BatchNorm and ReLU from level k's channels and grid to those of the next."""
    yield _resizing(widths[k], widths[k + 1], "halve")
    yield nn.BatchNorm2d(widths[k + 1])
    yield _relu()


def _relu() -> nn.Module:
    return nn.ReLU(inplace=True)
