"""What a flow over several levels yields, and the density it stands for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Latents:
    """One forward pass: u [B,D_k,h_k,w_k] per level, finest first, and the log_det [B] of the whole network."""

    us: tuple[Tensor, ...]
    log_det: Tensor


def energy(latents: Latents) -> Tensor:
    """0.5 sum u^2 - log_det, [B] in nats: the negative log-likelihood without 0.5 D ln(2 pi)."""
    squares = torch.stack([0.5 * u.square().flatten(1).sum(1) for u in latents.us]).sum(0)
    return squares - latents.log_det


def nats_per_dim(latents: Latents) -> Tensor:
    """Negative log-likelihood of what entered the flow under N(0, I) latents, in nats per dimension, [B]."""
    dimensions = sum(u[0].numel() for u in latents.us)
    return energy(latents) / dimensions + 0.5 * math.log(2 * math.pi)
