"""MedViTV2 (Manzari et al., 2025) as a detector, in two designs under one name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from umiad.detectors.contract import Detector, DetectorInfo
from umiad.detectors.medvit_frozen import FrozenConfig, FrozenMedVit
from umiad.detectors.medvit_taught import TaughtConfig, TaughtMedVit


class MedVitConfig:
    """The configuration of either design; `design: "frozen"` in the values names the frozen one."""

    @staticmethod
    def parse(values: Mapping[str, Any]) -> FrozenConfig | TaughtConfig:
        """Build from plain values. Raises ConfigError with the first problem in words."""
        chosen: type[FrozenConfig | TaughtConfig] = FrozenConfig if "design" in values else TaughtConfig
        return chosen.parse(values)


class MedVit:
    """Gaussians of what MedViTV2 finds in an image, in two designs; adapted, the publication has no detector.

    Higher scores = more anomalous. `MedVit(config, backbone)` is a `TaughtMedVit` or a `FrozenMedVit`, as the
    configuration says:

    - without weights (all presets): a network that starts from random weights is taught by CutPaste on the normal
      images themselves (`umiad.detectors.medvit_taught`);
    - with a checkpoint that the user names, `umiad.build("medvit", settings={"checkpoint": FILE})`: its features
      as they are (`umiad.detectors.medvit_frozen`, read by `umiad.medvit_checkpoint`).
    """

    info: ClassVar[DetectorInfo] = TaughtMedVit.info
    Config = MedVitConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = TaughtMedVit.presets

    def __new__(cls, config: FrozenConfig | TaughtConfig, backbone: Mapping[str, Tensor] | None) -> Detector:  # type: ignore[misc]
        """The detector of the design that `config` belongs to."""
        design: Any = FrozenMedVit if isinstance(config, FrozenConfig) else TaughtMedVit
        made: Detector = design(config, backbone)
        return made
