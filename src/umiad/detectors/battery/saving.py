"""Checks that a detector is its configuration and its state: copies, reloads and saved models score alike."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from umiad import modelfile
from umiad.detectors.battery.candidate import Candidate, CheckError, copied, equal, expect
from umiad.detectors.contract import Detector
from umiad.errors import ModelFileError
from umiad.types import Scores


def round_trip(candidate: Candidate) -> None:
    """Rebuilt from plain configuration and state, the detector is equal to the last bit and scores alike."""
    detector, fresh = candidate.fitted(), candidate.rebuilt()
    expect(fresh.config == detector.config, "the configuration changes through plain values")
    fresh.load_state(copied(detector.state()))
    expect(equal(fresh.state(), detector.state()), "the state is not bit-equal")
    _check_scores_alike(candidate, detector, fresh, "a reloaded detector scores differently")


def copies(candidate: Candidate) -> None:
    """A deep copy scores alike and shares nothing with its original."""
    detector, images = candidate.fitted(), candidate.images(2, seed=6)
    twin, before = candidate.fitted(), copied(detector.state())
    _check_scores_alike(candidate, detector, twin, "a deep copy scores differently")
    twin.load_state({name: torch.zeros_like(values) for name, values in before.items()})
    expect(equal(detector.state(), before), "a deep copy shares its state with the original")
    other = candidate.rebuilt()
    other.load_state(before)
    alike = torch.equal(detector.score(images).image_score, other.score(images).image_score)
    expect(alike, "filling a deep copy changes the scores of the original")


def wrong_state(candidate: Candidate) -> None:
    """A state with a tensor missing, unknown or of another shape raises ModelFileError."""
    detector = candidate.fitted()
    state = copied(detector.state())
    key = next(iter(state))
    cases = {
        "lacks a tensor": {k: v for k, v in state.items() if k != key},
        "has a tensor too many": {**state, "surplus": torch.zeros(1)},
        "has a tensor of another shape": {**state, key: torch.zeros(1, 2, 3)},
    }
    for words, wrong in cases.items():
        try:
            detector.load_state(wrong)
        except ModelFileError:
            continue
        except Exception as error:
            raise CheckError(f"a state that {words} raises {type(error).__name__}") from error
        raise CheckError(f"accepts a state that {words}, expected ModelFileError")


def model_file(candidate: Candidate) -> None:
    """Saved by `umiad.modelfile`, loaded and rebuilt, the detector scores alike."""
    detector = candidate.fitted()
    fresh = candidate.rebuilt()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        config: dict[str, Any] = detector.config.canonical()
        try:
            modelfile.save(path, config=config, tensors=detector.state(), split={}, card="battery")
            saved = modelfile.load(path)
        except Exception as error:
            raise CheckError(f"cannot be saved: {type(error).__name__}: {error}") from error
    expect(
        type(detector.config).parse(saved.config) == detector.config, "the configuration changes in a file"
    )
    fresh.load_state(saved.tensors)
    _check_scores_alike(candidate, detector, fresh, "a detector from a file scores differently")


def _check_scores_alike(candidate: Candidate, first: Detector, second: Detector, message: str) -> None:
    images = candidate.images(2, seed=6)
    a: Scores
    b: Scores
    a, b = first.score(images), second.score(images)
    alike = torch.equal(a.anomaly_map, b.anomaly_map) and torch.equal(a.image_score, b.image_score)
    expect(alike, message)
