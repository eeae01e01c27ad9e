"""Table 4: time per image of every detector at batch 1, all alternating in one run, as ratios to the encoder.

    python benchmarks/scoring_speed.py --weights FILE

The encoder is the bare backbone (all four layers) on the same image; a ratio below 1 is possible for a detector
that stops at layer 3. Closed forms are fitted on as many generated images as the paper's BUSI split has (a
memory bank's size matters), trained detectors on a few for one step: their weights do not change their speed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from paper_protocol import CODE
from results_store import presets, title
from speed import alternate
from umiad import detectors
from umiad.api import build
from umiad.detectors.check import clean_images, fit_quickly
from umiad.detectors.contract import Detector
from umiad.nn.encoder import yardstick

TARGET = Path(__file__).parent / "results" / "speed_scoring.json"
N_TRAIN, REPEATS, SIZE = 99, 25, 256
BATCHES = (1, 8)


def fitted(name: str, weights: str, size: int, *, preset: str = "default") -> Detector:
    """The detector of Table 3, fitted on generated images."""
    detector = build(name, preset=preset, weights=weights, size=size)
    images = clean_images(N_TRAIN if detector.info.closed_form else 4, size=size)
    return fit_quickly(detector, images, steps=1)


def megabytes(detector: Detector) -> float:
    """Tensors of the saved model (backbone and all that was fitted), 10^6 bytes."""
    return sum(each.numel() * each.element_size() for each in detector.state().values()) / 1e6


def ratios(found: dict[str, Detector], size: int, batch: int, *, repeats: int) -> dict[str, float]:
    """Median seconds of scoring `batch` images, as a multiple of the encoder's, all taking turns."""
    images, encoder = clean_images(batch, size=size, seed=1), yardstick("resnet18")

    def bare() -> object:
        with torch.inference_mode():
            return encoder(images)

    calls: dict[str, Any] = {
        name: (lambda detector=detector: detector.score(images)) for name, detector in found.items()
    }
    seconds = alternate({"encoder": bare, **calls}, repeats=repeats)
    return {name: round(seconds[name] / seconds["encoder"], 3) for name in found}


def main() -> None:
    """Measure and write benchmarks/results/speed_scoring.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default="random")
    parser.add_argument("--detectors", default=",".join(detectors.names()))
    parser.add_argument("--preset", help="only this one (default: those that Table 3 shows)")
    parser.add_argument("--out", type=Path, default=TARGET, help="speed_scoring*.json; no row in two files")
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    options = parser.parse_args()
    weights = "random" if options.weights == "auto" else options.weights
    found: dict[str, Detector] = {
        title(name, preset): fitted(name, weights, options.size, preset=preset)
        for name in options.detectors.split(",")
        for preset in ([options.preset] if options.preset else presets(name))
    }
    single, batched = (
        ratios(found, options.size, batch, repeats=max(3, options.repeats // batch)) for batch in BATCHES
    )
    rows: dict[str, dict[str, Any]] = {
        name: {
            "preset": each.config.preset,
            "ratio": single[name],
            "ratio_batch8": batched[name],
            "model_mb": round(megabytes(each), 1),
        }
        for name, each in found.items()
    }
    facts = {
        "unit": "median time of scoring at batch 1 (ratio_batch8: 8), as a ratio to the bare encoder in the same run",
        "size": options.size,
        "repeats": options.repeats,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": CODE,
        "weights": next(iter(found.values())).config.weights,
        "detectors": rows,
    }
    options.out.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for name, each in rows.items():
        print(f"{name:18} {each['ratio']:6.2f}, batch 8: {each['ratio_batch8']:6.2f} times the encoder")


if __name__ == "__main__":
    main()
