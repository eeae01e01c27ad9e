"""The network design of egmf, the paper's: four conditional flows by gradient steps, multi-scale fusion."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from umiad.config import MAX_BLOCKS, TINY, DetectorConfig, nearest
from umiad.detectors.contract import DetectorInfo
from umiad.detectors.guards import check_fitted, check_images, check_state, evaluating
from umiad.nn.aggregate import AGGREGATES
from umiad.nn.edge import EDGES, sobel_target
from umiad.nn.encoder import BACKBONES, CHANNELS, Pyramid, grid, pool, pooled_size
from umiad.nn.fusion import FUSIONS
from umiad.nn.guidance import GUIDANCES
from umiad.nn.precision import exact
from umiad.scoring import LIKELIHOODS, combine, smooth
from umiad.types import Scores

PARTS: dict[str, Mapping[str, Any]] = {
    "edge": EDGES,
    "aggregate": AGGREGATES,
    "guidance": GUIDANCES,
    "fusion": FUSIONS,
    "likelihood": LIKELIHOODS,
}


class NetworkConfig(DetectorConfig):
    """Which part fills each slot, and the sizes of the flows.

    `edge`, `aggregate`, `guidance`, `fusion`: names from `umiad.nn`; `likelihood`: "latent" scores
    -0.5 mean u^2 (the paper), "full" adds the log-determinant of the position. `condition_channels` of the
    position encoding, `blocks` couplings per flow, `hidden_ratio` = C / hidden width of their subnets.
    """

    edge: str = "egm"
    aggregate: str = "eam"
    guidance: str = "stopgrad"
    fusion: str = "mff"
    likelihood: str = "latent"
    condition_channels: int = Field(default=64, ge=4, multiple_of=4)
    blocks: int = Field(default=8, ge=1, le=MAX_BLOCKS)
    hidden_ratio: int = Field(default=8, ge=1, le=64)
    clamp: float = Field(default=1.9, gt=0)
    edge_weight: float = Field(default=1.0, ge=0)
    top_fraction: float = Field(default=0.03, gt=0, le=1)

    @field_validator("backbone")
    @classmethod
    def _fitting_backbone(cls, value: str) -> str:
        if BACKBONES[value] != CHANNELS:
            fit = [name for name, channels in BACKBONES.items() if channels == CHANNELS and name != TINY]
            raise ValueError(f"EGM, EAM and MFF are made for {CHANNELS} channels: choose {' or '.join(fit)}")
        return value

    @field_validator(*PARTS)
    @classmethod
    def _known_part(cls, value: str, info: Any) -> str:
        if value not in PARTS[info.field_name]:
            raise ValueError(f"unknown part{nearest(value, list(PARTS[info.field_name]))}")
        return value


@dataclass(frozen=True, eq=False)
class Latents:
    """One forward pass: per scale u and y_f [B,C,h,w] and log_det [B,h,w]; `fusion_log_det` [B,h4,w4]."""

    us: tuple[Tensor, ...]
    ys: tuple[Tensor, ...]
    log_dets: tuple[Tensor, ...]
    fusion_log_det: Tensor
    f_edge: Tensor
    f_cat: Tensor
    f4_flow: Tensor


class EGMFNetwork(nn.Module):
    """The trainable network on frozen features, readable beside the paper's Figure 2."""

    edge: nn.Module
    guidance: Any  # any policy of `umiad.nn.guidance`
    fusion: nn.Module

    def __init__(self, config: NetworkConfig) -> None:
        # late, since FrEIA imports scipy.stats, which takes seconds
        from umiad.nn.flow import ConditionalFlow, position_encoding

        super().__init__()
        self.edge = EDGES[config.edge](seed=config.seed)
        aggregate = AGGREGATES[config.aggregate](seed=config.seed)
        self.guidance = GUIDANCES[config.guidance](self.edge, aggregate, seed=config.seed)
        extra = (0, 0, 0, self.guidance.condition_channels)
        self.flows = nn.ModuleList(
            ConditionalFlow(
                channels,
                condition_channels=config.condition_channels + extra[k],
                blocks=config.blocks,
                clamp=config.clamp,
                hidden=max(1, channels // config.hidden_ratio),
                seed=config.seed * 4 + k,
            )
            for k, channels in enumerate(CHANNELS)
        )
        self.fusion = FUSIONS[config.fusion](channels=CHANNELS, seed=config.seed)
        for k, (h, w) in enumerate(pooled_size(config.size)):
            encoding = position_encoding(config.condition_channels, h, w)[None]
            self.register_buffer(f"position{k + 1}", encoding, persistent=False)

    def forward(self, f1: Tensor, f2: Tensor, f3: Tensor, f4: Tensor) -> Latents:
        """Features F1..F4 [B,C_k,H_k,W_k] -> latents of all scales. Paper, Eq. 1-11 and Figure 2."""
        f_edge = self.edge(f1, f2)  # EGM, Eq. 1-5
        guided = self.guidance(f_edge, f4)  # EAM, Eq. 6-8
        zs = [pool(f) for f in (f1, f2, f3, guided.f4_flow)]  # pyramid pooling
        cs = [self.get_buffer(f"position{k}").expand(f1.shape[0], -1, -1, -1) for k in (1, 2, 3, 4)]
        cs[3] = torch.cat([cs[3], pool(guided.condition)], dim=1)
        us, log_dets = zip(*(flow(z, c) for flow, z, c in zip(self.flows, zs, cs, strict=True)), strict=True)
        ys, fusion_log_det = self.fusion(us)  # MFF, Eq. 9
        return Latents(us, ys, log_dets, fusion_log_det, f_edge, guided.f_cat, guided.f4_flow)


def nats_per_dim(latents: Latents) -> Tensor:
    """Negative log-likelihood per dimension in nats, [B]; the exact density of y_f under N(0, I).

    Paper, Eq. 12. Deviation: the paper's loss has no log-determinant of the fusion and is unbounded below
    without it; ours counts the flows' and the fusion's, and the constant 0.5 ln(2 pi), so that numbers of
    different configurations compare.
    """
    dimensions = sum(y[0].numel() for y in latents.ys)
    energy = sum(0.5 * y.square().flatten(1).sum(1) for y in latents.ys)
    log_det = sum(j.flatten(1).sum(1) for j in latents.log_dets) + latents.fusion_log_det.flatten(1).sum(1)
    return (energy - log_det) / dimensions + 0.5 * math.log(2 * math.pi)


def _with_fusion_share(latents: Latents) -> Iterator[tuple[Tensor, Tensor]]:
    """Each scale's y_f with its log_det, the fusion's spread evenly over the dimensions of a coarse cell."""
    cells = latents.fusion_log_det[0].numel()
    per_dim = latents.fusion_log_det / (sum(y[0].numel() for y in latents.ys) / cells)
    for y, log_det in zip(latents.ys, latents.log_dets, strict=True):
        share = nn.functional.interpolate(per_dim[:, None], size=y.shape[-2:], mode="nearest")[:, 0]
        yield y, log_det + share * y.shape[1]


class NetworkEGMF:
    """The detector: frozen ResNet18 pyramid, `EGMFNetwork`, and the paper's scoring.

    Higher scores = more anomalous. The anomaly map is sum_k (1 - exp(l_k)) over scales, the image score the
    mean of the top 3 % of 1 - exp(sum_k l_k), in nats (see `umiad.scoring.combine`). Deviations from the paper are
    named in the parts (`umiad.nn.edge`, `aggregate`, `guidance`, `flow`, `fusion`) and in `nats_per_dim`.
    """

    info: ClassVar[DetectorInfo] = DetectorInfo(
        name="egmf",
        summary="edge guidance, conditional flows per scale, multi-scale flow fusion",
        reference="UMIAD-EGMF, VCIBA 2026, doi:10.1186/s42492-026-00215-3",
    )

    Config = NetworkConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {},
        "ablation": {
            "training": {"epochs": 15, "batch_size": 16, "learning_rate": 1e-3, "schedule": "cosine"}
        },
        "default": {},
        "quick": {"training": {"epochs": 10, "batch_size": 8, "learning_rate": 5e-4}},
    }

    def __init__(self, config: NetworkConfig, backbone: Mapping[str, Tensor] | None) -> None:
        self.config = config
        self.pyramid = Pyramid(backbone, seed=config.seed, backbone=config.backbone)
        self.network = EGMFNetwork(config)
        self.module = nn.ModuleDict({"pyramid": self.pyramid, "network": self.network})
        self.fitted = False

    def prepare(self, images: Tensor, *, original_size: Tensor | None = None) -> dict[str, Tensor]:
        """Images [B,3,S,S] -> F1..F4 and the Sobel edges [B,1,S/8,S/8] of the grey image."""
        check_images(images, size=self.config.size)
        with torch.no_grad():
            f1, f2, f3, f4 = self.pyramid(images)
            edges = sobel_target(images.mean(1, keepdim=True), grid(f2))
        return {"f1": f1, "f2": f2, "f3": f3, "f4": f4, "edges": edges}

    def steps(self, prepared: dict[str, Tensor], rng: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """One step: the negative log-likelihood per dimension plus the loss of the edge heads."""
        self.fitted = True
        latents = self._latents(prepared)
        likelihood = nats_per_dim(latents).mean()
        edge = self.network.guidance.loss(latents.f_edge, latents.f_cat, prepared["edges"])
        total = likelihood + self.config.edge_weight * edge
        yield {"total": total, "nats_per_dim": likelihood, "edge_loss": edge}

    def param_groups(self) -> list[dict[str, Any]]:
        """All trainable parameters in one group."""
        return [{"params": [p for p in self.module.parameters() if p.requires_grad]}]

    def monitor(self, prepared: dict[str, Tensor]) -> dict[str, float]:
        """Held-out likelihood and the collapse monitors of method section 7.

        `var_ratio` = var(F_agg) / var(F4) and `min_eigenvalue` of the channel covariance of F_agg fall
        towards 0 when EGM and EAM collapse; `var_y` far above `var_yf` means that the fusion inflates.
        """
        with evaluating(self.module):
            latents = self._latents(prepared)
            fibres = exact(latents.f4_flow).movedim(1, -1).flatten(0, -2)
            return {
                "nats_per_dim": float(nats_per_dim(latents).mean()),
                "var_ratio": float(fibres.var() / exact(prepared["f4"]).var().clamp_min(1e-12)),
                "min_eigenvalue": float(torch.linalg.eigvalsh(torch.cov(fibres.T)).min()),
                "var_y": float(torch.stack([u.var() for u in latents.us]).mean()),
                "var_yf": float(torch.stack([y.var() for y in latents.ys]).mean()),
            }

    def score(self, images: Tensor, *, original_size: Tensor | None = None) -> Scores:
        """Scores of images [B,3,S,S]; higher = more anomalous. Raises NotFittedError, InputError."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        return self.score_prepared(self.prepare(images))

    def score_prepared(self, prepared: dict[str, Tensor]) -> Scores:
        """Scores from cached features. Paper, section "Anomaly scoring"; likelihood as configured."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        with evaluating(self.module):
            likelihood = LIKELIHOODS[self.config.likelihood]
            levels = [likelihood(y, j) for y, j in _with_fusion_share(self._latents(prepared))]
            scores = combine(levels, self.config.size, top_fraction=self.config.top_fraction)
            return Scores(smooth(scores.anomaly_map, self.config.sigma), scores.image_score)

    def parts(self) -> dict[str, nn.Module]:
        """Named parts for parameter counts."""
        flows = {f"flow{k}": flow for k, flow in enumerate(self.network.flows, start=1)}
        return {
            "encoder": self.pyramid,
            "edge": self.network.edge,
            "aggregate and guidance": self.network.guidance,
            **flows,
            "fusion": self.network.fusion,
        }

    def state(self) -> dict[str, Tensor]:
        """All tensors, backbone included."""
        return {key: value.detach() for key, value in self.module.state_dict().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Fill from `state`. Raises ModelFileError on a missing, unknown or misshapen tensor."""
        check_state(state, self.module.state_dict(), name=self.info.name)
        self.module.load_state_dict(dict(state))
        self.fitted = True

    def _latents(self, prepared: Mapping[str, Tensor]) -> Latents:
        latents: Latents = self.network(*(prepared[key] for key in ("f1", "f2", "f3", "f4")))
        return latents
