"""The demonstration: the whole main job on generated phantoms, ending with pictures to look at."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow

from umiad import api, batch, report_files
from umiad import weights as backbones
from umiad.diskfile import write_atomic
from umiad.errors import InputError
from umiad.overlay import png_bytes
from umiad.phantoms import write_phantoms
from umiad.progress import Reporter
from umiad.report import p_text

MARK = "umiad-demo.json"


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration wrote, and the numbers worth printing."""

    out: Path
    weights: str
    metrics: dict[str, dict[str, Any]]
    scores: list[dict[str, Any]]
    pictures: list[Path]

    def lines(self) -> list[str]:
        """The end of the demonstration in words."""
        worst = sorted(self.scores, key=lambda row: -row["image_score"])
        named = [
            f"  {Path(row['file']).name:20} score {row['image_score']:.3f}  p {p_text(row['p_value'])}"
            for row in worst
        ]
        shown = ("det_auroc", "seg_auroc", "seg_aupro")
        return [
            "",
            "scores of new images (higher = more anomalous):",
            *named,
            "",
            *(f"{name}: {_value(self.metrics[name])}" for name in shown),
            f"backbone weights: {self.weights}"
            + (" (no pretrained weights at hand; results are weaker)" if self.weights == "random" else ""),
            "these are generated phantoms: the numbers show that it works, not how well it works on patients",
            "",
            f"report of the evaluation: {self.out / 'evaluation' / 'report.html'}",
            f"report of the scored images: {self.out / 'scores' / 'report.html'}",
            f"pictures, side by side: {self.out / 'overview.png'}",
            *(f"picture: {path}" for path in self.pictures[:4]),
        ]


def run_demo(
    out: Path, *, weights: str = "auto", size: int = 256, seed: int = 0, reporter: Reporter | None = None
) -> DemoResult:
    """Write phantoms, fit egmf (preset default), evaluate, score; everything below `out`.

    `weights` "auto" takes pretrained weights from the cache, and random ones where there are none.
    Raises InputError when `out` holds anything but an earlier demonstration.
    """
    _clear(out)
    phantoms = write_phantoms(out / "phantoms", seed=seed)
    found = backbones.available() if weights == "auto" else weights
    detector = api.build("egmf", weights=found, size=size, seed=seed)
    model = api.fit(detector, phantoms, out=out / "model", reporter=reporter)
    evaluation = api.evaluate(model, phantoms, n_resamples=200, reporter=reporter)
    report_files.write_evaluation(model, evaluation, out / "evaluation")
    test = [case.name for case in evaluation.cases]
    chosen = [name for name in test if "abnormal" in Path(name).parts][:4] + test[-4:]
    summary = batch.score_files(model, chosen, out / "scores", reporter=reporter)
    _overview(summary.pictures[:2] + summary.pictures[-2:], out / "overview.png")
    lines = (out / "scores" / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    return DemoResult(
        out=out,
        weights=detector.config.weights,
        metrics=evaluation.metrics,
        scores=[json.loads(line) for line in lines],
        pictures=summary.pictures,
    )


def _clear(out: Path) -> None:
    """Make `out` empty, if it is new, empty or holds an earlier demonstration."""
    if out.exists() and any(out.iterdir()) and not (out / MARK).exists():
        raise InputError(out, "is not empty and holds no earlier demonstration", "choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARK).write_text("{}\n", encoding="utf-8")


def _overview(pictures: Sequence[Path], target: Path) -> None:
    """Put overlays side by side, two in a row."""
    tiles = []
    for path in pictures:
        with Pillow.open(path, formats=["PNG"]) as opened:
            tiles.append(opened.convert("RGB"))
    width, height = max(tile.width for tile in tiles), max(tile.height for tile in tiles)
    sheet = Pillow.new("RGB", (2 * width + 8, -(-len(tiles) // 2) * (height + 8) - 8), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % 2 * (width + 8), number // 2 * (height + 8)))
    write_atomic(target, png_bytes(np.asarray(sheet)))


def _value(metric: dict[str, Any]) -> str:
    if metric["value"] is None:
        return f"undefined ({metric['reason']})"
    low, high = metric["ci95"] or (float("nan"), float("nan"))
    return f"{metric['value']:.3f} (95 % interval {low:.3f} to {high:.3f})"
