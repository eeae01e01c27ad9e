"""What near-duplicates on both sides of a split are worth: detectors on ungrouped random splits.

    python benchmarks/grouping_probe.py --data ../shared/data/busi --weights FILE --detectors padim,egmf

The same sizes as the paper's split, drawn image by image; the grouped figures are the protocol's.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from paper_protocol import CODE
from remember import remember
from umiad.api import FitOptions, build, evaluate, fit
from umiad.data import DataSet, load_data
from umiad.duplicates import fingerprints
from umiad.splits import Split, make_split

RESULTS = Path(__file__).parent / "results"


def ungrouped(data: DataSet, grouped: Split, *, seed: int) -> Split:
    """The split with its normal images dealt out again, each for itself."""
    normals = [k for k, entry in enumerate(grouped.entries) if entry.label == 0]
    order = np.random.default_rng(seed).permutation(normals).tolist()
    train = set(order[: data.train_normals])
    entries = tuple(
        replace(entry, part="train" if k in train else "test", group="")
        for k, entry in enumerate(grouped.entries)
    )
    return replace(grouped, entries=entries, seed=seed, rule="random, near-duplicates not kept together")


def probe(name: str, data: DataSet, grouped: Split, weights: str) -> dict[str, object]:
    """Metrics of one detector (preset default) on the ungrouped splits of seeds 0 to 4."""
    found = {}
    for seed in range(5):
        detector = build(name, weights=weights, seed=seed)
        split = ungrouped(data, grouped, seed=seed)
        model = fit(detector, data, options=FitOptions(holdout=0.0, seed=seed), groups=split)
        metrics = evaluate(model, data, n_resamples=10).metrics
        found[str(seed)] = {name: metrics[name]["value"] for name in ("det_auroc", "seg_auroc", "seg_aupro")}
        print(name, seed, found[str(seed)])
    return {
        "what": f"{name}, preset default, on random splits that do not keep near-duplicates together",
        "data": data.name,
        "weights": detector.config.weights,
        "commit": CODE,
        "ungrouped": found,
    }


def main() -> None:
    """Fit and evaluate every detector named on ungrouped splits."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--detectors", default="padim", help="names with commas between")
    options = parser.parse_args()
    remember()
    data = load_data(options.data)
    grouped = make_split(data, fingerprints(data.cases), holdout=0.0)
    for name in options.detectors.split(","):
        record = probe(name, data, grouped, options.weights)
        target = RESULTS / f"grouping-{data.name}-{name}.json"
        target.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
