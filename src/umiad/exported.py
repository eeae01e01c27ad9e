"""An exported model: a graph for another runtime, with all that scoring needs. Importing this leaves torch out."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from umiad import manifest as manifests
from umiad import runtimes, strictjson
from umiad.config import Config
from umiad.errors import ConfigError, InputError, ModelFileError
from umiad.manifest import CONFIG, EXPORT, MANIFEST
from umiad.runtimes import Run, Runtime
from umiad.scorer import Facts, Scorer, ScoringConfig

BOUND = 1e-4
"""Largest difference, as a share of a map's range and of an image score, with which a model is exported and loaded."""
LEAST_RANK, MOST_CHANGED = 0.95, 0.05
"""What 8 bits must keep: the rank correlation of image scores, and how many decisions may change, as a share."""


class Parity(Config):
    """How far an exported model was from the one it was made from, measured when it was exported.

    `images`: how many were compared, each in batches of 1 and of `batch`; `source`: "images" that were named, or
    generated "phantoms". `map_relative`: largest difference of a map value, as a share of the range of that image's
    map; `score_relative`: of an image score, as a share of it. `decisions`: comparisons with the thresholds;
    `same_decisions`: how many came out alike; `ties`: how many of the others lie so near the threshold that
    the bound allows both. `bound`: what both differences had to keep.
    """

    images: int = Field(ge=1)
    source: Literal["images", "phantoms"]
    batch: int = Field(ge=1)
    map_relative: float = Field(ge=0)
    score_relative: float = Field(ge=0)
    decisions: int = Field(ge=0)
    same_decisions: int = Field(ge=0)
    ties: int = Field(ge=0)
    bound: float = Field(gt=0)

    @property
    def kept(self) -> bool:
        """Whether the exported model may be used: within its own bound, which is `BOUND` or less."""
        differing = self.decisions - self.same_decisions - self.ties
        most = max(self.map_relative, self.score_relative)
        return most <= self.bound <= BOUND and not differing

    def words(self) -> str:
        """The numbers in one sentence."""
        kind = "images" if self.source == "images" else "generated phantoms"
        return (
            f"{self.images} {kind}, batches of 1 and {self.batch}: maps differ by {self.map_relative:.1e} of their "
            f"range, image scores by {self.score_relative:.1e} (bound {self.bound:.0e}); {self.same_decisions} of "
            f"{self.decisions} decisions alike" + (f", {self.ties} ties" if self.ties else "")
        )


class Loss(Config):
    """How far int8 is from the model in float32, on `images` images that its ranges were not taken from.

    `map_median` and `map_most`: of each map's largest difference, as a share of that map's range, the median and the
    largest over images. `score_most`: the largest difference of an image score as a share of the scores' standard
    deviation. `rank_correlation` (Spearman) of image scores, None where they are all alike. `decisions`: comparisons
    with the thresholds; `changed`: how many came out otherwise.
    """

    images: int = Field(ge=1)
    source: Literal["images", "phantoms"]
    map_median: float = Field(ge=0)
    map_most: float = Field(ge=0)
    score_most: float = Field(ge=0)
    rank_correlation: float | None = Field(ge=-1, le=1)
    decisions: int = Field(ge=0)
    changed: int = Field(ge=0)

    @property
    def kept(self) -> bool:
        """Whether the model may be used: finite differences, order and decisions as `LEAST_RANK`, `MOST_CHANGED`."""
        rank = 1.0 if self.rank_correlation is None else self.rank_correlation
        finite = math.isfinite(self.map_most) and math.isfinite(self.score_most)
        return finite and rank >= LEAST_RANK and self.changed <= MOST_CHANGED * self.decisions

    def words(self) -> str:
        """The numbers in one sentence."""
        kind = "images" if self.source == "images" else "generated phantoms"
        rank = "-" if self.rank_correlation is None else f"{self.rank_correlation:.3f}"
        return (
            f"int8 on {self.images} {kind}: maps differ by {self.map_median:.1%} of their range (median; at most "
            f"{self.map_most:.1%}), image scores by at most {self.score_most:.1%} of their spread, rank correlation "
            f"{rank} (at least {LEAST_RANK}); {self.changed} of {self.decisions} decisions changed (at most "
            f"{MOST_CHANGED:.0%})"
        )


class ExportedConfig(ScoringConfig):
    """What `config.json` of an exported model holds.

    `opset`: version of ONNX's operators. `versions` of what made it. `source_manifest_sha256`: the manifest of the
    saved model it was made from, None where that never was a folder. `parity` of the graph in float32; `loss`: what
    8 bits changed on top of it, None where the graph is float32. `accuracy`: metric -> the model's value and the
    export's on the test part of labelled data, as fractions (None: undefined there); empty where none was given.
    """

    runtime: Runtime
    opset: int
    versions: dict[str, str]
    source_manifest_sha256: str | None
    parity: Parity
    loss: Loss | None = None
    accuracy: dict[str, tuple[float | None, float | None]] = Field(default_factory=dict)

    @property
    def facts(self) -> Facts:
        """As of the saved model, with the runtime, and what was measured of the export."""
        found: Facts = {**super().facts, "runtime": self.runtime, "parity": self.parity.words()}
        if self.loss is not None:
            found["int8"] = self.loss.words()
        for name, (before, after) in self.accuracy.items():
            if before is not None and after is not None:
                found[f"{name} of the model, of this export"] = f"{100 * before:.2f}, {100 * after:.2f}"
        return found


class ExportedModel(Scorer):
    """Scores as the fitted model does that it was made from, up to `config.parity`; it can do nothing else."""

    config: ExportedConfig

    def __init__(self, config: ExportedConfig, run: Run) -> None:
        super().__init__(config)
        self._run = run

    def run(self, inputs: np.ndarray, sizes: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Preprocessed inputs float32 [B,3,S,S] -> maps [B,S,S], image scores [B]; sizes are not looked at."""
        return self._run(inputs)


def is_export(path: str | os.PathLike[str]) -> bool:
    """Whether the folder's manifest says that it is an exported model."""
    return manifests.kind_of(Path(path)) is EXPORT


def read(
    path: str | os.PathLike[str], *, manifest_sha256: str | None = None
) -> tuple[ExportedConfig, dict[str, bytes], str]:
    """The configuration of an exported model, its other files (name -> content), and the manifest's SHA-256.

    Raises InputError, ModelFileError as `umiad.modelfile.load` does.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(folder, "no such folder, expected an exported model", "`umiad export` writes them")
    manifest, digest = manifests.read_hashed(folder / MANIFEST, sha256=manifest_sha256, kind=EXPORT)
    files = manifests.read_listed(folder, manifest)
    source = str(folder / CONFIG)
    try:
        config = ExportedConfig.parse(strictjson.load_object(files.pop(CONFIG), source=source))
    except ConfigError as error:
        raise ModelFileError(f"{source}: {error}") from error
    if missing := [name for name in runtimes.FILES[config.runtime] if name not in files]:
        raise ModelFileError(f"{folder}: lists no {missing[0]}, expected in an export for {config.runtime}")
    if not config.parity.kept:
        raise ModelFileError(f"{source}: the parity it states is not kept ({config.parity.words()}); altered")
    if config.loss is not None and not config.loss.kept:
        raise ModelFileError(f"{source}: the loss it states is too large ({config.loss.words()}); altered")
    return config, files, digest


def load(
    path: str | os.PathLike[str],
    *,
    manifest_sha256: str | None = None,
    device: str = "auto",
    threads: int | None = None,
) -> ExportedModel:
    """Load an exported model; torch is not imported. `threads`: of the CPU, None = all.

    Raises InputError, ModelFileError; ConfigError for another `device` than "auto" and "cpu", MissingExtraError where
    its runtime is not installed.
    """
    if device not in ("auto", "cpu"):
        raise ConfigError(f"device {device!r}: exported models run on the CPU, expected auto or cpu")
    config, files, digest = read(path, manifest_sha256=manifest_sha256)
    size = config.preprocessing.size
    source = str(Path(path) / runtimes.FILES[config.runtime][0])
    run = runtimes.start(config.runtime, files, size=size, threads=threads, source=source)
    model = ExportedModel(config, run)
    model.manifest_sha256 = digest
    return model
