"""Scoring many files into a folder: a JSON line, a map and a picture per image, a report at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image as Pillow

from umiad.data import list_images
from umiad.errors import DiskError, InputError
from umiad.fitted import FittedModel
from umiad.fitting import Reporter, Silent
from umiad.inputs import usable_image
from umiad.overlay import colour_scale, draw_overlay, png_bytes
from umiad.report import score_page
from umiad.types import Finding, Image

READ_AHEAD = 16
PICTURES_IN_REPORT = 60


@dataclass(frozen=True)
class Outputs:
    """What to write per image: `pictures` "overlay" or "none", `maps` "npy", "png16" or "none"."""

    pictures: Literal["overlay", "none"] = "overlay"
    maps: Literal["npy", "png16", "none"] = "npy"
    min_area: int = 1


@dataclass
class Summary:
    """What came of a scoring run; `skipped` are (file, reason).

    `png16_full_scale`: the map value that 65535 stands for in 16-bit PNG maps (None for other formats).
    """

    folder: Path
    model: dict[str, str | int | float | None]
    findings: list[Finding] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    png16_full_scale: float | None = None

    @property
    def above(self) -> int:
        """Images above the threshold."""
        return sum(finding.above_threshold is True for finding in self.findings)

    def to_json(self) -> dict[str, object]:
        """Counts, skipped files and the model's provenance, as plain values."""
        return {
            "model": self.model,
            "scored": len(self.findings),
            "above_threshold": self.above,
            "without_threshold": sum(finding.above_threshold is None for finding in self.findings),
            "png16_full_scale": self.png16_full_scale,
            "skipped": [{"file": name, "reason": reason} for name, reason in self.skipped],
        }


def score_files(
    model: FittedModel,
    paths: Sequence[str | os.PathLike[str]],
    out: Path,
    *,
    outputs: Outputs | None = None,
    reporter: Reporter | None = None,
) -> Summary:
    """Score every image among `paths` (files and folders) into the folder `out`.

    Writes `scores.jsonl` (a line per image), `maps/`, `pictures/`, `summary.json` and `report.html`.
    Unreadable files are skipped, named and counted. Raises InputError when there is no image at all,
    DiskError when the folder cannot be written.
    """
    outputs, reporter = outputs or Outputs(), reporter or Silent()
    files, stray = list_images(paths)
    if not files:
        raise InputError(
            os.fspath(paths[0]) if paths else "paths", "no images found", "umiad reads PNG, JPEG, TIFF, BMP"
        )
    if stray:
        reporter.note(f"{len(stray)} files are no images to score and were ignored: {stray[0].name}, ...")
    summary = Summary(out, model.info)
    writer = _Writer(model, out, outputs)
    summary.png16_full_scale = writer.full_scale if outputs.maps == "png16" else None
    try:
        with (_folder(out) / "scores.jsonl").open("w", encoding="utf-8") as lines:
            readable = _read(files, summary)
            for image, score, small_map in model.score_images(readable):
                finding = model.finding(image, score, small_map, min_area=outputs.min_area)
                record = {**finding.to_json(), **writer.write(image, finding, summary)}
                lines.write(json.dumps(record, allow_nan=False) + "\n")
                reporter.stage("scoring", len(summary.findings) + len(summary.skipped), len(files))
        (out / "summary.json").write_text(json.dumps(summary.to_json(), indent=1), encoding="utf-8")
    except OSError as error:
        raise DiskError(f"{out}: cannot be written: {error}") from error
    score_page(
        out / "report.html",
        findings=summary.findings,
        pictures=writer.for_report(summary),
        skipped=summary.skipped,
        provenance={key: str(value) for key, value in model.info.items() if value is not None},
        limit=PICTURES_IN_REPORT,
    )
    return summary


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _read(files: Sequence[Path], summary: Summary) -> Iterator[Image]:
    """Decode ahead in a thread; what cannot be read goes to `summary.skipped`."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = [pool.submit(usable_image, file) for file in files[:READ_AHEAD]]
        for number, file in enumerate(files):
            future = pending.pop(0)
            if number + READ_AHEAD < len(files):
                pending.append(pool.submit(usable_image, files[number + READ_AHEAD]))
            try:
                yield future.result()
            except InputError as error:
                summary.skipped.append((str(file), str(error)))


class _Writer:
    """Writes maps and pictures under names that stay unique when folders hold equal file names."""

    def __init__(self, model: FittedModel, out: Path, outputs: Outputs) -> None:
        calibration = model.config.calibration
        self.scale = colour_scale(
            calibration.map_threshold if calibration else None, model.config.map_reference
        )
        self.full_scale = 2 * (calibration.map_threshold if calibration else model.config.map_reference)
        self._out, self._outputs = out, outputs
        self._used: set[str] = set()
        self._files: dict[str, Path] = {}

    def write(self, image: Image, finding: Finding, summary: Summary) -> dict[str, str | None]:
        """Write what is asked for; returns the file names for the JSON line."""
        stem = self._unique(Path(finding.name).stem)
        named: dict[str, str | None] = {"map": None, "picture": None}
        if self._outputs.maps != "none":
            named["map"] = self._map(stem, finding.anomaly_map)
        if self._outputs.pictures == "overlay":
            picture = draw_overlay(image, finding.anomaly_map, scale=self.scale, regions=finding.regions)
            path = _folder(self._out / "pictures") / f"{stem}.png"
            path.write_bytes(png_bytes(picture))
            self._files[finding.name] = path
            summary.pictures.append(path)
            named["picture"] = f"pictures/{stem}.png"
        summary.findings.append(_without_map(finding))
        return named

    def for_report(self, summary: Summary) -> dict[str, bytes]:
        """The pictures of the highest scores, for the report."""
        ranked = sorted(summary.findings, key=lambda finding: -finding.image_score)[:PICTURES_IN_REPORT]
        return {f.name: self._files[f.name].read_bytes() for f in ranked if f.name in self._files}

    def _unique(self, stem: str) -> str:
        name, number = stem, 1
        while name.casefold() in self._used:
            number += 1
            name = f"{stem}-{number}"
        self._used.add(name.casefold())
        return name

    def _map(self, stem: str, anomaly_map: np.ndarray) -> str:
        """`npy`: float32 as it is. `png16`: 0..65535 stands for 0..`full_scale`, which summary.json names."""
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


def _without_map(finding: Finding) -> Finding:
    """The finding with its map replaced by an empty view of the same size, so that many stay small."""
    return replace(finding, anomaly_map=np.broadcast_to(np.float32(0), finding.anomaly_map.shape))
