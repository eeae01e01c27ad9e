"""FastFlow (Yu et al., 2021): a convolutional flow per level on the whole feature map."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from umiad.config import MAX_BLOCKS, DetectorConfig, TrainingConfig
from umiad.detectors.contract import DetectorInfo
from umiad.detectors.guards import check_fitted, check_images, check_state, evaluating
from umiad.nn.coupling import AllInOneFlow, convolutions
from umiad.nn.encoder import BACKBONES, Pyramid
from umiad.nn.parts import in_parts
from umiad.nn.precision import exact
from umiad.scoring import latent_log_likelihood, smooth
from umiad.types import Scores

KERNELS: Mapping[str, tuple[int, ...]] = MappingProxyType({"3": (3,), "3-1": (3, 1)})
"""Name -> sizes of the convolutions of successive blocks, repeated as often as needed."""
IMAGES_AT_ONCE = 8
"""Images that pass a flow together outside training: bounds the memory."""


class FastflowConfig(DetectorConfig):
    """What the flows see and how they are built.

    `scales` of the pyramid (1..4); `blocks` per flow with `kernels` "3" or "3-1" (3x3 and 1x1 in turn), whose
    subnets have `hidden_ratio` times as many hidden as input channels. `norm`: what standardises each level's
    map before its flow, a name from `NORMS`.
    """

    scales: tuple[int, ...] = Field(default=(1, 2, 3), min_length=1)
    blocks: int = Field(default=8, ge=1, le=MAX_BLOCKS)
    kernels: Literal["3", "3-1"] = "3"
    hidden_ratio: float = Field(default=1.0, gt=0)
    clamp: float = Field(default=2.0, gt=0)
    norm: Literal["affine", "counted", "plain", "none"] = "affine"
    training: TrainingConfig = TrainingConfig(
        epochs=500, learning_rate=1e-3, weight_decay=1e-5, clip_norm=None
    )

    @field_validator("scales")
    @classmethod
    def _known_scales(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if sorted(set(value)) != list(value) or not set(value) <= {1, 2, 3, 4}:
            raise ValueError("expected different scales from 1 to 4 in rising order")
        return value


@dataclass(frozen=True)
class Norm:
    """How a level is standardised: not at all, to mean 0 and variance 1 over [C,H,W], with trained factors.

    `counted`: whether the logarithm of the factors counts in the log-determinant.
    """

    standardise: bool = True
    affine: bool = False
    counted: bool = False


NORMS: Mapping[str, Norm] = MappingProxyType(
    {
        "affine": Norm(affine=True),
        "counted": Norm(affine=True, counted=True),
        "plain": Norm(),
        "none": Norm(standardise=False),
    }
)
"""Name -> standardisation of a level's map [C,H,W] as a whole.

"affine", the official one, multiplies and shifts every value by trained numbers that the likelihood does not
count: shrinking them raises it at no cost, so the objective has no minimum, and users report unstable training.
"counted" adds their log-determinant, "plain" has no trained numbers, "none" leaves the features as they are. The
likelihood is that of the standardised map in all cases: standardising an image by its own mean and variance is
not invertible and has no density.
"""


class LevelFlow(nn.Module):
    """Standardisation and flow of one level: features [B,C,h,w] -> (u [B,C,h,w], log_det [B])."""

    def __init__(self, config: FastflowConfig, scale: int, *, channels: int) -> None:
        super().__init__()
        side = config.size // 2 ** (scale + 1)
        kernels, self.counted = KERNELS[config.kernels], NORMS[config.norm].counted
        self.norm: nn.Module = nn.Identity()
        if NORMS[config.norm].standardise:
            self.norm = nn.LayerNorm([channels, side, side], elementwise_affine=NORMS[config.norm].affine)
        self.flow = AllInOneFlow(
            channels,
            [
                convolutions(kernel=kernels[k % len(kernels)], hidden_ratio=config.hidden_ratio)
                for k in range(config.blocks)
            ],
            clamp=config.clamp,
            seed=config.seed * 4 + scale,
        )

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B,C,h,w] of the size it was built for -> (u, log_det), natural logarithm, per image."""
        u, log_det = self.flow(self.norm(features))
        if self.counted:
            log_det = log_det + self.norm.get_parameter("weight").abs().log().sum()
        return u, log_det


def nats(u: Tensor, log_det: Tensor) -> Tensor:
    """Negative log-likelihood [B] of a level in nats, without the constant D/2 ln(2 pi); Yu et al., Eq. 3."""
    return 0.5 * u.square().flatten(1).sum(1) - log_det


class Fastflow:
    """A flow of convolutional couplings per pyramid level; abnormal is where its latents are large.

    Higher scores = more anomalous. The map is 1 - mean_k exp(-0.5 mean_c u_k^2), upsampled bilinearly, in 0..1;
    the image score comes from its maximum m. The loss is the sum over levels of the mean negative log-likelihood of an
    image in nats, not divided by the dimensions.

    Presets. "paper": the published constants for ResNet18 and the official standardisation. "default" fits
    some 90 images of 256 px in 3 to 5 minutes on one thread (`fit_seconds` in benchmarks/results): 28 epochs instead
    of 500, in batches of 4 for as many steps as possible (700 instead of 2,000) at a rate that falls along a cosine,
    since the last epoch counts; scales 2 and 3 only, for two thirds of the flows' multiplications; 3x3 and 1x1
    convolutions in turn, as published for larger backbones, for five ninths of those; and no trained factors in the
    standardisation (see `NORMS`). "quick" takes 8 epochs of that.

    Deviation: the published map is the mean of -exp; ours is that plus 1. Deviation: the image score m is
    written as -log(1 - m), in nats: the same order of images, but no ties where exp is below float32's resolution.
    Deviation: the last epoch counts, not the best on the test set.
    """

    info: ClassVar[DetectorInfo] = DetectorInfo(
        name="fastflow",
        summary="convolutional flow on each level's whole map",
        reference="Yu et al., FastFlow, 2021, arXiv:2111.07677",
    )
    Config = FastflowConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "training": {
                "epochs": 500,
                "batch_size": 32,
                "learning_rate": 1e-3,
                "weight_decay": 1e-5,
                "clip_norm": None,
            }
        },
        "default": {
            "scales": [2, 3],
            "kernels": "3-1",
            "norm": "plain",
            "training": {
                "epochs": 28,
                "batch_size": 4,
                "learning_rate": 1e-3,
                "weight_decay": 1e-5,
                "clip_norm": None,
                "schedule": "cosine",
            },
        },
        "quick": {
            "scales": [2, 3],
            "kernels": "3-1",
            "norm": "plain",
            "training": {
                "epochs": 8,
                "batch_size": 4,
                "learning_rate": 1e-3,
                "weight_decay": 1e-5,
                "clip_norm": None,
                "schedule": "cosine",
            },
        },
    }

    def __init__(self, config: FastflowConfig, backbone: Mapping[str, Tensor] | None) -> None:
        self.config = config
        self.pyramid = Pyramid(backbone, seed=config.seed, backbone=config.backbone)
        channels = BACKBONES[config.backbone]
        self.flows = nn.ModuleList(LevelFlow(config, k, channels=channels[k - 1]) for k in config.scales)
        self.module = nn.ModuleDict({"pyramid": self.pyramid, "flows": self.flows})
        self.fitted = False

    def prepare(self, images: Tensor, *, original_size: Tensor | None = None) -> dict[str, Tensor]:
        """Images [B,3,S,S] -> the chosen levels, {"f1": [B,64,S/4,S/4], ...}."""
        check_images(images, size=self.config.size)
        with torch.no_grad():
            pyramid = self.pyramid(images, depth=max(self.config.scales))
            return {f"f{k}": pyramid[k - 1] for k in self.config.scales}

    def steps(self, prepared: dict[str, Tensor], rng: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """One step for all levels together."""
        self.fitted = True
        latents = [flow(features) for flow, features in self._levels(prepared)]
        total = torch.stack([nats(u, log_det).mean() for u, log_det in latents]).sum()
        yield {"total": total, "nats_per_dim": _per_dim(total, sum(u[0].numel() for u, _ in latents))}

    def param_groups(self) -> list[dict[str, Any]]:
        """All trainable parameters in one group."""
        return [{"params": [p for p in self.module.parameters() if p.requires_grad]}]

    def monitor(self, prepared: dict[str, Tensor]) -> dict[str, float]:
        """Negative log-likelihood of the standardised features in nats per dimension, over all levels."""
        with evaluating(self.module):
            total, dimensions = torch.zeros((), dtype=torch.float64), 0
            for flow, features in self._levels(prepared):
                parts = [nats(*flow(images)) for images in in_parts(features, IMAGES_AT_ONCE)]
                total += exact(torch.cat(parts)).mean().cpu()
                dimensions += features[0].numel()
            return {"nats_per_dim": float(_per_dim(total, dimensions))}

    def score(self, images: Tensor, *, original_size: Tensor | None = None) -> Scores:
        """Scores of images [B,3,S,S]; higher = more anomalous. Raises NotFittedError, InputError."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        return self.score_prepared(self.prepare(images))

    def score_prepared(self, prepared: dict[str, Tensor]) -> Scores:
        """Scores from cached features, as the class docstring says."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        with evaluating(self.module):
            levels = [self._likeness(flow, features) for flow, features in self._levels(prepared)]
            likely = smooth(torch.stack(levels).mean(0), self.config.sigma)
            lowest = likely.amin(dim=(1, 2)).clamp_min(torch.finfo(torch.float64).tiny)
            maps, score, device = 1 - likely, -lowest.log(), next(iter(prepared.values())).device
            return Scores(maps.to(device, torch.float32), score.to(device, torch.float32))

    def parts(self) -> dict[str, nn.Module]:
        """Named parts for parameter counts."""
        flows = {f"flow{k}": flow for k, flow in zip(self.config.scales, self.flows, strict=True)}
        return {"encoder": self.pyramid, **flows}

    def state(self) -> dict[str, Tensor]:
        """All tensors, backbone included."""
        return {key: value.detach() for key, value in self.module.state_dict().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Fill from `state`. Raises ModelFileError on a missing, unknown or misshapen tensor."""
        check_state(state, self.module.state_dict(), name=self.info.name)
        self.module.load_state_dict(dict(state))
        self.fitted = True

    def _likeness(self, flow: nn.Module, features: Tensor) -> Tensor:
        """exp(-0.5 mean_c u^2) of one level, upsampled: float64 [B,S,S] in 0..1."""
        size = (self.config.size, self.config.size)
        parts = []
        for images in in_parts(features, IMAGES_AT_ONCE):
            likeness = exact(latent_log_likelihood(flow(images)[0], None)).exp()[:, None]
            parts.append(F.interpolate(likeness, size=size, mode="bilinear", align_corners=False)[:, 0])
        return torch.cat(parts)

    def _levels(self, prepared: Mapping[str, Tensor]) -> Iterator[tuple[nn.Module, Tensor]]:
        for k, flow in zip(self.config.scales, self.flows, strict=True):
            yield flow, prepared[f"f{k}"]


def _per_dim(total: Tensor, dimensions: int) -> Tensor:
    return total / dimensions + 0.5 * math.log(2 * math.pi)
