"""Speed and memory of scoring and fitting, as ratios to the bare encoder measured in the same run.

    python benchmarks/speed.py --weights FILE

Medians of alternating repetitions; memory is the peak of a fresh process above its imports.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from paper_protocol import CODE
from umiad.api import FitOptions, build, fit, load
from umiad.detectors.check import clean_images, fit_quickly
from umiad.detectors.contract import Detector
from umiad.nn.encoder import yardstick
from umiad.phantoms import write_phantoms
from umiad.weights import resolve

TARGET = Path(__file__).parent / "results" / "speed_detectors.json"
GOALS = {
    "score_batch1": 3.5,
    "score_batch8": 3.5,
    "epoch_cached": 2.5,
    "fit_peak_gb": 3.0,
    "score_peak_gb": 1.0,
}
IMAGES = 96
REST = 0.1
"""Seconds between two timed calls."""


def alternate(calls: dict[str, Callable[[], object]], *, repeats: int) -> dict[str, float]:
    """Median seconds of each call; the calls take turns, so that a busy machine slows all alike.

    Before each there is a REST: the threads of another library spin for a while after their last work, and would
    slow the next call.
    """
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            time.sleep(REST)
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def encoder_of(detector: Detector) -> torch.nn.Module:
    """All four layers of the detector's kind of backbone: some detectors keep only a part of theirs."""
    return yardstick(detector.config.backbone)


def score_ratios(detector: Detector, batch: int) -> dict[str, float]:
    """Seconds of the encoder and of `score` on the same images."""
    images, encoder = clean_images(batch, size=detector.config.size), encoder_of(detector)

    def bare() -> object:
        with torch.inference_mode():
            return encoder(images)

    return alternate({"encoder": bare, "score": lambda: detector.score(images)}, repeats=15)


def epoch_ratios(detector: Detector) -> dict[str, float]:
    """Seconds of an encoder pass over the images, of a cached epoch and of an uncached one."""
    batches = clean_images(IMAGES, size=detector.config.size).split(detector.config.training.batch_size)
    prepared = [detector.prepare(batch) for batch in batches]
    optimizer = torch.optim.Adam(detector.param_groups(), lr=detector.config.training.learning_rate)
    rng, encoder = torch.Generator(), encoder_of(detector)

    def step(each: dict[str, torch.Tensor]) -> None:
        for losses in detector.steps(each, rng):
            optimizer.zero_grad()
            losses["total"].backward()
            optimizer.step()

    def bare() -> None:
        with torch.inference_mode():
            for batch in batches:
                encoder(batch)

    def cached() -> None:
        for each in prepared:
            step(each)

    def uncached() -> None:
        for batch in batches:
            step(detector.prepare(batch))

    return alternate({"encoder": bare, "cached": cached, "uncached": uncached}, repeats=3)


def peak_gb(job: str, name: str, weights: str, folder: Path) -> float:
    """Peak memory of a fresh process that fits or scores, above its imports, in GB."""
    words = [
        sys.executable,
        __file__,
        "--job",
        job,
        "--detector",
        name,
        "--weights",
        weights,
        "--folder",
        str(folder),
    ]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1])


def run_job(job: str, name: str, weights: str, folder: Path) -> None:
    """The body of that process; prints the peak above the imports."""
    import lightning.pytorch
    import matplotlib.figure

    del lightning, matplotlib
    before = peak_kb()
    if job == "fit":
        detector = build(name, preset="paper", weights=weights, settings={"training": {"epochs": 2}})
        fit(detector, folder / "phantoms", options=FitOptions(holdout=0.2), out=folder / f"model-{name}")
    else:
        model = load(folder / f"model-{name}")
        model.score(sorted((folder / "phantoms" / "normal").glob("*.png"))[:32])
    sys.stdout.write(f"{(peak_kb() - before) / 1e6:.3f}\n")


def peak_kb() -> float:
    """Peak resident memory of this process in kB; `ru_maxrss` would count the parent's before the exec."""
    status = Path("/proc/self/status")
    if status.exists():
        found = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return float(found.split()[1])
    scale = 1024 if sys.platform == "darwin" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def measure(name: str, weights: str, *, figures: str) -> dict[str, Any]:
    """The figures of one detector, each beside its goal."""
    found: dict[str, float] = {}
    if "speed" in figures:
        found |= measure_speed(name, weights)
    if "memory" in figures:
        found |= measure_memory(name, weights)
    facts = {"weights": resolve(weights).label, "commit": CODE}
    return {key: {"value": round(value, 3), "goal": GOALS.get(key), **facts} for key, value in found.items()}


def measure_speed(name: str, weights: str) -> dict[str, float]:
    """Ratios to the encoder."""
    detector = build(name, preset="paper", weights=weights)
    fit_quickly(detector, clean_images(8, size=256), steps=1)
    found = {}
    for batch in (1, 8):
        seconds = score_ratios(detector, batch)
        found[f"score_batch{batch}"] = seconds["score"] / seconds["encoder"]
    if not detector.info.closed_form:
        seconds = epoch_ratios(detector)
        found["epoch_cached"] = seconds["cached"] / seconds["encoder"]
        found["epoch_uncached_over_cached"] = seconds["uncached"] / seconds["cached"]
    return found


def measure_memory(name: str, weights: str) -> dict[str, float]:
    """Peaks of fitting 100 phantoms and of scoring 32."""
    with tempfile.TemporaryDirectory() as folder:
        write_phantoms(Path(folder) / "phantoms", n_normal=100, n_abnormal=4, size=256)
        return {f"{job}_peak_gb": peak_gb(job, name, weights, Path(folder)) for job in ("fit", "score")}


def main() -> None:
    """Measure every named detector and write benchmarks/results/speed_detectors.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default="random")
    parser.add_argument("--detectors", default="egmf,padim")
    parser.add_argument("--figures", default="speed,memory", help="others keep their last value")
    parser.add_argument("--job", choices=["fit", "score"], help=argparse.SUPPRESS)
    parser.add_argument("--detector", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    weights = "random" if options.weights == "auto" else options.weights
    if options.job:
        run_job(options.job, options.detector, weights, options.folder)
        return
    known = json.loads(TARGET.read_text(encoding="utf-8"))["detectors"] if TARGET.exists() else {}
    figures = {
        name: known.get(name, {}) | measure(name, weights, figures=options.figures)
        for name in options.detectors.split(",")
    }
    facts = {
        "unit": "ratio to the bare encoder on the same images (score, epoch); GB above the imports (peaks)",
        "preset": "paper",
        "size": 256,
        "images_per_epoch": IMAGES,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "detectors": figures,
    }
    TARGET.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for name, rows in figures.items():
        for key, row in rows.items():
            goal = "" if row["goal"] is None else f"  (goal: at most {row['goal']})"
            print(f"{name:8} {key:28} {row['value']:8.3f}{goal}")


if __name__ == "__main__":
    main()
