"""Parameter counts of every detector, part by part."""

from __future__ import annotations

from typing import Any

from torch import nn

from umiad import detectors


def count(part: nn.Module) -> dict[str, int]:
    """`total` and `trainable` parameters of a part; buffers (statistics, permutations) do not count."""
    sizes = [(p.numel(), p.requires_grad) for p in part.parameters()]
    return {"total": sum(n for n, _ in sizes), "trainable": sum(n for n, wanted in sizes if wanted)}


def parameter_table(*, size: int = 256, preset: str = "paper") -> list[dict[str, Any]]:
    """One row per detector: facts, presets and counts per part of `preset` at `size` px."""
    rows = []
    for name in detectors.names():
        cls = detectors.detector_class(name)
        detector = cls(detectors.preset_config(name, preset, size=size), None)
        parts = {part: count(module) for part, module in detector.parts().items()}
        rows.append(
            {
                "name": name,
                "summary": cls.info.summary,
                "reference": cls.info.reference,
                "fidelity": cls.info.fidelity,
                "presets": sorted(cls.presets),
                "preset": preset,
                "size": size,
                "parts": parts,
                **count(detector.module),
            }
        )
    return rows
