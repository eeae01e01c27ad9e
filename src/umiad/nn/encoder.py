"""The frozen feature pyramid, its pooling, and initial weights without side effects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from umiad.config import TINY
from umiad.errors import ModelFileError
from umiad.nn.resnet import PLANS, Folded, ResNet

CHANNELS = (64, 128, 256, 512)
"""Channels of F1..F4 of ResNet18, the paper's backbone."""
BACKBONES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {name: plan.channels for name, plan in PLANS.items()}
)
"""Name of each backbone -> channels of its F1..F4; all have the same strides."""
_STRIDES = (4, 8, 16, 32)
_CLASSIFIER = ("fc.weight", "fc.bias")
_SHOWN = 5  # problems named in one error message
_TITLES = {"resnet18": "ResNet18", "resnet34": "ResNet34", "resnet50": "ResNet50", TINY: "the tiny ResNet"}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw everything inside from `seed`; torch's CPU and numpy's global random states are put back after.

    The libraries that build our parts draw from the global generators: this is the only way to govern
    their initial weights and permutations without an effect outside.
    """
    numpy_state = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)


class Pyramid(nn.Module):
    """A ResNet up to its last stage, frozen and always in evaluation mode: images -> (F1, F2, F3, F4).

    images [B,3,S,S], float, ImageNet-normalised, S a multiple of 32 ->
    F1 [B,64,S/4,S/4], F2 [B,128,S/8,S/8], F3 [B,256,S/16,S/16], F4 [B,512,S/32,S/32], all >= 0. Those are
    ResNet18's and ResNet34's `channels`; ResNet50 has four times as many (see `BACKBONES`). No gradient flows back to
    the images. Runs folded and channels-last (`umiad.nn.resnet.Folded`), in `dtype`, None = the weights' own; the maps
    have the weights' own in any case. No state carries `dtype`.

    Layers deeper than `depth` (1 to 4) are not kept, and cannot be run; `state` may hold them.

    `state` holds weights under torchvision's names; classifier weights ("fc.*") and
    "*.num_batches_tracked" may be missing, nothing else. Without `state` the weights are random, drawn
    from `seed`. `state_dict()` has torchvision's names without the classifier.

    Source: He et al., CVPR 2016; equal to `monai.networks.nets.resnet18` (34, 50) and so to torchvision's, up to
    float32 rounding. Deviation: Table 2 of the paper prints F1..F4 at half these sizes; the standard
    network followed by `pool` yields the sizes its flows work on.

    Raises:
        ModelFileError: `state` lacks keys, has unknown ones, or has other shapes; names the first few.
    """

    def __init__(
        self, state: Mapping[str, Tensor] | None, *, seed: int, backbone: str = "resnet18", depth: int = 4
    ) -> None:
        super().__init__()
        self.channels, self.depth = BACKBONES[backbone], depth
        with seeded(seed):
            network = ResNet(backbone)
        if state is not None:
            _fill(network, state, name=backbone)
        for name, part in network.named_children():
            if not name.startswith("layer") or int(name.removeprefix("layer")) <= depth:
                self.add_module(name, part)
        self.requires_grad_(False)
        self.eval()
        self.dtype: torch.dtype | None = None
        self._folded: tuple[object, Folded] | None = None

    def train(self, mode: bool = True) -> Pyramid:
        """Stay in evaluation mode, whatever `mode` says: BatchNorm statistics are part of the weights."""
        return super().train(False)

    def forward(self, images: Tensor, *, depth: int = 4) -> tuple[Tensor, ...]:
        """The maps F1..F_depth, finest first; shapes as in the class docstring. What lies deeper is not run."""
        return self._network()(images, depth=depth)

    def run_parts(self, *, depth: int = 4) -> tuple[str, ...]:
        """Names of the submodules whose weights `forward` uses at this `depth`."""
        deeper = tuple(f"layer{stage}" for stage in range(depth + 1, 5))
        return tuple(name for name, _ in self.named_modules() if name and not name.startswith(deeper))

    def _network(self) -> Folded:
        """The folded network, made anew whenever a weight has moved or changed.

        While a graph is traced, weights are stand-ins without memory: the one made last is taken (score once before).
        """
        if self._folded is not None and torch.compiler.is_exporting():
            return self._folded[1]
        held = [*self.parameters(), *self.buffers()]
        weights = tuple((each.data_ptr(), 0 if each.is_inference() else each._version) for each in held)
        if self._folded is None or self._folded[0] != (weights, self.dtype):
            self._folded = (weights, self.dtype), Folded(self, depth=self.depth, dtype=self.dtype)
        return self._folded[1]


def yardstick(backbone: str) -> ResNet:
    """The plain network, neither folded nor channels-last, in evaluation mode: times are multiples of its own.

    Random weights; call it without gradients.
    """
    with seeded(0):
        return ResNet(backbone).requires_grad_(False).eval()


def grid(maps: Tensor) -> tuple[int, int]:
    """Height and width of maps [...,h,w] in cells."""
    return maps.shape[-2], maps.shape[-1]


def pool(features: Tensor) -> Tensor:
    """The paper's "pyramid pooling" of one map: [B,C,H,W] -> [B,C,ceil(H/2),ceil(W/2)].

    AvgPool2d(3, stride 2, padding 1), zeros counted at the border, as is usual for flows on pyramids.
    A map without channels (an empty condition) keeps none.
    """
    if features.shape[1] == 0:
        return features[:, :, ::2, ::2]
    return F.avg_pool2d(features, kernel_size=3, stride=2, padding=1)


def pooled_size(size: int) -> tuple[tuple[int, int], ...]:
    """Cells (h, w) of the four pooled maps of a size x size image, finest first; 256 -> 32, 16, 8, 4."""
    sides = [-(-(size // stride) // 2) for stride in _STRIDES]
    return tuple((side, side) for side in sides)


def _may_be_missing(key: str) -> bool:
    return key.endswith(".num_batches_tracked")


def _fill(network: Any, state: Mapping[str, Tensor], *, name: str) -> None:
    """Copy `state` into `network` in place; every mismatch but the allowed ones is an error."""
    own: dict[str, Tensor] = network.state_dict()
    missing = [key for key in own if key not in state and not _may_be_missing(key)]
    unknown = [key for key in state if key not in own and key not in _CLASSIFIER]
    shared = {key: value for key, value in state.items() if key in own}
    shapes = [
        f"{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}"
        for key, value in shared.items()
        if value.shape != own[key].shape
    ]
    problems = [
        f"{len(found)} {what}: {', '.join(found[:_SHOWN])}{', ...' if len(found) > _SHOWN else ''}"
        for what, found in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if found
    ]
    if problems:
        raise ModelFileError(
            f"weights do not fit {_TITLES[name]}: {'; '.join(problems)}. Expected torchvision's {name} names and "
            f"shapes (only fc.* and *.num_batches_tracked may be missing); use a {_TITLES[name]} weights file"
        )
    network.load_state_dict(shared, strict=False)
