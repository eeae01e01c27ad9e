"""Matrix products whose rounding does not depend on how many images are scored together."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 8
"""Products with fewer rows go through other code of the processor's library, which adds up in another order."""


def bmm_by_eights(rows: Tensor, matrices: Tensor) -> Tensor:
    """`torch.bmm` of rows [P,B,C] and matrices [P,C,R] -> [P,B,R], with B filled up to a multiple of 8.

    A row's product is then the same, bit for bit, whether it is alone or among many (as far as was seen; libraries
    promise nothing). Little is lost: at such sizes reading the matrices is what takes the time. In a graph that is
    exported, where B is free, it is the plain product.
    """
    if torch.compiler.is_exporting():
        return torch.bmm(rows, matrices)
    count = rows.shape[1]
    missing = -count % ROWS
    if missing:
        rows = torch.cat([rows, rows[:, :1].expand(-1, missing, -1)], dim=1)
    return torch.bmm(rows, matrices)[:, :count]
