"""The bytes of a file that nobody vouches for, and what kind of file they are."""

from __future__ import annotations

import os
import stat
import zlib
from pathlib import Path

from umiad.errors import InputError

RASTER_KINDS = ("PNG", "JPEG", "TIFF", "BMP")
KINDS = (*RASTER_KINDS, "DICOM", "NIfTI", "NIfTI.gz")
READABLE = "PNG, JPEG, TIFF, BMP, DICOM and NIfTI"
HEAD_BYTES = 1024  # a NIfTI header with its magic number, also where it is compressed
_NIFTI_BYTES = 352
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # sizes of the known versions of the second BMP header
_VRS = frozenset(
    (b"UI", b"UL", b"CS", b"SH", b"LO", b"DA", b"TM", b"OB", b"AE")
)  # at the start of a data set


def read_bytes(path: str | os.PathLike[str], *, limit: int | None, count: int = -1) -> bytes:
    """The first `count` bytes (all where negative) of a regular file of at most `limit` bytes. Raises InputError.

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


def kind_of(head: bytes) -> str:
    """The format by its magic number, from the first bytes of a file; "" where it is unknown.

    DICOM comes first: a file may be DICOM and TIFF at once (DICOM PS3.10, section 7.1, the preamble). Some
    archives leave the preamble out: then the first element must look like one of groups 2 or 8.
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
    if _is_nifti(head):
        return "NIfTI"
    if head.startswith(b"\x1f\x8b"):
        return "NIfTI.gz" if _is_nifti(_inflated(head)) else "gzip"
    return "DICOM" if _is_bare_dicom(head) else ""


def _is_nifti(head: bytes) -> bool:
    return head[344:348] in (b"n+1\x00", b"ni1\x00") or head[4:8] in (b"n+2\x00", b"ni2\x00")


def _inflated(head: bytes) -> bytes:
    """The first bytes inside a gzip file, b"" where they cannot be had."""
    try:
        return zlib.decompressobj(wbits=31).decompress(head, _NIFTI_BYTES)
    except zlib.error:
        return b""


def _is_bare_dicom(head: bytes) -> bool:
    """Whether a file without preamble starts with a small element of group 2 or 8, explicit or implicit."""
    if len(head) < 16 or head[:2] not in (b"\x02\x00", b"\x08\x00") or head[3] != 0 or head[2] > 0x20:
        return False
    return head[4:6] in _VRS or 0 < int.from_bytes(head[4:8], "little") <= 64
