"""Height, width and sharpness of the file alone: what a data set gives away without showing anything ill."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from umiad.config import DetectorConfig
from umiad.detectors.contract import DetectorInfo
from umiad.detectors.guards import check_fitted, check_images, check_state, evaluating
from umiad.errors import InputError, TrainingError
from umiad.nn.precision import exact
from umiad.types import Scores

FEATURES = 3
"""log height, log width, log sharpness."""
ENERGY_FLOOR = 1e-6
"""Added to both energies of the sharpness, in squared normalised grey values; a step of 8 bits is 3e-4."""


class SizeConfig(DetectorConfig):
    """What keeps the covariance regular where a feature hardly varies.

    `ridge` times the mean variance of the features, and `floor` (a standard deviation of 1 % for 1e-4), are added
    to the diagonal. `sigma` has no effect, since the map is constant.
    """

    ridge: float = Field(default=1e-3, ge=0)
    floor: float = Field(default=1e-4, gt=0)


class Gaussian(nn.Module):
    """The features' `mean` [3] and `whitening` matrix [3,3] (inverse Cholesky factor of the covariance)."""

    mean: Tensor
    whitening: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("whitening", torch.eye(FEATURES))


def log_sharpness(grey: Tensor) -> Tensor:
    """Log of the share of fine detail in grey images [B,S,S], S even -> float64 [B], 0 or less up to rounding.

    Fine detail is the mean squared difference between the image and its 2 x 2 area averages; it is divided by
    the variance of all pixels, so that contrast and brightness do not count. A constant image gives 0. An image
    enlarged to S x S has little of it, one reduced to S x S has much: the size of a file outlives its resizing.
    """
    wide = exact(grey)
    averages = nn.functional.avg_pool2d(wide[:, None], 2)
    coarse = averages.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)[:, 0]
    fine = (wide - coarse).square().mean(dim=(1, 2))
    total = (wide - wide.mean(dim=(1, 2), keepdim=True)).square().mean(dim=(1, 2))
    return (fine + ENERGY_FLOOR).log() - (total + ENERGY_FLOOR).log()


class Size:
    """Mahalanobis distance of log height, log width and log sharpness from those of the normal images.

    Higher scores = more anomalous; the map is constant, the image score in every pixel. It sees no lesion and
    must never be used as a detector: it is the confounder that a table has to show. In the public head CT set the
    images with a haemorrhage are larger, and the area of the file alone separates them with an AUROC of 0.80 where
    the direction is known (`umiad check-data`). This fit does not know it and reaches 0.54 in the mean, 0.25 to 0.68
    (docs/results.md, Table 3, head_ct: five splits with ten normal test images each). Resizing does not remove it,
    since sharpness stays. A model that does not clearly beat this row has shown nothing. Without a backbone:
    `backbone` and `weights` are not used, nor is `seed`.

    Presets: "paper", "default" and "quick" are the same, since nothing is cut; there is no publication.
    """

    info: ClassVar[DetectorInfo] = DetectorInfo(
        name="size",
        summary="height, width and sharpness of the file, nothing else: shows what a data set gives away",
        reference="no publication; the baseline for confounders of umiad",
        fidelity="adapted",
        closed_form=True,
        localises=False,
        uses_pixels=False,
        uses_size=True,
        uses_seed=False,
        uses_backbone=False,
        supports_resume=False,
    )
    Config = SizeConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {"paper": {}, "default": {}, "quick": {}}

    def __init__(self, config: SizeConfig, backbone: Mapping[str, Tensor] | None) -> None:
        self.config = config
        self.gaussian = Gaussian()
        self.module = nn.ModuleDict({"gaussian": self.gaussian})
        self.fitted = False
        self._rows: list[Tensor] = []

    def prepare(self, images: Tensor, *, original_size: Tensor | None = None) -> dict[str, Tensor]:
        """Images [B,3,S,S], original_size [B,2] (None: S x S) -> {"features": [B,3]}, float32.

        Raises InputError on another shape, or on an edge below 1 pixel.
        """
        check_images(images, size=self.config.size)
        edges = _edges(original_size, count=len(images), size=self.config.size)
        sharpness = log_sharpness(images.detach().mean(1)).cpu()
        features = torch.cat([edges.log(), sharpness[:, None]], dim=1)
        return {"features": features.to(images.device, torch.float32)}

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
        return {"distance_per_dim": float(self._distance(prepared).square().mean()) / FEATURES}

    def collect(self, prepared: dict[str, Tensor]) -> None:
        """Keep the features of one batch: three numbers per image."""
        self._rows.append(prepared["features"].double().cpu())

    def finish(self, rng: torch.Generator) -> None:
        """Turn what was collected into mean and whitening. Raises TrainingError below 2 images."""
        count = sum(len(rows) for rows in self._rows)
        if count < 2:
            raise TrainingError(f"size needs at least 2 normal images, got {count}")
        features = torch.cat(self._rows)
        covariance = torch.cov(features.T)
        added = self.config.ridge * covariance.trace() / FEATURES + self.config.floor
        identity = torch.eye(FEATURES, dtype=torch.float64)
        factor = torch.linalg.cholesky(covariance + added * identity)
        self.gaussian.mean.copy_(features.mean(0))
        self.gaussian.whitening.copy_(torch.linalg.solve_triangular(factor, identity, upper=False))
        self._rows = []
        self.fitted = True

    def score(self, images: Tensor, *, original_size: Tensor | None = None) -> Scores:
        """Scores of images [B,3,S,S]; higher = more anomalous. Raises NotFittedError, InputError."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        return self.score_prepared(self.prepare(images, original_size=original_size))

    def score_prepared(self, prepared: dict[str, Tensor]) -> Scores:
        """Scores from cached features: the distance [B], and as a map [B,S,S] the same in every pixel."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        with evaluating(self.module):
            distance = self._distance(prepared)
            size = self.config.size
            return Scores(distance[:, None, None].expand(-1, size, size).contiguous(), distance)

    def parts(self) -> dict[str, nn.Module]:
        """Named parts for parameter counts; there is no encoder."""
        return {"gaussian": self.gaussian}

    def state(self) -> dict[str, Tensor]:
        """All tensors: twelve numbers."""
        return dict(self.module.state_dict())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Fill from `state`. Raises ModelFileError on a missing, unknown or misshapen tensor."""
        check_state(state, self.module.state_dict(), name=self.info.name)
        self.module.load_state_dict(dict(state))
        self.fitted = True

    def _distance(self, prepared: dict[str, Tensor]) -> Tensor:
        """Mahalanobis distance, float32 [B]; each image by itself, in float64."""
        centred = exact(prepared["features"]) - exact(self.gaussian.mean)
        whitened = (exact(self.gaussian.whitening)[None] * centred[:, None]).sum(-1)
        return whitened.square().sum(1).sqrt().to(prepared["features"].device, torch.float32)


def _edges(original_size: Tensor | None, *, count: int, size: int) -> Tensor:
    """Heights and widths in pixels, float64 [B,2] on the CPU."""
    if original_size is None:
        return torch.full((count, 2), float(size), dtype=torch.float64)
    if tuple(original_size.shape) != (count, 2):
        raise InputError("original_size", f"shape {tuple(original_size.shape)}, expected [{count},2]")
    edges = original_size.cpu().double()
    if bool((edges < 1).any()):
        raise InputError("original_size", f"an edge of {edges.min():g} pixels, expected at least 1")
    return edges
