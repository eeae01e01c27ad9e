"""How long a fit of every trained detector takes, at preset "default" on 100 images; for docs/performance.md.

    python benchmarks/fit_cost.py --weights FILE [--only ikd,rd4ad]

Two epochs are fitted on generated images of 256 px; the longer one times the epochs of the preset, and what is not
an epoch, are the cost of the whole (an upper one where the epochs of a second phase are shorter). Run it on an idle
machine.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paper_protocol import CODE
from umiad import api, detectors
from umiad.phantoms import draw_phantom
from umiad.progress import Silent
from umiad.training import Row

TARGET = Path(__file__).parent / "results" / "fit_cost.json"
IMAGES, EPOCHS = 100, 2


class Epochs(Silent):
    """A reporter that keeps how long each epoch took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def epoch(self, row: Row) -> None:
        """One row of the log."""
        self.seconds.append(float(row["seconds"] or 0.0))


def cost(name: str, weights: str, images: list[Any]) -> dict[str, Any] | None:
    """A row of the results; None for a closed form."""
    whole = api.build(name, weights=weights)
    if whole.info.closed_form:
        return None
    epochs = whole.config.training.epochs
    detector = api.build(name, weights=weights, settings={"training": {"epochs": EPOCHS}})
    clock, started = Epochs(), time.perf_counter()
    api.fit(detector, images, options=api.FitOptions(holdout=0.0), reporter=clock)
    rest = time.perf_counter() - started - sum(clock.seconds)
    return {
        "detector": name,
        "epochs": epochs,
        "seconds_per_epoch": round(max(clock.seconds), 2),
        "seconds_beside": round(rest, 1),
        "minutes": round((epochs * max(clock.seconds) + rest) / 60, 1),
        "images": len(images),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "weights": detector.config.weights,
        "commit": CODE,
    }


def main() -> None:
    """Measure what has no row yet, and what is named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default="random", help="backbone weights, as in umiad fit")
    parser.add_argument("--only", help="detectors, with commas between: measured anew")
    given = parser.parse_args()
    weights = "random" if given.weights == "auto" else given.weights
    rows = json.loads(TARGET.read_text(encoding="utf-8")) if TARGET.exists() else []
    wanted = given.only.split(",") if given.only else detectors.names()
    known = {row["detector"]: row for row in rows if not given.only or row["detector"] not in wanted}
    images = draw(IMAGES)
    for name in wanted:
        if name in known or (row := cost(name, weights, images)) is None:
            continue
        known[name] = row
        rows = [known[each] for each in sorted(known)]
        TARGET.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(name, row["minutes"], "minutes", flush=True)


def draw(count: int) -> list[Any]:
    """Generated images of 256 px."""
    return [draw_phantom(np.random.default_rng([7, k]), size=256, lesions=0)[0] for k in range(count)]


if __name__ == "__main__":
    main()
