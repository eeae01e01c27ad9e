"""Makes the golden models of one format: saved models that every later umiad must load and score the same.

Run once per format, from the repository: `python tests/golden/make_golden.py tests/golden/model-1`. What is there
is never overwritten; a new format gets a new folder, and the old ones stay. Everything is generated, nothing comes
from a patient, and nothing is tuned: the models are as small as they can be.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

import umiad
from umiad.phantoms import write_phantoms

SIZE = 64
COARSE = 8
"""Edge in cells of the maps that are kept, averages of the anomaly map over SIZE / COARSE pixels."""
IMAGES = 3
COMMON: dict[str, Any] = {"backbone": "resnet-tiny"}
MODELS: dict[str, dict[str, Any]] = {
    "padim": {"detector": "padim", "settings": {"channels": 5}},
    "fastflow": {
        "detector": "fastflow",
        "settings": {"scales": [1], "blocks": 1, "training": {"epochs": 1, "batch_size": 4}},
    },
    "egmf-affine": {
        "detector": "egmf",
        "settings": {"aggregate": "ignore", "views": ["position"], "rank": 1},
    },
}
"""Folder -> how it is made: a closed form, a detector trained by gradients, and egmf's default design."""


def main(target: Path) -> None:
    """Write models, images, scores and the list of SHA-256 below `target`, which must not exist."""
    target.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        data = write_phantoms(Path(folder) / "phantoms", n_normal=12, n_abnormal=IMAGES, size=SIZE, seed=1)
        for name, plan in MODELS.items():
            detector = umiad.build(
                plan["detector"], weights="random", size=SIZE, settings=COMMON | plan["settings"]
            )
            umiad.fit(detector, data, out=target / name)
        (target / "images").mkdir()
        for path in sorted((data / "abnormal").glob("*.png")):
            with PIL.Image.open(path) as image:
                image.save(target / "images" / path.name)
    scores = {name: facts(target / name, target / "images") for name in MODELS}
    (target / "scores.json").write_text(json.dumps(scores) + "\n", encoding="utf-8")
    (target / "SHA256SUMS").write_text("".join(f"{line}\n" for line in sums(target)), encoding="utf-8")


def facts(model: Path, images: Path) -> dict[str, dict[str, Any]]:
    """Per image: the image score, the p-value, the map's mean and maximum, and the map on COARSE x COARSE cells."""
    files = sorted(images.glob("*.png"))
    findings = umiad.load(model).score(files)
    return {file.name: _facts(finding) for file, finding in zip(files, findings, strict=True)}


def sums(folder: Path) -> list[str]:
    """A line "SHA-256  path" per file below `folder`, sorted by path, without the list itself."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "SHA256SUMS"]
    return [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}"
        for path in files
    ]


def _facts(finding: Any) -> dict[str, Any]:
    map64 = np.asarray(finding.anomaly_map, dtype=np.float64)
    step = SIZE // COARSE
    cells = map64.reshape(COARSE, step, COARSE, step).mean((1, 3))
    return {
        "image_score": finding.image_score,
        "p_value": finding.p_value,
        "map_mean": float(map64.mean()),
        "map_max": float(map64.max()),
        "map": [[float(f"{value:.9g}") for value in row] for row in cells],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
