"""CFLOW-AD (Gudovskiy et al., 2022): one conditional flow per level on single fibres, told where they lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from umiad.config import MAX_BLOCKS, DetectorConfig, TrainingConfig
from umiad.detectors.contract import DetectorInfo
from umiad.detectors.guards import check_fitted, check_images, check_state, evaluating
from umiad.errors import TrainingError
from umiad.nn.coupling import AllInOneFlow, Subnet
from umiad.nn.encoder import BACKBONES, Pyramid
from umiad.nn.flow import position_encoding
from umiad.nn.parts import in_parts
from umiad.nn.precision import exact
from umiad.scoring import smooth
from umiad.types import Scores

CEILING = 20.0
"""Nats per dimension above the reference that count: keeps exp finite (and 1 - exp within 5e8)."""
IMAGES_AT_ONCE = 8
"""Images whose fibres pass a flow together outside training: bounds the memory."""


def _logsigmoid(log_likelihood: Tensor) -> Tensor:
    return -F.logsigmoid(log_likelihood).mean()


def _nll(log_likelihood: Tensor) -> Tensor:
    return -log_likelihood.mean()


LOSSES: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({"logsigmoid": _logsigmoid, "nll": _nll})
"""Name -> loss of log-likelihoods [N] in nats per dimension; "logsigmoid" cares little for likely fibres."""


class CflowConfig(DetectorConfig):
    """What the flows see and how they are built.

    `scales` of the pyramid (1..4); `condition_channels` of the position code; `blocks` per flow, whose subnets
    have `hidden_ratio` times as many hidden as input values; `permutation` between blocks: "soft" a fixed
    rotation (slow to build above 512 channels), "hard" a fixed order of the channels. `fibres_per_step`: how
    many fibres a gradient step sees; `loss`: a name from `LOSSES`.
    """

    scales: tuple[int, ...] = Field(default=(2, 3, 4), min_length=1)
    condition_channels: int = Field(default=128, ge=4, multiple_of=4)
    blocks: int = Field(default=8, ge=1, le=MAX_BLOCKS)
    hidden_ratio: float = Field(default=2.0, gt=0)
    clamp: float = Field(default=1.9, gt=0)
    permutation: Literal["soft", "hard"] = "soft"
    fibres_per_step: int = Field(default=256, ge=1)
    loss: Literal["logsigmoid", "nll"] = "logsigmoid"
    training: TrainingConfig = TrainingConfig(
        epochs=200, learning_rate=2e-4, clip_norm=None, schedule="cosine", warmup_epochs=16
    )

    @field_validator("scales")
    @classmethod
    def _known_scales(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if sorted(set(value)) != list(value) or not set(value) <= {1, 2, 3, 4}:
            raise ValueError("expected different scales from 1 to 4 in rising order")
        return value


def _linear_layers(hidden_ratio: float) -> Subnet:
    def subnet(inputs: int, outputs: int) -> nn.Module:
        hidden = max(1, round(hidden_ratio * inputs))
        return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))

    return subnet


class CflowNetwork(nn.Module):
    """One flow per level, the position codes [h_k*w_k,P] of its cells, and the `reference` [K]."""

    reference: Tensor

    def __init__(self, config: CflowConfig) -> None:
        super().__init__()
        channels = BACKBONES[config.backbone]
        subnets = [_linear_layers(config.hidden_ratio)] * config.blocks
        self.flows = nn.ModuleList(
            AllInOneFlow(
                channels[k - 1],
                subnets,
                condition_channels=config.condition_channels,
                clamp=config.clamp,
                soft=config.permutation == "soft",
                spatial=False,
                seed=config.seed * 4 + k,
            )
            for k in config.scales
        )
        for level, k in enumerate(config.scales):
            side = config.size // 2 ** (k + 1)
            code = position_encoding(config.condition_channels, side, side).flatten(1).T.contiguous()
            self.register_buffer(f"position{level}", code, persistent=False)
        self.register_buffer("reference", torch.zeros(len(config.scales)))

    def forward(self, level: int, fibres: Tensor, index: Tensor) -> Tensor:
        """Log-likelihood in nats per dimension [N] of fibres [N,C] of a level.

        `index` int64 [N] counts an image's cells row by row, image after image, as `as_fibres` does.
        """
        codes = self.get_buffer(f"position{level}")
        u, log_det = self.flows[level](fibres, codes[index % len(codes)])
        return (log_det - 0.5 * u.square().sum(1)) / u.shape[1] - 0.5 * math.log(2 * math.pi)

    def log_likelihood(self, level: int, features: Tensor) -> Tensor:
        """The same for all cells of features [B,C,h,w] -> [B,h,w]."""
        parts = []
        for images in in_parts(features, IMAGES_AT_ONCE):
            fibres = as_fibres(images)
            index = torch.arange(fibres.shape[0], device=fibres.device)
            parts.append(self(level, fibres, index).view(images.shape[0], *images.shape[-2:]))
        return torch.cat(parts)


def as_fibres(features: Tensor) -> Tensor:
    """Features [B,C,h,w] -> fibres [B*h*w,C], image by image, row by row."""
    return features.permute(0, 2, 3, 1).flatten(0, 2)


class Cflow:
    """A conditional normalizing flow per pyramid level on single fibres; the condition is the position code.

    Higher scores = more anomalous. With l_k a cell's log-likelihood in nats per dimension and r_k the highest on
    the fitted images, the map is sum_k (1 - exp(l_k - r_k)), upsampled bilinearly; the image score comes from its
    maximum m. Before `finish` the r_k are 0.

    Presets. "paper": the published constants for ResNet18: 200 passes over the images in steps of 256 fibres.
    "default" fits some 90 images of 256 px in 3 to 6 minutes on one thread (`fit_seconds` in benchmarks/results):
    the published network and steps, but 12 passes; a rate of 1e-3 makes up for part of the missing ones (chosen by
    the likelihood of unseen normal images, docs/decisions/0004). "quick" is for a first look: half the blocks,
    twice the fibres per step, 8 passes.

    Deviation: the official code subtracts the maximum over the whole test set, so that a score depends on the
    other test images; ours subtracts the maximum over the fitted normal images. Deviation: no random rotation by
    5 degrees and no centre crop, since features are computed once. Deviation: the last epoch counts, not the best
    on the test set. Deviation: fibres that do not fill a step are not dropped, all are shared out evenly.
    Deviation: the image score m is written as -log(1 - m / K), in nats: the same order of images, but no ties
    where exp is below float32's resolution.
    Deviation: warm-up and cosine follow `umiad.schedule`, which moves the rate at every batch of images.
    """

    info: ClassVar[DetectorInfo] = DetectorInfo(
        name="cflow",
        summary="conditional flow on single fibres with a position code",
        reference="Gudovskiy et al., CFLOW-AD, WACV 2022, arXiv:2107.12571",
    )
    Config = CflowConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "training": {
                "epochs": 200,
                "batch_size": 32,
                "learning_rate": 2e-4,
                "clip_norm": None,
                "schedule": "cosine",
                "warmup_epochs": 16,
            }
        },
        "default": {
            "training": {
                "epochs": 12,
                "batch_size": 32,
                "learning_rate": 1e-3,
                "clip_norm": None,
                "schedule": "cosine",
                "warmup_epochs": 2,
            }
        },
        "quick": {
            "fibres_per_step": 512,
            "blocks": 4,
            "training": {
                "epochs": 8,
                "batch_size": 32,
                "learning_rate": 1e-3,
                "clip_norm": None,
                "schedule": "cosine",
                "warmup_epochs": 1,
            },
        },
    }

    def __init__(self, config: CflowConfig, backbone: Mapping[str, Tensor] | None) -> None:
        self.config = config
        self.pyramid = Pyramid(backbone, seed=config.seed, backbone=config.backbone)
        self.network = CflowNetwork(config)
        self.module = nn.ModuleDict({"pyramid": self.pyramid, "network": self.network})
        self.fitted = False
        self._highest: Tensor | None = None

    def prepare(self, images: Tensor, *, original_size: Tensor | None = None) -> dict[str, Tensor]:
        """Images [B,3,S,S] -> the chosen levels, {"f2": [B,128,S/8,S/8], ...}."""
        check_images(images, size=self.config.size)
        with torch.no_grad():
            pyramid = self.pyramid(images, depth=max(self.config.scales))
            return {f"f{k}": pyramid[k - 1] for k in self.config.scales}

    def steps(self, prepared: dict[str, Tensor], rng: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """Level by level, one step per `fibres_per_step` fibres in random order; each fibre is seen once."""
        self.fitted = True
        for level, features in enumerate(self._levels(prepared)):
            fibres = as_fibres(features)
            order = torch.randperm(len(fibres), generator=rng).to(fibres.device)
            for index in order.tensor_split(-(-len(fibres) // self.config.fibres_per_step)):
                log_likelihood = self.network(level, fibres[index], index)
                total = LOSSES[self.config.loss](log_likelihood)
                yield {"total": total, "nats_per_dim": -log_likelihood.mean()}

    def param_groups(self) -> list[dict[str, Any]]:
        """All trainable parameters in one group."""
        return [{"params": [p for p in self.module.parameters() if p.requires_grad]}]

    def monitor(self, prepared: dict[str, Tensor]) -> dict[str, float]:
        """Negative log-likelihood of the features in nats per dimension, over all levels."""
        with evaluating(self.module):
            nats, dimensions = 0.0, 0
            for level, features in enumerate(self._levels(prepared)):
                log_likelihood = self.network.log_likelihood(level, features)
                nats -= float(exact(log_likelihood).sum()) * features.shape[1]
                dimensions += features.numel()
            return {"nats_per_dim": nats / dimensions}

    def collect(self, prepared: dict[str, Tensor]) -> None:
        """Keep the highest log-likelihood of each level on the normal images."""
        with evaluating(self.module):
            levels = enumerate(self._levels(prepared))
            highest = torch.stack([self.network.log_likelihood(k, features).max() for k, features in levels])
            self._highest = highest if self._highest is None else torch.maximum(self._highest, highest)

    def finish(self, rng: torch.Generator) -> None:
        """Make it the reference of the scores. Raises TrainingError when nothing was collected."""
        if self._highest is None:
            raise TrainingError("cflow needs at least 1 normal image for its reference, got 0")
        self.network.reference.copy_(self._highest)
        self._highest = None

    def score(self, images: Tensor, *, original_size: Tensor | None = None) -> Scores:
        """Scores of images [B,3,S,S]; higher = more anomalous. Raises NotFittedError, InputError."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        return self.score_prepared(self.prepare(images))

    def score_prepared(self, prepared: dict[str, Tensor]) -> Scores:
        """Scores from cached features, as the class docstring says."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        levels = self._levels(prepared)
        with evaluating(self.module):
            likenesses = [self._likeness(level, features) for level, features in enumerate(levels)]
            likely = smooth(torch.stack(likenesses).sum(0), self.config.sigma)
            lowest = likely.amin(dim=(1, 2)).clamp_min(torch.finfo(torch.float64).tiny)
            maps, score = len(levels) - likely, math.log(len(levels)) - lowest.log()
            device = levels[0].device
            return Scores(maps.to(device, torch.float32), score.to(device, torch.float32))

    def parts(self) -> dict[str, nn.Module]:
        """Named parts for parameter counts."""
        flows = {f"flow{k}": flow for k, flow in zip(self.config.scales, self.network.flows, strict=True)}
        return {"encoder": self.pyramid, **flows}

    def state(self) -> dict[str, Tensor]:
        """All tensors, backbone included."""
        return {key: value.detach() for key, value in self.module.state_dict().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Fill from `state`. Raises ModelFileError on a missing, unknown or misshapen tensor."""
        check_state(state, self.module.state_dict(), name=self.info.name)
        self.module.load_state_dict(dict(state))
        self.fitted = True

    def _likeness(self, level: int, features: Tensor) -> Tensor:
        """exp(l - r) of one level, upsampled: float64 [B,S,S], 1 = as likely as the likeliest normal cell."""
        excess = self.network.log_likelihood(level, features) - self.network.reference[level]
        likeness = exact(excess).clamp(max=CEILING).exp()[:, None]
        size = (self.config.size, self.config.size)
        return F.interpolate(likeness, size=size, mode="bilinear", align_corners=True)[:, 0]

    def _levels(self, prepared: Mapping[str, Tensor]) -> list[Tensor]:
        return [prepared[f"f{k}"] for k in self.config.scales]
