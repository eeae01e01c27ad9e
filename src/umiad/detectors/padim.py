"""PaDiM (Defard et al., 2021): one Gaussian per position on random channels; the honest yardstick."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from umiad.config import DetectorConfig
from umiad.detectors.contract import DetectorInfo
from umiad.detectors.guards import check_fitted, check_images, check_state, evaluating
from umiad.errors import TrainingError
from umiad.nn.encoder import BACKBONES, Pyramid
from umiad.nn.precision import exact
from umiad.scoring import maximum, smooth
from umiad.types import Scores

POSITIONS_AT_ONCE = 512
"""Positions whose covariances are factorised together: bounds the memory of `finish`."""


class PadimConfig(DetectorConfig):
    """What the Gaussians are fitted on.

    `scales` of the pyramid (1..4), number of random `channels`, `epsilon` on the covariance's diagonal.
    """

    scales: tuple[Annotated[int, Field(ge=1, le=4)], ...] = Field(
        default=(1, 2, 3), min_length=1, max_length=4
    )
    channels: int = Field(default=100, ge=1)
    epsilon: float = Field(default=0.01, gt=0)
    sigma: float = Field(default=4.0, ge=0)


class Statistics(nn.Module):
    """The drawn channels `index` [d], and per position the `mean` [P,d] and `whitening` matrix [P,d,d]."""

    index: Tensor
    mean: Tensor
    whitening: Tensor

    def __init__(self, index: Tensor, *, positions: int) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.register_buffer("mean", torch.zeros(positions, len(index)))
        self.register_buffer("whitening", torch.zeros(positions, len(index), len(index)))


class Padim:
    """Mahalanobis distance of each position's features to that position's Gaussian.

    Higher scores = more anomalous; the image score is the maximum of the smoothed map. The state holds the
    mean [P,d] and the whitening matrix [P,d,d] (inverse Cholesky factor) of P positions. Preset "paper":
    layers 1 to 3 on the finest grid; "default" leaves layer 1 out (a quarter of the positions and of the
    file); "quick" also halves the channels.
    """

    info: ClassVar[DetectorInfo] = DetectorInfo(
        name="padim",
        summary="one Gaussian per position on 100 random channels",
        reference="Defard et al., PaDiM, ICPR 2021, arXiv:2011.08785",
        closed_form=True,
        supports_resume=False,
    )
    Config = PadimConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {},
        "default": {"scales": [2, 3]},
        "quick": {"scales": [2, 3], "channels": 50},
    }

    def __init__(self, config: PadimConfig, backbone: Mapping[str, Tensor] | None) -> None:
        self.config = config
        total = sum(BACKBONES[config.backbone][k - 1] for k in config.scales)
        chosen = min(config.channels, total)
        edge = config.size // 2 ** (min(config.scales) + 1)
        rng = torch.Generator().manual_seed(config.seed)
        index = torch.randperm(total, generator=rng)[:chosen].sort().values
        self.pyramid = Pyramid(backbone, seed=config.seed, backbone=config.backbone)
        self.statistics = Statistics(index, positions=edge * edge)
        self.module = nn.ModuleDict({"pyramid": self.pyramid, "statistics": self.statistics})
        self.fitted = False
        self._count = 0
        self._sum: Tensor | None = None
        self._outer: Tensor | None = None

    def prepare(self, images: Tensor, *, original_size: Tensor | None = None) -> dict[str, Tensor]:
        """Images [B,3,S,S] -> the chosen channels on the finest grid, {"features": [B,d,h,w]}."""
        check_images(images, size=self.config.size)
        with torch.no_grad():
            pyramid = self.pyramid(images, depth=max(self.config.scales))
            maps = [pyramid[k - 1] for k in self.config.scales]
            size = max(m.shape[-2:] for m in maps)
            maps = [nn.functional.interpolate(m, size=size, mode="nearest") for m in maps]
            return {"features": torch.cat(maps, dim=1)[:, self.statistics.index]}

    def steps(self, prepared: dict[str, Tensor], rng: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """Nothing to minimise."""
        return iter(())

    def param_groups(self) -> list[dict[str, Any]]:
        """No trainable parameters."""
        return []

    def monitor(self, prepared: dict[str, Tensor]) -> dict[str, float]:
        """Mean squared Mahalanobis distance per dimension; about 1 for images like the fitted ones."""
        if not self.fitted:
            return {}
        with evaluating(self.module):
            return {"distance_per_dim": float(self._distance(prepared).square().mean()) / self._dimensions}

    def collect(self, prepared: dict[str, Tensor]) -> None:
        """Add one batch to the sums of every position, in float64."""
        fibres = exact(prepared["features"]).flatten(2).permute(2, 0, 1)  # [P,B,d]
        if self._sum is None or self._outer is None:
            self._sum, self._outer = fibres.sum(1), fibres.mT @ fibres
        else:
            self._sum += fibres.sum(1)
            self._outer.baddbmm_(fibres.mT, fibres)
        self._count += prepared["features"].shape[0]

    def finish(self, rng: torch.Generator) -> None:
        """Turn the sums into mean and whitening. Raises TrainingError with fewer than 2 images."""
        if self._sum is None or self._outer is None or self._count < 2:
            raise TrainingError(f"padim needs at least 2 normal images, got {self._count}")
        mean = self._sum / self._count
        self.statistics.mean.copy_(mean)
        identity = torch.eye(self._dimensions, dtype=torch.float64, device=mean.device)
        for start in range(0, len(mean), POSITIONS_AT_ONCE):
            part = slice(start, start + POSITIONS_AT_ONCE)
            m = mean[part, :, None]
            covariance = (self._outer[part] - self._count * (m @ m.mT)) / (self._count - 1)
            factor = torch.linalg.cholesky(covariance + self.config.epsilon * identity)
            inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
            self.statistics.whitening[part] = inverse.float()
        self._sum = self._outer = None
        self.fitted = True

    def score(self, images: Tensor, *, original_size: Tensor | None = None) -> Scores:
        """Scores of images [B,3,S,S]; higher = more anomalous. Raises NotFittedError, InputError."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        return self.score_prepared(self.prepare(images))

    def score_prepared(self, prepared: dict[str, Tensor]) -> Scores:
        """Scores from cached features: distances, bilinear to S x S, smoothed; image score = maximum."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        with evaluating(self.module):
            distance = self._distance(prepared)[:, None]
            size = (self.config.size, self.config.size)
            maps = nn.functional.interpolate(distance, size=size, mode="bilinear", align_corners=False)[:, 0]
            maps = smooth(maps, self.config.sigma)
            return Scores(maps, maximum(maps))

    def parts(self) -> dict[str, nn.Module]:
        """Named parts for parameter counts."""
        return {"encoder": self.pyramid, "statistics": self.statistics}

    def state(self) -> dict[str, Tensor]:
        """All tensors, backbone included."""
        return dict(self.module.state_dict())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Fill from `state`. Raises ModelFileError on a missing, unknown or misshapen tensor."""
        check_state(state, self.module.state_dict(), name=self.info.name)
        self.module.load_state_dict(dict(state))
        self.fitted = True

    @property
    def _dimensions(self) -> int:
        return self.statistics.index.numel()

    def _distance(self, prepared: dict[str, Tensor]) -> Tensor:
        """Mahalanobis distance per position, [B,h,w]."""
        features = prepared["features"]
        centred = features.flatten(2).permute(2, 1, 0) - self.statistics.mean[:, :, None]  # [P,d,B]
        squared = torch.bmm(self.statistics.whitening, centred).square().sum(1)  # [P,B]
        return squared.T.sqrt().unflatten(1, features.shape[-2:])
