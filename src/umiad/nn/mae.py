"""A masked autoencoder: it sees a quarter of an image's patches and predicts the pixels of the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from umiad.nn.encoder import seeded
from umiad.nn.vit import blocks, init_weights, position_code

TOKEN_STD = 0.02
"""Standard deviation of the class and mask tokens before training."""


@dataclass(frozen=True)
class Stack:
    """Size of a transformer: `depth` blocks of `width` channels with `heads` heads."""

    width: int
    depth: int
    heads: int


class MaskedAutoencoder(nn.Module):
    """Encoder on the visible patches only, light decoder with mask tokens; He et al., CVPR 2022.

    Patches are [B,N,P], N = side^2 of P values each; `visible` int64 [B,K] names those that the encoder sees, each
    at most once. Position codes are fixed (`umiad.nn.vit.position_code`), the class token's is 0. All weights are
    drawn from `seed`.
    """

    code: Tensor
    decoder_code: Tensor

    def __init__(self, *, side: int, values: int, encoder: Stack, decoder: Stack, seed: int) -> None:
        super().__init__()
        self.cells = side * side
        with seeded(seed):
            self.embed = nn.Linear(values, encoder.width)
            self.class_token = nn.Parameter(TOKEN_STD * torch.randn(1, 1, encoder.width))
            self.encoder = blocks(encoder.width, depth=encoder.depth, heads=encoder.heads)
            self.decoder_embed = nn.Linear(encoder.width, decoder.width)
            self.mask_token = nn.Parameter(TOKEN_STD * torch.randn(1, 1, decoder.width))
            self.decoder = blocks(decoder.width, depth=decoder.depth, heads=decoder.heads)
            self.predict = nn.Linear(decoder.width, values)
            init_weights(self)
        self.register_buffer("code", position_code(encoder.width, side), persistent=False)
        self.register_buffer("decoder_code", position_code(decoder.width, side), persistent=False)

    def encode(self, patches: Tensor, visible: Tensor) -> Tensor:
        """Patches [B,N,P], visible [B,K] -> tokens [B,1+K,width], the class token first.

        What is not visible is left out before the first layer, so it cannot reach any.
        """
        shown = self.embed(pick(patches, visible)) + self.code[visible]
        tokens: Tensor = self.encoder(
            torch.cat([self.class_token.expand(shown.shape[0], -1, -1), shown], dim=1)
        )
        return tokens

    def decode(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """Tokens [B,1+K,width] of `encode` -> predictions [B,N,P] of all patches."""
        known = self.decoder_embed(tokens)
        count, width = known.shape[0], known.shape[-1]
        places = visible[..., None].expand(-1, -1, width)
        full = self.mask_token.expand(count, self.cells, width).scatter(1, places, known[:, 1:])
        decoded = self.decoder(torch.cat([known[:, :1], full + self.decoder_code], dim=1))
        predicted: Tensor = self.predict(decoded[:, 1:])
        return predicted

    def forward(self, patches: Tensor, visible: Tensor) -> Tensor:
        """Patches [B,N,P], visible [B,K] -> predictions [B,N,P] made from the visible ones alone."""
        return self.decode(self.encode(patches, visible), visible)


def pick(patches: Tensor, chosen: Tensor) -> Tensor:
    """Patches [B,N,P] and numbers [B,K] -> the patches of those numbers, [B,K,P]."""
    return patches.gather(1, chosen[..., None].expand(-1, -1, patches.shape[-1]))


def masked_loss(patches: Tensor, predicted: Tensor, visible: Tensor) -> Tensor:
    """Mean squared error over the values of the masked patches, a scalar; [B,N,P] twice, visible [B,K]."""
    masked = torch.ones(patches.shape[:2], dtype=patches.dtype, device=patches.device)
    masked = masked.scatter(1, visible, 0.0)
    return ((predicted - patches).square().mean(2) * masked).sum() / masked.sum()


def random_visible(count: int, cells: int, *, keep: int, rng: torch.Generator) -> Tensor:
    """For each of `count` images `keep` different patches of `cells`, all choices alike: int64 [count,keep]."""
    return torch.rand(count, cells, generator=rng).argsort(dim=1)[:, :keep]


def partitions(cells: int, *, sets: int, rounds: int, seed: int) -> Iterator[Tensor]:
    """Fixed sets of visible patches: `rounds` times a random partition of 0..cells-1 into `sets` sets, int64 [K].

    In each round every patch is visible once and masked sets - 1 times. Sizes of a round's sets differ by one at
    most. Drawn from numpy's PCG64, whose raw stream is guaranteed for ever, so that a saved model keeps its sets.
    """
    stream = np.random.PCG64(seed)
    for _ in range(rounds):
        order = torch.from_numpy(np.argsort(stream.random_raw(cells), kind="stable"))
        yield from order.tensor_split(sets)
