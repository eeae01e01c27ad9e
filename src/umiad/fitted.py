"""A fitted detector with all that belongs to it: preprocessing, calibration, split and provenance."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from umiad import detectors, modelfile
from umiad.calibration import fit_calibration
from umiad.detectors.contract import Detector
from umiad.errors import ConfigError, InputError, ModelFileError
from umiad.features import device_of
from umiad.manifest import CONFIG
from umiad.scorer import Scorer, ScoringConfig
from umiad.splits import Split
from umiad.types import Image, Scores


class SavedConfig(ScoringConfig):
    """What `config.json` of a saved model holds: what scoring needs, and how the detector is rebuilt."""

    detector_config: dict[str, Any]
    calibration_hashes: tuple[str, ...] = ()


class FittedModel(Scorer):
    """What users hold after `fit` or `load`. Higher scores = more anomalous; scores are no probabilities.

    `model.score(x)` gives one `Finding` per image, `model.save(path)` writes it, `model.info` describes it.
    """

    config: SavedConfig

    def __init__(
        self,
        detector: Detector,
        config: SavedConfig,
        split: Split,
        *,
        extras: Mapping[str, bytes] | None = None,
    ) -> None:
        super().__init__(config)
        self.detector = detector
        self.split = split
        self.extras = dict(extras or {})

    def to(self, device: str) -> FittedModel:
        """Move the detector to "cpu", "cuda" or "mps"; returns the model itself."""
        self.detector.module.to(device)
        return self

    def run(self, inputs: np.ndarray, sizes: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Preprocessed inputs float32 [B,3,S,S] of images of `sizes` (H, W) -> maps [B,S,S], image scores [B]."""
        scores = self.score_inputs(inputs, sizes)
        return scores.anomaly_map.numpy(), scores.image_score.numpy()

    def score_inputs(self, inputs: np.ndarray, sizes: Sequence[tuple[int, int]]) -> Scores:
        """Scores of preprocessed inputs [B,3,S,S] of images of `sizes` (H, W), on the CPU.

        One path for everything that scores.
        """
        device = device_of(self.detector.module)
        scores = self.detector.score(
            torch.from_numpy(inputs).to(device), original_size=torch.tensor(sizes).to(device)
        )
        return Scores(scores.anomaly_map.cpu(), scores.image_score.cpu())

    def calibrated(self, images: Iterable[Image], hashes: Iterable[str], *, fpr: float) -> FittedModel:
        """A copy whose thresholds come from other normal images; the fitted detector is shared.

        Raises InputError when one of the images was used to fit, ConfigError when `fpr` is not in (0, 1).
        """
        known = tuple(hashes)
        if seen := set(known) & set(self.split.hashes("train")):
            raise InputError(
                "calibration images", f"{len(seen)} of {len(known)} were used to fit the model, expected none"
            )
        raw = [(value, float(small.max())) for _, value, small in self.score_images(images)]
        calibration = fit_calibration([s for s, _ in raw], [m for _, m in raw], fpr=fpr, source="calibrate")
        config = self.config.model_copy(update={"calibration": calibration, "calibration_hashes": known})
        return FittedModel(self.detector, config, self.split, extras=self.extras)

    def fitted_hashes(self) -> set[str]:
        """Content hashes of every image that shaped the model: fitted, held out or calibrated on."""
        used = {*self.split.hashes("train"), *self.split.hashes("holdout")}
        return used | set(self.config.calibration_hashes)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the model directory atomically (DESIGN: config, weights, split, manifest, card).

        Raises ConfigError where models of this detector cannot be saved, DiskError, InputError.
        """
        if self.detector.info.not_saved:
            raise ConfigError(self.detector.info.not_saved)
        return modelfile.save(
            Path(path),
            config=self.config.canonical(),
            tensors=self.detector.state(),
            split=self.split.to_json(),
            card=self.card(),
            extras=self.extras,
        )

    def card(self) -> str:
        """The model card: what it is, from what, how thresholds were chosen, and what it is not for."""
        rows = "\n".join(f"| {key} | {value} |" for key, value in self.info.items())
        kind = self.detector.info
        return (
            f"# Model card: {kind.name} ({kind.summary})\n\n"
            "Research use only. It marks unusual regions; it makes no diagnosis.\n\n"
            f"Method: {kind.reference} (fidelity: {kind.fidelity}).\n\n"
            f"| fact | value |\n| --- | --- |\n{rows}\n\n"
            "Scores rise with abnormality and are no probabilities. The p-value of an image is the share of "
            "unseen normal images that score at least as high; it holds for images of the same kind and "
            "acquisition as the normal images the model was fitted on. Everything that differs from those is "
            "unusual to it: another scanner, a marker, a harmless variant.\n"
        )


def load(path: str | os.PathLike[str], *, manifest_sha256: str | None = None) -> FittedModel:
    """Load a saved model; no code of the folder runs, and nothing is taken that its tensors do not account for.

    `manifest_sha256` pins the manifest and through it every file (`umiad inspect` prints it): without it an
    alteration of files and manifest together goes unseen. Raises ModelFileError when the model is damaged,
    altered or of a newer format.
    """
    saved = modelfile.load(Path(path), manifest_sha256=manifest_sha256)
    try:
        config = SavedConfig.parse(saved.config)
        split = Split.from_json(saved.split, source="split.json")
        detector = modelfile.rebuild(
            saved, lambda: detectors.make(config.detector, config.detector_config, None)
        )
        if config.preprocessing.size != detector.config.size:
            found, expected = config.preprocessing.size, detector.config.size
            raise ConfigError(f"images are resized to {found} px, but its detector expects {expected} px")
    except ConfigError as error:
        raise ModelFileError(f"{Path(path) / CONFIG}: {error}") from error
    except InputError as error:
        raise ModelFileError(f"{path}: {error}") from error
    model = FittedModel(detector, config, split, extras=saved.extras)
    model.manifest_sha256 = saved.manifest_sha256
    return model
