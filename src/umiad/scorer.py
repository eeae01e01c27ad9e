"""What all that scores has in common, a fitted model or an exported one. Importing this must not import torch."""

from __future__ import annotations

import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import numpy as np

from umiad.calibration import NO_CALIBRATION, Calibration, make_finding
from umiad.config import Config, Preprocessing
from umiad.inputs import ImageInput, iter_images
from umiad.preprocess import original_size, resize_map, to_input
from umiad.types import FileOptions, Finding, Image

BATCH_SIZE = 8

Facts: TypeAlias = dict[str, str | int | float | None]


class ScoringConfig(Config):
    """What scoring needs beside the network itself; stored in `config.json` of saved and of exported models.

    `map_reference` is the largest map value on normal images; it ties the colour scale of pictures where
    there is no threshold. `provenance` tells where the model comes from.
    """

    detector: str
    preprocessing: Preprocessing
    calibration: Calibration | None = None
    map_reference: float
    provenance: Facts

    @property
    def facts(self) -> Facts:
        """Detector, size, provenance and thresholds in one flat dictionary."""
        calibration = self.calibration
        return {
            "detector": self.detector,
            "size": self.preprocessing.size,
            **self.provenance,
            "image_threshold": calibration.image_threshold if calibration else None,
            "map_threshold": calibration.map_threshold if calibration else None,
            "threshold_rule": calibration.rule if calibration else NO_CALIBRATION,
        }


class Scorer(ABC):
    """Images -> findings. Higher scores = more anomalous; scores are no probabilities.

    `manifest_sha256` is that of the folder it was loaded from, "" for a model that was not loaded.
    """

    def __init__(self, config: ScoringConfig) -> None:
        self.config = config
        self.manifest_sha256 = ""

    @abstractmethod
    def run(self, inputs: np.ndarray, sizes: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Preprocessed inputs float32 [B,3,S,S] of images of `sizes` (H, W) -> maps [B,S,S], image scores [B]."""

    @property
    def info(self) -> Facts:
        """Detector, size, provenance and thresholds in one flat dictionary."""
        return self.config.facts

    def __repr__(self) -> str:
        facts = ", ".join(f"{key}={value}" for key, value in self.info.items() if value is not None)
        return f"{type(self).__name__}({facts})"

    def score(self, images: ImageInput, *, min_area: int = 1) -> list[Finding]:
        """One `Finding` per image, in order; higher `image_score` = more anomalous.

        `images`: a path (all frames or slices of a file of several), an array [H,W], [H,W,C] or [N,H,W] (uint8
        0..255, uint16 0..65535, float 0..1), or a sequence of these of mixed sizes. Maps, boxes and areas are in the
        original image's pixels; regions smaller than `min_area` pixels are left out. Raises InputError for what
        cannot be used.
        """
        return [
            self.finding(image, value, small_map, min_area=min_area)
            for image, value, small_map in self.score_images(
                iter_images(images, reading=self.config.preprocessing.reading)
            )
        ]

    def file_options(self, files: FileOptions | None = None) -> FileOptions:
        """How this model's files are opened: read as those it was fitted on; the rest as `files` says."""
        preprocessing = self.config.preprocessing
        if files is None:
            return FileOptions(frames=preprocessing.frames, reading=preprocessing.reading)
        return dataclasses.replace(files, reading=preprocessing.reading)

    def score_images(self, images: Iterable[Image]) -> Iterator[tuple[Image, float, np.ndarray]]:
        """Yield (image, image_score, anomaly_map [S,S] at the model's size), a batch of 8 at a time."""
        stream, preprocessing = iter(images), self.config.preprocessing
        while batch := list(itertools.islice(stream, BATCH_SIZE)):
            maps, values = self.run(
                np.stack([to_input(each, preprocessing) for each in batch]),
                [original_size(each, preprocessing) for each in batch],
            )
            yield from zip(batch, values.tolist(), maps, strict=True)

    def finding(
        self, image: Image, image_score: float, small_map: np.ndarray, *, min_area: int = 1
    ) -> Finding:
        """Turn raw scores into a finding in the original image's pixels."""
        anomaly_map = resize_map(small_map, image.size)
        calibration, notes = self.config.calibration, image.notes
        found = make_finding(
            image.name, image_score, anomaly_map, calibration, min_area=min_area, notes=notes
        )
        return dataclasses.replace(found, frame=image.frame, spacing=image.spacing)
