"""Neighbourhood attention: every position looks at the k x k positions around it, never beyond the map."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCORES_AT_ONCE = 1 << 26
"""Products of queries and keys that are computed together: bounds the memory (256 MiB a tensor)."""


def window_starts(length: int, kernel: int) -> Tensor:
    """First position of each position's window of `kernel` out of `length` positions: int64 [length].

    The window is centred where it can be and shifted inward at the ends, so it always holds `kernel` positions.
    """
    return (torch.arange(length) - kernel // 2).clamp(0, length - kernel)


def fitting_kernel(kernel: int, length: int) -> int:
    """`kernel`, or the largest odd number that fits into `length` >= 1 positions."""
    return min(kernel, length - 1 + length % 2)


class NeighbourhoodAttention(nn.Module):
    """Self-attention of `heads` heads within windows of `kernel` x `kernel` positions (odd).

    Fibres [B,h,w,C] -> [B,h,w,C], `heads` divides C. Windows at the border are shifted inward: there is no padding,
    every position sees k^2 keys. To each product q k / sqrt(C / heads) comes a trained number per head and
    relative position, `bias` [heads,2k-1,2k-1]. On maps with h or w below `kernel`, k shrinks along that axis to the
    largest odd number that fits. No dilation.

    A row of queries meets all keys of its k rows in one product, those outside of the windows are masked: w / k
    times as many products as needed, in 1/k-th of the memory that a copy of each window would take.

    Source: Hassani et al., Neighborhood Attention Transformer, CVPR 2023, arXiv:2204.07143, written anew.
    """

    def __init__(self, channels: int, *, heads: int, kernel: int = 7) -> None:
        super().__init__()
        self.heads, self.kernel = heads, kernel
        self.qkv = nn.Linear(channels, 3 * channels)
        self.bias = nn.Parameter(torch.zeros(heads, 2 * kernel - 1, 2 * kernel - 1))
        self.proj = nn.Linear(channels, channels)

    def forward(self, fibres: Tensor) -> Tensor:
        """Fibres [B,h,w,C] -> [B,h,w,C]."""
        count, h, w, _ = fibres.shape
        query, key, value = self.qkv(fibres).unflatten(3, (3, self.heads, -1)).permute(3, 0, 4, 1, 2, 5)
        high, wide = fitting_kernel(self.kernel, h), fitting_kernel(self.kernel, w)
        rows = window_starts(h, high)[:, None] + torch.arange(high)  # [h,high]
        mask = self._mask(rows, w, wide)
        block = h  # in a graph that is exported the batch is free, and cannot say how many rows fit
        if not torch.compiler.is_exporting():
            block = max(1, SCORES_AT_ONCE // (count * self.heads * w * high * w))
        found = []
        for start in range(0, h, block):
            part = slice(start, start + block)
            index = rows[part].flatten().to(fibres.device)
            q, bias = query[:, :, part].flatten(1, 2), mask[:, part].flatten(0, 1)  # [B,heads*r,w,d]
            k, v = (
                each.index_select(2, index).unflatten(2, (-1, high)).flatten(1, 2).flatten(2, 3)
                for each in (key, value)
            )  # [B,heads*r,high*w,d]
            taken = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
            found.append(taken.unflatten(1, (self.heads, -1)))
        joined = torch.cat(found, dim=2).permute(0, 2, 3, 1, 4).flatten(3)
        out: Tensor = self.proj(joined)
        return out

    def _mask(self, rows: Tensor, w: int, wide: int) -> Tensor:
        """What is added to the products of each row of queries: [heads,h,w,high*w], -inf outside of the windows.

        `rows` [h,high]: the rows of keys that each row of queries sees.
        """
        down = rows - torch.arange(len(rows))[:, None]  # key's row minus the query's
        across = torch.arange(w) - torch.arange(w)[:, None]  # [query,key]
        first = window_starts(w, wide)[:, None]
        outside = (torch.arange(w) < first) | (torch.arange(w) >= first + wide)
        reach = self.kernel - 1
        vertical = F.one_hot(down + reach, 2 * reach + 1).to(self.bias)  # [h,high,2k-1]
        horizontal = F.one_hot(across.clamp(-reach, reach) + reach, 2 * reach + 1).to(self.bias)
        bias = torch.einsum("nab,ita,jkb->nijtk", self.bias, vertical, horizontal)
        outside = outside[:, None].to(bias.device)  # [query,1,key]
        return bias.masked_fill(outside, -math.inf).flatten(3)
