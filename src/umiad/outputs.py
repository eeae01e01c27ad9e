"""What scoring writes per file: maps, pictures, and volumes put back in their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image as Pillow

from umiad.fitted import FittedModel
from umiad.overlay import colour_scale, draw_overlay, png_bytes
from umiad.preprocess import resize_map
from umiad.types import Finding, Geometry, Image


@dataclass(frozen=True)
class Outputs:
    """What to write per image: `pictures` "overlay" or "none", `maps` "npy", "png16" or "none"."""

    pictures: Literal["overlay", "none"] = "overlay"
    maps: Literal["npy", "png16", "none"] = "npy"
    min_area: int = 1


@dataclass
class Volume:
    """What is kept of a file of several frames until its last one is scored.

    `maps`: number of the frame -> its small map [S,S]; `best`: the frame with the highest score.
    """

    name: str
    count: int
    geometry: Geometry | None
    findings: list[Finding] = field(default_factory=list)
    maps: dict[int, np.ndarray] = field(default_factory=dict)
    size: tuple[int, int] = (0, 0)
    best: tuple[Image, Finding] | None = None

    def add(self, image: Image, finding: Finding, small_map: np.ndarray) -> None:
        """Keep one frame's result; of its pixels only where it is the highest so far."""
        self.findings.append(without_map(finding))
        self.maps[image.frame or 0] = small_map
        self.size = image.size
        if self.best is None or finding.image_score > self.best[1].image_score:
            self.best = image, finding


class Writer:
    """Writes maps and pictures under names that stay unique when folders hold equal file names.

    Methods raise OSError when the disk does not take it.
    """

    def __init__(self, model: FittedModel, out: Path, outputs: Outputs) -> None:
        calibration = model.config.calibration
        self.scale = colour_scale(
            calibration.map_threshold if calibration else None, model.config.map_reference
        )
        self.full_scale = 2 * (calibration.map_threshold if calibration else model.config.map_reference)
        self._out, self._outputs = out, outputs
        self._used: set[str] = set()
        self.pictures: dict[str, Path] = {}

    def image(self, image: Image, finding: Finding) -> dict[str, str | None]:
        """Write one image's map and picture; returns their names for the JSON line."""
        stem = self._unique(image.name)
        return {"map": self._map(stem, finding.anomaly_map), "picture": self._picture(stem, image, finding)}

    def volume(self, volume: Volume) -> dict[str, str | None]:
        """Write a volume's map (NIfTI in its own place, or frames one after another) and its worst slice."""
        stem = self._unique(volume.name)
        named: dict[str, str | None] = {"map": self._stack(stem, volume), "picture": None}
        if volume.best is not None:
            image, finding = volume.best
            named["picture"] = self._picture(f"{stem}-{image.frame:04d}", image, finding)
        return named

    def _picture(self, stem: str, image: Image, finding: Finding) -> str | None:
        if self._outputs.pictures == "none":
            return None
        picture = draw_overlay(image, finding.anomaly_map, scale=self.scale, regions=finding.regions)
        path = _folder(self._out / "pictures") / f"{stem}.png"
        path.write_bytes(png_bytes(picture))
        self.pictures[finding.name] = path
        return f"pictures/{stem}.png"

    def _map(self, stem: str, anomaly_map: np.ndarray) -> str | None:
        """`npy`: float32 as it is. `png16`: 0..65535 stands for 0..`full_scale`, which summary.json names."""
        if self._outputs.maps == "none":
            return None
        folder = _folder(self._out / "maps")
        if self._outputs.maps == "npy":
            np.save(folder / f"{stem}.npy", anomaly_map, allow_pickle=False)
            return f"maps/{stem}.npy"
        grey = (
            np.clip(anomaly_map / self.full_scale, 0, 1) * 65535
            if self.full_scale > 0
            else np.zeros_like(anomaly_map)
        )
        Pillow.fromarray(np.round(grey).astype(np.uint16)).save(folder / f"{stem}.png")
        return f"maps/{stem}.png"

    def _stack(self, stem: str, volume: Volume) -> str | None:
        if self._outputs.maps == "none":
            return None
        folder, frames = _folder(self._out / "maps"), _Frames(volume)
        if volume.geometry is not None:
            from umiad.io.nifti import volume_bytes  # nibabel is slow to import

            (folder / f"{stem}.nii").write_bytes(volume_bytes(frames, volume.geometry))
            return f"maps/{stem}.nii"
        shape = (len(frames), *volume.size)
        stored = np.lib.format.open_memmap(folder / f"{stem}.npy", mode="w+", dtype=np.float32, shape=shape)
        for number, each in enumerate(frames):
            stored[number] = each
        stored.flush()
        return f"maps/{stem}.npy"

    def _unique(self, name: str) -> str:
        """The file's stem, with a number where another file has taken it; as long as file systems allow."""
        stem = Path(name).name.removesuffix(".gz")
        stem = Path(stem).stem[:200] or "image"
        chosen, number = stem, 1
        while chosen.casefold() in self._used:
            number += 1
            chosen = f"{stem}-{number}"
        self._used.add(chosen.casefold())
        return chosen


class _Frames(Sequence[np.ndarray]):
    """The maps of a volume in the size of its slices, made when asked for; NaN where a slice was not scored."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume

    def __len__(self) -> int:
        return self._volume.count

    def __getitem__(self, number: int) -> np.ndarray:  # type: ignore[override]
        if not 0 <= number < len(self):
            raise IndexError(number)
        small = self._volume.maps.get(number)
        if small is None:
            return np.full(self._volume.size, np.nan, dtype=np.float32)
        return resize_map(small, self._volume.size)


def without_map(finding: Finding) -> Finding:
    """The finding with its map replaced by an empty view of the same size, so that many stay small."""
    return replace(finding, anomaly_map=np.broadcast_to(np.float32(0), finding.anomaly_map.shape))


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path
