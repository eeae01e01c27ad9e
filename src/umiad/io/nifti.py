"""NIfTI volumes (.nii and .nii.gz, versions 1 and 2), slice by slice, and anomaly maps written back as volumes.

The header is checked before anything is allocated, gzip is counted while it grows, and axes are turned. Texts
in the header may hold a patient's name: none is ever shown, nor is what nibabel says.

Slices are displayed after turning the volume to RAS+ (axes towards right, anterior, superior), and counted
along it: slice 0 is the lowest (axial), the hindmost (coronal) or the one furthest to the left (sagittal).

- axial: rows from anterior to posterior, columns from the patient's right to left (radiological convention:
  the patient's right is at the left edge);
- coronal: rows from superior to inferior, columns from right to left;
- sagittal: rows from superior to inferior, columns from anterior to posterior.
"""

from __future__ import annotations

import math
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import nibabel
import numpy as np
import numpy.ma  # np.percentile imports it late, and a decoding process can open no files
from nibabel.affines import voxel_sizes
from nibabel.spatialimages import HeaderDataError

from umiad.errors import InputError
from umiad.io.source import Axis, Source
from umiad.types import Geometry, Image, Stack

_HEADS = {348: (nibabel.Nifti1Header, 344, b"1"), 540: (nibabel.Nifti2Header, 4, b"2")}
_LONGEST_HEAD = 544  # a NIfTI-2 header and the four bytes that announce extensions
_UNITS = {1: (1000.0, "metres"), 3: (0.001, "micrometres")}  # of xyzt_units; else millimetres
_STEP = 1 << 14  # compressed bytes at a time; small, since zlib copies what it does not use
_BLOCK = 1 << 20  # inflated bytes, or voxels, at a time
_MOST_MEMBERS = 1 << 16  # of a gzip file; bgzip makes one for each 64 KiB
_MOST_SAMPLED = 1_000_000  # voxels that percentiles are taken from
_MOST_FRACTIONS = 64  # distinct values of a mask that are no whole numbers
_LONGEST_EDGE = 32767  # of a NIfTI-1 file
_FARTHEST = 1e30  # largest number of an affine
_LEAST_VOLUME = 1e-6  # of a voxel relative to that of a box with its edges; below, its axes are one plane
_AXES: dict[Axis, int] = {"sagittal": 0, "coronal": 1, "axial": 2}
_WARNINGS_LOCK = threading.Lock()  # warnings.catch_warnings changes a setting of the whole process
_DAMAGED = "it is damaged or truncated; export it again"


@dataclass(frozen=True, eq=False)
class _Layout:
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


@dataclass(frozen=True, eq=False)
class _Volume:
    """Stored voxels `flat` (a view of the file's bytes), and the smallest and largest of the values."""

    layout: _Layout
    flat: np.ndarray
    low: float
    high: float
    notes: tuple[str, ...]


def open_nifti(content: bytes, source: Source) -> Stack:
    """The slices along `source.axis`, oriented as the module says; each Image is float32 [1,H,W] in 0..1.

    Values are scaled as the header says and mapped by `source.window`, the same way in every slice. "file":
    cal_min..cal_max where cal_max is the larger, else 0..255 of unscaled uint8, else as "percentile".
    "percentile": 0.5 to 99.5 of the finite voxels of the whole volume, of at most a million of them at a
    fixed stride; a note gives both values. "full": the range of the integer type. Voxels that are not finite are
    an error, or taken as 0 with a note (`source.nan`).

    Raises:
        InputError: damaged, truncated, beyond a ceiling, not one grey volume, no invertible affine, voxels that are
            not finite, one value only (without a window to go by); also from `Stack.frame`.
    """
    with _one_error(source):
        volume = _load(content, source)
        low, high, notes = _window(volume, source)

        def show(values: np.ndarray) -> np.ndarray:
            np.clip(values, low, high, out=values)
            values -= low
            values /= high - low
            return values

        return _stack(volume, source, show, notes)


def open_nifti_mask(content: bytes, source: Source) -> Stack:
    """The slices of a mask, as `open_nifti` gives them; pixels are 1.0 where the value is not 0, else 0.0.

    Every label counts as abnormal. Raises InputError as `open_nifti`, and for what is no mask: negative values,
    or more than 64 different values that are no whole numbers.
    """
    with _one_error(source):
        volume = _load(content, source)
        found = ""
        if volume.low < 0:
            found = f"its smallest value is {volume.low:g}, expected 0 and labels above"
        elif _many_fractions(volume):
            found = f"it holds more than {_MOST_FRACTIONS} different values that are no whole numbers"
        if found:
            raise InputError(
                source.name, f"is no mask: {found}", "save abnormal voxels as 1, all others as 0"
            )
        return _stack(volume, source, lambda values: values != 0, ())


def volume_bytes(frames: Sequence[np.ndarray] | np.ndarray, geometry: Geometry) -> bytes:
    """An uncompressed NIfTI-1 file (float32) of one map [H,W] per slice, in the order and orientation of `Stack`.

    The file has the axes and the affine of the volume that `geometry` came from, so both fit voxel on voxel.
    The sform has code 1 (scanner); so has the qform, unless the axes are sheared, which it cannot tell (code 0).
    `geometry` does not know the codes of the volume itself. The unit is millimetres.

    Raises:
        InputError: number or size of the frames differ from `geometry`, which has no invertible affine or more
            than 32767 voxels along an axis.
    """
    name = "anomaly maps"
    affine = np.array(geometry.affine, dtype=np.float64).reshape(4, 4)
    if not _invertible(affine):
        raise InputError(name, "the affine of the volume is not finite or not invertible")
    if not all(1 <= edge <= _LONGEST_EDGE for edge in geometry.shape):
        reason = f"the volume has {_times(geometry.shape)} voxels, NIfTI-1 holds 1 to {_LONGEST_EDGE} along an axis"
        raise InputError(name, reason)
    data = np.zeros(geometry.shape, dtype="<f4", order="F")
    slices = _slices(data, affine, geometry.axis)
    if len(frames) != len(slices):
        raise InputError(name, f"{len(frames)} frames, expected {len(slices)} as the volume has")
    for number, frame in enumerate(frames):
        if np.shape(frame) != slices.shape[1:]:
            found, expected = _times(np.shape(frame)), _times(slices.shape[1:])
            raise InputError(name, f"frame {number} has {found} pixels, expected {expected}")
        slices[number] = frame
    header = nibabel.Nifti1Header(endianness="<")
    header.set_data_dtype(data.dtype)
    header.set_data_shape(data.shape)
    header.set_slope_inter(1, 0)
    header.set_xyzt_units("mm")
    header.set_qform(affine, code=1)  # also sets the voxel size
    if not np.allclose(header.get_qform(), affine, rtol=1e-4, atol=1e-4 * np.abs(affine[:3, :3]).max()):
        header.set_qform(affine, code=0)
    header.set_sform(affine, code=1)
    header["magic"], header["vox_offset"] = b"n+1", 352
    return b"".join([header.binaryblock, bytes(4), data.reshape(-1, order="F").data])


def _stack(
    volume: _Volume, source: Source, show: Callable[[np.ndarray], np.ndarray], notes: tuple[str, ...]
) -> Stack:
    """`show` maps values, float64 [H,W], to 0..1."""
    layout = volume.layout
    slices = _slices(volume.flat.reshape(layout.shape, order="F"), layout.affine, source.axis)
    count, height, width = slices.shape
    if height * width > source.limits.max_pixels or min(height, width) < source.limits.min_edge:
        reason = (
            f"has slices of {height} x {width} pixels, expected at least {source.limits.min_edge} on each edge "
            f"and at most {source.limits.max_pixels}"
        )
        raise InputError(source.name, reason, "choose another axis")
    bits = layout.dtype.itemsize * 8
    spacing = _shown_spacing(layout, source.axis)
    notes = layout.notes + volume.notes + notes

    def frame(number: int) -> Image:
        if not 0 <= number < count:
            reason = f"has no {source.axis} slice {number}, expected 0 to {count - 1}"
            raise InputError(source.name, reason)
        with _one_error(source):
            pixels = show(layout.real(slices[number]))
            pixels = np.ascontiguousarray(pixels[None], dtype=np.float32)
        return Image(pixels, source.name, "NIfTI", bits, notes, spacing, number)

    affine = tuple(float(value) for value in layout.affine.flat)
    return Stack(count, frame, single=False, geometry=Geometry(layout.shape, affine, source.axis))


def _slices(data: np.ndarray, affine: np.ndarray, axis: Axis) -> np.ndarray:
    """A view [N,H,W] of a volume in the file's own axes: its slices as they are displayed."""
    turned = nibabel.apply_orientation(data, nibabel.io_orientation(affine))
    return np.moveaxis(turned, _AXES[axis], 0)[:, ::-1, ::-1].transpose(0, 2, 1)


def _shown_spacing(layout: _Layout, axis: Axis) -> tuple[float, float] | None:
    """Millimetres per pixel of a displayed slice, down the rows and along the columns."""
    own = np.argsort(nibabel.io_orientation(layout.affine)[:, 0])  # the file's axes in the order of RAS
    column, row = (layout.spacing[own[k]] for k in range(3) if k != _AXES[axis])
    return None if row is None or column is None else (row, column)


# --- the file's bytes ------------------------------------------------------------------------------------


@contextmanager
def _one_error(source: Source) -> Iterator[None]:
    """Whatever goes wrong becomes one InputError that repeats nothing of the file; warnings are swallowed."""
    try:
        with _WARNINGS_LOCK, warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except MemoryError as error:
        reason = "there is not enough memory to decode it"
        raise InputError(source.name, reason, "export it smaller") from error
    except Exception as error:
        reason = f"cannot be decoded as NIfTI ({type(error).__name__})"
        raise InputError(source.name, reason, _DAMAGED) from error


def _load(content: bytes, source: Source) -> _Volume:
    """Header, ceilings, data, and one look at every voxel, in this order."""
    if source.kind == "NIfTI.gz":
        layout, stored = _inflate(content, source)
    else:
        layout, stored = _layout(content[:_LONGEST_HEAD], source), memoryview(content)
    if len(stored) < layout.end:
        reason = f"expected {layout.end} bytes, got {len(stored)}: truncated"
        raise InputError(source.name, reason, "copy or export it again")
    flat = np.frombuffer(stored, layout.dtype, math.prod(layout.shape), layout.offset)
    return _survey(flat, layout, source)


def _inflate(content: bytes, source: Source) -> tuple[_Layout, memoryview]:
    """Inflate the header, check it, then inflate the data it declares; what follows is counted, not kept."""
    blocks, head = _blocks(content, source), b""
    for block in blocks:
        head += block
        if len(head) >= _LONGEST_HEAD:
            break
    layout = _layout(head, source)
    _check_growth(layout.end, content, source)
    kept = np.empty(layout.end, dtype=np.uint8).data
    done = min(len(head), len(kept))
    kept[:done] = head[:done]
    for block in blocks:
        part = block[: len(kept) - done]
        kept[done : done + len(part)] = part
        done += len(part)
    return layout, kept[:done]


def _blocks(content: bytes, source: Source) -> Iterator[bytes]:
    """Inflate a gzip file of one or several members, with its checksums, under the ceilings."""
    view, position, total, members = memoryview(content), 0, 0, 0
    while position < len(view) or not members:
        members += 1
        if members > _MOST_MEMBERS:
            raise InputError(source.name, f"has more than {_MOST_MEMBERS} gzip members", "compress it again")
        inflater = zlib.decompressobj(wbits=31)
        while not inflater.eof:
            part = view[position : position + _STEP]
            try:
                block = inflater.decompress(part, _BLOCK)
            except zlib.error as error:
                reason = f"its gzip data are damaged near byte {position} of {len(view)}"
                raise InputError(source.name, reason, "copy or export it again") from error
            if not part and not block and not inflater.eof:
                reason = f"its gzip data end in the middle, after {len(view)} bytes: truncated"
                raise InputError(source.name, reason, "copy or export it again")
            position += len(part) - len(inflater.unused_data if inflater.eof else inflater.unconsumed_tail)
            total += len(block)
            _check_growth(total, content, source)
            yield block


def _check_growth(size: int, content: bytes, source: Source) -> None:
    """Raise InputError where `size` inflated bytes are too many."""
    limits = source.limits
    if size > limits.max_inflated:
        reason = f"its inflated size exceeds the ceiling of {limits.max_inflated} bytes"
        raise InputError(source.name, reason, "export it smaller, or raise max_inflated")
    if size > limits.max_ratio * len(content):
        reason = f"grows to more than {limits.max_ratio} times its {len(content)} bytes when inflated"
        raise InputError(source.name, reason, "save it without compression (.nii), or raise max_ratio")


# --- the header ------------------------------------------------------------------------------------------


def _layout(head: bytes, source: Source) -> _Layout:
    """Check a header against the ceilings and for sense. Raises InputError."""
    header = _header(head, source)
    shape = _shape(header, source)
    dtype = _dtype(header, source)
    offset, least = float(header["vox_offset"]), header.sizeof_hdr + 4
    if not (math.isfinite(offset) and offset.is_integer() and offset >= least):
        reason = f"its data start at byte {offset:g}, expected a whole number from {least} on"
        raise InputError(source.name, reason, _DAMAGED)
    slope, inter, scaling = _scaling(header, source)
    shown = float(header["cal_min"]), float(header["cal_max"])
    valid = all(map(math.isfinite, shown)) and shown[1] > shown[0]
    affine, spacing, placing = _place(header, source)
    notes = scaling + placing
    return _Layout(shape, dtype, int(offset), slope, inter, shown if valid else None, affine, spacing, notes)


def _header(head: bytes, source: Source) -> nibabel.Nifti1Header:
    """The header in its version and byte order; nibabel's own checks, which repeat texts, are left out."""
    sign = "<" if int.from_bytes(head[:4], "little") in _HEADS else ">"
    size = int.from_bytes(head[:4], "little" if sign == "<" else "big")
    if size not in _HEADS:
        raise InputError(source.name, "does not start with a NIfTI header (348 or 540 bytes)", _DAMAGED)
    if len(head) < size:
        reason = f"expected a header of {size} bytes, got {len(head)}: truncated"
        raise InputError(source.name, reason, "copy or export it again")
    kind, start, version = _HEADS[size]
    magic = head[start : start + 4]
    if magic == b"ni" + version + b"\0":
        reason = "is the header of a pair of files (.hdr and .img), expected both in one"
        raise InputError(source.name, reason, "save it as one .nii file")
    if magic != b"n+" + version + b"\0":
        raise InputError(source.name, f"lacks the magic number of NIfTI-{version.decode()}", _DAMAGED)
    if size == 540 and head[8:12] not in (b"\r\n\x1a\n", bytes(4)):
        raise InputError(source.name, "was changed when it was copied as text", "copy it again, as binary")
    return kind(head[:size], endianness=sign, check=False)


def _shape(header: nibabel.Nifti1Header, source: Source) -> tuple[int, int, int]:
    """Voxels along the three axes; as Python's integers, which do not overflow."""
    count, *declared = (int(edge) for edge in header["dim"])
    edges = declared[:count]
    if not 2 <= count <= 7 or min(edges) < 1:
        reason = f"declares {count} dimensions of {_times(edges) or 'no'} voxels, expected 2 or 3, none empty"
        raise InputError(source.name, reason, _DAMAGED)
    if (volumes := math.prod(edges[3:])) > 1:
        reason = f"holds {volumes} volumes ({_times(edges)} voxels), expected one"
        raise InputError(source.name, reason, "take one volume: fslroi, or nibabel's img.slicer[..., 0]")
    shape = (edges[0], edges[1], edges[2] if count > 2 else 1)
    limits = source.limits
    if (voxels := math.prod(shape)) > limits.max_voxels:
        reason = f"declares {_times(shape)} = {voxels} voxels, the ceiling is {limits.max_voxels}"
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
        raise InputError(source.name, reason, _DAMAGED)
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
    if not _invertible(affine):
        reason = "its affine (voxel to millimetres) is not finite or not invertible"
        raise InputError(source.name, reason, "correct its sform or qform")
    lengths = [float(length) for length in voxel_sizes(affine)]
    if all(known) and not np.allclose(lengths[:2], np.array(sizes[:2]) * factor, rtol=0.01):
        notes.append("the pixel sizes of header and affine differ; those of the affine are used")
    spacing = tuple(length if good else None for length, good in zip(lengths, known, strict=True))
    return affine, spacing, tuple(notes)


def _invertible(affine: np.ndarray) -> bool:
    """Whether an affine is finite (also in float32) and its three axes span a volume."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.abs(affine).max() <= _FARTHEST and lengths.min() >= 1 / _FARTHEST):  # NaN fails too
        return False
    return abs(np.linalg.det(affine[:3, :3] / lengths)) >= _LEAST_VOLUME


def _times(edges: Sequence[int]) -> str:
    return " x ".join(str(edge) for edge in edges)


# --- values ----------------------------------------------------------------------------------------------


def _parts(flat: np.ndarray) -> Iterator[np.ndarray]:
    return (flat[start : start + _BLOCK] for start in range(0, len(flat), _BLOCK))


def _survey(flat: np.ndarray, layout: _Layout, source: Source) -> _Volume:
    """Count the voxels that are not finite, and find the smallest and largest value."""
    low, high, bad = math.inf, -math.inf, 0
    for part in _parts(flat):
        if layout.dtype.kind == "f" and not (finite := np.isfinite(part)).all():
            part = part[finite]
            bad += len(finite) - len(part)
        if len(part):
            low, high = min(low, float(part.min())), max(high, float(part.max()))
    found = f"{bad} of {len(flat)} voxels are not finite (NaN or infinite)"
    if bad and source.nan == "error":
        raise InputError(source.name, found, "--nan zero takes them as 0")
    ends = [end * layout.slope + layout.inter for end in (low, high) if bad < len(flat)]
    if not all(map(math.isfinite, ends)):
        raise InputError(source.name, "its scaled values are not finite", "correct scl_slope and scl_inter")
    ends += [0.0] if bad else []
    return _Volume(layout, flat, min(ends), max(ends), (f"{found}; taken as 0",) if bad else ())


def _window(volume: _Volume, source: Source) -> tuple[float, float, tuple[str, ...]]:
    """The values that become 0 and 1, and notes, as `open_nifti` says."""
    layout, window = volume.layout, source.window
    notes: tuple[str, ...] = ()
    if isinstance(window, tuple):
        low, high = window[0] - window[1] / 2, window[0] + window[1] / 2
    elif window == "full":
        if layout.dtype.kind == "f":
            reason = "holds floating-point values, which has no full range"
            raise InputError(source.name, reason, "choose the window percentile, or CENTRE,WIDTH")
        limits = np.iinfo(layout.dtype)
        low, high = sorted(float(end) * layout.slope + layout.inter for end in (limits.min, limits.max))
    elif window == "file" and layout.shown:
        low, high = layout.shown
    elif volume.low == volume.high:
        reason = f"holds one value only ({volume.low:g}): nothing to see"
        raise InputError(source.name, reason, "check that it is the right file")
    elif window == "file" and layout.dtype == np.uint8 and not layout.scaled:
        low, high = 0.0, 255.0
    else:
        low, high, notes = _percentiles(volume)
    if not (low < high and math.isfinite(high - low)):
        reason = f"the window from {low:g} to {high:g} shows nothing, expected a finite width above 0"
        raise InputError(source.name, reason, "choose another window")
    return low, high, notes


def _percentiles(volume: _Volume) -> tuple[float, float, tuple[str, ...]]:
    """Percentiles 0.5 and 99.5 of a fixed sample of the finite voxels, or where equal the whole range."""
    layout, step = volume.layout, -(-len(volume.flat) // _MOST_SAMPLED)
    while math.gcd(step, layout.shape[0] * layout.shape[1]) > 1:  # else it might meet a few columns only
        step += 1
    sample = volume.flat[::step]
    values = layout.real(sample[np.isfinite(sample)])
    low, high = (float(end) for end in np.percentile(values, (0.5, 99.5))) if len(values) else (0.0, 0.0)
    what = f"percentiles 0.5 and 99.5 of {len(values)} voxels" + (f" (one in {step})" if step > 1 else "")
    if not low < high:
        low, high = volume.low, volume.high
        what = "smallest and largest value, since the percentiles are equal"
    return low, high, (f"grey values run from {low:g} to {high:g} ({what})",)


def _many_fractions(volume: _Volume) -> bool:
    """Whether there are more than 64 distinct values that are no whole numbers."""
    layout, found = volume.layout, np.empty(0)
    if layout.dtype.kind != "f" and layout.slope.is_integer() and layout.inter.is_integer():
        return False
    for part in _parts(volume.flat):
        values = layout.real(part)
        found = np.union1d(found, values[values != np.floor(values)])
        if len(found) > _MOST_FRACTIONS:
            return True
    return False
