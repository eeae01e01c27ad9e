"""Where the time of fitting, of a step of training and of an evaluation goes; parts of performance.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from speed import alternate
from umiad import api
from umiad.detectors.check import clean_images, fit_quickly
from umiad.progress import Silent

STEP_IMAGES = 16
"""Of one batch of the published training."""
REST = "the rest"


class Clock(Silent):
    """A reporter that tells how long each stage took: the time up to a message belongs to the stage it names."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stage(self, name: str, done: int, total: int) -> None:
        """Progress within a stage; `done` and `total` do not matter."""
        self._spend(name)

    def shares(self) -> dict[str, float]:
        """Stage -> share of the whole time since the clock was made; what came after the last message is the rest."""
        self._spend(REST)
        whole = sum(self.seconds.values())
        return {name: round(value / whole, 4) for name, value in self.seconds.items()}

    def _spend(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def jobs(build: Callable[[], Any], data: Path) -> dict[str, Any]:
    """Seconds of a fit of the default on a set and of its evaluation, and the share of each stage."""
    found: dict[str, Any] = {}
    clock = Clock()
    model = api.fit(build(), data, options=api.FitOptions(holdout=0.2), reporter=clock)
    found["fit"] = _spent(clock, int(model.info["n_train"] or 0) + int(model.info["n_holdout"] or 0))
    clock = Clock()
    evaluation = api.evaluate(model, data, reporter=clock)
    found["evaluate"] = _spent(clock, len(evaluation.cases))
    return found


def _spent(clock: Clock, images: int) -> dict[str, Any]:
    shares = clock.shares()
    return {"images": images, "seconds": round(sum(clock.seconds.values()), 1), "shares": shares}


def training(weights: str, r1: Callable[[], object], images: torch.Tensor, turns: int) -> dict[str, float]:
    """One batch of training of egmf's preset "paper", part by part and as a whole, as multiples of R1 on it.

    "cached": the features are there, as in `umiad fit`; "uncached": the frozen parts run in every step.
    """
    detector = api.build("egmf", preset="paper", weights=weights)
    fit_quickly(detector, clean_images(4, size=images.shape[-1]), steps=1)
    optimiser = torch.optim.Adam(detector.param_groups(), lr=1e-5)
    rng, prepared = torch.Generator(), detector.prepare(images)
    detector.module.train()

    def forward() -> list[torch.Tensor]:
        return [losses["total"] for losses in detector.steps(prepared, rng)]

    def gradients() -> None:
        for loss in forward():
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]

    def step(features: dict[str, torch.Tensor]) -> None:
        for losses in detector.steps(features, rng):
            optimiser.zero_grad()
            losses["total"].backward()  # type: ignore[no-untyped-call]
            optimiser.step()

    seconds = alternate(
        {
            "r1": r1,
            "frozen features": lambda: detector.prepare(images),
            "forward": forward,
            "forward and backward": gradients,
            "step of the optimiser": optimiser.step,
            "whole step, cached": lambda: step(prepared),
            "whole step, uncached": lambda: step(detector.prepare(images)),
        },
        repeats=turns,
    )
    seconds["backward"] = seconds["forward and backward"] - seconds.pop("forward")
    seconds["forward"] = seconds.pop("forward and backward") - seconds["backward"]
    return {name: round(value / seconds["r1"], 4) for name, value in seconds.items() if name != "r1"}
