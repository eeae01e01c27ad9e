"""DICOM: from stored numbers to images in 0..1, and one kind of error for all that can be wrong with a file.

pydicom parses; what it leaves to its users is done here: the modality transform (rescale or table), the window
(PS3.3 C.11.2), MONOCHROME1 inverted, palettes, YBR to RGB, spacing, bits above BitsStored, ceilings.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np

from umiad.errors import InputError
from umiad.io.dicom_header import Header, Layout, patient_token, read_header, read_layout, spacing
from umiad.io.dicom_pixels import Pixels, open_pixels
from umiad.io.quiet import silent_warnings
from umiad.io.source import DAMAGED, TOO_LARGE, Source
from umiad.types import Image, Stack

Curve: TypeAlias = Callable[[np.ndarray], np.ndarray]  # float64 -> float64, elementwise
_TABLE_BITS = 16  # up to here every stored number is transformed once, through a table
_CHUNK = 1 << 20  # pixels transformed at a time
_PERCENTILES = (0.5, 99.5)
_LITTLE_USED = 0.1  # of the stored range
_PROGRAMS = (b"MZ", b"\x7fELF")
_PALETTE = "PaletteColorLookupTable"
_IGNORE_WINDOW = "--window full or --window C,W ignores what the file says"


def open_dicom(content: bytes, source: Source) -> Stack:
    """Read the header of a DICOM file and check it -> its frames, each decoded when it is asked for.

    With or without preamble. Raises InputError, and nothing else, for anything that is wrong with the file; the
    same holds for `Stack.frame`. The reason names keywords and numbers, never a value about the patient.
    """
    with _one_error(source.name):
        header, element = read_header(content, source)
        layout = read_layout(header, source)
        pixels = open_pixels(header, layout, element)
        notes = (*_remarks(content, header), *pixels.notes)
        patient = patient_token(header, source.key)

    def frame(number: int) -> Image:
        if not 0 <= number < layout.frames:
            raise InputError(source.name, f"has no frame {number}, its frames are 0 to {layout.frames - 1}")
        with _one_error(source.name):
            image, said = _frame(pixels, number, source)
            size, measured = spacing(header, number)
        return Image(
            image,
            source.name,
            layout.photometric,
            layout.stored,
            (*notes, *said, *measured),
            size,
            None if layout.single else number,
            patient,
        )

    return Stack(layout.frames, frame, layout.single)


@contextmanager
def _one_error(name: str) -> Iterator[None]:
    """Turn every failure into InputError without quoting it (it may hold text of the file); silence pydicom."""
    failure: InputError | None = None
    logger = logging.getLogger("pydicom")
    with silent_warnings(), np.errstate(all="ignore"):
        propagate, logger.propagate = logger.propagate, False
        try:
            yield
        except InputError:
            raise
        except MemoryError:
            failure = InputError(name, *TOO_LARGE)
        except RecursionError:
            reason = "its sequences (SQ, items (FFFE,E000)) are nested too deeply, expected at most about 200 levels"
            failure = InputError(name, reason, DAMAGED)
        except Exception as error:
            failure = InputError(name, f"cannot be decoded as DICOM ({type(error).__name__})", DAMAGED)
        finally:
            logger.propagate = propagate
    if failure is not None:
        raise failure


def _remarks(content: bytes, header: Header) -> tuple[str, ...]:
    """What a user should know about the file as a whole."""
    notes = []
    if content[128:132] == b"DICM" and content.startswith(_PROGRAMS):
        notes.append("the preamble looks like a program; never run this file")
    if header.text("BurnedInAnnotation") == "YES":
        notes.append("the file says that text is burnt into its pixels")
    return tuple(notes)


def _frame(pixels: Pixels, number: int, source: Source) -> tuple[np.ndarray, tuple[str, ...]]:
    """One frame -> float32 [C,H,W] in 0..1, and remarks. Raises InputError."""
    codes, photometric = pixels.codes(number)
    if photometric == "PALETTE COLOR":
        return _painted(codes, pixels.header, pixels.layout)
    if pixels.layout.samples == 3:
        return _colour(codes, photometric, pixels.layout), ()
    grey, notes = _grey(codes, pixels, number, source)
    if photometric == "MONOCHROME1":
        np.subtract(np.float32(1), grey, out=grey)
    return grey[None], notes


def _grey(
    codes: np.ndarray, pixels: Pixels, number: int, source: Source
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Codes [H,W] of frame `number` -> float32 [H,W] in 0..1 (before MONOCHROME1 is inverted), and remarks."""
    header, layout = pixels.header, pixels.layout
    modality, low, high = _modality(header, number, layout)
    values = modality(_values(np.arange(2**layout.stored), layout)) if layout.stored <= _TABLE_BITS else None

    def measured(part: np.ndarray) -> np.ndarray:
        return modality(_values(part, layout)) if values is None else values[part]

    curve: Curve | None
    if source.window == "percentile":
        curve, notes = _percentile(_mapped(codes, measured, np.float64))
    else:
        curve, notes = _window(header, number, source, low)
    shown = _ramp(low, high) if curve is None else curve
    if values is None:
        image = _mapped(codes, lambda part: shown(measured(part)))
    else:
        table = shown(values).astype(np.float32)
        image = _mapped(codes, lambda part: table[part])
    used = float(image.max()) - float(image.min())
    if curve is None and source.window == "file" and layout.stored > 1 and 0 < used < _LITTLE_USED:
        notes = (
            *notes,
            f"the file has no window: its full stored range of {layout.stored} bits was mapped to 0..1; "
            "--window percentile or --window C,W shows more contrast",
        )
    return image, notes


def _mapped(codes: np.ndarray, curve: Curve, dtype: type[np.floating] = np.float32) -> np.ndarray:
    """Apply `curve` to [H,W] a part at a time, to need little memory besides the result."""
    image = np.empty(codes.shape, dtype)
    step = max(1, _CHUNK // codes.shape[1])
    for start in range(0, codes.shape[0], step):
        image[start : start + step] = curve(codes[start : start + step])
    return image


def _values(codes: np.ndarray, layout: Layout) -> np.ndarray:
    """Unsigned codes of `stored` bits -> the numbers they mean (two's complement where signed), float64."""
    values = codes.astype(np.float64)
    if layout.signed:
        values[values >= 2.0 ** (layout.stored - 1)] -= 2.0**layout.stored
    return values


def _modality(header: Header, frame: int, layout: Layout) -> tuple[Curve, float, float]:
    """Stored numbers -> the file's own units, and the ends of the full stored range in them. Raises InputError."""
    least = -(2.0 ** (layout.stored - 1)) if layout.signed else 0.0
    if items := header.items("ModalityLUTSequence"):
        look_up, entries, _ = _table(items[0], "ModalityLUTSequence", least)
        if (low := float(entries.min())) == (high := float(entries.max())):
            header.refuse("ModalityLUTSequence maps every pixel to one number")
        return look_up, low, high
    owner = header.group(frame, "PixelValueTransformationSequence") or header
    slope = (owner.numbers("RescaleSlope") or [1.0])[0]
    intercept = (owner.numbers("RescaleIntercept") or [0.0])[0]
    if slope == 0:
        header.refuse("RescaleSlope is 0, expected another number: every pixel would be the same")
    ends = sorted((least * slope + intercept, (least + 2.0**layout.stored - 1) * slope + intercept))
    if not np.isfinite(ends).all() or ends[0] == ends[1]:
        header.refuse("RescaleSlope and RescaleIntercept leave no range of finite numbers", DAMAGED)
    return lambda values: values * slope + intercept, ends[0], ends[1]


def _window(header: Header, frame: int, source: Source, low: float) -> tuple[Curve | None, tuple[str, ...]]:
    """The curve from the file's units to 0..1, None = the full range, and remarks. Raises InputError."""
    if isinstance(source.window, tuple):
        return _linear(header, *source.window, "the window that was asked for"), ()
    if source.window != "file":
        return None, ()
    owner = header.group(frame, "FrameVOILUTSequence") or header
    centres, widths = owner.numbers("WindowCenter"), owner.numbers("WindowWidth")
    several = f"the file has {len(centres)} windows; the first was used"
    notes = (several,) if min(len(centres), len(widths)) > 1 else ()
    if items := owner.items("VOILUTSequence"):
        look_up, entries, bits = _table(items[0], "VOILUTSequence", low)
        if entries.max() > 2.0**bits - 1:
            header.refuse(f"VOILUTSequence holds {entries.max():.0f}, expected at most {bits} bits", DAMAGED)
        return lambda values: look_up(values) / (2.0**bits - 1), ()
    if not centres or not widths:
        return None, ()
    function = owner.text("VOILUTFunction") or "LINEAR"
    if function == "LINEAR":
        return _linear(header, centres[0], widths[0], "WindowWidth"), notes
    if function not in ("LINEAR_EXACT", "SIGMOID"):
        header.refuse("VOILUTFunction is unknown, expected LINEAR, LINEAR_EXACT or SIGMOID", _IGNORE_WINDOW)
    return _exact(header, centres[0], widths[0], function), notes


def _linear(header: Header, centre: float, width: float, what: str) -> Curve:
    """PS3.3 C.11.2.1.2.1. Raises InputError for a width below 1."""
    if not (np.isfinite([centre, width]).all() and width >= 1):
        header.refuse(f"{what} is {width:.12g}, expected at least 1 for LINEAR", _IGNORE_WINDOW)
    if width == 1:
        return lambda values: (values > centre - 0.5).astype(np.float64)
    return lambda values: np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0.0, 1.0)


def _exact(header: Header, centre: float, width: float, function: str) -> Curve:
    """LINEAR_EXACT and SIGMOID, PS3.3 C.11.2.1.3. Raises InputError for a width that is not above 0."""
    if width <= 0:
        header.refuse(f"WindowWidth is {width:.12g}, expected above 0 for {function}", _IGNORE_WINDOW)
    if function == "SIGMOID":
        return lambda values: 1.0 / (1.0 + np.exp(-4.0 * (values - centre) / width))
    return lambda values: np.clip((values - centre) / width + 0.5, 0.0, 1.0)


def _ramp(low: float, high: float) -> Curve:
    """`low`..`high` -> 0..1, clipped."""
    return lambda values: np.clip((values - low) / (high - low), 0.0, 1.0)


def _percentile(values: np.ndarray) -> tuple[Curve, tuple[str, ...]]:
    """From the 0.5 to the 99.5 percentile of this frame (`values` may be reordered), and remarks."""
    low, high = np.percentile(values, _PERCENTILES, overwrite_input=True)
    if low < high:
        return _ramp(float(low), float(high)), ()
    return np.zeros_like, ("its 0.5 and 99.5 percentiles are equal: the image is black",)


def _table(item: Header, keyword: str, low: float) -> tuple[Curve, np.ndarray, int]:
    """A modality or VOI table (PS3.3 C.11.1.1): the curve, its entries and their bits. Raises InputError."""
    count, first, bits = _descriptor(item, "LUTDescriptor", low)
    entries = _entries(item, "LUTData", count, bits).astype(np.float64)

    def look_up(values: np.ndarray) -> np.ndarray:
        return entries[np.clip(np.rint(values - first), 0, count - 1).astype(np.intp)]

    if not 1 <= bits <= _TABLE_BITS:
        item.refuse(f"LUTDescriptor of {keyword} says {bits} bits, expected 1 to 16", DAMAGED)
    return look_up, entries, bits


def _descriptor(item: Header, keyword: str, low: float) -> tuple[int, int, int]:
    """Number of entries, first number that is mapped, bits. `low` < 0: the first number may be negative."""
    numbers = [int(number) for number in item.numbers(keyword)]
    if len(numbers) != 3:
        item.refuse(f"{keyword} has {len(numbers)} values, expected 3", DAMAGED)
    first = numbers[1] - 2**16 if low < 0 and numbers[1] >= 2**15 else numbers[1]
    return numbers[0] % 2**16 or 2**16, first, numbers[2]


def _entries(item: Header, keyword: str, count: int, bits: int) -> np.ndarray:
    """`count` unsigned entries of a table; those of 8 bits may be packed in bytes. Raises InputError."""
    value = item.value(keyword)
    if isinstance(value, bytes):
        order = "<" if item.little else ">"
        words = np.frombuffer(value[: len(value) // 2 * 2], f"{order}u2").astype(np.uint16)
        packed = bits <= 8 and len(value) < 2 * count
        entries = words.astype("<u2").view(np.uint8) if packed else words
    else:
        numbers = [] if value is None else value if hasattr(value, "__iter__") else [value]
        entries = np.asarray([int(number) & 0xFFFF for number in numbers], np.uint16)
    if len(entries) < count:
        item.refuse(f"{keyword} has {len(entries)} entries, expected {count}", DAMAGED)
    return entries[:count]


def _painted(codes: np.ndarray, header: Header, layout: Layout) -> tuple[np.ndarray, tuple[str, ...]]:
    """Indices [H,W] -> RGB float32 [3,H,W] in 0..1 through the palette (PS3.3 C.7.6.3.1.5), and remarks."""
    if layout.stored > _TABLE_BITS:
        header.refuse(f"BitsStored is {layout.stored}, expected at most {_TABLE_BITS} for PALETTE COLOR")
    least = -1.0 if layout.signed else 0.0
    indices = _values(np.arange(2**layout.stored), layout)
    tables, scales = [], []
    for colour in ("Red", "Green", "Blue"):
        count, first, bits = _descriptor(header, f"{colour}{_PALETTE}Descriptor", least)
        if bits not in (8, 16):
            header.refuse(f"{colour}{_PALETTE}Descriptor says {bits} bits, expected 8 or 16", DAMAGED)
        if header.value(f"Segmented{colour}{_PALETTE}Data") is not None:
            entries = _expanded(header, f"Segmented{colour}{_PALETTE}Data", count, bits)
        else:
            entries = _entries(header, f"{colour}{_PALETTE}Data", count, bits)
        tables.append(entries[np.clip(indices - first, 0, count - 1).astype(np.intp)])
        scales.append(bits)
    scale = np.float32(255 if max(scales) == 8 and max(map(np.max, tables)) < 256 else 65535)
    notes: tuple[str, ...] = ()
    if scale > 255 and max(map(np.max, tables)) < 256:
        scale, notes = np.float32(255), ("the palette says 16 bits but holds 8; it was read as 8 bits",)
    image = np.empty((3, *codes.shape), np.float32)
    for channel, table in enumerate(tables):
        image[channel] = _mapped(codes, (table / scale).astype(np.float32).__getitem__)
    return image, notes


def _expanded(header: Header, keyword: str, count: int, bits: int) -> np.ndarray:
    """A segmented palette (PS3.3 C.7.9.2) -> its `count` entries. Raises InputError; indirect segments too."""
    value = header.value(keyword)
    if not isinstance(value, bytes):
        header.refuse(f"{keyword} cannot be read", DAMAGED)
    data = np.frombuffer(value[: len(value) // 2 * 2], "<u2" if header.little else ">u2").astype("<u2")
    words = (data.view(np.uint8) if bits == 8 else data)[: 4 * count].tolist()
    entries: list[int] = []
    position = 0
    while len(entries) < count and position + 2 < len(words):
        kind, length, position = words[position], words[position + 1], position + 2
        if kind == 0 and length:
            entries += words[position : position + length]
            position += length
        elif kind == 1 and length and entries:
            steps = np.linspace(entries[-1], words[position], length + 1)[1:]
            entries += [int(step) for step in np.rint(steps)]
            position += 1
        else:
            header.refuse(f"{keyword} has a segment that is not supported, expected discrete or linear ones")
    if len(entries) < count:
        header.refuse(f"{keyword} has {len(entries)} entries, expected {count}", DAMAGED)
    return np.asarray(entries[:count], np.uint16)


def _colour(codes: np.ndarray, photometric: str, layout: Layout) -> np.ndarray:
    """RGB or YBR_FULL [H,W,3] -> RGB float32 [3,H,W] in 0..1.

    YBR_FULL as in PS3.3 C.7.6.3.1.2, rounded to whole numbers and clipped as a display would.
    """
    most = 2**layout.stored - 1
    image = np.empty((3, *codes.shape[:2]), np.float32)
    if photometric == "RGB":
        for channel in range(3):
            image[channel] = _mapped(codes[..., channel], lambda part: np.divide(part, most))
        return image
    middle, step = 2.0 ** (layout.stored - 1), max(1, _CHUNK // codes.shape[1])
    for start in range(0, codes.shape[0], step):
        luma, blue, red = np.moveaxis(codes[start : start + step].astype(np.float64), 2, 0)
        blue, red = blue - middle, red - middle
        mixed = np.stack([luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue])
        image[:, start : start + step] = np.clip(np.rint(mixed), 0, most) / most
    return image
