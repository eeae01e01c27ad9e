"""CutPaste (Li et al., CVPR 2021): a piece of an image, cut out and pasted somewhere else in it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

AREA = (0.02, 0.15)
"""Area of a patch, as a share of the image's."""
ASPECT = (0.3, 3.3)
"""Height of a patch divided by its width; below and above 1 equally often."""
SCAR_WIDTH, SCAR_LENGTH = (2 / 256, 16 / 256), (10 / 256, 25 / 256)
"""Of a scar, as shares of the image's edge: 2 to 16 and 10 to 25 pixels at 256."""
SCAR_TURN = math.pi / 4
"""A scar is turned by at most this angle, either way."""
JITTER = 0.1
"""The contrast of what is pasted changes by at most this factor, its brightness by so many standard deviations."""
CLASSES = ("normal", "cutpaste", "scar")
"""What the labels 0, 1 and 2 stand for."""


@dataclass(frozen=True)
class Piece:
    """One rectangle per image, turned by `angle` where it is pasted; all [B], float32, in pixels and radians.

    `height`, `width`; centres `from_y`, `from_x` (not turned there) and `to_y`, `to_x`. A pixel (i, j) has its centre
    at (i, j). What is pasted is multiplied by `contrast` about its mean, plus `shift` standard deviations of the image.
    """

    height: Tensor
    width: Tensor
    angle: Tensor
    from_y: Tensor
    from_x: Tensor
    to_y: Tensor
    to_x: Tensor
    contrast: Tensor
    shift: Tensor


def patches(count: int, edge: int, *, rng: torch.Generator) -> Piece:
    """Draw `count` upright rectangles with whole numbers of pixels for images of `edge` x `edge` pixels."""
    area = edge**2 * _uniform(count, AREA, rng)
    low, high = (_uniform(count, each, rng) for each in ((ASPECT[0], 1.0), (1.0, ASPECT[1])))
    aspect = torch.where(torch.rand(count, generator=rng) < 0.5, low, high)
    height = (area * aspect).sqrt().round().clamp(1, edge)
    width = (area / aspect).sqrt().round().clamp(1, edge)
    return _placed(edge, (height, width), torch.zeros(count), rng=rng)


def scars(count: int, edge: int, *, rng: torch.Generator) -> Piece:
    """Draw `count` thin rectangles, turned by up to 45 degrees, for images of `edge` x `edge` pixels."""
    width = (edge * _uniform(count, SCAR_WIDTH, rng)).clamp_min(1)
    height = (edge * _uniform(count, SCAR_LENGTH, rng)).clamp_min(1)
    return _placed(edge, (height, width), _uniform(count, (-SCAR_TURN, SCAR_TURN), rng), rng=rng)


def paste(images: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
    """Images [B,C,S,S] with their pieces pasted, and where: bool [B,S,S]. Other pixels stay as they are.

    A turned piece takes the pixel that is nearest to where each of its pixels comes from.
    """
    edge, device = images.shape[-1], images.device
    axis = torch.arange(edge, dtype=torch.float32, device=device)
    y, x = axis[:, None] - _each(piece.to_y, device), axis - _each(piece.to_x, device)  # [B,S,1], [B,1,S]
    cos, sin = _each(piece.angle.cos(), device), _each(piece.angle.sin(), device)
    down, across = cos * y + sin * x, cos * x - sin * y  # [B,S,S], in the piece's own axes
    within = (2 * down.abs() < _each(piece.height, device)) & (2 * across.abs() < _each(piece.width, device))
    rows = (_each(piece.from_y, device) + down).round().long().clamp(0, edge - 1)
    columns = (_each(piece.from_x, device) + across).round().long().clamp(0, edge - 1)
    index = (rows * edge + columns).flatten(1)[:, None].expand(-1, images.shape[1], -1)
    taken = images.flatten(2).gather(2, index).unflatten(2, (edge, edge))
    inside = within[:, None]
    mean = (taken * inside).sum((2, 3), keepdim=True) / inside.sum((2, 3), keepdim=True).clamp_min(1)
    contrast, shift = (_each(each, device)[..., None] for each in (piece.contrast, piece.shift))
    spread = images.std((1, 2, 3), keepdim=True)
    pasted = mean + contrast * (taken - mean) + shift * spread
    return torch.where(inside, pasted, images), within


def three_way(images: Tensor, *, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [B,C,S,S] as they are, with a patch and with a scar: [3B,C,S,S], and their labels int64 [3B].

    The labels are indices of `CLASSES`: B zeros, B ones, B twos. All is drawn from `rng`, whose device is the CPU.
    """
    count, edge = len(images), images.shape[-1]
    drawn = [make(count, edge, rng=rng) for make in (patches, scars)]
    views = [images, *(paste(images, piece)[0] for piece in drawn)]
    labels = torch.arange(len(CLASSES), device=images.device).repeat_interleave(count)
    return torch.cat(views), labels


def _placed(edge: int, size: tuple[Tensor, Tensor], angle: Tensor, *, rng: torch.Generator) -> Piece:
    """Places and jitter for rectangles of `size` (height, width): inside the image before and after the turn."""
    height, width = size
    cos, sin = angle.cos().abs(), angle.sin().abs()
    turned = (height * cos + width * sin, height * sin + width * cos)
    whole = not bool(angle.any())
    from_y, from_x = (_centre(each, edge, rng=rng, whole=whole) for each in size)
    to_y, to_x = (_centre(each, edge, rng=rng, whole=whole) for each in turned)
    contrast = _uniform(len(angle), (1 - JITTER, 1 + JITTER), rng)
    shift = _uniform(len(angle), (-JITTER, JITTER), rng)
    return Piece(height, width, angle, from_y, from_x, to_y, to_x, contrast, shift)


def _centre(length: Tensor, edge: int, *, rng: torch.Generator, whole: bool) -> Tensor:
    """Centres [B] of intervals of `length` [B] inside the `edge` pixels -0.5..edge-0.5; `whole`: of whole pixels."""
    share = torch.rand(len(length), generator=rng)
    if whole:
        start = (share * (edge - length + 1)).floor()
        return start + (length - 1) / 2
    return (length - 1) / 2 + share * (edge - length).clamp_min(0)


def _uniform(count: int, limits: tuple[float, float], rng: torch.Generator) -> Tensor:
    return limits[0] + (limits[1] - limits[0]) * torch.rand(count, generator=rng)


def _each(values: Tensor, device: torch.device) -> Tensor:
    """Values [B] as [B,1,1]."""
    return values.to(device)[:, None, None]
