"""Losses that compare an image with an image: structural similarity, and cross-entropy with Dice for masks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SSIM_RADIUS, SSIM_SIGMA = 5, 1.5
"""Window of the structural similarity: 11 x 11 pixels under a Gaussian of 1.5."""
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2
"""Its stabilisers, for grey values in 0..1."""
SMOOTHED = 1.0
"""Added to both parts of the Dice ratio, so that no mask and no segmentation agree."""


def structural_similarity(first: Tensor, second: Tensor) -> Tensor:
    """SSIM of images [B,1,h,w] in 0..1 (edges at least 11), mean over all windows within the image and over B.

    1 for equal images, a scalar in -1..1. Wang et al., IEEE TIP 2004.
    """
    rows, columns = (_windows(length).to(first) for length in first.shape[-2:])
    stacked = torch.stack([first, second, first.square(), second.square(), first * second])
    local = rows @ stacked @ columns.mT
    mean1, mean2, square1, square2, product = local
    variances = (square1 + square2 - mean1.square() - mean2.square()).clamp_min(0)
    covariance = product - mean1 * mean2
    brightness = (2 * mean1 * mean2 + SSIM_C1) / (mean1.square() + mean2.square() + SSIM_C1)
    return (brightness * (2 * covariance + SSIM_C2) / (variances + SSIM_C2)).mean()


def _windows(length: int) -> Tensor:
    """Gaussian means of all windows within `length` values, as a matrix [length - 10,length] whose rows sum to 1."""
    offsets = torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1)
    weights = torch.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    count = length - 2 * SSIM_RADIUS
    source = torch.arange(count)[:, None] + SSIM_RADIUS + offsets
    return torch.zeros(count, length).scatter_(1, source, (weights / weights.sum()).expand(count, -1))


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """1 - Dice of probabilities sigmoid(logits) and masks (0 and 1), both [B,1,h,w]; mean over images, in 0..1.

    Per image (2 sum p m + 1) / (sum p + sum m + 1): 1 where both are empty.
    """
    probabilities = torch.sigmoid(logits).flatten(1)
    truth = masks.flatten(1)
    both = (probabilities * truth).sum(1)
    dice = (2 * both + SMOOTHED) / (probabilities.sum(1) + truth.sum(1) + SMOOTHED)
    return (1 - dice).mean()


def cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy in nats, mean over pixels and images; logits and masks (0 and 1) [B,1,h,w]."""
    return F.binary_cross_entropy_with_logits(logits, masks)
