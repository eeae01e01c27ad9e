"""What near-duplicates on both sides of a split are worth: padim on ungrouped random splits.

    python benchmarks/grouping_probe.py --data ../shared/data/busi --weights FILE

The same sizes as the paper's split, drawn image by image; the grouped figures are the protocol's.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from paper_protocol import CODE
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


def main() -> None:
    """Fit and evaluate padim (preset default) on ungrouped splits of seeds 0 to 4."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", required=True)
    options = parser.parse_args()
    data = load_data(options.data)
    grouped = make_split(data, fingerprints(data.cases), holdout=0.0)
    found = {}
    for seed in range(5):
        detector = build("padim", weights=options.weights, seed=seed)
        split = ungrouped(data, grouped, seed=seed)
        model = fit(detector, data, options=FitOptions(holdout=0.0, seed=seed), groups=split)
        metrics = evaluate(model, data, n_resamples=10).metrics
        found[str(seed)] = {name: metrics[name]["value"] for name in ("det_auroc", "seg_auroc", "seg_aupro")}
        print(seed, found[str(seed)])
    record = {
        "what": "padim, preset default, on random splits that do not keep near-duplicates together",
        "data": data.name,
        "weights": detector.config.weights,
        "commit": CODE,
        "ungrouped": found,
    }
    target = RESULTS / f"grouping-{data.name}-padim.json"
    target.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
