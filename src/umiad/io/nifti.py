"""NIfTI volumes (.nii and .nii.gz, versions 1 and 2), slice by slice, and anomaly maps written back as volumes.

The header is checked (`nifti_header`) before anything is allocated, gzip is counted while it grows, and axes are
turned. Texts in the header may hold a patient's name: none is ever shown, nor is what nibabel says.

Slices are displayed after turning the volume to RAS+ (axes towards right, anterior, superior), and counted
along it: slice 0 is the lowest (axial), the hindmost (coronal) or the one furthest to the left (sagittal).

- axial: rows from anterior to posterior, columns from the patient's right to left (radiological convention:
  the patient's right is at the left edge);
- coronal: rows from superior to inferior, columns from right to left;
- sagittal: rows from superior to inferior, columns from anterior to posterior.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import nibabel
import numpy as np
import numpy.ma  # np.percentile imports it late, and a decoding process can open no files

from umiad.errors import InputError
from umiad.io.nifti_header import LONGEST_HEAD, Layout, invertible, read_layout, times
from umiad.io.quiet import silent_warnings
from umiad.io.source import DAMAGED, TOO_LARGE, UNSUSPICIOUS, Axis, Source
from umiad.types import Geometry, Image, Stack

_STEP = 1 << 14  # compressed bytes at a time; small, since zlib copies what it does not use
_BLOCK = 1 << 20  # inflated bytes, or voxels, at a time
_MOST_MEMBERS = 1 << 16  # of a gzip file; bgzip makes one for each 64 KiB
_MOST_SAMPLED = 1_000_000  # voxels that percentiles are taken from
_MOST_FRACTIONS = 64  # distinct values of a mask that are no whole numbers
_LONGEST_EDGE = 32767  # of a NIfTI-1 file
_AXES: dict[Axis, int] = {"sagittal": 0, "coronal": 1, "axial": 2}


@dataclass(frozen=True, eq=False)
class _Volume:
    """Stored voxels `flat` (a view of the file's bytes), and the smallest and largest of the values."""

    layout: Layout
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
    if not invertible(affine):
        raise InputError(name, "the affine of the volume is not finite or not invertible")
    if not all(1 <= edge <= _LONGEST_EDGE for edge in geometry.shape):
        reason = (
            f"the volume has {times(geometry.shape)} voxels, NIfTI-1 holds 1 to {_LONGEST_EDGE} along an axis"
        )
        raise InputError(name, reason)
    data = np.zeros(geometry.shape, dtype="<f4", order="F")
    slices = _slices(data, affine, geometry.axis)
    if len(frames) != len(slices):
        raise InputError(name, f"{len(frames)} frames, expected {len(slices)} as the volume has")
    for number, frame in enumerate(frames):
        if np.shape(frame) != slices.shape[1:]:
            found, expected = times(np.shape(frame)), times(slices.shape[1:])
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


def _shown_spacing(layout: Layout, axis: Axis) -> tuple[float, float] | None:
    """Millimetres per pixel of a displayed slice, down the rows and along the columns."""
    own = np.argsort(nibabel.io_orientation(layout.affine)[:, 0])  # the file's axes in the order of RAS
    column, row = (layout.spacing[own[k]] for k in range(3) if k != _AXES[axis])
    return None if row is None or column is None else (row, column)


# --- the file's bytes ------------------------------------------------------------------------------------


@contextmanager
def _one_error(source: Source) -> Iterator[None]:
    """Whatever goes wrong becomes one InputError that repeats nothing of the file; warnings are swallowed."""
    try:
        with silent_warnings(), np.errstate(all="ignore"):
            yield
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(source.name, *TOO_LARGE) from error
    except Exception as error:
        reason = f"cannot be decoded as NIfTI ({type(error).__name__})"
        raise InputError(source.name, reason, DAMAGED) from error


def _load(content: bytes, source: Source) -> _Volume:
    """Header, ceilings, data, and one look at every voxel, in this order."""
    if source.kind == "NIfTI.gz":
        layout, stored = _inflate(content, source)
    else:
        layout, stored = read_layout(content[:LONGEST_HEAD], source), memoryview(content)
    if len(stored) < layout.end:
        reason = f"expected {layout.end} bytes, got {len(stored)}: truncated"
        raise InputError(source.name, reason, "copy or export it again")
    flat = np.frombuffer(stored, layout.dtype, math.prod(layout.shape), layout.offset)
    return _survey(flat, layout, source)


def _inflate(content: bytes, source: Source) -> tuple[Layout, memoryview]:
    """Inflate the header, check it, then inflate the data it declares; what follows is counted, not kept."""
    blocks, head = _blocks(content, source), b""
    for block in blocks:
        head += block
        if len(head) >= LONGEST_HEAD:
            break
    layout = read_layout(head, source)
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
    if size > limits.most_inflated(len(content)):
        reason = (
            f"grows to more than {limits.max_ratio} times its {len(content)} bytes when inflated, "
            f"and beyond {UNSUSPICIOUS} bytes"
        )
        raise InputError(source.name, reason, "save it without compression (.nii), or raise max_ratio")


# --- values ----------------------------------------------------------------------------------------------


def _parts(flat: np.ndarray) -> Iterator[np.ndarray]:
    return (flat[start : start + _BLOCK] for start in range(0, len(flat), _BLOCK))


def _survey(flat: np.ndarray, layout: Layout, source: Source) -> _Volume:
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
        raise InputError(source.name, found, "--nan zero of the fit takes them as 0")
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
