"""AnoVAEGAN (Baur et al., 2018): what a variational autoencoder with a critic does not restore is abnormal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from umiad.config import DetectorConfig, TrainingConfig
from umiad.detectors.contract import DetectorInfo
from umiad.detectors.guards import check_fitted, check_images, check_state, evaluating
from umiad.nn.encoder import seeded
from umiad.nn.parts import in_parts
from umiad.nn.pixels import grey
from umiad.nn.precision import exact
from umiad.nn.vae import ConvolutionalCritic, Decoder, GaussianEncoder, kl_divergence, sample
from umiad.nn.wgan import critic_loss, frozen, generator_loss
from umiad.scoring import smooth_cells, top_mean
from umiad.types import Scores

IMAGES_AT_ONCE = 32
"""Images that pass the networks together outside training: bounds the memory."""


class AnoVaeGanConfig(DetectorConfig):
    """How large the networks are, and how the critic is trained.

    The networks see grey images of `edge` pixels (smaller images: the largest power of two that fits); `width` is
    the smallest number of their channels, `latent` the length of the latents. `critic_steps` of the critic per batch;
    `penalty` weighs the gradient penalty. `top_fraction`: share of the highest pixels of the map whose mean is the
    image score.
    """

    edge: Literal[32, 64, 128, 256] = 128
    width: int = Field(default=32, ge=2, le=128)
    latent: int = Field(default=128, ge=1, le=1024)
    critic_steps: int = Field(default=5, ge=1, le=20)
    penalty: float = Field(default=10.0, gt=0)
    top_fraction: float = Field(default=0.1, gt=0, le=1)
    training: TrainingConfig = TrainingConfig(epochs=1000, batch_size=8, learning_rate=1e-4, clip_norm=None)

    @property
    def working_edge(self) -> int:
        """Edge in pixels of what the networks see."""
        return 1 << (min(self.edge, self.size).bit_length() - 1)


class AnoVaeGan:
    """An autoencoder learns normal images, a critic keeps its images sharp; the score is what it does not restore.

    Per batch: one step of encoder and decoder on |x - x'|_1 + KL (both summed, in grey levels of 0..1 and nats,
    mean over images), one of the decoder on the critic's value of x', `critic_steps` of the critic with gradient
    penalty. Higher scores = more anomalous: the map is |x - x'| of grey values in 0..1, where x' is decoded from the
    latents' mean, so that nothing is drawn at random; it is upsampled bilinearly to S x S. Without a backbone:
    `backbone` and `weights` are not used. In the log, "loss" is a mean over steps of different networks;
    "l1_per_dim" tells how well images are restored.

    Presets. "paper": the constants of Denner's re-implementation (128 px, dense latents). "default" is meant to
    fit 100 images in minutes on 2 cores: 64 px, 2 steps of the critic instead of 5, 60 epochs in batches of 4 at ten
    times the rate, which falls along a cosine, since the last epoch counts. "quick": a quarter of the channels
    of that, one step of the critic, 40 epochs.

    Our choice: the image score is the mean of the highest tenth of the map (`top_fraction`), since the publication
    judges pixels only. Our choice: the encoder has the decoder's LayerNorm, as no description names its own.
    Deviation: no brain mask and no median filter of the map (images need not be brains; `sigma` smooths it), and both
    signs of x - x' count (lesions need not be bright). Deviation: both losses of the decoder share Adam's moments;
    lest the larger one drown the other, the first is divided by the square root of the number of pixels: its gradient
    by an image then has length 1, and there the penalty also keeps the critic's. Adam does not notice the factor
    otherwise.
    """

    info: ClassVar[DetectorInfo] = DetectorInfo(
        name="anovaegan",
        summary="what a variational autoencoder trained with a critic does not restore",
        reference="Baur et al., Deep Autoencoding Models for Unsupervised Anomaly Segmentation in Brain MR Images, "
        "BrainLes 2018, arXiv:1804.04488",
        uses_backbone=False,
    )
    Config = AnoVaeGanConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "training": {"epochs": 1000, "batch_size": 8, "learning_rate": 1e-4, "clip_norm": None},
        },
        "default": {
            "edge": 64,
            "critic_steps": 2,
            "training": {
                "epochs": 60,
                "batch_size": 4,
                "learning_rate": 1e-3,
                "clip_norm": None,
                "schedule": "cosine",
            },
        },
        "quick": {
            "edge": 64,
            "width": 8,
            "critic_steps": 1,
            "training": {
                "epochs": 40,
                "batch_size": 4,
                "learning_rate": 1e-3,
                "clip_norm": None,
                "schedule": "cosine",
            },
        },
    }

    def __init__(self, config: AnoVaeGanConfig, backbone: Mapping[str, Tensor] | None) -> None:
        self.config = config
        edge, width, latent = config.working_edge, config.width, config.latent
        with seeded(config.seed):
            self.encoder = GaussianEncoder(edge, width=width, latent=latent)
            self.decoder = Decoder(edge, width=width, latent=latent)
            self.critic = ConvolutionalCritic(edge, width=width)
        self.module = nn.ModuleDict(self.parts())
        self.fitted = False

    def prepare(self, images: Tensor, *, original_size: Tensor | None = None) -> dict[str, Tensor]:
        """Images [B,3,S,S] -> {"grey": [B,1,edge,edge]} in 0..1."""
        check_images(images, size=self.config.size)
        return {"grey": grey(images, self.config.working_edge)}

    def steps(self, prepared: dict[str, Tensor], rng: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """One step of encoder and decoder, one of the decoder against the critic, then the critic's."""
        self.fitted = True
        real = prepared["grey"]
        yield {"total": self._autoencoder_loss(real, rng)}
        latents = self._latents(real, rng)
        with frozen(self.critic):
            loss = generator_loss(self.critic, self.decoder(latents))
        yield {"total": loss}
        for _ in range(self.config.critic_steps):
            with torch.no_grad():
                fake = self.decoder(self._latents(real, rng))
            yield {"total": critic_loss(self.critic, real, fake, rng=rng, penalty=self.config.penalty)}

    def param_groups(self) -> list[dict[str, Any]]:
        """One group per network."""
        betas = (0.5, 0.9)
        return [{"params": list(part.parameters()), "betas": betas} for part in self.parts().values()]

    def monitor(self, prepared: dict[str, Tensor]) -> dict[str, float]:
        """Mean absolute error of the restored images per pixel (grey values in 0..1), and the latents' KL in nats."""
        errors, divergences = [], []
        with evaluating(self.module):
            for real in in_parts(prepared["grey"], IMAGES_AT_ONCE):
                mean, log_variance = self.encoder(real)
                errors.append((real - self.decoder(mean)).abs().flatten(1).mean(1))
                divergences.append(kl_divergence(mean, log_variance))
            found = {"l1_per_dim": errors, "kl": divergences}
            return {name: float(exact(torch.cat(values)).mean()) for name, values in found.items()}

    def score(self, images: Tensor, *, original_size: Tensor | None = None) -> Scores:
        """Scores of images [B,3,S,S]; higher = more anomalous. Raises NotFittedError, InputError."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        return self.score_prepared(self.prepare(images))

    def score_prepared(self, prepared: dict[str, Tensor]) -> Scores:
        """Scores from grey images, as the class docstring says."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        residuals = []
        with evaluating(self.module):
            for real in in_parts(prepared["grey"], IMAGES_AT_ONCE):
                residual = (real - self.decoder(self.encoder(real)[0])).abs()
                residuals.append(residual[:, 0])
            smoothed = smooth_cells(torch.cat(residuals), self.config.size, self.config.sigma)
            return Scores(smoothed, top_mean(smoothed, self.config.top_fraction))

    def parts(self) -> dict[str, nn.Module]:
        """Named parts for parameter counts; nothing is frozen."""
        return {"latent_encoder": self.encoder, "decoder": self.decoder, "critic": self.critic}

    def state(self) -> dict[str, Tensor]:
        """All tensors."""
        return {key: value.detach() for key, value in self.module.state_dict().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Fill from `state`. Raises ModelFileError on a missing, unknown or misshapen tensor."""
        check_state(state, self.module.state_dict(), name=self.info.name)
        self.module.load_state_dict(dict(state))
        self.fitted = True

    def _autoencoder_loss(self, real: Tensor, rng: torch.Generator) -> Tensor:
        """Summed absolute error plus KL divergence, mean over images [B,1,e,e], divided by e: a scalar."""
        mean, log_variance = self.encoder(real)
        restored = self.decoder(sample(mean, log_variance, rng=rng))
        error = (real - restored).abs().flatten(1).sum(1)
        pixels = real[0].numel()
        return (error + kl_divergence(mean, log_variance)).mean() / math.sqrt(pixels)

    @torch.no_grad()
    def _latents(self, real: Tensor, rng: torch.Generator) -> Tensor:
        """Latents [B,latent] drawn for images [B,1,e,e], without gradients."""
        return sample(*self.encoder(real), rng=rng)
