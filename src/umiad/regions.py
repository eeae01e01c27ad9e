"""Connected regions of a mask: the units that AUPRO weighs alike, whatever their size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def region_areas(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], int]:
    """Mask [H,W] -> area in pixels of the 8-connected region of each True pixel (C order), and their number."""
    if not mask.any():
        return np.zeros(0, dtype=np.int64), 0
    from scipy import ndimage

    regions, count = ndimage.label(mask, structure=np.ones((3, 3)))
    number = regions[mask]
    return np.bincount(number)[number], int(count)


def region_weights(mask: NDArray[np.bool_]) -> tuple[NDArray[np.float64], int]:
    """Mask [H,W] -> 1 / area of the 8-connected region of each True pixel (C order), and their number."""
    areas, count = region_areas(mask)
    return 1.0 / areas, count
