"""MSFlow (Zhou et al., 2024): a conditional flow per level, then one flow over all levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from FrEIA.modules import PermuteRandom
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from umiad.config import DetectorConfig, nearest
from umiad.detectors.contract import DetectorInfo
from umiad.detectors.guards import check_fitted, check_images, check_state, evaluating
from umiad.nn.coupling import AllInOneFlow
from umiad.nn.encoder import Pyramid, grid, pool, pooled_size, seeded
from umiad.nn.flow import position_encoding
from umiad.nn.fusion import CouplingFusion, atan_bound, cell_mean
from umiad.nn.latents import Latents, energy, nats_per_dim
from umiad.nn.precision import exact
from umiad.scoring import latent_log_likelihood, smooth
from umiad.types import Scores

LEVELS = 3
"""The flows work on F1, F2 and F3."""

PUBLISHED = {
    "epochs": 100,
    "batch_size": 8,
    "learning_rate": 1e-4,
    "clip_norm": 2.0,
    "schedule": "steps",
    "warmup_epochs": 12,
}
"""Training of the publication: 25 meta epochs of 4, of which 3 warm up."""

Count = Annotated[int, Field(ge=1)]
Top = Callable[[Tensor, float], Tensor]
"""From values [B,H,W] and their largest possible value to what counts as entirely normal, [B,1,1]."""


def image_top(values: Tensor, largest: float) -> Tensor:
    """Each image's own maximum: its most normal position."""
    del largest
    return values.amax(dim=(1, 2), keepdim=True)


def possible_top(values: Tensor, largest: float) -> Tensor:
    """The largest value there can be, the same for every image."""
    return values.new_full((values.shape[0], 1, 1), largest)


TOPS: dict[str, Top] = {"image": image_top, "none": possible_top}


def additive(levels: Sequence[Tensor], size: int, top: Top) -> Tensor:
    """Log-likelihoods l_k [B,h_k,w_k] <= 0 -> map [B,size,size]: top(p) - p, p = sum_k up(exp(l_k - top(l_k)))."""
    p = torch.stack([_up(torch.exp(each - top(each, 0.0)), size) for each in levels]).sum(0)
    return top(p, float(len(levels))) - p


def multiplicative(levels: Sequence[Tensor], size: int, top: Top) -> Tensor:
    """Log-likelihoods l_k [B,h_k,w_k] <= 0 -> map [B,size,size] in nats, top(l) - l with l = sum_k up(l_k)."""
    total = torch.stack([_up(each, size) for each in levels]).sum(0)
    return top(total, 0.0) - total


MAPS: dict[str, Callable[[Sequence[Tensor], int, Top], Tensor]] = {"add": additive, "mul": multiplicative}


def top_nats(nats: Tensor, fraction: float) -> Tensor:
    """-log(1 - s), s the mean of 1 - exp(-x) over the top round(fraction * H * W) values x of [B,H,W] -> [B]."""
    values = nats.flatten(1)
    count = max(1, round(fraction * values.shape[1]))
    return math.log(count) - (-values.topk(count, dim=1).values).logsumexp(dim=1)


def _up(maps: Tensor, size: int) -> Tensor:
    return F.interpolate(maps[:, None], size=(size, size), mode="bilinear", align_corners=True)[:, 0]


class MSFlowConfig(DetectorConfig):
    """Sizes of the flows, and how maps are made.

    `blocks` couplings on F1, F2, F3, `condition_channels` of the position encoding, `clamp` of the log-scales.
    `map`: "add" or "mul" over the levels; `normalise`: "image" measures every position against the most normal
    one of its image, "none" against the highest likelihood there can be. `top_fraction` of the pixels of the
    multiplied map make the image score.
    """

    blocks: tuple[Count, Count, Count] = (2, 5, 8)
    condition_channels: int = Field(default=64, ge=4, multiple_of=4)
    clamp: float = Field(default=1.9, gt=0)
    map: str = "add"
    normalise: str = "image"
    top_fraction: float = Field(default=0.03, gt=0, le=1)

    @field_validator("map", "normalise")
    @classmethod
    def _known(cls, value: str, info: Any) -> str:
        known = {"map": list(MAPS), "normalise": list(TOPS)}[info.field_name]
        if value not in known:
            raise ValueError(f"unknown name{nearest(value, known)}")
        return value


def normalised_convolutions(inputs: int, outputs: int) -> nn.Module:
    """The subnet of a coupling: conv 3x3, normalisation over channels and cells, ReLU, conv 3x3.

    Deviation: the published LayerNorm has a weight per channel and cell, which ties a model to one grid; ours
    is GroupNorm with one group, the same normalisation with a weight per channel.
    """
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, padding=1),
        nn.GroupNorm(1, inputs),
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, 3, padding=1),
    )


class FusionNet(nn.Module):
    """Passive halves [B,P_k,h_k,w_k] of all levels -> raw log-scale and shift [B,2*A_k,h_k,w_k] of the active.

    Mean over the cells of the coarsest grid, conv 3x3 to a quarter, normalisation, ReLU, conv 3x3 back, ReLU,
    bilinear (align_corners=True) to each level's grid, the half itself added, conv 3x3.
    Deviation: GroupNorm with one group for LayerNorm; the last convolutions are zero at first.
    """

    def __init__(self, passive: Sequence[int], active: Sequence[int]) -> None:
        super().__init__()
        self.passive = list(passive)
        total = sum(passive)
        middle = max(1, total // 4)
        self.mix = nn.Sequential(
            nn.Conv2d(total, middle, 3, padding=1),
            nn.GroupNorm(1, middle),
            nn.ReLU(),
            nn.Conv2d(middle, total, 3, padding=1),
            nn.ReLU(),
        )
        self.last = nn.ModuleList(
            nn.Conv2d(p, 2 * a, 3, padding=1) for p, a in zip(passive, active, strict=True)
        )
        for convolution in self.last:
            nn.init.zeros_(convolution.get_parameter("weight"))
            nn.init.zeros_(convolution.get_parameter("bias"))

    def forward(self, passive: list[Tensor]) -> list[Tensor]:
        """Coefficients of every level, finest first."""
        pooled = torch.cat([cell_mean(each, grid(passive[-1])) for each in passive], dim=1)
        mixed = self.mix(pooled).split(self.passive, dim=1)
        return [
            last(half + F.interpolate(part, size=grid(half), mode="bilinear", align_corners=True))
            for last, half, part in zip(self.last, passive, mixed, strict=True)
        ]


class FusionFlow(nn.Module):
    """A random permutation of the channels per level, then one two-sided affine coupling over all levels.

    Deviation: the published one also cuts its outputs off at +-1e6, beyond which no inverse exists.
    """

    def __init__(self, channels: Sequence[int], *, clamp: float, seed: int) -> None:
        super().__init__()
        with seeded(seed):
            self.permutations = nn.ModuleList(
                PermuteRandom([(count, 1, 1)], seed=(seed * LEVELS + k) % 2**32)
                for k, count in enumerate(channels)
            )
        self.coupling = CouplingFusion(channels, seed=seed, clamp=clamp, net=FusionNet, bound=atan_bound)

    def forward(self, us: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
        """(u1, u2, u3) -> (ys of the same shapes, log_det [B])."""
        mixed = tuple(p((u,))[0][0] for p, u in zip(self.permutations, us, strict=True))
        ys, log_det = self.coupling(mixed)
        return ys, log_det.flatten(1).sum(1)

    def inverse(self, ys: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The latents that `forward` maps to `ys`."""
        mixed = self.coupling.inverse(ys)
        return tuple(p((m,), rev=True)[0][0] for p, m in zip(self.permutations, mixed, strict=True))


class MSFlowNetwork(nn.Module):
    """The flows: pooled features z1, z2, z3 [B,C_k,h_k,w_k], finest first, of the given `channels` and `cells`."""

    flows: Any  # a ModuleList of AllInOneFlow

    def __init__(
        self, config: MSFlowConfig, *, channels: Sequence[int], cells: Sequence[tuple[int, int]]
    ) -> None:
        super().__init__()
        self.flows = nn.ModuleList(
            AllInOneFlow(
                count,
                [normalised_convolutions] * blocks,
                condition_channels=config.condition_channels,
                clamp=config.clamp,
                seed=config.seed * (LEVELS + 1) + k,
            )
            for k, (count, blocks) in enumerate(zip(channels, config.blocks, strict=True))
        )
        self.fusion = FusionFlow(channels, clamp=config.clamp, seed=config.seed * (LEVELS + 1) + LEVELS)
        for k, (h, w) in enumerate(cells, start=1):
            encoding = position_encoding(config.condition_channels, h, w)[None]
            self.register_buffer(f"position{k}", encoding, persistent=False)

    def forward(self, zs: Sequence[Tensor]) -> Latents:
        """Features (z1, z2, z3) to latents, with the exact log-determinant of flows and fusion."""
        us, log_dets = zip(
            *(flow(z, c) for flow, z, c in zip(self.flows, zs, self._conditions(zs), strict=True)),
            strict=True,
        )
        ys, fusion_log_det = self.fusion(us)
        return Latents(ys, torch.stack(log_dets).sum(0) + fusion_log_det)

    def inverse(self, ys: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The features that `forward` maps to `ys`."""
        us, conditions = self.fusion.inverse(ys), self._conditions(ys)
        return tuple(flow.inverse(u, c) for flow, u, c in zip(self.flows, us, conditions, strict=True))

    def _conditions(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [
            self.get_buffer(f"position{k}").expand(each.shape[0], -1, -1, -1)
            for k, each in enumerate(maps, start=1)
        ]


class MSFlow:
    """Frozen ResNet, three conditional flows and a fusion flow; scores by the latents alone.

    Higher scores = more anomalous. The map adds (or multiplies) exp(-0.5 mean_c u^2) over the levels and turns
    it round; the image score comes from the top 3 % of the multiplied map.

    Presets: "paper" = the published training (100 epochs in batches of 8, 1e-4 falling by 0.33 twice, 12 epochs
    of warm-up, norm of the undivided loss's gradient at most 2). "default" stops after 34 epochs with 4 of
    warm-up and keeps everything else, loss and clipping included: 3 to 5 minutes for some 90 images on one thread
    (`fit_seconds` in benchmarks/results). "quick" takes 12 epochs with 1 of warm-up at 3e-4. Gradients of the
    undivided loss are far longer than 2: the limit gives all of them that length, so that every batch counts alike.

    Deviation: 256 pixels instead of 512, and ResNet18 by default instead of WideResNet50.
    Deviation: the image score s is returned as -log(1 - s) in nats, and so is the map "mul", pixel by pixel: the
    order is the same, but s reaches 1.0 in float32 some 17 nats below the most normal position, and then very
    abnormal images would tie. The map "add" keeps the published form.
    Deviation: one map serves all figures, where the publication takes the added one for AUROC and the multiplied
    one for PRO; and the last epoch counts, never the best one on test images.
    """

    info: ClassVar[DetectorInfo] = DetectorInfo(
        name="msflow",
        summary="conditional flows per level and a fusion flow over all levels",
        reference="Zhou et al., MSFlow, TNNLS 2024, arXiv:2308.15300",
    )
    Config = MSFlowConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"training": PUBLISHED},
        "default": {"training": {**PUBLISHED, "epochs": 34, "warmup_epochs": 4}},
        "quick": {"training": {**PUBLISHED, "epochs": 12, "warmup_epochs": 1, "learning_rate": 3e-4}},
    }

    def __init__(self, config: MSFlowConfig, backbone: Mapping[str, Tensor] | None) -> None:
        self.config = config
        self.pyramid = Pyramid(backbone, seed=config.seed, backbone=config.backbone)
        self.network = MSFlowNetwork(
            config, channels=self.pyramid.channels[:LEVELS], cells=pooled_size(config.size)[:LEVELS]
        )
        self.module = nn.ModuleDict({"pyramid": self.pyramid, "network": self.network})
        self.fitted = False

    def prepare(self, images: Tensor, *, original_size: Tensor | None = None) -> dict[str, Tensor]:
        """Images [B,3,S,S] -> pooled features z1, z2, z3: [B,C_k,h_k,w_k], at 256 px on 32, 16 and 8 cells."""
        check_images(images, size=self.config.size)
        with torch.no_grad():
            pyramid = self.pyramid(images, depth=LEVELS)
            return {f"z{k}": pool(features) for k, features in enumerate(pyramid, start=1)}

    def steps(self, prepared: dict[str, Tensor], rng: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """One step: the mean over images of 0.5 sum u^2 - log_det, not divided by the dimensions."""
        self.fitted = True
        latents = self._latents(prepared)
        yield {"total": energy(latents).mean(), "nats_per_dim": nats_per_dim(latents).mean()}

    def param_groups(self) -> list[dict[str, Any]]:
        """All trainable parameters in one group."""
        return [{"params": [p for p in self.module.parameters() if p.requires_grad]}]

    def monitor(self, prepared: dict[str, Tensor]) -> dict[str, float]:
        """Negative log-likelihood of the pooled features, in nats per dimension."""
        with evaluating(self.module):
            return {"nats_per_dim": float(nats_per_dim(self._latents(prepared)).mean())}

    def score(self, images: Tensor, *, original_size: Tensor | None = None) -> Scores:
        """Scores of images [B,3,S,S]; higher = more anomalous. Raises NotFittedError, InputError."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        return self.score_prepared(self.prepare(images))

    def score_prepared(self, prepared: dict[str, Tensor]) -> Scores:
        """Scores from cached features, computed in float64; the image score is that of the unsmoothed map."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        config, top = self.config, TOPS[self.config.normalise]
        with evaluating(self.module):
            us = self._latents(prepared).us
            levels = [exact(latent_log_likelihood(u, None)) for u in us]
            maps = MAPS[config.map](levels, config.size, top).float().to(us[0].device)
            image_score = top_nats(multiplicative(levels, config.size, top), config.top_fraction)
            return Scores(smooth(maps, config.sigma), image_score.float().to(us[0].device))

    def parts(self) -> dict[str, nn.Module]:
        """Named parts for parameter counts."""
        flows = {f"flow{k}": flow for k, flow in enumerate(self.network.flows, start=1)}
        return {"encoder": self.pyramid, **flows, "fusion": self.network.fusion}

    def state(self) -> dict[str, Tensor]:
        """All tensors, backbone included."""
        return {key: value.detach() for key, value in self.module.state_dict().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Fill from `state`. Raises ModelFileError on a missing, unknown or misshapen tensor."""
        check_state(state, self.module.state_dict(), name=self.info.name)
        self.module.load_state_dict(dict(state))
        self.fitted = True

    def _latents(self, prepared: Mapping[str, Tensor]) -> Latents:
        latents: Latents = self.network([prepared[f"z{k}"] for k in range(1, LEVELS + 1)])
        return latents
