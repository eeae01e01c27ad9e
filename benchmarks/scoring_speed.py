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
from umiad.nn.encoder import Pyramid

TARGET = Path(__file__).parent / "results" / "speed_scoring.json"
N_TRAIN, REPEATS, SIZE = 99, 25, 256


def fitted(name: str, weights: str, size: int, *, preset: str = "default") -> Detector:
    """The detector of Table 3, fitted on generated images."""
    detector = build(name, preset=preset, weights=weights, size=size)
    images = clean_images(N_TRAIN if detector.info.closed_form else 4, size=size)
    return fit_quickly(detector, images, steps=1)


def megabytes(detector: Detector) -> float:
    """Tensors of the saved model (backbone and all that was fitted), 10^6 bytes."""
    return sum(each.numel() * each.element_size() for each in detector.state().values()) / 1e6


def row(detector: Detector, ratio: float) -> dict[str, Any]:
    """What the result says of one detector."""
    return {
        "preset": detector.config.preset,
        "ratio": round(ratio, 3),
        "model_mb": round(megabytes(detector), 1),
    }


def main() -> None:
    """Measure and write benchmarks/results/speed_scoring.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default="random")
    parser.add_argument("--detectors", default=",".join(detectors.names()))
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    options = parser.parse_args()
    weights = "random" if options.weights == "auto" else options.weights
    image, encoder = clean_images(1, size=options.size, seed=1), Pyramid(None, seed=0)

    def bare() -> object:
        with torch.inference_mode():
            return encoder(image)

    found: dict[str, Detector] = {
        title(name, preset): fitted(name, weights, options.size, preset=preset)
        for name in options.detectors.split(",")
        for preset in presets(name)
    }
    calls: dict[str, Any] = {
        name: (lambda detector=detector: detector.score(image)) for name, detector in found.items()
    }
    seconds = alternate({"encoder": bare, **calls}, repeats=options.repeats)
    rows = {name: row(each, seconds[name] / seconds["encoder"]) for name, each in found.items()}
    facts = {
        "unit": "median time of scoring one image at batch 1, as a ratio to the bare encoder in the same run",
        "size": options.size,
        "repeats": options.repeats,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": CODE,
        "weights": next(iter(found.values())).config.weights,
        "detectors": rows,
    }
    TARGET.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for name, each in rows.items():
        print(f"{name:18} {each['ratio']:8.2f} times the encoder, {each['model_mb']:6.1f} MB")


if __name__ == "__main__":
    main()
