"""Whether the backbone may run in bfloat16: where the processor has it, and only where the scores agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch

from umiad.agreement import changed_decisions, map_difference, share
from umiad.errors import ConfigError
from umiad.features import device_of
from umiad.fitted import FittedModel
from umiad.nn.encoder import Pyramid
from umiad.types import Image

Precision = Literal["float32", "auto", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "auto", "bfloat16")
MAP_BOUND, SCORE_BOUND = 0.02, 0.02
"""What may change at most: a map's values, as a share of that map's range; an image score, as a share of the spread of
normal scores where the model is calibrated, else of the probe's own. bfloat16 keeps 8 bits, 0.4 %, of each feature."""
PROBES = 8
"""Images that are scored in both precisions."""


@dataclass(frozen=True)
class Parity:
    """How far scores in bfloat16 are from those in float32, over `images` images.

    `map_error`: largest change of a map value, as a share of that map's range. `score_error`: largest change of an
    image score, as a share of the spread of scores. `decisions`: how many change, of an image or of its map.
    """

    images: int
    map_error: float
    score_error: float
    decisions: int

    @property
    def agrees(self) -> bool:
        """Within `MAP_BOUND` and `SCORE_BOUND`, and every decision as it was."""
        return self.map_error <= MAP_BOUND and self.score_error <= SCORE_BOUND and not self.decisions

    def words(self) -> str:
        """The numbers in one line."""
        return (
            f"over {self.images} images the maps differ by {self.map_error:.2%} of their range (at most "
            f"{MAP_BOUND:.0%} allowed), the scores by {self.score_error:.2%} of their spread (at most "
            f"{SCORE_BOUND:.0%}), {self.decisions} decisions change (none may)"
        )


@dataclass(frozen=True)
class Choice:
    """What the backbone runs in, why, and what the parity check found where there was one."""

    precision: Literal["float32", "bfloat16"]
    reason: str
    parity: Parity | None = None

    def to_json(self) -> dict[str, object]:
        """As plain values."""
        return {
            "precision": self.precision,
            "reason": self.reason,
            "parity": None if self.parity is None else asdict(self.parity),
        }


def native() -> bool:
    """Whether this processor multiplies bfloat16 in hardware (AMX or AVX-512 BF16 of x86); others are slower in it."""
    checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("amx_tile", "avx512_bf16"))
    return any(check is not None and check() for check in checks)


def choose(model: FittedModel, images: Sequence[Image], wanted: Precision = "auto") -> Choice:
    """Set what the model's backbone runs in from now on, and say why.

    "float32": as fitted. "auto": bfloat16 where the processor has it and `images` (a few of those to be scored) get the
    same scores within the bounds; "bfloat16": also where the processor only imitates it, which is slow. A check that
    fails leaves float32. Flows, maps and scores are float32 in any case, and so is everything that fits.
    Raises ConfigError for another word.
    """
    if wanted not in PRECISIONS:
        raise ConfigError(f"precision {wanted!r}, expected one of {', '.join(PRECISIONS)}")
    pyramids = backbones(model)
    for each in pyramids:
        each.dtype = None
    if wanted == "float32":
        return Choice("float32", "as fitted")
    if not pyramids:
        return Choice("float32", f"{model.config.detector} has no frozen backbone")
    if (device := device_of(model.detector.module).type) != "cpu":
        return Choice("float32", f"the model runs on {device}, and only processors are checked")
    if wanted == "auto" and not native():
        return Choice("float32", "this processor has no bfloat16")
    if not images:
        return Choice("float32", "no image to check the scores on")
    parity = compare(model, images)
    if not parity.agrees:
        return Choice("float32", f"bfloat16 is not used: {parity.words()}", parity)
    for each in pyramids:
        each.dtype = torch.bfloat16
    return Choice("bfloat16", parity.words(), parity)


def compare(model: FittedModel, images: Sequence[Image]) -> Parity:
    """Score `images` in both precisions; the model is left as it was."""
    with _precision(model, None):
        exact = list(model.score_images(images))
    with _precision(model, torch.bfloat16):
        rough = list(model.score_images(images))
    before, after = (np.array([score for _, score, _ in each]) for each in (exact, rough))
    calibration, changed = model.config.calibration, 0
    if calibration is not None:
        maps, other_maps = (np.stack([map_ for *_, map_ in each]) for each in (exact, rough))
        changed = changed_decisions((maps, before), (other_maps, after), calibration)
    return Parity(
        images=len(exact),
        map_error=max(map_difference(a, b) for (*_, a), (*_, b) in zip(exact, rough, strict=True)),
        score_error=share(float(np.abs(after - before).max()), _spread(model, before)),
        decisions=changed,
    )


def backbones(model: FittedModel) -> list[Pyramid]:
    """The frozen backbones of its detector."""
    return [each for each in model.detector.module.modules() if isinstance(each, Pyramid)]


def _spread(model: FittedModel, scores: np.ndarray) -> float:
    """Standard deviation of normal scores where the model knows some, else of these; never 0."""
    calibration = model.config.calibration
    known = np.array(calibration.image_scores) if calibration and calibration.n > 1 else scores
    return max(float(known.std()), 1e-6 * float(np.abs(known).max()), 1e-12)


@contextmanager
def _precision(model: FittedModel, dtype: torch.dtype | None) -> Iterator[None]:
    found = backbones(model)
    before = [each.dtype for each in found]
    for each in found:
        each.dtype = dtype
    try:
        yield
    finally:
        for each, kept in zip(found, before, strict=True):
            each.dtype = kept
