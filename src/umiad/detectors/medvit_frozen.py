"""The design of `medvit` for those who have a checkpoint: its features are taken as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from umiad.detectors.contract import DetectorInfo
from umiad.detectors.guards import check_state, evaluating
from umiad.detectors.medvit_gaussians import GaussiansConfig, MedVitGaussians
from umiad.nn.medvit import MedVitNetwork


class FrozenConfig(GaussiansConfig):
    """What both designs have; `weights` is the checkpoint's label. Published ones were trained in `official_layout`."""

    design: Literal["frozen"] = "frozen"
    official_layout: bool = True
    image_score: Literal["embedding", "map"] = "map"


class FrozenMedVit(MedVitGaussians):
    """PaDiM's recipe on the features of a MedViTV2 that somebody trained before; nothing is trained here.

    Higher scores = more anomalous. Gaussians of 100 randomly drawn channels of stages 2 and 3 per position, shrunk by
    Ledoit and Wolf's formula; the map holds their Mahalanobis distances, bilinear to S x S, smoothed by 4 pixels,
    and the image score is its maximum (or the distance of the pooled embedding).

    `backbone`: the network's tensors by our names, without a classifier (`umiad.medvit_checkpoint` reads them from a
    file with the published names); None = random weights, for tests. The network becomes a part of a saved model,
    which needs no file beside it.

    Our choice: frozen features with Gaussians, as for the ResNets of padim; the publication has no detector. Our
    choice: images are normalised with ImageNet's mean and spread, as those the published weights were trained on.
    """

    info: ClassVar[DetectorInfo] = DetectorInfo(
        name="medvit",
        summary="one Gaussian per position on 100 random channels of a MedViTV2 from a checkpoint",
        reference="after Manzari et al., MedViTV2, Applied Soft Computing 2025, arXiv:2502.13693",
        fidelity="adapted",
        closed_form=True,
        supports_resume=False,
    )
    Config = FrozenConfig
    config: FrozenConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"design": "frozen"},
        "default": {"design": "frozen"},
        "quick": {"design": "frozen", "edge": 128},
    }

    def __init__(self, config: FrozenConfig, backbone: Mapping[str, Tensor] | None) -> None:
        network = MedVitNetwork(
            config.network, classes=1, seed=config.seed, official=config.official_layout
        ).without_classifier()
        if backbone is not None:
            check_state(backbone, network.state_dict(), name=f"MedViTV2-{config.network}")
            network.load_state_dict(dict(backbone))
        super().__init__(config, network.requires_grad_(False))

    def steps(self, prepared: dict[str, Tensor], rng: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """Nothing to minimise."""
        return iter(())

    def param_groups(self) -> list[dict[str, Any]]:
        """No trainable parameters."""
        return []

    def monitor(self, prepared: dict[str, Tensor]) -> dict[str, float]:
        """Mean squared distance per dimension of what is at the positions; about 1 for images like the fitted ones."""
        if not self.fitted:
            return {}
        with evaluating(self.module):
            squared = [
                self.positions.distance(self._fibres(found)).square().flatten()
                for found in self._features(prepared["image"])
            ]
            return {"distance_per_dim": float(torch.cat(squared).mean()) / len(self.index)}

    def parts(self) -> dict[str, nn.Module]:
        """Named parts for parameter counts; the network is frozen, so it is the "encoder"."""
        return {"encoder": self.network, "embedding": self.embedding, "positions": self.positions}
