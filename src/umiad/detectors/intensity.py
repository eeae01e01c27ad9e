"""How unusual the brightness of each pixel is: no network, the first rival that a model must beat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from umiad.config import DetectorConfig
from umiad.detectors.contract import DetectorInfo
from umiad.detectors.guards import check_fitted, check_images, check_state, evaluating
from umiad.errors import TrainingError
from umiad.nn.precision import exact
from umiad.scoring import smooth, top_mean
from umiad.types import Scores

FLOOR = 1e-3
"""Smallest standard deviation; rounding to 8 bits alone gives 0.005 in normalised images."""

TAILS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"both": torch.abs, "bright": torch.positive, "dark": torch.neg}
)
"""Name of a tail -> what makes its far end high."""


class IntensityConfig(DetectorConfig):
    """Which brightness counts as unusual.

    `tail`: "both", "bright" or "dark". `top_fraction`: share of the highest pixels whose mean is the image
    score. `sigma` smooths the grey image before the tail is taken, so that noise of both signs cancels.
    """

    tail: Literal["both", "bright", "dark"] = "both"
    top_fraction: float = Field(default=0.01, gt=0, le=1)
    sigma: float = Field(default=4.0, ge=0)


class Brightness(nn.Module):
    """Mean and standard deviation [1] of all pixels of the normal images."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("std", torch.ones(1))


class Intensity:
    """Deviation of each smoothed grey value from the normal images' grey values, in their standard deviations.

    Higher scores = more anomalous. The map is |z| (or z, -z, as `tail` says) of z = (smoothed grey - mean) / std,
    with one mean and one std for all pixels of all normal images; the image score is the mean of its top 1 %.
    Scores of the tails "bright" and "dark" may be negative. Without a backbone: `backbone` and `weights` are not
    used, nor is `seed`.

    Meissen et al. found that a threshold on the brightness of FLAIR slices outlines lesions better than the
    published models they compared. A table without this row cannot tell a model that knows anatomy from one that
    has learned that lesions are bright.

    Presets: "paper", "default" and "quick" are the same, since nothing is cut; there is no publication of
    exactly this.
    Deviation: Meissen et al. threshold the brightness itself, where lesions are known to be bright; ours
    standardises by the normal images, takes both directions, and smooths.
    """

    info: ClassVar[DetectorInfo] = DetectorInfo(
        name="intensity",
        summary="unusual brightness of single pixels, without a network",
        reference="after Meissen et al., Challenging Current Semi-Supervised Anomaly Segmentation Methods for "
        "Brain MRI, BrainLes 2021, arXiv:2109.06023",
        fidelity="adapted",
        closed_form=True,
        uses_seed=False,
        uses_backbone=False,
        supports_resume=False,
    )
    Config = IntensityConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {"paper": {}, "default": {}, "quick": {}}

    def __init__(self, config: IntensityConfig, backbone: Mapping[str, Tensor] | None) -> None:
        self.config = config
        self.brightness = Brightness()
        self.module = nn.ModuleDict({"brightness": self.brightness})
        self.fitted = False
        self._count = self._pixels = 0
        self._sum = self._squares = 0.0

    def prepare(self, images: Tensor, *, original_size: Tensor | None = None) -> dict[str, Tensor]:
        """Images [B,3,S,S] -> {"grey": [B,1,S,S]}, the mean of the normalised channels."""
        check_images(images, size=self.config.size)
        return {"grey": images.detach().mean(1, keepdim=True)}

    def steps(self, prepared: dict[str, Tensor], rng: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """Nothing to minimise."""
        return iter(())

    def param_groups(self) -> list[dict[str, Any]]:
        """No trainable parameters."""
        return []

    def monitor(self, prepared: dict[str, Tensor]) -> dict[str, float]:
        """Mean squared z of the smoothed pixels; at most about 1 for images like the fitted ones."""
        if not self.fitted:
            return {}
        return {"squared_z": float(self._deviation(prepared).square().mean())}

    def collect(self, prepared: dict[str, Tensor]) -> None:
        """Add the pixels of one batch to the sums, in float64."""
        grey = exact(prepared["grey"])
        self._count += len(grey)
        self._pixels += grey.numel()
        self._sum += float(grey.sum())
        self._squares += float(grey.square().sum())

    def finish(self, rng: torch.Generator) -> None:
        """Turn the sums into mean and std (of all pixels, at least `FLOOR`). Raises TrainingError below 2 images."""
        if self._count < 2:
            raise TrainingError(f"intensity needs at least 2 normal images, got {self._count}")
        mean = self._sum / self._pixels
        variance = max(self._squares / self._pixels - mean * mean, 0.0)
        self.brightness.mean.fill_(mean)
        self.brightness.std.fill_(max(variance**0.5, FLOOR))
        self._count = self._pixels = 0
        self._sum = self._squares = 0.0
        self.fitted = True

    def score(self, images: Tensor, *, original_size: Tensor | None = None) -> Scores:
        """Scores of images [B,3,S,S]; higher = more anomalous. Raises NotFittedError, InputError."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        return self.score_prepared(self.prepare(images))

    def score_prepared(self, prepared: dict[str, Tensor]) -> Scores:
        """Scores from the grey images: map [B,S,S] in standard deviations, image score = mean of its top."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        with evaluating(self.module):
            maps = TAILS[self.config.tail](self._deviation(prepared))
            return Scores(maps, top_mean(maps, self.config.top_fraction))

    def parts(self) -> dict[str, nn.Module]:
        """Named parts for parameter counts; there is no encoder."""
        return {"brightness": self.brightness}

    def state(self) -> dict[str, Tensor]:
        """All tensors: two numbers."""
        return dict(self.module.state_dict())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Fill from `state`. Raises ModelFileError on a missing, unknown or misshapen tensor."""
        check_state(state, self.module.state_dict(), name=self.info.name)
        self.module.load_state_dict(dict(state))
        self.fitted = True

    def _deviation(self, prepared: dict[str, Tensor]) -> Tensor:
        """The smoothed grey values' z, [B,S,S]."""
        grey = smooth(prepared["grey"][:, 0], self.config.sigma)
        return (grey - self.brightness.mean) / self.brightness.std
