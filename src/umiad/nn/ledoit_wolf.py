"""Gaussians whose covariance is shrunk by Ledoit and Wolf's formula, from sums that are added up batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from umiad.nn.precision import exact

FLOOR = 1e-6
"""Added to the diagonal, as a share of the mean variance: the formula itself may shrink by nothing."""
FACTORISED_AT_ONCE = 1 << 22
"""Numbers of covariance matrices that are computed and factorised together: bounds the memory."""


class Moments:
    """Sums of fibres [P,B,D] of P positions, as many as the formula needs: its memory does not grow with images.

    In float64, relative to `offset` [P,D] (about the mean), so that little cancels.
    """

    def __init__(self, offset: Tensor) -> None:
        positions, dimensions = offset.shape
        self.offset = exact(offset)
        self.count = 0
        self.total = self.offset.new_zeros(positions, dimensions)  # sum of x
        self.outer = self.offset.new_zeros(positions, dimensions, dimensions)  # sum of x x^T
        self.cubed = self.offset.new_zeros(positions, dimensions)  # sum of |x|^2 x
        self.fourth = self.offset.new_zeros(positions)  # sum of |x|^4

    def add(self, fibres: Tensor) -> None:
        """Take fibres [P,B,D] of B images."""
        x = exact(fibres) - self.offset[:, None]
        squared = x.square().sum(2)  # [P,B]
        self.count += x.shape[1]
        self.total += x.sum(1)
        self.outer.baddbmm_(x.mT, x)
        self.cubed += (squared[..., None] * x).sum(1)
        self.fourth += squared.square().sum(1)

    @property
    def mean(self) -> Tensor:
        """Mean [P,D]."""
        return self.offset + self.total / self.count

    @property
    def variance(self) -> float:
        """Mean variance over positions and dimensions, normalised by n; shrinkage does not change it."""
        second = self.outer.diagonal(dim1=1, dim2=2) / self.count
        return float((second - (self.total / self.count).square()).mean())

    def covariance(self, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Shrunk covariances [p,D,D] of some positions, and how far they are shrunk, [p] in 0..1.

        (1 - a) S + a m I, where S is normalised by n, m = tr S / D and a = min(1, b / d) with
        d = |S - m I|^2 and b = sum_k |x_k x_k^T - S|^2 / n^2 about the mean. Ledoit and Wolf, A well-conditioned
        estimator for large-dimensional covariance matrices, 2004.
        """
        n, dimensions = self.count, self.total.shape[1]
        m = self.total[part] / n
        s = self.outer[part] / n - m[:, :, None] * m[:, None]
        level = s.diagonal(dim1=1, dim2=2).mean(1)
        norm = s.square().sum((1, 2))
        apart = (norm - dimensions * level.square()).clamp_min(0)
        noise = (self._fourth_about_mean(m, part) / n - norm).clamp_min(0) / n
        share = torch.where(apart > 0, noise / apart, torch.ones_like(apart)).clamp(0, 1)
        shrunk = (1 - share)[:, None, None] * s
        shrunk.diagonal(dim1=1, dim2=2).add_((share * level)[:, None])
        return shrunk, share

    def _fourth_about_mean(self, m: Tensor, part: slice) -> Tensor:
        """Sum over images of |x - m|^4, [p]: the square of |x|^2 - 2 m x + |m|^2, summed term by term."""
        outer, own = self.outer[part], m.square().sum(1)
        trace = outer.diagonal(dim1=1, dim2=2).sum(1)
        crossed = torch.einsum("pi,pij,pj->p", m, outer, m)
        mixed = -4 * (m * self.cubed[part]).sum(1) - 4 * own * (m * self.total[part]).sum(1)
        return self.fourth[part] + 4 * crossed + self.count * own.square() + mixed + 2 * own * trace


class Gaussians(nn.Module):
    """One Gaussian per position: `mean` [P,D] and `whitening` [P,D,D], zeros before `fill`; float32."""

    mean: Tensor
    whitening: Tensor

    def __init__(self, positions: int, dimensions: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(positions, dimensions))
        self.register_buffer("whitening", torch.zeros(positions, dimensions, dimensions))

    def fill(self, moments: Moments) -> None:
        """Mean, and inverse Cholesky factor of the shrunk covariance, of what `moments` holds (2 images or more).

        Variances have a floor of `FLOOR` times their mean over all positions and dimensions; where nothing varies
        at all, of 1.
        """
        self.mean.copy_(moments.mean)
        variance, dimensions = moments.variance, self.mean.shape[1]
        floor = FLOOR * variance if variance > 0 else 1.0
        block = max(1, FACTORISED_AT_ONCE // dimensions**2)
        for start in range(0, len(self.mean), block):
            part = slice(start, start + block)
            covariance, _ = moments.covariance(part)
            covariance.diagonal(dim1=1, dim2=2).add_(floor)
            factor = torch.linalg.cholesky(covariance)
            identity = torch.eye(dimensions, dtype=factor.dtype, device=factor.device).expand_as(factor)
            inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
            self.whitening[part] = inverse.to(self.whitening)

    def distance(self, fibres: Tensor) -> Tensor:
        """Mahalanobis distances [P,B] of fibres [P,B,D]."""
        centred = (fibres - self.mean[:, None]).mT  # [P,D,B]
        return torch.bmm(self.whitening, centred).square().sum(1).sqrt()
