"""U-Flow (Tailanian et al., 2022): one flow shaped like a U, from the coarsest features to the finest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from umiad.config import MAX_BLOCKS, DetectorConfig, nearest
from umiad.detectors.contract import DetectorInfo
from umiad.detectors.guards import check_fitted, check_images, check_state, evaluating
from umiad.errors import ConfigError
from umiad.nn.coupling import AllInOneFlow, convolutions
from umiad.nn.encoder import Pyramid
from umiad.nn.latents import Latents, energy, nats_per_dim
from umiad.nn.precision import exact
from umiad.scoring import latent_log_likelihood, smooth
from umiad.types import Scores

LEVELS = 3
"""The flow works on F1, F2 and F3."""
STRIDES = (4, 8, 16)

PUBLISHED = {
    "epochs": 200,
    "batch_size": 8,
    "learning_rate": 1e-4,
    "weight_decay": 1e-5,
    "clip_norm": None,
    "schedule": "linear",
}
"""Training of the publication, whose rates run from 3e-5 to 1e-4; its batches are not known to us, 8 is ours."""


def affine_norm(shape: Sequence[int]) -> nn.Module:
    """LayerNorm over [C,H,W] with a trainable gain and offset for each of its values."""
    return nn.LayerNorm(list(shape))


def plain_norm(shape: Sequence[int]) -> nn.Module:
    """LayerNorm over [C,H,W], nothing trainable."""
    return nn.LayerNorm(list(shape), elementwise_affine=False)


def no_norm(shape: Sequence[int]) -> nn.Module:
    """Null object of the slot."""
    del shape
    return nn.Identity()


NORMS: dict[str, Callable[[Sequence[int]], nn.Module]] = {
    "affine": affine_norm,
    "plain": plain_norm,
    "none": no_norm,
}
"""What stands before the flow, by name; called with [C,H,W]."""


class UFlowConfig(DetectorConfig):
    """Sizes of the flow, and what stands before it.

    `norm`: "affine" is the published trainable LayerNorm, "plain" the same without anything trainable, "none"
    leaves features as they are. `blocks` couplings per stage, 3x3 and 1x1 in turn; `hidden_ratio` times as many
    hidden as input channels in their subnets; `clamp` of the log-scales.
    """

    norm: str = "affine"
    blocks: int = Field(default=4, ge=1, le=MAX_BLOCKS)
    hidden_ratio: float = Field(default=1.0, gt=0)
    clamp: float = Field(default=2.0, gt=0)

    @field_validator("norm")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in NORMS:
            raise ValueError(f"unknown name{nearest(value, list(NORMS))}")
        return value


class UFlowNetwork(nn.Module):
    """The U: features f1, f2, f3 [B,C_k,h_k,w_k], finest first, to latents on the same grids.

    It starts at the coarsest level. After each stage but the finest, one part of the channels is output and the
    other, about a half and a multiple of 4, is spread over the next grid (four channels become a 2 x 2 square: a
    permutation) and joins that level's features. Every grid is twice as fine as the next.
    `channels` and `cells` (h, w) of the features are given finest first.

    Source: Tailanian et al., U-Flow, JMIV 2024, with its transformer features (MS-CaiT) left out.

    Raises:
        ConfigError: a stage has fewer than 8 channels, so that nothing would be passed on.
    """

    flows: Any  # a ModuleList of AllInOneFlow

    def __init__(
        self, config: UFlowConfig, *, channels: Sequence[int], cells: Sequence[tuple[int, int]]
    ) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.carried = carried_channels(channels)
        self.norms = nn.ModuleList(
            NORMS[config.norm]((count, *grid)) for count, grid in zip(channels, cells, strict=True)
        )
        subnets = [
            convolutions(kernel=kernel, hidden_ratio=config.hidden_ratio)
            for kernel in ((3, 1) * config.blocks)[: config.blocks]
        ]
        self.flows = nn.ModuleList(
            AllInOneFlow(count + more, subnets, clamp=config.clamp, seed=config.seed * LEVELS + k)
            for k, (count, more) in enumerate(zip(channels, self.carried, strict=True))
        )

    def forward(self, features: Sequence[Tensor]) -> Latents:
        """Features, finest first -> latents; `log_det` is the flow's, without that of the normalisation."""
        normalised = [norm(f) for norm, f in zip(self.norms, features, strict=True)]
        z, us, log_det = normalised[-1], [], normalised[-1].new_zeros(normalised[-1].shape[0])
        for k in range(len(self.flows) - 1, 0, -1):
            u, part = self.flows[k](z)
            passed = 4 * self.carried[k - 1]
            kept, on = u.split([u.shape[1] - passed, passed], dim=1)
            z = torch.cat([normalised[k - 1], F.pixel_shuffle(on, 2)], dim=1)
            us.append(kept)
            log_det = log_det + part
        u, part = self.flows[0](z)
        return Latents((u, *reversed(us)), log_det + part)

    def inverse(self, us: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The normalised features, finest first, that the flow maps to `us`."""
        features, u = [], us[0]
        for k in range(len(self.flows) - 1):
            z = self.flows[k].inverse(u)
            own, received = z.split([self.channels[k], self.carried[k]], dim=1)
            features.append(own)
            u = torch.cat([us[k + 1], F.pixel_unshuffle(received, 2)], dim=1)
        return (*features, self.flows[-1].inverse(u))


def carried_channels(channels: Sequence[int]) -> tuple[int, ...]:
    """Channels that each stage receives from the next coarser one, for `channels` finest first; the last is 0.

    (64, 128, 256) -> (20, 32, 0): 256 pass on 128, which become 32; 128 + 32 pass on 80, which become 20.
    Raises ConfigError where a stage has fewer than 8 channels.
    """
    carried = [0]
    for count in reversed(channels[1:]):
        width = count + carried[0]
        if width < 8:
            raise ConfigError(f"a stage of U-Flow has {width} channels, expected at least 8")
        carried.insert(0, width // 2 // 4)
    return tuple(carried)


def mean_likelihood(us: Sequence[Tensor], size: int) -> Tensor:
    """Latents u [B,D_k,h_k,w_k] -> mean_k up(exp(-0.5 mean_c u^2)), float64 [B,size,size] in 0..1."""
    levels = [torch.exp(exact(latent_log_likelihood(u, None)))[:, None] for u in us]
    up = [F.interpolate(p, size=(size, size), mode="bilinear", align_corners=False) for p in levels]
    return torch.cat(up, dim=1).mean(1)


class UFlow:
    """Frozen ResNet, normalisation, one U-shaped flow; scores by the latents alone.

    Higher scores = more anomalous. The map is 1 - mean_k exp(-0.5 mean_c u^2) over the levels, the image score
    its maximum.

    Presets: "paper" = the published training (at most 200 epochs, Adam with decay 1e-5, rate falling in a line to
    0.4 of 1e-4) behind the trainable LayerNorm. "default" stops after 25 epochs at five times the rate,
    which is more than half as far in all, and has nothing trainable before the flow: 4 to 6 minutes for some 90
    images on one thread (`fit_seconds` in benchmarks/results). "quick" takes 8 epochs of the same.

    The trainable LayerNorm is no part of the density: shrinking its gains raises the likelihood without end
    (`monitor` shows their size as `norm_gain`), which is why only "paper" has it.

    Deviation: 256 pixels and ResNet18; the published MS-CaiT features and 448 pixels are out of scope.
    Deviation: the last epoch counts; the publication stops early by the pixel AUROC on test images.
    Deviation: the image score s is returned as -log(1 - s) in nats, of the map before any smoothing: the order
    is the same, but in float32 s reaches 1.0 and then very abnormal images would tie.
    Left out: the log of the number of false alarms (NFA), its unsupervised threshold; see `umiad.calibration`.
    """

    info: ClassVar[DetectorInfo] = DetectorInfo(
        name="uflow",
        summary="one U-shaped flow from coarse to fine features",
        reference="Tailanian et al., U-Flow, JMIV 2024, arXiv:2211.12353",
    )
    Config = UFlowConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"training": PUBLISHED},
        "default": {"norm": "plain", "training": {**PUBLISHED, "epochs": 25, "learning_rate": 5e-4}},
        "quick": {"norm": "plain", "training": {**PUBLISHED, "epochs": 8, "learning_rate": 5e-4}},
    }

    def __init__(self, config: UFlowConfig, backbone: Mapping[str, Tensor] | None) -> None:
        self.config = config
        self.pyramid = Pyramid(backbone, seed=config.seed, backbone=config.backbone)
        self.network = UFlowNetwork(
            config,
            channels=self.pyramid.channels[:LEVELS],
            cells=[(config.size // stride, config.size // stride) for stride in STRIDES],
        )
        self.module = nn.ModuleDict({"pyramid": self.pyramid, "network": self.network})
        self.fitted = False

    def prepare(self, images: Tensor, *, original_size: Tensor | None = None) -> dict[str, Tensor]:
        """Images [B,3,S,S] -> F1, F2, F3: [B,C_k,h_k,w_k], at 256 px on 64, 32 and 16 cells."""
        check_images(images, size=self.config.size)
        with torch.no_grad():
            pyramid = self.pyramid(images, depth=LEVELS)
            return {f"f{k}": features for k, features in enumerate(pyramid, start=1)}

    def steps(self, prepared: dict[str, Tensor], rng: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """One step: the mean over images of 0.5 sum u^2 - log_det, not divided by the dimensions."""
        self.fitted = True
        latents = self._latents(prepared)
        yield {"total": energy(latents).mean(), "nats_per_dim": nats_per_dim(latents).mean()}

    def param_groups(self) -> list[dict[str, Any]]:
        """All trainable parameters in one group."""
        return [{"params": [p for p in self.module.parameters() if p.requires_grad]}]

    def monitor(self, prepared: dict[str, Tensor]) -> dict[str, float]:
        """Nats per dimension of what enters the flow, and `norm_gain`, the root mean square of its gains.

        The gain starts at 1 and falls towards 0 as the trainable LayerNorm collapses; other norms have none.
        """
        with evaluating(self.module):
            values = {"nats_per_dim": float(nats_per_dim(self._latents(prepared)).mean())}
            gains = [norm.get_parameter("weight").flatten() for norm in self.network.norms if _trains(norm)]
            if gains:
                values["norm_gain"] = float(exact(torch.cat(gains)).square().mean().sqrt())
            return values

    def score(self, images: Tensor, *, original_size: Tensor | None = None) -> Scores:
        """Scores of images [B,3,S,S]; higher = more anomalous. Raises NotFittedError, InputError."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        return self.score_prepared(self.prepare(images))

    def score_prepared(self, prepared: dict[str, Tensor]) -> Scores:
        """Scores from cached features: map 1 - p and image score -log(min p), p = `mean_likelihood`."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        with evaluating(self.module):
            us = self._latents(prepared).us
            p = mean_likelihood(us, self.config.size)
            lowest = p.amin(dim=(1, 2)).clamp_min(torch.finfo(p.dtype).tiny)  # at most 708 nats
            maps = smooth((1 - p).float().to(us[0].device), self.config.sigma)
            return Scores(maps, -lowest.log().float().to(us[0].device))

    def parts(self) -> dict[str, nn.Module]:
        """Named parts for parameter counts."""
        flows = {f"flow{k}": flow for k, flow in enumerate(self.network.flows, start=1)}
        return {"encoder": self.pyramid, "norms": self.network.norms, **flows}

    def state(self) -> dict[str, Tensor]:
        """All tensors, backbone included."""
        return {key: value.detach() for key, value in self.module.state_dict().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Fill from `state`. Raises ModelFileError on a missing, unknown or misshapen tensor."""
        check_state(state, self.module.state_dict(), name=self.info.name)
        self.module.load_state_dict(dict(state))
        self.fitted = True

    def _latents(self, prepared: Mapping[str, Tensor]) -> Latents:
        latents: Latents = self.network([prepared[f"f{k}"] for k in range(1, LEVELS + 1)])
        return latents


def _trains(norm: nn.Module) -> bool:
    return any(p.requires_grad for p in norm.parameters())
