"""Edges from the segment anything model, Table 7: reads a checkpoint that the user names, builds egmf's network on it.

There is no other way to have edges under this name: without a checkpoint nothing stands in for them. Nothing is
downloaded here. A checkpoint is a folder with `config.json` and `model.safetensors`, the form in which Meta's
sam-vit-base, sam-vit-large and sam-vit-huge (Apache-2.0) are published for the library transformers; that library
comes with `pip install 'umiad[sam]'`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from umiad import detectors, diskfile, strictjson
from umiad import weights as backbones
from umiad.config import nearest
from umiad.detectors.contract import DetectorInfo
from umiad.detectors.egmf_network import EGMFNetwork, Latents, NetworkConfig, NetworkEGMF
from umiad.detectors.guards import check_state
from umiad.errors import ConfigError, InputError, ModelFileError, UmiadError, require
from umiad.nn.encoder import Pyramid
from umiad.nn.sam import POINTS_PER_SIDE, SamBoundaries, SamEdges

CONFIG, WEIGHTS = "config.json", "model.safetensors"
EDGE: Literal["sam"] = "sam"
"""The value of the setting `edge` that means this."""
HOW_TO_GET = (
    "a folder with config.json and model.safetensors as the library transformers reads it, for example Meta's "
    "sam-vit-base (Apache-2.0), fetched beforehand; nothing is downloaded here"
)
NOT_SAVED = (
    "a model whose edges come from SAM cannot be saved: its SAM belongs to the user and is no part of a model file; "
    "score and evaluate with it where it was fitted"
)
_SAM = "sam"
_CONFIG_BYTES = diskfile.MIB
_CODE_KEYS = frozenset(
    {"auto_map", "custom_pipelines", "quantization_config", "_attn_implementation", "attn_implementation"}
)
"""Keys of a transformers configuration that make it import or fetch code."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A SAM ready to run: `model`, its weights' SHA-256 in hex and the label made of it, "file:<8 hex>"."""

    model: nn.Module
    label: str
    sha256: str


def read_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read a SAM from a local folder: safetensors only, nothing unpickled, nothing fetched, no code of the folder run.

    Raises:
        MissingExtraError: transformers is not installed.
        InputError: there is no such folder or file; tells what is expected.
        ModelFileError: the folder holds something else than a whole SAM.
    """
    path = Path(folder)
    _check_folder(path)
    transformers = require("transformers", extra="sam", purpose="reading a SAM checkpoint")
    with (path / WEIGHTS).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    with _without_bars(transformers):
        model = _load(transformers, path)
    return Checkpoint(
        model=model.requires_grad_(False).eval(), label=backbones.label_of(sha256), sha256=sha256
    )


def _check_folder(path: Path) -> None:
    """Refuse what is no folder with the two files, another kind of model, and a configuration that calls for code."""
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise InputError(path, f"no {name} in it, expected a SAM checkpoint", HOW_TO_GET)
    if (path / "adapter_config.json").exists():
        raise ModelFileError(
            f"{path}: holds an adapter (adapter_config.json), expected a plain SAM checkpoint"
        )
    source = path / CONFIG
    content = diskfile.read_regular(source, limit=_CONFIG_BYTES)
    config = strictjson.load_object(content, source=str(source))
    if (kind := config.get("model_type")) != "sam":
        raise ModelFileError(f"{source}: model_type is {kind!r}, expected 'sam'")
    for key, value in _items(config):
        if key in _CODE_KEYS and value not in (None, "eager"):
            raise ModelFileError(f"{source}: {key!r} would run or fetch other code; remove it")


def _items(value: object) -> Iterator[tuple[str, object]]:
    """Every key and value of nested JSON."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _items(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _items(inner)


def _load(transformers: Any, path: Path) -> nn.Module:
    """The model with every one of its tensors from the file. Raises ModelFileError."""
    try:
        model, told = transformers.SamModel.from_pretrained(
            path,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
    except UmiadError:
        raise
    except Exception as error:  # whatever a library raises on a damaged file means the same to the user
        raise ModelFileError(
            f"{path}: no SAM can be read: {type(error).__name__}: {str(error)[:300]}"
        ) from error
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if found := sorted(map(str, told.get(what) or ())):
            raise ModelFileError(
                f"{path / WEIGHTS}: {len(found)} {what.replace('_', ' ')}, such as {found[0]}, expected a whole SAM"
            )
    read: nn.Module = model
    return read


@contextmanager
def _without_bars(transformers: Any) -> Iterator[None]:
    """No progress bars of transformers inside; as before outside."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class SamConfig(NetworkConfig):
    """The network's configuration with `edge` "sam".

    `sam`: label of the SAM's weights, "file:<8 hex of the SHA-256>"; `sam_points`: prompted points along a side of
    the image.
    """

    edge: Literal["sam"] = EDGE
    sam: str
    sam_points: int = Field(default=POINTS_PER_SIDE, ge=1, le=64)

    @field_validator("aggregate", "guidance", "fusion", "likelihood")
    @classmethod
    def _known_part(cls, value: str, info: Any) -> str:
        found: str = NetworkConfig._known_part(value, info)
        return found


class SamNetwork(EGMFNetwork):
    """The network with SAM's boundaries in place of the EGM; everything else is the same."""

    edge: _Given

    def __init__(self, config: SamConfig) -> None:
        plain = {key: value for key, value in config.canonical().items() if key in NetworkConfig.model_fields}
        super().__init__(NetworkConfig.parse({**plain, "edge": "none"}))
        self.edge = _Given()

    def forward(self, f1: Tensor, f2: Tensor, f3: Tensor, f4: Tensor, *boundaries: Tensor) -> Latents:
        """Features F1..F4 [B,C_k,H_k,W_k] and boundaries [B,1,S/8,S/8] -> latents of all scales."""
        with self.edge.given(*boundaries):
            return super().forward(f1, f2, f3, f4)


class _Given(SamEdges):
    """`SamEdges` with the slot's call (f1, f2): the boundaries are given around it."""

    _boundaries: Tensor

    @contextmanager
    def given(self, boundaries: Tensor) -> Iterator[None]:
        """Inside, calls are about the images with these boundaries [B,1,S/8,S/8]."""
        self._boundaries = boundaries
        try:
            yield
        finally:
            del self._boundaries

    def forward(self, f1: Tensor, f2: Tensor) -> Tensor:  # type: ignore[override]
        """f1 [B,64,S/4,S/4], f2 [B,128,S/8,S/8] -> f_edge [B,128,S/8,S/8]."""
        return super().forward(f1, f2, self._boundaries)


class SamEGMF(NetworkEGMF):
    """egmf's network whose edges are those a frozen SAM sees; higher scores = more anomalous.

    SAM runs inside `prepare`, so the cache of features holds its result, once per image. Such a model cannot be
    saved (`NOT_SAVED`): `state` leaves SAM out, and nothing rebuilds the detector without the user's folder.
    """

    info: ClassVar[DetectorInfo] = dataclasses.replace(NetworkEGMF.info, not_saved=NOT_SAVED)
    Config: type[SamConfig] = SamConfig
    config: SamConfig
    network: SamNetwork

    def __init__(
        self, config: SamConfig, backbone: Mapping[str, Tensor] | None, boundaries: SamBoundaries
    ) -> None:
        self.config = config
        self.pyramid = Pyramid(backbone, seed=config.seed, backbone=config.backbone)
        self.network = SamNetwork(config)
        self.boundaries = boundaries
        self.module = nn.ModuleDict({"pyramid": self.pyramid, "network": self.network, _SAM: self.boundaries})
        self.fitted = False

    def prepare(self, images: Tensor, *, original_size: Tensor | None = None) -> dict[str, Tensor]:
        """Images [B,3,S,S] -> what the plain network prepares, and "boundaries" [B,1,S/8,S/8]."""
        prepared = super().prepare(images)
        return {**prepared, "boundaries": self.boundaries(images)}

    def parts(self) -> dict[str, nn.Module]:
        """Named parts for parameter counts; "encoder" is all that is frozen: the pyramid and SAM."""
        return {**super().parts(), "encoder": nn.ModuleList([self.pyramid, self.boundaries])}

    def state(self) -> dict[str, Tensor]:
        """All tensors but SAM's."""
        return {key: value for key, value in super().state().items() if not key.startswith(f"{_SAM}.")}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Fill from `state`. Raises ModelFileError on a missing, unknown or misshapen tensor."""
        check_state(state, self.state(), name=self.info.name)
        self.module.load_state_dict(dict(state), strict=False)
        self.fitted = True

    def _latents(self, prepared: Mapping[str, Tensor]) -> Latents:
        latents: Latents = self.network(*(prepared[key] for key in ("f1", "f2", "f3", "f4", "boundaries")))
        return latents


def build(
    folder: str | os.PathLike[str],
    *,
    preset: str = "paper",
    weights: str | os.PathLike[str] = "imagenet",
    size: int = 256,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> SamEGMF:
    """Build egmf's network, unfitted, with edges from the SAM checkpoint in `folder`.

    The rest as in `umiad.build`; `preset` is one of the network's, and `settings` may hold `sam_points`.

    Raises:
        ConfigError: an unknown value, or a preset of the affine design, which has no such slot.
        MissingExtraError, InputError, ModelFileError: see `read_checkpoint`; also for unusable `weights`.
    """
    presets = detectors.detector_class("egmf").presets
    if preset not in presets:
        raise ConfigError(f"unknown preset {preset!r} for egmf{nearest(preset, list(presets))}")
    if "design" in presets[preset]:
        fit = [name for name, values in presets.items() if "design" not in values]
        raise ConfigError(
            f"edges from SAM belong to egmf's network, not to preset {preset!r}; use {', '.join(fit)}"
        )
    given = {**presets[preset], **(settings or {})}
    given["training"] = {**presets[preset].get("training", {}), **(settings or {}).get("training", {})}
    chosen = backbones.resolve(os.fspath(weights), backbone=str(given.get("backbone", "resnet18")))
    checkpoint = read_checkpoint(folder)
    common = {"size": size, "seed": seed, "preset": preset, "weights": chosen.label, "sam": checkpoint.label}
    config = SamConfig.parse({**given, **common, "edge": EDGE})
    boundaries = SamBoundaries(checkpoint.model, points_per_side=config.sam_points)
    return SamEGMF(config, chosen.state, boundaries)
