"""Configuration: frozen, strict, canonical. Unknown keys are errors that name the nearest known one."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from umiad.errors import ConfigError
from umiad.types import Reading

SIZE_STEP, SIZE_MIN, SIZE_MAX = 32, 64, 4096
TINY = "resnet-tiny"
"""The backbone of tests and golden files: ResNet18's channels and strides in 0.2 MB, random weights."""
MAX_BLOCKS = 256
"""Coupling blocks of a flow, at most: a configuration may come from a stranger."""


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. NaN and infinity are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def nearest(word: str, known: list[str]) -> str:
    """' (did you mean ...?)' with the nearest known word, or the list of all where none is near."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(sorted(known))})"


def check_size(size: int) -> int:
    """Return `size` if it is a multiple of 32 from 64 to 4096; else ConfigError naming the nearest."""
    if SIZE_MIN <= size <= SIZE_MAX and size % SIZE_STEP == 0:
        return size
    best = min(max(SIZE_MIN, round(size / SIZE_STEP) * SIZE_STEP), SIZE_MAX)
    raise ConfigError(
        f"size {size} is not a multiple of {SIZE_STEP} from {SIZE_MIN} to {SIZE_MAX}; the nearest is {best}"
    )


class Config(BaseModel):
    """Base of all configurations: frozen, strict types, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain values (JSON or TOML). Raises ConfigError with the first problem in words."""
        try:
            return cls.model_validate_json(json.dumps(values))
        except (ValidationError, TypeError, ValueError) as error:
            raise ConfigError(f"{cls.__name__}: {_first_problem(cls, error)}") from error

    def canonical(self) -> dict[str, Any]:
        """Plain values, ready for `canonical_json`."""
        return self.model_dump(mode="json")


def _first_problem(cls: type[BaseModel], error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {where!r}{nearest(where, list(cls.model_fields))}"
    return f"{where}: {first['msg']}, got {first.get('input')!r}"


class Preprocessing(Config):
    """From a decoded image to the network's input.

    `size`: edge in pixels, the image is stretched to size x size. `colour`: "grey" takes the luminance
    and repeats it (colour gives the label away in public sets), "rgb" keeps colour. `intensity`: "full"
    maps the stored range to 0..1, "percentile" the 1st to 99th percentile of each image. `equalise`: every
    image is first reduced to that edge by area averaging and brought back up, so that file size and sharpness
    cannot give labels away; None = off. `mean`, `std`: ImageNet's, per channel. `reading`: how grey values are
    taken from medical files, `frames`: which of their frames or slices were fitted (see `FileOptions`).
    """

    size: int = 256
    colour: Literal["grey", "rgb"] = "grey"
    intensity: Literal["full", "percentile"] = "full"
    equalise: int | None = Field(default=None, ge=32, le=SIZE_MAX)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    reading: Reading = Reading()
    frames: str = "one"

    @field_validator("std")
    @classmethod
    def _positive(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(value) <= 0:
            raise ValueError("standard deviations must be above 0")
        return value

    @field_validator("size")
    @classmethod
    def _size(cls, value: int) -> int:
        try:
            return check_size(value)
        except ConfigError as error:
            raise ValueError(str(error)) from error


class TrainingConfig(Config):
    """How a detector is trained; closed-form detectors read `batch_size` only.

    `clip_norm`: largest norm of the gradient, None = no limit. `schedule` of the learning rate and its
    `warmup_epochs`: see `umiad.schedule`.
    """

    epochs: int = Field(default=100, ge=1)
    batch_size: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=2e-4, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float | None = Field(default=2.0, gt=0)
    schedule: Literal["constant", "cosine", "linear", "steps"] = "constant"
    warmup_epochs: int = Field(default=0, ge=0)


class DetectorConfig(Config):
    """What every detector's configuration has; each detector adds its own fields.

    `size` is the input's edge in pixels, `seed` governs initial weights, permutations, channel draws and
    the order of batches, `backbone` is the frozen network ("resnet-tiny" is for tests), `weights` the label of
    its weights. `sigma` is the standard deviation in pixels of the Gaussian that smooths the anomaly map (0 = none).
    """

    size: int = 256
    seed: int = Field(default=0, ge=0)
    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet-tiny"] = "resnet18"
    weights: str = "random"
    sigma: float = Field(default=0.0, ge=0)
    preset: str = "default"
    training: TrainingConfig = TrainingConfig()

    @field_validator("size")
    @classmethod
    def _size(cls, value: int) -> int:
        try:
            return check_size(value)
        except ConfigError as error:
            raise ValueError(str(error)) from error
