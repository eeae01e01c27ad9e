"""The stored numbers of a DICOM file's frames: one frame at a time, before any meaning is given to them.

Uncompressed and RLE pixels are read here; JPEG goes through Pillow, JPEG 2000 through pydicom with a plugin that is
named (never GDCM). Before a compressed frame is decoded, its own header is compared with the file's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from io import BytesIO
from struct import error as StructError
from struct import unpack, unpack_from
from typing import Any

import numpy as np
import PIL.Image
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000TransferSyntaxes,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    RLELossless,
)

from umiad.errors import InputError
from umiad.io.dicom_header import Element, Header, Layout
from umiad.io.source import DAMAGED

_NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, None)
_JPEG = (JPEGBaseline8Bit, JPEGExtended12Bit)
_ITEM, _DELIMITER = (0xFFFE, 0xE000), (0xFFFE, 0xE0DD)
_MOST_FRAGMENTS = 100_000
_J2K_START = b"\xff\x4f\xff\x51"  # SOC, SIZ
_CONVERT = "convert it to an uncompressed transfer syntax"


@dataclass(frozen=True, eq=False)
class Pixels:
    """The frames of one file. `notes` are remarks about how they are stored."""

    header: Header
    layout: Layout
    element: Element
    notes: tuple[str, ...]

    def codes(self, frame: int) -> tuple[np.ndarray, str]:
        """One frame -> (unsigned integers [H,W] or [H,W,3] of `layout.stored` bits, colour space they are in).

        Two's complement is left as it is stored. The colour space is MONOCHROME1, MONOCHROME2, PALETTE
        COLOR, RGB or YBR_FULL. Raises InputError, and whatever a decoder raises.
        """
        if self.element.syntax in _NATIVE:
            return self._native(frame)
        self.element.stream.seek(self.element.start)
        encoded = get_frame(
            self.element.stream,
            frame,
            number_of_frames=self.layout.frames,
            extended_offsets=_extended_offsets(self.header),
        )
        if self.element.syntax in _JPEG:
            return _jpeg(encoded, self.header, self.layout)
        if self.element.syntax == RLELossless:
            return _rle(encoded, self.header, self.layout)
        return _jpeg2000(encoded, self.header, self.layout, self.element.syntax)

    def _native(self, frame: int) -> tuple[np.ndarray, str]:
        layout, value = self.layout, self._value()
        count = layout.rows * layout.columns * layout.samples
        shape: tuple[int, ...] = (layout.rows, layout.columns)
        if layout.allocated == 1:
            first, last = frame * count, (frame + 1) * count
            packed = np.frombuffer(value, np.uint8)[first // 8 : math.ceil(last / 8)]
            bits = np.unpackbits(packed, bitorder="little")[first % 8 :][:count]
            return bits.reshape(shape), layout.photometric
        dtype = np.dtype(f"{'<' if self.header.little else '>'}u{layout.allocated // 8}")
        if layout.photometric == "YBR_FULL_422":
            half = count // 3 * 2
            stored = np.frombuffer(value, dtype, half, frame * half * dtype.itemsize)
            return _masked(_upsampled(stored, shape), layout), "YBR_FULL"
        stored = np.frombuffer(value, dtype, count, frame * count * dtype.itemsize)
        if layout.samples == 3:
            stored = stored.reshape(3, *shape).transpose(1, 2, 0) if layout.planar else stored
            shape = (*shape, 3)
        return _masked(stored.reshape(shape), layout), layout.photometric

    def _value(self) -> memoryview | np.ndarray:
        """The bytes of PixelData; those of 8-bit pixels in big endian words are put in order."""
        start, length = self.element.start, self.element.length or 0
        value = self.element.stream.getbuffer()[start : start + length]
        if self.header.little or self.layout.allocated > 8 or self.element.vr != b"OW":
            return value
        return np.frombuffer(value[: length // 2 * 2], np.uint16).byteswap().view(np.uint8)


def open_pixels(header: Header, layout: Layout, element: Element) -> Pixels:
    """Check that all frames are there and can be decoded, without decoding them. Raises InputError."""
    syntax = element.syntax
    if syntax in _NATIVE:
        if element.length is None:
            header.refuse(
                "PixelData is encapsulated, but TransferSyntaxUID is that of an uncompressed file or missing",
                "export it again",
            )
        return Pixels(header, layout, element, _check_native(header, layout, element))
    _check_decoder(header, layout, syntax)
    fragments = _count_fragments(header, element)
    if fragments < layout.frames:
        header.refuse(
            f"PixelData holds {fragments} compressed fragments, expected at least one for each of the "
            f"{layout.frames} frames (NumberOfFrames)",
            DAMAGED,
        )
    return Pixels(header, layout, element, ())


def _check_native(header: Header, layout: Layout, element: Element) -> tuple[str, ...]:
    """Compare the length of PixelData with the frames (PS3.5, 8.1.1); returns remarks. Raises InputError."""
    length, there = element.length or 0, len(element.stream.getbuffer()) - element.start
    subsampled = layout.photometric == "YBR_FULL_422"
    if subsampled and (layout.columns % 2 or layout.planar):
        header.refuse("YBR_FULL_422 needs an even number of Columns and PlanarConfiguration 0")
    bits = layout.rows * layout.columns * layout.samples * layout.allocated * layout.frames
    expected = math.ceil((bits // 3 * 2 if subsampled else bits) / 8)
    if length > there:
        header.refuse(f"PixelData declares {length} bytes, the file holds {there} of them", DAMAGED)
    if length < expected:
        found = f"has {length} bytes" if length else "is empty"
        header.refuse(f"PixelData {found}, expected {expected} for its frames", DAMAGED)
    excess = length - expected - expected % 2
    if excess > 0 and (length % 2 or (subsampled and length >= expected // 2 * 3)):
        header.refuse(f"PixelData has {length} bytes, expected {expected} for its frames", "export it again")
    return (f"PixelData is {excess} bytes longer than its frames; they were ignored",) if excess > 0 else ()


def _check_decoder(header: Header, layout: Layout, syntax: UID) -> None:
    """Raise InputError unless the transfer syntax can be decoded here."""
    name = _syntax_name(syntax)
    if layout.allocated == 1:
        header.refuse(f"is compressed as {name} with BitsAllocated 1, expected 8 or more", _CONVERT)
    if syntax in _JPEG:
        if layout.stored > 8:
            header.refuse(f"is compressed as {name} with {layout.stored} bits, expected 8", _CONVERT)
    elif syntax in JPEG2000TransferSyntaxes:
        if "pylibjpeg" not in get_decoder(syntax).available_plugins:
            header.refuse(
                f"is compressed as {name}, its decoder (pylibjpeg-openjpeg) is missing",
                f"pip install 'umiad[dicom]', or {_CONVERT}",
            )
    elif syntax != RLELossless:
        known = name.startswith("JPEG")
        why = "no permissively licensed decoder is packaged" if known else "there is no decoder for it"
        header.refuse(f"is compressed as {name} (TransferSyntaxUID), {why}", _CONVERT)


def _syntax_name(syntax: UID) -> str:
    """The standard's name; of an unknown one its digits, and nothing of what is not even a UID."""
    if syntax.name != str(syntax):
        return str(syntax.name)
    return f"the unknown {syntax}" if syntax.is_valid else "something that is no valid UID"


def _count_fragments(header: Header, element: Element) -> int:
    """Walk through the items of encapsulated PixelData; their number, without the offset table."""
    stream, end = element.stream, len(element.stream.getbuffer())
    if element.length is not None:
        end = min(end, element.start + element.length)
    count, position = -1, element.start
    while position != end or element.length is None:
        stream.seek(position)
        head = stream.read(8)
        group, number, length = unpack("<HHL", head) if len(head) == 8 else (0, 0, 0)
        if (group, number) == _DELIMITER:
            break
        if (group, number) != _ITEM:
            header.refuse("PixelData ends within its compressed fragments", DAMAGED)
        position, count = position + 8 + length, count + 1
        if position > end:
            header.refuse(f"PixelData ends within compressed fragment {count}", DAMAGED)
        if count > _MOST_FRAGMENTS:
            header.refuse(f"PixelData has more than {_MOST_FRAGMENTS} compressed fragments")
    return max(count, 0)


def _extended_offsets(header: Header) -> tuple[bytes, bytes] | None:
    """The extended offset table, where it is complete."""
    tables = header.value("ExtendedOffsetTable"), header.value("ExtendedOffsetTableLengths")
    if all(isinstance(table, bytes) for table in tables) and len(tables[0]) == len(tables[1]):
        return tables
    return None


def _masked(stored: np.ndarray, layout: Layout) -> np.ndarray:
    """Drop the bits below and above those that hold the pixel (old overlays, garbage); native byte order."""
    codes = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    if shift := layout.high + 1 - layout.stored:
        codes = codes >> shift
    if layout.stored + shift < layout.allocated:
        codes = codes & codes.dtype.type(2**layout.stored - 1)
    return codes


def _upsampled(stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """YBR_FULL_422, stored as Y Y Cb Cr for two neighbours in a row -> [H,W,3], chroma repeated."""
    quads = stored.reshape(shape[0], shape[1] // 2, 4)
    full = np.empty((*shape, 3), stored.dtype)
    full[..., 0] = quads[..., :2].reshape(shape)
    full[..., 1] = np.repeat(quads[..., 2], 2, axis=1)
    full[..., 2] = np.repeat(quads[..., 3], 2, axis=1)
    return full


def _jpeg(encoded: bytes, header: Header, layout: Layout) -> tuple[np.ndarray, str]:
    """Decode an 8-bit JPEG frame. What the JPEG says of its own colours wins over the file's header."""
    with PIL.Image.open(BytesIO(encoded), formats=("JPEG",)) as picture:
        width, height = picture.size
        components: list[Any] = getattr(picture, "layer", [])
        _check_frame(header, layout, (height, width, len(components)))
        names = bytes(int(component[0]) for component in components)
        says = "adobe_transform" in picture.info or "jfif" in picture.info or names == b"RGB"
        if not says and (layout.photometric == "RGB" or names == b"rgb"):
            picture.draft("YCbCr", picture.size)  # libjpeg would assume YCbCr and convert
        codes = np.asarray(picture)
    return _in_range(codes, header, layout), "RGB" if layout.samples == 3 else layout.photometric


def _jpeg2000(encoded: bytes, header: Header, layout: Layout, syntax: UID) -> tuple[np.ndarray, str]:
    """Decode a JPEG 2000 frame with pylibjpeg-openjpeg; YBR_ICT and YBR_RCT become RGB there."""
    _check_frame(header, layout, _j2k_size(encoded, header, layout))
    pixels, said = get_decoder(syntax).as_array(
        encapsulate([encoded], has_bot=False),
        index=0,
        raw=True,
        decoding_plugin="pylibjpeg",
        pixel_keyword="PixelData",
        rows=layout.rows,
        columns=layout.columns,
        samples_per_pixel=layout.samples,
        bits_allocated=layout.allocated,
        bits_stored=layout.stored,
        pixel_representation=int(layout.signed),
        number_of_frames=1,
        photometric_interpretation=layout.photometric,
        planar_configuration=layout.planar,
    )
    codes = _in_range(pixels, header, layout)
    if layout.samples == 1:
        return codes, layout.photometric
    return codes, "YBR_FULL" if str(said["photometric_interpretation"]).startswith("YBR") else "RGB"


def _rle(encoded: bytes, header: Header, layout: Layout) -> tuple[np.ndarray, str]:
    """Decode an RLE frame (PS3.5, Annex G): one segment for each byte of a sample, highest byte first.

    Written here since pylibjpeg-rle panics on damaged frames and pydicom's decoder has no ceiling.
    """
    width, size = layout.allocated // 8, layout.rows * layout.columns
    count = width * layout.samples
    offsets = [*unpack_from(f"<{count + 1}L", encoded)][1:] if 1 <= count <= 15 and len(encoded) >= 64 else []
    if not offsets or unpack_from("<L", encoded)[0] != count:
        header.refuse(f"an RLE frame does not declare {count} segments", DAMAGED)
    planes = np.empty((layout.samples, width, size), np.uint8)
    for index, (start, stop) in enumerate(zip(offsets, [*offsets[1:], len(encoded)], strict=True)):
        segment = _unpacked(encoded[start:stop], size)
        if len(segment) < size:
            header.refuse(f"an RLE segment holds {len(segment)} bytes, expected {size}", DAMAGED)
        planes[index // width, index % width] = np.frombuffer(segment, np.uint8, size)
    words = np.ascontiguousarray(planes.transpose(2, 0, 1)).view(f">u{width}")
    shape = (
        (layout.rows, layout.columns, layout.samples)
        if layout.samples == 3
        else (layout.rows, layout.columns)
    )
    photometric = "YBR_FULL" if layout.photometric.startswith("YBR") else layout.photometric
    return _masked(words.reshape(shape), layout), photometric


def _unpacked(segment: bytes, size: int) -> bytearray:
    """Undo the PackBits compression of a segment, until there are `size` bytes or the segment ends."""
    out, position = bytearray(), 0
    while len(out) < size and position + 1 < len(segment):
        head = segment[position]
        if head < 128:
            out += segment[position + 1 : position + 2 + head]
            position += 2 + head
        elif head > 128:
            out += segment[position + 1 : position + 2] * (257 - head)
            position += 2
        else:
            position += 1
    return out


def _j2k_size(encoded: bytes, header: Header, layout: Layout) -> tuple[int, int, int]:
    """Rows, columns and components that a JPEG 2000 codestream declares (ISO 15444-1, A.5.1)."""
    start = encoded.find(_J2K_START)
    try:
        x1, y1, x0, y0 = unpack_from(">4I", encoded, start + 8)
        components, depth = unpack_from(">HB", encoded, start + 40)
    except StructError:
        start = -1
    if start < 0:
        raise InputError(header.name, "PixelData holds no JPEG 2000 codestream", DAMAGED)
    if (bits := (depth & 127) + 1) > layout.allocated:
        header.refuse(f"the JPEG 2000 frame has {bits} bits, BitsAllocated is {layout.allocated}")
    return y1 - y0, x1 - x0, components


def _check_frame(header: Header, layout: Layout, found: tuple[int, int, int]) -> None:
    """Raise InputError where a compressed frame declares another size than the file."""
    expected = layout.rows, layout.columns, layout.samples
    if found != expected:
        header.refuse(
            f"the compressed frame declares {' x '.join(map(str, found))} (rows, columns, components), "
            f"expected {' x '.join(map(str, expected))}",
            "export it again",
        )


def _in_range(pixels: np.ndarray, header: Header, layout: Layout) -> np.ndarray:
    """Decoded numbers -> unsigned codes of `stored` bits. Raises InputError for numbers outside of BitsStored."""
    low, high = int(pixels.min()), int(pixels.max())
    least = -(2 ** (layout.stored - 1)) if layout.signed else 0
    if low < least or high > least + 2**layout.stored - 1:
        header.refuse(f"decoded pixels are {low} to {high}, which BitsStored {layout.stored} cannot hold")
    codes = pixels.view(f"u{pixels.dtype.itemsize}")
    return codes & codes.dtype.type(2**layout.stored - 1) if layout.signed else codes
