"""MLFEU-net (Tang and Ning, 2025) as a detector: what a network trained to take away coarse noise changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from umiad.config import SIZE_MIN, SIZE_STEP, DetectorConfig, TrainingConfig
from umiad.detectors.contract import DetectorInfo
from umiad.detectors.guards import check_fitted, check_images, check_state, evaluating
from umiad.detectors.mlfeu_objective import OBJECTIVES
from umiad.nn.mlfeu import MlfeuNet
from umiad.nn.parts import in_parts
from umiad.nn.pixels import grey
from umiad.scoring import smooth_cells, top_mean
from umiad.types import Scores

PIXELS_AT_ONCE = 8 * 256 * 256
"""Pixels that pass the network together outside training: bounds the memory."""


class MlfeuConfig(DetectorConfig):
    """What the network sees, its size, and what it learns.

    Grey images are reduced to `edge` pixels (a larger `edge` than `size`: not at all). `width` channels on the finest
    of five levels, `branch` in each of the neck's four dilated convolutions; `enhance` and `neck` "none" leave the
    publication's parts out. `objective`: a name from `OBJECTIVES`. "denoise" adds Gaussian noise of standard
    deviation `noise` (grey values in 0..1) on a grid of `cells` x `cells` nodes to the `foreground` (a level; see
    `umiad.nn.noise`), and weighs 1 - SSIM by `ssim` beside the squared error. "lesions" plants something in a share
    `planted` of the images. `top_fraction`: share of the highest pixels of the map whose mean is the image score.
    """

    edge: int = Field(default=256, ge=SIZE_MIN, le=1024, multiple_of=SIZE_STEP)
    width: int = Field(default=32, ge=4, le=64, multiple_of=4)
    branch: int = Field(default=192, ge=1, le=512)
    enhance: Literal["lfeb", "none"] = "lfeb"
    neck: Literal["pmff", "none"] = "pmff"
    objective: Literal["denoise", "lesions", "plain"] = "denoise"
    noise: float = Field(default=0.2, gt=0, le=10)
    cells: int = Field(default=16, ge=2, le=64)
    foreground: float = Field(default=0.05, ge=0, lt=1)
    ssim: float = Field(default=0.0, ge=0, le=100)
    planted: float = Field(default=0.5, gt=0, le=1)
    top_fraction: float = Field(default=0.01, gt=0, le=1)
    sigma: float = Field(default=4.0, ge=0)
    training: TrainingConfig = TrainingConfig(
        epochs=500,
        batch_size=16,
        learning_rate=1e-4,
        weight_decay=1e-5,
        clip_norm=None,
        schedule="cosine",
    )

    @property
    def working_edge(self) -> int:
        """Edge in pixels of what the network sees."""
        return min(self.edge, self.size)


class Mlfeu:
    """A U-Net with enhanced fine maps and a fusing neck learns to take coarse noise away from normal images.

    At scoring nothing is added: the network still takes away what it does not know from normal images. Higher scores
    = more anomalous: the map is abs(x - f(x)) of grey values in 0..1, upsampled bilinearly to S x S and smoothed; the
    image score is the mean of its top 1 %. Without a backbone: `backbone` and `weights` are not used. No abnormal
    image is seen: what the publication needs them for is not done here.

    Our choice: the publication has a supervised segmenter of breast lesions and no detector. Its network is given
    three objectives that need normal images only. "denoise", the default, is a denoising autoencoder (Kascenas et
    al., MIDL 2022). "lesions" is a segmenter of planted lesions, nearest to the publication, whose map is the
    network's probability; it trains on what `umiad tune` tests with, so that figures of `tune` tell nothing about it.
    "plain" is there to show what noise is for: without it, skip connections let every lesion through.

    Our choice: of the network we know the words of an abstract. Widths, what is inside the two parts, losses and
    schedule are not known to us; ours are in `umiad.nn.mlfeu` and docs/decisions/0008-mlfeu.md. A row of this detector
    says nothing about the published one.

    Presets. "paper": 256 px, 32 channels and a neck that makes 12.3 million weights, the count that the comparing paper
    prints; noise and rate of Kascenas et al. in 500 epochs (3,500 steps for 100 images, theirs were 67,200).
    "default" is meant to fit 100 images of 256 px in minutes on 2 cores: half the edge, half the channels, 30 epochs in
    batches of 4, for as many steps as possible, at a higher rate that falls along a cosine, since the last epoch
    counts. "quick" halves the channels again and takes 12 epochs.

    Deviation from Kascenas et al.: squared error and map on all pixels, not on the foreground only (not every image has
    a background); smoothing by a Gaussian in place of a median; the foreground follows each image's own range, and
    every image's noise is rolled by its own shift; BatchNorm in place of GroupNorm (docs/decisions/0008-mlfeu.md);
    no eroded mask around the head at scoring; one cosine over all epochs in place of one of 100 epochs.
    """

    info: ClassVar[DetectorInfo] = DetectorInfo(
        name="mlfeu",
        summary="what a U-Net trained to take away coarse noise changes in an image",
        reference="after Tang and Ning, MLFEU-net, BSPC 2025, doi:10.1016/j.bspc.2024.106931",
        fidelity="adapted",
        uses_backbone=False,
    )
    Config = MlfeuConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {},
        "default": {
            "edge": 128,
            "width": 16,
            "branch": 96,
            "training": {
                "epochs": 30,
                "batch_size": 4,
                "learning_rate": 2e-3,
                "weight_decay": 1e-5,
                "clip_norm": None,
                "schedule": "cosine",
            },
        },
        "quick": {
            "edge": 128,
            "width": 8,
            "branch": 48,
            "training": {
                "epochs": 12,
                "batch_size": 4,
                "learning_rate": 2e-3,
                "weight_decay": 1e-5,
                "clip_norm": None,
                "schedule": "cosine",
            },
        },
    }

    def __init__(self, config: MlfeuConfig, backbone: Mapping[str, Tensor] | None) -> None:
        self.config = config
        self.network = MlfeuNet(
            width=config.width,
            branch=config.branch,
            enhance=config.enhance,
            neck=config.neck,
            seed=config.seed,
        )
        self.objective = OBJECTIVES[config.objective](config)
        self.module = nn.ModuleDict(self.parts())
        self.fitted = False

    def prepare(self, images: Tensor, *, original_size: Tensor | None = None) -> dict[str, Tensor]:
        """Images [B,3,S,S] -> {"grey": [B,1,edge,edge]} in 0..1."""
        check_images(images, size=self.config.size)
        return {"grey": grey(images, self.config.working_edge)}

    def steps(self, prepared: dict[str, Tensor], rng: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """One step; `rng` draws noise or lesions."""
        self.fitted = True
        yield self.objective.losses(self.network, prepared["grey"], rng)

    def param_groups(self) -> list[dict[str, Any]]:
        """All weights in one group, Adam with amsgrad."""
        return [{"params": list(self.network.parameters()), "amsgrad": True}]

    def monitor(self, prepared: dict[str, Tensor]) -> dict[str, float]:
        """The loss per image with noise or lesions that `seed` decides: the same after every epoch."""
        rng, total = torch.Generator().manual_seed(self.config.seed), 0.0
        with evaluating(self.module):
            for images in self._portions(prepared["grey"]):
                total += float(self.objective.losses(self.network, images, rng)["total"]) * len(images)
            return {"loss_per_dim": total / len(prepared["grey"])}

    def score(self, images: Tensor, *, original_size: Tensor | None = None) -> Scores:
        """Scores of images [B,3,S,S]; higher = more anomalous. Raises NotFittedError, InputError."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        return self.score_prepared(self.prepare(images))

    def score_prepared(self, prepared: dict[str, Tensor]) -> Scores:
        """Scores from grey images, as the class docstring says."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        judged = []
        with evaluating(self.module):
            for images in self._portions(prepared["grey"]):
                judged.append(self.objective.judge(self.network, images)[:, 0])
            smoothed = smooth_cells(torch.cat(judged), self.config.size, self.config.sigma)
            return Scores(smoothed, top_mean(smoothed, self.config.top_fraction))

    def parts(self) -> dict[str, nn.Module]:
        """Named parts for parameter counts; nothing is frozen."""
        return {"network": self.network}

    def state(self) -> dict[str, Tensor]:
        """All tensors."""
        return {key: value.detach() for key, value in self.module.state_dict().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Fill from `state`. Raises ModelFileError on a missing, unknown or misshapen tensor."""
        check_state(state, self.module.state_dict(), name=self.info.name)
        self.module.load_state_dict(dict(state))
        self.fitted = True

    def _portions(self, images: Tensor) -> tuple[Tensor, ...]:
        """Grey images [B,1,e,e], so many at a time as may pass the network together."""
        return in_parts(images, max(1, PIXELS_AT_ONCE // images[0].numel()))
