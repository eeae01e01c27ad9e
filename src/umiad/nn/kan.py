"""Kolmogorov-Arnold layers: trained functions of one variable each, written as sums of fixed bumps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

POINTS = 8
"""Bumps per input."""
RANGE = (-2.0, 2.0)
"""First and last of their centres, which are equally spaced."""
WIDTH = 0.33
"""What the distance to a centre is divided by."""


class KanLayer(nn.Module):
    """y_o = sum_i f_oi(z_i) with z = LayerNorm(x) and f_oi(z) = sum_g w_oig (1 - tanh^2((z - g) / 0.33)).

    x [...,inputs] -> y [...,outputs]. The centres g are fixed: 8 in -2..2. Only LayerNorm's numbers (2 per input)
    and the weights w, [outputs,inputs*8], are trained; there is no bias. Source: "FasterKAN", as in MedViTV2.
    """

    points: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        self.register_buffer("points", torch.linspace(*RANGE, POINTS), persistent=False)
        self.weights = nn.Linear(inputs * POINTS, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs x [...,inputs] -> y [...,outputs]."""
        bumps = 1 - torch.tanh((self.norm(x)[..., None] - self.points) / WIDTH).square()
        y: Tensor = self.weights(bumps.flatten(-2))
        return y


def kan(sizes: Sequence[int]) -> nn.Sequential:
    """Layers one after another: `sizes` are the first one's inputs and the outputs of each."""
    return nn.Sequential(*(KanLayer(a, b) for a, b in pairwise(sizes)))
