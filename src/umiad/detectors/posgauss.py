"""A Gaussian per position on all channels, in low-rank form; its one free number chosen on normal images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from umiad.config import DetectorConfig
from umiad.detectors.contract import DetectorInfo
from umiad.detectors.guards import check_fitted, check_images, check_state, evaluating
from umiad.errors import ConfigError, TrainingError
from umiad.nn.affine import spectrum
from umiad.nn.encoder import BACKBONES, Pyramid
from umiad.nn.fibres import join, neighbourhood
from umiad.nn.precision import exact
from umiad.nn.products import bmm_by_eights
from umiad.scoring import maximum, smooth_cells
from umiad.types import Scores

FOLDS = 5
"""Folds of the cross-validation that chooses epsilon (fewer with fewer images)."""
PROBED = 64
"""At most this many positions take part in the cross-validation, on a regular sub-grid."""
PROBE_BYTES = 1 << 28
"""At most this many bytes of scatter matrices are kept for the cross-validation."""
POSITIONS_AT_ONCE = 64
"""Positions whose covariances are decomposed together: bounds the memory of `finish`."""
RESERVED_BYTES = 100_000
"""Left free for the header of the file and the few small tensors."""


class PosGaussConfig(DetectorConfig):
    """What the Gaussians are fitted on, and how large their file may be.

    `scales` of the pyramid, ascending; several are joined on the finest grid. `flips`: fit on the mirror images
    too. `epsilon`: what is added to the covariance's diagonal, as a multiple of the mean variance of the
    features; None = the best of `epsilons` on held-out normal images. `megabytes` (10^6 bytes): the saved state,
    backbone included, stays below; the rank of the covariances follows from it.
    """

    scales: tuple[Annotated[int, Field(ge=1, le=4)], ...] = Field(default=(3,), min_length=1)
    flips: bool = True
    epsilon: float | None = Field(default=None, gt=0)
    epsilons: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0), min_length=1
    )
    megabytes: float = Field(default=100.0, gt=0)
    sigma: float = Field(default=4.0, ge=0)

    @field_validator("scales")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError("scales must ascend without repetition")
        return value


class Gaussians(nn.Module):
    """The fitted Gaussians of P positions, Sigma = floor * I + U diag(l) U^T in factors.

    `mean` [P,C]; `floor` [P]; `whitener` [P,C,r] = U sqrt(1/floor - 1/(l + floor)), so that the squared
    Mahalanobis distance of x is |x|^2 / floor - |whitener^T x|^2 (matrix inversion lemma). `variance` [] is the
    mean variance of the features, `epsilon` [] the chosen multiple of it, and `nats_per_dim` [E] the
    held-out negative log-likelihood of each candidate (empty where epsilon was given).
    """

    mean: Tensor
    floor: Tensor
    whitener: Tensor
    variance: Tensor
    epsilon: Tensor
    nats_per_dim: Tensor

    def __init__(self, positions: int, channels: int, *, rank: int, candidates: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(positions, channels))
        self.register_buffer("floor", torch.ones(positions))
        self.register_buffer("whitener", torch.zeros(positions, channels, rank))
        self.register_buffer("variance", torch.zeros(()))
        self.register_buffer("epsilon", torch.zeros(()))
        self.register_buffer("nats_per_dim", torch.zeros(candidates))

    def squared_distance(self, fibres: Tensor) -> Tensor:
        """Squared Mahalanobis distances, [P,B,C] -> [P,B]."""
        centred = fibres - self.mean[:, None]
        inside = bmm_by_eights(centred, self.whitener).square().sum(-1)
        return (centred.square().sum(-1) / self.floor[:, None] - inside).clamp_min(0)


class Moments:
    """Sums over images of fibres and their outer products, for G groups of images and P positions.

    Everything is float64 and relative to `offset` [P,C], a point near the mean, so that nothing cancels.
    """

    def __init__(self, offset: Tensor, *, groups: int) -> None:
        positions, channels = offset.shape
        self.offset = offset
        self.count = [0] * groups
        self.total = offset.new_zeros(groups, positions, channels)
        self.outer = offset.new_zeros(groups, positions, channels, channels)

    def add(self, fibres: Tensor, *, group: int = 0) -> None:
        """Take fibres [P,B,C] into `group`."""
        centred = exact(fibres) - self.offset[:, None]
        self.count[group] += centred.shape[1]
        self.total[group] += centred.sum(1)
        self.outer[group].baddbmm_(centred.mT, centred)

    def gaussian(self, groups: list[int], part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Mean [p,C] (relative to `offset`) and covariance [p,C,C], normalised by n, of these groups together."""
        n = sum(self.count[group] for group in groups)
        mean, second = self.total[groups[0], part] / n, self.outer[groups[0], part] / n
        for group in groups[1:]:
            mean += self.total[group, part] / n
            second += self.outer[group, part] / n
        return mean, second.baddbmm_(mean[:, :, None], mean[:, None], alpha=-1)

    def variance(self, group: int) -> float:
        """Mean over positions and channels of the variance of `group`, normalised by n."""
        n = self.count[group]
        second = self.outer[group].diagonal(dim1=1, dim2=2) / n
        return float((second - (self.total[group] / n).square()).mean())


def held_out_nats(
    moments: Moments, *, train: list[int], held: list[int], epsilons: Tensor, rank: int
) -> Tensor:
    """Negative log-likelihood per dimension of the groups `held` under Gaussians of `train`: [E] in nats.

    Mean over positions and images, for every epsilon [E] on the diagonal of the covariance of rank r. Only
    second moments enter, so no image has to be kept.
    """
    mean, covariance = moments.gaussian(train)
    values, vectors, rest = spectrum(covariance, rank)
    other, about_mean = moments.gaussian(held)
    apart = other - mean
    about_mean += apart[:, :, None] * apart[:, None]
    inside = (vectors * (about_mean @ vectors)).sum(1)  # [P,r]
    outside = about_mean.diagonal(dim1=1, dim2=2).sum(-1) - inside.sum(-1)  # [P]
    channels = mean.shape[1]
    leading, floor = values + epsilons[:, None, None], rest + epsilons[:, None]  # [E,P,r], [E,P]
    energy = (inside / leading).sum(-1) + outside / floor
    log_det = leading.log().sum(-1) + (channels - rank) * floor.log()
    return 0.5 * ((energy + log_det) / channels + math.log(2 * math.pi)).mean(1)


def rank_within(megabytes: float, *, backbone_bytes: int, positions: int, channels: int) -> int:
    """The largest rank up to `channels` whose state stays below `megabytes` (10^6 bytes).

    Raises ConfigError when not even rank 1 fits; says how much would.
    """
    one = 4 * positions * channels  # bytes of the means, and of each further rank
    fixed = backbone_bytes + one + 4 * positions + RESERVED_BYTES
    rank = min(channels, math.floor((megabytes * 1e6 - fixed) / one))
    if rank < 1:
        least = math.ceil((fixed + one) / 1e6)
        raise ConfigError(
            f"megabytes {megabytes:g} is too little for {positions} positions of {channels} channels, "
            f"expected at least {least} (or fewer scales, or a smaller size)"
        )
    return rank


class PosGauss:
    """Mahalanobis distance of each position's features, all channels, to that position's Gaussian.

    Higher scores = more anomalous; the image score is the maximum of the smoothed map. Covariances are
    normalised by n (maximum likelihood) and kept in low-rank form, Sigma = floor * I + U diag(l) U^T. Their
    `epsilon` is relative to the mean variance of the features, since features of other weights, sizes or
    backbones are scaled differently; it is chosen by cross-validated likelihood of normal images, where an image
    and its mirror image are in one fold. No abnormal image is needed, and none is looked at.

    Against PaDiM, of which this is a form: all channels instead of random ones, 3 x 3 averages, mirror images,
    layer 3 alone on its own grid, and epsilon chosen instead of 0.01. Fitting holds 8 P C^2 bytes of sums
    whatever the number of images: 0.13 GB for layer 3 at 256 px (1.2 GB for layers 2 and 3), and up to 0.27 GB
    for the choice of epsilon.

    Presets: "paper" = the reference of the project's notes (the method has no paper of its own): layer 3, flips,
    epsilon chosen; at 256 px 100 MB hold rank 209, all that 105 images and their mirror images span. "default" is
    the same and cuts nothing: it fits some 90 images in 9 to 20 s on one thread, reading and backbone included
    (`fit_seconds` in benchmarks/results); time to score: docs/results.md, Table 4. "quick" leaves out the mirror
    images (half of the backbone's time) and keeps 60 MB, rank 56.

    Deviation: PaDiM draws channels at random and adds 0.01 to the diagonal; see above for what is here instead.
    """

    info: ClassVar[DetectorInfo] = DetectorInfo(
        name="posgauss",
        summary="one low-rank Gaussian per position on all channels of layer 3",
        reference="low-rank form of PaDiM's Gaussian (Defard et al., ICPR 2021, arXiv:2011.08785), ours",
        fidelity="own",
        closed_form=True,
        supports_resume=False,
    )
    Config = PosGaussConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {},
        "default": {},
        "quick": {"flips": False, "megabytes": 60.0},
    }

    def __init__(self, config: PosGaussConfig, backbone: Mapping[str, Tensor] | None) -> None:
        self.config = config
        self.pyramid = Pyramid(backbone, seed=config.seed, backbone=config.backbone)
        self._edge = config.size // 2 ** (config.scales[0] + 1)
        self._channels = sum(BACKBONES[config.backbone][k - 1] for k in config.scales)
        used = sum(t.numel() * t.element_size() for t in self.pyramid.state_dict().values())
        positions = self._edge**2
        self._rank = rank_within(
            config.megabytes, backbone_bytes=used, positions=positions, channels=self._channels
        )
        candidates = len(config.epsilons) if config.epsilon is None else 0
        self.gaussians = Gaussians(positions, self._channels, rank=self._rank, candidates=candidates)
        self.module = nn.ModuleDict({"pyramid": self.pyramid, "gaussians": self.gaussians})
        self.fitted = False
        self._moments: Moments | None = None
        self._folds: Moments | None = None
        self._images = 0

    def prepare(self, images: Tensor, *, original_size: Tensor | None = None) -> dict[str, Tensor]:
        """Images [B,3,S,S] -> {"features": [B,C,h,w]}, and with flips those of the mirror images, "mirrored"."""
        prepared = {"features": self._features(images)}
        if self.config.flips:
            prepared["mirrored"] = self._features(images.flip(-1))
        return prepared

    def steps(self, prepared: dict[str, Tensor], rng: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """Nothing to minimise."""
        return iter(())

    def param_groups(self) -> list[dict[str, Any]]:
        """No trainable parameters."""
        return []

    def monitor(self, prepared: dict[str, Tensor]) -> dict[str, float]:
        """Mean squared Mahalanobis distance per dimension, and the epsilon in use (relative)."""
        if not self.fitted:
            return {}
        with evaluating(self.module):
            squared = self._distance(prepared["features"]).square().mean()
            return {
                "distance_per_dim": float(squared) / self._channels,
                "epsilon": float(self.gaussians.epsilon),
            }

    def collect(self, prepared: dict[str, Tensor]) -> None:
        """Add one batch to the sums of every position; image i belongs to fold i modulo 5."""
        views = [fibres_of(prepared["features"])]
        if self.config.flips:
            views.append(fibres_of(prepared["mirrored"]))
        if self._moments is None:
            offset = exact(views[0]).mean(1)
            self._moments = Moments(offset, groups=1)
            if self.config.epsilon is None:
                self._folds = Moments(offset[self._probed(offset)], groups=2 * FOLDS)
        self._moments.add(torch.cat(views, dim=1))
        if self._folds is not None:
            self._collect_folds(views, self._folds)
        self._images += views[0].shape[1]

    def finish(self, rng: torch.Generator) -> None:
        """Turn the sums into Gaussians. Raises TrainingError with fewer than 2 images, or all equal ones."""
        if self._moments is None or self._images < 2:
            raise TrainingError(f"posgauss needs at least 2 normal images, got {self._images}")
        moments, gaussians = self._moments, self.gaussians
        variance = moments.variance(0)
        if not variance > 0:
            raise TrainingError(
                f"posgauss needs normal images that differ, got {self._images} of equal features"
            )
        relative = self._choose_epsilon(variance)
        gaussians.variance.fill_(variance)
        gaussians.epsilon.fill_(relative)
        epsilon = relative * variance
        for start in range(0, len(gaussians.mean), POSITIONS_AT_ONCE):
            part = slice(start, start + POSITIONS_AT_ONCE)
            mean, covariance = moments.gaussian([0], part)
            values, vectors, rest = spectrum(covariance, self._rank)
            floor = rest + epsilon
            scale = (1 / floor[:, None] - 1 / (values + epsilon)).clamp_min(0).sqrt()
            gaussians.mean[part] = (moments.offset[part] + mean).to(gaussians.mean)
            gaussians.floor[part] = floor.to(gaussians.floor)
            gaussians.whitener[part] = (vectors * scale[:, None]).to(gaussians.whitener)
        self._moments = self._folds = None
        self.fitted = True

    def score(self, images: Tensor, *, original_size: Tensor | None = None) -> Scores:
        """Scores of images [B,3,S,S]; higher = more anomalous. Raises NotFittedError, InputError."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        return self.score_prepared({"features": self._features(images)})

    def score_prepared(self, prepared: dict[str, Tensor]) -> Scores:
        """Scores from cached features: distances, bilinear to S x S, smoothed; image score = maximum."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        with evaluating(self.module):
            distances = self._distance(prepared["features"])
            maps = smooth_cells(distances, self.config.size, self.config.sigma)
            return Scores(maps, maximum(maps))

    def parts(self) -> dict[str, nn.Module]:
        """Named parts for parameter counts."""
        return {"encoder": self.pyramid, "gaussians": self.gaussians}

    def state(self) -> dict[str, Tensor]:
        """All tensors, backbone included."""
        return dict(self.module.state_dict())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Fill from `state`. Raises ModelFileError on a missing, unknown or misshapen tensor."""
        check_state(state, self.module.state_dict(), name=self.info.name)
        self.module.load_state_dict(dict(state))
        self.fitted = True

    def _features(self, images: Tensor) -> Tensor:
        """Images [B,3,S,S] -> averaged features of the chosen scales on the finest grid, [B,C,h,w]."""
        check_images(images, size=self.config.size)
        with torch.no_grad():
            pyramid = self.pyramid(images, depth=self.config.scales[-1])
            return join([neighbourhood(pyramid[k - 1]) for k in self.config.scales])

    def _distance(self, features: Tensor) -> Tensor:
        """Mahalanobis distance per position, [B,C,h,w] -> [B,h,w]."""
        squared = self.gaussians.squared_distance(fibres_of(features))
        return squared.T.sqrt().unflatten(1, features.shape[-2:])

    def _probed(self, like: Tensor) -> Tensor:
        """Numbers of the positions on which epsilon is chosen: a regular sub-grid."""
        most = min(PROBED, PROBE_BYTES // (2 * FOLDS * 8 * self._channels**2))
        step = math.ceil(self._edge / max(1, math.isqrt(most)))
        chosen = torch.arange(step // 2, self._edge, step, device=like.device)
        return (chosen[:, None] * self._edge + chosen).flatten()

    def _collect_folds(self, views: list[Tensor], folds: Moments) -> None:
        """Sums per fold at the probed positions; mirror images are kept apart, they are not held out."""
        probed = self._probed(views[0])
        fold = (torch.arange(views[0].shape[1], device=probed.device) + self._images) % FOLDS
        for number in fold.unique().tolist():
            for which, view in enumerate(views):
                folds.add(view[probed][:, fold == number], group=number + which * FOLDS)

    def _choose_epsilon(self, variance: float) -> float:
        """The configured epsilon, or the candidate under which held-out normal images are likeliest."""
        if self.config.epsilon is not None or self._folds is None:
            return float(self.config.epsilon or 0.0)
        folds = self._folds
        epsilons = variance * torch.tensor(self.config.epsilons, dtype=torch.float64)
        epsilons = epsilons.to(folds.total.device)
        filled = [number for number in range(FOLDS) if folds.count[number]]
        nats = torch.zeros_like(epsilons)
        for held in filled:
            others = [number + k for number in filled if number != held for k in (0, FOLDS)]
            train = [group for group in others if folds.count[group]]
            found = held_out_nats(folds, train=train, held=[held], epsilons=epsilons, rank=self._rank)
            nats += found * folds.count[held] / self._images
        self.gaussians.nats_per_dim.copy_(nats)
        return self.config.epsilons[int(nats.argmin())]


def fibres_of(features: Tensor) -> Tensor:
    """[B,C,h,w] -> the fibres of each position, [P,B,C]."""
    return features.flatten(2).permute(2, 0, 1)
