"""Checks that a detector has no effect beyond its results: nothing changed, no file or socket opened."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from umiad.detectors.battery.candidate import (
    BRIEF_STEPS,
    FIT_IMAGES,
    Candidate,
    RandomStates,
    copied,
    equal,
    expect,
    fit_prepared,
)

OUTSIDE = ("open", "os.", "socket.", "subprocess.", "shutil.", "tempfile.", "urllib.", "sqlite3.", "ftplib.")
"""How names of Python's audit events begin that tell of files, processes and the network."""


def leaves_alone(candidate: Candidate) -> None:
    """Scoring changes neither its input, nor random states, nor train/eval modes, nor the detector's state."""
    detector = candidate.fitted()
    images, size = candidate.images(2, seed=2), torch.full((2, 2), candidate.size)
    before, state = {"images": images.clone(), "size": size.clone()}, copied(detector.state())
    candidate.fitted().score(images.clone())  # what is imported only where it is needed is imported now
    for training in (True, False):
        detector.module.train(training)
        modes = [part.training for part in detector.module.modules()]
        random = RandomStates.now()
        rows = detector.prepare(images, original_size=size)
        kept = copied(rows)
        detector.score(images, original_size=size)
        detector.score_prepared(rows)
        detector.monitor(rows)
        expect(equal({"images": images, "size": size}, before), "scoring changes its input")
        expect(equal(rows, kept), "scoring changes what was prepared")
        expect(not random.changed(), f"scoring changes a global random state: {', '.join(random.changed())}")
        expect([p.training for p in detector.module.modules()] == modes, "scoring changes train/eval modes")
        expect(torch.is_grad_enabled(), "scoring leaves gradients switched off")
        expect(equal(detector.state(), state), "scoring changes the state")


def no_files(candidate: Candidate) -> None:
    """Preparing, fitting and scoring open no file and no socket."""
    images = candidate.images(FIT_IMAGES, seed=0)
    for watched in (False, True):  # first without: what is imported when it is needed is imported now
        detector = candidate.new()
        with _outside_events(on=watched) as events:
            rows: dict[str, Tensor] = detector.prepare(images)
            fit_prepared(detector, rows, steps=BRIEF_STEPS)
            detector.score_prepared(rows)
            detector.score(images)
            detector.monitor(rows)
        expect(not events, f"preparing, fitting or scoring reaches outside: {', '.join(events[:3])}")


@contextmanager
def _outside_events(*, on: bool) -> Iterator[list[str]]:
    """Collect, where `on`, the audit events of `OUTSIDE` that happen inside."""
    watch = _watch()
    events: list[str] = []
    watch.events = events if on else None
    try:
        yield events
    finally:
        watch.events = None


class _Watch:
    """Python's audit hook, which once added stays; it writes to `events` while that is a list."""

    events: list[str] | None = None

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.events is not None and event.startswith(OUTSIDE):
            self.events.append(f"{event}({', '.join(repr(each) for each in arguments[:1])})")


@functools.cache
def _watch() -> _Watch:
    watch = _Watch()
    sys.addaudithook(watch)
    return watch
