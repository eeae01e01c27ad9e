"""Layer 3: one file per detector, all under the contract in `contract.py`; this is their registry."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from umiad.config import nearest
from umiad.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from umiad.detectors.contract import Detector

REGISTRY: dict[str, str] = {
    "adfa": "umiad.detectors.adfa:Adfa",
    "anovaegan": "umiad.detectors.anovaegan:AnoVaeGan",
    "cflow": "umiad.detectors.cflow:Cflow",
    "egmf": "umiad.detectors.egmf:EGMF",
    "fanogan": "umiad.detectors.fanogan:FAnoGan",
    "fastflow": "umiad.detectors.fastflow:Fastflow",
    "ikd": "umiad.detectors.ikd:Ikd",
    "intensity": "umiad.detectors.intensity:Intensity",
    "medmae": "umiad.detectors.medmae:MedMae",
    "medvit": "umiad.detectors.medvit:MedVit",
    "mlfeu": "umiad.detectors.mlfeu:Mlfeu",
    "msflow": "umiad.detectors.msflow:MSFlow",
    "padim": "umiad.detectors.padim:Padim",
    "patchcore": "umiad.detectors.patchcore:PatchCore",
    "posgauss": "umiad.detectors.posgauss:PosGauss",
    "rd4ad": "umiad.detectors.rd4ad:Rd4ad",
    "size": "umiad.detectors.size:Size",
    "uflow": "umiad.detectors.uflow:UFlow",
}
"""Name -> where the class is; a new detector is one file and one line here."""


def names() -> list[str]:
    """The registered names, sorted."""
    return sorted(REGISTRY)


def detector_class(name: str) -> type[Any]:
    """The class registered under `name`. Raises ConfigError naming the nearest known name."""
    if name not in REGISTRY:
        raise ConfigError(f"unknown detector {name!r}{nearest(name, names())}")
    module, attribute = REGISTRY[name].split(":")
    found: type[Any] = getattr(importlib.import_module(module), attribute)
    return found


def preset_config(name: str, preset: str, **common: Any) -> Any:
    """The configuration of detector `name` under `preset`, with `common` fields set (size, seed, weights).

    Raises ConfigError for an unknown detector, preset or field.
    """
    cls = detector_class(name)
    if preset not in cls.presets:
        raise ConfigError(f"unknown preset {preset!r} for {name}{nearest(preset, list(cls.presets))}")
    return cls.Config.parse({**cls.presets[preset], **common, "preset": preset})


def make(name: str, config: Mapping[str, Any], backbone: Mapping[str, Tensor] | None) -> Detector:
    """Build an unfitted detector from plain configuration and the backbone's tensors (None = random)."""
    cls = detector_class(name)
    detector: Detector = cls(cls.Config.parse(config), backbone)
    return detector
