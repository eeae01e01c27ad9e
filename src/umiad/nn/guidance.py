"""Slot `guidance`: which gradients train the edge parts, and where edges enter the deepest flow.

A flow on features that are themselves trained by its likelihood can shrink those features without end and
so improve the likelihood without learning anything. Each policy here says what it does about that:

================  ==================================  =====================  ==========
policy            flow 4 models                       edge parts trained by  collapse
================  ==================================  =====================  ==========
StopGradient      F_agg, without gradient             pseudo-edges           impossible
Joint             F_agg (the paper's wording)         the likelihood         possible
ConditionalShift  F4 + shift(F_edge): p(F4 | F_edge)  the likelihood         impossible
EdgeCondition     F4, condition [position, F_edge]    the likelihood         impossible
================  ==================================  =====================  ==========

All are built as `GUIDANCES[name](edge, aggregate)` and called alike. Trainable parameters that get no
gradient, by the meaning of the combination: an edge module under Joint and ConditionalShift where the
aggregate ignores edges; the "se" gate of an EdgeAggregation under StopGradient; a gradient of zero for
MultiplyEdges and the edge module under ConditionalShift, where there is nothing to multiply.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from umiad.nn.aggregate import Aggregated
from umiad.nn.edge import EDGE_CHANNELS
from umiad.nn.encoder import CHANNELS, grid, seeded


class Guided(NamedTuple):
    """What a policy hands on, all on the grid of F4.

    `f4_flow` [B,512,S/32,S/32] goes to flow 4 (after `pool`); `condition` [B,condition_channels,S/32,S/32]
    joins that flow's condition (after `pool`; no channels in most policies); `f_cat` [B,512,S/32,S/32] is
    for `loss`.
    """

    f4_flow: Tensor
    condition: Tensor
    f_cat: Tensor


class EdgeHead(nn.Module):
    """Predicts pseudo-edges from features by a 1x1 convolution and yields the mean squared error."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, 1, 1)

    def forward(self, features: Tensor, edges_target: Tensor) -> Tensor:
        """Features [B,C,h,w], target [B,1,H,W] in 0..1 (averaged to h x w) -> loss, a scalar >= 0."""
        target = F.adaptive_avg_pool2d(edges_target, grid(features))
        return F.mse_loss(self.project(features), target)


class NoHead(nn.Module):
    """Null object for a part without parameters, which nothing could train: the loss is zero."""

    def forward(self, features: Tensor, edges_target: Tensor) -> Tensor:
        """A zero scalar on the features' device."""
        return features.new_zeros(())


class Joint(nn.Module):
    """The paper's wording: F_agg goes to the flow and the likelihood trains EGM and EAM.

    Warning: ill-posed. Shrinking F_agg lowers the loss without bound; watch var(F_agg) / var(F4).
    `edge` is looked at by other policies only; `aggregate` becomes part of this module.
    """

    condition_channels: ClassVar[int] = 0

    def __init__(self, edge: nn.Module, aggregate: nn.Module, *, seed: int = 0) -> None:
        super().__init__()
        self.aggregate = aggregate

    def forward(self, f_edge: Tensor, f4: Tensor) -> Guided:
        """f_edge [B,128,S/8,S/8], f4 [B,512,S/32,S/32] -> Guided."""
        f_agg, f_cat = self.aggregate(f_edge, f4)
        return Guided(f_agg, _nothing(f4), f_cat)

    def loss(self, f_edge: Tensor, f_cat: Tensor, edges_target: Tensor) -> Tensor:
        """No loss of its own: a zero scalar."""
        return f_edge.new_zeros(())


class StopGradient(nn.Module):
    """The default: the flow takes F_agg as given; EGM and EAM learn to predict pseudo-edges.

    Deviation: the paper trains all parts by the likelihood alone, which rewards collapse (see `Joint`),
    and names no other signal. Ours: a 1x1 head after the EGM and one on F_cat, each only where the part
    before it has parameters. The weights of the heads are drawn from `seed`.
    """

    condition_channels: ClassVar[int] = 0

    def __init__(self, edge: nn.Module, aggregate: nn.Module, *, seed: int = 0) -> None:
        super().__init__()
        self.aggregate = aggregate
        with seeded(seed):
            self.edge_head = _head_after(edge, EDGE_CHANNELS)
            self.cat_head = _head_after(aggregate, CHANNELS[3])

    def forward(self, f_edge: Tensor, f4: Tensor) -> Guided:
        """f_edge [B,128,S/8,S/8], f4 [B,512,S/32,S/32] -> Guided; no gradient passes through `f4_flow`."""
        f_agg, f_cat = self.aggregate(f_edge, f4)
        return Guided(f_agg.detach(), _nothing(f4), f_cat)

    def loss(self, f_edge: Tensor, f_cat: Tensor, edges_target: Tensor) -> Tensor:
        """Sum of the heads' errors; f_edge [B,128,.,.], f_cat [B,512,.,.], target [B,1,H,W] -> scalar."""
        on_edge: Tensor = self.edge_head(f_edge, edges_target)
        on_cat: Tensor = self.cat_head(f_cat, edges_target)
        return on_edge + on_cat


class ConditionalShift(Joint):
    """F4 shifted by a function of the edges only: the exact density p(F4 | F_edge), unit Jacobian.

    Deviation: in the paper the aggregate sees F4, and its output is no invertible function of F4. Here F4
    is withheld from it (zeros in its place), so z^4 = F4 + aggregate(F_edge, 0). The frozen F1 and F2 that
    F_edge comes from are not modelled by flow 4, so it is a legitimate condition.
    """

    def forward(self, f_edge: Tensor, f4: Tensor) -> Guided:
        """f_edge [B,128,S/8,S/8], f4 [B,512,S/32,S/32] -> Guided."""
        shift: Aggregated = self.aggregate(f_edge, torch.zeros_like(f4))
        return Guided(f4 + shift.f_agg, _nothing(f4), shift.f_cat)


class EdgeCondition(nn.Module):
    """z^4 = F4; the edges reach flow 4 through its condition only. Exact, joint gradient.

    Deviation: stands in for the EAM, which is neither kept nor called. F_edge is averaged to F4's grid and
    projected to 32 channels by a 1x1 convolution, drawn from `seed`.
    """

    condition_channels: ClassVar[int] = 32

    def __init__(self, edge: nn.Module, aggregate: nn.Module, *, seed: int = 0) -> None:
        super().__init__()
        with seeded(seed):
            self.project = nn.Conv2d(EDGE_CHANNELS, self.condition_channels, 1)

    def forward(self, f_edge: Tensor, f4: Tensor) -> Guided:
        """f_edge [B,128,S/8,S/8], f4 [B,512,S/32,S/32] -> Guided; F_cat is zero."""
        condition = self.project(F.adaptive_avg_pool2d(f_edge, grid(f4)))
        return Guided(f4, condition, torch.zeros_like(f4))

    def loss(self, f_edge: Tensor, f_cat: Tensor, edges_target: Tensor) -> Tensor:
        """No loss of its own: a zero scalar."""
        return f_edge.new_zeros(())


GUIDANCES: dict[str, type[nn.Module]] = {
    "stopgrad": StopGradient,
    "joint": Joint,
    "shift": ConditionalShift,
    "condition": EdgeCondition,
}


def _head_after(part: nn.Module, channels: int) -> nn.Module:
    trainable = any(parameter.requires_grad for parameter in part.parameters())
    return EdgeHead(channels) if trainable else NoHead()


def _nothing(f4: Tensor) -> Tensor:
    """A condition without channels: [B,0,h,w]."""
    return f4[:, :0]
