"""The affine design of egmf, its default: conditional affine flows on fused scales, fitted in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from umiad.config import TINY, DetectorConfig, nearest
from umiad.detectors.contract import DetectorInfo
from umiad.detectors.guards import check_fitted, check_images, check_state, evaluating
from umiad.errors import TrainingError
from umiad.memory import total_memory
from umiad.nn.affine import AffineFlow, TwinMoments, fibres_of
from umiad.nn.edge import EDGE_CHANNELS, EDGES, FineScales
from umiad.nn.encoder import BACKBONES, CHANNELS, Pyramid, grid
from umiad.nn.fibres import neighbourhood
from umiad.nn.precision import exact
from umiad.scoring import smooth_cells, top_mean
from umiad.types import Scores

DEPTH = 3
"""Layer 4 is neither run nor kept."""
ROUNDING = 1e-12
"""Variance between images, as a multiple of the features' mean square, that is float32 rounding and no variance."""
GUIDES: dict[str, tuple[type[nn.Module], int]] = {
    "fine": (FineScales, CHANNELS[0] + CHANNELS[1]),
    **{name: (part, EDGE_CHANNELS) for name, part in EDGES.items() if name != "none"},
}
"""Name -> what makes edge features of F1 and F2, and how many channels they have."""
TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "sqrt": torch.sqrt_,
    "identity": lambda features: features,
}
"""Name -> what is done to every feature, all >= 0, before they are averaged; may overwrite its argument."""
VOLUME = {"latent": 0.0, "full": 1.0}
"""Name of a likelihood -> how often the log-determinant counts in it."""


class AffineConfig(DetectorConfig):
    """Which parts are used, and how strongly covariances are held back.

    `edge`: what makes edge features of F1 and F2: "fine", "egm", "prewitt"; `aggregate`: "join" puts them beside F3,
    "ignore" leaves them out. `transform` of the features: "sqrt", "identity". `fusion`: "joint" = one density of
    both, "none" = they are independent. `views` whose log-likelihoods are added: "position" = each position
    for itself, "mirror" = given the same position of the mirrored image. `likelihood`: "latent" = -0.5 mean u^2, "full"
    adds the log-determinant, here a constant of each position. `prior`, `epsilon`, `rank`: see
    `umiad.nn.affine.AffineFlow`; `top_fraction` of the map's pixels makes the image score.
    """

    design: Literal["affine"] = "affine"
    edge: str = "fine"
    aggregate: Literal["join", "ignore"] = "join"
    transform: Literal["sqrt", "identity"] = "sqrt"
    fusion: Literal["joint", "none"] = "joint"
    views: tuple[Literal["position", "mirror"], ...] = Field(default=("position", "mirror"), min_length=1)
    likelihood: Literal["latent", "full"] = "latent"
    prior: float = Field(default=20.0, ge=0)
    epsilon: float = Field(default=0.1, gt=0)
    rank: int = Field(default=128, ge=1)
    top_fraction: float = Field(default=0.03, gt=0, le=1)
    sigma: float = Field(default=4.0, ge=0)

    @field_validator("backbone")
    @classmethod
    def _fitting_backbone(cls, value: str) -> str:
        if BACKBONES[value] != CHANNELS:
            fit = [name for name, channels in BACKBONES.items() if channels == CHANNELS and name != TINY]
            raise ValueError(f"the edge parts are made for {CHANNELS} channels: choose {' or '.join(fit)}")
        return value

    @field_validator("edge")
    @classmethod
    def _known_part(cls, value: str) -> str:
        if value not in GUIDES:
            raise ValueError(f"unknown part{nearest(value, list(GUIDES))}")
        return value

    @field_validator("views")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("every view counts once")
        return value


class AffineEGMF:
    """Affine flows on F3 and the edge features, one per view, their log-likelihoods added.

    Higher scores = more anomalous. At every cell of F3's grid the square roots of F3 (averaged over 3 x 3 cells), F2
    and F1 (averaged to that grid) make one fibre, so that fine and deep features have one joint density: ordered
    by scale it is a flow per scale, each given the deeper ones. Two views of it are
    taken: p(fibre), and p(fibre | fibre of the mirrored image), which knows what the other side of the body looks
    like. The anomaly map is minus the sum of both, in nats per dimension, bilinear to S x S and smoothed; the image
    score is the mean of its top 3 %, as in the paper, where likelihoods are multiplied over scales.

    Deviation: the paper's flows are stacks of couplings trained by gradient steps with a position code as
    condition; ours are affine, with statistics of their own at every position, and have their fit in closed form.
    Where couplings were put on top, they were at best level (docs/decisions/0005). EGM is untrained where it
    is chosen: no likelihood trains it well (see `umiad.nn.guidance`); F1 and F2 themselves do as well, but for brain
    MRI (docs/results.md, ingredient edges-egm). F4 does not take part. Fitting holds 0.8 GB of sums at 256 px,
    3.3 GB at 512 px and 13 GB at 1024 px, whatever the number of images; what the machine does not have is refused.
    """

    info: ClassVar[DetectorInfo] = DetectorInfo(
        name="egmf",
        summary="edge guidance into deep features, conditional flows, scales fused into one exact density",
        reference="UMIAD-EGMF, VCIBA 2026, doi:10.1186/s42492-026-00215-3; default: our affine flows",
        fidelity="own",
        closed_form=True,
        supports_resume=False,
    )
    Config = AffineConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"design": "affine"},
        "default": {"design": "affine"},
        "quick": {"design": "affine", "views": ["position"]},
    }

    def __init__(self, config: AffineConfig, backbone: Mapping[str, Tensor] | None) -> None:
        self.config = config
        self.pyramid = Pyramid(backbone, seed=config.seed, backbone=config.backbone, depth=DEPTH)
        part, channels = GUIDES[config.edge]
        self.edge: nn.Module = part(seed=config.seed).requires_grad_(False).eval()
        self._blocks = {"join": (CHANNELS[2], channels), "ignore": (CHANNELS[2],)}[config.aggregate]
        cells = (config.size // 2 ** (DEPTH + 1)) ** 2
        self.flows: dict[str, AffineFlow] = {
            view: AffineFlow(cells, sum(self._blocks), rank=config.rank, conditional=view == "mirror")
            for view in config.views
        }
        flows = nn.ModuleDict(dict(self.flows.items()))
        self.module = nn.ModuleDict({"pyramid": self.pyramid, "edge": self.edge, "flows": flows})
        self.fitted = False
        self._moments: TwinMoments | None = None

    def prepare(self, images: Tensor, *, original_size: Tensor | None = None) -> dict[str, Tensor]:
        """Images [B,3,S,S] -> "fibres" [B,P,C], P = (S/16)^2, and those of the mirror images, "twins"."""
        return {"fibres": self._fibres(images), "twins": self._fibres(images.flip(-1))}

    def steps(self, prepared: dict[str, Tensor], rng: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """Nothing to minimise."""
        return iter(())

    def param_groups(self) -> list[dict[str, Any]]:
        """No trainable parameters."""
        return []

    def monitor(self, prepared: dict[str, Tensor]) -> dict[str, float]:
        """Negative log-likelihood per dimension of each view, and their mean, in nats."""
        if not self.fitted:
            return {}
        with evaluating(self.module):
            found = self._log_likelihoods(prepared, likelihood="full")
            nats = {view: 0.5 * math.log(2 * math.pi) - float(each.mean()) for view, each in found.items()}
            return {
                "nats_per_dim": sum(nats.values()) / len(nats),
                **{f"nats_{k}": v for k, v in nats.items()},
            }

    def collect(self, prepared: dict[str, Tensor]) -> None:
        """Add one batch to the sums of every position. Raises TrainingError where memory cannot hold them."""
        fibres, twins = prepared["fibres"], prepared["twins"]
        if self._moments is None:
            _check_memory(fibres, size=self.config.size)
            joint = self.config.fusion == "joint"
            self._moments = TwinMoments(exact(fibres).mean(0), blocks=self._blocks, joint=joint)
        self._moments.add(fibres, twins)

    def finish(self, rng: torch.Generator) -> None:
        """Fit the flows. Raises TrainingError with fewer than 2 images, or all equal or mirror images of one."""
        moments, self._moments = self._moments, None
        images = moments.count // 2 if moments else 0
        if moments is None or images < 2:
            raise TrainingError(f"egmf needs at least 2 normal images, got {images}")
        own, cross = moments.shared()
        between = float(
            (own + cross).diagonal().mean()
        )  # images may be equal and yet differ from their mirror image
        if not between > ROUNDING * float(moments.mean().square().mean()):
            raise TrainingError(f"egmf needs normal images that differ, got {images} of equal features")
        for flow in self.flows.values():
            flow.fit(moments, prior=self.config.prior, epsilon=self.config.epsilon)
        self.fitted = True

    def score(self, images: Tensor, *, original_size: Tensor | None = None) -> Scores:
        """Scores of images [B,3,S,S]; higher = more anomalous. Raises NotFittedError, InputError."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        if "mirror" in self.flows:
            return self.score_prepared(self.prepare(images))
        return self.score_prepared({"fibres": self._fibres(images)})

    def score_prepared(self, prepared: dict[str, Tensor]) -> Scores:
        """Scores from cached features: minus the views' log-likelihoods, smoothed; image score = top 3 %."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        with evaluating(self.module):
            found = self._log_likelihoods(prepared, likelihood=self.config.likelihood)
            cells = -torch.stack(list(found.values())).sum(0)
            maps = smooth_cells(cells, self.config.size, self.config.sigma)
            return Scores(maps, top_mean(maps, self.config.top_fraction))

    def parts(self) -> dict[str, nn.Module]:
        """Named parts for parameter counts."""
        flows = {f"flow {view}": flow for view, flow in self.flows.items()}
        return {"encoder": self.pyramid, "edge": self.edge, **flows}

    def state(self) -> dict[str, Tensor]:
        """All tensors, backbone included."""
        return {key: value.contiguous() for key, value in self.module.state_dict().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Fill from `state`. Raises ModelFileError on a missing, unknown or misshapen tensor."""
        check_state(state, self.module.state_dict(), name=self.info.name)
        self.module.load_state_dict(dict(state))
        self.fitted = True

    def _fibres(self, images: Tensor) -> Tensor:
        """Images [B,3,S,S] -> the fibres of both scales on F3's grid, [B,P,C]."""
        check_images(images, size=self.config.size)
        transform = TRANSFORMS[self.config.transform]
        with torch.no_grad():
            f1, f2, f3 = self.pyramid(images, depth=DEPTH)
            found = [neighbourhood(transform(f3))]
            if len(self._blocks) > 1:
                edges = self.edge(transform(f1), transform(f2))
                found.append(F.adaptive_avg_pool2d(edges, grid(f3)))
            return torch.cat([fibres_of(each) for each in found], dim=2)

    def _log_likelihoods(self, prepared: Mapping[str, Tensor], *, likelihood: str) -> dict[str, Tensor]:
        """Per view and position, [B,h,w], in nats per dimension, without the constant."""
        fibres = prepared["fibres"]
        twins = prepared.get("twins", fibres)  # only the view "mirror" looks at them
        edge = self.config.size // 2 ** (DEPTH + 1)
        found = {}
        for view, flow in self.flows.items():
            per_dim = flow.log_det * (VOLUME[likelihood] / fibres.shape[2])
            values = per_dim - 0.5 * flow.mean_square(fibres, twins)
            found[view] = values.unflatten(1, (edge, edge))
        return found


def _check_memory(fibres: Tensor, *, size: int) -> None:
    needed, there = TwinMoments.bytes_needed(*fibres.shape[1:]), total_memory()
    if there is not None and needed > there:
        raise TrainingError(
            f"egmf at {size} px holds {needed / 1e9:.1f} GB of sums while it is fitted, and this machine has "
            f"{there / 1e9:.1f} GB: choose a smaller size"
        )
