"""From decoded images and arrays to the network's input, and back to the original's pixels. No torch.

Everything is resized in float (Pillow's mode "F"), so that 16 bits survive; shrinking averages (antialiased).
"""

from __future__ import annotations

import numpy as np
import PIL.Image
from PIL.Image import Resampling

from umiad.config import Preprocessing
from umiad.errors import InputError
from umiad.types import Image

SMALLEST_EDGE = 32
_FLAT = 1.0 / 65535.0  # a spread below one step of 16 bits is no contrast that could be stretched
_EXPECTED = "[H,W], [H,W,C] with C = 1, 3 or 4, or [N,H,W]"


def luminance(pixels: np.ndarray) -> np.ndarray:
    """Grey value of each pixel. [C,H,W] with C = 1 or 3 -> float32 [1,H,W], same range.

    Y = 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601, section 2.5.1), written around G so that equal channels
    give exactly that value: a grey image stored in colour equals the same image stored in grey.
    """
    if pixels.shape[0] == 1:
        return pixels.astype(np.float32, copy=False)
    red, green, blue = pixels.astype(np.float32, copy=False)
    grey = green + np.float32(0.299) * (red - green) + np.float32(0.114) * (blue - green)
    return np.clip(grey, 0.0, 1.0)[None]


def check_usable(image: Image) -> None:
    """Refuse images whose shorter edge has fewer than 32 pixels. Raises InputError."""
    height, width = image.size
    if min(height, width) < SMALLEST_EDGE:
        raise InputError(
            image.name,
            f"is too small: {height} x {width} pixels (height x width), "
            f"expected at least {SMALLEST_EDGE} on each edge",
            "use the image in its original resolution",
        )


def to_input(image: Image, preprocessing: Preprocessing) -> np.ndarray:
    """The network's input: image [C,H,W] in 0..1 -> float32 [3,S,S], normalised by mean and std per channel.

    In this order: grey or colour, intensity, equalised (if asked for), stretched to S x S (bilinear,
    antialiased), normalised. A constant image stays constant and finite.
    """
    pixels = luminance(image.pixels) if preprocessing.colour == "grey" else image.pixels
    if preprocessing.intensity == "percentile":
        pixels = _stretch(pixels)
    if preprocessing.equalise is not None:
        pixels = _equalised(pixels, preprocessing.equalise, preprocessing.size)
    size = (preprocessing.size, preprocessing.size)
    resized = np.stack([np.clip(_resize(channel, size), 0.0, 1.0) for channel in pixels])
    mean = np.asarray(preprocessing.mean, dtype=np.float32)[:, None, None]
    std = np.asarray(preprocessing.std, dtype=np.float32)[:, None, None]
    return (np.broadcast_to(resized, (3, *size)) - mean) / std


def original_size(image: Image, preprocessing: Preprocessing) -> tuple[int, int]:
    """Height and width that a detector may know of: the image's own, or the equalised ones."""
    edge = preprocessing.equalise
    return image.size if edge is None else (edge, edge)


def from_array(array: np.ndarray, *, name: str = "array") -> list[Image]:
    """Images from an array [H,W], [H,W,C] with C = 1, 3 or 4 (alpha is composited on black), or [N,H,W].

    uint8 means 0..255, uint16 0..65535, float16/32/64 must lie in 0..1. Three axes whose last has length
    1, 3 or 4 are one image with channels. A stack's images are named `name[0]`, `name[1]`, ...

    Raises:
        InputError: another type, shape or range; values that are not finite; images below 32 pixels.
    """
    scale, bits = _range(array, name)
    if array.ndim == 2:
        images = [_image(array[..., None], scale, bits, name)]
    elif array.ndim == 3 and array.shape[2] in (1, 3, 4):
        images = [_image(array, scale, bits, name)]
    elif array.ndim == 3 and len(array):
        images = [_image(each[..., None], scale, bits, f"{name}[{i}]") for i, each in enumerate(array)]
    else:
        hint = "pass a list of images" if array.ndim == 4 else ""
        raise InputError(name, f"has shape {list(array.shape)}, expected {_EXPECTED}", hint)
    for image in images:
        check_usable(image)
    return images


def resize_map(anomaly_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a map [h,w] to `size` = (H, W) -> float32 [H,W], bilinear, within the range of its input."""
    values = np.ascontiguousarray(anomaly_map, dtype=np.float32)
    if size[0] >= values.shape[0] and size[1] >= values.shape[1]:
        resized = np.ascontiguousarray(_enlarge(_enlarge(values, size[0]).T, size[1]).T)
    else:
        resized = _resize(values, size)
    return np.clip(resized, values.min(), values.max(), out=resized)


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a mask bool [h,w] to `size` = (H, W) -> bool [H,W], nearest neighbour."""
    picture = PIL.Image.fromarray(np.ascontiguousarray(mask, dtype=np.uint8))
    return np.asarray(picture.resize(size[::-1], Resampling.NEAREST)).astype(bool)


def _resize(channel: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[h,w] -> float32 [H,W]: bilinear when enlarging, a triangle filter over the source when shrinking."""
    picture = PIL.Image.fromarray(np.ascontiguousarray(channel, dtype=np.float32))
    return np.array(picture.resize(size[::-1], Resampling.BILINEAR))


def _enlarge(rows: np.ndarray, count: int) -> np.ndarray:
    """[h,w] -> [count,w], count >= h: linear between the centres of rows, constant beyond the outermost.

    What `_resize` does along one axis, up to rounding, at a fraction of its time: every scored image waits for it.
    """
    rows, last = np.ascontiguousarray(rows), len(rows) - 1
    places = np.clip((np.arange(count) + 0.5) * (len(rows) / count) - 0.5, 0, last)
    first = places.astype(np.intp)
    share = (places - first).astype(np.float32)[:, None]
    found, above = rows[first], rows[np.minimum(first + 1, last)]
    found *= 1 - share
    above *= share
    found += above
    return found


def _equalised(pixels: np.ndarray, edge: int, size: int) -> np.ndarray:
    """[C,h,w] -> [C,size,size] with no more detail than edge x edge: area averages, then bicubic up."""
    channels = [PIL.Image.fromarray(np.ascontiguousarray(each, dtype=np.float32)) for each in pixels]
    small = [channel.resize((edge, edge), Resampling.BOX) for channel in channels]
    return np.stack([np.array(channel.resize((size, size), Resampling.BICUBIC)) for channel in small])


def _stretch(pixels: np.ndarray) -> np.ndarray:
    """Map the 1st to 99th percentile to 0..1 and clip; without spread the pixels are returned unchanged."""
    low, high = (float(each) for each in np.percentile(pixels, (1.0, 99.0)))
    if high - low < _FLAT:
        return pixels
    return np.clip((pixels - np.float32(low)) / np.float32(high - low), 0.0, 1.0)


def _range(array: np.ndarray, name: str) -> tuple[float, int]:
    """The value that means white, and the bits per channel, by the array's type. Raises InputError."""
    kind, width = array.dtype.kind, array.dtype.itemsize
    if kind == "u" and width in (1, 2):
        return float(2 ** (8 * width) - 1), 8 * width
    if kind != "f" or width not in (2, 4, 8):
        hint = "convert it, for example (array / array.max()).astype('float32')"
        raise InputError(
            name, f"has type {array.dtype}, expected uint8 (0..255), uint16 (0..65535) or float (0..1)", hint
        )
    if not np.isfinite(array).all():
        raise InputError(name, "holds NaN or infinity, expected finite values in 0..1", "replace them first")
    if array.size and (array.min() < 0 or array.max() > 1):
        reason = f"holds values {array.min():g} to {array.max():g}, expected 0..1 for type {array.dtype}"
        raise InputError(name, reason, "divide by the largest possible value, such as 255")
    return 1.0, 8 * width


def _image(array: np.ndarray, scale: float, bits: int, name: str) -> Image:
    """One image [H,W,C], C = 1, 3 or 4; `scale` is the value of white."""
    pixels = np.moveaxis(array, 2, 0).astype(np.float32) / np.float32(scale)
    mode = {1: "L" if bits == 8 else "I;16" if scale > 1 else "F", 3: "RGB", 4: "RGBA"}[array.shape[2]]
    notes: tuple[str, ...] = ()
    if len(pixels) == 4:
        if float(pixels[3].min(initial=1.0)) < 1.0:
            notes = ("transparent pixels were composited on black",)
        pixels = pixels[:3] * pixels[3]
    return Image(np.ascontiguousarray(pixels), name, mode, bits, notes)
