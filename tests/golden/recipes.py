"""Detectors too large to be kept, filled with numbers that anyone can make again, and what they must answer.

The raw stream of PCG64 is guaranteed by numpy for ever (unlike its distributions), and torch's generators take no part.
`python tests/golden/recipes.py` prints what `recipes.json` holds; it is rewritten only where scores change on purpose.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import numpy as np
import torch

from umiad import detectors

SIZE = 64
SMALL: dict[str, Any] = {"blocks": 2, "hidden_ratio": 16, "condition_channels": 16}
RECIPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "egmf-paper": ("egmf", "paper", SMALL),
    "egmf-paper-full": ("egmf", "paper", SMALL | {"likelihood": "full", "guidance": "shift"}),
    "egmf-default": ("egmf", "default", {"rank": 8}),
    "egmf-quick": ("egmf", "quick", {"rank": 8, "likelihood": "full"}),
    "posgauss": ("posgauss", "default", {"megabytes": 2.0}),
    "cflow": ("cflow", "default", {"blocks": 2, "condition_channels": 16}),
    "fastflow": ("fastflow", "default", {"blocks": 2}),
    "msflow": ("msflow", "default", {"blocks": [1, 1, 2], "condition_channels": 16}),
    "uflow": ("uflow", "default", {"blocks": 2}),
    "rd4ad": ("rd4ad", "default", {}),
    "ikd": ("ikd", "default", {}),
    "adfa": ("adfa", "default", {}),
    "medmae": (
        "medmae",
        "quick",
        {"width": 32, "depth": 2, "heads": 2, "decoder_width": 16, "decoder_depth": 1},
    ),
    "mlfeu": ("mlfeu", "quick", {"width": 4}),
    "mlfeu-lesions": ("mlfeu", "quick", {"width": 4, "objective": "lesions"}),
    "medvit": ("medvit", "quick", {"network": "tiny", "channels": 8}),
    "medvit-map": ("medvit", "quick", {"network": "tiny", "channels": 8, "image_score": "map"}),
    "anovaegan": ("anovaegan", "quick", {"width": 2}),
    "fanogan": ("fanogan", "quick", {"width": 2}),
}
"""Name -> detector, preset, settings; the backbone is the tiny one."""


def build(name: str) -> Any:
    """The detector of a recipe, its tensors filled; the same on every machine."""
    detector, preset, settings = RECIPES[name]
    config = detectors.preset_config(
        detector, preset, size=SIZE, weights="random", backbone="resnet-tiny", **settings
    )
    built = detectors.make(detector, config.canonical(), None)
    built.load_state({key: _filled(key, tensor) for key, tensor in built.state().items()})
    return built


def answer(name: str) -> dict[str, Any]:
    """Scores of two made-up images, and a digest of the names, shapes and dtypes of the saved tensors."""
    built = build(name)
    images = torch.from_numpy(4 * _uniform("images", 2 * 3 * SIZE * SIZE).reshape(2, 3, SIZE, SIZE) - 2)
    scores = built.score(images.float())
    maps = scores.anomaly_map.double()
    return {
        "image_score": scores.image_score.double().tolist(),
        "map_mean": maps.mean((1, 2)).tolist(),
        "map_std": maps.std((1, 2)).tolist(),
        "tensors": digest(built.state()),
    }


def digest(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 of the sorted names, dtypes and shapes of tensors."""
    lines = [f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in sorted(state.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _filled(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """The same shape and dtype: variances and gains near 1, the rest around 0, whole numbers as they are."""
    if not tensor.is_floating_point():
        return tensor
    values = torch.from_numpy(_uniform(key, tensor.numel()).reshape(tuple(tensor.shape)))
    if key.endswith(("running_var", "floor")) or (key.endswith("weight") and tensor.ndim == 1):
        values = 0.5 + values
    elif key.endswith("whitener") and tensor.ndim == 2:
        values = torch.eye(len(tensor), dtype=torch.float64) + 0.01 * (values - 0.5)
    elif key.endswith("vectors"):
        values = torch.linalg.qr(values - 0.5).Q  # orthonormal, as every fit makes them
    else:
        inputs = tensor[:1].numel() if tensor.ndim > 1 else 100
        values = (values - 0.5) * (12 / max(1, inputs)) ** 0.5
    return values.to(tensor.dtype)


def _uniform(key: str, count: int) -> np.ndarray:
    """`count` numbers in 0..1 (float64) that depend on `key` alone."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    return (np.random.PCG64(seed).random_raw(count) >> 11) * 2.0**-53


if __name__ == "__main__":
    sys.stdout.write(json.dumps({name: answer(name) for name in RECIPES}, indent=1) + "\n")
