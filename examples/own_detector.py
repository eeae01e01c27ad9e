"""A detector of your own in one class: how far each pixel lies from the mean of the normal images.

The battery runs on it as on our own detectors, and fitting, scoring and saving know nothing but the contract.
"""

from typing import ClassVar

import numpy as np
import torch
from torch import nn

import umiad
from umiad.detectors.check import examine
from umiad.detectors.contract import DetectorConfig, DetectorInfo
from umiad.detectors.guards import check_fitted, check_images, check_state, evaluating
from umiad.scoring import maximum, smooth
from umiad.types import Scores


class MeanConfig(DetectorConfig):
    """What users can set, beside `size`, `seed`, `training` and so on, which every detector has."""

    sigma: float = 4.0  # pixels; smoothing of the map
    floor: float = 0.1  # smallest standard deviation


class MeanDetector:
    """Distance of each pixel to the mean image, in standard deviations. The three presets are the same."""

    info = DetectorInfo(
        name="mean-image",
        summary="distance of each pixel to the mean image",
        reference="none; an example",
        closed_form=True,  # statistics are collected; there are no gradients and no epochs
        uses_seed=False,  # nothing is drawn at random
    )
    Config = MeanConfig
    presets: ClassVar[dict] = {"paper": {}, "default": {}, "quick": {}}

    def __init__(self, config, backbone):
        self.config, self.fitted, self.batches = config, False, []
        self.module = nn.Module()  # holds everything that is saved
        self.module.register_buffer("mean", torch.zeros(config.size, config.size))
        self.module.register_buffer("std", torch.ones(config.size, config.size))

    def prepare(self, images, *, original_size=None):
        """What frozen parts yield, the batch first: computed once per image and cached."""
        check_images(images, size=self.config.size)
        return {"grey": images.mean(1)}

    def collect(self, prepared):
        """Take one batch of normal images."""
        self.batches.append(prepared["grey"].double())

    def finish(self, rng):
        """Turn what was collected into the fitted model."""
        grey = torch.cat(self.batches)
        self.module.mean.copy_(grey.mean(0))
        self.module.std.copy_(grey.std(0).clamp_min(self.config.floor))
        self.batches, self.fitted = [], True

    def steps(self, prepared, rng):
        """Nothing to minimise; a trained detector yields {"total": loss, ...}, one or more per batch."""
        return iter(())

    def param_groups(self):
        """Parameter groups for the optimiser."""
        return []

    def monitor(self, prepared):
        """Numbers for the training log."""
        return {}

    def score(self, images, *, original_size=None):
        """Scores of images [B,3,S,S]; higher = more anomalous."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        return self.score_prepared(self.prepare(images))

    def score_prepared(self, prepared):
        """The same from what `prepare` returned."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        with evaluating(self.module):
            distance = ((prepared["grey"] - self.module.mean) / self.module.std).abs()
            anomaly_map = smooth(distance, self.config.sigma)
            return Scores(anomaly_map, maximum(anomaly_map))

    def parts(self):
        """What parameter tables count; "encoder" would be a frozen backbone."""
        return {"statistics": self.module}

    def state(self):
        """All tensors that are saved."""
        return dict(self.module.state_dict())

    def load_state(self, state):
        """Fill from `state`; fitted from now on."""
        check_state(state, self.module.state_dict(), name=self.info.name)
        self.module.load_state_dict(dict(state))
        self.fitted = True


def make(seed, size=64):
    """An unfitted detector, which is all that the battery wants."""
    return MeanDetector(MeanConfig(size=size, seed=seed), None)


result = examine(make)
print(f"{len(result.ran)} checks passed; left out: {dict(result.exempt)}")

normal = np.random.default_rng(0).normal(0.5, 0.05, size=(24, 96, 96)).clip(0, 1)
model = umiad.fit(make(seed=0), normal)
strange = normal[0].copy()
strange[30:50, 40:60] = 1.0
for finding in model.score([normal[1], strange]):
    print(f"score {finding.image_score:.2f}", "unusual" if finding.above_threshold else "usual")
