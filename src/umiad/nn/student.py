"""A student that imitates a frozen network, and the losses on those positions where it does worst."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from umiad.nn.encoder import seeded
from umiad.nn.resnet import ResNet

MARGIN_KEPT = 0.01
"""Share of the previous margin in the next one."""


class Student(nn.Module):
    """The stages of a ResNet that lead to `depth` (1 to 4), all trainable, its weights drawn from `seed`.

    images [B,3,S,S], normalised, S a multiple of 32 -> (F1, ..., F_depth) as `Pyramid` yields them. Unlike there,
    BatchNorm takes the batch's statistics in training mode; with one image per batch S must be 64 or more.
    """

    def __init__(self, backbone: str, *, depth: int, seed: int) -> None:
        super().__init__()
        with seeded(seed):
            self.network = ResNet(backbone, depth=depth)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The maps of all stages, finest first."""
        maps: tuple[Tensor, ...] = self.network(images)
        return maps


@dataclass(frozen=True, eq=False)
class Mined:
    """The losses of one level on its hard positions, and what was counted as hard.

    `distance` L_ps and `context` L_cs, scalars; `margin` without gradient; `share` of the positions kept, 0..1.
    """

    distance: Tensor
    context: Tensor
    margin: Tensor
    share: Tensor


def next_margin(distances: Tensor, previous: Tensor, *, beta: float) -> Tensor:
    """0.01 * previous + 0.99 * (mean + beta * std) of `distances` (any shape), without gradient: a scalar.

    The standard deviation is that of a sample (divided by n - 1); of a single value it is 0.
    """
    values = distances.detach()
    std = values.std() if values.numel() > 1 else values.new_zeros(())
    return MARGIN_KEPT * previous + (1 - MARGIN_KEPT) * (values.mean() + beta * std)


def mine(found: Tensor, wanted: Tensor, previous: Tensor, *, beta: float) -> Mined:
    """The losses on the hard positions of maps [B,C,h,w] whose fibres have length 1.

    Hard are those whose squared distance reaches the margin (see `next_margin`), over the whole batch; where none
    does, the hardest. Cao et al., Informative Knowledge Distillation, 2022: L_ps is their mean, L_cs see
    `context_distance`. Deviation: the official code's mean of an empty selection is not a number.
    """
    distances = (found - wanted).square().sum(1)
    margin = next_margin(distances, previous, beta=beta)
    hard = distances >= torch.minimum(margin, distances.detach().amax())
    fibres = [each.movedim(1, -1)[hard] for each in (found, wanted)]
    return Mined(distances[hard].mean(), context_distance(*fibres), margin, hard.float().mean())


def context_distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared difference of the Gram matrices (N x N) of two sets of fibres [N,C]: a scalar.

    With E = found - wanted, found found' - wanted wanted' = E found' + wanted E'. Its squared norm is taken
    from C x C products, all of which are small when E is: neither memory for N x N numbers, nor differences of
    large ones.
    """
    error = found - wanted
    squares = _inner(error, error, found, found) + _inner(wanted, wanted, error, error)
    cross = _inner(wanted, error, error, found)
    return (squares + 2 * cross).clamp_min(0) / len(found) ** 2


def _inner(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Sum over i, j of (a'b)_ij (c'd)_ij for a, b, c, d [N,C]."""
    return ((a.T @ b) * (c.T @ d)).sum()
