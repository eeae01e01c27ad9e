"""The header of a DICOM file: read without the pixels, from bytes only, and checked against the ceilings.

Only the elements named here are kept, so that names, dates and free text of a patient never get into memory as
values. Reasons of errors hold keywords and numbers, never text of the file.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from struct import unpack
from typing import Any, NoReturn

from pydicom.datadict import tag_for_keyword
from pydicom.filereader import read_dataset, read_preamble
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from umiad.errors import InputError
from umiad.io.source import DAMAGED, UNSUSPICIOUS, Source

_WANTED = """SOPClassUID PatientID IssuerOfPatientID BurnedInAnnotation Rows Columns SamplesPerPixel
BitsAllocated BitsStored HighBit PixelRepresentation PlanarConfiguration PhotometricInterpretation NumberOfFrames
PixelSpacing ImagerPixelSpacing NominalScannedPixelSpacing SequenceOfUltrasoundRegions ModalityLUTSequence
RescaleSlope RescaleIntercept VOILUTSequence WindowCenter WindowWidth VOILUTFunction
RedPaletteColorLookupTableDescriptor RedPaletteColorLookupTableData SegmentedRedPaletteColorLookupTableData
GreenPaletteColorLookupTableDescriptor GreenPaletteColorLookupTableData SegmentedGreenPaletteColorLookupTableData
BluePaletteColorLookupTableDescriptor BluePaletteColorLookupTableData SegmentedBluePaletteColorLookupTableData
SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence ExtendedOffsetTable ExtendedOffsetTableLengths"""
_TAGS = [tag_for_keyword(keyword) for keyword in _WANTED.split()]
_PIXEL_TAGS = {0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData", 0x7FE00010: "PixelData"}
_GREY = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_RETIRED = ("HSV", "ARGB", "CMYK", "YBR_PARTIAL_422", "YBR_PARTIAL_420")
_PIECE = 1 << 16  # compressed bytes inflated at a time
_CENTIMETRES = 3  # PhysicalUnitsXDirection


@dataclass(frozen=True, eq=False)
class Header:
    """Elements of a data set, or of one item of a sequence, by keyword. Every method raises InputError."""

    dataset: Any
    name: str
    little: bool

    def refuse(self, reason: str, hint: str = "") -> NoReturn:
        """Raise InputError for this file."""
        raise InputError(self.name, reason, hint) from None

    def value(self, keyword: str) -> Any:
        """The element's value as pydicom converts it; None where it is absent or empty."""
        try:
            value = self.dataset.get(keyword)
        except Exception as error:
            self.refuse(f"{keyword} cannot be read ({type(error).__name__})", DAMAGED)
        return None if value is None or (hasattr(value, "__len__") and len(value) == 0) else value

    def numbers(self, keyword: str) -> list[float]:
        """All values as finite numbers; [] where the element is absent or empty."""
        value = self.value(keyword)
        if value is None:
            return []
        single = isinstance(value, (str, bytes)) or not hasattr(value, "__iter__")
        try:
            numbers = [float(each) for each in ([value] if single else value)]
        except (TypeError, ValueError, OverflowError):
            numbers = [math.nan]
        if not all(map(math.isfinite, numbers)):
            self.refuse(f"{keyword} holds a value that is no number, expected a finite number", DAMAGED)
        return numbers

    def whole(self, keyword: str, low: int, high: int, default: int | None = None) -> int:
        """One whole number in low..high; `default` where it is absent (None: refuse)."""
        numbers = self.numbers(keyword)
        if not numbers and default is not None:
            return default
        if len(numbers) != 1 or numbers[0] != int(numbers[0]) or not low <= numbers[0] <= high:
            found = f"is {numbers[0]:.12g}" if len(numbers) == 1 else f"has {len(numbers)} values"
            found = found if numbers else "is missing"
            self.refuse(f"{keyword} {found}, expected one whole number {low} to {high}", DAMAGED)
        return int(numbers[0])

    def text(self, keyword: str) -> str:
        """The value as text, "" where it is absent. For comparing only: it must not reach a message."""
        value = self.value(keyword)
        if value is None:
            return ""
        single = isinstance(value, str) or not hasattr(value, "__iter__")
        return "\\".join(str(each) for each in ([value] if single else value)).strip()

    def items(self, keyword: str, *, only: int | None = None) -> list[Header]:
        """The items of a sequence, or `only` that one; [] where it is absent or empty."""
        value = self.value(keyword)
        if value is None:
            return []
        if not all(hasattr(each, "get") for each in value):
            self.refuse(f"{keyword} is no sequence of items", DAMAGED)
        chosen = value if only is None else value[only : only + 1]
        return [Header(each, self.name, self.little) for each in chosen]

    def group(self, frame: int, keyword: str) -> Header | None:
        """The functional group `keyword` (enhanced multi-frame) that holds for a frame: its own, else the shared."""
        for sequence, number in (
            ("PerFrameFunctionalGroupsSequence", frame),
            ("SharedFunctionalGroupsSequence", 0),
        ):
            groups = self.items(sequence, only=number)
            if groups and (found := groups[0].items(keyword)):
                return found[0]
        return None


@dataclass(frozen=True)
class Layout:
    """How pixels are stored; `single`: the file holds one frame. `signed`: two's complement."""

    rows: int
    columns: int
    samples: int
    allocated: int
    stored: int
    high: int
    signed: bool
    planar: int
    photometric: str
    frames: int

    @property
    def single(self) -> bool:
        """Whether the file holds one frame."""
        return self.frames == 1


@dataclass(frozen=True, eq=False)
class Element:
    """Where the value of PixelData lies in `stream`; `length` None = undefined (encapsulated)."""

    stream: BytesIO
    start: int
    length: int | None
    vr: bytes
    syntax: UID | None


def read_header(content: bytes, source: Source) -> tuple[Header, Element]:
    """Read everything before the pixels. Raises InputError, also where there are no integer pixels."""
    stream = BytesIO(content)
    read_preamble(stream, True)
    meta = _file_meta(stream, source)
    syntax = UID(meta.text("TransferSyntaxUID")) or None
    if syntax == DeflatedExplicitVRLittleEndian:
        stream = _inflate(memoryview(content)[stream.tell() :], source)
        syntax = ExplicitVRLittleEndian
    else:
        read_dataset(stream, True, True, stop_when=lambda tag, vr, length: tag >> 16 != 0)  # a command set
    implicit, little = _encoding(stream, syntax)
    dataset = read_dataset(
        stream, implicit, little, stop_when=lambda tag, vr, length: tag in _PIXEL_TAGS, specific_tags=_TAGS
    )
    header = Header(dataset, source.name, little)
    kind = header.text("SOPClassUID") or meta.text("MediaStorageSOPClassUID")
    return header, _pixel_element(header, stream, syntax, UID(kind))


def _file_meta(stream: BytesIO, source: Source) -> Header:
    """Read the file meta information (group 0002; may be empty); leaves `stream` at its end."""
    start = stream.tell()
    for implicit in (False, True):  # some writers get it wrong
        stream.seek(start)
        meta = read_dataset(stream, implicit, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
        try:
            meta.get("TransferSyntaxUID")
        except NotImplementedError:  # pydicom's word for a value representation that is none
            continue
        return Header(meta, source.name, True)
    raise InputError(source.name, "TransferSyntaxUID cannot be read", DAMAGED)


def _encoding(stream: BytesIO, syntax: UID | None) -> tuple[bool, bool]:
    """Whether the data set is written with implicit VR, and little endian; guessed without a transfer syntax."""
    if syntax is not None:
        return syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
    first = stream.read(6)
    stream.seek(-len(first), 1)
    explicit = len(first) == 6 and first[4:6].isalpha() and first[4:6].isupper()
    return not explicit, not explicit or unpack("<H", first[:2])[0] < 1024


def _inflate(compressed: memoryview, source: Source) -> BytesIO:
    """Inflate a deflated data set, counting first and keeping afterwards, so that a bomb takes no memory.

    Raises InputError above the ceilings.
    """
    limits = source.limits
    ceiling = limits.most_inflated(len(compressed))
    total = 0
    try:
        for piece in _inflated(compressed):
            total += len(piece)
            if total > ceiling:
                raise InputError(
                    source.name,
                    f"is deflated and grows to more than {ceiling} bytes, which exceeds the ceiling "
                    f"({limits.max_inflated} bytes, and beyond {UNSUSPICIOUS} also {limits.max_ratio} times its size; "
                    "counted while inflating)",
                    "convert it to an uncompressed transfer syntax",
                )
        stream = BytesIO()
        for piece in _inflated(compressed):
            stream.write(piece)
    except (zlib.error, EOFError):
        raise InputError(source.name, "is deflated, but its data set cannot be inflated", DAMAGED) from None
    stream.seek(0)
    return stream


def _inflated(compressed: memoryview) -> Iterator[bytes]:
    """Inflate piece by piece (at most 1 MiB each). Raises zlib.error, and EOFError where the end is missing."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    for start in range(0, len(compressed), _PIECE):
        pending: bytes | memoryview = compressed[start : start + _PIECE]
        while len(pending) and not inflater.eof:
            yield inflater.decompress(pending, 1 << 20)
            pending = inflater.unconsumed_tail
    while not inflater.eof:
        if not (piece := inflater.decompress(b"", 1 << 20)):
            raise EOFError
        yield piece


def _pixel_element(header: Header, stream: BytesIO, syntax: UID | None, kind: UID) -> Element:
    """Look at the element where reading stopped. Raises InputError unless it is PixelData."""
    start, order = stream.tell(), "<" if header.little else ">"
    head = stream.read(12)
    tag = unpack(f"{order}HH", head[:4]) if len(head) >= 8 else (0, 0)
    keyword = _PIXEL_TAGS.get(tag[0] << 16 | tag[1])
    if keyword is None:
        known = kind.type in ("SOP Class", "Meta SOP Class", "Service Class")
        what = f" (SOPClassUID: {kind.name})" if known else ""
        header.refuse(f"has no PixelData{what}, expected an image", f"if it should have one, {DAMAGED}")
    if keyword != "PixelData":
        header.refuse(f"has {keyword}, expected PixelData with whole numbers", "export it with 16-bit pixels")
    explicit = head[4:6] in (b"OB", b"OW", b"UN")
    if explicit and len(head) < 12:
        header.refuse("PixelData is cut off within its first bytes", DAMAGED)
    length = unpack(f"{order}L", head[8:12] if explicit else head[4:8])[0]
    start += 12 if explicit else 8
    vr = head[4:6] if explicit else b"OW"
    return Element(stream, start, None if length == 0xFFFFFFFF else length, vr, syntax)


def read_layout(header: Header, source: Source) -> Layout:
    """How pixels are stored, checked against each other and against the ceilings. Raises InputError."""
    rows, columns = header.whole("Rows", 1, 65535), header.whole("Columns", 1, 65535)
    frames = max(1, header.whole("NumberOfFrames", 0, 2**31 - 1, 1))
    photometric = _photometric(header)
    colour = photometric in _COLOUR
    samples = header.whole("SamplesPerPixel", 1, 65535)
    if samples != (3 if colour else 1):
        header.refuse(f"SamplesPerPixel is {samples}, expected {3 if colour else 1} for {photometric}")
    allocated = header.whole("BitsAllocated", 1, 65535)
    if allocated not in (1, 8, 16, 32):
        header.refuse(f"BitsAllocated is {allocated}, expected 1, 8, 16 or 32")
    _check_size(header, source, (rows, columns), samples * math.ceil(allocated / 8), frames)
    stored = header.whole("BitsStored", 1, allocated)
    high = header.whole("HighBit", stored - 1, allocated - 1, stored - 1)
    signed = header.whole("PixelRepresentation", 0, 1, 0 if colour or allocated == 1 else None) == 1
    if signed and (colour or allocated == 1):
        header.refuse(f"PixelRepresentation is 1 (signed), expected 0 for {photometric}, {allocated} bits")
    planar = header.whole("PlanarConfiguration", 0, 1, 0) if colour else 0
    return Layout(rows, columns, samples, allocated, stored, high, signed, planar, photometric, frames)


def _photometric(header: Header) -> str:
    """The photometric interpretation. Raises InputError for one that is retired or unknown."""
    value = header.text("PhotometricInterpretation")
    if value not in _GREY + _COLOUR:
        found = f"is {value} (retired)" if value in _RETIRED else "is unknown" if value else "is missing"
        header.refuse(f"PhotometricInterpretation {found}, expected one of {', '.join(_GREY + _COLOUR)}")
    return value


def _check_size(header: Header, source: Source, size: tuple[int, int], pixel_bytes: int, frames: int) -> None:
    """Compare what the header declares with the ceilings. Raises InputError."""
    limits, pixels = source.limits, size[0] * size[1]
    if pixels > limits.max_pixels:
        header.refuse(
            f"declares {size[0]} x {size[1]} = {pixels} pixels (Rows x Columns), "
            f"which exceeds the ceiling of {limits.max_pixels}",
            "export it smaller, or raise max_pixels",
        )
    if min(size) < limits.min_edge:
        header.refuse(f"has {size[0]} x {size[1]} pixels, expected at least {limits.min_edge} on each edge")
    if frames > limits.max_frames:
        header.refuse(
            f"declares {frames} frames (NumberOfFrames), which exceeds the ceiling of {limits.max_frames}",
            "export fewer frames, or raise max_frames",
        )
    if (total := pixels * pixel_bytes * frames) > limits.max_inflated:
        header.refuse(
            f"declares {total} bytes of pixels, which exceeds the ceiling of {limits.max_inflated}",
            "export fewer frames, or raise max_inflated",
        )


def spacing(header: Header, frame: int) -> tuple[tuple[float, float] | None, tuple[str, ...]]:
    """Millimetres per pixel (down the rows, along the columns) or None, and remarks. Raises nothing."""
    try:
        measures = header.group(frame, "PixelMeasuresSequence")
        for owner, keyword in (
            (header, "PixelSpacing"),
            (measures, "PixelSpacing"),
            (header, "ImagerPixelSpacing"),
            (header, "NominalScannedPixelSpacing"),
        ):
            if owner is not None and (pair := owner.numbers(keyword)):
                return _checked_spacing(pair, keyword)
        return _ultrasound_spacing(header.items("SequenceOfUltrasoundRegions"))
    except InputError as error:
        return None, (f"the size of a pixel is unknown: {error.reason}",)


def _checked_spacing(pair: list[float], keyword: str) -> tuple[tuple[float, float] | None, tuple[str, ...]]:
    if len(pair) != 2 or min(pair) <= 0:
        return None, (f"the size of a pixel is unknown: {keyword} does not hold two numbers above 0",)
    at = {"ImagerPixelSpacing": "at the detector", "NominalScannedPixelSpacing": "on the scanned film"}
    notes = (f"the size of a pixel ({keyword}) was measured {at[keyword]}",) if keyword in at else ()
    return (pair[0], pair[1]), notes


def _ultrasound_spacing(regions: list[Header]) -> tuple[tuple[float, float] | None, tuple[str, ...]]:
    """From the regions of an ultrasound image, if all of them are in centimetres and agree."""
    found: set[tuple[float, float]] = set()
    for region in regions:
        units = region.numbers("PhysicalUnitsXDirection") + region.numbers("PhysicalUnitsYDirection")
        deltas = region.numbers("PhysicalDeltaY") + region.numbers("PhysicalDeltaX")
        if units != [_CENTIMETRES, _CENTIMETRES] or len(deltas) != 2 or 0.0 in deltas:
            return None, ("the size of a pixel is unknown: an ultrasound region is not in centimetres",)
        found.add((round(10 * abs(deltas[0]), 9), round(10 * abs(deltas[1]), 9)))
    if len(found) > 1:
        return None, ("the size of a pixel is unknown: the ultrasound regions have different sizes",)
    return (found.pop() if found else None), ()


def patient_token(header: Header, key: bytes) -> str:
    """A token that is equal for files of one patient (HMAC-SHA256 of the identifier); "" = unknown."""
    try:
        identifier, issuer = header.text("PatientID"), header.text("IssuerOfPatientID")
    except InputError:
        return ""
    if not key or not identifier:
        return ""
    message = f"{identifier}\0{issuer}".encode("utf-8", "backslashreplace")
    return hmac.new(key, message, hashlib.sha256).hexdigest()[:16]
