"""Other ways to run the backbone that were tried, beside the one that ships; a part of benchmarks/performance.py.

Three layers, which is what the default of egmf needs, at 256 px. A form is kept only while it gives the same maps.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable
from typing import Any, cast

import torch
import torch._inductor.config as inductor
from torch import Tensor, nn
from torch.nn import functional as F

from speed import alternate
from umiad.detectors.check import clean_images
from umiad.nn.encoder import yardstick
from umiad.nn.resnet import Block, Folded, folded_weights

DEPTH = 3
SAME = 1e-4
"""Largest difference of a map from the shipped form's, as a share of the map's maximum."""
SHIPS = "folded, channels-last (ships)"
COMPILERS = ("g++", "clang++", "c++")
"""What torch.compile needs one of; without, that form is left out."""
Form = Callable[[Tensor], object]


def measure(turns: int) -> dict[str, Any]:
    """Per batch size, the time of each form as a multiple of R1 (all four layers, plain)."""
    found: dict[str, Any] = {}
    network = yardstick("resnet18")
    for count in (1, 8):
        images = clean_images(count, size=256)
        forms: dict[str, Form] = {
            "plain, three layers": functools.partial(network, depth=DEPTH),
            SHIPS: functools.partial(Folded(network, depth=DEPTH), depth=DEPTH),
        }
        # not inference mode: what was compiled outside of it would be compiled anew inside, and not packed
        with torch.no_grad(), inductor.patch(freezing=True, force_disable_caches=True):
            if torch.backends.mkldnn.is_available():
                forms["folded, packed weights and fused additions"] = Packed(network, images)
            if any(map(shutil.which, COMPILERS)):
                started = time.perf_counter()
                compiled = torch.compile(forms[SHIPS], dynamic=False)
                compiled(images)
                found[f"seconds to compile, batch {count}"] = round(time.perf_counter() - started, 1)
                forms["folded, compiled"] = compiled
            _check(forms, images)
            calls = {n: functools.partial(form, images) for n, form in {"r1": network, **forms}.items()}
            seconds = alternate(calls, repeats=turns)
        found[str(count)] = {n: round(s / seconds["r1"], 4) for n, s in seconds.items() if n != "r1"}
    return found


def _check(forms: dict[str, Form], images: Tensor) -> None:
    expected = forms[SHIPS](images)
    for name, form in forms.items():
        for ours, other in zip(expected, form(images), strict=True):  # type: ignore[call-overload]
            far = float((ours - other).abs().max() / ours.abs().max())
            if far > SAME:
                raise SystemExit(f"{name}: maps differ by {far:.1e}, expected at most {SAME:g}")


class Packed:
    """Weights in the order that oneDNN works in, ReLU and additions inside of its convolutions.

    By torch's own operators for compiled graphs, which it does not promise to keep.
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        self._ops = torch.ops.mkldnn
        x = images.contiguous(memory_format=torch.channels_last)
        self._stem = self._pack(network.get_submodule("conv1"), network.get_submodule("bn1"), x)
        x = self._start(x)
        self._stages = []
        for stage in range(1, DEPTH + 1):
            blocks = []
            for block in network.get_submodule(f"layer{stage}").children():
                parts = self._block(cast(Block, block), x)
                blocks.append(parts)
                x = self._through(parts, x)
            self._stages.append(blocks)

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images [B,3,S,S] of the shape it was packed for -> F1..F3."""
        x, maps = self._start(images.contiguous(memory_format=torch.channels_last)), []
        for blocks in self._stages:
            for parts in blocks:
                x = self._through(parts, x)
            maps.append(x)
        return tuple(maps)

    def _pack(self, convolution: nn.Module, norm: nn.Module, x: Tensor) -> tuple[Any, ...]:
        weight, bias = folded_weights(convolution, norm, torch.float32)
        stride, padding = list(convolution.stride), list(convolution.padding)  # type: ignore[arg-type]
        packed = self._ops._reorder_convolution_weight(weight, padding, stride, [1, 1], 1, list(x.shape))
        return packed, bias, padding, stride, [1, 1], 1

    def _block(self, block: Block, x: Tensor) -> tuple[Any, ...]:
        first = self._pack(block.get_submodule("conv1"), block.get_submodule("bn1"), x)
        y = self._ops._convolution_pointwise(x, *first, "relu", [], "")
        second = self._pack(block.get_submodule("conv2"), block.get_submodule("bn2"), y)
        skip = None if block.downsample is None else self._pack(*block.downsample.children(), x)
        return first, second, skip

    def _start(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self._ops._convolution_pointwise(x, *self._stem, "relu", [], ""), 3, 2, padding=1)

    def _through(self, parts: tuple[Any, ...], x: Tensor) -> Tensor:
        first, (weight, bias, *shape), skip = parts
        y = self._ops._convolution_pointwise(x, *first, "relu", [], "")
        beside = x if skip is None else self._ops._convolution_pointwise(x, *skip, "none", [], "")
        added: Tensor = self._ops._convolution_pointwise.binary(
            y, beside, weight, bias, *shape, "add", 1.0, "relu", [], ""
        )
        return added
