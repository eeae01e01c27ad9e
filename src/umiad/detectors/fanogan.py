"""f-AnoGAN (Schlegl et al., 2019): what a generator of normal images cannot restore is abnormal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from umiad.config import DetectorConfig, TrainingConfig
from umiad.detectors.contract import DetectorInfo
from umiad.detectors.guards import check_fitted, check_images, check_state, evaluating
from umiad.nn.encoder import seeded
from umiad.nn.gan import Critic, Generator, LatentEncoder
from umiad.nn.parts import in_parts
from umiad.nn.pixels import grey
from umiad.nn.precision import exact
from umiad.nn.wgan import critic_loss, frozen, generator_loss
from umiad.scoring import smooth_cells
from umiad.types import Scores

IMAGES_AT_ONCE = 32
"""Images that pass the networks together outside training: bounds the memory."""
BETAS = (0.0, 0.9)
"""Adam's betas for generator and critic (Gulrajani et al., 2017)."""


class FAnoGanConfig(DetectorConfig):
    """How large the networks are, and how long each phase of the training lasts.

    The networks see grey images of `edge` pixels (smaller images: the largest power of two that fits); `width` is
    the smallest number of their channels, `latent` the length of the latents, which the encoder keeps in -1..1 by
    tanh where `bounded`. `critic_steps` of the critic for each of the generator; `penalty` weighs the gradient
    penalty, `kappa` the difference of the critic's features. The first `gan_share` of the epochs train generator and
    critic, the rest the encoder at `encoder_rate` times the learning rate; `alongside`: the encoder also takes a step
    per batch in the first phase.
    """

    edge: Literal[32, 64, 128] = 64
    width: int = Field(default=64, ge=2, le=64)
    latent: int = Field(default=128, ge=1, le=1024)
    bounded: bool = True
    critic_steps: int = Field(default=5, ge=1, le=20)
    penalty: float = Field(default=10.0, gt=0)
    kappa: float = Field(default=1.0, ge=0)
    gan_share: float = Field(default=0.5, gt=0, lt=1)
    encoder_rate: float = Field(default=0.5, gt=0, le=100)
    alongside: bool = False
    training: TrainingConfig = TrainingConfig(epochs=1000, batch_size=64, learning_rate=1e-4, clip_norm=None)

    @model_validator(mode="after")
    def _both_phases(self) -> Self:
        if self.training.epochs < 2 and not self.alongside:
            raise ValueError("two phases need at least 2 epochs, or 'alongside'")
        return self

    @property
    def working_edge(self) -> int:
        """Edge in pixels of what the networks see."""
        return 1 << (min(self.edge, self.size).bit_length() - 1)

    @property
    def gan_epochs(self) -> int:
        """Epochs of the first phase: at least one, and one less than all of them where there are several."""
        epochs = self.training.epochs
        return max(1, min(round(self.gan_share * epochs), epochs - 1))


class FAnoGan:
    """A generator learns normal images, an encoder its inverse; the score is what both together do not restore.

    Phase 1: generator G and critic D, a Wasserstein GAN with gradient penalty. Phase 2: encoder E with G and D
    frozen and in evaluation mode, minimising |x - G(E(x))|^2 / pixels + kappa |f(x) - f(G(E(x)))|^2 / features, f
    being D's coarsest maps. The same sum is the image score; the map is |x - G(E(x))| of grey values x in -1..1, so
    0..2, upsampled bilinearly to S x S. Higher scores = more anomalous. Without a backbone: `backbone` and `weights`
    are not used. In the log, "loss" is a mean over steps of different networks; "mse_per_dim" tells how well images
    are restored.

    Presets. "paper": the published constants; the number of epochs is ours. "default" is meant to fit 100 images in
    minutes on 2 cores: an eighth of the channels, 2 steps of the critic instead of 5, batches of 4 instead of 64 for
    as many steps as possible, at ten times the rate, which falls along a cosine, since the last epoch counts. The
    latents are unbounded, which is what the published code does unless told, and the encoder also learns alongside
    phase 1. "quick": half the channels of that, one step of the critic, fewer epochs. That is some 300 (quick) or
    1,200 steps of the generator, few for a GAN: images are restored coarsely.

    Deviation: the encoder is trained by Adam, not by RMSProp. Deviation: the publication counts iterations, ours
    epochs. Deviation: the critic's steps of one cycle see the same real images, with other latents; published are
    other images for each. Deviation: in "default" and "quick", E takes a step per batch in phase 1 too, with G and D
    frozen for it.
    """

    info: ClassVar[DetectorInfo] = DetectorInfo(
        name="fanogan",
        summary="what a GAN of normal images and an encoder into its latents do not restore",
        reference="Schlegl et al., f-AnoGAN, Medical Image Analysis 2019, doi:10.1016/j.media.2019.01.010",
        uses_backbone=False,
    )
    Config = FAnoGanConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "training": {"epochs": 1000, "batch_size": 64, "learning_rate": 1e-4, "clip_norm": None},
        },
        "default": {
            "width": 8,
            "bounded": False,
            "critic_steps": 2,
            "gan_share": 0.6,
            "alongside": True,
            "training": {
                "epochs": 80,
                "batch_size": 4,
                "learning_rate": 1e-3,
                "clip_norm": None,
                "schedule": "cosine",
            },
        },
        "quick": {
            "width": 4,
            "bounded": False,
            "critic_steps": 1,
            "gan_share": 0.6,
            "alongside": True,
            "training": {
                "epochs": 20,
                "batch_size": 4,
                "learning_rate": 1e-3,
                "clip_norm": None,
                "schedule": "cosine",
            },
        },
    }

    def __init__(self, config: FAnoGanConfig, backbone: Mapping[str, Tensor] | None) -> None:
        self.config = config
        edge, width, latent = config.working_edge, config.width, config.latent
        with seeded(config.seed):
            self.generator = Generator(edge, width=width, latent=latent)
            self.critic = Critic(edge, width=width)
            self.encoder = LatentEncoder(edge, width=width, latent=latent, bounded=config.bounded)
        self.module = nn.ModuleDict(self.parts())
        self.epoch = 1
        self.fitted = False

    def prepare(self, images: Tensor, *, original_size: Tensor | None = None) -> dict[str, Tensor]:
        """Images [B,3,S,S] -> {"grey": [B,1,edge,edge]} in -1..1."""
        check_images(images, size=self.config.size)
        return {"grey": 2 * grey(images, self.config.working_edge) - 1}

    def begin_epoch(self, number: int) -> None:
        """Epochs up to `config.gan_epochs` are phase 1, the others phase 2."""
        self.epoch = number

    def steps(self, prepared: dict[str, Tensor], rng: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """Phase 1: the critic's steps and one of the generator. Phase 2, or alongside: one of the encoder."""
        self.fitted = True
        real = prepared["grey"]
        adversarial = self.epoch <= self.config.gan_epochs
        if adversarial:
            self.generator.train()
            yield from self._critic_steps(real, rng)
            with frozen(self.critic):
                loss = generator_loss(self.critic, self.generator(self._latents(real, rng)))
            yield {"total": loss}
        if not adversarial or self.config.alongside:
            self.encoder.train()
            with frozen(self.generator, self.critic):
                loss = self._distance(real, self._restored(real)).mean()
            yield {"total": loss}

    def param_groups(self) -> list[dict[str, Any]]:
        """One group per network."""
        rate = self.config.encoder_rate * self.config.training.learning_rate
        return [
            {"params": list(self.generator.parameters()), "betas": BETAS},
            {"params": list(self.critic.parameters()), "betas": BETAS},
            {"params": list(self.encoder.parameters()), "lr": rate},
        ]

    def monitor(self, prepared: dict[str, Tensor]) -> dict[str, float]:
        """Mean squared error of the restored images per pixel (grey values in -1..1)."""
        with evaluating(self.module):
            errors = [(x - self._restored(x)).square().flatten(1).mean(1) for x in _parts(prepared)]
            return {"mse_per_dim": float(exact(torch.cat(errors)).mean())}

    def score(self, images: Tensor, *, original_size: Tensor | None = None) -> Scores:
        """Scores of images [B,3,S,S]; higher = more anomalous. Raises NotFittedError, InputError."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        return self.score_prepared(self.prepare(images))

    def score_prepared(self, prepared: dict[str, Tensor]) -> Scores:
        """Scores from grey images, as the class docstring says."""
        check_fitted(fitted=self.fitted, name=self.info.name)
        residuals, scores = [], []
        with evaluating(self.module):
            for real in _parts(prepared):
                restored = self._restored(real)
                residuals.append((real - restored).abs()[:, 0])
                scores.append(self._distance(real, restored))
            maps = smooth_cells(torch.cat(residuals), self.config.size, self.config.sigma)
            return Scores(maps, torch.cat(scores))

    def parts(self) -> dict[str, nn.Module]:
        """Named parts for parameter counts; nothing is frozen from the start."""
        return {"generator": self.generator, "critic": self.critic, "latent_encoder": self.encoder}

    def state(self) -> dict[str, Tensor]:
        """All tensors."""
        return {key: value.detach() for key, value in self.module.state_dict().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Fill from `state`. Raises ModelFileError on a missing, unknown or misshapen tensor."""
        check_state(state, self.module.state_dict(), name=self.info.name)
        self.module.load_state_dict(dict(state))
        self.fitted = True

    def _critic_steps(self, real: Tensor, rng: torch.Generator) -> Iterator[dict[str, Tensor]]:
        for _ in range(self.config.critic_steps):
            with torch.no_grad():
                fake = self.generator(self._latents(real, rng))
            yield {"total": critic_loss(self.critic, real, fake, rng=rng, penalty=self.config.penalty)}

    def _latents(self, real: Tensor, rng: torch.Generator) -> Tensor:
        """As many standard normal latents [B,latent] as there are images."""
        return torch.randn(len(real), self.config.latent, generator=rng).to(real)

    def _restored(self, real: Tensor) -> Tensor:
        """G(E(x)) of images [B,1,edge,edge]."""
        restored: Tensor = self.generator(self.encoder(real))
        return restored

    def _distance(self, real: Tensor, restored: Tensor) -> Tensor:
        """Mean squared difference of pixels plus kappa times that of the critic's features, [B]."""
        pixels = (real - restored).square().flatten(1).mean(1)
        features = self.critic.features(real) - self.critic.features(restored)
        return pixels + self.config.kappa * features.square().flatten(1).mean(1)


def _parts(prepared: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    return in_parts(prepared["grey"], IMAGES_AT_ONCE)
