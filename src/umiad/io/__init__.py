"""Reading image files: what a file is, is decided by its content, never by its name.

Every file ends as an `Image` or as exactly one InputError that names the file, the reason and a remedy.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from umiad.errors import InputError
from umiad.io import raster
from umiad.io.source import Limits, Source
from umiad.types import Image

__all__ = ["RASTER_SUFFIXES", "Limits", "looks_like_image", "read_image", "read_mask"]

RASTER_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
READABLE = "PNG, JPEG, TIFF and BMP"
_HEAD_BYTES = 352  # a NIfTI-1 header with its magic number, the longest that is looked at
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # sizes of the known versions of the second BMP header


DEFAULT_LIMITS = Limits()

Reader = Callable[[bytes, Source], Image]

_READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "PNG": raster.read_pixels,
        "JPEG": raster.read_pixels,
        "TIFF": raster.read_pixels,
        "BMP": raster.read_pixels,
    }
)


def read_image(path: str | os.PathLike[str], *, limits: Limits = DEFAULT_LIMITS) -> Image:
    """Decode one PNG, JPEG, TIFF or BMP file -> `Image`, pixels float32 [C,H,W] in 0..1, C = 1 or 3.

    16-bit grey keeps its depth, transparency is composited on black, EXIF orientation is applied.

    Raises:
        InputError: whatever makes the file unusable: missing, not a regular file, no permission, empty, too
            large, too many pixels, unknown format, several frames, damaged, truncated.
    """
    content, source = _load(path, limits)
    return _READERS[source.kind](content, source)


def read_mask(
    paths: Sequence[Path], *, size: tuple[int, int] | None = None, limits: Limits = DEFAULT_LIMITS
) -> np.ndarray:
    """Unite the masks of one image -> bool [H,W], True = abnormal, upright as the image is.

    A pixel counts where its brightest channel is above half of the full range; transparency is ignored.
    No paths give an empty mask of `size` = (height, width), which every mask must have where it is given.

    Raises:
        InputError: a mask cannot be read, its size differs from `size` or from that of the first mask, or
            it holds small label numbers (0, 1, 2) in place of black and white.
    """
    union, expected, whose = None, size, "its image"
    for path in paths:
        content, source = _load(path, limits)
        mask = raster.read_bright(content, source)
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
    if path.is_dir():
        return False
    if path.suffix.lower() in RASTER_SUFFIXES:
        return True
    try:
        return _kind(_read_bytes(path, limit=None, count=_HEAD_BYTES)) in _READERS
    except InputError:
        return False


def _load(path: str | os.PathLike[str], limits: Limits) -> tuple[bytes, Source]:
    """Read a file of a known kind. Raises InputError."""
    content = _read_bytes(path, limit=limits.max_bytes)
    kind = _kind(content[:_HEAD_BYTES])
    if kind not in _READERS:
        found = f"is a {kind} file" if kind else "is of no known image format"
        hint = "convert it to PNG" if kind else "check that it is an image and not damaged"
        raise InputError(path, f"{found}; this version reads {READABLE}", hint)
    return content, Source(os.fspath(path), kind, limits)


def _read_bytes(path: str | os.PathLike[str], *, limit: int | None, count: int = -1) -> bytes:
    """The first `count` bytes (all where negative) of a regular file. Raises InputError.

    Pipes and devices are refused before they are opened; O_NONBLOCK covers a change between the two steps.
    """
    try:
        _check_regular(path, Path(path).stat(), limit=limit)
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
        with os.fdopen(os.open(path, flags), "rb") as file:
            found = os.fstat(file.fileno())
            _check_regular(path, found, limit=limit)
            content = file.read(count if count >= 0 else found.st_size + 1)
    except FileNotFoundError as error:
        raise InputError(path, "no such file", "check the path") from error
    except PermissionError as error:
        raise InputError(
            path, "no permission to read it", "check the permissions of file and folder"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(path, f"cannot be read: {reason}", "check the path and the disk") from error
    if count < 0 and len(content) != found.st_size:
        raise InputError(path, f"changed while it was read ({found.st_size} bytes expected)", "try again")
    return content


def _check_regular(path: str | os.PathLike[str], found: os.stat_result, *, limit: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a special file (pipe, socket or device)"
        raise InputError(path, f"is {kind}, expected a regular image file")
    if found.st_size == 0:
        raise InputError(path, "is empty (0 bytes), expected an image", "copy or export it again")
    if limit is not None and found.st_size > limit:
        raise InputError(
            path,
            f"has {found.st_size} bytes, the ceiling is {limit} bytes",
            "export it smaller, or raise max_bytes",
        )


def _kind(head: bytes) -> str:
    """The format by its magic number, "" where it is unknown.

    DICOM comes first: a file may be DICOM and TIFF at once (DICOM PS3.10, section 7.1, the preamble).
    """
    if head[128:132] == b"DICM":
        return "DICOM"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith((b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")):
        return "TIFF"
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    if head[344:348] in (b"n+1\x00", b"ni1\x00") or head[4:8] in (b"n+2\x00", b"ni2\x00"):
        return "NIfTI"
    return "gzip" if head.startswith(b"\x1f\x8b") else ""
