"""Run detectors on the public sets as the paper splits them; one JSON file per run, so a grid resumes.

python benchmarks/paper_protocol.py --data ../shared/data --weights FILE benchmarks/table3.toml

Every run is judged twice from one scoring pass: "metrics" under the method's own post-processing and
"metrics_common" under one smoothing and one image score for all (`umiad.scoring.common`). Runs whose edges come from
SAM need the checkpoint that `--sam` names; without it they are not run.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import umiad
from remember import remember
from umiad import sam
from umiad.api import FitOptions, FittedModel, build, fit
from umiad.bootstrap import resample_scores
from umiad.calibration import fit_calibration
from umiad.config import canonical_json
from umiad.data import DataSet, load_data
from umiad.detectors.contract import Detector
from umiad.duplicates import case_sha256
from umiad.evaluation import ScoredTest, score_cases, score_test
from umiad.parameters import count
from umiad.progress import RichReporter
from umiad.splits import Part

RESULTS = Path(__file__).parent / "results"
FPR, RESAMPLES = 0.05, 1000
"""Seed 0 has bootstrap intervals; the other seeds show the spread, and their case scores are kept."""
THRESHOLD_RULE = (
    "quantile of the fitted normal images' scores at a false-positive rate of 0.05 on them; "
    "optimistic, since the model has seen them (hold-out 0)"
)
DEFAULTS: dict[str, Any] = {
    "preset": "default",
    "variant": "main",
    "size": 256,
    "holdout": 0.0,
    "folds": 0,
    "equalise": None,
    "settings": {},
    "rescore": {},
}


def runs(path: Path) -> Iterator[dict[str, Any]]:
    """One dictionary per run of a TOML list; `detectors`, `datasets` and `seeds` are multiplied out."""
    for entry in tomllib.loads(path.read_text(encoding="utf-8"))["run"]:
        rest = {k: v for k, v in entry.items() if k not in ("detectors", "datasets", "seeds")}
        for seed in entry["seeds"]:
            for dataset in entry["datasets"]:
                for detector in entry["detectors"]:
                    yield {**DEFAULTS, **rest, "detector": detector, "dataset": dataset, "seed": seed}


@functools.lru_cache
def manifest(folder: Path) -> str:
    """Digest of a data set: file names and contents, whatever the folder is called."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def commit() -> str:
    """The commit of the code, marked when the source differs from it."""
    here = Path(__file__).parents[1]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, check=False
        ).stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "benchmarks/*.py")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+changes" if changed else "")


CODE = commit()
"""Taken at start: that is the code that runs, whatever is edited meanwhile."""


def run_key(run: dict[str, Any], *, data: str, weights: str, config: dict[str, Any]) -> str:
    """Name of a result: hash of all that decides it."""
    names = ("detector", "dataset", "variant", "seed", "holdout", "equalise")
    names += ("folds",) if run["folds"] else ()  # results from before there were folds keep their names
    facts = {**{k: run[k] for k in names}, "data": data}
    return hashlib.sha256(
        canonical_json({**facts, "weights": weights, "config": config}).encode()
    ).hexdigest()[:16]


def with_sam(run: dict[str, Any], folder: Path | None) -> dict[str, Any] | None:
    """The run with SAM's checkpoint `folder` in its settings, where its edges are SAM's; None where that is missing."""
    if run["settings"].get("edge") != sam.EDGE:
        return run
    return None if folder is None else {**run, "settings": {**run["settings"], "sam": str(folder)}}


def planned(run: dict[str, Any], folder: Path, weights: str) -> dict[str, tuple[Detector, Path]]:
    """Variant -> unfitted detector and result file; `rescore` variants differ from the first in scoring only."""
    data, found = manifest(folder), {}
    for variant, extra in {run["variant"]: {}, **run["rescore"]}.items():
        settings = {**run["settings"], **extra}
        detector = build(
            run["detector"],
            preset=run["preset"],
            weights=weights,
            size=run["size"],
            seed=run["seed"],
            settings=settings,
        )
        config = detector.config.canonical()
        facts = {**run, "variant": variant}
        key = run_key(facts, data=data, weights=config["weights"], config=config)
        found[variant] = (detector, RESULTS / f"{run['dataset']}-{run['detector']}-{key}.json")
    return found


def execute(run: dict[str, Any], folder: Path, weights: str, *, scratch: Path | None) -> list[Path]:
    """Do one run and its rescored variants unless their results exist; returns the new files."""
    plan = planned(run, folder, weights)
    if all(target.exists() for _, target in plan.values()):
        return []
    dataset, started, written = load_data(folder), (time.monotonic(), time.process_time()), []
    with RichReporter(Console(stderr=True)) as reporter, tempfile.TemporaryDirectory(dir=scratch) as work:
        options = FitOptions(
            holdout=run["holdout"], folds=run["folds"], seed=run["seed"], equalise=run["equalise"]
        )
        first = plan[run["variant"]][0]
        out = None if first.info.not_saved else Path(work) / "model"
        model = fit(first, dataset, options=options, out=out, reporter=reporter)
        spent = {
            "fit_seconds": round(time.monotonic() - started[0], 1),
            "fit_processor_seconds": round(
                time.process_time() - started[1], 1
            ),  # other work beside counts not
        }
        for variant, (detector, target) in plan.items():
            if detector is not first:
                detector.load_state(first.state())
            scored = FittedModel(detector, model.config, model.split, extras=model.extras)
            resamples = RESAMPLES if run["seed"] == 0 else 0
            judged = judge_twice(scored, dataset, reporter, n_resamples=resamples)
            facts = {**run, "variant": variant, **spent}
            write(target, record(facts, scored, judged, data=manifest(folder)))
            written.append(target)
    return written


@dataclass(frozen=True)
class Judged:
    """What both post-processings make of a fitted model: metrics, thresholds and image scores by name."""

    test: ScoredTest
    metrics: dict[str, dict[str, Any]]
    thresholds: dict[str, dict[str, Any]]
    scores: dict[str, list[float]]
    score_seconds: float


def judge_twice(
    model: FittedModel, dataset: DataSet, reporter: RichReporter, *, n_resamples: int = RESAMPLES
) -> Judged:
    """Score normals (for thresholds) and the test part, and judge both post-processings.

    Thresholds come from the held-out normals, or from folds, as a fit sets them; without either from the fitted ones.
    The common post-processing has none by folds: a fit keeps their scores, not their maps.
    """
    started = time.monotonic()
    test = score_test(model, dataset, reporter=reporter)
    seconds = time.monotonic() - started
    sigma, held_out = model.detector.config.sigma, bool(model.split.part("holdout"))
    known = normals_of(model, dataset, "holdout" if held_out else "train")
    metrics, thresholds, scores = {}, {}, {}
    for name, each, normals in (
        ("official", test, known),
        ("common", test.common(smoothed=sigma), known.common(smoothed=sigma)),
    ):
        reporter.stage(f"metrics, {name}", 0, 1)
        peaks = normals.maps.reshape(len(normals.maps), -1).max(axis=1)
        limits = {"image_threshold": quantile(normals.image_scores), "map_threshold": quantile(peaks)}
        rule = THRESHOLD_RULE
        by_folds = model.config.calibration
        if by_folds is not None and by_folds.source == "folds":
            limits = {"image_threshold": by_folds.image_threshold, "map_threshold": by_folds.map_threshold}
            rule = by_folds.rule
            if name == "common":
                limits, rule = {"image_threshold": None, "map_threshold": None}, "none"
        elif held_out:
            set_ = fit_calibration(normals.image_scores.tolist(), peaks.tolist(), fpr=FPR, source="holdout")
            limits = {"image_threshold": set_.image_threshold, "map_threshold": set_.map_threshold}
            rule = set_.rule
        found, _ = resample_scores(
            each.image_scores,
            each.labels,
            list(each.groups),
            each.maps,
            each.masks,
            n_resamples=n_resamples,
            **limits,
        )
        metrics[name], thresholds[name] = found, {**limits, "threshold_rule": rule}
        scores[name] = [float(f"{score:.6g}") for score in each.image_scores]
        reporter.stage(f"metrics, {name}", 1, 1)
    return Judged(test, metrics, thresholds, scores, seconds)


def normals_of(model: FittedModel, dataset: DataSet, part: Part) -> ScoredTest:
    """The normal images that the model was fitted on, or that were held out, scored like the test part."""
    wanted = set(model.split.hashes(part))
    cases = tuple(case for case in dataset.cases if case_sha256(case) in wanted)
    scores, maps, masks = score_cases(model, cases)
    return ScoredTest(cases, ("",) * len(cases), f"normal images, {part}", (), scores, maps, masks)


def quantile(scores: Sequence[float] | np.ndarray) -> float:
    """The score that a share FPR of the given normal images exceeds at most."""
    return float(np.quantile(scores, 1 - FPR, method="higher"))


def record(run: dict[str, Any], model: FittedModel, judged: Judged, *, data: str) -> dict[str, Any]:
    """What a result file holds: configuration, provenance, metrics and, for the main variant, the log."""
    config, info, test = model.detector.config.canonical(), model.detector.info, judged.test
    names = (
        "detector",
        "dataset",
        "preset",
        "variant",
        "seed",
        "holdout",
        *(("folds",) if run["folds"] else ()),
        "size",
        "equalise",
        "fit_seconds",
        "fit_processor_seconds",
    )
    log = model.extras.get("log.jsonl", b"").decode() if run["variant"] not in run["rescore"] else ""
    abnormal = test.labels == 1
    return {
        **{name: run[name] for name in names},
        "config": config,
        "fidelity": info.fidelity,
        "localises": info.localises,
        "weights": config["weights"],
        "epochs": model.info["epochs"],
        "n_train": model.info["n_train"],
        "n_holdout": model.info["n_holdout"],
        "parameters": count(model.detector.module),
        "split_digest": model.split.digest,
        "data_manifest": data,
        "commit": CODE,
        "versions": {"umiad": umiad.__version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "score_seconds": round(judged.score_seconds, 1),
        "counts": {
            "n_normal": int((~abnormal).sum()),
            "n_abnormal": int(abnormal.sum()),
            "n_masked": sum(mask is not None and bool(mask.any()) for mask in test.masks),
        },
        "metrics": judged.metrics["official"],
        "metrics_common": judged.metrics["common"],
        "thresholds": judged.thresholds,
        "cases": {
            "labels": "".join(str(label) for label in test.labels),
            "groups": list(test.groups),
            "image_scores": judged.scores["official"],
            "image_scores_common": judged.scores["common"],
        },
        "log": [json.loads(line) for line in log.splitlines()],
    }


def write(target: Path, value: dict[str, Any]) -> None:
    """Write a result at once or not at all; one line per entry of the lists, to keep files short."""
    RESULTS.mkdir(exist_ok=True)
    temporary = target.with_suffix(".tmp")
    lines = [
        f" {json.dumps(k)}: {json.dumps(v, sort_keys=True, allow_nan=False)}"
        for k, v in sorted(value.items())
    ]
    temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    os.replace(temporary, target)


def main() -> None:
    """Run every entry of the lists that has no result yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lists", nargs="+", type=Path, help="TOML lists of runs")
    parser.add_argument("--data", type=Path, required=True, help="folder with busi, brain_mri, head_ct")
    parser.add_argument("--weights", required=True, help="backbone weights, as in umiad fit")
    parser.add_argument(
        "--only",
        default="",
        help="only runs whose 'dataset detector preset variant seed' contains all of these",
    )
    parser.add_argument("--scratch", type=Path, help="where models are kept while they are fitted")
    parser.add_argument(
        "--remember", action="store_true", help="keep backbone features in memory between runs (busi: 2.9 GB)"
    )
    parser.add_argument(
        "--sam", type=Path, metavar="FOLDER", help=f"for rows with SAM's edges: {sam.HOW_TO_GET}"
    )
    parser.add_argument("--dry-run", action="store_true", help="list what is missing and stop")
    options = parser.parse_args()
    if options.remember:
        remember()
    for each in options.lists:
        for listed in runs(each):
            name = " ".join(str(listed[k]) for k in ("dataset", "detector", "preset", "variant", "seed"))
            folder = options.data / listed["dataset"]
            if not all(word in name.split() for word in options.only.split()):
                continue
            run = with_sam(listed, options.sam)
            if run is None:
                sys.stderr.write(f"not run: {name}: no SAM checkpoint, name one with --sam FOLDER\n")
                continue
            if not folder.is_dir():
                sys.stderr.write(f"skipped {name}: {folder} is not there\n")
                continue
            if options.dry_run:
                plan = planned(run, folder, options.weights).values()
                state = "done" if all(target.exists() for _, target in plan) else "missing"
                sys.stdout.write(f"{state:8} {name}\n")
                continue
            sys.stderr.write(f"{name}\n")
            written = execute(run, folder, options.weights, scratch=options.scratch)
            sys.stderr.write(f"{', '.join(path.name for path in written) or 'done before'}\n")


if __name__ == "__main__":
    main()
