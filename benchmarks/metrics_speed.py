"""Speed and memory of the metrics on a test set of BUSI's size: 681 maps of 256 x 256, 9 % lesion pixels.

    python benchmarks/metrics_speed.py

Each task runs in fresh processes; the best time of three, the peak memory of the whole process (maps and
masks included). Writes benchmarks/results/speed_metrics.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
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

from umiad import bootstrap, metrics

TARGET = Path(__file__).parent / "results" / "speed_metrics.json"
N_NORMAL, N_ABNORMAL, SIZE = 34, 647, 256
LESION_SHARE, RESAMPLES, REPEATS = 0.09, 1000, 3
GOALS: dict[str, tuple[float, float]] = {"exact": (10.0, 3.0), "bootstrap": (20.0, 3.0)}
"""Task -> seconds, GB."""


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


def task(name: str) -> Callable[[], object]:
    """The call to measure."""
    labels, maps, masks = synthetic_maps()

    def exact() -> object:
        ranking = metrics.rank_pixels(maps, masks)
        return metrics.ranked_auroc(ranking), metrics.ranked_aupro(ranking)

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
    """The body of a measured process: prints seconds and peak GB."""
    call = task(name)
    started = time.perf_counter()
    call()
    seconds = time.perf_counter() - started
    # ru_maxrss is in kB on Linux, in bytes on macOS
    unit = 1e9 if platform.system() == "Darwin" else 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    print(json.dumps([seconds, peak]))


def measure(name: str) -> dict[str, Any]:
    """Best seconds and highest peak of a task over fresh processes, beside the goals."""
    runs = []
    for _ in range(REPEATS):
        words = [sys.executable, __file__, "--task", name]
        runs.append(json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout))
    what = {
        "exact": "exact pixel AUROC and AUPRO",
        "bootstrap": f"all exact metrics and {RESAMPLES} bootstrap resamples",
    }[name]
    goal_seconds, goal_gb = GOALS[name]
    return {
        "what": f"{what}, {N_NORMAL + N_ABNORMAL} maps of {SIZE}x{SIZE}",
        "seconds": round(min(seconds for seconds, _ in runs), 2),
        "peak_gb": round(max(peak for _, peak in runs), 2),
        "goal_seconds": goal_seconds,
        "goal_gb": goal_gb,
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
    parser.add_argument("--task", choices=list(GOALS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        run_task(options.task)
        return
    figures = [measure(name) for name in GOALS]
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for row in figures:
        goals = f"goals: {row['goal_seconds']} s, {row['goal_gb']} GB"
        print(f"{row['what']}: {row['seconds']} s, {row['peak_gb']} GB ({goals})")


if __name__ == "__main__":
    main()
