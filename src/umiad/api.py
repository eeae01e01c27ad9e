"""The public functions: build, fit, calibrate, score, evaluate, save, load. Higher score = more anomalous."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from umiad import detectors
from umiad import weights as backbones
from umiad.cases import expand
from umiad.config import check_size
from umiad.data import list_images
from umiad.detectors.contract import Detector
from umiad.duplicates import CaseHashes
from umiad.errors import ConfigError, InputError
from umiad.evaluation import Evaluation, evaluate_model
from umiad.fitted import FittedModel, load
from umiad.fitting import Data, FitOptions, fit_model, usable_images
from umiad.inputs import ImageInput
from umiad.progress import Reporter
from umiad.splits import Split
from umiad.types import Case, FileOptions, Finding

__all__ = [
    "Evaluation",
    "FitOptions",
    "FittedModel",
    "build",
    "calibrate",
    "evaluate",
    "fit",
    "load",
    "save",
    "score",
]


def build(
    detector: str = "egmf",
    *,
    preset: str = "default",
    weights: str | os.PathLike[str] = "imagenet",
    size: int = 256,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> Detector:
    """Build an unfitted detector.

    `detector` and `preset`: see `umiad detectors`. `weights` of the backbone (ResNet18 unless
    `settings` name another, such as {"backbone": "resnet34"}): "imagenet" (cache,
    else download), "random", a label in the cache, or a file. `size`: edge in pixels the images are stretched to,
    a multiple of 32 from 64 up. `settings` override fields of the preset, for example
    {"fusion": "none"} or {"training": {"epochs": 5}}. {"edge": "sam", "sam": FOLDER} takes edges from a SAM
    checkpoint, see `umiad.sam`; {"checkpoint": FILE} gives "medvit" the features of a trained MedViTV2, see
    `umiad.medvit_checkpoint`.

    Raises ConfigError for an unknown name or value, InputError or ModelFileError for unusable weights.
    """
    check_size(size)
    overrides = dict(settings or {})
    if detector == "egmf" and overrides.get("edge") == "sam":
        from umiad import sam  # few need it, and everything imports this module

        folder = overrides.pop("sam", None)
        if folder is None:
            raise ConfigError(f"edge 'sam' needs a SAM checkpoint, the setting sam: {sam.HOW_TO_GET}")
        folder = _path_setting("sam", folder)
        made: Any = sam.build(
            folder, preset=preset, weights=weights, size=size, seed=seed, settings=overrides
        )
        return made
    if detector == "medvit" and "checkpoint" in overrides:
        from umiad import medvit_checkpoint  # likewise

        file = _path_setting("checkpoint", overrides.pop("checkpoint"))
        return medvit_checkpoint.build(file, preset=preset, size=size, seed=seed, settings=overrides)
    cls = detectors.detector_class(detector)
    chosen = _weights(
        os.fspath(weights), str(overrides.get("backbone", "resnet18")), needed=cls.info.uses_backbone
    )
    training = {**cls.presets.get(preset, {}).get("training", {}), **overrides.pop("training", {})}
    common: dict[str, Any] = {"size": size, "seed": seed, "weights": chosen.label, **overrides}
    config = detectors.preset_config(detector, preset, **common, training=training)
    return detectors.make(detector, config.canonical(), chosen.state)


def _path_setting(name: str, value: object) -> str:
    """The path that a setting names. Raises ConfigError for what is none."""
    if not isinstance(value, (str, os.PathLike)):
        raise ConfigError(f"{name}: expected a path, got {value!r}")
    return os.fspath(value)


def _weights(source: str, backbone: str, *, needed: bool) -> backbones.Weights:
    """The weights; where none are needed, those that cannot be had here are no error and nothing is downloaded."""
    try:
        return backbones.resolve(source, backbone=backbone, download=needed)
    except InputError:
        if needed:
            raise
        return backbones.resolve(backbones.RANDOM, backbone=backbone)


def fit(
    detector: Detector | str,
    data: Data,
    *,
    options: FitOptions | None = None,
    groups: Mapping[str, str] | Split | None = None,
    out: str | os.PathLike[str] | None = None,
    reporter: Reporter | None = None,
) -> FittedModel:
    """Fit a detector (or the default preset of a named one) on the normal images of `data`.

    `data`: a folder or CSV manifest (see `umiad check-data`), or arrays, all taken as normal. Abnormal and
    test images in it are only counted, never shown to the detector. `options`: hold-out for the threshold,
    seed of the split and more; `groups`: extra groups of images that must stay together, or a whole `Split`;
    `out`: also write the model there, keeping a resumable state while fitting.

    Raises InputError before the first epoch when the data cannot be used, TrainingError when training fails.
    """
    chosen = build(detector) if isinstance(detector, str) else detector
    target = Path(out) if out is not None else None
    return fit_model(chosen, data, options or FitOptions(), groups=groups, out=target, reporter=reporter)


def score(model: FittedModel, images: ImageInput, *, min_area: int = 1) -> list[Finding]:
    """One `Finding` per image; higher `image_score` = more anomalous. See `FittedModel.score`."""
    return model.score(images, min_area=min_area)


def calibrate(
    model: FittedModel,
    normals: str | os.PathLike[str] | Sequence[Path],
    *,
    fpr: float = 0.05,
    files: FileOptions | None = None,
) -> FittedModel:
    """A model whose thresholds come from a site's own normal images, without refitting.

    `normals`: a folder or files, all normal. `fpr`: the false-positive rate the threshold keeps, bounded from
    below by 1 / (n + 1). `files` as in `evaluate`. Raises InputError when there are none, when one cannot be read
    or was fitted on.
    """
    given = [normals] if isinstance(normals, (str, os.PathLike)) else list(normals)
    options = model.file_options(files)
    found, _ = list_images(given, follow=options.follow)
    cases = expand((Case(file) for file in found), options)
    return model.calibrated(usable_images(cases), map(CaseHashes().of, cases), fpr=fpr)


def evaluate(
    model: FittedModel,
    data: Data,
    *,
    n_resamples: int = 1000,
    seed: int = 0,
    files: FileOptions | None = None,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Metrics with 95 % intervals on the test part of `data`. See `umiad.evaluation.evaluate_model`."""
    return evaluate_model(model, data, n_resamples=n_resamples, seed=seed, files=files, reporter=reporter)


def save(model: FittedModel, path: str | os.PathLike[str]) -> Path:
    """Write the model directory atomically; raises DiskError, InputError when foreign files lie there."""
    return model.save(path)
