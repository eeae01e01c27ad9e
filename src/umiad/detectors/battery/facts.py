"""Checks that a detector is what it declares: its calls, its configuration, its presets, its name."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from umiad import detectors
from umiad.config import DetectorConfig
from umiad.detectors.battery.candidate import Candidate, expect
from umiad.detectors.contract import CollectingDetector, Detector, DetectorInfo
from umiad.errors import ConfigError

PRESETS = {"paper", "default", "quick"}


def contract(candidate: Candidate) -> None:
    """The detector has every attribute and call of the contract, and documents itself."""
    detector = candidate.new()
    known = {name for name in (*vars(Detector), *Detector.__annotations__) if not name.startswith("_")}
    lacking = sorted(name for name in known if getattr(detector, name, None) is None)
    expect(not lacking, f"lacks {', '.join(lacking)}")
    expect(isinstance(detector.info, DetectorInfo), "info is no DetectorInfo")
    expect(isinstance(detector.module, nn.Module), "module is no nn.Module")
    expect(inspect.cleandoc(type(detector).__doc__ or ""), "the class has no docstring")
    parts = detector.parts()
    strange = [name for name, part in parts.items() if not isinstance(part, nn.Module)]
    expect(parts and not strange, f"parts() has no modules: {', '.join(strange) or 'it is empty'}")


def configuration(candidate: Candidate) -> None:
    """The configuration is a DetectorConfig with the given size and seed, and all presets can be read."""
    detector = candidate.new()
    cls: Any = type(detector)
    expect(isinstance(detector.config, DetectorConfig), "config is no DetectorConfig")
    expect(
        type(detector.config) is getattr(cls, "Config", None), "the class attribute Config is not its type"
    )
    size, seed = detector.config.size, detector.config.seed
    expect(size == candidate.size, f"config.size is {size}, made for {candidate.size}")
    expect(seed == 0, f"config.seed is {seed}, made from 0")
    presets = set(getattr(cls, "presets", {}))
    expect(presets >= PRESETS, f"presets {sorted(presets)}, expected at least {sorted(PRESETS)}")
    for preset, values in cls.presets.items():
        try:
            cls.Config.parse({**values, "size": candidate.size, "preset": preset})
        except ConfigError as error:
            expect(False, f"preset {preset!r} cannot be read: {error}")


def kind(candidate: Candidate) -> None:
    """A closed form collects and has nothing to train; any other has something to train."""
    detector = candidate.new()
    trainable = any(p.requires_grad for p in detector.module.parameters())
    optimised = any(list(group["params"]) for group in detector.param_groups())
    if not candidate.info.closed_form:
        expect(trainable and optimised, "nothing to train, but info.closed_form is False")
        return
    expect(
        isinstance(detector, CollectingDetector), "info.closed_form is set, but collect or finish is missing"
    )
    expect(not trainable and not optimised, "info.closed_form is set, but there is something to train")
    rows = detector.prepare(candidate.images(2, seed=0))
    steps = list(detector.steps(rows, candidate.rng()))
    expect(not steps, "info.closed_form is set, but steps yields losses")


def name(candidate: Candidate) -> None:
    """`info.name` is the name in the registry; a detector that is not registered takes no registered name.

    One name may stand for several designs: then the registered class makes this one from its configuration.
    """
    detector = candidate.new()
    cls: type[Any] = type(detector)
    where = f"{cls.__module__}:{cls.__qualname__}"
    registered = [each for each, target in detectors.REGISTRY.items() if target == where]
    found = candidate.info.name
    if registered:
        expect(found in registered, f"info.name is {found!r}, registered as {', '.join(registered)}")
    elif found in detectors.REGISTRY:
        expect(_made_by(found, detector), f"info.name {found!r} belongs to a registered detector")
    expect(candidate.info.summary and candidate.info.reference, "info has no summary or no reference")


def _made_by(registered: str, detector: Detector) -> bool:
    """Whether the class registered under that name makes a detector of this class from its configuration."""
    try:
        return type(detectors.make(registered, detector.config.canonical(), None)) is type(detector)
    except ConfigError:
        return False
