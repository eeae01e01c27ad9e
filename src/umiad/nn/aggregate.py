"""Slot `aggregate`: edge features and the deepest scale -> the deepest scale with edges in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from umiad.config import nearest
from umiad.errors import ConfigError
from umiad.nn.edge import EDGE_CHANNELS
from umiad.nn.encoder import CHANNELS, grid, seeded

_DEEP = CHANNELS[3]


class Aggregated(NamedTuple):
    """`f_agg` replaces F4; `f_cat` is what the edges contribute to it. Both [B,512,S/32,S/32]."""

    f_agg: Tensor
    f_cat: Tensor


class ChannelAttention(nn.Module):
    """CAB: [B,C,h,w] -> [B,C,h,w], each channel weighted by a number in 0..1.

    Deviation: the paper cites a channel attention block without describing it; ours is the channel part of
    CBAM (Woo et al., ECCV 2018, Eq. 2): one shared bottleneck C -> C/16 -> C on the mean and the maximum.
    """

    def __init__(self, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        self.bottleneck = nn.Sequential(
            nn.Conv2d(channels, channels // reduction, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels // reduction, channels, 1, bias=False),
        )

    def forward(self, features: Tensor) -> Tensor:
        """The weighted features."""
        mean = self.bottleneck(features.mean(dim=(2, 3), keepdim=True))
        peak = self.bottleneck(features.amax(dim=(2, 3), keepdim=True))
        return features * torch.sigmoid(mean + peak)


class RawGate(nn.Module):
    """GAP(F_cat) as printed in Eq. 8: unbounded and signed.

    With zero weights GAP(F_cat) * F_cat has no gradient at all, so the convolution before it starts small.
    """

    initial_std: ClassVar[float] = 1e-3

    def forward(self, f_cat: Tensor) -> Tensor:
        """f_cat [B,C,h,w] -> gate [B,C,1,1]."""
        return f_cat.mean(dim=(2, 3), keepdim=True)


class SigmoidGate(RawGate):
    """sigmoid(GAP(F_cat)): in 0..1."""

    initial_std: ClassVar[float] = 0.0

    def forward(self, f_cat: Tensor) -> Tensor:
        """f_cat [B,C,h,w] -> gate [B,C,1,1]."""
        return torch.sigmoid(super().forward(f_cat))


class SqueezeGate(RawGate):
    """Squeeze and excitation (Hu et al., CVPR 2018): GAP, C -> C / `reduction` -> C, sigmoid."""

    initial_std: ClassVar[float] = 0.0

    def __init__(self, channels: int = _DEEP, *, reduction: int = 4) -> None:
        super().__init__()
        hidden = channels // reduction
        self.excite = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, channels, 1))

    def forward(self, f_cat: Tensor) -> Tensor:
        """f_cat [B,C,h,w] -> gate [B,C,1,1]."""
        return torch.sigmoid(self.excite(super().forward(f_cat)))


GATES: dict[str, Callable[[], RawGate]] = {"sigmoid": SigmoidGate, "raw": RawGate, "se": SqueezeGate}


class EdgeAggregation(nn.Module):
    """EAM: f_edge [B,128,S/8,S/8], f4 [B,512,S/32,S/32] -> Aggregated. Paper, Eq. 6-8.

    `gate` names how GAP(F_cat) weighs F_cat ("sigmoid", "raw", "se"). At the start F_cat is zero, so
    F_agg = F4 (with "raw" only nearly). The weights are drawn from `seed`.

    Deviation: the paper does not say how f_edge comes to F4's size (ours: averaging) nor what bounds the
    gate (ours: a sigmoid; the printed form is "raw").

    Raises:
        ConfigError: `gate` is unknown.
    """

    def __init__(self, *, gate: str = "sigmoid", seed: int = 0) -> None:
        super().__init__()
        if gate not in GATES:
            raise ConfigError(f"gate {gate!r} is unknown{nearest(gate, list(GATES))}")
        with seeded(seed):
            self.attention = ChannelAttention(EDGE_CHANNELS)
            self.fuse = nn.Conv2d(EDGE_CHANNELS + _DEEP, _DEEP, 3, padding=1)
            self.gate = GATES[gate]()
            nn.init.normal_(self.fuse.weight, std=self.gate.initial_std)
            nn.init.zeros_(self.fuse.get_parameter("bias"))

    def forward(self, f_edge: Tensor, f4: Tensor) -> Aggregated:
        """F_agg = gate(F_cat) * F_cat + F4, with F_cat = conv([CAB(F_edge), F4])."""
        enhanced = F.adaptive_avg_pool2d(self.attention(f_edge), grid(f4))
        f_cat = self.fuse(torch.cat([enhanced, f4], dim=1))
        return Aggregated(self.gate(f_cat) * f_cat + f4, f_cat)


class AddEdges(nn.Module):
    """ADD of Table 8: F_agg = F4 + F_cat, F_cat = a 1x1 projection of the averaged edge features.

    Same call as `EdgeAggregation`. At the start F_cat is the neutral element of the operator, F_agg = F4.
    """

    neutral: ClassVar[float] = 0.0

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        with seeded(seed):
            self.project = nn.Conv2d(EDGE_CHANNELS, _DEEP, 1)
        nn.init.zeros_(self.project.weight)
        nn.init.constant_(self.project.get_parameter("bias"), self.neutral)

    def combine(self, f4: Tensor, f_cat: Tensor) -> Tensor:
        """The operator; both [B,512,h,w]."""
        return f4 + f_cat

    def forward(self, f_edge: Tensor, f4: Tensor) -> Aggregated:
        """f_edge [B,128,S/8,S/8], f4 [B,512,S/32,S/32] -> Aggregated."""
        f_cat = self.project(F.adaptive_avg_pool2d(f_edge, grid(f4)))
        return Aggregated(self.combine(f4, f_cat), f_cat)


class MultiplyEdges(AddEdges):
    """MUL of Table 8: F_agg = F4 * F_cat. Differs from `AddEdges` in the operator only."""

    neutral: ClassVar[float] = 1.0

    def combine(self, f4: Tensor, f_cat: Tensor) -> Tensor:
        """The operator; both [B,512,h,w]."""
        return f4 * f_cat


class IgnoreEdges(nn.Module):
    """Null object of the slot: F_agg = F4, F_cat = 0, no parameters."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()

    def forward(self, f_edge: Tensor, f4: Tensor) -> Aggregated:
        """f_edge [B,128,S/8,S/8] is not looked at; f4 [B,512,S/32,S/32]."""
        return Aggregated(f4, torch.zeros_like(f4))


AGGREGATES: dict[str, type[nn.Module]] = {
    "eam": EdgeAggregation,
    "add": AddEdges,
    "mul": MultiplyEdges,
    "ignore": IgnoreEdges,
}
