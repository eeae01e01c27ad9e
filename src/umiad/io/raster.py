"""PNG, JPEG, TIFF and BMP through Pillow, without its traps.

Pillow's traps, and what is done here: `convert("L")` saturates 16 bits (depth is kept), alpha is dropped
(composited on black), EXIF orientation is ignored (applied), bombs only warn (a ceiling on the declared
size, before decoding), a bad checksum passes (`verify`, then reopened), and about fifteen kinds of exception
leave a decoder (one InputError).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import PIL
import PIL.Image
from PIL.Image import Transpose

from umiad.errors import InputError
from umiad.io.quiet import recorded_warnings
from umiad.io.source import DAMAGED, TOO_LARGE, Source
from umiad.types import Image

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_MOST_FRAMES = 1000  # frames are counted one by one, and only for a message
_LABEL_CEILING = 0.1  # a mask whose brightest pixel is darker than this holds label numbers


@dataclass(frozen=True, eq=False)
class _Decoded:
    """`colour` float32 [C,H,W] in 0..1 without transparency, `alpha` float32 [H,W] in 0..1 or None."""

    colour: np.ndarray
    alpha: np.ndarray | None
    mode: str
    bits: int
    notes: tuple[str, ...]


def read_pixels(content: bytes, source: Source) -> Image:
    """Decode the bytes of a file -> `Image`, transparency composited on black. Raises InputError."""
    decoded = _decode(content, source)
    pixels, notes = decoded.colour, decoded.notes
    if decoded.alpha is not None and float(decoded.alpha.min()) < 1.0:
        pixels *= decoded.alpha
        notes = (*notes, "transparent pixels were composited on black")
    return Image(np.ascontiguousarray(pixels), source.name, decoded.mode, decoded.bits, notes)


def read_bright(content: bytes, source: Source) -> np.ndarray:
    """Decode a mask -> bool [H,W]: brightest channel above half of the range, alpha ignored.

    Raises InputError, also for label numbers (a largest value such as 1 of 255), which would otherwise
    silently give an empty mask.
    """
    brightest = _decode(content, source).colour.max(axis=0)
    peak = float(brightest.max())
    if 0.0 < peak < _LABEL_CEILING:
        raise InputError(
            source.name,
            f"the mask's largest value is {peak:.4g} of the full range, expected black (0) and white (1)",
            "save abnormal pixels as white (255 of 255), not as a label number",
        )
    return brightest > 0.5


def _decode(content: bytes, source: Source) -> _Decoded:
    """Check the header, verify checksums, decode. Raises InputError for anything that goes wrong."""
    try:
        bomb = PIL.Image.DecompressionBombWarning  # ours is the lower ceiling
        with recorded_warnings(dropped=bomb) as messages:
            with PIL.Image.open(BytesIO(content), formats=[source.kind]) as picture:
                _check_header(picture, source)
                _check_density(picture, content, source)
                picture.verify()
            with PIL.Image.open(BytesIO(content), formats=[source.kind]) as picture:
                bits = _bits(picture)
                picture.load()
                upright = _upright(picture)
                colour, alpha = _channels(upright, bits, source.name)
    except InputError:
        raise
    except PIL.Image.DecompressionBombError as error:
        raise InputError(source.name, f"declares too many pixels: {error}", "export it smaller") from error
    except PIL.UnidentifiedImageError as error:
        reason = f"starts like a {source.kind} file, but its header cannot be read"
        raise InputError(source.name, reason, DAMAGED) from error
    except MemoryError as error:
        raise InputError(source.name, *TOO_LARGE) from error
    except Exception as error:
        reason = f"cannot be decoded as {source.kind}: {error or type(error).__name__}"
        raise InputError(source.name, reason, DAMAGED) from error
    notes = _notes(messages, picture.mode, bits, source)
    return _Decoded(colour, alpha, picture.mode, bits, notes)


def _notes(messages: list[str], mode: str, bits: int, source: Source) -> tuple[str, ...]:
    """Remarks for the user. Raises InputError where a warning means that the pixels are incomplete."""
    if source.kind == "TIFF" and any("runcated" in message for message in messages):
        raise InputError(source.name, "is a truncated TIFF file", "export it again")
    notes = [f"the file's metadata are damaged: {message}" for message in dict.fromkeys(messages)]
    if bits == 16 and not mode.startswith("I"):
        notes.append("16 bits per channel were reduced to 8 (only grey keeps 16 bits)")
    return tuple(notes)


def _check_header(picture: PIL.Image.Image, source: Source) -> None:
    width, height = picture.size
    if width * height > source.limits.max_pixels:
        raise InputError(
            source.name,
            f"declares {width} x {height} = {width * height} pixels, the ceiling is {source.limits.max_pixels}",
            "export it smaller, or raise max_pixels",
        )
    if min(width, height) < source.limits.min_edge:
        raise InputError(
            source.name,
            f"has {height} x {width} pixels, expected at least {source.limits.min_edge} on each edge",
        )
    if (frames := _frames(picture)) > 1:
        count = f"{frames}" if frames < _MOST_FRAMES else f"at least {frames}"
        raise InputError(
            source.name, f"holds {count} frames, expected one", "export the frame as a file of its own"
        )


def _check_density(picture: PIL.Image.Image, content: bytes, source: Source) -> None:
    """Refuse a JPEG that cannot hold its pixels: a Huffman code needs a bit for each 8 x 8 block.

    libjpeg fills what is missing with grey and Pillow does not tell. Arithmetic coding (SOF9, SOF10) needs less.
    """
    if picture.format != "JPEG" or b"\xff\xc9" in content or b"\xff\xca" in content:
        return
    width, height = picture.size
    blocks = -(-width // 8) * -(-height // 8)
    if len(content) * 8 < blocks:
        raise InputError(
            source.name,
            f"holds {len(content)} bytes, too few for its {width} x {height} pixels",
            "it is truncated; export it again",
        )


def _frames(picture: PIL.Image.Image) -> int:
    """The number of frames; counting stops early so that a chain of a million frames costs nothing."""
    if picture.format != "TIFF":
        return int(getattr(picture, "n_frames", 1))
    count = 1
    while count < _MOST_FRAMES:
        try:
            picture.seek(count)
        except EOFError:
            break
        count += 1
    picture.seek(0)
    return count


def _bits(picture: PIL.Image.Image) -> int:
    """Bits per channel as stored; asked before loading, which forgets the raw mode ("RGB;16B", "L;4")."""
    if picture.mode in ("I", "F"):
        return 32
    raw = str([tile.args for tile in getattr(picture, "tile", [])])
    if picture.mode.startswith("I;16") or ";16" in raw:
        return 16
    if picture.mode == "L":
        return next((bits for bits in (1, 2, 4) if f"L;{bits}" in raw), 8)
    return 1 if picture.mode == "1" else 8


def _upright(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Apply the EXIF orientation (1..8); anything else counts as upright. TIFF was turned while loading."""
    try:
        orientation = picture.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception as error:
        warnings.warn(f"orientation unreadable, taken as upright ({type(error).__name__})", stacklevel=2)
        orientation = 1
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return picture if method is None else picture.transpose(method)


def _channels(picture: PIL.Image.Image, bits: int, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Colour [C,H,W] and alpha [H,W] or None, float32 in 0..1, of a loaded picture in any of Pillow's modes.

    CMYK: R = (1 - C)(1 - K) and so on, without a colour profile; YCCK arrives as CMYK.
    """
    mode = picture.mode
    if mode in ("I", "F") or mode.startswith("I;16"):
        grey = np.asarray(picture)
        return _deep(grey, mode, name)[None], _keyed(picture, bits, grey[..., None])
    if mode == "P":
        picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
    elif mode in ("PA", "RGBa", "La"):
        picture = picture.convert("LA" if mode == "La" else "RGBA")
    elif mode == "1":
        picture = picture.convert("L")
    elif mode not in ("L", "LA", "RGB", "RGBA", "CMYK"):
        picture = picture.convert("RGB")
    stored = np.asarray(picture)
    planes = stored.reshape(*stored.shape[:2], -1)
    channels = np.ascontiguousarray(np.moveaxis(planes, 2, 0)).astype(np.float32)
    channels /= np.float32(255)  # in place: large images come close to the ceiling of memory
    if picture.mode == "CMYK":
        return (1 - channels[:3]) * (1 - channels[3:]), None
    if picture.mode in ("LA", "RGBA"):
        return channels[:-1], channels[-1]
    return channels, _keyed(picture, bits, planes)


def _deep(grey: np.ndarray, mode: str, name: str) -> np.ndarray:
    """Grey [H,W] with more than 8 bits -> float32 in 0..1. Raises InputError for a range that is unknown."""
    low, high = float(grey.min()), float(grey.max())
    ceiling = 1.0 if mode == "F" else 65535.0
    if not (low >= 0.0 and high <= ceiling):  # NaN fails too
        kind = "floating-point" if mode == "F" else "32-bit integer"
        raise InputError(
            name,
            f"holds {kind} values {low:g} to {high:g}, expected 0 to {ceiling:g}",
            "save it as 16-bit grey",
        )
    return grey.astype(np.float32) / np.float32(ceiling)


def _keyed(picture: PIL.Image.Image, bits: int, planes: np.ndarray) -> np.ndarray | None:
    """Alpha [H,W] of a PNG that names one colour as transparent (chunk tRNS), else None.

    The key is written in the stored depth of `bits`, `planes` [H,W,C] may have been scaled to 8 bits.
    Deviation: in RGB files with 16 bits, which Pillow reduces to 8, the key is compared in 8 bits.
    """
    key = picture.info.get("transparency")
    if not isinstance(key, (int, tuple)):
        return None
    wanted = np.atleast_1d(np.asarray(key, dtype=np.int64))
    if planes.dtype == np.uint8 and bits == 16:
        wanted = wanted >> 8
    elif picture.mode == "L" and bits in (2, 4):
        wanted = wanted * 255 // (2**bits - 1)
    return (planes != wanted).any(axis=2).astype(np.float32)
