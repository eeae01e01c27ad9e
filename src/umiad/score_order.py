"""The order of scores as unsigned integers (keys): exact, sorted fast, and packed with what belongs to each score."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def keys_of(scores: Array) -> Array:
    """float32 (float64) scores -> uint32 (uint64) in the same order; -0.0 and 0.0 have one key."""
    bits = scores.dtype.itemsize * 8
    signed = (scores + scores.dtype.type(0)).view(f"i{bits // 8}")  # -0.0 + 0.0 is 0.0
    flip = (signed >> (bits - 1)).view(f"u{bits // 8}") | np.array(1 << (bits - 1), f"u{bits // 8}")
    return signed.view(flip.dtype) ^ flip


def scores_of(keys: Array) -> Array:
    """The scores of keys: the inverse of `keys_of`."""
    bits = keys.dtype.itemsize * 8
    top, one = np.array(1 << (bits - 1), keys.dtype), np.array(1, keys.dtype)
    return (keys ^ ((keys >> np.array(bits - 1, keys.dtype)) - one | top)).view(f"f{bits // 8}")


def descending(positive: Array, areas: NDArray[np.uint32]) -> tuple[Array, NDArray[np.uint32]]:
    """Keys by falling order with their areas, equal keys by falling area: the same for every way to sort.

    Keys of 4 bytes are sorted in place, packed with the areas.
    """
    if positive.dtype.itemsize == 8:
        order = np.argsort(positive)
        ascending = positive[order]
        if (ascending[1:] == ascending[:-1]).any():
            order = np.lexsort((areas, positive))
        return positive[order[::-1]], areas[order[::-1]]
    packed = positive.astype(np.uint64)
    packed <<= np.uint64(32)
    packed |= areas
    packed.sort()
    areas[:] = packed[::-1] & np.uint64(0xFFFFFFFF)
    packed >>= np.uint64(32)
    positive[:] = packed[::-1]
    return positive, areas
