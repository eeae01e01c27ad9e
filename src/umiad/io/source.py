"""What is known of a file before it is decoded: its name, its kind, the ceilings, and how to read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from umiad.types import Axis, Window

__all__ = ["MIB", "UNSUSPICIOUS", "Axis", "Limits", "Source", "Window"]

MIB = 1 << 20
DAMAGED = "it is damaged or truncated; export it again"
TOO_LARGE = (
    "needs more memory to decode than the ceiling allows",
    "export it smaller, or raise child_memory",
)
"""Reason and hint where memory ends."""
UNSUSPICIOUS = 64 * MIB
"""Bytes that any compressed file may grow to: an ordinary mask, nearly empty, is a thousand times its file."""


@dataclass(frozen=True)
class Limits:
    """Ceilings for one file, checked before it is read or decoded.

    `max_bytes`: size of the file. `max_pixels`: width times height of one image as declared in the header
    (Pillow's own ceiling, 178,956,970 pixels, holds too). `min_edge`: shortest edge in pixels. `max_frames`:
    frames of a DICOM file. `max_voxels`: of a volume. `max_inflated`: bytes that a compressed file may grow to,
    `max_ratio`: times its own size, which counts only beyond 64 MiB (`UNSUSPICIOUS`); both are counted while
    inflating. `isolated`: decode in a child process with at most `child_memory` bytes of address space and
    `child_seconds` of processor time for a file, and for each of its frames.
    """

    max_bytes: int = 64 * MIB
    max_pixels: int = 40_000_000
    min_edge: int = 1
    max_frames: int = 512
    max_voxels: int = 150_000_000
    max_inflated: int = 512 * MIB
    max_ratio: int = 200
    isolated: bool = True
    child_memory: int = 1024 * MIB
    child_seconds: int = 5

    def most_inflated(self, size: int) -> int:
        """Bytes that a compressed file, or the compressed part of one, of `size` bytes may grow to."""
        return min(self.max_inflated, max(UNSUSPICIOUS, self.max_ratio * size))


@dataclass(frozen=True)
class Source:
    """One file to be decoded.

    `kind`: "PNG", "JPEG", "TIFF", "BMP", "DICOM", "NIfTI", "NIfTI.gz". `window`: "file" (what the file says,
    else its full range), "full" (the full stored range), "percentile" (0.5 to 99.5 of the image, or of
    the volume), or (centre, width) in the file's own units. `axis`: direction of a volume's slices.
    `nan`: "error" refuses values that are not finite, "zero" takes them as 0 and counts them. `key`: for the tokens
    of patients.
    """

    name: str
    kind: str
    limits: Limits = field(default_factory=Limits)
    window: Window = "file"
    axis: Axis = "axial"
    nan: Literal["error", "zero"] = "error"
    key: bytes = field(default=b"", repr=False)
