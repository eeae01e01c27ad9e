"""The maps and masks of a test set that count for pixel metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from umiad.errors import InputError
from umiad.metrics import Array, as_array

IMAGES_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class PixelSet:
    """Maps [N,H,W] and masks ([H,W] each, None = nothing abnormal) of all images; `rows` [n]: those that count.

    Nothing is copied before it is asked for: maps may lie in a file.
    """

    maps: Array
    masks: Sequence[Any] | Array
    rows: NDArray[np.intp]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the maps that count."""
        return len(self.rows) * int(np.prod(self.maps.shape[1:])) * self.maps.dtype.itemsize

    def whole(self) -> tuple[Array, NDArray[np.bool_]]:
        """Maps [n,H,W] and masks [n,H,W] that count, all at once."""
        return self._part(self.rows)

    def parts(self) -> Iterator[tuple[Array, NDArray[np.bool_]]]:
        """The same, a few images at a time and in order; can be called again."""
        for start in range(0, len(self.rows), IMAGES_AT_ONCE):
            yield self._part(self.rows[start : start + IMAGES_AT_ONCE])

    def _part(self, rows: NDArray[np.intp]) -> tuple[Array, NDArray[np.bool_]]:
        masks = np.zeros((len(rows), *self.maps.shape[1:]), dtype=bool)
        for place, row in enumerate(rows):
            if (mask := self.masks[row]) is not None:
                masks[place] = as_array(mask)
        return (self.maps if len(rows) == len(self.maps) else self.maps[rows]), masks


def pixel_set(
    maps: Any, masks: Sequence[Any] | Array | None, truth: NDArray[np.bool_]
) -> tuple[PixelSet | None, str]:
    """The images that count for pixel metrics, or None and the reason why there are none.

    `maps` [N,H,W] or None; `masks` one [H,W] or None per image, or None; `truth` [N], True = abnormal. An abnormal
    image without mask is left out, a normal one needs none. Raises InputError on unequal lengths or shapes, on
    masks that are not binary, and on a normal image with lesion pixels.
    """
    if maps is None:
        return None, "no anomaly maps"
    maps = as_array(maps)
    given = [None] * len(truth) if masks is None else list(masks)
    if len(maps) != len(truth) or len(given) != len(truth) or maps.ndim != 3:
        found = f"maps of shape {list(maps.shape)} and {len(given)} masks"
        raise InputError("anomaly maps", f"{found}, expected [N,H,W] and N masks for N = {len(truth)} images")
    rows = np.array(
        [row for row, mask in enumerate(given) if mask is not None or not truth[row]], dtype=np.intp
    )
    if not truth[rows].any():
        return None, "no lesion masks"
    drawn = [row for row in rows.tolist() if given[row] is not None]
    lesions = [row for row in drawn if _has_lesion(given[row], maps.shape[1:], row=row)]
    if wrong := [row for row in lesions if not truth[row]]:
        raise InputError("masks", f"image {wrong[0]} is labelled normal but its mask holds lesion pixels")
    return PixelSet(maps, given, rows), ""


def _has_lesion(mask: Any, shape: tuple[int, ...], *, row: int) -> bool:
    """Whether any pixel of a mask is set; the mask is checked."""
    array = as_array(mask)
    if array.shape != shape:
        raise InputError(
            "masks", f"mask {row} has shape {list(array.shape)}, its map {list(shape)}: expected equal"
        )
    if array.dtype != np.bool_ and not np.isin(array, (0, 1)).all():
        raise InputError("masks", f"mask {row} holds other values than 0 and 1, expected bool or 0 and 1")
    return bool(array.any())
