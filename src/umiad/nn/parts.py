"""A batch in parts, so that memory stays bounded whatever its size."""

from __future__ import annotations

import torch
from torch import Tensor


def in_parts(batch: Tensor, size: int) -> tuple[Tensor, ...]:
    """`batch` [B,...] in parts of at most `size` along its first axis.

    All in one while a graph is traced for export: a graph with a free batch cannot loop over it, and what runs it
    takes few images at a time (`umiad.scorer.BATCH_SIZE`).
    """
    return (batch,) if torch.compiler.is_exporting() else batch.split(size)
