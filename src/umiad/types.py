"""The values that travel between layers. Importing this module must import neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

NORMAL, ABNORMAL = 0, 1
Window: TypeAlias = Literal["file", "full", "percentile"] | tuple[float, float]
Axis: TypeAlias = Literal["axial", "coronal", "sagittal"]


@dataclass(frozen=True, eq=False)
class Image:
    """One decoded image, upright, before any resizing.

    `pixels` float32 [C,H,W] in 0..1 with C = 1 (grey) or 3 (RGB); `mode` and `bits` tell how it was
    stored (Pillow's mode name or DICOM's photometric interpretation, bits per channel); `notes` are remarks a
    user should see. `spacing`: millimetres per pixel (down the rows, along the columns), None = unknown.
    `frame`: number of the frame or slice, counted from 0, None where the file holds a single image.
    `patient`: a token that is equal for images of one patient, "" = unknown; it is made with a key of this
    process, means nothing outside of it and is never written anywhere.
    """

    pixels: np.ndarray
    name: str
    mode: str = "L"
    bits: int = 8
    notes: tuple[str, ...] = ()
    spacing: tuple[float, float] | None = None
    frame: int | None = None
    patient: str = field(default="", repr=False)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.pixels.shape[1], self.pixels.shape[2]


@dataclass(frozen=True)
class Reading:
    """How grey values are taken from medical files; part of a saved model, so that scoring reads as fitting did.

    `window`: "file" (what the file says, else its full range), "full" (the full stored range), "percentile"
    (0.5 to 99.5 of the image, or of the volume), or (centre, width) in the file's own units. `axis`: direction
    of a volume's slices. `nan`: "error" refuses values that are not finite, "zero" takes them as 0 and counts
    them. PNG, JPEG, TIFF and BMP files know none of this.
    """

    __pydantic_config__ = {"strict": True, "extra": "forbid"}  # noqa: RUF012 - pydantic's own convention

    window: Window = "file"
    axis: Axis = "axial"
    nan: Literal["error", "zero"] = "error"


@dataclass(frozen=True)
class FileOptions:
    """How files are found and opened.

    `frames`: which frames or slices of a file are cases: "one" (a file with several is an error), "middle", "all", a
    number from 0, or "40:90:5". `follow`: take files behind links that leave the folder. `show_names`: name
    DICOM files by their path, which may name a patient, and not by a hash of their content.
    """

    __pydantic_config__ = {"strict": True, "extra": "forbid"}  # noqa: RUF012 - pydantic's own convention

    frames: str = "one"
    reading: Reading = Reading()
    follow: bool = False
    show_names: bool = False

    def arguments(self) -> list[str]:
        """The same as words of the command line, without what is the default there."""
        window = self.reading.window
        shown = window if isinstance(window, str) else ",".join(f"{each:g}" for each in window)
        pairs = (
            ("--frame", self.frames, "one"),
            ("--window", shown, "file"),
            ("--axis", self.reading.axis, "axial"),
            ("--nan", self.reading.nan, "error"),
        )
        words = [word for name, value, default in pairs if value != default for word in (name, value)]
        return words + ["--follow"] * self.follow + ["--show-names"] * self.show_names


@dataclass(frozen=True)
class Geometry:
    """Where a volume's slices lie, so that a map can be written back in its place.

    `shape`: voxels along the file's own three axes. `affine`: 4 x 4, voxel -> millimetres (RAS+), row by row.
    `axis`: the anatomical direction the slices are taken along.
    """

    shape: tuple[int, int, int]
    affine: tuple[float, ...]
    axis: Axis


@dataclass(frozen=True, eq=False)
class Stack:
    """The images of one opened file; frames are decoded when they are asked for.

    `frame(k)`, k in 0..count-1, raises InputError. `single` says that the file is one image by nature (then
    `Image.frame` is None); a volume of one slice is not. `geometry` for volumes only.
    """

    count: int
    frame: Callable[[int], Image]
    single: bool = True
    geometry: Geometry | None = None


@dataclass(frozen=True)
class Case:
    """One examination unit.

    `label` 0 normal, 1 abnormal, None unknown; `masks` are united; `kind` is the class folder it came
    from ("benign"); `group` ties cases that must stay on one side of a split (patient, near-duplicates),
    empty = its own; `split` is the official part ("train", "test") or empty; `image` holds the pixels
    of a case that never was a file. `frame`: number of the frame or slice, None where the file is one image;
    `reading`: how it is read; `alias` is shown in place of the path, which may name a patient.
    """

    path: Path
    label: int | None = None
    masks: tuple[Path, ...] = ()
    kind: str = ""
    group: str = ""
    split: str = ""
    image: Image | None = field(default=None, compare=False, repr=False)
    frame: int | None = None
    reading: Reading = Reading()
    alias: str = ""

    @property
    def name(self) -> str:
        """The path as the user gave it, or the alias; with the frame's number, where it has one."""
        return framed(self.alias or str(self.path), self.frame)


def framed(name: str, frame: int | None) -> str:
    """`name`, or `name#k` for frame or slice k."""
    return name if frame is None else f"{name}#{frame}"


@dataclass(frozen=True, eq=False)
class Scores:
    """What a detector says about a batch; higher = more anomalous, always.

    `anomaly_map` float32 [B,H,W] at the model's size, `image_score` float32 [B]. Neither is a probability.
    """

    anomaly_map: Tensor
    image_score: Tensor


@dataclass(frozen=True)
class Region:
    """A connected region above the map threshold, in the original image's pixels.

    `box` = (x0, y0, x1, y1), x1 and y1 exclusive; `area` in pixels; `peak` is the highest map value.
    """

    box: tuple[int, int, int, int]
    area: int
    peak: float


@dataclass(frozen=True, eq=False)
class Finding:
    """The result for one image; higher `image_score` = more anomalous. Not a diagnosis.

    `anomaly_map` float32 [H,W] in the original image's pixels. `p_value` is the share of held-out normal
    images that score at least as high, (1 + count) / (n + 1); None with a `reason` where the model has no
    held-out normals, and then `above_threshold` is None and `regions` is empty. `frame` and `spacing` as in `Image`.
    """

    name: str
    image_score: float
    anomaly_map: np.ndarray
    p_value: float | None
    above_threshold: bool | None
    threshold: float | None
    regions: tuple[Region, ...]
    reason: str = ""
    notes: tuple[str, ...] = ()
    frame: int | None = None
    spacing: tuple[float, float] | None = None

    def to_json(self) -> dict[str, object]:
        """The result as one JSON object (without the map)."""
        height, width = self.anomaly_map.shape
        pixel = None if self.spacing is None else self.spacing[0] * self.spacing[1]
        return {
            "file": self.name,
            "frame": self.frame,
            "image_score": self.image_score,
            "p_value": self.p_value,
            "above_threshold": self.above_threshold,
            "threshold": self.threshold,
            "height": height,
            "width": width,
            "spacing_mm": None if self.spacing is None else list(self.spacing),
            "regions": [
                {
                    "box": list(r.box),
                    "area": r.area,
                    "area_mm2": None if pixel is None else r.area * pixel,
                    "peak": r.peak,
                }
                for r in self.regions
            ],
            "reason": self.reason or None,
            "notes": list(self.notes),
        }
