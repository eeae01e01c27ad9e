"""What scoring writes per file: its map and its picture; volumes are put back in their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image as Pillow

from umiad.filerecord import FileRecord, Stored
from umiad.overlay import colour_scale, draw_overlay, png_bytes
from umiad.preprocess import resize_map
from umiad.scorer import Scorer
from umiad.types import Finding, Geometry, Image


@dataclass(frozen=True)
class Outputs:
    """What to write per image: `pictures` "overlay" or "none", `maps` "npy", "png16" or "none"."""

    pictures: Literal["overlay", "none"] = "overlay"
    maps: Literal["npy", "png16", "none"] = "npy"
    min_area: int = 1


@dataclass
class Volume:
    """What is kept of a file until its last image is scored.

    `count`: frames that it holds, None where it is one image by nature. `maps`: number of the frame -> its small map
    [S,S]; `best`: the frame with the highest score.
    """

    count: int | None
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
    """Writes a file's map and picture under the stem that it is given.

    Methods raise OSError when the disk does not take it.
    """

    def __init__(self, model: Scorer, out: Path, outputs: Outputs) -> None:
        calibration = model.config.calibration
        self.scale = colour_scale(
            calibration.map_threshold if calibration else None, model.config.map_reference
        )
        self.full_scale = full_scale(model)
        self._out, self._outputs = out, outputs

    def write(self, record: FileRecord, volume: Volume, stem: str) -> FileRecord:
        """Write the map (of a volume: NIfTI in its own place, or frames one after another) and the highest picture.

        Returns the record with what has been written.
        """
        if volume.best is None:
            return record
        image, finding = volume.best
        stored_map = stored_picture = None
        if self._outputs.maps != "none":
            stored_map = (
                self._map(stem, finding.anomaly_map) if volume.count is None else self._stack(stem, volume)
            )
        if self._outputs.pictures != "none":
            picture = draw_overlay(image, finding.anomaly_map, scale=self.scale, regions=finding.regions)
            path = _fresh(self._out / "pictures" / f"{stem}{record.picture_stem}.png")
            path.write_bytes(png_bytes(picture))
            stored_picture = _stored(path)
        return replace(record, map=stored_map, picture=stored_picture)

    def _map(self, stem: str, anomaly_map: np.ndarray) -> Stored:
        """`npy`: float32 as it is. `png16`: 0..65535 stands for 0..`full_scale`, which summary.json names."""
        if self._outputs.maps == "npy":
            path = _fresh(self._out / "maps" / f"{stem}.npy")
            np.save(path, anomaly_map, allow_pickle=False)
            return _stored(path)
        grey = (
            np.clip(anomaly_map / self.full_scale, 0, 1) * 65535
            if self.full_scale > 0
            else np.zeros_like(anomaly_map)
        )
        path = _fresh(self._out / "maps" / f"{stem}.png")
        Pillow.fromarray(np.round(grey).astype(np.uint16)).save(path)
        return _stored(path)

    def _stack(self, stem: str, volume: Volume) -> Stored:
        frames = _Frames(volume)
        if volume.geometry is not None:
            from umiad.io.nifti import volume_bytes  # nibabel is slow to import

            path = _fresh(self._out / "maps" / f"{stem}.nii")
            path.write_bytes(volume_bytes(frames, volume.geometry))
            return _stored(path)
        path = _fresh(self._out / "maps" / f"{stem}.npy")
        shape = (len(frames), *volume.size)
        stored = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        for number, each in enumerate(frames):
            stored[number] = each
        stored.flush()
        return _stored(path)


def full_scale(model: Scorer) -> float:
    """The map value that 65535 stands for in maps of 16 bits: twice the threshold."""
    calibration = model.config.calibration
    return 2 * (calibration.map_threshold if calibration else model.config.map_reference)


class _Frames(Sequence[np.ndarray]):
    """The maps of a volume in the size of its slices, made when asked for; NaN where a slice was not scored."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume

    def __len__(self) -> int:
        return self._volume.count or 0

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


def _fresh(path: Path) -> Path:
    """A place to write to. An older file there is unlinked first: merged results may share it under another name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return path


def _stored(path: Path) -> Stored:
    return Stored(path.suffix, path.stat().st_size)  # type: ignore[arg-type]
