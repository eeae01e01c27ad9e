"""Soft choice of the k smallest costs, and the cost of the k nearest of a set of points, in bounded memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from umiad.errors import ConfigError

PAIRS_AT_ONCE = 1 << 20
"""Pairs (fibre, point) compared together: blocks of 4 MiB bound the memory and stay near the processor."""
MAX_STEPS = 100
"""Of the search for a row's shift; halving the bracket alone reaches float64's resolution in about 60."""


def soft_topk(costs: Tensor, *, k: int, eps: float, scale: Tensor | None = None) -> Tensor:
    """Weights in 0..1 of the k smallest of costs [...,n]: larger for smaller costs, the sum over the last axis is k.

    The limit of Sinkhorn's iteration for the transport, with entropy times `eps`, of n costs d with mass 1/n each
    to the anchors 0 (mass k/n) and 1 (the rest) at the price (d - a)^2 / M; a weight is n times what goes to 0.
    With two anchors every weight is sigmoid(lambda - 2 d / (M eps)), and one lambda per row makes them sum to k.
    M is `scale`, which fits costs [...,n], by default the highest (d - a)^2 of all; the gradient takes it as a
    constant. The choice is harder for a smaller `eps`, softer where costs are far above or far below 1.

    Source: Xie et al., Differentiable Top-k Operator with Optimal Transport, NeurIPS 2020, arXiv:2002.06504,
    solved in closed form instead of by iteration. Raises ConfigError unless 1 <= k <= n and eps > 0.
    """
    if not 1 <= k <= costs.shape[-1]:
        raise ConfigError(f"k is {k}, expected 1 to the number of costs, {costs.shape[-1]}")
    if not eps > 0:
        raise ConfigError(f"eps is {eps}, expected above 0")
    highest = (prices(costs).amax() if scale is None else scale).detach()
    weights: Tensor = _SumTo.apply(costs * (-2 / eps / highest), k)
    return weights


def prices(costs: Tensor) -> Tensor:
    """The highest (d - a)^2 over costs d [...,n] of each row and anchors a = 0, 1: [...,1], at least 1/4.

    The batch's own M is the largest of these.
    """
    return ((costs - 0.5).abs().amax(-1, keepdim=True) + 0.5).square()


class _SumTo(torch.autograd.Function):
    """Logits [...,n] -> sigmoid(logits + lambda), lambda such that each row sums to k; implicit gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, k: int) -> Tensor:
        weights = torch.sigmoid(logits + shift(logits, k=k))
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """dA_i/da_j = w_i (delta_ij - w_j / sum w) with w = A (1 - A)."""
        (weights,) = ctx.saved_tensors
        slopes = weights * (1 - weights)
        total = slopes.sum(-1, keepdim=True).clamp_min(torch.finfo(slopes.dtype).tiny)
        mean = (slopes * gradient).sum(-1, keepdim=True) / total
        return slopes * (gradient - mean), None


def shift(logits: Tensor, *, k: int) -> Tensor:
    """The lambda [...,1] for which sigmoid(logits [...,n] + lambda) sums to k along the last axis; infinity for k = n.

    Newton's method on the logarithm of the sum, which is a line where all weights are small, kept inside a
    bracket. Each row ends its search by itself, with the step that cannot be told from the last one needed
    (errors are squared by a step), so its lambda does not depend on the other rows.
    """
    if k == logits.shape[-1]:
        return torch.full_like(logits[..., :1], math.inf)
    middle = math.log(k / (logits.shape[-1] - k))
    low = middle - logits.amax(-1, keepdim=True)
    high = middle - logits.amin(-1, keepdim=True)
    found = (math.log(k) - logits.logsumexp(-1, keepdim=True)).clamp(low, high)
    done, resolution = torch.zeros_like(found, dtype=torch.bool), torch.finfo(logits.dtype).eps
    for _ in range(MAX_STEPS):
        weights = torch.sigmoid(logits + found)
        total = weights.sum(-1, keepdim=True)
        slope = total - weights.square_().sum(-1, keepdim=True)
        step = (math.log(k) - total.log()) * total / slope
        low, high = torch.where(total < k, found, low), torch.where(total > k, found, high)
        newton = found + step
        better = torch.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
        exact = (total - k).abs() <= k * resolution
        found = torch.where(done | exact, found, better)
        done = done | exact | (step.abs() <= math.sqrt(resolution))
        if bool(done.all()):
            break
    return found


def squared_distances(fibres: Tensor, points: Tensor) -> Tensor:
    """Of every fibre [N,C] to every point [n,C]: [N,n], 0 or more.

    Both are taken relative to the points' mean, so that less cancels.
    """
    middle = points.mean(0)
    fibres, points = fibres - middle, points - middle
    norms = fibres.square().sum(1, keepdim=True) + points.square().sum(1)
    return torch.addmm(norms, fibres, points.T, alpha=-2).clamp_min(0)


def distance_prices(fibres: Tensor, points: Tensor, factors: Tensor) -> Tensor:
    """`prices` of each fibre's [N,C] squared distances to points [n,C] times its factor [N]: [N], without gradient."""
    with torch.no_grad():
        rows = max(1, PAIRS_AT_ONCE // len(points))
        blocks = zip(fibres.split(rows), factors.split(rows), strict=True)
        return torch.cat([prices(_multiplied(block, points, each))[:, 0] for block, each in blocks])


def nearest_cost(
    fibres: Tensor, points: Tensor, *, factors: Tensor, scale: Tensor, k: int, eps: float
) -> Tensor:
    """Soft sum of the k smallest costs of each fibre [N,C], its squared distances to points [n,C] times a factor: [N].

    sum_j A_j d_j with the weights A of `soft_topk` at scales [N]; factors [N], 0 or more. Only the fibres get a
    gradient. Memory is that of `PAIRS_AT_ONCE` pairs, in training as well.
    """
    fibres = fibres if torch.is_grad_enabled() else fibres.detach()
    cost: Tensor = _NearestCost.apply(fibres, points.detach(), factors.detach(), scale.detach(), k, eps)
    return cost


def _multiplied(fibres: Tensor, points: Tensor, factors: Tensor) -> Tensor:
    return squared_distances(fibres, points) * factors[:, None]


class _NearestCost(torch.autograd.Function):
    """Blocks of fibres in turn, each with its gradient at once: a fibre's cost depends on no other fibre."""

    @staticmethod
    def forward(
        ctx: Any, fibres: Tensor, points: Tensor, factors: Tensor, scale: Tensor, k: int, eps: float
    ) -> Tensor:  # the arguments of `apply`
        wanted = ctx.needs_input_grad[0]
        rows = max(1, PAIRS_AT_ONCE // len(points))
        costs, slopes = [], []
        for block, each, scales in zip(
            fibres.split(rows), factors.split(rows), scale.split(rows), strict=True
        ):
            with torch.set_grad_enabled(wanted):
                inputs = block.detach().requires_grad_(wanted)
                distances = _multiplied(inputs, points, each)
                cost = (soft_topk(distances, k=k, eps=eps, scale=scales[:, None]) * distances).sum(1)
                if wanted:
                    slopes += torch.autograd.grad(cost.sum(), inputs)
            costs.append(cost.detach())
        ctx.save_for_backward(*([torch.cat(slopes)] if wanted else []))
        return torch.cat(costs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return gradient[:, None] * slopes, None, None, None, None, None
