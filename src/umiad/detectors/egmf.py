"""UMIAD-EGMF: two designs under one name, the paper's network and the affine flows that are its default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from umiad.detectors.contract import Detector, DetectorInfo
from umiad.detectors.egmf_affine import AffineConfig, AffineEGMF
from umiad.detectors.egmf_network import NetworkConfig, NetworkEGMF


class EGMFConfig:
    """The configuration of either design; `design: "affine"` in the values names the affine one."""

    @staticmethod
    def parse(values: Mapping[str, Any]) -> AffineConfig | NetworkConfig:
        """Build from plain values. Raises ConfigError with the first problem in words."""
        chosen: type[AffineConfig | NetworkConfig] = AffineConfig if "design" in values else NetworkConfig
        return chosen.parse(values)


class EGMF:
    """The paper's idea in two designs: edges guide deep features, conditional flows, scales fused, exact density.

    Higher scores = more anomalous. `EGMF(config, backbone)` is an `AffineEGMF` or a `NetworkEGMF`, as the
    configuration says. Presets:

    - "paper": the network with the published constants, for reproduction (`umiad.detectors.egmf_network`);
    - "ablation": the same network in 15 epochs (batches of 16, 1e-3 falling along a cosine: the best likelihood of
      held-out normal images of BUSI among the schedules of benchmarks/ablation_schedule.py), for comparing its
      parts (docs/results.md, Tables 5 to 8);
    - "default": affine flows, fitted in closed form (`umiad.detectors.egmf_affine`). Settings chosen on
      normal images only (docs/decisions/0005); outlines far better than the network, and detects at least as well
      (docs/results.md);
    - "quick": the same without the mirrored image: one pass through the backbone per image instead of two, weaker
      where the two sides of the body should look alike (docs/results.md, ingredient no-mirror).
    """

    info: ClassVar[DetectorInfo] = AffineEGMF.info
    Config = EGMFConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": NetworkEGMF.presets["paper"],
        "ablation": NetworkEGMF.presets["ablation"],
        "default": AffineEGMF.presets["default"],
        "quick": AffineEGMF.presets["quick"],
    }

    def __new__(cls, config: AffineConfig | NetworkConfig, backbone: Mapping[str, Tensor] | None) -> Detector:  # type: ignore[misc]
        """The detector of the design that `config` belongs to."""
        design: Any = AffineEGMF if isinstance(config, AffineConfig) else NetworkEGMF
        made: Detector = design(config, backbone)
        return made
