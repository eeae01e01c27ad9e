"""IKD (Cao et al., 2022): a student imitates a frozen network where it still does so badly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from umiad.config import SIZE_MAX, SIZE_STEP, DetectorConfig, TrainingConfig
from umiad.detectors.contract import DetectorInfo
from umiad.detectors.guards import check_fitted, check_images, check_state, evaluating
from umiad.nn.encoder import Pyramid, grid
from umiad.nn.parts import in_parts
from umiad.nn.shrink import SMALLEST_EDGE, shrink, stretch
from umiad.nn.student import Mined, Student, mine
from umiad.scoring import maximum, smooth_cells
from umiad.types import Scores

IMAGES_AT_ONCE = 8
"""Images that pass the student together outside training: bounds the memory."""
PUBLISHED = {
    "epochs": 50,
    "batch_size": 2,
    "learning_rate": 5e-5,
    "weight_decay": 0.01,
    "clip_norm": None,
}
"""Training of the publication; the weight decay is AdamW's."""

Weight = Annotated[float, Field(gt=0, le=1e6)]


class IkdConfig(DetectorConfig):
    """What is imitated, and on which positions.

    `scales` of the networks (1..4) with their `scale_weights` in the loss, which are divided by their sum. Hard
    positions lie `beta` standard deviations above the mean distance; `gamma` weights the context loss.
    `shared_margin`: one margin goes through all scales in turn, as published, instead of one per scale. `edge`:
    images with a larger edge are reduced to it before both networks see them (None = never); a multiple of 32.
    """

    scales: tuple[int, ...] = Field(default=(2, 3), min_length=1)
    scale_weights: tuple[Weight, ...] = (1.0, 2.0)
    beta: float = Field(default=2.0, ge=-100, le=100)
    gamma: float = Field(default=1.0, ge=0, le=1e6)
    shared_margin: bool = True
    edge: int | None = Field(default=None, ge=SMALLEST_EDGE, le=SIZE_MAX, multiple_of=SIZE_STEP)
    training: TrainingConfig = TrainingConfig.model_validate(PUBLISHED)

    @field_validator("scales")
    @classmethod
    def _known_scales(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if sorted(set(value)) != list(value) or not set(value) <= {1, 2, 3, 4}:
            raise ValueError("expected different scales from 1 to 4 in rising order")
        return value

    @model_validator(mode="after")
    def _one_weight_per_scale(self) -> Self:
        if len(self.scale_weights) != len(self.scales):
            raise ValueError(f"expected {len(self.scales)} scale_weights, one per scale")
        return self


class Margins(nn.Module):
    """The margins of the previous step in `values`: [1] where all scales share one, else [K]. At first 0."""

    values: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(count))


class Ikd:
    """A student that imitates a frozen teacher on normal images; abnormal is where it fails to.

    Higher scores = more anomalous. Both networks see the image; their maps of scales 2 and 3, on scale 2's grid
    with all fibres at length 1, are compared by squared distance. The student learns on hard positions only,
    those beyond a running margin, from their distance and from the difference of their Gram matrices ("context"),
    so that it does not overfit the easy ones. The map is the product of the scales' distances, bilinear to S x S
    and not smoothed, 0..16; the image score is its maximum. With ResNet18 there are 2.78 M frozen and as many
    trained parameters.

    Presets. "paper": the published constants, AdamW at 5e-5 with decay 0.01, 50 epochs in batches of 2. "default" is
    meant to fit 100 images of 256 px in minutes on 2 cores: as many epochs, but in batches of 8 (650 steps instead of
    2,500), at 2e-4, falling along a cosine since the last epoch counts. "quick" reduces the images to 128 px before
    both networks and takes 16 epochs at 5e-4.

    Deviation: both networks are ResNet18 (or the chosen backbone), whose scales 2 and 3 stand for the second and
    third branch of HRNet-W32, for which there are no weights here.
    Deviation: maps are brought to the finest chosen scale's grid (stride 8), not to one with stride 4, by the
    same interpolation.
    Deviation: where no position reaches the margin, the hardest one is kept, and the loss stays a number.
    """

    info: ClassVar[DetectorInfo] = DetectorInfo(
        name="ikd",
        summary="a student imitates a frozen network, learning on hard positions only",
        reference=(
            "Cao et al., Informative Knowledge Distillation, KBS 248, 2022, doi:10.1016/j.knosys.2022.108846"
        ),
    )
    Config = IkdConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"training": PUBLISHED},
        "default": {
            "training": {**PUBLISHED, "batch_size": 8, "learning_rate": 2e-4, "schedule": "cosine"},
        },
        "quick": {
            "edge": 128,
            "training": {
                **PUBLISHED,
                "epochs": 16,
                "batch_size": 8,
                "learning_rate": 5e-4,
                "schedule": "cosine",
            },
        },
    }

    def __init__(self, config: IkdConfig, backbone: Mapping[str, Tensor] | None) -> None:
        self.config = config
        self._depth = max(config.scales)
        self.pyramid = Pyramid(backbone, seed=config.seed, backbone=config.backbone, depth=self._depth)
        # another seed than a random teacher's, or there would be nothing to learn
        self.student = Student(config.backbone, depth=self._depth, seed=config.seed + 1)
        self.margins = Margins(1 if config.shared_margin else len(config.scales))
        self.module = nn.ModuleDict(
            {"pyramid": self.pyramid, "student": self.student, "margins": self.margins}
        )
        self.fitted = False

    def prepare(self, images: Tensor, *, original_size: Tensor | None = None) -> dict[str, Tensor]:
        """Images [B,3,S,S] -> the reduced "images" [B,3,E,E], and the teacher's maps, "f2" [B,128,E/8,E/8], ..."""
        check_images(images, size=self.config.size)
        with torch.no_grad():
            seen = shrink(images, self.config.edge)
            maps = self.pyramid(seen, depth=self._depth)
            return {"images": seen, **{f"f{k}": maps[k - 1] for k in self.config.scales}}

    def steps(self, prepared: dict[str, Tensor], rng: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """One step. The margins are kept only once it has been taken."""
        self.fitted = True
        mined, margins = self._mine(prepared)
        weights = torch.tensor(self.config.scale_weights, device=margins.device)
        distance = (weights * torch.stack([each.distance for each in mined])).sum() / weights.sum()
        context = (weights * torch.stack([each.context for each in mined])).sum() / weights.sum()
        share = torch.stack([each.share for each in mined]).mean()
        total = distance + self.config.gamma * context
        yield {"total": total, "distance": distance, "context": context, "hard_share": share}
        self.margins.values.copy_(margins)

    def param_groups(self) -> list[dict[str, Any]]:
        """The student's parameters, with AdamW's weight decay."""
        return [{"params": list(self.student.parameters()), "decoupled_weight_decay": True}]

    def monitor(self, prepared: dict[str, Tensor]) -> dict[str, float]:
        """Squared distance of the fibres at length 1, divided by their channels, mean over positions and scales."""
        with evaluating(self.module):
            channels = [prepared[f"f{k}"].shape[1] for k in self.config.scales]
            levels = self._distances(prepared)
            means = [float(each.mean()) / c for each, c in zip(levels, channels, strict=True)]
            return {"distance_per_dim": sum(means) / len(means)}

    def score(self, images: Tensor, *, original_size: Tensor | None = None) -> Scores:
        """Scores of images [B,3,S,S]; higher = more anomalous. Raises NotFittedError, InputError."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        return self.score_prepared(self.prepare(images))

    def score_prepared(self, prepared: dict[str, Tensor]) -> Scores:
        """Scores from cached images and maps, as the class docstring says."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        with evaluating(self.module):
            product = torch.stack(self._distances(prepared)).prod(0)
            maps = smooth_cells(product, self.config.size, self.config.sigma)
            return Scores(maps, maximum(maps))

    def parts(self) -> dict[str, nn.Module]:
        """Named parts for parameter counts."""
        return {"encoder": self.pyramid, "student": self.student}

    def state(self) -> dict[str, Tensor]:
        """All tensors, the teacher's and the margins included."""
        return {key: value.detach() for key, value in self.module.state_dict().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Fill from `state`. Raises ModelFileError on a missing, unknown or misshapen tensor."""
        check_state(state, self.module.state_dict(), name=self.info.name)
        self.module.load_state_dict(dict(state))
        self.fitted = True

    def _mine(self, prepared: Mapping[str, Tensor]) -> tuple[list[Mined], Tensor]:
        """The losses per scale, and the margins of this step in the shape of `Margins.values`."""
        margins, mined = list(self.margins.values), []
        for k, (found, wanted) in enumerate(self._pairs(prepared)):
            place = 0 if self.config.shared_margin else k
            mined.append(mine(found, wanted, margins[place], beta=self.config.beta))
            margins[place] = mined[-1].margin
        return mined, torch.stack(margins)

    def _distances(self, prepared: Mapping[str, Tensor]) -> list[Tensor]:
        """Squared distance of the fibres per scale, all on the finest grid: [B,h,w], 0..4."""
        names = ["images", *(f"f{k}" for k in self.config.scales)]
        parts = []
        for rows in zip(*(in_parts(prepared[name], IMAGES_AT_ONCE) for name in names), strict=True):
            pairs = self._pairs(dict(zip(names, rows, strict=True)))
            parts.append([(found - wanted).square().sum(1) for found, wanted in pairs])
        return [torch.cat(level) for level in zip(*parts, strict=True)]

    def _pairs(self, prepared: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The student's and the teacher's maps per scale, [B,C_k,h,w], on one grid and with fibres of length 1."""
        found = self.student(prepared["images"])
        size = grid(prepared[f"f{self.config.scales[0]}"])
        for k in self.config.scales:
            yield (
                F.normalize(stretch(found[k - 1], size), dim=1),
                F.normalize(stretch(prepared[f"f{k}"], size), dim=1),
            )
