"""Synthetic anomalies: altered patches planted in normal images, each with the mask of what was altered.

They serve to compare settings of a detector where only normal images exist. They are no model of any disease:
how well a detector finds them says little about how well it finds real findings. numpy and scipy, no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.ndimage import binary_fill_holes, gaussian_filter, map_coordinates, zoom

from umiad.config import nearest
from umiad.errors import ConfigError, InputError

FAMILIES: tuple[str, ...] = ("blob", "texture", "blur", "sharpen", "deform", "dark", "bright")
AREAS = (0.003, 0.30)  # share of the image
_SMALLEST_EDGE = 64
_COARSE = 64  # places are chosen on a grid whose shorter edge has about this many points
_PLACES = 12  # centres tried until enough of the outline lies on foreground
_ON_FOREGROUND = 0.85
_OUTSIDE = 0.3  # how much further an outline would reach on foreground than beside it
_TRIES = 8  # draws of shape, place and strength until the change can be seen in 8 bits
_VISIBLE = 1.0 / 255.0
_SPREAD = (0.03, 0.2)  # contrast is drawn relative to the spread of the foreground, kept in this range
_SMOOTH = ("blob", "deform")  # families whose edge reaches towards the centre
_IQR = 1.349  # interquartile range of a Gaussian, in standard deviations


@dataclass(frozen=True, eq=False)
class SyntheticAnomaly:
    """One altered image.

    `pixels` float32 [H,W] in 0..1; `mask` bool [H,W], True where the soft weight of the alteration exceeds
    1/2, at least one pixel; `family` one of FAMILIES; `area` the share of the image that the mask covers.
    """

    pixels: np.ndarray
    mask: np.ndarray
    family: str
    area: float


@dataclass(frozen=True, eq=False)
class _Scene:
    """An image [H,W] before planting.

    `foreground` bool [h,w] is every `stride`-th pixel, holes filled, and `within` float64 [H,W] the same with
    soft edges, 1 on foreground. `values` are its grey values; `spread` their robust standard deviation.
    """

    pixels: np.ndarray
    donors: Sequence[np.ndarray]
    foreground: np.ndarray
    within: np.ndarray
    stride: int
    values: np.ndarray
    spread: float


@dataclass(frozen=True, eq=False)
class _Spot:
    """Where to alter: `weight` float64 [h,w] in 0..1 on `box`, the rows and columns of its support.

    `centre` (row, column) in the image's pixels; `radius` of the disc of equal area, in pixels.
    """

    weight: np.ndarray
    box: tuple[slice, slice]
    centre: tuple[float, float]
    radius: float


@dataclass(frozen=True, eq=False)
class _Outline:
    """A closed smooth curve around the origin: a tilted ellipse times 1 + a few low Fourier orders."""

    tilt: complex
    aspect: float
    waves: np.ndarray  # complex, highest order first; their real parts stay above -1 in sum

    def depth(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """0 at the origin, 1 on the curve that encloses about pi square pixels; grows linearly outwards."""
        turned = (columns + 1j * rows) * self.tilt
        flat = turned.real / np.sqrt(self.aspect) + 1j * turned.imag * np.sqrt(self.aspect)
        length = np.abs(flat)
        direction = flat / np.maximum(length, 1e-9)
        return length / (1.0 + np.polyval(self.waves, direction).real)

    @property
    def area(self) -> float:
        """Of the curve where depth is 1, in square pixels."""
        return float(np.pi * (1.0 + 0.5 * np.sum(np.abs(self.waves) ** 2)))


def plant(
    pixels: np.ndarray, *, family: str, area: float, donors: Sequence[np.ndarray], rng: np.random.Generator
) -> SyntheticAnomaly:
    """Alter one patch of a normal image: float32 [H,W] in 0..1, both edges at least 64 pixels.

    `area` is the share of the image that the mask shall cover (rounded to pixels). `donors` are other normal
    images of the same size; only "texture" reads them. Outside the patch's soft edge the pixels stay bit-equal.
    Inside the mask they change by 1/255 on average at least: shape, place and strength are drawn up to eight
    times until they do. Some images do not allow it (blur, sharpen and deform in a constant one, dark in a
    black one); the draw with the largest change is returned then, which may be none at all.

    Raises:
        ConfigError: an unknown family, or an area that is not between 0 and 1.
        InputError: an image or donor of another type, shape or range; "texture" without donors.
    """
    _check_family(family)
    if not 0.0 < area < 1.0:
        raise ConfigError(f"area {area!r} is not a share of the image, expected above 0 and below 1")
    _check_images([pixels], "pixels")
    _check_images(donors, "donors[{}]", like=pixels)
    if family == "texture" and not len(donors):
        raise InputError("donors", "is empty, 'texture' expected at least one image", "leave 'texture' out")
    return _planted(pixels, family, area, donors, rng)


def synthetic_set(
    images: Sequence[np.ndarray], *, per_image: int, seed: int, families: Sequence[str] = FAMILIES
) -> Iterator[SyntheticAnomaly]:
    """Yield `per_image` anomalies for each normal image (float32 [H,W] in 0..1, all of one size), in order.

    Areas are log-uniform in AREAS. `families` come in cycles, each shuffled, which run on from image to image:
    how often they occur differs by one at most. Anomaly i of image j depends on (seed, j, i), `families` and
    `per_image` (which decide its family), not on how many images follow; those of "texture" also depend on the
    other images, from which their patches come.

    Raises (at the call, not at the first item):
        ConfigError: an unknown or repeated family or none, `per_image` below 1, a negative seed.
        InputError: no images, unusable or unequal ones, "texture" with a single image.
    """
    names = tuple(families)
    for family in names:
        _check_family(family)
    if not names or len(set(names)) < len(names) or per_image < 1 or seed < 0:
        raise ConfigError(
            f"synthetic anomalies: families {list(names)}, per_image {per_image}, seed {seed}; "
            "expected families named once each, per_image from 1 and seed from 0 up"
        )
    images = list(images)
    _check_images(images, "images[{}]")
    if len(images) < (2 if "texture" in names else 1):
        reason = f"holds {len(images)}, expected at least 1, and 2 for 'texture', which borrows from others"
        raise InputError("images", reason, "add normal images")
    return _each(images, per_image, seed, names)


def _each(
    images: list[np.ndarray], per_image: int, seed: int, names: tuple[str, ...]
) -> Iterator[SyntheticAnomaly]:
    """The anomalies of a checked set. The fourth number keeps the two kinds of generators apart."""
    for j, pixels in enumerate(images):
        donors = images[:j] + images[j + 1 :]
        for i in range(per_image):
            cycle, place = divmod(j * per_image + i, len(names))
            order = np.random.default_rng([seed, cycle, 0, 1]).permutation(len(names))
            rng = np.random.default_rng([seed, j, i, 0])
            area = float(np.exp(rng.uniform(*np.log(AREAS))))
            yield _planted(pixels, names[order[place]], area, donors, rng)


def _planted(
    pixels: np.ndarray, family: str, area: float, donors: Sequence[np.ndarray], rng: np.random.Generator
) -> SyntheticAnomaly:
    """`plant` without checks."""
    scene = _scene(pixels, donors)
    largest = -1.0
    for attempt in range(_TRIES):
        spot = _spot(scene, area, family in _SMOOTH, rng)
        altered = np.clip(_ALTER[family](scene, spot, attempt / _TRIES, rng), 0.0, 1.0)
        before = pixels[spot.box]
        after = np.where(spot.weight > 0.0, altered, before).astype(np.float32)
        change = float(np.abs(after - before)[spot.weight > 0.5].mean())
        if change > largest:
            best_spot, best_after, largest = spot, after, change
        if change >= _VISIBLE:
            break
    result, mask = pixels.copy(), np.zeros(pixels.shape, dtype=bool)
    result[best_spot.box] = best_after
    mask[best_spot.box] = best_spot.weight > 0.5
    return SyntheticAnomaly(result, mask, family, float(mask.mean()))


def _scene(pixels: np.ndarray, donors: Sequence[np.ndarray]) -> _Scene:
    """Foreground: a tenth of the way from the 1st to the 99th percentile, after a blur; else everything."""
    stride = max(1, min(pixels.shape) // _COARSE)
    coarse = pixels[::stride, ::stride].astype(np.float64)
    blurred = gaussian_filter(coarse, 1.0)
    low, high = np.percentile(blurred, (1.0, 99.0))
    foreground = binary_fill_holes(blurred > low + max(0.1 * (high - low), 1e-6))
    if not foreground.any():
        foreground = np.ones_like(foreground)
    rows, columns = (np.arange(edge) // stride for edge in pixels.shape)
    within = gaussian_filter(foreground[np.ix_(rows, columns)].astype(np.float64), 0.7 * stride)
    values = coarse[foreground]
    lower, upper = np.percentile(values, (25.0, 75.0))
    spread = float(np.clip((upper - lower) / _IQR, *_SPREAD))
    return _Scene(pixels, donors, foreground, within, stride, values, spread)


def _spot(scene: _Scene, area: float, smooth: bool, rng: np.random.Generator) -> _Spot:
    """Draw an outline, a place and an edge (`smooth`: one that reaches towards the centre).

    Outside the foreground depth grows faster, so that patches end near the surface of what is imaged.
    """
    shape = scene.pixels.shape
    outline = _outline(rng)
    centre = _place(scene, outline, area, rng)
    rows, columns = np.arange(shape[0])[:, None] - centre[0], np.arange(shape[1])[None] - centre[1]
    depth = outline.depth(rows, columns) / (_OUTSIDE + (1.0 - _OUTSIDE) * scene.within)
    depth /= _size(depth, area)
    radius = float(np.sqrt(area * depth.size / np.pi))
    if smooth:
        width = rng.uniform(1.0, 1.7) * radius
    else:
        width = np.exp(rng.uniform(np.log(min(1.8, radius)), np.log(max(1.8, 0.9 * radius))))
    inside = np.clip(0.5 + (1.0 - depth) * (radius / width), 0.0, 1.0)
    weight = inside * inside * (3.0 - 2.0 * inside)
    across, down = (np.flatnonzero((weight > 0.0).any(axis=axis)) for axis in (0, 1))
    box = slice(down[0], down[-1] + 1), slice(across[0], across[-1] + 1)
    return _Spot(weight[box], box, centre, radius)


def _outline(rng: np.random.Generator) -> _Outline:
    """From almost an ellipse to clearly lobed; the longer axis is up to 2.5 times the shorter."""
    orders = np.arange(6, 1, -1)
    height = rng.uniform(0.1, 1.0) * 0.5 * rng.uniform(0.2, 1.0, len(orders)) / orders
    waves = height * np.exp(1j * rng.uniform(0.0, 2.0 * np.pi, len(orders)))
    tilt = complex(np.exp(1j * rng.uniform(0.0, np.pi)))
    aspect = float(np.exp(rng.uniform(0.0, np.log(2.5))))
    return _Outline(tilt, aspect, np.append(waves, (0.0, 0.0)))  # orders 1 and 0 only shift and scale


def _place(scene: _Scene, outline: _Outline, area: float, rng: np.random.Generator) -> tuple[float, float]:
    """A centre on the foreground, from where most of the outline lies on it and within the image."""
    height, width = scene.foreground.shape
    candidates = np.argwhere(scene.foreground)
    best, largest = (0.0, 0.0), -1.0
    for index in rng.integers(len(candidates), size=_PLACES):
        row, column = candidates[index] + rng.uniform(-0.4, 0.4, 2)
        depth = outline.depth(np.arange(height)[:, None] - row, np.arange(width)[None] - column)
        size = _size(depth, area)
        share = float(scene.foreground[depth < size].sum()) / max(outline.area * size**2, 1.0)
        if share > largest:
            best, largest = (float(row) * scene.stride, float(column) * scene.stride), share
        if share >= _ON_FOREGROUND:
            break
    return best


def _size(depth: np.ndarray, area: float) -> float:
    """The depth below which that share of the image lies (at least one pixel), cut by the border or not."""
    count = max(1, round(area * depth.size))
    return float(np.partition(depth, count - 1, axis=None)[count - 1]) * (1.0 + 1e-6) + 1e-9


def _strength(low: float, high: float, least: float, rng: np.random.Generator) -> float:
    """A number in low..high; `least` in 0..1 cuts the lower part of the range off."""
    return float(rng.uniform(low + least * (high - low), high))


def _mix(crop: np.ndarray, other: np.ndarray, spot: _Spot) -> np.ndarray:
    return crop + spot.weight * (other - crop)


def _mean(crop: np.ndarray, spot: _Spot) -> float:
    """Mean grey value under the weight."""
    return float(np.average(crop, weights=spot.weight))


def _noise(shape: tuple[int, ...], width: float, rng: np.random.Generator) -> np.ndarray:
    """Blurred noise, mean 0 and standard deviation about 1."""
    noise = gaussian_filter(rng.standard_normal(shape), width)
    return noise * (np.sqrt(4.0 * np.pi) * max(width, 0.3))


def _smoothed(scene: _Scene, spot: _Spot, sigma: float) -> np.ndarray:
    """The box [h,w] of the image blurred with `sigma` pixels, with what lies around it."""
    margin = int(4.0 * sigma) + 1
    tops = [max(0, each.start - margin) for each in spot.box]
    outer = tuple(slice(top, each.stop + margin) for top, each in zip(tops, spot.box, strict=True))
    inner = tuple(slice(each.start - top, each.stop - top) for top, each in zip(tops, spot.box, strict=True))
    return gaussian_filter(scene.pixels[outer].astype(np.float64), sigma)[inner]


def _blob(scene: _Scene, spot: _Spot, least: float, rng: np.random.Generator) -> np.ndarray:
    """A smooth hill or hollow added to the grey values."""
    height = rng.choice((-1.0, 1.0)) * _strength(0.4, 2.5, least, rng) * scene.spread
    return scene.pixels[spot.box] + spot.weight * height


def _filled(
    scene: _Scene, spot: _Spot, least: float, rng: np.random.Generator, *, percents: tuple[float, float]
) -> np.ndarray:
    """An even interior, moved towards a percentile of the foreground, with speckle and some old detail."""
    percent = rng.uniform(*percents)
    crop = scene.pixels[spot.box].astype(np.float64)
    sign = -1.0 if percent < 50.0 else 1.0
    middle = float(np.median(crop[spot.weight > 0.5]))
    away = sign * (float(np.percentile(scene.values, percent)) - middle)
    reach = min(max(away, scene.spread), 4.0 * scene.spread)
    value = min(max(middle + sign * _strength(0.3, 1.0, least, rng) * reach, 0.0), 1.0)
    detail = crop - _smoothed(scene, spot, 0.01 * min(scene.pixels.shape))
    level = 1.5 * np.median(np.abs(detail)[spot.weight > 0.5]) + 0.03 * scene.spread
    speckle = rng.uniform(0.1, 0.8) * level * _noise(crop.shape, rng.uniform(0.6, 1.5), rng)
    fading = min(max(value / max(middle, 1e-3), 0.15), 1.0)  # dark regions are less noisy
    return _mix(crop, value + fading * (rng.uniform(0.1, 0.7) * detail + speckle), spot)


def _texture(scene: _Scene, spot: _Spot, least: float, rng: np.random.Generator) -> np.ndarray:
    """A patch of another image, perhaps mirrored, its mean moved half-way to the local mean.

    Of three random patches the one whose mean is nearest, since patches of plain background are no texture.
    """
    crop = scene.pixels[spot.box].astype(np.float64)
    mean = _mean(crop, spot)
    patches = [_patch(scene.donors, crop.shape, rng) for _ in range(3)]
    patch, shift = min(((each, mean - _mean(each, spot)) for each in patches), key=lambda pair: abs(pair[1]))
    return _mix(crop, patch + 0.5 * shift, spot)


def _patch(donors: Sequence[np.ndarray], shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A patch [h,w] of some donor from anywhere, either axis perhaps mirrored."""
    donor = donors[int(rng.integers(len(donors)))]
    top, left = (int(rng.integers(whole - part + 1)) for whole, part in zip(donor.shape, shape, strict=True))
    down, across = (int(each) for each in rng.choice((-1, 1), 2))
    return donor[top : top + shape[0], left : left + shape[1]][::down, ::across].astype(np.float64)


def _blur(scene: _Scene, spot: _Spot, least: float, rng: np.random.Generator) -> np.ndarray:
    sigma = _strength(0.006, 0.025, least, rng) * min(scene.pixels.shape)
    return _mix(scene.pixels[spot.box], _smoothed(scene, spot, sigma), spot)


def _sharpen(scene: _Scene, spot: _Spot, least: float, rng: np.random.Generator) -> np.ndarray:
    """Unsharp mask: detail finer than `sigma` is made stronger."""
    sigma = _strength(0.004, 0.012, least, rng) * min(scene.pixels.shape)
    detail = scene.pixels[spot.box] - _smoothed(scene, spot, sigma)
    return scene.pixels[spot.box] + spot.weight * _strength(0.7, 2.5 + 3.0 * least, least, rng) * detail


def _deform(scene: _Scene, spot: _Spot, least: float, rng: np.random.Generator) -> np.ndarray:
    """Swirl, bulge (or pinch), or a random smooth shift; the displacement fades out with the weight."""
    rows, columns = np.mgrid[spot.box].astype(np.float64)
    away = (columns - spot.centre[1]) + 1j * (rows - spot.centre[0])
    kind, sign = int(rng.integers(3)), rng.choice((-1.0, 1.0))
    if kind == 0:
        shift = away * (np.exp(1j * sign * _strength(0.5, 1.8, least, rng) * spot.weight) - 1.0)
    elif kind == 1:
        shift = away * (sign * _strength(0.25, 0.6, least, rng) * spot.weight)
    else:
        factors = (spot.weight.shape[0] / 5.0, spot.weight.shape[1] / 5.0)
        knots = rng.standard_normal((2, 5, 5))
        down, right = (zoom(each, factors, order=3, mode="nearest", grid_mode=True) for each in knots)
        shift = (right + 1j * down) * (_strength(0.12, 0.3, least, rng) * spot.radius * spot.weight)
    source = np.stack([rows + shift.imag, columns + shift.real])
    return map_coordinates(scene.pixels, source, order=1, mode="nearest", output=np.float64)


_ALTER: dict[str, Callable[[_Scene, _Spot, float, np.random.Generator], np.ndarray]] = {
    "blob": _blob,
    "texture": _texture,
    "blur": _blur,
    "sharpen": _sharpen,
    "deform": _deform,
    "dark": partial(_filled, percents=(1.0, 20.0)),
    "bright": partial(_filled, percents=(75.0, 98.0)),
}


def _check_family(family: str) -> None:
    if family not in FAMILIES:
        raise ConfigError(f"unknown family {family!r}{nearest(str(family), list(FAMILIES))}")


def _check_images(images: Sequence[np.ndarray], name: str, *, like: np.ndarray | None = None) -> None:
    """Refuse images that are not float32 [H,W] in 0..1 with edges from 64 pixels, or of unequal sizes.

    `name` with the index filled in stands for an image; the sizes must be that of `like` or of the first.
    """
    for index, image in enumerate(images):
        found = f"is a {type(image).__name__}"
        if isinstance(image, np.ndarray):
            found = f"has shape {list(image.shape)} and type {image.dtype}"
            if image.ndim == 2 and image.dtype == np.float32 and min(image.shape) >= _SMALLEST_EDGE:
                low, high = float(image.min()), float(image.max())
                found = "" if low >= 0.0 and high <= 1.0 else f"holds values {low:g} to {high:g}"  # or NaN
        if found:
            expected = f"expected float32 [H,W] in 0..1 with edges from {_SMALLEST_EDGE} pixels up"
            raise InputError(name.format(index), f"{found}, {expected}")
        shape = (images[0] if like is None else like).shape
        if image.shape != shape:
            reason = f"has shape {list(image.shape)}, expected {list(shape)} like the first image"
            raise InputError(name.format(index), reason, "bring all images to one size")
