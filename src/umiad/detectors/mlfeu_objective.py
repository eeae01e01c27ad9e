"""Slot `objective` of mlfeu: what its network learns from normal images, and how its output becomes a map.

All are built as `OBJECTIVES[name](config)` and called alike. A `network` maps images [B,1,e,e] to values [B,1,e,e].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from umiad import synthetic
from umiad.nn.image_loss import cross_entropy, dice_loss, structural_similarity
from umiad.nn.noise import coarse_noise, foreground

if TYPE_CHECKING:
    from umiad.detectors.mlfeu import MlfeuConfig

Network = Callable[[Tensor], Tensor]


class Objective(Protocol):
    """What every objective can do."""

    def losses(self, network: Network, images: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        """Scalars for normal images [B,1,e,e] with grey values in 0..1; "total" is minimised."""
        ...

    def judge(self, network: Network, images: Tensor) -> Tensor:
        """Images [B,1,e,e] -> their map [B,1,e,e], higher = more anomalous; nothing is drawn at random."""
        ...


class Plain:
    """Restore the image from itself, for tests: with skip connections the network learns to pass everything."""

    def __init__(self, config: MlfeuConfig) -> None:
        self.config = config

    def disturb(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """What the network is shown in place of images [B,1,e,e]: the same."""
        return images

    def losses(self, network: Network, images: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        """Mean squared error of the restored images, plus `ssim` times 1 - SSIM."""
        restored = network(self.disturb(images, rng))
        squared = F.mse_loss(restored, images)
        unlike = 1 - structural_similarity(restored, images)
        return {"total": squared + self.config.ssim * unlike, "squared": squared, "unlike": unlike}

    def judge(self, network: Network, images: Tensor) -> Tensor:
        """abs(x - f(x)), in grey values."""
        return (images - network(images)).abs()


class Denoise(Plain):
    """Restore the image from one with coarse noise on its foreground; what looks like such noise is taken away."""

    def disturb(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Images [B,1,e,e] plus noise."""
        noise = coarse_noise(images, std=self.config.noise, cells=self.config.cells, rng=rng)
        return images + noise * foreground(images, level=self.config.foreground)


class Lesions:
    """Outline lesions that were planted in normal images: `umiad.synthetic`, all families, a share of images."""

    def __init__(self, config: MlfeuConfig) -> None:
        self.config = config

    def losses(self, network: Network, images: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        """Cross-entropy plus Dice loss of the planted masks."""
        planted, masks = plant(images, share=self.config.planted, rng=rng)
        logits = network(planted)
        entropy, dice = cross_entropy(logits, masks), dice_loss(logits, masks)
        return {"total": entropy + dice, "entropy": entropy, "dice": dice}

    def judge(self, network: Network, images: Tensor) -> Tensor:
        """The network's probability, 0..1; none of a disease."""
        return torch.sigmoid(network(images.clamp(0, 1)))


def plant(images: Tensor, *, share: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [B,1,e,e] -> the same clipped to 0..1 with something planted in `share` of them, and its masks (0, 1).

    Family and area (log-uniform) are drawn per image; texture comes from the others of the batch, where there are any.
    """
    pixels = images.detach().clamp(0, 1).cpu().float()
    grey, masks = pixels[:, 0].numpy(), np.zeros(pixels[:, 0].shape, dtype=np.float32)
    generator = np.random.default_rng(int(torch.randint(1 << 62, (1,), generator=rng)))
    families = [name for name in synthetic.FAMILIES if len(grey) > 1 or name != "texture"]
    altered = []
    for number, image in enumerate(grey):
        found = image
        if generator.random() < share:
            anomaly = synthetic.plant(
                image,
                family=families[int(generator.integers(len(families)))],
                area=float(np.exp(generator.uniform(*np.log(synthetic.AREAS)))),
                donors=[*grey[:number], *grey[number + 1 :]],
                rng=generator,
            )
            found, masks[number] = anomaly.pixels, anomaly.mask
        altered.append(found)
    stacked = np.stack([np.stack(altered), masks])[:, :, None]
    planted, covered = torch.from_numpy(stacked).to(images)
    return planted, covered


OBJECTIVES: Mapping[str, Callable[[MlfeuConfig], Objective]] = MappingProxyType(
    {"denoise": Denoise, "lesions": Lesions, "plain": Plain}
)
"""Name -> objective."""
