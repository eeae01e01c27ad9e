"""ADFA (Huang et al., ICIP 2023): descriptors trained towards the centroids they start from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from umiad.config import DetectorConfig, TrainingConfig
from umiad.detectors.contract import DetectorInfo
from umiad.detectors.guards import check_fitted, check_images, check_state, evaluating
from umiad.nn.descriptor import Descriptor
from umiad.nn.encoder import BACKBONES, Pyramid
from umiad.nn.fibres import join
from umiad.nn.shrink import shrink
from umiad.nn.topk import distance_prices, nearest_cost
from umiad.scoring import maximum, smooth_cells
from umiad.types import Scores

SCALES = (1, 2, 3)
"""Scales of the pyramid that are described."""
MAX_GRID = 128
"""Cells per side, at most: a configuration may come from a stranger, and costs grow with the fourth power."""
PUBLISHED: Mapping[str, Any] = {
    "epochs": 200,
    "batch_size": 10,
    "learning_rate": 1e-3,
    "weight_decay": 5e-4,
    "clip_norm": None,
}
"""The published training, beside AdamW with amsgrad."""


class AdfaConfig(DetectorConfig):
    """Where descriptors are compared, and with how many centroids.

    `grid`: cells per side on which the scales are joined; never more than scale 1 has (S/4). `k` nearest
    centroids count, chosen the more softly the larger `eps` is. `times_divergence`: whether the squared distances of
    an image are multiplied by how far its descriptors are from the centroids as distributions over channels.
    """

    grid: int = Field(default=32, ge=2, le=MAX_GRID)
    k: int = Field(default=3, ge=1)
    eps: float = Field(default=0.1, ge=1e-4, le=1e4)
    times_divergence: bool = True
    sigma: float = Field(default=4.0, ge=0)
    training: TrainingConfig = TrainingConfig(**PUBLISHED)

    @model_validator(mode="after")
    def _enough_cells(self) -> Self:
        if self.k > self.side**2:
            raise ValueError(
                f"k is {self.k}, but {self.side} x {self.side} cells have {self.side**2} centroids"
            )
        return self

    @property
    def side(self) -> int:
        """Cells per side of the grid in use."""
        return min(self.grid, self.size // 4)


class AdfaNetwork(nn.Module):
    """The trained descriptor, and one centroid per cell: the mean of the untrained descriptor over images.

    `centroids` [side*side,C/4], row by row; `shown` int64: how many images they are the mean of.
    """

    centroids: Tensor
    shown: Tensor

    def __init__(self, config: AdfaConfig) -> None:
        super().__init__()
        channels = sum(BACKBONES[config.backbone][k - 1] for k in SCALES)
        self.descriptor = Descriptor(channels, seed=config.seed)
        for name, value in self.descriptor.named_parameters():
            self.register_buffer(_initial(name), value.detach().clone(), persistent=False)
        self.register_buffer("centroids", torch.zeros(config.side**2, channels // 4))
        self.register_buffer("shown", torch.zeros((), dtype=torch.long))

    def forward(self, features: Tensor) -> Tensor:
        """Joined features [B,C,h,w] -> descriptors [B,h*w,C/4], row by row."""
        described: Tensor = self.descriptor(features)
        return described.flatten(2).mT

    def untrained(self, features: Tensor) -> Tensor:
        """The same with the weights that were drawn, whatever training has made of them; no gradient."""
        weights = {name: self.get_buffer(_initial(name)) for name, _ in self.descriptor.named_parameters()}
        with torch.no_grad():
            described: Tensor = torch.func.functional_call(self.descriptor, weights, (features,))
            return described.flatten(2).mT

    def show(self, features: Tensor) -> None:
        """Move the centroids to the mean of these images [B,C,h,w] and of all that were shown before."""
        self.shown += len(features)
        self.centroids += (self.untrained(features) - self.centroids).sum(0) / self.shown

    def divergence(self, described: Tensor) -> Tensor:
        """KL(softmax centroids || softmax described) of images [B,n,C/4], summed over cells, in nats: [B].

        The softmax is over channels. 0 or more. No gradient.
        """
        with torch.no_grad():
            own, expected = described.log_softmax(2), self.centroids.log_softmax(1)
            return (expected.exp() * (expected - own)).sum((1, 2)).clamp_min(0)


def _initial(name: str) -> str:
    return f"initial_{name.replace('.', '_')}"


class Adfa:
    """Soft distance of each cell's trained descriptor to its nearest centroids.

    Higher scores = more anomalous. Scales 1 to 3, averaged over 3 x 3 cells and joined on one grid, are described
    by a 1 x 1 CoordConv to a quarter of their channels (448 -> 112 for ResNet18) and a channel attention. Every
    cell has a centroid, the mean of its untrained descriptor over the training images; the descriptor is then
    trained so that each cell comes near to a few centroids, no matter whose. With d the squared distances of a
    cell to all centroids, times its image's divergence from the centroids, and A the weights of a soft choice of the
    `k` smallest (`umiad.nn.topk`), its score is sum A d; the loss is its mean. The map is the square root of the
    scores, bilinear to S x S and smoothed; the image score is its maximum.

    The divergence, in nats, summed over all cells and a constant for the gradient, is one number per image: it moves
    how images rank, and within an image only how softly centroids are chosen.

    Presets. "paper": the published constants on the grid of scale 1 (64 x 64 cells at 256 px): hours for 100 images.
    "default": 32 x 32 cells, so a sixteenth of the pairs, and 40 epochs instead of 200 at a rate that falls along a
    cosine, since the last epoch counts: minutes for 100 images. "quick": 20 epochs on 16 x 16 cells. With 100 images
    "default" takes 400 steps, "quick" 200.

    The publication gives 19 M parameters for its model with WideResNet50, which fits neither that backbone alone
    nor with the descriptor: up to layer 3 it has 24.86 M, the descriptor 0.80 M. Ours with ResNet18: 2.78 and
    0.05 M.

    Deviation: training has no pass before its first epoch. The centroids are the running mean of the untrained
    descriptor over all images shown so far, in every epoch: after each whole epoch the mean over all images, within one
    a little weighted to the images just seen, and in the first those of the images seen so far. Published is the mean
    of the batches' means, in which images of a smaller last batch count more.
    Deviation: in scoring the soft choice's scale is the highest price in the image, not in the batch, so that
    images do not touch each other. Deviation: the soft choice is the limit of the published iteration, not its
    state after some steps. Deviation: ResNet18 by default, ImageNet's normalisation and whole images of
    256 px instead of WideResNet50, means of 0.5 and a crop of 224 px. Deviation: the published descriptor carries a
    matrix that it never uses; ours does not.
    """

    info: ClassVar[DetectorInfo] = DetectorInfo(
        name="adfa",
        summary="trained descriptors and their soft distance to the nearest centroids",
        reference="Huang et al., ADFA, ICIP 2023, arXiv:2308.15280",
        not_exported="its soft choice of the nearest centroids is a search whose length depends on the image, "
        "and exported graphs know no loops",
    )
    Config = AdfaConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"grid": 64, "training": dict(PUBLISHED)},
        "default": {"training": {**PUBLISHED, "epochs": 40, "schedule": "cosine"}},
        "quick": {"grid": 16, "training": {**PUBLISHED, "epochs": 20, "schedule": "cosine"}},
    }

    def __init__(self, config: AdfaConfig, backbone: Mapping[str, Tensor] | None) -> None:
        self.config = config
        self.pyramid = Pyramid(backbone, seed=config.seed, backbone=config.backbone, depth=max(SCALES))
        self.network = AdfaNetwork(config)
        self.module = nn.ModuleDict({"pyramid": self.pyramid, "network": self.network})
        self.fitted = False

    def prepare(self, images: Tensor, *, original_size: Tensor | None = None) -> dict[str, Tensor]:
        """Images [B,3,S,S] -> averaged features {"f1": [B,C_1,h_1,w_1], ...}, none finer than the grid.

        Averages of 3 x 3 cells count zeros at the border. They are joined only when they are used: coarse scales
        take less room in the cache on their own grids.
        """
        check_images(images, size=self.config.size)
        with torch.no_grad():
            pyramid = self.pyramid(images, depth=max(SCALES))
            averaged = [F.avg_pool2d(features, 3, stride=1, padding=1) for features in pyramid]
            return {f"f{k}": shrink(each, self.config.side) for k, each in zip(SCALES, averaged, strict=True)}

    def steps(self, prepared: dict[str, Tensor], rng: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """One step. Also moves the centroids, unless gradients are off (a look for a fault, not for training)."""
        self.fitted = True
        features = self._joined(prepared)
        if torch.is_grad_enabled():
            self.network.show(features)
        described: Tensor = self.network(features)
        factors = self._factors(described)
        highest = self._prices(described, factors).amax()
        costs = self._costs(described, factors, highest.expand(len(described)))
        yield {"total": costs.mean(), "distance_per_dim": self._per_dim(costs, factors)}

    def param_groups(self) -> list[dict[str, Any]]:
        """The descriptor, for AdamW with amsgrad."""
        trained = list(self.network.descriptor.parameters())
        return [{"params": trained, "amsgrad": True, "decoupled_weight_decay": True}]

    def monitor(self, prepared: dict[str, Tensor]) -> dict[str, float]:
        """Mean squared distance to the nearest centroids per dimension, as in scoring but without the divergence."""
        with evaluating(self.module):
            return {"distance_per_dim": float(self._per_dim(*self._scored(prepared)))}

    def score(self, images: Tensor, *, original_size: Tensor | None = None) -> Scores:
        """Scores of images [B,3,S,S]; higher = more anomalous. Raises NotFittedError, InputError."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        return self.score_prepared(self.prepare(images))

    def score_prepared(self, prepared: dict[str, Tensor]) -> Scores:
        """Scores from cached features, as the class docstring says."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        with evaluating(self.module):
            costs, _ = self._scored(prepared)
            cells = costs.sqrt().unflatten(1, (self.config.side, self.config.side))
            maps = smooth_cells(cells, self.config.size, self.config.sigma)
            return Scores(maps, maximum(maps))

    def parts(self) -> dict[str, nn.Module]:
        """Named parts for parameter counts."""
        return {"encoder": self.pyramid, "descriptor": self.network.descriptor}

    def state(self) -> dict[str, Tensor]:
        """All tensors, backbone included."""
        return {key: value.detach() for key, value in self.module.state_dict().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Fill from `state`. Raises ModelFileError on a missing, unknown or misshapen tensor."""
        check_state(state, self.module.state_dict(), name=self.info.name)
        self.module.load_state_dict(dict(state))
        self.fitted = True

    def _joined(self, prepared: Mapping[str, Tensor]) -> Tensor:
        """Prepared scales on one grid, [B,C,side,side]."""
        return join([prepared[f"f{k}"] for k in SCALES])

    def _factors(self, described: Tensor) -> Tensor:
        """What multiplies the squared distances of each image of descriptors [B,n,C/4]: [B]."""
        if self.config.times_divergence:
            return self.network.divergence(described)
        return described.new_ones(len(described))

    def _prices(self, described: Tensor, factors: Tensor) -> Tensor:
        """The soft choice's own scale for each image of descriptors [B,n,C/4]: [B]."""
        each = factors.repeat_interleave(described.shape[1])
        rows = distance_prices(described.flatten(0, 1), self.network.centroids, each)
        return rows.view(len(described), -1).amax(1)

    def _costs(self, described: Tensor, factors: Tensor, scale: Tensor) -> Tensor:
        """Soft costs [B,n] of descriptors [B,n,C/4] at their nearest centroids; factors and scales [B]."""
        cells, config = described.shape[1], self.config
        costs = nearest_cost(
            described.flatten(0, 1),
            self.network.centroids,
            factors=factors.repeat_interleave(cells),
            scale=scale.repeat_interleave(cells),
            k=config.k,
            eps=config.eps,
        )
        return costs.view(-1, cells)

    def _scored(self, prepared: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The costs [B,n] in which every image has its own scale, and the factors [B] that are in them."""
        described: Tensor = self.network(self._joined(prepared))
        factors = self._factors(described)
        return self._costs(described, factors, self._prices(described, factors)), factors

    def _per_dim(self, costs: Tensor, factors: Tensor) -> Tensor:
        """Their mean per chosen centroid and channel, as distances: without the factors."""
        least = torch.finfo(factors.dtype).tiny
        distances = costs.detach() / factors.clamp_min(least)[:, None]
        return distances.mean() / (self.config.k * self.network.centroids.shape[1])
