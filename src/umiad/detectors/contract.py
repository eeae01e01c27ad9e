"""The one contract that every detector keeps, so that training, scoring and saving know only this."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from umiad.config import DetectorConfig
from umiad.types import Scores


@dataclass(frozen=True)
class DetectorInfo:
    """Facts about a detector, or about one of its designs, that do not depend on other settings.

    `fidelity` "paper" = the published method, "adapted" = no one-class detector in its own paper, "own" = a design
    of this project, whatever it goes back to.
    `closed_form` detectors collect statistics and finish; they have no gradients and no epochs. `uses_seed`,
    `uses_pixels`, `uses_size`: whether another seed, what is in the image, and the size of its file can change a
    score; `localises`: whether the map says more than the image score; `uses_backbone`: whether weights matter.
    `not_saved`: why a model of it cannot be saved; empty where it can. `not_exported`: the same for export to other
    runtimes, which know the pixels of an image only (what `uses_size` is never exported).
    """

    name: str
    summary: str
    reference: str
    fidelity: Literal["paper", "adapted", "own"] = "paper"
    closed_form: bool = False
    deterministic: bool = True
    localises: bool = True
    uses_pixels: bool = True
    uses_size: bool = False
    uses_seed: bool = True
    uses_backbone: bool = True
    supports_resume: bool = True
    not_saved: str = ""
    not_exported: str = ""


@runtime_checkable
class Detector(Protocol):
    """A model that is fitted on normal images only; higher scores = more anomalous, always.

    It never sees a path, a mask, a label, a trainer or a logger. Images are float32 [B,3,S,S], normalised,
    S = `config.size`; `original_size` int64 [B,2] are their heights and widths before they were resized (None:
    they never were), which only detectors with `info.uses_size` look at. `prepare` runs the frozen parts (cached
    once per image by `features.py`); `score(images)` equals `score_prepared(prepare(images))`.
    """

    info: ClassVar[DetectorInfo]
    config: Any  # a DetectorConfig; rebuilt from it and `state`
    module: nn.Module

    def prepare(self, images: Tensor, *, original_size: Tensor | None = None) -> dict[str, Tensor]:
        """What the frozen parts yield for images [B,3,S,S]: tensors whose first axis is the batch."""
        ...

    def steps(self, prepared: dict[str, Tensor], rng: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """One or more dictionaries of losses per batch; each "total" is minimised in turn."""
        ...

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimiser."""
        ...

    def monitor(self, prepared: dict[str, Tensor]) -> dict[str, float]:
        """Numbers worth watching on a batch, no gradients; "nats_per_dim" where there is a likelihood."""
        ...

    def score(self, images: Tensor, *, original_size: Tensor | None = None) -> Scores:
        """Scores of images [B,3,S,S]; raises NotFittedError before fitting, InputError on a wrong shape."""
        ...

    def score_prepared(self, prepared: dict[str, Tensor]) -> Scores:
        """The same from what `prepare` returned."""
        ...

    def parts(self) -> dict[str, nn.Module]:
        """Named parts for parameter counts; "encoder" is the frozen backbone, where there is one."""
        ...

    def state(self) -> dict[str, Tensor]:
        """All tensors, backbone included: with `config` enough to rebuild."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Fill from `state`; afterwards the detector counts as fitted."""
        ...


@runtime_checkable
class CollectingDetector(Detector, Protocol):
    """Statistics of the normal images are collected batch by batch, then finished.

    A closed form has nothing else. A detector with gradients is shown all training images once more after its
    last epoch, for what only a trained network can tell (the reference of CFLOW's probabilities).
    """

    def collect(self, prepared: dict[str, Tensor]) -> None:
        """Take one batch of prepared normal images."""
        ...

    def finish(self, rng: torch.Generator) -> None:
        """Turn what was collected into the fitted model."""
        ...


@runtime_checkable
class PhasedDetector(Detector, Protocol):
    """What a batch teaches depends on the epoch: first this part of the network, then that one."""

    def begin_epoch(self, number: int) -> None:
        """Epoch `number` of `config.training.epochs`, from 1, begins; a resumed fit goes on with the next one."""
        ...


__all__ = ["CollectingDetector", "Detector", "DetectorConfig", "DetectorInfo", "PhasedDetector"]
