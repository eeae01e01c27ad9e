"""Speed and memory of the metrics on a test set of BUSI's size: 681 maps of 256 x 256, 9 % lesion pixels.

    python benchmarks/metrics_speed.py [exact] [bootstrap] [streamed]

Each task runs in fresh processes; the median of three, the peak memory of the whole process (maps and
masks included). `streamed` runs once: 10,000 maps, made anew a few at a time in each reading. Writes
benchmarks/results/speed_metrics.json; tasks that are not named keep their figures.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import sklearn
from scipy import ndimage

from paper_protocol import CODE
from umiad import bootstrap, metrics, streamed_metrics

TARGET = Path(__file__).parent / "results" / "speed_metrics.json"
N_NORMAL, N_ABNORMAL, SIZE = 34, 647, 256
N_STREAMED, CHUNK, FIELDS = 10_000, 50, 8
LESION_SHARE, RESAMPLES = 0.09, 1000
GOALS: dict[str, tuple[float | None, float]] = {
    "exact": (3.0, 1.5),
    "bootstrap": (5.0, 1.5),
    "streamed": (None, 1.5),
}
"""Task -> seconds (None: no goal), GB."""
REPEATS = {"exact": 3, "bootstrap": 3, "streamed": 1}
BUSI_SIZED = f"{N_NORMAL + N_ABNORMAL} maps of {SIZE}x{SIZE}"
WHAT = {
    "exact": f"exact pixel AUROC, AP and AUPRO, {BUSI_SIZED}",
    "bootstrap": f"all exact metrics and {RESAMPLES} bootstrap resamples, {BUSI_SIZED}",
    "streamed": f"exact pixel AUROC, AP, AUPRO and best F1 in slabs, {N_STREAMED} maps of {SIZE}x{SIZE}, "
    "made anew in each reading (included)",
}


def synthetic_maps() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels [N], maps [N,256,256] float32 and masks: smooth random fields, brighter in the lesions."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [N_NORMAL, N_ABNORMAL])
    maps = np.empty((len(labels), SIZE, SIZE), dtype=np.float32)
    masks = np.zeros(maps.shape, dtype=bool)
    level = 1 - LESION_SHARE * len(labels) / N_ABNORMAL
    for row, label in enumerate(labels):
        if label:
            field = ndimage.gaussian_filter(rng.standard_normal((SIZE, SIZE)), 20)
            masks[row] = field > np.quantile(field, level)
        noise = ndimage.gaussian_filter(rng.standard_normal((SIZE, SIZE)), 4)
        maps[row] = noise / noise.std() + masks[row]
    return labels, maps, masks


def base_fields(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Lesions and smooth noise that `chunk` looks at through a moving window: [FIELDS,512,512] bool and float32."""
    fields = rng.standard_normal((2, FIELDS, SIZE, SIZE))
    pairs = zip(fields, (20, 4), strict=True)
    shapes, noise = (ndimage.gaussian_filter(each, (0, s, s), mode="wrap") for each, s in pairs)
    level = np.quantile(shapes, 1 - LESION_SHARE, axis=(1, 2), keepdims=True)
    twice = (1, 2, 2)
    return np.tile(shapes > level, twice), np.tile((noise / noise.std()).astype(np.float32), twice)


def chunk(number: int, shapes: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """CHUNK maps and masks, the same for equal `number`: windows of fields, scaled, and brighter in the lesions."""
    rng = np.random.default_rng(number)
    maps = np.empty((CHUNK, SIZE, SIZE), dtype=np.float32)
    masks = np.empty(maps.shape, dtype=bool)
    for row in range(CHUNK):
        (first, second), (y, x, v, u) = rng.integers(FIELDS, size=2), rng.integers(SIZE, size=4)
        masks[row] = shapes[first, y : y + SIZE, x : x + SIZE]
        np.multiply(noise[second, v : v + SIZE, u : u + SIZE], rng.uniform(0.9, 1.1), out=maps[row])
        maps[row] += masks[row]
    return maps, masks


def streamed() -> object:
    """Metrics of N_STREAMED maps that never exist together."""
    fields = base_fields(np.random.default_rng(0))
    return streamed_metrics.summarise_pixels(
        lambda: (chunk(number, *fields) for number in range(N_STREAMED // CHUNK))
    )


def task(name: str) -> Callable[[], object]:
    """The call to measure."""
    if name == "streamed":
        return streamed
    labels, maps, masks = synthetic_maps()

    def exact() -> object:
        ranking = metrics.rank_pixels(maps, masks)
        return metrics.ranked_auroc(ranking), metrics.ranked_ap(ranking), metrics.ranked_aupro(ranking)

    def resampled() -> object:
        scores = maps.max(axis=(1, 2))
        return bootstrap.evaluate_scores(
            scores,
            labels,
            [""] * len(labels),
            maps,
            masks,
            image_threshold=4.0,
            map_threshold=2.0,
            n_resamples=RESAMPLES,
        )

    return {"exact": exact, "bootstrap": resampled}[name]


def run_task(name: str) -> None:
    """The body of a measured process: prints seconds, seconds of processor time and peak GB."""
    call = task(name)
    started, busy = time.perf_counter(), time.process_time()
    call()
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    # ru_maxrss is in kB on Linux, in bytes on macOS
    unit = 1e9 if platform.system() == "Darwin" else 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    print(json.dumps([seconds, busy, peak]))


def measure(name: str) -> dict[str, Any]:
    """Median seconds and highest peak of a task over fresh processes, beside the goals."""
    runs = []
    for _ in range(REPEATS[name]):
        words = [sys.executable, __file__, "--task", name]
        runs.append(json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout))
    seconds, busy, peaks = zip(*runs, strict=True)
    return {
        "what": WHAT[name],
        "seconds": round(statistics.median(seconds), 2),
        "processor_seconds": round(statistics.median(busy), 2),
        "peak_gb": round(max(peaks), 2),
        "commit": CODE,
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "scikit-learn": sklearn.__version__,
        },
    }


def main() -> None:
    """Measure every task and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="TASK", help=f"what to measure: {', '.join(GOALS)}")
    parser.add_argument("--task", choices=list(GOALS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        run_task(options.task)
        return
    if unknown := set(options.names) - set(GOALS):
        parser.error(f"unknown task {', '.join(sorted(unknown))}, expected {', '.join(GOALS)}")
    known = {row["what"]: row for row in json.loads(TARGET.read_text())} if TARGET.exists() else {}
    known |= {row["what"]: row for row in map(measure, options.names or GOALS)}
    figures = [
        {**known[what], "goal_seconds": GOALS[name][0], "goal_gb": GOALS[name][1]}
        for name, what in WHAT.items()
        if what in known
    ]
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for row in figures:
        goal = "" if row["goal_seconds"] is None else f"{row['goal_seconds']} s, "
        goals = f"goals: {goal}{row['goal_gb']} GB"
        print(f"{row['what']}: {row['seconds']} s, {row['peak_gb']} GB ({goals})")


if __name__ == "__main__":
    main()
