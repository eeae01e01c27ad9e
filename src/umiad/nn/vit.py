"""Parts of a vision transformer in plain torch: patches of an image, their fixed positions, and a block."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-6
"""Of every LayerNorm, as published for the ViT (torch's own is 1e-5)."""
MLP_RATIO = 4
"""Hidden units of a block's MLP, as a multiple of its width."""
BASE = 10_000.0
"""Wavelengths of the position code run from 2 pi to 2 pi times this."""


def patchify(images: Tensor, patch: int) -> Tensor:
    """Images [B,C,H,W] -> patches [B,N,patch*patch*C], row by row; a patch's values pixel by pixel, C last.

    H and W are multiples of `patch`; N = H W / patch^2.
    """
    count, channels, height, width = images.shape
    cells = images.reshape(count, channels, height // patch, patch, width // patch, patch)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(count, -1, patch * patch * channels)


def unpatchify(patches: Tensor, patch: int) -> Tensor:
    """The inverse of `patchify` for square images: [B,N,patch*patch*C] -> [B,C,S,S], S = patch sqrt(N)."""
    count, cells, values = patches.shape
    side, channels = round(cells**0.5), values // patch**2
    images = patches.reshape(count, side, side, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
    return images.reshape(count, channels, side * patch, side * patch)


def position_code(width: int, side: int) -> Tensor:
    """Fixed codes [side*side,width] of a grid's cells, row by row, in -1..1; `width` is a multiple of 4.

    With w_i = 10000^(-i / n), i = 0..n-1, n = width / 4: [sin(c w), cos(c w), sin(r w), cos(r w)] of the cell in
    column c and row r. Computed for the grid at hand, so nothing has to be interpolated. He et al., 2022: the
    official code puts columns first, too.
    """
    rates = BASE ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side,width/2]
    columns, rows = axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()


class Attention(nn.Module):
    """Self-attention of `heads` heads: [B,N,width] -> [B,N,width]; `heads` divides `width`. No dropout."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B,N,width] -> what each takes from all of its image, [B,N,width]."""
        query, key, value = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        taken = F.scaled_dot_product_attention(query, key, value)  # [B,heads,N,width/heads]
        out: Tensor = self.proj(taken.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """x + attention(norm x), then x + MLP(norm x): [B,N,width] -> [B,N,width].

    12 width^2 + 13 width numbers. Dosovitskiy et al., ICLR 2021; the MLP has 4 x width hidden units and GELU.
    """

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPSILON)
        self.attention = Attention(width, heads=heads)
        self.norm2 = nn.LayerNorm(width, eps=EPSILON)
        self.mlp = nn.Sequential(
            nn.Linear(width, MLP_RATIO * width), nn.GELU(), nn.Linear(MLP_RATIO * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B,N,width] -> [B,N,width]."""
        tokens = tokens + self.attention(self.norm1(tokens))
        out: Tensor = tokens + self.mlp(self.norm2(tokens))
        return out


def blocks(width: int, *, depth: int, heads: int) -> nn.Sequential:
    """`depth` blocks and a last LayerNorm."""
    stack = [Block(width, heads=heads) for _ in range(depth)]
    return nn.Sequential(*stack, nn.LayerNorm(width, eps=EPSILON))


def init_weights(module: nn.Module) -> None:
    """Draw all linear layers as published for the MAE: Xavier's uniform, biases 0. Uses the global generator."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
