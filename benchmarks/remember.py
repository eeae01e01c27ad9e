"""Remember what the frozen backbone and the fingerprints yield, so that a grid on one data set does not repeat it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from umiad import fitting
from umiad.nn.encoder import Pyramid


def remember() -> None:
    """From now on in this process: images met before cost no pass through the backbone, files no second hash.

    Keeps 1.8 MB per image and orientation down to layer 3 (256 px, float32): 2.9 GB for busi. Values are those
    of the first batch that an image was met in.
    """
    Pyramid.forward = _remembering(Pyramid.forward)  # type: ignore[method-assign]
    fitting.fingerprints = _once(fitting.fingerprints)


def _remembering(forward: Any) -> Any:
    known: dict[tuple[bytes, bytes, int], tuple[Tensor, ...]] = {}

    @functools.wraps(forward)
    def remembered(self: Pyramid, images: Tensor, *, depth: int = 4) -> tuple[Tensor, ...]:
        state = hashlib.sha256(self.conv1.weight.detach().contiguous().numpy().tobytes()).digest()
        keys = [
            (state, hashlib.sha256(image.contiguous().numpy().tobytes()).digest(), depth) for image in images
        ]
        new = [row for row, key in enumerate(keys) if key not in known]
        if new:
            found = forward(self, images[new].contiguous(memory_format=torch.channels_last), depth=depth)
            for row, *maps in zip(new, *found, strict=True):
                known[keys[row]] = tuple(each.clone(memory_format=torch.preserve_format) for each in maps)
        maps = [torch.stack(level) for level in zip(*(known[key] for key in keys), strict=True)]
        return tuple(each.contiguous(memory_format=torch.channels_last) for each in maps)

    return remembered


def _once(fingerprints: Any) -> Any:
    known: dict[tuple[str, ...], list[Any]] = {}

    @functools.wraps(fingerprints)
    def remembered(cases: Sequence[Any], **words: Any) -> list[Any]:
        key = tuple(case.name for case in cases)
        if key not in known:
            known[key] = fingerprints(cases, **words)
        return list(known[key])

    return remembered
