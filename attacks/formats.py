"""Byte-level builders of small image files, whose every field may be made to lie. Harmless test material.

Formats: PNG (ISO 15948), JPEG (ITU-T T.81), TIFF 6.0, DICOM PS3.5 and PS3.10, NIfTI-1. Zeros are deflated without
ever being held: a bomb of gigabytes takes milliseconds to build.
"""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import PIL.Image

BLOCK = 1 << 20
SIGNATURE = b"\x89PNG\r\n\x1a\n"
UNDEFINED = 0xFFFFFFFF
ULTRASOUND = "1.2.840.10008.5.1.4.1.1.6.1"
EXPLICIT, DEFLATED = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99"
RLE = "1.2.840.10008.1.2.5"
_LONG = (b"OB", b"OW", b"OF", b"OD", b"SQ", b"UN", b"UT")  # value representations with 4 bytes of length


def picture(edge: int = 64, *, seed: int = 0) -> np.ndarray:
    """A ramp with noise, uint8 [edge,edge]."""
    rng = np.random.default_rng(seed)
    ramp = np.add.outer(np.linspace(20, 160, edge), np.linspace(0, 60, edge))
    return np.clip(ramp + rng.normal(0, 8, (edge, edge)), 0, 255).astype(np.uint8)


def encoded(image: PIL.Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    """An image as Pillow writes it."""
    content = BytesIO()
    made = PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image
    made.save(content, kind, **options)
    return content.getvalue()


# ---- zeros, deflated


def deflated_zeros(count: int, *, prefix: bytes = b"") -> bytes:
    """A raw deflate stream (RFC 1951) of `prefix` and `count` zero bytes: about a thousandth of its content."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = packer.compress(prefix) + packer.flush(zlib.Z_FULL_FLUSH)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(BLOCK)) + packer.flush(zlib.Z_FULL_FLUSH)
    last = zlib.compressobj(9, zlib.DEFLATED, -15)
    return start + block * (count // BLOCK) + last.compress(bytes(count % BLOCK)) + last.flush()


def zlib_zeros(count: int) -> bytes:
    """The same as a zlib stream (RFC 1950): the checksum of n zeros is n modulo 65521 above 1."""
    return b"\x78\x9c" + deflated_zeros(count) + struct.pack(">I", (count % 65521) << 16 | 1)


def gzip_zeros(count: int, *, prefix: bytes = b"") -> bytes:
    """The same as a gzip file (RFC 1952) of `prefix` and `count` zeros, with its checksum."""
    checksum, block = zlib.crc32(prefix), bytes(BLOCK)
    for _ in range(count // BLOCK):
        checksum = zlib.crc32(block, checksum)
    checksum = zlib.crc32(bytes(count % BLOCK), checksum)
    tail = struct.pack("<II", checksum, (len(prefix) + count) % 2**32)
    return b"\x1f\x8b\x08\0\0\0\0\0\2\xff" + deflated_zeros(count, prefix=prefix) + tail


# ---- PNG


def chunk(name: bytes, content: bytes) -> bytes:
    """One chunk with its checksum."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, data: bytes, *, bits: int = 8, colour: int = 0, extra: bytes = b"") -> bytes:
    """A PNG whose header, `extra` chunks and compressed `data` are as given."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return SIGNATURE + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def black_png(edge: int, *, bits: int = 1, colour: int = 0) -> bytes:
    """A complete black PNG of edge x edge pixels, as small as can be. `colour` 0 grey, 2 RGB."""
    row = 1 + (edge * bits * (3 if colour == 2 else 1) + 7) // 8
    return png(edge, edge, zlib_zeros(row * edge), bits=bits, colour=colour)


def good_png(*, extra: bytes = b"") -> bytes:
    """A 64 x 64 grey PNG with `extra` chunks."""
    rows = b"".join(b"\0" + row.tobytes() for row in picture())
    return png(64, 64, zlib.compress(rows), extra=extra)


# ---- JPEG


def segment(marker: int, content: bytes) -> bytes:
    """One marker segment with its length."""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def slow_jpeg(edge: int, scans: int) -> bytes:
    """A progressive JPEG of edge x edge pixels that makes its decoder go through the image `scans` times.

    A scan of a single end-of-band run is a few bytes and covers 32,767 blocks of 8 x 8 pixels.
    """
    frame = segment(0xC2, struct.pack(">BHHBBBB", 8, edge, edge, 1, 1, 0x11, 0))
    direct = segment(0xC4, b"\0" + bytes([1] + [0] * 15) + b"\0")  # one code, "0": difference 0
    runs = segment(0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\xe0")  # "0": run of 2^14 + 14 bits
    first = segment(0xDA, bytes((1, 1, 0, 0, 0, 0)))
    scan = segment(0xDA, bytes((1, 1, 0, 1, 63, 0))) + bytes((0x7F, 0xFF, 0)) * 4
    tables = segment(0xDB, b"\0" + bytes([1] * 64)) + direct + runs
    return b"\xff\xd8" + tables + frame + first + bytes(64) + scan * scans + b"\xff\xd9"


def lying_jpeg(width: int, height: int) -> bytes:
    """A JPEG of 64 x 64 pixels whose header declares another size."""
    content = bytearray(encoded(picture(), "JPEG"))
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(content)


# ---- TIFF

Entry = tuple[int, int, int]  # type, count, value or offset
_SHORT, _LONG_TYPE = 3, 4


def tiff(data: bytes | None = None, *, following: int = 0, **changes: Entry | None) -> bytes:
    """A TIFF of 64 x 64 grey pixels in one strip; `changes` by tag, such as t256=(4, 1, 65535); None leaves it out.

    `following`: offset of the next directory; -1 means this one, again.
    """
    stored = picture().tobytes() if data is None else data
    start = 8 + len(stored) + len(stored) % 2
    entries: dict[int, Entry | None] = {
        256: (_LONG_TYPE, 1, 64),
        257: (_LONG_TYPE, 1, 64),
        258: (_SHORT, 1, 8),
        259: (_SHORT, 1, 1),
        262: (_SHORT, 1, 1),
        273: (_LONG_TYPE, 1, 8),
        277: (_SHORT, 1, 1),
        278: (_LONG_TYPE, 1, 64),
        279: (_LONG_TYPE, 1, len(stored)),
    }
    entries |= {int(name[1:]): entry for name, entry in changes.items()}
    kept = sorted((tag, *entry) for tag, entry in entries.items() if entry is not None)
    directory = struct.pack("<H", len(kept)) + b"".join(struct.pack("<HHII", *entry) for entry in kept)
    after = struct.pack("<I", start if following < 0 else following)
    return b"II*\0" + struct.pack("<I", start) + stored.ljust(start - 8, b"\0") + directory + after


def tiff_chain(count: int) -> bytes:
    """A TIFF with `count` further directories, each of the same picture."""
    first = tiff()
    start = int.from_bytes(first[4:8], "little")
    size = len(first) - start
    offsets = [start + size * number for number in range(1, count + 1)] + [0]
    return first[:start] + b"".join(first[start:-4] + struct.pack("<I", each) for each in offsets)


# ---- DICOM


def element(tag: int, vr: bytes, value: bytes, *, length: int | None = None) -> bytes:
    """One element in explicit little endian; `length` lies."""
    padded = value + (b"" if len(value) % 2 == 0 else b"\0" if vr in (*_LONG, b"UI") else b" ")
    size = len(padded) if length is None else length
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr
    return head + (struct.pack("<HI", 0, size) if vr in _LONG else struct.pack("<H", size)) + padded


def meta(syntax: str, *, preamble: bytes = b"", kind: str = ULTRASOUND) -> bytes:
    """Preamble and file meta information."""
    body = element(0x00020002, b"UI", kind.encode()) + element(0x00020003, b"UI", b"1.2.3")
    body += element(0x00020010, b"UI", syntax.encode())
    return (
        preamble.ljust(128, b"\0") + b"DICM" + element(0x00020000, b"UL", struct.pack("<I", len(body))) + body
    )


def dataset(*, kind: str = ULTRASOUND, pixels: bytes | None = b"", **changes: bytes | None) -> bytes:
    """The data set of a 64 x 64 image of 8 bits; `changes` by tag, such as t00280010=b"US..." (VR, value).

    None leaves an element out; `pixels` b"" is the picture, None no PixelData, else the element as it is written.
    """
    short = struct.Struct("<H").pack
    elements: dict[int, bytes | None] = {
        0x00080016: b"UI" + kind.encode(),
        0x00280002: b"US" + short(1),
        0x00280004: b"CSMONOCHROME2",
        0x00280010: b"US" + short(64),
        0x00280011: b"US" + short(64),
        0x00280100: b"US" + short(8),
        0x00280101: b"US" + short(8),
        0x00280102: b"US" + short(7),
        0x00280103: b"US" + short(0),
    }
    elements |= {int(name[1:], 16): value for name, value in changes.items()}
    body = b"".join(
        element(tag, value[:2], value[2:]) for tag, value in sorted(elements.items()) if value is not None
    )
    stored = element(0x7FE00010, b"OB", picture().tobytes()) if pixels == b"" else pixels or b""
    return body + stored


def dicom(*, syntax: str = EXPLICIT, preamble: bytes = b"", **parts: Any) -> bytes:
    """A whole file: see `meta` and `dataset`."""
    kind = str(parts.get("kind", ULTRASOUND))
    return meta(syntax, preamble=preamble, kind=kind) + dataset(**parts)


def fragments(*frames: bytes) -> bytes:
    """Encapsulated PixelData, one fragment for each frame, an empty offset table before them."""
    items = b"".join(struct.pack("<HHI", 0xFFFE, 0xE000, len(each)) + each for each in (b"", *frames))
    return element(0x7FE00010, b"OB", b"", length=UNDEFINED) + items + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)


def rle_frame(packed: bytes) -> bytes:
    """A frame of one RLE segment (PS3.5, Annex G)."""
    return struct.pack("<16I", 1, 64, *[0] * 14) + packed + b"\0" * (len(packed) % 2)


def nested(depth: int) -> bytes:
    """`depth` sequences (0008,1140) within each other, ends left out where they are undefined."""
    opening = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, UNDEFINED)
    opening += struct.pack("<HHI", 0xFFFE, 0xE000, UNDEFINED)
    closing = struct.pack("<HHIHHI", 0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0)
    return opening * depth + closing * depth


# ---- NIfTI


def nifti(volume: np.ndarray | None = None, *, data: bytes | None = None, **fields: Any) -> bytes:
    """A NIfTI-1 file of a volume [X,Y,Z]; `fields` of the header are written as given, `data` instead of voxels."""
    import nibabel

    grid = np.arange(32 * 32 * 4, dtype=np.int16).reshape(32, 32, 4) if volume is None else volume
    image = nibabel.Nifti1Image(grid, np.eye(4))
    content = image.to_bytes()
    raw = np.frombuffer(content[:348], image.header.template_dtype).copy()
    for name, value in fields.items():
        raw[name][0] = value
    return raw.tobytes() + (content[348:] if data is None else bytes(4) + data)
