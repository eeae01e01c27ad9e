"""Generated images that look somewhat like head slices, with planted lesions whose masks are exact.

Phantoms, not patients: they show that the software works, never how well it works in medicine.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image

from umiad.errors import ConfigError, DiskError, InputError

_SMALLEST = 64
_BRAIN_EDGE = 0.88  # radius of the brain's surface; the skull's outer surface has radius 1


@dataclass(frozen=True, eq=False)
class _Head:
    """Coordinates [H,W] in one head: `u`, `v` in half-axes, `radius` (1 = skull); `soft` is one pixel."""

    u: np.ndarray
    v: np.ndarray
    radius: np.ndarray
    soft: float


def write_phantoms(
    folder: str | os.PathLike[str],
    *,
    n_normal: int = 60,
    n_abnormal: int = 20,
    size: int = 192,
    seed: int = 0,
) -> Path:
    """Write phantoms (not patients) below `folder` and return it; the same numbers give the same bytes.

    `normal/normal_000.png`, `abnormal/abnormal_000.png`: 8-bit grey, size x size; `masks/<stem>_mask.png`:
    0 and 255. Heads differ in position, tilt, shape, ventricles, gain, offset and texture; abnormal ones
    hold one or two dark, bright, ring-shaped or disturbed blobs. Image i does not depend on the counts.

    Raises:
        ConfigError: a negative count or seed, or a size below 64.
        InputError: `folder` is a file, or holds something already.
        DiskError: writing failed.
    """
    folder = Path(folder)
    if min(n_normal, n_abnormal, seed) < 0 or size < _SMALLEST:
        raise ConfigError(
            f"phantoms: n_normal {n_normal}, n_abnormal {n_abnormal}, seed {seed}, size {size}; "
            f"expected counts and seed from 0 up and a size from {_SMALLEST} up"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(folder, "exists already and is not an empty folder", "choose a new folder")
    try:
        for part in ("normal", "abnormal", "masks"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        for index in range(n_normal):
            image, _ = draw_phantom(np.random.default_rng([seed, 0, index]), size=size, lesions=0)
            _write(folder / "normal" / f"normal_{index:03d}.png", image)
        for index in range(n_abnormal):
            rng = np.random.default_rng([seed, 1, index])
            image, mask = draw_phantom(rng, size=size, lesions=int(rng.integers(1, 3)))
            _write(folder / "abnormal" / f"abnormal_{index:03d}.png", image)
            _write(folder / "masks" / f"abnormal_{index:03d}_mask.png", mask)
    except OSError as error:
        raise DiskError(f"{folder}: phantoms cannot be written: {error}; choose another folder") from error
    return folder


def draw_phantom(rng: np.random.Generator, *, size: int, lesions: int) -> tuple[np.ndarray, np.ndarray]:
    """One phantom -> (image float32 [H,W] in 0..1, mask bool [H,W], True inside the lesions)."""
    head = _head(rng, size)
    image = _anatomy(head, rng)
    mask = np.zeros((size, size), dtype=bool)
    for _ in range(lesions):
        image, lesion = _plant(image, head, rng)
        mask |= lesion
    image = image + 0.035 * _texture(rng, size, (1.0, 2.5)) * (head.radius < _BRAIN_EDGE)
    tilt = rng.uniform(-0.12, 0.12, 2)  # a smooth gain across the image, like a coil's
    image = image * (1.0 + tilt[0] * head.u + tilt[1] * head.v) * rng.uniform(0.9, 1.08)
    image = image + rng.uniform(0.01, 0.04) + 0.012 * rng.standard_normal((size, size))
    return np.clip(image, 0.0, 1.0).astype(np.float32), mask


def _head(rng: np.random.Generator, size: int) -> _Head:
    """Draw position, tilt and shape of a head."""
    axis = (np.arange(size) + 0.5) / size * 2.0 - 1.0
    y, x = np.meshgrid(axis, axis, indexing="ij")
    angle = rng.uniform(-0.12, 0.12)
    x, y = x - rng.uniform(-0.04, 0.04), y - rng.uniform(-0.04, 0.04)
    half_width, half_height = rng.uniform(0.66, 0.72), rng.uniform(0.83, 0.89)
    u = (np.cos(angle) * x + np.sin(angle) * y) / half_width
    v = (np.cos(angle) * y - np.sin(angle) * x) / half_height
    wobble = 0.012 * _texture(rng, size, (size / 10.0,))
    radius = np.hypot(u * (1.0 + 0.10 * v), v) + wobble  # slightly egg-shaped
    return _Head(u, v, radius, 2.0 / size / half_width)


def _anatomy(head: _Head, rng: np.random.Generator) -> np.ndarray:
    """Scalp, skull, fluid, cortex, white matter, ventricles and midline, in this order from outside in."""
    size = len(head.u)
    image = np.zeros((size, size))
    folds = 0.018 * _texture(rng, size, (size / 40.0,))
    for edge, value in ((1.07, 0.30), (1.0, 0.88), (0.925, 0.10), (_BRAIN_EDGE, 0.46)):
        image += (value - image) * _inside(head.radius - edge, head.soft)
    white = 0.76 + rng.uniform(-0.02, 0.02)
    image += (0.61 - image) * _inside(head.radius + 2.0 * folds - white, 2.0 * head.soft)
    opening, length = rng.uniform(0.075, 0.105), rng.uniform(0.26, 0.32)
    lean = rng.uniform(0.28, 0.38)
    for side in (-1.0, 1.0):
        across = head.u - side * (0.13 + lean * head.v * (head.v + 0.1))
        ventricle = np.hypot(across / opening, (head.v + 0.02) / length) - 1.0
        image += (0.13 - image) * _inside(ventricle, head.soft / opening)
        nucleus = np.hypot((head.u - side * 0.36) / 0.14, (head.v - 0.02) / 0.22) - 1.0
        image += (0.50 - image) * 0.8 * _inside(nucleus, 0.25)
    falx = np.abs(head.u + 0.01 * np.sin(5.0 * head.v)) - 0.012
    front_and_back = _inside(0.42 - np.abs(head.v), 0.02) * _inside(head.radius - _BRAIN_EDGE, head.soft)
    image += (0.22 - image) * 0.8 * front_and_back * _inside(falx, head.soft)
    return image


def _plant(image: np.ndarray, head: _Head, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Plant one lesion with a soft edge; returns the image and the lesion's mask (where its weight > 1/2)."""
    size = len(image)
    angle, distance = rng.uniform(0.0, 2.0 * np.pi), rng.uniform(0.28, 0.58)
    u, v = head.u - distance * np.cos(angle), head.v - distance * np.sin(angle)
    theta = np.arctan2(v, u)
    outline = rng.uniform(0.13, 0.24) * np.ones_like(u)
    for order in (2, 3, 5):
        outline *= 1.0 + rng.uniform(0.03, 0.12) * np.cos(order * theta + rng.uniform(0.0, 2.0 * np.pi))
    depth = np.hypot(u, v) / outline  # 0 in the middle, 1 on the outline
    weight = _inside(depth - 1.0, 0.10)
    kind = rng.choice(("dark", "bright", "ring", "disturbed"), p=(0.3, 0.35, 0.2, 0.15))
    speckle = _texture(rng, size, (2.0,))
    value = {
        "dark": 0.24 + 0.03 * speckle,
        "bright": 0.84 + 0.05 * speckle,
        "ring": 0.24 + 0.62 * np.exp(-(((depth - 0.78) / 0.16) ** 2)) + 0.03 * speckle,
        "disturbed": 0.52 + 0.17 * speckle,
    }[str(kind)]
    return image + (value - image) * weight, weight > 0.5


def _inside(signed: np.ndarray, soft: float) -> np.ndarray:
    """A soft step: 1 where `signed` is well below 0, 1/2 at 0, 0 well above; `soft` is its half-width."""
    return 0.5 - 0.5 * np.tanh(signed / soft)


def _texture(rng: np.random.Generator, size: int, widths: tuple[float, ...]) -> np.ndarray:
    """Correlated noise [size,size], mean 0 and standard deviation 1; `widths` are blurs in pixels, summed."""
    from scipy.ndimage import gaussian_filter

    total = np.zeros((size, size))
    for width in widths:
        noise = gaussian_filter(rng.standard_normal((size, size)), width, mode="reflect")
        total += (noise - noise.mean()) / noise.std()
    return total / np.sqrt(len(widths))


def _write(path: Path, image: np.ndarray) -> None:
    """Write values in 0..1 (or bool) [H,W] as 8-bit grey PNG. Raises OSError."""
    stored = np.round(image.astype(np.float64) * 255.0).astype(np.uint8)
    PIL.Image.fromarray(stored).save(path, format="PNG", compress_level=6)
