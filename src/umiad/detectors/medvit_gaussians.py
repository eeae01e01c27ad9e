"""What both designs of `medvit` share: a network, and Gaussians of what it finds in normal images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from umiad.config import SIZE_STEP, DetectorConfig
from umiad.detectors.contract import DetectorInfo
from umiad.detectors.guards import check_fitted, check_images, check_state, evaluating
from umiad.errors import TrainingError
from umiad.nn.fibres import join
from umiad.nn.ledoit_wolf import Gaussians, Moments
from umiad.nn.medvit import DESIGNS, STRIDES, Features, MedVitNetwork
from umiad.nn.parts import in_parts
from umiad.nn.shrink import SMALLEST_EDGE, shrink
from umiad.scoring import maximum, smooth_cells
from umiad.types import Scores

STAGES = (2, 3)
"""Stages of the network whose maps are compared at every position, on the grid of the first."""
MAX_EDGE = 512
"""Pixels of what the network sees, at most."""
MAX_NUMBERS = 1 << 26
"""Numbers of all positions' covariances together, at most: a configuration may come from a stranger."""
IMAGES_AT_ONCE = 8
"""Images that pass the network together outside training: bounds the memory."""


class GaussiansConfig(DetectorConfig):
    """Which network sees what, and what scores are made of.

    `network`: one of the four published sizes. `official_layout`: whether it computes as the published code does or
    as the publication describes it (see `MedVitNetwork`). `edge`: images with a larger edge are reduced to it before
    anything sees them; a multiple of 32. `channels` are drawn from stages 2 and 3 for the map; `image_score`:
    "embedding", the distance of the pooled embedding, or "map", the maximum of the map.
    """

    network: Literal["tiny", "small", "base", "large"] = "small"
    official_layout: bool = False
    edge: int = Field(default=224, ge=SMALLEST_EDGE, le=MAX_EDGE, multiple_of=SIZE_STEP)
    channels: int = Field(default=100, ge=1, le=512)
    image_score: Literal["embedding", "map"] = "embedding"
    sigma: float = Field(default=4.0, ge=0)

    @property
    def working_edge(self) -> int:
        """Edge in pixels of what the network sees."""
        return min(self.edge, self.size)

    @property
    def positions(self) -> int:
        """Cells of the map before it is brought to pixels."""
        return (self.working_edge // STRIDES[STAGES[0] - 1]) ** 2

    @model_validator(mode="after")
    def _possible(self) -> Self:
        numbers = self.positions * self.channels**2
        if numbers > MAX_NUMBERS:
            raise ValueError(
                f"{self.positions} positions of {self.channels} channels need covariances of {numbers} numbers, "
                f"expected at most {MAX_NUMBERS} (fewer channels, or a smaller edge)"
            )
        return self


class MedVitGaussians:
    """How far what a MedViTV2 finds in an image lies from what it finds in normal ones; a design says how it is taught.

    Two kinds of Gaussians, their covariances shrunk by Ledoit and Wolf's formula: one of the pooled embedding, one
    per position of randomly drawn channels of stages 2 and 3. Higher scores = more anomalous.
    """

    info: ClassVar[DetectorInfo]
    config: GaussiansConfig

    def __init__(self, config: GaussiansConfig, network: MedVitNetwork) -> None:
        self.config, self.network = config, network
        dims = DESIGNS[config.network].dims
        total = sum(dims[stage - 1] for stage in STAGES)
        rng = torch.Generator().manual_seed(config.seed)
        self.index = torch.randperm(total, generator=rng)[: config.channels].sort().values
        self.embedding = Gaussians(1, dims[-1])
        self.positions = Gaussians(config.positions, len(self.index))
        self.module: nn.Module = nn.ModuleDict(
            {"network": self.network, "embedding": self.embedding, "positions": self.positions}
        )
        self.fitted = False
        self._moments: tuple[Moments, Moments] | None = None

    def prepare(self, images: Tensor, *, original_size: Tensor | None = None) -> dict[str, Tensor]:
        """Images [B,3,S,S] -> {"image": [B,3,E,E]}: reduced by area averaging, still normalised."""
        check_images(images, size=self.config.size)
        return {"image": shrink(images.detach(), self.config.working_edge)}

    def collect(self, prepared: dict[str, Tensor]) -> None:
        """Add one batch of normal images, as they are, to the sums of both kinds of Gaussians."""
        with evaluating(self.module):
            for found in self._features(prepared["image"]):
                views = (found.embedding[None], self._fibres(found))
                if self._moments is None:
                    self._moments = (Moments(views[0].mean(1)), Moments(views[1].mean(1)))
                for moments, view in zip(self._moments, views, strict=True):
                    moments.add(view)

    def finish(self, rng: torch.Generator) -> None:
        """Turn the sums into Gaussians. Raises TrainingError with fewer than 2 images."""
        count = 0 if self._moments is None else self._moments[0].count
        if self._moments is None or count < 2:
            raise TrainingError(f"medvit needs at least 2 normal images, got {count}")
        for gaussians, moments in zip((self.embedding, self.positions), self._moments, strict=True):
            gaussians.fill(moments)
        self._moments = None
        self.fitted = True

    def score(self, images: Tensor, *, original_size: Tensor | None = None) -> Scores:
        """Scores of images [B,3,S,S]; higher = more anomalous. Raises NotFittedError, InputError."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        return self.score_prepared(self.prepare(images))

    def score_prepared(self, prepared: dict[str, Tensor]) -> Scores:
        """Scores from the reduced images: distances, bilinear to S x S, smoothed."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        with evaluating(self.module):
            cells, whole = [], []
            for found in self._features(prepared["image"]):
                distance = self.positions.distance(self._fibres(found))  # [P,B]
                cells.append(distance.T.unflatten(1, found.maps[STAGES[0] - 1].shape[2:]))
                whole.append(self.embedding.distance(found.embedding[None])[0])
            maps = smooth_cells(torch.cat(cells), self.config.size, self.config.sigma)
            by_map = self.config.image_score == "map"
            return Scores(maps, maximum(maps) if by_map else torch.cat(whole))

    def parts(self) -> dict[str, nn.Module]:
        """Named parts for parameter counts."""
        return {"network": self.network, "embedding": self.embedding, "positions": self.positions}

    def state(self) -> dict[str, Tensor]:
        """All tensors; which channels are drawn follows from the configuration."""
        return {key: value.detach() for key, value in self.module.state_dict().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Fill from `state`. Raises ModelFileError on a missing, unknown or misshapen tensor."""
        check_state(state, self.module.state_dict(), name=self.info.name)
        self.module.load_state_dict(dict(state))
        self.fitted = True

    def _features(self, images: Tensor) -> Iterator[Features]:
        """What the network finds, without DropPath, in so many images at a time as may pass it together."""
        for part in in_parts(images, IMAGES_AT_ONCE):
            yield self.network(part)

    def _fibres(self, found: Features) -> Tensor:
        """The drawn channels of stages 2 and 3 on stage 2's grid: [P,B,d]."""
        maps = join([found.maps[stage - 1] for stage in STAGES])
        return maps[:, self.index.to(maps.device)].flatten(2).permute(2, 0, 1)


__all__ = ["STAGES", "GaussiansConfig", "MedVitGaussians"]
