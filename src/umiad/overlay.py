"""Pictures for people: the image beside itself under the anomaly map, on one colour scale per model.

The scale is tied to the model's threshold and never stretched per image: the same colour means the same value
in every picture. Below half the threshold nothing is drawn, so that an unremarkable image stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO

import numpy as np
import PIL.Image
from PIL import ImageDraw, ImageFont
from PIL.Image import Resampling

from umiad.errors import InputError
from umiad.types import Image, Region

MIN_HEIGHT, MAX_EDGE = 256, 1024  # of one panel, in pixels; the second wins
_BAR_WIDTH, _GAP, _BAR_HEIGHT = 16, 8, 128
_PAPER, _INK, _TRUTH = (255, 255, 255), (32, 32, 32), (0, 230, 64)
_OPACITY = 0.62
PNG_LEVEL = 2
"""zlib's level for pictures, chosen for speed: packing them cost more than the backbone."""

# Colours in OKLab (lightness, green-red, blue-yellow); lightness rises throughout, so that the order survives
# in grey and for colour-blind readers. With a threshold the hue jumps from cold to warm at position 1/2.
_COLD = ((0.28, -0.01, -0.16), (0.45, -0.05, -0.12), (0.60, -0.11, -0.02))
_WARM = ((0.66, 0.19, 0.11), (0.80, 0.06, 0.16), (0.97, -0.03, 0.12))
_PLAIN = (
    (0.28, -0.01, -0.16),
    (0.50, 0.14, -0.10),
    (0.66, 0.19, 0.06),
    (0.82, 0.06, 0.15),
    (0.97, -0.03, 0.11),
)


@dataclass(frozen=True)
class ColourScale:
    """Which map value gets which colour: nothing at `low` and below, strongest at `high` and above.

    `threshold` lies in the middle of the colours; None where the model has none, then `high` is a reference.
    """

    low: float
    high: float
    threshold: float | None

    def position(self, values: np.ndarray) -> np.ndarray:
        """Place of map values on the scale, 0..1, monotone; the threshold is at 1/2.

        Above the threshold the place grows like the square root of the excess: maps may be bounded just
        above their threshold, and a small excess must still show.
        """
        if self.threshold is None:
            return np.clip((values - self.low) / (self.high - self.low), 0.0, 1.0)
        below = np.clip((values - self.low) / (self.threshold - self.low), 0.0, 1.0)
        above = np.clip((values - self.threshold) / (self.high - self.threshold), 0.0, 1.0)
        return np.where(values < self.threshold, 0.5 * below, 0.5 + 0.5 * np.sqrt(above))

    def colours(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Colour uint8 [...,3] and opacity [...] at places 0..1; the opacity starts at 0 and is convex."""
        table = _table(jump=self.threshold is not None)
        index = np.minimum((position * len(table)).astype(np.intp), len(table) - 1)
        rising = np.minimum(position * 2.0, 1.0) if self.threshold is not None else position
        return table[index], _OPACITY * rising**2

    def ticks(self) -> list[tuple[float, str]]:
        """Places on the scale with their labels, from the bottom up."""
        low, high = _number(self.low), _number(self.high)
        if self.threshold is None:
            return [(0.0, low), (1.0, f"{high} reference")]
        return [(0.0, low), (0.5, f"{_number(self.threshold)} threshold"), (1.0, high)]


def colour_scale(threshold: float | None, reference: float) -> ColourScale:
    """The one scale of a model, from its map threshold, or (None) from the largest value on normal images.

    With a threshold t > 0 colours run from t/2 to 2t; where t <= 0 a distance takes the place of the ratio.
    Without one they run from 0 to `reference`. Raises InputError where a value is not finite.
    """
    value = reference if threshold is None else threshold
    if not (math.isfinite(value) and math.isfinite(reference)):
        raise InputError(
            "colour scale",
            f"threshold {threshold}, reference {reference}; expected finite",
            "fit the model again",
        )
    if threshold is None:
        high = reference or 1.0
        return ColourScale(low=min(0.0, 2.0 * high), high=high, threshold=None)
    if threshold > 0:
        return ColourScale(low=threshold / 2.0, high=2.0 * threshold, threshold=threshold)
    span = max(abs(threshold), abs(reference - threshold)) or 1.0
    return ColourScale(low=threshold - span / 2.0, high=threshold + span, threshold=threshold)


def draw_overlay(
    image: Image,
    anomaly_map: np.ndarray,
    *,
    scale: ColourScale,
    regions: Sequence[Region] = (),
    mask: np.ndarray | None = None,
    beside: bool = True,
) -> np.ndarray:
    """The grey image | the image under the map | colour bar -> uint8 [H',W',3]; the first only with `beside`.

    `anomaly_map` [H,W] and `mask` bool [H,W] (ground truth) in the image's pixels. White-and-black line:
    the segmentation at the threshold, within the boxes of `regions` where any are given. Dashed green line:
    the mask, in both panels. One panel is at least 256 high and at most 1024 on its longer edge.

    Raises InputError when the map or mask differs in size from the image.
    """
    _check_sizes(image, anomaly_map, mask)
    size = _panel_size(image.size)
    ground = np.repeat(_display(image, size)[..., None], 3, axis=2)
    colour, opacity = scale.colours(scale.position(_resize(anomaly_map, size).astype(np.float64)))
    tinted = ground + (colour - ground) * opacity[..., None]
    panels = [np.round(ground).astype(np.uint8), np.round(tinted).astype(np.uint8)]
    if mask is not None:
        for panel in panels:
            _outline(panel, _shape(mask, size), inner=_TRUTH, outer=None)
    if scale.threshold is not None:
        segmentation = _segmentation(anomaly_map, scale.threshold, regions)
        _outline(panels[1], _shape(segmentation, size), inner=(255, 255, 255), outer=(0, 0, 0))
    return _compose(panels if beside else panels[1:], scale)


def draw_image(image: Image, *, mask: np.ndarray | None = None) -> np.ndarray:
    """The grey image, with the `mask` bool [H,W] (ground truth) as a dashed green line -> uint8 [H',W',3].

    Drawn as the first panel of `draw_overlay`. Raises InputError when the mask differs in size from the image.
    """
    _check_sizes(image, None, mask)
    size = _panel_size(image.size)
    panel = np.round(np.repeat(_display(image, size)[..., None], 3, axis=2)).astype(np.uint8)
    if mask is not None:
        _outline(panel, _shape(mask, size), inner=_TRUTH, outer=None)
    return panel


def png_bytes(array: np.ndarray) -> bytes:
    """PNG file of an array [H,W] (uint8, uint16, bool) or [H,W,3] (uint8). Raises InputError otherwise."""
    stored = array.astype(np.uint8) * np.uint8(255) if array.dtype == bool else array
    grey = stored.ndim == 2 and stored.dtype in (np.uint8, np.uint16)
    colour = stored.ndim == 3 and stored.shape[2] == 3 and stored.dtype == np.uint8
    if not (grey or colour) or not stored.size:
        raise InputError(
            "picture",
            f"has shape {list(array.shape)} and type {array.dtype}, "
            "expected [H,W] of uint8, uint16 or bool, or [H,W,3] of uint8",
        )
    buffer = BytesIO()
    PIL.Image.fromarray(np.ascontiguousarray(stored)).save(buffer, format="PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def _check_sizes(image: Image, anomaly_map: np.ndarray | None, mask: np.ndarray | None) -> None:
    for what, array in (("anomaly map", anomaly_map), ("mask", mask)):
        if array is not None and array.shape != image.size:
            raise InputError(
                image.name,
                f"the {what} has shape {list(array.shape)}, expected the image's {list(image.size)}",
            )


def _panel_size(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width at which an image of `size` is drawn."""
    factor = min(max(1.0, MIN_HEIGHT / size[0]), MAX_EDGE / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _display(image: Image, size: tuple[int, int]) -> np.ndarray:
    """Luminance in 0..255 at `size`; deeper than 8 bits it is windowed, as 12 bits in 16 would be black."""
    pixels = image.pixels
    grey = pixels[0] if len(pixels) == 1 else np.tensordot((0.299, 0.587, 0.114), pixels, 1)
    grey = _resize(grey, size)
    if image.bits > 8:
        low, high = np.percentile(grey, (0.5, 99.5))
        grey = (grey - low) / (high - low) if high > low else grey
    return np.clip(grey * 255.0, 0.0, 255.0)


def _resize(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    picture = PIL.Image.fromarray(np.ascontiguousarray(array, dtype=np.float32))
    return np.asarray(picture.resize(size[::-1], Resampling.BILINEAR))


def _shape(shape: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A bool shape at drawing size: smooth when enlarged, and nothing vanishes when shrunk."""
    resized = _resize(shape, size)
    return resized >= 0.5 if size[0] >= shape.shape[0] else resized > 0.0


def _segmentation(anomaly_map: np.ndarray, threshold: float, regions: Sequence[Region]) -> np.ndarray:
    segmentation = anomaly_map > threshold
    if not regions:
        return segmentation
    inside = np.zeros_like(segmentation)
    for x0, y0, x1, y1 in (region.box for region in regions):
        inside[y0:y1, x0:x1] = True
    return segmentation & inside


def _outline(
    panel: np.ndarray,
    shape: np.ndarray,
    *,
    inner: tuple[int, int, int],
    outer: tuple[int, int, int] | None,
) -> None:
    """Draw the outline of `shape` into `panel` [H,W,3] in place; without an `outer` line it is dashed."""
    if not shape.any():
        return
    from scipy.ndimage import binary_dilation, binary_erosion

    width = max(1, round(max(shape.shape) / 400))
    full = np.ones((3, 3), dtype=bool)
    line = shape & ~binary_erosion(shape, full, iterations=width)
    if outer is None:
        rows, columns = np.indices(shape.shape) // (5 * width)
        line &= (rows + columns) % 3 > 0
    else:
        panel[binary_dilation(shape, full, iterations=width) & ~shape] = outer
    panel[line] = inner


def _compose(panels: Sequence[np.ndarray], scale: ColourScale) -> np.ndarray:
    """Put the panels and the colour bar side by side on white."""
    font = ImageFont.load_default(size=12)
    ticks = scale.ticks()
    text_width = math.ceil(max(font.getlength(label) for _, label in ticks))
    height, width = panels[0].shape[:2]
    bar_left = len(panels) * (width + _GAP)
    total = max(height, _BAR_HEIGHT), bar_left + _BAR_WIDTH + _GAP + text_width + 2
    canvas = np.full((*total, 3), _PAPER, dtype=np.uint8)
    for number, panel in enumerate(panels):
        left = number * (width + _GAP)
        canvas[:height, left : left + width] = panel
    top, bottom = 8, total[0] - 8
    place = np.linspace(1.0, 0.0, bottom - top)
    colour, opacity = scale.colours(place)
    strip = 96.0 + (colour - 96.0) * (opacity / _OPACITY)[:, None]
    canvas[top:bottom, bar_left : bar_left + _BAR_WIDTH] = np.round(strip)[:, None].astype(np.uint8)
    picture = PIL.Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for where, label in ticks:
        y = round(top + (1.0 - where) * (bottom - top - 1))
        draw.line((bar_left, y, bar_left + _BAR_WIDTH + 3, y), fill=_INK)
        draw.text((bar_left + _BAR_WIDTH + _GAP, y), label, fill=_INK, font=font, anchor="lm")
    return np.array(picture)


def _number(value: float) -> str:
    return f"{value:.3g}"


@lru_cache(maxsize=2)
def _table(*, jump: bool) -> np.ndarray:
    """256 colours, uint8 [256,3]; with `jump` the hue changes from cold to warm in the middle."""
    if not jump:
        return _ramp(_PLAIN, 256)
    return np.concatenate([_ramp(_COLD, 128), _ramp(_WARM, 128)])


def _ramp(anchors: Sequence[tuple[float, float, float]], count: int) -> np.ndarray:
    """`count` colours along OKLab anchors -> sRGB uint8 [count,3].

    Source: B. Ottosson, "A perceptual color space for image processing" (2020), and IEC 61966-2-1 (sRGB).
    """
    knots, places = np.linspace(0.0, 1.0, len(anchors)), np.linspace(0.0, 1.0, count)
    lab = np.stack([np.interp(places, knots, channel) for channel in np.transpose(anchors)], axis=1)
    to_lms = np.array(
        [
            [1, 0.3963377774, 0.2158037573],
            [1, -0.1055613458, -0.0638541728],
            [1, -0.0894841775, -1.2914855480],
        ]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip((lab @ to_lms.T) ** 3 @ to_rgb.T, 0.0, 1.0)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(encoded * 255.0).astype(np.uint8)
