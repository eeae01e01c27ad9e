"""A detector under examination: built and fitted once, handed out to the checks as deep copies."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from umiad.detectors.battery.images import clean_images
from umiad.detectors.contract import CollectingDetector, Detector, DetectorInfo, PhasedDetector

Make: TypeAlias = Callable[[int], Detector]
"""Builds an unfitted detector from a seed, at the size the battery is run with."""

FIT_IMAGES, FIT_STEPS = 8, 12
BRIEF_STEPS = 2
LEARNING_RATE = 1e-3
TOLERANCE = 1e-4
"""Of results that differ in nothing but the order of float32 sums, relative to the largest value."""


class CheckError(AssertionError):
    """A detector broke the contract; the message names the check and what was found."""


class Exempt(Exception):
    """A check does not apply, because the detector declares so; the message names the declaration."""


def expect(condition: object, message: str) -> None:
    """Raise CheckError with `message` unless `condition` holds."""
    if not condition:
        raise CheckError(message)


def same(first: Tensor, second: Tensor, *, tolerance: float = TOLERANCE) -> bool:
    """Whether two tensors have one shape and differ by at most `tolerance` times the largest magnitude."""
    if first.shape != second.shape:
        return False
    scale = max(1.0, float(first.abs().amax())) if first.numel() else 1.0
    return bool(((first.double() - second.double()).abs() <= tolerance * scale).all())


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same names with clones of the tensors."""
    return {name: values.clone() for name, values in tensors.items()}


def equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether both hold the same names and bit-equal tensors."""
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@dataclass(frozen=True, eq=False)
class RandomStates:
    """The global random states of torch (CPU), numpy and Python."""

    torch: Tensor
    numpy: Any
    python: Any

    @classmethod
    def now(cls) -> RandomStates:
        """The states at this moment."""
        return cls(torch.get_rng_state(), np.random.get_state(), random.getstate())

    def restore(self) -> None:
        """Put them back."""
        torch.set_rng_state(self.torch)
        np.random.set_state(self.numpy)
        random.setstate(self.python)

    def changed(self) -> list[str]:
        """Which of the three are another than at this object's making."""
        other = RandomStates.now()
        same_numpy = all(np.array_equal(a, b) for a, b in zip(self.numpy, other.numpy, strict=True))
        same_states = {
            "torch": torch.equal(self.torch, other.torch),
            "numpy": same_numpy,
            "python": self.python == other.python,
        }
        return [name for name, unchanged in same_states.items() if not unchanged]


@contextmanager
def world(number: int) -> Iterator[RandomStates]:
    """Global random states that `number` decides inside; afterwards those that were there before."""
    before = RandomStates.now()
    torch.default_generator.manual_seed(number)
    np.random.seed(number)
    random.seed(number)
    try:
        yield RandomStates.now()
    finally:
        before.restore()


def fit_prepared(detector: Detector, prepared: dict[str, Tensor], *, steps: int) -> Detector:
    """Fit on one batch, an epoch each time, in the order in which `umiad.training` does: steps, collect, finish."""
    rng = torch.Generator().manual_seed(detector.config.seed)
    detector.module.train()
    if not detector.info.closed_form:
        training = detector.config.training
        limit = math.inf if training.clip_norm is None else training.clip_norm
        optimizer = torch.optim.Adam(detector.param_groups(), lr=LEARNING_RATE)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for number in range(1, steps + 1):
            if isinstance(detector, PhasedDetector):
                detector.begin_epoch(number)
            for losses in detector.steps(prepared, rng):
                optimizer.zero_grad()
                losses["total"].backward()
                torch.nn.utils.clip_grad_norm_(parameters, limit)
                optimizer.step()
    elif not isinstance(detector, CollectingDetector):
        raise CheckError("info.closed_form is set, but collect and finish are missing")
    if isinstance(detector, CollectingDetector):
        detector.collect(prepared)
        detector.finish(torch.Generator().manual_seed(detector.config.seed))
    return detector


def fit_quickly(detector: Detector, images: Tensor, *, steps: int = FIT_STEPS) -> Detector:
    """Fit on `images` [B,3,S,S] without the training layer: a few gradient steps, or collect and finish."""
    return fit_prepared(detector, detector.prepare(images), steps=steps)


class Candidate:
    """What the checks know: `make`, `size`, and detectors that are deep copies of a few shared ones.

    Nothing is built before a check asks for it. Shared: one unfitted and one fitted detector of seed 0, and
    briefly fitted ones (2 steps) that are compared with each other.
    """

    def __init__(self, make: Make, size: int = 64) -> None:
        self.make, self.size = make, size
        self._kept: dict[tuple[object, ...], Detector] = {}
        self.disturbed: set[str] = set()

    @property
    def info(self) -> DetectorInfo:
        """The detector's declarations."""
        return self._unfitted.info

    def images(self, count: int, *, seed: int) -> Tensor:
        """Clean images [count,3,S,S] unlike those the shared detector was fitted on (seed 0)."""
        return clean_images(count, size=self.size, seed=seed)

    def rng(self) -> torch.Generator:
        """A generator for one call of `steps` or `finish`."""
        return torch.Generator().manual_seed(0)

    def new(self) -> Detector:
        """An unfitted detector of seed 0."""
        return _copy(self._unfitted)

    def fitted(self, *, images: int = FIT_IMAGES, steps: int = FIT_STEPS) -> Detector:
        """A detector of seed 0 fitted on clean images of seed 0."""
        key = ("fitted", images, steps)
        if key not in self._kept:
            with world(0):
                self._kept[key] = fit_quickly(self.new(), self.images(images, seed=0), steps=steps)
        return _copy(self._kept[key])

    def brief(self, *, seed: int, global_seed: int) -> Detector:
        """Built from `seed` and briefly fitted, both under global random states that `global_seed` decides.

        Global states that this changes are noted in `disturbed`, but for the first time of all: what is imported
        only where it is needed may draw random numbers at its import.
        """
        key = ("brief", seed, global_seed)
        if key not in self._kept:
            first = not any(kept[0] == "brief" for kept in self._kept)
            with world(global_seed) as before:
                detector = self.make(seed)
                fit_quickly(detector, self.images(FIT_IMAGES, seed=0), steps=BRIEF_STEPS)
                self.disturbed.update([] if first else before.changed())
            self._kept[key] = detector
        return _copy(self._kept[key])

    def rebuilt(self) -> Detector:
        """An unfitted detector made from the plain values of the configuration, as `umiad.load` makes it."""
        if ("rebuilt",) not in self._kept:
            self._kept["rebuilt",] = self.with_settings()
        return _copy(self._kept["rebuilt",])

    def with_settings(self, **settings: object) -> Detector:
        """The same with some fields of its configuration changed, and random weights."""
        cls: Any = type(self._unfitted)
        config = cls.Config.parse({**self._unfitted.config.canonical(), **settings})
        built: Detector = cls(config, None)
        return built

    @cached_property
    def _unfitted(self) -> Detector:
        with world(0):
            return self.make(0)


def _copy(detector: Detector) -> Detector:
    try:
        return copy.deepcopy(detector)
    except Exception as error:
        raise CheckError(f"cannot be deep-copied: {type(error).__name__}: {error}") from error
