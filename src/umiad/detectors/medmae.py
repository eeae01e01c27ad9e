"""MedMAE (Gupta et al., 2025) as a detector: how badly hidden patches are predicted from the visible ones."""

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
from umiad.nn.mae import MaskedAutoencoder, Stack, masked_loss, partitions, random_visible
from umiad.nn.parts import in_parts
from umiad.nn.precision import exact
from umiad.nn.vit import patchify, unpatchify
from umiad.scoring import smooth, top_mean
from umiad.types import Scores

MAX_CELLS = 4096
"""Patches of an image, at most: attention compares each with each."""
MAX_WEIGHTS = 1 << 27
"""Numbers of both transformers together, at most (the published size has 110 million): a configuration may come
from a stranger."""
VALUES_AT_ONCE = 1 << 23
"""Patches times channels that pass the network together outside training: hidden layers of 128 MiB bound the memory."""
TINY_RESIDUAL = 1e-6
"""Smallest normal residual, for images that are predicted without any error."""
BETAS = (0.9, 0.95)
"""Of AdamW, as published."""
SMALL: dict[str, Any] = {
    "edge": 128,
    "channels": 1,
    "patch": 8,
    "width": 128,
    "depth": 4,
    "heads": 4,
    "decoder_width": 64,
    "decoder_depth": 2,
    "decoder_heads": 4,
}
"""The autoencoder of "default" and "quick"."""


class MedMaeConfig(DetectorConfig):
    """What the autoencoder sees, its size, and how it is asked.

    Images are reduced to `edge` pixels (None, or an `edge` above `size`: not at all) and `channels` (1 = their
    mean), and cut into patches of `patch` pixels. Encoder: `depth` blocks of `width` channels and `heads` heads;
    decoder likewise. One patch in `sets` is visible, 4 = a masking of 75 %. Scores come from `rounds` partitions
    into so many sets. `floor`: smallest normal residual of a pixel, as a share of the mean over all pixels (above the
    largest, such as 100: all pixels are divided by the same number). `top_fraction`: share of the highest pixels
    whose mean is the image score.
    """

    edge: int | None = Field(default=224, ge=32, le=2048, multiple_of=SIZE_STEP)
    channels: Literal[1, 3] = 3
    patch: Literal[4, 8, 16, 32] = 16
    width: int = Field(default=768, ge=4, le=4096, multiple_of=4)
    depth: int = Field(default=12, ge=1, le=64)
    heads: int = Field(default=12, ge=1, le=64)
    decoder_width: int = Field(default=512, ge=4, le=4096, multiple_of=4)
    decoder_depth: int = Field(default=8, ge=1, le=64)
    decoder_heads: int = Field(default=16, ge=1, le=64)
    sets: int = Field(default=4, ge=2, le=16)
    rounds: int = Field(default=4, ge=1, le=16)
    floor: float = Field(default=0.5, gt=0, le=100)
    top_fraction: float = Field(default=0.02, gt=0, le=1)
    sigma: float = Field(default=4.0, ge=0)
    training: TrainingConfig = TrainingConfig(
        epochs=1000,
        batch_size=64,
        learning_rate=3.75e-5,
        weight_decay=0.05,
        clip_norm=None,
        schedule="cosine",
        warmup_epochs=40,
    )

    @property
    def working_edge(self) -> int:
        """Edge in pixels of what the network sees, a multiple of `patch`."""
        return self.size if self.edge is None else min(self.edge, self.size)

    @property
    def side(self) -> int:
        """Patches in a row, and rows."""
        return self.working_edge // self.patch

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for width, heads in ((self.width, self.heads), (self.decoder_width, self.decoder_heads)):
            if width % heads:
                raise ValueError(f"width {width} is not a multiple of {heads} heads")
        if not self.sets <= self.side**2 <= MAX_CELLS:
            raise ValueError(
                f"{self.working_edge} pixels make {self.side**2} patches of {self.patch}, "
                f"expected {self.sets} (the sets) to {MAX_CELLS}"
            )
        weights = 12 * (self.width**2 * self.depth + self.decoder_width**2 * self.decoder_depth)
        if weights > MAX_WEIGHTS:
            raise ValueError(f"the transformers have {weights} numbers, expected at most {MAX_WEIGHTS}")
        return self


class NormalResidual(nn.Module):
    """Mean residual of the fitted normal images at every pixel, `level` [E,E]; 1 before `finish`."""

    level: Tensor

    def __init__(self, edge: int) -> None:
        super().__init__()
        self.register_buffer("level", torch.ones(edge, edge))


class MedMae:
    """How much worse hidden patches are predicted from visible ones than those of normal images.

    Higher scores = more anomalous; the map is about 1 where an image is like the fitted ones (less where the floor
    holds). A masked autoencoder learns from normal images to predict the three quarters of the patches that it does
    not see. For a score, the patches are cut into four disjoint sets,
    `rounds` times, and each set in turn is all that is visible: every patch is judged 3 x `rounds` times, never by a
    pass that saw it. The map is the mean squared error of each pixel over those passes, divided by its mean over the
    fitted images, upsampled bilinearly and smoothed; the image score is the mean of its top 2 %. The sets are drawn
    from the seed and the same for all images. Residuals of fitted images are somewhat smaller than those of new ones:
    take thresholds from held-out images, as `fit` does. Without a backbone: `backbone` and `weights` are not used.

    Our choice: everything of a score (sets, rounds, ratio, floor, smoothing, top). MedMAE is pretrained on a large
    collection and then probed with labels; it has no anomaly score.
    Our choice: trained from scratch on the normal images at hand, since `umiad.weights` knows no such network; the
    row shows the method, not MedMAE's pretraining.
    Our choice: batches of 64, with the published 1.5e-4 x batch / 256 as rate. docs/decisions/0007 has the reasons.

    Presets. "paper": the published ViT-B/16 at 224 px (larger images are reduced to that), 111.66 million numbers,
    1000 epochs; far beyond 2 cores. "default": 0.91 million on grey images of 128 px in patches of 8, 200 epochs in
    batches of 16 at 1e-3: minutes for 100 images. "quick": 30 epochs of that and half the
    rounds.

    Deviation: no random crops and mirror images as in MAE's code, since images are prepared once.
    Deviation: warm-up and cosine follow `umiad.schedule`: the rate starts at a tenth, and the cosine runs over all
    epochs.
    """

    info: ClassVar[DetectorInfo] = DetectorInfo(
        name="medmae",
        summary="residual of patches that a masked autoencoder could not see",
        reference="after Gupta et al., MedMAE, Computation 13(4):88, 2025, arXiv:2407.14784",
        fidelity="adapted",
        uses_backbone=False,
    )
    Config = MedMaeConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "training": {
                "epochs": 1000,
                "batch_size": 64,
                "learning_rate": 3.75e-5,
                "weight_decay": 0.05,
                "clip_norm": None,
                "schedule": "cosine",
                "warmup_epochs": 40,
            }
        },
        "default": {
            **SMALL,
            "training": {
                "epochs": 200,
                "batch_size": 16,
                "learning_rate": 1e-3,
                "weight_decay": 0.05,
                "clip_norm": None,
                "schedule": "cosine",
                "warmup_epochs": 10,
            },
        },
        "quick": {
            **SMALL,
            "rounds": 2,
            "training": {
                "epochs": 30,
                "batch_size": 16,
                "learning_rate": 1e-3,
                "weight_decay": 0.05,
                "clip_norm": None,
                "schedule": "cosine",
                "warmup_epochs": 3,
            },
        },
    }

    def __init__(self, config: MedMaeConfig, backbone: Mapping[str, Tensor] | None) -> None:
        self.config = config
        self.network = MaskedAutoencoder(
            side=config.side,
            values=config.patch**2 * config.channels,
            encoder=Stack(config.width, config.depth, config.heads),
            decoder=Stack(config.decoder_width, config.decoder_depth, config.decoder_heads),
            seed=config.seed,
        )
        self.normal = NormalResidual(config.working_edge)
        self.module = nn.ModuleDict({"network": self.network, "normal": self.normal})
        self.sets = tuple(
            partitions(config.side**2, sets=config.sets, rounds=config.rounds, seed=config.seed)
        )
        self.fitted = False
        self._sum: Tensor | None = None
        self._count = 0

    def prepare(self, images: Tensor, *, original_size: Tensor | None = None) -> dict[str, Tensor]:
        """Images [B,3,S,S] -> {"image": [B,C,E,E]}: reduced by area averaging, still normalised."""
        check_images(images, size=self.config.size)
        kept = images.detach()
        if self.config.channels == 1:
            kept = kept.mean(1, keepdim=True)
        if self.config.working_edge < self.config.size:
            kept = F.interpolate(kept, size=(self.config.working_edge,) * 2, mode="area")
        return {"image": kept}

    def steps(self, prepared: dict[str, Tensor], rng: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """One step; `rng` draws what each image shows."""
        self.fitted = True
        patches = patchify(prepared["image"], self.config.patch)
        count, cells = patches.shape[:2]
        visible = random_visible(count, cells, keep=cells // self.config.sets, rng=rng).to(patches.device)
        yield {"total": masked_loss(patches, self.network(patches, visible), visible)}

    def param_groups(self) -> list[dict[str, Any]]:
        """AdamW with the published betas; vectors (biases, LayerNorms) do not decay, as published."""
        trained = [p for p in self.module.parameters() if p.requires_grad]
        common: dict[str, Any] = {"betas": BETAS, "decoupled_weight_decay": True}
        return [
            {"params": [p for p in trained if p.ndim > 1], **common},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0, **common},
        ]

    def monitor(self, prepared: dict[str, Tensor]) -> dict[str, float]:
        """Mean squared error per masked pixel and channel, where the first of the fixed sets is visible."""
        with evaluating(self.module):
            errors = []
            for patches in self._portions(prepared["image"]):
                shown = self.sets[0].to(patches.device).expand(len(patches), -1)
                loss = masked_loss(patches, self.network(patches, shown), shown)
                errors.append(float(loss) * len(patches))
            return {"residual_per_dim": sum(errors) / len(prepared["image"])}

    def collect(self, prepared: dict[str, Tensor]) -> None:
        """Add the residuals of one batch of normal images to the sum."""
        residual = self._residual(prepared["image"])
        total = residual.sum(0)
        self._sum = total if self._sum is None else self._sum + total
        self._count += len(residual)

    def finish(self, rng: torch.Generator) -> None:
        """Make their mean the normal residual. Raises TrainingError when nothing was collected."""
        if self._sum is None:
            raise TrainingError("medmae needs at least 1 normal image for its normal residual, got 0")
        level = self._sum / self._count
        self.normal.level.copy_(level.clamp_min(self.config.floor * float(level.mean())))
        self._sum, self._count = None, 0

    def score(self, images: Tensor, *, original_size: Tensor | None = None) -> Scores:
        """Scores of images [B,3,S,S]; higher = more anomalous. Raises NotFittedError, InputError."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        return self.score_prepared(self.prepare(images))

    def score_prepared(self, prepared: dict[str, Tensor]) -> Scores:
        """Scores from the reduced images, as the class docstring says."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        images, size = prepared["image"], (self.config.size, self.config.size)
        with evaluating(self.module):
            level = exact(self.normal.level).clamp_min(TINY_RESIDUAL)
            ratio = (self._residual(images) / level)[:, None]
            wide = F.interpolate(ratio, size=size, mode="bilinear", align_corners=False)[:, 0]
            maps = smooth(wide, self.config.sigma).to(images.device, torch.float32)
            return Scores(maps, top_mean(maps, self.config.top_fraction))

    def parts(self) -> dict[str, nn.Module]:
        """Named parts for parameter counts. Nothing is frozen, so none is called "encoder"."""
        return {"autoencoder": self.network, "normal": self.normal}

    def state(self) -> dict[str, Tensor]:
        """All tensors; positions and sets follow from the configuration."""
        return {key: value.detach() for key, value in self.module.state_dict().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Fill from `state`. Raises ModelFileError on a missing, unknown or misshapen tensor."""
        check_state(state, self.module.state_dict(), name=self.info.name)
        self.module.load_state_dict(dict(state))
        self.fitted = True

    def _portions(self, images: Tensor) -> Iterator[Tensor]:
        """The patches of so many images at a time as may pass the network together."""
        values = self.config.side**2 * max(self.config.width, self.config.decoder_width)
        for part in in_parts(images, max(1, VALUES_AT_ONCE // values)):
            yield patchify(part, self.config.patch)

    def _residual(self, images: Tensor) -> Tensor:
        """Mean residual of each pixel over the passes in which its patch was masked: float64 [B,E,E]."""
        with evaluating(self.module):
            found = torch.cat([self._judged(patches) for patches in self._portions(images)])
            return unpatchify(found, self.config.patch)[:, 0]

    def _judged(self, patches: Tensor) -> Tensor:
        """The same of patches [B,N,P] that pass together, once for each set: [B,N,patch^2]."""
        config = self.config
        total = exact(torch.zeros_like(patches[..., : config.patch**2]))
        for visible in self.sets:
            shown = visible.to(patches.device).expand(patches.shape[0], -1)
            error = (self.network(patches, shown) - patches).unflatten(2, (-1, config.channels))
            total += exact(error.square().mean(3)).index_fill(1, visible.to(total.device), 0.0)
        return total / (config.rounds * (config.sets - 1))
