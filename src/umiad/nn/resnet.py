"""The ResNets of He et al. (CVPR 2016) under torchvision's names, and what they compute in evaluation mode, folded.

Plain torch: this is what every score waits for, and importing a library of networks costs seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from umiad.config import TINY

STEM, CLASSES = 64, 1000
"""Channels after the first convolution; classes of ImageNet."""


@dataclass(frozen=True)
class Plan:
    """What tells one ResNet from another.

    `blocks` per stage, each of `planes` inner channels; `expansion`: output channels per inner one. A `bottleneck`
    block has three convolutions instead of two; `padded` shortcuts drop cells and pad channels with zeros, without
    weights. `classifier`: whether the published network has one; it is not kept, but it was drawn.
    """

    blocks: tuple[int, ...]
    planes: tuple[int, ...]
    expansion: int
    bottleneck: bool
    padded: bool = False
    classifier: bool = True

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of F1..F4."""
        return tuple(planes * self.expansion for planes in self.planes)


_PLANES = (64, 128, 256, 512)
PLANS: Mapping[str, Plan] = MappingProxyType(
    {
        "resnet18": Plan((2, 2, 2, 2), _PLANES, expansion=1, bottleneck=False),
        "resnet34": Plan((3, 4, 6, 3), _PLANES, expansion=1, bottleneck=False),
        "resnet50": Plan((3, 4, 6, 3), _PLANES, expansion=4, bottleneck=True),
        TINY: Plan((1, 1, 1, 1), (4, 8, 16, 32), 16, bottleneck=True, padded=True, classifier=False),
    }
)
"""Name -> plan. The tiny one is no published network: small enough to keep fitted models in the repository, with the
channels that egmf's parts are made for."""


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or 1x1, 3x3, 1x1, each with BatchNorm."""

    def __init__(self, before: int, planes: int, *, stride: int, plan: Plan) -> None:
        super().__init__()
        after = planes * plan.expansion
        downsample: nn.Module | None = None
        if (stride != 1 or before != after) and not plan.padded:
            downsample = nn.Sequential(_convolution(before, after, 1, stride), nn.BatchNorm2d(after))
        widths = (before, planes, planes, after) if plan.bottleneck else (before, planes, after)
        kernels = (1, 3, 1) if plan.bottleneck else (3, 3)
        strides = (1, stride, 1) if plan.bottleneck else (stride, 1)
        for number, kernel in enumerate(kernels, start=1):
            ends = widths[number - 1], widths[number]
            setattr(self, f"conv{number}", _convolution(*ends, kernel, strides[number - 1]))
            setattr(self, f"bn{number}", nn.BatchNorm2d(ends[1]))
        self.downsample = downsample
        self.stride, self.after, self.depth = stride, after, len(kernels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B,C,h,w] -> [B,C',h/stride,w/stride], >= 0; the first of two 3x3, or the 3x3, has the stride."""
        y = x
        for number in range(1, self.depth + 1):
            y = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(y))
            y = F.relu(y, inplace=True) if number < self.depth else y
        skip = padded_shortcut(x, self.after, self.stride) if self.downsample is None else self.downsample(x)
        return F.relu(y + skip, inplace=True)


class ResNet(nn.Module):
    """A ResNet without classifier: images [B,3,S,S] -> (F1, ..., F_depth), trainable, with BatchNorm.

    Stages deeper than `depth` (1 to 4) are drawn like the others, so that these do not depend on it, and dropped.

    Weights are drawn from torch's global generator (see `umiad.nn.encoder.seeded`) in the order and from the
    distributions of `monai.networks.nets.resnet18` (34, 50), so that a seed gives the same network as that library.
    """

    def __init__(self, name: str, *, depth: int = 4) -> None:
        super().__init__()
        self.depth, plan = depth, PLANS[name]
        width = STEM if not plan.padded else plan.planes[0]
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        before = width
        for stage, (count, planes) in enumerate(zip(plan.blocks, plan.planes, strict=True), start=1):
            blocks = []
            for number in range(count):
                stride = 2 if stage > 1 and number == 0 else 1
                blocks.append(Block(before, planes, stride=stride, plan=plan))
                before = planes * plan.expansion
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        if plan.classifier:
            nn.Linear(before, CLASSES)  # draws its numbers before the others are drawn anew, and is dropped
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        for stage in range(depth + 1, len(plan.blocks) + 1):
            delattr(self, f"layer{stage}")

    def forward(self, images: Tensor, *, depth: int | None = None) -> tuple[Tensor, ...]:
        """The maps F1..F_depth, finest first; `depth` None = all that are kept."""
        maps = [self.maxpool(F.relu(self.bn1(self.conv1(images)), inplace=True))]
        for stage in range(1, (self.depth if depth is None else depth) + 1):
            maps.append(self.get_submodule(f"layer{stage}")(maps[-1]))
        return tuple(maps[1:])


def _convolution(before: int, after: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel, stride=stride, padding=kernel // 2, bias=False)


def padded_shortcut(x: Tensor, channels: int, stride: int) -> Tensor:
    """Every `stride`-th cell of x [B,C,h,w], channels that are not there are 0: [B,channels,h/stride,w/stride]."""
    missing = channels - x.shape[1]
    x = x[:, :, ::stride, ::stride] if stride > 1 else x
    return F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x


Convolve = Callable[[Tensor], Tensor]


class Folded:
    """What a `ResNet` computes in evaluation mode, with every BatchNorm folded into the convolution before it.

    Folded once, in float64; runs channels-last, without gradients, in `dtype` (None: the weights'). In the weights'
    own type it differs from the network by rounding. Not a module: it holds copies, which no state carries.
    """

    def __init__(self, network: nn.Module, *, depth: int = 4, dtype: torch.dtype | None = None) -> None:
        self._out = cast(nn.Conv2d, network.get_submodule("conv1")).weight.dtype
        self.dtype = dtype = dtype or self._out
        self._stem = _fold(network.get_submodule("conv1"), network.get_submodule("bn1"), dtype)
        stages = (network.get_submodule(f"layer{stage}") for stage in range(1, depth + 1))
        self._stages = [
            [_FoldedBlock(cast(Block, block), dtype) for block in stage.children()] for stage in stages
        ]

    def __call__(self, images: Tensor, *, depth: int) -> tuple[Tensor, ...]:
        """Images [B,3,S,S] -> F1..F_depth, finest first, channels-last, in the type of the network's weights."""
        with torch.no_grad():
            x = images.to(self.dtype, memory_format=torch.channels_last)
            x = F.max_pool2d(F.relu(self._stem(x), inplace=True), 3, stride=2, padding=1)
            maps = []
            for stage in self._stages[:depth]:
                for block in stage:
                    x = block(x)
                maps.append(x.to(self._out))
            return tuple(maps)


class _FoldedBlock:
    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        parts = [
            (block.get_submodule(f"conv{n}"), block.get_submodule(f"bn{n}"))
            for n in range(1, block.depth + 1)
        ]
        self._convolutions: Sequence[Convolve] = [_fold(*part, dtype) for part in parts]
        self._skip: Convolve = _padding(block.after, block.stride)
        if block.downsample is not None:
            convolution, norm = block.downsample.children()
            self._skip = _fold(convolution, norm, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        y = x
        for convolve in self._convolutions[:-1]:
            y = F.relu(convolve(y), inplace=True)
        return F.relu(self._convolutions[-1](y).add_(self._skip(x)), inplace=True)


def _fold(convolution: nn.Module, norm: nn.Module, dtype: torch.dtype) -> Convolve:
    weight, bias = folded_weights(convolution, norm, dtype)
    convolution = cast(nn.Conv2d, convolution)
    stride, padding = convolution.stride, cast(tuple[int, ...], convolution.padding)

    def convolve(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding)

    return convolve


def folded_weights(convolution: nn.Module, norm: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights, channels-last, and bias of a convolution with the BatchNorm after it, folded in float64.

    W' = W g / sqrt(v + eps), b' = b - m g / sqrt(v + eps).
    """
    convolution, norm = cast(nn.Conv2d, convolution), cast(nn.BatchNorm2d, norm)
    mean, variance = cast(Tensor, norm.running_mean).double(), cast(Tensor, norm.running_var).double()
    scale = norm.weight.detach().double() * (variance + norm.eps).rsqrt()
    weight = (convolution.weight.detach().double() * scale[:, None, None, None]).to(
        dtype, memory_format=torch.channels_last
    )
    return weight, (norm.bias.detach().double() - mean * scale).to(dtype)


def _padding(channels: int, stride: int) -> Convolve:
    def shortcut(x: Tensor) -> Tensor:
        return padded_shortcut(x, channels, stride)

    return shortcut
