"""RD4AD (Deng and Li, CVPR 2022): a decoder restores a frozen network's maps from one small embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from umiad.config import SIZE_MAX, SIZE_STEP, DetectorConfig, TrainingConfig
from umiad.detectors.contract import DetectorInfo
from umiad.detectors.guards import check_fitted, check_images, check_state, evaluating
from umiad.nn.encoder import Pyramid
from umiad.nn.parts import in_parts
from umiad.nn.precision import exact
from umiad.nn.reverse import LEVELS, ReverseNetwork
from umiad.nn.shrink import SMALLEST_EDGE, shrink, stretch
from umiad.scoring import maximum, smooth
from umiad.types import Scores

IMAGES_AT_ONCE = 8
"""Images that pass the network together outside training: bounds the memory."""

Distance = Callable[[Tensor, Tensor], Tensor]
"""From two maps [B,C,h,w] to a distance, a scalar >= 0."""


def whole_distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean over images of 1 - the cosine of the whole maps as vectors of C*h*w numbers; 0..2 (official code)."""
    return (1 - F.cosine_similarity(found.flatten(1), wanted.flatten(1), dim=1)).mean()


def position_distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean over images and positions of 1 - the cosine of the fibres; 0..2 (as the publication describes it)."""
    return (1 - F.cosine_similarity(found, wanted, dim=1)).mean()


LOSSES: Mapping[str, Distance] = MappingProxyType({"whole": whole_distance, "position": position_distance})
"""Name -> distance of a level's restored map to the teacher's; the loss is their sum over the levels."""


class Rd4adConfig(DetectorConfig):
    """What is restored, and how it is compared.

    `loss`: a name from `LOSSES`. `edge`: images with a larger edge are reduced to it before the networks see
    them (None = never); a multiple of 32.
    """

    loss: Literal["whole", "position"] = "whole"
    edge: int | None = Field(default=None, ge=SMALLEST_EDGE, le=SIZE_MAX, multiple_of=SIZE_STEP)
    sigma: float = Field(default=4.0, ge=0)
    training: TrainingConfig = TrainingConfig(epochs=200, batch_size=16, learning_rate=5e-3, clip_norm=None)


BETAS = (0.5, 0.999)
"""Of Adam, as published."""


class Rd4ad:
    """Reverse distillation: what a decoder that has only seen normal images cannot restore is abnormal.

    Higher scores = more anomalous. A frozen teacher yields F1, F2 and F3; they are condensed into one embedding
    with an eighth of F1's grid, from which a decoder restores all three. The map is the sum over the levels of
    1 - cosine of the fibres, each upsampled (align_corners=True), then smoothed: 0..6. The image score is its
    maximum. With ResNet18 there are 2.78 M frozen and 15.38 M trained parameters.

    The loss "whole" has one cosine per image and level, over the whole flattened map, as the official code has;
    "position" has one per position, as the publication describes it, averaged.

    Presets. "paper": the published constants, Adam at 0.005 with betas 0.5 and 0.999, 200 epochs in batches of 16.
    "default" is meant to fit 100 images of 256 px in minutes on 2 cores: 30 epochs, in batches of 8 for more steps
    (390 instead of 1,400), at 0.002, falling along a cosine since the last epoch counts. "quick" reduces the images to
    128 px before both networks and takes 10 epochs at 0.005.

    Deviation: ResNet18 by default instead of WideResNet50, which is not among the backbones.
    Deviation: the last epoch counts; the official code tests every 10 epochs.
    Deviation: the Gaussian mirrors the map at its borders about the outermost pixel and ends at 4 sigma.
    """

    info: ClassVar[DetectorInfo] = DetectorInfo(
        name="rd4ad",
        summary="a decoder restores a frozen network's maps from one small embedding",
        reference="Deng and Li, Anomaly Detection via Reverse Distillation, CVPR 2022, arXiv:2201.10703",
    )
    Config = Rd4adConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "training": {"epochs": 200, "batch_size": 16, "learning_rate": 5e-3, "clip_norm": None},
        },
        "default": {
            "training": {
                "epochs": 30,
                "batch_size": 8,
                "learning_rate": 2e-3,
                "clip_norm": None,
                "schedule": "cosine",
            },
        },
        "quick": {
            "edge": 128,
            "training": {
                "epochs": 10,
                "batch_size": 8,
                "learning_rate": 5e-3,
                "clip_norm": None,
                "schedule": "cosine",
            },
        },
    }

    def __init__(self, config: Rd4adConfig, backbone: Mapping[str, Tensor] | None) -> None:
        self.config = config
        self.pyramid = Pyramid(backbone, seed=config.seed, backbone=config.backbone, depth=LEVELS)
        self.network = ReverseNetwork(config.backbone, seed=config.seed)
        self.module = nn.ModuleDict({"pyramid": self.pyramid, "network": self.network})
        self.fitted = False

    def prepare(self, images: Tensor, *, original_size: Tensor | None = None) -> dict[str, Tensor]:
        """Images [B,3,S,S] -> the teacher's maps {"f1", "f2", "f3"}, f1 [B,64,E/4,E/4], E the reduced edge."""
        check_images(images, size=self.config.size)
        with torch.no_grad():
            maps = self.pyramid(shrink(images, self.config.edge), depth=LEVELS)
            return {f"f{k}": features for k, features in enumerate(maps, start=1)}

    def steps(self, prepared: dict[str, Tensor], rng: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """One step: the sum over the levels of the distance that `config.loss` names."""
        self.fitted = True
        wanted, distance = _maps(prepared), LOSSES[self.config.loss]
        levels = [distance(d, f) for d, f in zip(self.network(wanted), wanted, strict=True)]
        losses = {f"level{k}": each for k, each in enumerate(levels, start=1)}
        yield {"total": torch.stack(levels).sum(), **losses}

    def param_groups(self) -> list[dict[str, Any]]:
        """All trainable parameters in one group, with the published betas."""
        return [{"params": list(self.network.parameters()), "betas": BETAS}]

    def monitor(self, prepared: dict[str, Tensor]) -> dict[str, float]:
        """Squared distance of the fibres at length 1, divided by their channels, mean over positions and levels."""
        with evaluating(self.module):
            channels = [each.shape[1] for each in _maps(prepared)]
            levels = self._distances(prepared)
            means = [2 * float(each.mean()) / c for each, c in zip(levels, channels, strict=True)]
            return {"distance_per_dim": sum(means) / LEVELS}

    def score(self, images: Tensor, *, original_size: Tensor | None = None) -> Scores:
        """Scores of images [B,3,S,S]; higher = more anomalous. Raises NotFittedError, InputError."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        return self.score_prepared(self.prepare(images))

    def score_prepared(self, prepared: dict[str, Tensor]) -> Scores:
        """Scores from cached maps, as the class docstring says."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        size = (self.config.size, self.config.size)
        with evaluating(self.module):
            levels = [stretch(each[:, None], size)[:, 0] for each in self._distances(prepared)]
            maps = smooth(torch.stack(levels).sum(0), self.config.sigma)
            maps = maps.to(prepared["f1"].device, torch.float32)
            return Scores(maps, maximum(maps))

    def parts(self) -> dict[str, nn.Module]:
        """Named parts for parameter counts."""
        return {
            "encoder": self.pyramid,
            "embedding": self.network.embedding,
            "decoder": self.network.decoder,
        }

    def state(self) -> dict[str, Tensor]:
        """All tensors, the teacher's included."""
        return {key: value.detach() for key, value in self.module.state_dict().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Fill from `state`. Raises ModelFileError on a missing, unknown or misshapen tensor."""
        check_state(state, self.module.state_dict(), name=self.info.name)
        self.module.load_state_dict(dict(state))
        self.fitted = True

    def _distances(self, prepared: Mapping[str, Tensor]) -> list[Tensor]:
        """1 - cosine of the restored and the teacher's fibres, per level: float64 [B,h_k,w_k], finest first."""
        parts = []
        for wanted in zip(*(in_parts(each, IMAGES_AT_ONCE) for each in _maps(prepared)), strict=True):
            found = self.network(wanted)
            parts.append([cosine_distance(d, f) for d, f in zip(found, wanted, strict=True)])
        return [torch.cat(level) for level in zip(*parts, strict=True)]


def cosine_distance(found: Tensor, wanted: Tensor) -> Tensor:
    """1 - cosine of the fibres of two maps [B,C,h,w]: float64 [B,h,w], 0..2."""
    return (1 - F.cosine_similarity(exact(found), exact(wanted), dim=1)).clamp_min(0)


def _maps(prepared: Mapping[str, Tensor]) -> Sequence[Tensor]:
    return [prepared[f"f{k}"] for k in range(1, LEVELS + 1)]
