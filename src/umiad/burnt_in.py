"""Text and marks burnt into the pixels: characters in a row, or a single sharp mark in an empty background.

A detector calls such marks unusual, and where one class has more of them they give the label away. The search is
meant to be right when it speaks: what it does not find may still be there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LONGEST_EDGE = 768
"""Larger images are reduced by whole steps first."""
STROKE = 9
"""Strokes are thinner than this many pixels."""
INK = 0.3
"""A stroke is brighter than what is beside it by this much of the full range."""
HEIGHTS = (6, 40)
FILL = (0.12, 0.92)
EMPTY = 0.06
"""Nothing around a single mark is brighter than this."""
IN_A_ROW = 4


@dataclass(frozen=True)
class BurntIn:
    """What was found: `characters` that stand in rows of at least four, and single `marks` in an empty background."""

    characters: int
    marks: int

    @property
    def count(self) -> int:
        """Everything together; 0 = nothing found."""
        return self.characters + self.marks


def find_burnt_in(grey: np.ndarray) -> BurntIn:
    """Look for text in a grey image [H,W] in 0..1; bright on dark only. Our own method, in whole pixels.

    Strokes (white top-hat) above `INK` are joined to components of a character's size; those of like height in a row
    count as text, a single one counts where everything around it is empty.
    """
    from scipy import ndimage

    step = -(-max(grey.shape) // LONGEST_EDGE)
    image = np.ascontiguousarray(grey[::step, ::step], dtype=np.float32)
    flat = ndimage.grey_opening(image, size=(STROKE, STROKE))
    ink = image - flat > INK
    labels, count = ndimage.label(ink, structure=np.ones((3, 3)))
    if not count or count > 20_000:  # noise, not text
        return BurntIn(0, 0)
    boxes = _characters(labels, count, ink)
    if not len(boxes):
        return BurntIn(0, 0)
    rows = _in_rows(boxes)
    marks = [box for box in boxes[~rows] if _alone(image, labels, box)]
    return BurntIn(int(rows.sum()), len(marks))


def _characters(labels: np.ndarray, count: int, ink: np.ndarray) -> np.ndarray:
    """Boxes [N,4] (top, left, bottom, right) of the components that could be characters."""
    from scipy import ndimage

    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    found = []
    for area, place in zip(areas, ndimage.find_objects(labels), strict=True):
        top, bottom, left, right = place[0].start, place[0].stop, place[1].start, place[1].stop
        height, width = bottom - top, right - left
        if not HEIGHTS[0] <= height <= HEIGHTS[1] or not 2 <= width <= 1.6 * height:
            continue
        if FILL[0] <= area / (height * width) <= FILL[1]:
            found.append((top, left, bottom, right))
    return np.array(found, dtype=np.int64).reshape(-1, 4)


def _in_rows(boxes: np.ndarray) -> np.ndarray:
    """Whether each box [N,4] stands in a row of at least `IN_A_ROW` of like height: bool [N]."""
    from scipy.sparse.csgraph import connected_components

    top, left, bottom, right = boxes.T
    height = (bottom - top).astype(float)
    tall, small = np.maximum.outer(height, height), np.minimum.outer(height, height)
    gap = np.maximum.outer(left, left) - np.minimum.outer(right, right)
    level = np.abs(np.subtract.outer(bottom, bottom)) <= 0.2 * small
    beside = level & (tall <= 1.5 * small) & (gap >= -1) & (gap <= 0.9 * tall)
    _, row = connected_components(beside, directed=False)
    return np.bincount(row)[row] >= IN_A_ROW


def _alone(image: np.ndarray, labels: np.ndarray, box: np.ndarray) -> bool:
    """Whether a component has nothing but emptiness around it, as far as it is high."""
    top, left, bottom, right = (int(edge) for edge in box)
    margin = max(6, (bottom - top) // 2)
    height, width = image.shape
    if top < 1 or left < 1 or bottom > height - 1 or right > width - 1:
        return False
    around = (slice(max(top - margin, 0), bottom + margin), slice(max(left - margin, 0), right + margin))
    inside = np.zeros(image.shape, dtype=bool)
    inside[max(top - 3, 0) : bottom + 3, max(left - 3, 0) : right + 3] = True
    ring = image[around][~inside[around]]
    return bool(ring.size) and float(ring.max()) <= EMPTY
