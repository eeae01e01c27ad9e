"""What decoding in child processes costs, as a share of scoring the same clean folder.

    python benchmarks/reading_cost.py --data ../shared/data/busi/normal --weights FILE

The same files are read one by one in child processes and in this process, in turns; then scored, reading in the way
that `FittedModel.score` does (nothing is read ahead, so the cost is not hidden). The fitted model is the default of
egmf; which images it was fitted on does not matter here. Goal: the child processes add less than 10 % to scoring.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from paper_protocol import CODE
from umiad import api
from umiad.io import Limits, read_frames
from umiad.phantoms import write_phantoms

TARGET = Path(__file__).parent / "results" / "reading_cost.json"
GOAL = 0.10
FILES = 64


def alternate(calls: dict[str, Callable[[], object]], *, repeats: int) -> dict[str, float]:
    """Median seconds of each call; the calls take turns, so that a busy machine slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if turn:  # the first turn starts the children and warms the caches
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of clean images")
    parser.add_argument("--weights", required=True, help="backbone weights, as in umiad fit")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    files = sorted(path for path in options.data.iterdir() if "_mask" not in path.name)[:FILES]
    with tempfile.TemporaryDirectory() as folder:
        data = write_phantoms(Path(folder) / "phantoms", n_normal=24, n_abnormal=0, size=128)
        model = api.fit(api.build("egmf", weights=options.weights), data, options=api.FitOptions(holdout=0.0))

    def images(*, isolated: bool) -> object:
        limits = Limits(isolated=isolated)
        return (image for file in files for image in read_frames(file, limits=limits))

    found = alternate(
        {
            "read_isolated": lambda: list(images(isolated=True)),
            "read_here": lambda: list(images(isolated=False)),
            "score_isolated": lambda: list(model.score_images(images(isolated=True))),
            "score_here": lambda: list(model.score_images(images(isolated=False))),
        },
        repeats=options.repeats,
    )
    result = {
        "files": len(files),
        "bytes": sum(os.path.getsize(path) for path in files),
        "threads": torch.get_num_threads(),
        "repeats": options.repeats,
        "weights": model.info["weights"],
        "torch": torch.__version__,
        "commit": CODE,
        "read_ratio": round(found["read_isolated"] / found["read_here"], 3),
        "added_to_scoring": round(found["score_isolated"] / found["score_here"] - 1, 4),
        "read_added_per_score": round((found["read_isolated"] - found["read_here"]) / found["score_here"], 4),
        "goal": GOAL,
    }
    TARGET.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
