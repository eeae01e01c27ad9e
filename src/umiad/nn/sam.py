"""Edges from the segment anything model (SAM) in place of the EGM (Table 7). The model itself is handed in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from umiad.nn.edge import gradient_kernel, magnitude
from umiad.nn.encoder import grid

CELL = 8
"""Pixels of the input per cell of the boundary map: F2's stride."""
POINTS_PER_SIDE = 16
NMS_IOU = 0.7
"""Of two masks whose boxes overlap more than this, the one that the model rates lower is left out."""
PROMPTS_AT_ONCE, MASKS_AT_ONCE = 64, 32
_FAINT = 1e-6  # a boundary below this (probability per pixel) is rounding


class SamBoundaries(nn.Module):
    """Frozen SAM, always in evaluation mode: images [B,3,S,S] -> how much boundary lies in a cell, [B,1,S/8,S/8].

    `model`: a `SamModel` of the library transformers, or anything with its calls. Values lie in 0..1; the strongest
    boundary pixel of an image is 1 before it is averaged to cells; an image without a mask gives zeros. Images are
    ImageNet-normalised, which is SAM's own normalisation, and are resized to the model's input size.

    Our choice, as the paper does not say how it takes edges from SAM: the recipe for edge detection of SAM's own
    paper (Kirillov et al., ICCV 2023, zero-shot edge detection, appendix D.2). A grid of 16 x 16 points is prompted,
    each yields three masks, masks with much the same box are left out (`NMS_IOU`); the Sobel magnitude of each
    mask's probabilities, at its outline alone, is maximised over masks. Deviation: no thinning at the end, since the
    map is averaged to cells of 8 x 8 pixels; the masks are taken on the model's own output grid (a quarter of its
    input size).
    """

    def __init__(self, model: nn.Module, *, points_per_side: int = POINTS_PER_SIDE) -> None:
        super().__init__()
        self.model = model
        self.points_per_side = points_per_side
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> SamBoundaries:
        """Stay in evaluation mode, whatever `mode` says."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Shapes as in the class docstring; one image at a time, so that a batch changes nothing."""
        cells = (images.shape[-2] // CELL, images.shape[-1] // CELL)
        return torch.cat([F.adaptive_avg_pool2d(self._outlines(each[None]), cells) for each in images])

    def _outlines(self, image: Tensor) -> Tensor:
        """One image [1,3,S,S] -> its boundaries [1,1,h,w] on the grid of the model's masks."""
        model: Any = self.model
        side = int(model.config.vision_config.image_size)
        resized = F.interpolate(image, size=(side, side), mode="bilinear", antialias=True)
        embedding = model.get_image_embeddings(resized)
        logits, quality = [], []
        points = point_grid(self.points_per_side, size=side).to(image)
        for prompts in points.split(PROMPTS_AT_ONCE):
            out = model(
                image_embeddings=embedding, input_points=prompts[None, :, None], multimask_output=True
            )
            logits.append(out.pred_masks.flatten(0, 2))
            quality.append(out.iou_scores.flatten())
        return mask_boundaries(torch.cat(logits).sigmoid(), torch.cat(quality))[None, None]


def point_grid(per_side: int, *, size: int) -> Tensor:
    """The centres of per_side x per_side equal cells of a size x size image: [per_side^2,2], x and y in pixels."""
    centres = (torch.arange(per_side, dtype=torch.float32) + 0.5) * (size / per_side)
    return torch.cartesian_prod(centres, centres).flip(-1)


def mask_boundaries(probabilities: Tensor, quality: Tensor) -> Tensor:
    """Masks as probabilities [M,h,w], rated `quality` [M] -> one map of their outlines [h,w], 0..1, largest value 1.

    All zero where no mask has an outline inside the image. See `SamBoundaries` for the recipe.
    """
    kept = probabilities[distinct(probabilities > 0.5, quality)]
    strongest = probabilities.new_zeros(probabilities.shape[-2:])
    kernel = gradient_kernel((1.0, 2.0, 1.0)).to(probabilities)
    for start in range(0, len(kept), MASKS_AT_ONCE):
        some = kept[start : start + MASKS_AT_ONCE, None]
        outlined = magnitude(some, kernel) * _outline(some > 0.5)
        strongest = torch.maximum(strongest, outlined.amax(dim=(0, 1)))
    peak = strongest.max()
    return strongest / peak if peak > _FAINT else torch.zeros_like(strongest)


def distinct(masks: Tensor, quality: Tensor) -> Tensor:
    """Which masks bool [M,h,w] to keep, best `quality` [M] first: none that is empty or has a better one's box.

    Two boxes are the same where intersection over union exceeds `NMS_IOU`. Returns indices int64 [K].
    """
    ranked = torch.argsort(quality, descending=True, stable=True)
    ranked = ranked[masks[ranked].flatten(1).any(1)]
    overlaps = _box_iou(_boxes(masks[ranked])) > NMS_IOU
    alive, kept = torch.ones(len(ranked), dtype=torch.bool, device=masks.device), []
    for place in range(len(ranked)):
        if alive[place]:
            kept.append(place)
            alive &= ~overlaps[place]
    return ranked[kept]


class SamEdges(nn.Module):
    """SAM in the slot `edge` (Table 7), without parameters; values >= 0. `seed` is taken for the same call, not used.

    Our choice, in analogy to `umiad.nn.edge.Prewitt`: F1 (averaged to F2's grid, each channel used twice) and F2,
    mixed half and half as in Eq. 5 with equal gates, each position multiplied by the boundary that SAM sees there.
    Called with what `SamBoundaries` yields, so it is no entry of `umiad.nn.edge.EDGES`.
    """

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()

    def forward(self, f1: Tensor, f2: Tensor, boundaries: Tensor) -> Tensor:
        """f1 [B,64,S/4,S/4], f2 [B,128,S/8,S/8], boundaries [B,1,S/8,S/8] in 0..1 -> f_edge [B,128,S/8,S/8]."""
        fine = F.adaptive_avg_pool2d(f1, grid(f2)).repeat_interleave(f2.shape[1] // f1.shape[1], dim=1)
        return boundaries * 0.5 * (fine + f2)


def _outline(masks: Tensor) -> Tensor:
    """Pixels on either side of the outline of masks bool [M,1,h,w]; the border of the image is no outline."""
    values = masks.float()
    grown: Callable[[Tensor], Tensor] = lambda each: F.max_pool2d(each, 3, stride=1, padding=1)  # noqa: E731
    return grown(values) * grown(1 - values)


def _boxes(masks: Tensor) -> Tensor:
    """Boxes of masks bool [M,h,w], none empty: [M,4] as x0, y0, x1, y1, ends exclusive."""
    height, width = grid(masks)
    sides = []
    for present, length in ((masks.any(1), width), (masks.any(2), height)):
        first = present.int().argmax(1)
        sides.append((first, length - present.flip(1).int().argmax(1)))
    (x0, x1), (y0, y1) = sides
    return torch.stack([x0, y0, x1, y1], dim=1)


def _box_iou(boxes: Tensor) -> Tensor:
    """Intersection over union of all pairs of boxes [M,4]: [M,M]."""
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = (high - low).clamp_min(0).prod(-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    return shared / (areas[:, None] + areas[None] - shared)
