"""Which images are the same: equal bytes, equal pixels, or nearly equal at a glance."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from umiad.burnt_in import find_burnt_in
from umiad.cases import case_images, case_pixels, renamed
from umiad.errors import InputError
from umiad.preprocess import luminance
from umiad.types import Case, Image

EDGE = 16  # the thumbnail is 16x16; its 256 comparisons with the mean are the average hash
MAX_BITS = 6
MIN_CORRELATION = 0.99
CHROMA = 20 / 255  # a pixel is coloured when its channels differ by more
HASH_MARGIN = 1e-4  # of full range: a flat image gives no random bits
BLOCK_ROWS = 256


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """What one image is known by.

    `sha256`: of the file's bytes (of the pixels where there never was a file); `pixels`: SHA-256 of the
    luminance and its size, so a file saved again without loss is recognised; `hash`: 32 bytes, the 256-bit
    average hash; `thumbnail`: float32 [16,16] in 0..1, area means of the luminance. `height`, `width`,
    `mode`, `bits` as in `Image`; `coloured`: fraction of pixels whose channels differ by more than 20/255.
    `burnt_in`: characters and marks found in the pixels (see `umiad.burnt_in`); `patient` as in `Image`.
    """

    sha256: str
    pixels: str
    hash: bytes
    thumbnail: np.ndarray = field(repr=False)
    height: int
    width: int
    mode: str
    bits: int
    coloured: float
    burnt_in: int = 0
    patient: str = field(default="", repr=False)


def fingerprint(source: Case | str | os.PathLike[str]) -> Fingerprint:
    """Decode one image and describe it. Raises InputError when it cannot be read."""
    case = source if isinstance(source, Case) else Case(Path(source))
    return _describe(case_pixels(case), case_sha256(case))


def fingerprints(
    cases: Sequence[Case], *, threads: int = 2, progress: Callable[[int, int], None] | None = None
) -> list[Fingerprint | InputError]:
    """Fingerprints in the order of `cases`; an unreadable file leaves its InputError in its place.

    Slices of one file that follow each other are one job. `progress(done, total)` is called from the calling
    thread after each job.
    """
    results: list[Fingerprint | InputError | None] = [None] * len(cases)
    done = 0
    with ThreadPoolExecutor(max_workers=max(threads, 1)) as pool:
        jobs = {pool.submit(_fingerprints_of, [cases[k] for k in rows]): rows for rows in _by_file(cases)}
        try:
            for job in as_completed(jobs):
                for row, found in zip(jobs[job], job.result(), strict=True):
                    results[row] = found
                done += len(jobs[job])
                if progress is not None:
                    progress(done, len(cases))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [each for each in results if each is not None]


def _by_file(cases: Sequence[Case]) -> list[list[int]]:
    """Rows of the cases, those that follow each other and lie in one file together."""
    runs: list[list[int]] = []
    for row, case in enumerate(cases):
        if row and case.frame is not None and case.path == cases[row - 1].path:
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs


def _fingerprints_of(cases: Sequence[Case]) -> list[Fingerprint | InputError]:
    """Fingerprints of cases that lie in one file."""
    found: list[Fingerprint | InputError] = []
    hashes = CaseHashes()
    for case, image in zip(cases, case_images(cases), strict=True):
        try:
            found.append(image if isinstance(image, InputError) else _describe(image, hashes.of(case)))
        except InputError as error:
            found.append(renamed(error, case))
    return found


def _describe(image: Image, digest: str) -> Fingerprint:
    grey = luminance(image.pixels)[0]
    thumbnail = _thumbnail(grey)
    return Fingerprint(
        sha256=digest,
        pixels=_pixel_hash(grey),
        hash=np.packbits(thumbnail > thumbnail.mean(dtype=np.float64) + HASH_MARGIN).tobytes(),
        thumbnail=thumbnail,
        height=image.size[0],
        width=image.size[1],
        mode=image.mode,
        bits=image.bits,
        coloured=_coloured(image),
        burnt_in=find_burnt_in(grey).count,
        patient=image.patient,
    )


def case_sha256(case: Case) -> str:
    """Content hash of a case: of its file's bytes (and frame), or of its pixels where it never was a file."""
    return CaseHashes().of(case)


class CaseHashes:
    """`case_sha256` of many cases; a file of many slices is read once."""

    def __init__(self) -> None:
        self._files: dict[Path, str] = {}

    def of(self, case: Case) -> str:
        """The content hash of a case. Raises InputError when its file cannot be read."""
        if case.image is not None:
            return hashlib.sha256(np.ascontiguousarray(case.image.pixels).tobytes()).hexdigest()
        if case.path not in self._files:
            self._files[case.path] = file_sha256(case.path)
        digest = self._files[case.path]
        return digest if case.frame is None else hashlib.sha256(f"{digest}#{case.frame}".encode()).hexdigest()


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, hexadecimal. Raises InputError when it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(path, f"cannot be read: {error.strerror}", "check the permissions") from error


def near_groups(prints: Sequence[Fingerprint]) -> list[tuple[int, ...]]:
    """Groups of near-duplicates, as indices into `prints`: the connected components of at least two.

    Two images are near when their average hashes differ in at most 6 of 256 bits and their 16x16 thumbnails
    correlate above 0.99. The test is coarse: keep such images on one side of a split, look before dropping
    one. Images without any structure are near to nothing.
    """
    if not prints:
        return []
    bits = np.stack([np.unpackbits(np.frombuffer(each.hash, np.uint8)) for each in prints]).astype(np.float32)
    flat = np.stack([each.thumbnail.ravel() for each in prints]).astype(np.float64)
    flat -= flat.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    unit = (flat / np.maximum(norms, HASH_MARGIN)).astype(np.float32)
    return components(len(prints), _near_pairs(bits, unit))


def equal_groups(keys: Sequence[Hashable]) -> list[tuple[int, ...]]:
    """Groups of at least two indices with equal keys, in order of first appearance."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def components(count: int, pairs: np.ndarray) -> list[tuple[int, ...]]:
    """Connected components of at least two among 0..count-1; `pairs` int [N,2] are the edges."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(pairs):
        return []
    edges = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return equal_groups(connected_components(edges, directed=False)[1].tolist())


def _near_pairs(bits: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Index pairs [N,2] that are near, block by block so that memory stays linear. bits, unit [M,256]."""
    ones = bits.sum(axis=1)

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(bits), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            differing = ones[rows, None] + ones[None] - 2 * bits[rows] @ bits.T
            near = (differing <= MAX_BITS) & (unit[rows] @ unit.T > MIN_CORRELATION)
            yield np.argwhere(near) + np.array([start, 0])

    pairs = np.concatenate(list(blocks()))
    return pairs[pairs[:, 0] < pairs[:, 1]]


def _thumbnail(grey: np.ndarray) -> np.ndarray:
    """Area means [H,W] -> float32 [16,16]."""
    from PIL import Image as Pillow

    picture = Pillow.fromarray(np.ascontiguousarray(grey, dtype=np.float32))
    return np.asarray(picture.resize((EDGE, EDGE), Pillow.Resampling.BOX), dtype=np.float32)


def _pixel_hash(grey: np.ndarray) -> str:
    """Hash of the luminance in steps of 1/65535: rounding in the last bit of float32 does not matter."""
    steps = np.rint(grey.astype(np.float64) * 65535).astype("<u2")
    return hashlib.sha256(repr(grey.shape).encode() + steps.tobytes()).hexdigest()


def _coloured(image: Image) -> float:
    """Fraction of coloured pixels, 0 for a grey image."""
    if image.pixels.shape[0] == 1:
        return 0.0
    return float((np.ptp(image.pixels, axis=0) > CHROMA).mean())
