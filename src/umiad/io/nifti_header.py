"""The header of a NIfTI volume, checked against the ceilings and for sense before anything is allocated.

Its texts may hold a patient's name: none is ever shown, nor is what nibabel says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import nibabel
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.spatialimages import HeaderDataError

from umiad.errors import InputError
from umiad.io.source import DAMAGED, Source

LONGEST_HEAD = 544
"""Bytes: a NIfTI-2 header and the four that announce extensions."""
"""Hint for whatever breaks the format."""
_HEADS = {348: (nibabel.Nifti1Header, 344, b"1"), 540: (nibabel.Nifti2Header, 4, b"2")}
_UNITS = {1: (1000.0, "metres"), 3: (0.001, "micrometres")}  # of xyzt_units; else millimetres
_FARTHEST = 1e30  # largest number of an affine
_LEAST_VOLUME = 1e-6  # of a voxel relative to that of a box with its edges; below, its axes are one plane


@dataclass(frozen=True, eq=False)
class Layout:
    """What the header declares. `spacing` along the file's axes in millimetres, None where it is unknown.

    Values are stored * `slope` + `inter`; `shown` is the range to display (cal_min, cal_max) or None.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype
    offset: int
    slope: float
    inter: float
    shown: tuple[float, float] | None
    affine: np.ndarray
    spacing: tuple[float | None, ...]
    notes: tuple[str, ...]

    @property
    def end(self) -> int:
        """Bytes of the file up to the end of the data."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize

    @property
    def scaled(self) -> bool:
        """Whether values differ from what is stored."""
        return (self.slope, self.inter) != (1.0, 0.0)

    def real(self, stored: np.ndarray) -> np.ndarray:
        """Values, float64; what is not finite becomes 0."""
        values = stored.astype(np.float64)
        if self.scaled:
            values *= self.slope
            values += self.inter
        if self.dtype.kind == "f":
            values[~np.isfinite(values)] = 0.0
        return values


def read_layout(head: bytes, source: Source) -> Layout:
    """Check a header against the ceilings and for sense. Raises InputError."""
    header = _header(head, source)
    shape = _shape(header, source)
    dtype = _dtype(header, source)
    offset, least = float(header["vox_offset"]), header.sizeof_hdr + 4
    if not (math.isfinite(offset) and offset.is_integer() and offset >= least):
        reason = f"its data start at byte {offset:g}, expected a whole number from {least} on"
        raise InputError(source.name, reason, DAMAGED)
    slope, inter, scaling = _scaling(header, source)
    shown = float(header["cal_min"]), float(header["cal_max"])
    valid = all(map(math.isfinite, shown)) and shown[1] > shown[0]
    affine, spacing, placing = _place(header, source)
    notes = scaling + placing
    return Layout(shape, dtype, int(offset), slope, inter, shown if valid else None, affine, spacing, notes)


def _header(head: bytes, source: Source) -> nibabel.Nifti1Header:
    """The header in its version and byte order; nibabel's own checks, which repeat texts, are left out."""
    sign = "<" if int.from_bytes(head[:4], "little") in _HEADS else ">"
    size = int.from_bytes(head[:4], "little" if sign == "<" else "big")
    if size not in _HEADS:
        raise InputError(source.name, "does not start with a NIfTI header (348 or 540 bytes)", DAMAGED)
    if len(head) < size:
        reason = f"expected a header of {size} bytes, got {len(head)}: truncated"
        raise InputError(source.name, reason, "copy or export it again")
    kind, start, version = _HEADS[size]
    magic = head[start : start + 4]
    if magic == b"ni" + version + b"\0":
        reason = "is the header of a pair of files (.hdr and .img), expected both in one"
        raise InputError(source.name, reason, "save it as one .nii file")
    if magic != b"n+" + version + b"\0":
        raise InputError(source.name, f"lacks the magic number of NIfTI-{version.decode()}", DAMAGED)
    if size == 540 and head[8:12] not in (b"\r\n\x1a\n", bytes(4)):
        raise InputError(source.name, "was changed when it was copied as text", "copy it again, as binary")
    return kind(head[:size], endianness=sign, check=False)


def _shape(header: nibabel.Nifti1Header, source: Source) -> tuple[int, int, int]:
    """Voxels along the three axes; as Python's integers, which do not overflow."""
    count, *declared = (int(edge) for edge in header["dim"])
    edges = declared[:count]
    if not 2 <= count <= 7 or min(edges) < 1:
        reason = f"declares {count} dimensions of {times(edges) or 'no'} voxels, expected 2 or 3, none empty"
        raise InputError(source.name, reason, DAMAGED)
    if (volumes := math.prod(edges[3:])) > 1:
        reason = f"holds {volumes} volumes ({times(edges)} voxels), expected one"
        raise InputError(source.name, reason, "take one volume: fslroi, or nibabel's img.slicer[..., 0]")
    shape = (edges[0], edges[1], edges[2] if count > 2 else 1)
    limits = source.limits
    if (voxels := math.prod(shape)) > limits.max_voxels:
        reason = f"declares {times(shape)} = {voxels} voxels, the ceiling is {limits.max_voxels}"
        raise InputError(source.name, reason, "export it smaller, or raise max_voxels")
    return shape


def _dtype(header: nibabel.Nifti1Header, source: Source) -> np.dtype:
    """The type of one grey voxel. Raises InputError for colour, complex numbers, and sizes of 16 bytes."""
    code, bits = int(header["datatype"]), int(header["bitpix"])
    try:
        dtype = np.dtype(header.get_data_dtype())
    except (HeaderDataError, KeyError):
        dtype = np.dtype("V")
    if dtype.kind not in "iuf" or not 1 <= dtype.itemsize <= 8:
        kind = {32: "complex numbers", 128: "RGB colour", 2304: "RGBA colour"}.get(code, "values")
        reason = f"holds {kind} (data type code {code}), expected integers or floats of at most 64 bits"
        raise InputError(source.name, reason, "save one grey channel")
    if bits != dtype.itemsize * 8:
        reason = f"declares {bits} bits per voxel, its data type has {dtype.itemsize * 8}"
        raise InputError(source.name, reason, DAMAGED)
    return dtype


def _scaling(header: nibabel.Nifti1Header, source: Source) -> tuple[float, float, tuple[str, ...]]:
    """Slope, intercept and notes. A slope of 0 means no scaling (the standard), so does NaN (nibabel)."""
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0:
        return 1.0, 0.0, ("scl_slope is 0, which means that values are not scaled",)
    if math.isnan(slope):
        return 1.0, 0.0, ("scl_slope is not a number, taken as not scaled",)
    if not (math.isfinite(slope) and math.isfinite(inter)):
        reason = f"its scaling is {slope:g} and {inter:g}, expected finite numbers"
        raise InputError(source.name, reason, "correct scl_slope and scl_inter")
    return slope, inter, ()


def _place(
    header: nibabel.Nifti1Header, source: Source
) -> tuple[np.ndarray, tuple[float | None, ...], tuple[str, ...]]:
    """Affine 4 x 4 and voxel size per axis in millimetres (None = unknown), and notes.

    Repairs of pixdim as the standard and nibabel have them: its sign is dropped, 0 counts as 1 in the affine.
    """
    notes: list[str] = []
    declared = [abs(float(size)) for size in header["pixdim"][1:4]]
    known = [0 < size < math.inf for size in declared]
    sizes = [size if good else 1.0 for size, good in zip(declared, known, strict=True)]
    known[2] |= int(header["dim"][0]) == 2
    if not all(known):
        notes.append("a voxel size in the header (pixdim) is 0 or no number: the spacing is unknown")
    header["pixdim"][1:4] = sizes
    header["pixdim"][0] = -1.0 if header["pixdim"][0] < 0 else 1.0
    if header["sform_code"] == 0 and header["qform_code"] == 0:
        notes.append("the file names no orientation (sform and qform): left and right may be swapped")
    affine = np.array(header.get_best_affine(), dtype=np.float64)
    factor, unit = _UNITS.get(int(header["xyzt_units"]) & 7, (1.0, ""))
    if unit:
        affine[:3] *= factor
        notes.append(f"positions are given in {unit} and were converted to millimetres")
    if not invertible(affine):
        reason = "its affine (voxel to millimetres) is not finite or not invertible"
        raise InputError(source.name, reason, "correct its sform or qform")
    lengths = [float(length) for length in voxel_sizes(affine)]
    if all(known) and not np.allclose(lengths[:2], np.array(sizes[:2]) * factor, rtol=0.01):
        notes.append("the pixel sizes of header and affine differ; those of the affine are used")
    spacing = tuple(length if good else None for length, good in zip(lengths, known, strict=True))
    return affine, spacing, tuple(notes)


def invertible(affine: np.ndarray) -> bool:
    """Whether an affine is finite (also in float32) and its three axes span a volume."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.abs(affine).max() <= _FARTHEST and lengths.min() >= 1 / _FARTHEST):  # NaN fails too
        return False
    return abs(np.linalg.det(affine[:3, :3] / lengths)) >= _LEAST_VOLUME


def times(edges: Sequence[int]) -> str:
    """Such as "256 x 256 x 150"."""
    return " x ".join(str(edge) for edge in edges)
