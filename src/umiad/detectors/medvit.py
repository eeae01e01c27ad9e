"""MedViTV2 (Manzari et al., 2025) as a detector: taught to see pasted pieces, then a Gaussian of what it finds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from umiad.config import SIZE_STEP, DetectorConfig, TrainingConfig
from umiad.detectors.contract import DetectorInfo
from umiad.detectors.guards import check_fitted, check_images, check_state, evaluating
from umiad.errors import TrainingError
from umiad.nn.cutpaste import CLASSES, three_way
from umiad.nn.fibres import join, to_pixels
from umiad.nn.ledoit_wolf import Gaussians, Moments
from umiad.nn.medvit import DESIGNS, STRIDES, Features, MedVitNetwork
from umiad.nn.parts import in_parts
from umiad.nn.shrink import SMALLEST_EDGE, shrink
from umiad.scoring import maximum, smooth
from umiad.types import Scores

STAGES = (2, 3)
"""Stages of the network whose maps are compared at every position, on the grid of the first."""
MAX_EDGE = 512
"""Pixels of what the network sees, at most."""
MAX_NUMBERS = 1 << 26
"""Numbers of all positions' covariances together, at most: a configuration may come from a stranger."""
IMAGES_AT_ONCE = 8
"""Images that pass the network together outside training: bounds the memory."""
WATCHED = 8
"""Images of a batch that `monitor` looks at, in three versions each: more would take minutes of a fit."""
BETAS = (0.9, 0.999)
"""Of AdamW, as published."""


class MedVitConfig(DetectorConfig):
    """Which network sees what, and what scores are made of.

    `network`: one of the four published sizes. `official_layout`: whether it computes as the published code does or
    as the publication describes it (see `MedVitNetwork`). `edge`: images with a larger edge are reduced to it before
    anything sees them; a multiple of 32. `drop_path`: rate of DropPath at the last block, None = as published.
    `channels` are drawn from stages 2 and 3 for the map; `image_score`: "embedding", the distance of the pooled
    embedding, or "map", the maximum of the map.
    """

    network: Literal["tiny", "small", "base", "large"] = "small"
    official_layout: bool = False
    edge: int = Field(default=224, ge=SMALLEST_EDGE, le=MAX_EDGE, multiple_of=SIZE_STEP)
    drop_path: float | None = Field(default=None, ge=0, le=0.9)
    channels: int = Field(default=100, ge=1, le=512)
    image_score: Literal["embedding", "map"] = "embedding"
    sigma: float = Field(default=4.0, ge=0)
    training: TrainingConfig = TrainingConfig(
        epochs=100, batch_size=8, learning_rate=1e-4, weight_decay=0.05, clip_norm=None, schedule="cosine"
    )

    @property
    def working_edge(self) -> int:
        """Edge in pixels of what the network sees."""
        return min(self.edge, self.size)

    @property
    def positions(self) -> int:
        """Cells of the map before it is brought to pixels."""
        return (self.working_edge // STRIDES[STAGES[0] - 1]) ** 2

    @model_validator(mode="after")
    def _possible(self) -> Self:
        numbers = self.positions * self.channels**2
        if numbers > MAX_NUMBERS:
            raise ValueError(
                f"{self.positions} positions of {self.channels} channels need covariances of {numbers} numbers, "
                f"expected at most {MAX_NUMBERS} (fewer channels, or a smaller edge)"
            )
        return self


class MedVit:
    """How far what MedViTV2 finds in an image lies from what it finds in normal ones, taught by CutPaste.

    Higher scores = more anomalous. The network learns from normal images alone to tell them as they are from the
    same with a piece of themselves pasted elsewhere, and with a thin one ("scar"). Then it is shown the normal images
    once more, and two kinds of Gaussians are fitted, their covariances shrunk by Ledoit and Wolf's formula: one
    of the pooled embedding, one per position of 100 randomly drawn channels of stages 2 and 3. The image score is the
    Mahalanobis distance of the embedding; the map holds the distances of the positions, bilinear to S x S, smoothed
    by 4 pixels. The classes learnt by CutPaste are not used for scores.

    Our choice: the publication describes a classifier that is trained with labels; it has no detector. All that
    makes one of it here is ours: docs/decisions/0009-medvit.md. Read its row as "this network, taught without
    labels", not as a published result. Our choice: CutPaste (Li et al., CVPR 2021, arXiv:2104.04015) with three
    classes, and that publication's Gaussian on the embedding. Our choice: a map by PaDiM's recipe. Our choice: a
    batch of 24, as published, is 8 images in three versions each. Our choice: initial weights are random; a
    published checkpoint cannot be given.

    Deviation: the attention and the KAN layers see fibres, as the publication describes it; the published code cuts
    maps up without moving the channels to the end, and holds parameters that nothing uses (2.75 of 29.58 million
    in "small"). `official_layout` brings both back. Deviation: the rate falls to a thousandth, not to 5e-6; the last
    epoch counts, not the best on the test set. Deviation: CutPaste's jitter of contrast and brightness is relative to
    the image's own spread; there is none of saturation and hue, and its own schedule (SGD) is not used.

    Presets. "paper": the published constants at 224 px, 100 epochs of "small": many hours on a CPU. "default" is
    meant to fit 100 images of 256 px in minutes on 2 cores: the same network at 128 px (maps of 16 x 16 cells), 12
    epochs, in batches of 4 images for more steps (300). "quick": the network "tiny" at 64 px (8 x 8 cells), 6 epochs.
    """

    info: ClassVar[DetectorInfo] = DetectorInfo(
        name="medvit",
        summary="Gaussians of what MedViTV2 finds, after it learnt to see pasted pieces",
        reference="after Manzari et al., MedViTV2, Applied Soft Computing 2025, arXiv:2502.13693",
        fidelity="adapted",
        uses_backbone=False,
    )
    Config = MedVitConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {},
        "default": {
            "edge": 128,
            "training": {
                "epochs": 12,
                "batch_size": 4,
                "learning_rate": 1e-4,
                "weight_decay": 0.05,
                "clip_norm": None,
                "schedule": "cosine",
            },
        },
        "quick": {
            "network": "tiny",
            "edge": 64,
            "training": {
                "epochs": 6,
                "batch_size": 4,
                "learning_rate": 1e-4,
                "weight_decay": 0.05,
                "clip_norm": None,
                "schedule": "cosine",
            },
        },
    }

    def __init__(self, config: MedVitConfig, backbone: Mapping[str, Tensor] | None) -> None:
        self.config = config
        self.network = MedVitNetwork(
            config.network,
            classes=len(CLASSES),
            seed=config.seed,
            official=config.official_layout,
            drop_rate=config.drop_path,
        )
        dims = DESIGNS[config.network].dims
        total = sum(dims[stage - 1] for stage in STAGES)
        rng = torch.Generator().manual_seed(config.seed)
        self.index = torch.randperm(total, generator=rng)[: config.channels].sort().values
        self.embedding = Gaussians(1, dims[-1])
        self.positions = Gaussians(config.positions, len(self.index))
        self.module = nn.ModuleDict(
            {"network": self.network, "embedding": self.embedding, "positions": self.positions}
        )
        self.fitted = False
        self._moments: tuple[Moments, Moments] | None = None

    def prepare(self, images: Tensor, *, original_size: Tensor | None = None) -> dict[str, Tensor]:
        """Images [B,3,S,S] -> {"image": [B,3,E,E]}: reduced by area averaging, still normalised."""
        check_images(images, size=self.config.size)
        return {"image": shrink(images.detach(), self.config.working_edge)}

    def steps(self, prepared: dict[str, Tensor], rng: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """One step on each image in three versions; `rng` draws what is pasted and what DropPath leaves out."""
        views, labels = three_way(prepared["image"], rng=rng)
        logits = self.network.classify(self.network(views, rng).embedding)
        yield {"total": F.cross_entropy(logits, labels), "accuracy": _share(logits, labels)}

    def param_groups(self) -> list[dict[str, Any]]:
        """AdamW with the published betas; all parameters decay, as published."""
        trained = [p for p in self.module.parameters() if p.requires_grad]
        return [{"params": trained, "betas": BETAS, "decoupled_weight_decay": True}]

    def monitor(self, prepared: dict[str, Tensor]) -> dict[str, float]:
        """How well the network tells apart three versions of the first 8 images, the same versions each time.

        "label_nats_per_dim": the mean negative log-likelihood of the right label, of one dimension; log 3 = 1.10
        is guessing. "label_accuracy": how often it is the likeliest.
        """
        rng = torch.Generator().manual_seed(self.config.seed)
        with evaluating(self.module):
            views, labels = three_way(prepared["image"][:WATCHED], rng=rng)
            logits = torch.cat([self.network.classify(f.embedding) for f in self._features(views)])
            nats, right = F.cross_entropy(logits, labels), _share(logits, labels)
            return {"label_nats_per_dim": float(nats), "label_accuracy": float(right)}

    def collect(self, prepared: dict[str, Tensor]) -> None:
        """Add one batch of normal images, as they are, to the sums of both kinds of Gaussians."""
        with evaluating(self.module):
            for found in self._features(prepared["image"]):
                views = (found.embedding[None], self._fibres(found))
                if self._moments is None:
                    self._moments = (Moments(views[0].mean(1)), Moments(views[1].mean(1)))
                for moments, view in zip(self._moments, views, strict=True):
                    moments.add(view)

    def finish(self, rng: torch.Generator) -> None:
        """Turn the sums into Gaussians. Raises TrainingError with fewer than 2 images."""
        count = 0 if self._moments is None else self._moments[0].count
        if self._moments is None or count < 2:
            raise TrainingError(f"medvit needs at least 2 normal images, got {count}")
        for gaussians, moments in zip((self.embedding, self.positions), self._moments, strict=True):
            gaussians.fill(moments)
        self._moments = None
        self.fitted = True

    def score(self, images: Tensor, *, original_size: Tensor | None = None) -> Scores:
        """Scores of images [B,3,S,S]; higher = more anomalous. Raises NotFittedError, InputError."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        return self.score_prepared(self.prepare(images))

    def score_prepared(self, prepared: dict[str, Tensor]) -> Scores:
        """Scores from the reduced images, as the class docstring says."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        with evaluating(self.module):
            cells, whole = [], []
            for found in self._features(prepared["image"]):
                distance = self.positions.distance(self._fibres(found))  # [P,B]
                cells.append(distance.T.unflatten(1, found.maps[STAGES[0] - 1].shape[2:]))
                whole.append(self.embedding.distance(found.embedding[None])[0])
            maps = smooth(to_pixels(torch.cat(cells), self.config.size), self.config.sigma)
            by_map = self.config.image_score == "map"
            return Scores(maps, maximum(maps) if by_map else torch.cat(whole))

    def parts(self) -> dict[str, nn.Module]:
        """Named parts for parameter counts. Nothing is frozen, so none is called "encoder"."""
        return {"network": self.network, "embedding": self.embedding, "positions": self.positions}

    def state(self) -> dict[str, Tensor]:
        """All tensors; which channels are drawn follows from the configuration."""
        return {key: value.detach() for key, value in self.module.state_dict().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Fill from `state`. Raises ModelFileError on a missing, unknown or misshapen tensor."""
        check_state(state, self.module.state_dict(), name=self.info.name)
        self.module.load_state_dict(dict(state))
        self.fitted = True

    def _features(self, images: Tensor) -> Iterator[Features]:
        """What the network finds, without DropPath, in so many images at a time as may pass it together."""
        for part in in_parts(images, IMAGES_AT_ONCE):
            yield self.network(part)

    def _fibres(self, found: Features) -> Tensor:
        """The drawn channels of stages 2 and 3 on stage 2's grid: [P,B,d]."""
        maps = join([found.maps[stage - 1] for stage in STAGES])
        return maps[:, self.index.to(maps.device)].flatten(2).permute(2, 0, 1)


def _share(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of rows whose largest logit is at the label."""
    return (logits.detach().argmax(1) == labels).float().mean()
