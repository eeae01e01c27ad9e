"""Run detectors on the public sets as the paper splits them; one JSON file per run, so a grid resumes.

python benchmarks/paper_protocol.py --data ../shared/data --weights FILE benchmarks/foundation.toml
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import umiad
from umiad.api import Evaluation, FitOptions, FittedModel, build, evaluate, fit
from umiad.config import canonical_json
from umiad.data import load_data
from umiad.detectors.contract import Detector
from umiad.progress import RichReporter

RESULTS = Path(__file__).parent / "results"


def runs(path: Path) -> Iterator[dict[str, Any]]:
    """One dictionary per run of a TOML list; `datasets` and `seeds` are multiplied out."""
    for entry in tomllib.loads(path.read_text(encoding="utf-8"))["run"]:
        common = {
            "preset": "default",
            "variant": "main",
            "size": 256,
            "holdout": 0.0,
            "settings": {},
            "rescore": {},
        }
        for dataset in entry["datasets"]:
            for seed in entry["seeds"]:
                rest = {k: v for k, v in entry.items() if k not in ("datasets", "seeds")}
                yield {**common, **rest, "dataset": dataset, "seed": seed}


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
    facts = {**{k: run[k] for k in ("detector", "dataset", "variant", "seed", "holdout")}, "data": data}
    return hashlib.sha256(
        canonical_json({**facts, "weights": weights, "config": config}).encode()
    ).hexdigest()[:16]


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
    dataset, started, written = load_data(folder), time.monotonic(), []
    with RichReporter(Console(stderr=True)) as reporter, tempfile.TemporaryDirectory(dir=scratch) as work:
        options = FitOptions(holdout=run["holdout"], seed=run["seed"])
        first = plan[run["variant"]][0]
        model = fit(first, dataset, options=options, out=Path(work) / "model", reporter=reporter)
        fit_seconds = time.monotonic() - started
        for variant, (detector, target) in plan.items():
            if detector is not first:
                detector.load_state(first.state())
            scored = FittedModel(detector, model.config, model.split, extras=model.extras)
            result = evaluate(scored, dataset, reporter=reporter)
            facts = {**run, "variant": variant, "fit_seconds": round(fit_seconds, 1)}
            write(target, record(facts, scored, result, data=manifest(folder)))
            written.append(target)
    return written


def record(run: dict[str, Any], model: FittedModel, result: Evaluation, *, data: str) -> dict[str, Any]:
    """What a result file holds: configuration, provenance, metrics and, for the main variant, the log."""
    config = model.detector.config.canonical()
    names = ("detector", "dataset", "preset", "variant", "seed", "holdout", "size", "fit_seconds")
    log = model.extras.get("log.jsonl", b"").decode() if run["variant"] not in run["rescore"] else ""
    return {
        **{name: run[name] for name in names},
        "config": config,
        "weights": config["weights"],
        "epochs": model.info["epochs"],
        "n_train": model.info["n_train"],
        "n_holdout": model.info["n_holdout"],
        "split_digest": model.split.digest,
        "data_manifest": data,
        "commit": CODE,
        "versions": {"umiad": umiad.__version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "counts": result.counts,
        "metrics": result.metrics,
        "log": [json.loads(line) for line in log.splitlines()],
    }


def write(target: Path, value: dict[str, Any]) -> None:
    """Write a result at once or not at all."""
    RESULTS.mkdir(exist_ok=True)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(
        json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8"
    )
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
        "--only", default="", help="only runs whose 'dataset detector preset variant' contains this"
    )
    parser.add_argument("--scratch", type=Path, help="where models are kept while they are fitted")
    options = parser.parse_args()
    for each in options.lists:
        for run in runs(each):
            name = " ".join(run[k] for k in ("dataset", "detector", "preset", "variant"))
            folder = options.data / run["dataset"]
            if options.only not in name:
                continue
            if not folder.is_dir():
                sys.stderr.write(f"skipped {name}: {folder} is not there\n")
                continue
            sys.stderr.write(f"{name}, seed {run['seed']}\n")
            written = execute(run, folder, options.weights, scratch=options.scratch)
            sys.stderr.write(f"{', '.join(path.name for path in written) or 'done before'}\n")


if __name__ == "__main__":
    main()
