"""Slabs of pixels: all pixels of many maps by falling score, a bounded number of them at a time.

The maps are read again and again in chunks. A score becomes an unsigned integer of the same order (its key);
counts per range of keys, refined where a range holds too much, say which ranges fit the budget together. A single
key with more pixels than that is not kept but counted: its pixels are equal, so only their numbers matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from umiad.errors import ConfigError, InputError
from umiad.metrics import Array, checked
from umiad.regions import region_areas
from umiad.score_order import descending, keys_of

Chunks = Sequence[tuple[Any, Any]] | Callable[[], Iterable[tuple[Any, Any]]]
"""Pairs of maps [n,H,W] and masks [n,H,W]: a sequence, or a function whose every call starts from the first."""

NAME = "anomaly maps and masks"
BIN_BITS = 16
"""A range of keys is counted in at most 2**BIN_BITS bins: 1 MB of counts."""
POSITIVE_BYTES = {4: 40, 8: 56}
"""Bytes that one abnormal pixel takes at most while its slab is ranked, by the bytes of a key."""


@dataclass(frozen=True)
class Totals:
    """What the first reading finds: counts of pixels and regions, the maps' type, lowest and highest key."""

    n_negative: int
    n_positive: int
    n_regions: int
    dtype: np.dtype[Any]
    lowest: int
    highest: int


@dataclass(frozen=True, eq=False)
class Slab:
    """All pixels of a range of keys: `negative` ascending, `positive` descending with `areas` of their regions."""

    negative: Array
    positive: Array
    areas: NDArray[np.uint32]


@dataclass(frozen=True, eq=False)
class Tie:
    """All pixels of one `key` [1], counted; `areas[a]`: positives in a region of a pixels."""

    key: Array
    n_negative: int
    areas: NDArray[np.int64]


class PixelSlabs:
    """The pixels of `chunks` as slabs by falling score; each takes at most `budget` bytes.

    Beside the budget: one chunk, and 1 MB of counts for each of at most two (float64: four) levels of ranges.
    `passes` counts the readings, `held` is the greatest number of bytes that a slab was given.

    Raises InputError as `umiad.metrics.rank_pixels`, when chunks differ in height or width, and when a
    reading differs from the first; ConfigError when the budget is not positive.
    """

    def __init__(self, chunks: Chunks, *, budget: int) -> None:
        if budget < 1:
            raise ConfigError(f"budget {budget}, expected at least 1 byte")
        if not callable(chunks) and not isinstance(chunks, Sequence):
            raise InputError(
                NAME,
                f"found {type(chunks).__name__}, expected a sequence of chunks or a function that starts a new reading",
                "an iterator can be read once only; give a function that returns a new one",
            )
        self._chunks = chunks
        self._budget = budget
        self.passes = 0
        self.held = 0
        self.totals = self._count()

    def __iter__(self) -> Iterator[Slab | Tie]:
        if self.totals.n_negative + self.totals.n_positive:
            yield from self._range(self.totals.lowest, self.totals.highest)

    def _images(self) -> Iterator[tuple[Array, NDArray[np.bool_]]]:
        """One reading: every map [H,W] with its mask [H,W], checked."""
        self.passes += 1
        shape: tuple[int, ...] | None = None
        for number, chunk in enumerate(self._chunks() if callable(self._chunks) else self._chunks):
            if not isinstance(chunk, tuple | list) or len(chunk) != 2:
                raise InputError(
                    f"{NAME}, chunk {number}", f"found {type(chunk).__name__}, expected a pair of [n,H,W]"
                )
            maps, masks = checked(*chunk, ndim=3, name=f"{NAME}, chunk {number}")
            if shape is not None and maps.shape[1:] != shape:
                found = f"maps of {list(maps.shape[1:])}, expected {list(shape)} as in the chunks before"
                raise InputError(f"{NAME}, chunk {number}", found)
            shape = maps.shape[1:]
            yield from zip(maps, masks, strict=True)

    def _keys(self, lowest: int, highest: int) -> Iterator[tuple[Array, NDArray[np.bool_], Array]]:
        """One reading: keys [H,W], mask [H,W] and which pixels lie in the range (ends included)."""
        for scores, mask in self._images():
            keys = keys_of(scores.astype(self.totals.dtype, copy=False))
            inside = (keys >= keys.dtype.type(lowest)) & (keys <= keys.dtype.type(highest))
            if inside.any():
                yield keys, mask, inside

    def _count(self) -> Totals:
        dtype, n_positive, n_regions, n_pixels = np.dtype(np.float32), 0, 0, 0
        low, high = np.inf, -np.inf
        for scores, mask in self._images():
            dtype = np.promote_types(dtype, scores.dtype)
            n_pixels += scores.size
            n_positive += int(np.count_nonzero(mask))
            n_regions += region_areas(mask)[1]
            if scores.size:
                low, high = min(low, float(scores.min())), max(high, float(scores.max()))
        lowest, highest = keys_of(np.array([low, high], dtype=dtype)).tolist()
        return Totals(n_pixels - n_positive, n_positive, n_regions, dtype, lowest, highest)

    def _range(self, lowest: int, highest: int) -> Iterator[Slab | Tie]:
        """The slabs of a range of keys, by falling key."""
        shift = max(0, (highest - lowest).bit_length() - BIN_BITS)
        counts = self._histogram(lowest, highest, shift)
        if (lowest, highest) == (self.totals.lowest, self.totals.highest):
            self._compare(counts.sum(axis=1), (self.totals.n_negative, self.totals.n_positive))
        for first, last in self._groups(counts):
            start, stop = lowest + (first << shift), min(highest, lowest + ((last + 1) << shift) - 1)
            n_negative, n_positive = (int(each) for each in counts[:, first : last + 1].sum(axis=1))
            if self._cost(n_negative, n_positive) <= self._budget:
                yield self._slab(start, stop, n_negative, n_positive)
            elif start == stop:
                yield self._tie(start, n_negative, n_positive)
            else:
                yield from self._range(start, stop)

    def _groups(self, counts: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
        """First and last bin of each slab, by falling score: as many bins as fit the budget, one at least."""
        filled = np.flatnonzero(counts.sum(axis=0))[::-1].tolist()
        last = filled[0] if filled else 0
        first, negative, positive = last, 0, 0
        for place in filled:
            n_negative, n_positive = counts[:, place].tolist()
            if (
                negative + positive
                and self._cost(negative + n_negative, positive + n_positive) > self._budget
            ):
                yield first, last
                last, negative, positive = place, 0, 0
            first, negative, positive = place, negative + n_negative, positive + n_positive
        if filled:
            yield first, last

    def _cost(self, n_negative: int, n_positive: int) -> int:
        size = self.totals.dtype.itemsize
        return n_negative * size + n_positive * POSITIVE_BYTES[size]

    def _histogram(self, lowest: int, highest: int, shift: int) -> NDArray[np.int64]:
        """Pixels per bin of 2**shift keys: [2,bins], negatives and positives."""
        bins = ((highest - lowest) >> shift) + 1
        counts = np.zeros(2 * bins, dtype=np.int64)
        for keys, mask, inside in self._keys(lowest, highest):
            chosen = (keys[inside] - keys.dtype.type(lowest)) >> keys.dtype.type(shift)
            counts += np.bincount(chosen.astype(np.int64) * 2 + mask[inside], minlength=2 * bins)
        return counts.reshape(bins, 2).T

    def _slab(self, lowest: int, highest: int, n_negative: int, n_positive: int) -> Slab:
        self.held = max(self.held, self._cost(n_negative, n_positive))
        kind = f"u{self.totals.dtype.itemsize}"
        negative, positive = np.empty(n_negative, kind), np.empty(n_positive, kind)
        areas = np.empty(n_positive, dtype=np.uint32)
        below = above = 0
        for keys, mask, inside in self._keys(lowest, highest):
            normal = keys[inside & ~mask]
            hit = inside[mask]
            found = below + len(normal), above + int(np.count_nonzero(hit))
            if found[0] > n_negative or found[1] > n_positive:
                self._compare(found, (n_negative, n_positive))
            negative[below : found[0]] = normal
            if found[1] > above:
                positive[above : found[1]] = keys[mask][hit]
                areas[above : found[1]] = region_areas(mask)[0][hit]
            below, above = found
        self._compare((below, above), (n_negative, n_positive))
        negative.sort()
        return Slab(negative, *descending(positive, areas))

    def _tie(self, key: int, n_negative: int, n_positive: int) -> Tie:
        negative, areas = 0, np.zeros(1, dtype=np.int64)
        for _, mask, inside in self._keys(key, key):
            negative += int(np.count_nonzero(inside & ~mask))
            hit = inside[mask]
            if hit.any():
                areas = add_counts(areas, np.bincount(region_areas(mask)[0][hit]))
        self._compare((negative, int(areas.sum())), (n_negative, n_positive))
        return Tie(np.array([key], f"u{self.totals.dtype.itemsize}"), negative, areas)

    def _compare(self, found: Iterable[int], expected: tuple[int, int]) -> None:
        found = tuple(int(each) for each in found)
        if found != expected:
            raise InputError(
                NAME,
                f"reading {self.passes} found {found[0]} normal and {found[1]} abnormal pixels in a range of scores, "
                f"expected {expected[0]} and {expected[1]} as in an earlier one",
                "every reading must give the same maps and masks",
            )


def add_counts(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sum of two counts by area that may differ in length."""
    longer, shorter = (first, second) if len(first) >= len(second) else (second, first)
    longer = longer.copy()
    longer[: len(shorter)] += shorter
    return longer
