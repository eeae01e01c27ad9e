"""What compact features (float16 in the cache) do to accuracy: fitted with and without, on the same split.

    python benchmarks/compact_features.py --data ../shared/data --weights FILE [--only "head_ct padim"]

Results are written after each comparison and kept, so a run that was cut off goes on; docs/performance.md shows them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from paper_protocol import CODE, judge_twice, manifest
from umiad import api
from umiad.data import load_data
from umiad.progress import RichReporter

TARGET = Path(__file__).parent / "results" / "compact_features.json"
DETECTORS = (("padim", "default"), ("egmf", "default"), ("cflow", "quick"), ("rd4ad", "quick"))
DATASETS = ("head_ct", "brain_mri", "busi")
METRICS = ("det_auroc", "seg_auroc", "seg_aupro")
SEED = 0


def compare(folder: Path, detector: str, preset: str, weights: str, reporter: RichReporter) -> dict[str, Any]:
    """Metrics of both fits, in percent, and how far image scores are apart as a share of their spread."""
    dataset, found, scores = load_data(folder), {}, {}
    row: dict[str, Any] = {}
    for name, compact in (("float32", False), ("float16", True)):
        built = api.build(detector, preset=preset, weights=weights, seed=SEED)
        options = api.FitOptions(holdout=0.0, seed=SEED, compact_features=compact)
        model = api.fit(built, dataset, options=options, reporter=reporter)
        judged = judge_twice(model, dataset, reporter, n_resamples=0)
        values = {key: judged.metrics["official"][key]["value"] for key in METRICS}
        found[name] = {key: None if value is None else round(100 * value, 3) for key, value in values.items()}
        scores[name] = torch.tensor(judged.scores["official"], dtype=torch.float64)
        config = built.config
        row = {"epochs": model.info["epochs"], "split_digest": model.split.digest, "weights": config.weights}
    apart = (scores["float16"] - scores["float32"]).abs().max() / scores["float32"].std()
    return {**row, "metrics": found, "scores_apart": float(f"{float(apart):.3g}")}


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, type=Path, help="folder with busi, brain_mri, head_ct")
    parser.add_argument("--weights", required=True, help="backbone weights, as in umiad fit")
    parser.add_argument(
        "--only", default="", help="only those whose 'dataset detector preset' holds all of these"
    )
    given = parser.parse_args()
    rows = json.loads(TARGET.read_text(encoding="utf-8")) if TARGET.exists() else []
    done = {(row["dataset"], row["detector"], row["preset"]) for row in rows}
    with RichReporter(Console(stderr=True)) as reporter:
        for dataset in DATASETS:
            for detector, preset in DETECTORS:
                facts = (dataset, detector, preset)
                if facts in done or not all(word in " ".join(facts) for word in given.only.split()):
                    continue
                reporter.note(" ".join(facts))
                found = compare(given.data / dataset, detector, preset, given.weights, reporter)
                rows.append(
                    {
                        **dict(zip(("dataset", "detector", "preset"), facts, strict=True)),
                        **found,
                        "seed": SEED,
                        "data_manifest": manifest(given.data / dataset),
                        "threads": torch.get_num_threads(),
                        "torch": torch.__version__,
                        "commit": CODE,
                    }
                )
                TARGET.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
