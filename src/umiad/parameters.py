"""Parameter counts of every detector, part by part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from umiad import detectors
from umiad.detectors.check import clean_images, fit_quickly
from umiad.detectors.contract import Detector, DetectorInfo
from umiad.nn.encoder import Pyramid

PROBE_SIZE, PROBE_IMAGES = 64, 4


def count(part: nn.Module) -> dict[str, int]:
    """`total` and `trainable` parameters of a part; buffers (statistics, memory banks) do not count."""
    sizes = [(p.numel(), p.requires_grad) for p in part.parameters()]
    return {"total": sum(n for n, _ in sizes), "trainable": sum(n for n, wanted in sizes if wanted)}


def listing() -> list[dict[str, Any]]:
    """One row per detector: name, summary, reference, fidelity and presets; nothing is built."""
    return [_facts(cls, cls.info) for cls in map(detectors.detector_class, detectors.names())]


def parameter_table(
    *, size: int = 256, preset: str = "paper", names: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """One row per detector (of `names`; none: all): `listing` and counts per part of `preset` at `size` px.

    `used` counts the parameters of the modules that scoring an image runs through (a detector that stops at
    layer 3 of the backbone does not use layer 4), found by scoring one at 64 px, after a brief fit: of all detectors
    that takes some time. Raises ConfigError for an unknown name.
    """
    rows = []
    for name in names or detectors.names():
        cls = detectors.detector_class(name)
        detector = cls(detectors.preset_config(name, preset, size=size), None)
        parts = {part: count(module) for part, module in detector.parts().items()}
        rows.append(
            {
                **_facts(cls, detector.info),
                "preset": preset,
                "size": size,
                "parts": parts,
                **count(detector.module),
                "used": _used(detector, modules_run(name, preset)),
            }
        )
    return rows


def _facts(cls: type[Any], info: DetectorInfo) -> dict[str, Any]:
    """Of a registered class, and of what it builds: its `info`, or that of the design a preset chooses."""
    return {
        "name": info.name,
        "summary": info.summary,
        "reference": info.reference,
        "fidelity": info.fidelity,
        "presets": sorted(cls.presets),
    }


def modules_run(name: str, preset: str) -> set[str]:
    """Names of the modules of detector `name` that scoring one image runs through."""
    cls = detectors.detector_class(name)
    probe: Detector = cls(detectors.preset_config(name, preset, size=PROBE_SIZE), None)
    fit_quickly(probe, clean_images(PROBE_IMAGES, size=PROBE_SIZE), steps=1)
    with _recording(probe.module) as ran:
        probe.score(clean_images(1, size=PROBE_SIZE, seed=1))
    return ran


@contextmanager
def _recording(module: nn.Module) -> Iterator[set[str]]:
    """Names of the submodules whose forward runs inside; empty for a detector without any."""
    ran: set[str] = set()

    def noting(name: str, part: nn.Module) -> Any:
        def note(_: nn.Module, inputs: Any, words: dict[str, Any]) -> None:
            inside = part.run_parts(**words) if isinstance(part, Pyramid) else ()  # run folded, in one go
            ran.update((name, *(f"{name}.{each}" for each in inside)))

        return note

    handles = [
        part.register_forward_pre_hook(noting(name, part), with_kwargs=True)
        for name, part in module.named_modules()
    ]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def _used(detector: Detector, ran: set[str]) -> int:
    """Parameters that lie directly in the modules named `ran`, each counted once."""
    found: dict[int, torch.Tensor] = {}
    for name, part in detector.module.named_modules():
        if name in ran:
            found |= {id(p): p for p in part.parameters(recurse=False)}
    return sum(p.numel() for p in found.values())
