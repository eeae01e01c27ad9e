"""PatchCore (Roth et al., CVPR 2022): distance to the nearest fibre of a coreset of normal fibres."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from umiad.config import DetectorConfig
from umiad.detectors.contract import DetectorInfo
from umiad.detectors.guards import check_fitted, check_images, check_state, evaluating
from umiad.errors import ModelFileError, TrainingError
from umiad.nn.encoder import BACKBONES, Pyramid
from umiad.nn.fibres import join, neighbourhood
from umiad.nn.parts import in_parts
from umiad.nn.precision import exact
from umiad.scoring import smooth_cells
from umiad.types import Scores

SCALES = (2, 3)
"""Scales of the pyramid whose features are compared."""
PAIRS_AT_ONCE = 1 << 23
"""Pairs (fibre, bank item) compared together: a block of 32 MiB bounds the memory of scoring."""
BANK = "bank.fibres"
"""Name of the bank in the state; its length is the only shape that does not follow from the configuration."""


class PatchCoreConfig(DetectorConfig):
    """How large the bank is, and how it is chosen.

    At most `max_fibres` fibres, drawn uniformly, are kept while fitting; `fraction` of the kept ones, but at most
    `bank_limit`, become the bank. `projection`: dimensions of the random projection in which the choice is made
    (None = all). `neighbours` of the nearest bank item re-weight the image score (1 = no re-weighting).
    """

    fraction: float = Field(default=0.1, gt=0, le=1)
    max_fibres: int = Field(default=131_072, ge=1)
    bank_limit: int = Field(default=16_384, ge=1)
    projection: int | None = Field(default=128, ge=1)
    neighbours: int = Field(default=9, ge=1)
    sigma: float = Field(default=4.0, ge=0)


class Bank(nn.Module):
    """The coreset `fibres` [M,C]; M = 0 before fitting."""

    fibres: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("fibres", torch.zeros(0, channels))

    def nearest(self, fibres: Tensor) -> tuple[Tensor, Tensor]:
        """Distances [N] of fibres [N,C] to their nearest bank items, and the numbers [N] of those.

        The search maximises x.c - |c|^2 / 2 in blocks; the distance itself is then taken from the difference, so
        that it is 0 for a fibre in the bank and does not depend on the blocks.
        """
        half = self.fibres.square().sum(1) / 2
        rows = max(1, PAIRS_AT_ONCE // len(half))
        blocks = in_parts(fibres, rows)
        index = torch.cat([torch.addmm(half, block, self.fibres.T, beta=-1).argmax(1) for block in blocks])
        return (fibres - self.fibres[index]).square().sum(1).sqrt(), index

    def weight(self, fibres: Tensor, index: Tensor, *, neighbours: int) -> Tensor:
        """The paper's weights [B] in 0..1 of fibres [B,C] whose nearest bank items are `index` [B].

        1 - exp |x - m*| / sum over the b bank items m nearest to m* (itself among them) of exp |x - m|. A bank
        with fewer than b items takes all; with 1 there is nothing to compare with, and the weight is 1.
        """
        count = min(neighbours, len(self.fibres))
        if count == 1:
            return torch.ones(fibres.shape[0], dtype=fibres.dtype, device=fibres.device)
        items = self.fibres[index]
        half = self.fibres.square().sum(1) / 2
        around = torch.addmm(half, items, self.fibres.T, beta=-1).topk(count, dim=1).indices  # [B,b]
        nearest = exact(fibres - items).norm(dim=1)
        distances = exact(fibres[:, None] - self.fibres[around]).norm(dim=2)
        return -torch.expm1((nearest - distances.logsumexp(1)).clamp_max(0)).to(fibres)


class Reservoir:
    """A uniform sample of at most `limit` of all fibres seen, in one block of memory allocated at the start.

    Every fibre draws a random key; the `limit` smallest keys stay (Vitter's reservoir by random keys).
    """

    def __init__(self, limit: int, *, like: Tensor, seed: int) -> None:
        self.seen = self.kept = 0
        self._fibres = like.new_empty(limit, like.shape[1])
        self._keys = torch.empty(limit, dtype=torch.float64, device=like.device)
        self._rng = torch.Generator().manual_seed(seed)

    @property
    def fibres(self) -> Tensor:
        """The sample, [kept,C]."""
        return self._fibres[: self.kept]

    def add(self, fibres: Tensor) -> None:
        """Offer fibres [N,C]."""
        keys = torch.rand(len(fibres), dtype=torch.float64, generator=self._rng).to(self._keys)
        self.seen += len(fibres)
        free = min(len(fibres), len(self._keys) - self.kept)
        slots = slice(self.kept, self.kept + free)
        self._fibres[slots], self._keys[slots] = fibres[:free], keys[:free]
        self.kept += free
        if free < len(fibres):
            self._compete(fibres[free:], keys[free:])

    def _compete(self, fibres: Tensor, keys: Tensor) -> None:
        """The reservoir is full: new fibres with smaller keys take the places of those with the largest."""
        limit = len(self._keys)
        smallest = torch.cat([self._keys, keys]).topk(limit, largest=False).indices
        stays = torch.zeros(limit + len(keys), dtype=torch.bool, device=keys.device)
        stays[smallest] = True
        places = (~stays[:limit]).nonzero()[:, 0]
        self._fibres[places], self._keys[places] = fibres[stays[limit:]], keys[stays[limit:]]


def greedy_coreset(points: Tensor, count: int) -> Tensor:
    """Numbers [count] of points [M,D] that cover all others: greedy k-centre (Gonzalez, 1985).

    Each step takes the point that is farthest from those taken; the covering radius is at most twice the best
    possible. The first is the one farthest from the mean, so that the choice does not depend on the order.
    Squared distances are updated by one matrix-vector product per step. `count` is at most M.
    """
    points = points - points.mean(0)
    norms = points.square().sum(1)
    distances, fresh = norms.clone(), torch.empty_like(norms)
    index = torch.empty(count, dtype=torch.long, device=points.device)
    for step in range(count):
        index[step] = distances.argmax()
        chosen = index[step : step + 1]
        torch.mv(points, points[chosen][0], out=fresh)
        fresh.mul_(-2).add_(norms).add_(norms[chosen])
        if step == 0:
            distances.copy_(fresh)
        torch.minimum(distances, fresh, out=distances)
        distances[chosen] = -math.inf  # never again, however the rounding falls
    return index


class PatchCore:
    """Distance of each position's features to the nearest of a bank of normal features.

    Higher scores = more anomalous. Layers 2 and 3 after a 3 x 3 average, layer 3 on layer 2's grid. The map holds
    the distances, bilinear to S x S and smoothed; the image score is the largest distance before that,
    re-weighted by how crowded the bank is around the nearest item (paper, Eq. 7; the official code leaves the
    re-weighting out). The bank's length M depends on the number of images.

    Deviation: averages at the border count the positions inside the map only (the official code counts zeros).
    Deviation: the first item of the coreset is the fibre farthest from the mean, not a random one.
    Deviation: of more than `max_fibres` fibres the coreset is chosen from a uniform sample, so that memory is
    bounded. Deviation: channels are concatenated, not resampled to 1024 (ResNet18 has 384).

    Presets: "paper" = the published constants: 10 % chosen in a projection to 128 dimensions, 9 neighbours. Its
    sample holds 128 images of 256 px, so its bank at most 13,108 items. "default" cuts the bank at 2,048 items,
    because scoring costs a [1024,M] x 384 product per image of 256 px: with M of about 10,000 that is 4 GMAC,
    twice the backbone, with 2,048 it is 0.8. "quick" also chooses from 16 images' worth of fibres, 1,024 items.

    "default" fits some 90 images in 9 to 19 s on one thread, reading and backbone included (`fit_seconds` in
    benchmarks/results); time to score: docs/results.md, Table 4. Fitting holds 0.2 GB of fibres (0.025 GB for
    "quick").
    """

    info: ClassVar[DetectorInfo] = DetectorInfo(
        name="patchcore",
        summary="nearest neighbour in a coreset of normal features",
        reference="Roth et al., Towards Total Recall in Industrial Anomaly Detection, CVPR 2022, arXiv:2106.08265",
        closed_form=True,
        supports_resume=False,
    )
    Config = PatchCoreConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {},
        "default": {"bank_limit": 2048},
        "quick": {"max_fibres": 16_384, "bank_limit": 1024},
    }

    def __init__(self, config: PatchCoreConfig, backbone: Mapping[str, Tensor] | None) -> None:
        self.config = config
        self.pyramid = Pyramid(backbone, seed=config.seed, backbone=config.backbone)
        self._channels = sum(BACKBONES[config.backbone][k - 1] for k in SCALES)
        self.bank = Bank(self._channels)
        self.module = nn.ModuleDict({"pyramid": self.pyramid, "bank": self.bank})
        self.fitted = False
        self._reservoir: Reservoir | None = None

    def prepare(self, images: Tensor, *, original_size: Tensor | None = None) -> dict[str, Tensor]:
        """Images [B,3,S,S] -> averaged features of layers 2 and 3 on layer 2's grid, {"features": [B,C,h,w]}."""
        check_images(images, size=self.config.size)
        with torch.no_grad():
            pyramid = self.pyramid(images, depth=max(SCALES))
            return {"features": join([neighbourhood(pyramid[k - 1]) for k in SCALES])}

    def steps(self, prepared: dict[str, Tensor], rng: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """Nothing to minimise."""
        return iter(())

    def param_groups(self) -> list[dict[str, Any]]:
        """No trainable parameters."""
        return []

    def monitor(self, prepared: dict[str, Tensor]) -> dict[str, float]:
        """Mean squared distance to the nearest bank item, per dimension."""
        if not self.fitted:
            return {}
        with evaluating(self.module):
            distances, _ = self.bank.nearest(fibres_of(prepared["features"]))
            return {"distance_per_dim": float(distances.square().mean()) / self._channels}

    def collect(self, prepared: dict[str, Tensor]) -> None:
        """Offer the fibres of one batch to the sample."""
        fibres = fibres_of(prepared["features"])
        if self._reservoir is None:
            self._reservoir = Reservoir(self.config.max_fibres, like=fibres, seed=self.config.seed)
        self._reservoir.add(fibres)

    def finish(self, rng: torch.Generator) -> None:
        """Choose the bank from the sample; `rng` draws the projection. Raises TrainingError without images."""
        if self._reservoir is None or not self._reservoir.kept:
            raise TrainingError("patchcore needs at least 1 normal image, got 0")
        fibres, config = self._reservoir.fibres, self.config
        count = min(config.bank_limit, math.ceil(config.fraction * len(fibres)))
        if count < len(fibres):
            points = fibres
            if config.projection is not None and config.projection < self._channels:
                shape = (self._channels, config.projection)
                points = fibres @ torch.randn(shape, generator=rng).to(fibres)  # only ratios matter
            fibres = fibres[greedy_coreset(points, count)]
        self.bank.fibres = fibres.to(self.bank.fibres, copy=True)
        self._reservoir = None
        self.fitted = True

    def score(self, images: Tensor, *, original_size: Tensor | None = None) -> Scores:
        """Scores of images [B,3,S,S]; higher = more anomalous. Raises NotFittedError, InputError."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        return self.score_prepared(self.prepare(images))

    def score_prepared(self, prepared: dict[str, Tensor]) -> Scores:
        """Scores from cached features: the smoothed map of distances; image score = re-weighted maximum."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        features = prepared["features"]
        with evaluating(self.module):
            fibres = fibres_of(features)
            distances, index = (
                each.unflatten(0, (features.shape[0], -1)) for each in self.bank.nearest(fibres)
            )
            peak, place = distances.max(1)
            image = torch.arange(features.shape[0], device=place.device)
            farthest = fibres.unflatten(0, (features.shape[0], -1))[image, place]
            weight = self.bank.weight(farthest, index[image, place], neighbours=self.config.neighbours)
            cells = distances.unflatten(1, features.shape[-2:])
            return Scores(smooth_cells(cells, self.config.size, self.config.sigma), weight * peak)

    def parts(self) -> dict[str, nn.Module]:
        """Named parts for parameter counts."""
        return {"encoder": self.pyramid, "bank": self.bank}

    def state(self) -> dict[str, Tensor]:
        """All tensors, backbone included."""
        return dict(self.module.state_dict())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Fill from `state`, whose bank may have any length M >= 1.

        Raises ModelFileError on a missing, unknown or misshapen tensor.
        """
        expected = self.module.state_dict()
        found = state.get(BANK, expected[BANK])
        check_state(state, {**expected, BANK: found}, name=self.info.name)
        if found.ndim != 2 or found.shape[0] < 1 or found.shape[1] != self._channels:
            shape = tuple(found.shape)
            raise ModelFileError(
                f"{self.info.name}: tensor {BANK!r} has shape {shape}, expected (M, {self._channels}), M >= 1"
            )
        self.bank.fibres = self.bank.fibres.new_empty(found.shape)
        self.module.load_state_dict(dict(state))
        self.fitted = True


def fibres_of(features: Tensor) -> Tensor:
    """[B,C,h,w] -> all fibres, image by image and row by row: [B*h*w,C]."""
    return features.movedim(1, -1).flatten(0, 2)
