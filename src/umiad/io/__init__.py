"""Reading image files: what a file is, is decided by its content, never by its name.

Every file ends as images or as exactly one InputError that names the file, the reason and a remedy. Decoding
happens in a child process with ceilings (`umiad.io.child`), since a file may come from anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from umiad.errors import InputError
from umiad.io import frames as choices
from umiad.io import pool
from umiad.io.decode import open_images, open_masks
from umiad.io.files import HEAD_BYTES, KINDS, READABLE, kind_of, read_bytes
from umiad.io.source import Limits, Source
from umiad.types import Image, Reading, Stack, framed

__all__ = [
    "RASTER_SUFFIXES",
    "READABLE",
    "SUFFIXES",
    "Limits",
    "expect",
    "kind_of_file",
    "looks_like_image",
    "open_frames",
    "read_frames",
    "read_image",
    "read_mask",
    "read_stack",
]

RASTER_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
SUFFIXES = (*RASTER_SUFFIXES, ".dcm", ".dicom", ".nii", ".nii.gz")
DEFAULT_LIMITS = Limits()
DEFAULT_READING = Reading()


def read_image(
    path: str | os.PathLike[str],
    *,
    frame: int | str = choices.ONE,
    reading: Reading = DEFAULT_READING,
    limits: Limits = DEFAULT_LIMITS,
) -> Image:
    """Decode one image of a PNG, JPEG, TIFF, BMP, DICOM or NIfTI file -> `Image`, float32 [C,H,W] in 0..1.

    16-bit grey keeps its depth, transparency is composited on black, EXIF orientation is applied. DICOM:
    rescale and window are applied (`reading`), MONOCHROME1 is inverted. `frame`: which frame of a multi-frame
    file, or slice of a volume: a number from 0, "middle", or "one" (the default: a file with several is an error
    that says how many).

    Raises:
        InputError: whatever makes the file unusable: missing, not a regular file, no permission, empty, too
            large, too many pixels, unknown format, several frames, damaged, truncated.
    """
    choice = str(frame)
    if choice == choices.ALL or ":" in choice:
        raise InputError(
            path, f"frame {choice!r} may be several images, expected one", "see umiad.io.read_frames"
        )
    [image] = read_frames(path, frames=choice, reading=reading, limits=limits)
    if image.frame is None and choice.isdigit() and int(choice):
        raise InputError(path, f"there is no frame {choice}, it holds a single image")
    return image


def read_frames(
    path: str | os.PathLike[str],
    *,
    frames: str | Sequence[int] = choices.ALL,
    reading: Reading = DEFAULT_READING,
    limits: Limits = DEFAULT_LIMITS,
) -> Iterator[Image]:
    """Decode a file image by image: "all", "one", "middle", "12", "40:90:5" as in Python slices, or numbers.

    A file that is one image by nature yields it, whatever is chosen. Raises InputError as `read_image`, where a
    frame is damaged also after others were given.
    """
    _, images = open_frames(path, frames=frames, reading=reading, limits=limits)
    yield from images


def open_frames(
    path: str | os.PathLike[str],
    *,
    frames: str | Sequence[int] = choices.ALL,
    reading: Reading = DEFAULT_READING,
    limits: Limits = DEFAULT_LIMITS,
) -> tuple[Stack, Iterator[Image]]:
    """What a file holds, and its images as `read_frames` gives them; the former is known at once."""
    if isinstance(frames, str):
        choices.check(frames)
    content, source = _load(path, limits, reading)
    if limits.isolated:
        answers = pool.current().decode(content, source, frames=frames)
        return next(answers), answers  # type: ignore[return-value]
    stack = open_images(content, source)
    numbers = choices.resolve(frames, stack.count, name=source.name, single=stack.single)
    return stack, (_framed(stack.frame(number)) for number in numbers)


def read_stack(
    path: str | os.PathLike[str],
    *,
    reading: Reading = DEFAULT_READING,
    limits: Limits = DEFAULT_LIMITS,
) -> Stack:
    """How many images a file holds, and where they lie; from its header where it has one. Raises InputError.

    Where decoding is isolated the stack's `frame` cannot be called: see `read_frames`.
    """
    content, source = _load(path, limits, reading)
    if not limits.isolated:
        return open_images(content, source)
    [stack] = pool.current().decode(content, source)
    return stack  # type: ignore[return-value]


def read_mask(
    paths: Sequence[Path],
    *,
    size: tuple[int, int] | None = None,
    frame: int | None = None,
    reading: Reading = DEFAULT_READING,
    limits: Limits = DEFAULT_LIMITS,
) -> np.ndarray:
    """Unite the masks of one image -> bool [H,W], True = abnormal, upright as the image is.

    A pixel counts where its brightest channel is above half of the full range; transparency is ignored. In a
    NIfTI volume every label but 0 counts; `frame` is the slice (taken along `reading.axis`).
    No paths give an empty mask of `size` = (height, width), which every mask must have where it is given.

    Raises:
        InputError: a mask cannot be read, its size differs from `size` or from that of the first mask, or
            it holds small label numbers (0, 1, 2) in place of black and white.
    """
    union, expected, whose = None, size, "its image"
    for path in paths:
        mask = _mask(path, frame, reading, limits)
        expected = expected or mask.shape
        if mask.shape != expected:
            raise InputError(
                path,
                f"the mask has {mask.shape[0]} x {mask.shape[1]} pixels (height x width), "
                f"expected {expected[0]} x {expected[1]} as {whose}",
                "save the mask in the size of its image",
            )
        union, whose = (mask if union is None else union | mask), "its image" if size else "the first mask"
    if union is not None:
        return union
    if size is None:
        raise InputError("mask", "no mask files and no size given, expected at least one of them")
    return np.zeros(size, dtype=bool)


def looks_like_image(path: Path) -> bool:
    """Whether a walker through folders should take `path` for an image: by its suffix or by its content.

    A damaged `scan.png` does look like an image (and reading it says what is wrong), a text file does not.
    """
    if os.path.isdir(path):
        return False
    return path.name.lower().endswith(SUFFIXES) or kind_of_file(path) in KINDS


def expect(paths: Sequence[str | os.PathLike[str]]) -> None:
    """Tell that files among `paths` will be read soon: the process that decodes the first one starts meanwhile.

    For programs that have something slow to do first. Of a folder, what it lists first counts. Nothing is raised.
    """
    for path in paths[:1]:
        first = path
        with suppress(OSError):
            if os.path.isdir(path):
                with os.scandir(path) as entries:
                    first = next((entry.path for entry in entries if entry.is_file()), path)
        if (kind := kind_of_file(first)) in KINDS:
            pool.current().prepare(kind)


def kind_of_file(path: str | os.PathLike[str]) -> str:
    """The format of a file by its content (see `files.kind_of`), "" where it is unknown or cannot be read."""
    try:
        return kind_of(read_bytes(path, limit=None, count=HEAD_BYTES))
    except InputError:
        return ""


def _framed(image: Image) -> Image:
    return replace(image, name=framed(image.name, image.frame))


def _mask(path: Path, frame: int | None, reading: Reading, limits: Limits) -> np.ndarray:
    content, source = _load(path, limits, reading)
    choice = choices.ONE if frame is None or not source.kind.startswith("NIfTI") else str(frame)
    if limits.isolated:
        _, image = pool.current().decode(content, source, frames=choice, mask=True)
    else:
        stack = open_masks(content, source)
        numbers = choices.resolve(choice, stack.count, name=source.name, single=stack.single)
        [image] = map(stack.frame, numbers)
    return image.pixels[0] > 0.5  # type: ignore[union-attr]


def _load(path: str | os.PathLike[str], limits: Limits, reading: Reading) -> tuple[bytes, Source]:
    """Read a file of a known kind. Raises InputError."""
    content = read_bytes(path, limit=limits.max_bytes)
    kind = kind_of(content[:HEAD_BYTES])
    if kind not in KINDS:
        found = f"is a {kind} file" if kind else "is of no known image format"
        hint = "convert it to PNG" if kind else "check that it is an image and not damaged"
        raise InputError(path, f"{found}; this version reads {READABLE}", hint)
    plain = Source(os.fspath(path), kind, limits, key=pool.patient_key())
    return content, replace(plain, window=reading.window, axis=reading.axis, nan=reading.nan)
