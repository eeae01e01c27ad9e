"""A conditional affine flow per position, fitted in closed form from sums over images and their mirror images.

Its fit needs no gradient steps: another machine or number of threads changes it by rounding only, which no hundred
epochs amplify, and there is nothing that could be stopped too late.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from umiad.nn.precision import exact
from umiad.nn.products import bmm_by_eights

RIDGE = 0.01
"""Ridge of the regression on the condition, as a multiple of the condition's mean variance."""
POSITIONS_AT_ONCE = 32
"""Positions whose covariances are decomposed together: bounds the memory of a fit."""


class Covariances(NamedTuple):
    """Of z and of z with its twin, [P,C,C] or [C,C] where they are averaged over positions."""

    own: Tensor
    cross: Tensor


class TwinMoments:
    """Sums of fibres, of their outer products, and of those with their twins; P positions, C channels.

    The twin of a fibre is the fibre at the same position of the mirrored image. A pair is taken in both orders, so
    that means and covariances of both are one, and the cross-covariance is symmetric. Float64, relative to `offset`
    [P,C], a point near the mean, so that nothing cancels: 16 P C^2 bytes, whatever the number of images.
    `blocks` are the channels of each scale; with `joint=False` the covariances between scales are taken as zero.
    """

    def __init__(self, offset: Tensor, *, blocks: Sequence[int], joint: bool = True) -> None:
        positions, channels = offset.shape
        self.offset = exact(offset)
        self.count = 0
        self.total = self.offset.new_zeros(positions, channels)
        self.own = self.offset.new_zeros(positions, channels, channels)
        self.cross = self.offset.new_zeros(positions, channels, channels)
        scale = torch.repeat_interleave(torch.arange(len(blocks)), torch.tensor(list(blocks))).to(
            offset.device
        )
        self._kept = (scale[:, None] == scale) | joint

    @staticmethod
    def bytes_needed(positions: int, channels: int) -> int:
        """What the sums of so many positions and channels take."""
        return 16 * positions * channels**2

    def add(self, fibres: Tensor, twins: Tensor) -> None:
        """Take the fibres [B,P,C] of B images and those of their mirror images."""
        first, second = ((exact(each) - self.offset).transpose(0, 1) for each in (fibres, twins))
        self.count += 2 * len(fibres)
        self.total += first.sum(1) + second.sum(1)
        for part in parts(len(self.total)):  # products of all positions at once would be as large as the sums
            own, cross, a, b = self.own[part], self.cross[part], first[part], second[part]
            own.baddbmm_(a.mT, a).baddbmm_(b.mT, b)
            cross.baddbmm_(a.mT, b).baddbmm_(b.mT, a)

    def mean(self) -> Tensor:
        """Mean of the fibres of each position, [P,C]."""
        return self.offset + self.total / self.count

    def covariances(self, part: slice) -> Covariances:
        """Of the positions `part`, normalised by the number of fibres."""
        mean = self.total[part] / self.count
        square = mean[:, :, None] * mean[:, None]
        own, cross = (sums[part] / self.count - square for sums in (self.own, self.cross))
        return Covariances(own * self._kept, cross * self._kept)

    def shared(self) -> Covariances:
        """Averaged over positions, each about its own mean."""
        own, cross = (torch.zeros_like(sums[0]) for sums in (self.own, self.cross))
        for part in parts(len(self.total)):  # all covariances at once would be as large as the sums
            found = self.covariances(part)
            own += found.own.sum(0)
            cross += found.cross.sum(0)
        return Covariances(own / len(self.total), cross / len(self.total))


class AffineFlow(nn.Module):
    """(z, c) -> (u, log_det), affine in z and c, with its own mean and covariance at every position.

    Fibres z, c [B,P,C] -> u [B,P,C] and log_det [P], the natural log of abs(det du/dz) of a position. With
    y = K (z - mean_p - R (c - mean_p)), K and the regression R common to all positions,

        u = y / sqrt(floor_p) + V_p diag(gain_p) V_p^T y,

    which turns N(mean, Sigma_p) into N(0, I), where Sigma_p = K^-1 (floor_p I + V_p diag(l_p) V_p^T) K^-T. Unless it
    is `conditional`, R = 0 and c is not looked at: a null object's call.

    `rank` r of V_p: what is left out of the spectrum goes into floor_p by its mean, so the trace is kept (Tipping
    & Bishop, 1999). The state takes 4 P C (r + 1) bytes.
    """

    mean: Tensor
    whitener: Tensor
    regression: Tensor
    vectors: Tensor
    gain: Tensor
    floor: Tensor
    log_det: Tensor

    def __init__(self, positions: int, channels: int, *, rank: int, conditional: bool) -> None:
        super().__init__()
        rank = min(rank, channels)
        self.register_buffer("mean", torch.zeros(positions, channels))
        self.register_buffer("whitener", torch.zeros(channels, channels).fill_diagonal_(1))
        self.register_buffer("regression", torch.zeros(channels, channels if conditional else 0))
        self.register_buffer("vectors", torch.zeros(positions, channels, rank))
        self.register_buffer("gain", torch.zeros(positions, rank))
        self.register_buffer("floor", torch.ones(positions))
        self.register_buffer("log_det", torch.zeros(positions))

    def forward(self, z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """z, c [B,P,C] -> u [B,P,C], log_det [P]."""
        y = self._whitened(z, c)
        inside = bmm_by_eights(y, self.vectors) * self.gain[:, None]
        u = y * self.floor.rsqrt()[:, None, None] + bmm_by_eights(inside, self.vectors.mT)
        return u.transpose(0, 1), self.log_det

    def mean_square(self, z: Tensor, c: Tensor) -> Tensor:
        """Mean over channels of u^2, >= 0: z, c [B,P,C] -> [B,P]. All of u that a likelihood needs.

        The columns of V_p are orthonormal, so that with y as above

            u^T u = y^T y / floor_p + sum_r ((1 / sqrt(floor_p) + gain_r)^2 - 1 / floor_p) (v_r^T y)^2,

        one product with the vectors, by far the largest part of the state, where u takes two.
        """
        y = self._whitened(z, c)
        inside = bmm_by_eights(y, self.vectors).square()
        weights = self.gain * (self.gain + 2 * self.floor.rsqrt()[:, None])  # [P,r]
        total = y.square().sum(2) / self.floor[:, None] + (inside @ weights[:, :, None])[:, :, 0]
        return total.clamp_min(0).mT / y.shape[2]

    def _whitened(self, z: Tensor, c: Tensor) -> Tensor:
        """K (z - mean - R (c - mean)), [P,B,C]."""
        centred = z - self.mean
        if self.regression.shape[1]:
            centred = centred - (c - self.mean) @ self.regression.mT
        return (centred @ self.whitener.mT).transpose(0, 1)

    def fit(self, moments: TwinMoments, *, prior: float, epsilon: float) -> None:
        """Set all buffers from `moments`.

        Covariances of a position come from few images: they are shrunk towards the one shared by all positions, which
        counts as much as `prior` images and mirror images, and `epsilon` times the mean variance is added to
        the diagonal. That is the posterior mode under an inverse Wishart prior, up to constants.
        """
        own, cross = moments.shared()
        self._regress(own, cross)
        shared = self._residual(Covariances(own, cross))
        variance = shared.diagonal().mean()
        n, channels = moments.count, len(shared)
        base = shared * (prior / (n + prior)) + epsilon * variance * torch.eye(channels).to(shared)
        root = torch.linalg.cholesky(base)
        whitener = torch.linalg.solve_triangular(root, torch.eye(channels).to(root), upper=False)
        self.mean.copy_(moments.mean())
        self.whitener.copy_(whitener)
        for part in parts(len(self.mean)):
            residual = self._residual(moments.covariances(part)) * (n / (n + prior))
            values, vectors, rest = spectrum(whitener @ residual @ whitener.mT, self.vectors.shape[2])
            floor = 1 + rest
            self.vectors[part], self.floor[part] = vectors.to(self.mean), floor.to(self.mean)
            self.gain[part] = ((1 + values).rsqrt() - floor.rsqrt()[:, None]).to(self.mean)
            volume = (1 + values).log().sum(1) + (channels - values.shape[1]) * floor.log()
            self.log_det[part] = (-root.diagonal().log().sum() - 0.5 * volume).to(self.mean)

    def _regress(self, own: Tensor, cross: Tensor) -> None:
        """Ridge regression of the fibres on their condition, the same at every position."""
        if self.regression.shape[1]:
            ridge = RIDGE * own.diagonal().mean() * torch.eye(len(own)).to(own)
            solved = torch.cholesky_solve(cross, torch.linalg.cholesky(own + ridge))
            self.regression.copy_(solved.mT)

    def _residual(self, covariances: Covariances) -> Tensor:
        """Covariance of what the regression leaves, of one shape with its arguments."""
        own, cross = covariances
        if not self.regression.shape[1]:
            return own
        by = self.regression.to(own)
        return own - cross @ by.mT - by @ cross.mT + by @ own @ by.mT


def spectrum(covariance: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading eigenvalues [P,r] and vectors [P,C,r] of [P,C,C], and the mean [P] of the other eigenvalues.

    Probabilistic principal components (Tipping & Bishop, 1999): with the mean of the truncated eigenvalues
    in all directions that are left out, the trace is kept.
    """
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    values, left_out = values.clamp_min(0), values.shape[-1] - rank
    rest = values[:, :left_out].sum(-1) / max(left_out, 1)
    return values[:, left_out:], vectors[:, :, left_out:], rest


def fibres_of(features: Tensor) -> Tensor:
    """[B,C,h,w] -> the fibres of every position, [B,P,C], row by row."""
    return features.flatten(2).transpose(1, 2)


def on_grid(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Values of fibres [...,P,C] -> [...,C,h,w], (h, w) = `size`; the inverse of `fibres_of`."""
    return values.transpose(-1, -2).unflatten(-1, size)


def parts(positions: int) -> list[slice]:
    """Slices of at most POSITIONS_AT_ONCE positions that cover all."""
    count = math.ceil(positions / POSITIONS_AT_ONCE)
    return [slice(k * POSITIONS_AT_ONCE, (k + 1) * POSITIONS_AT_ONCE) for k in range(count)]
