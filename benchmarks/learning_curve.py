"""How many normal images does the default of egmf need? benchmarks/results/learning_curve-busi.json.

python benchmarks/learning_curve.py --data ../shared/data --weights FILE

The same test images per seed for every number; the smaller training sets are the beginnings of one random order of the
larger ones, drawn from the seed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console

from paper_protocol import CODE, RESULTS, write
from remember import remember
from umiad.api import FitOptions, build, fit
from umiad.bootstrap import resample_scores
from umiad.data import load_data
from umiad.evaluation import score_test
from umiad.fitting import split_data
from umiad.progress import RichReporter
from umiad.splits import Split

COUNTS, SEEDS = (10, 25, 50, 75, 99), (0, 1, 2)
METRICS = ("det_auroc", "seg_auroc", "seg_aupro")


def shortened(split: Split, count: int) -> Split:
    """The split with `count` of its training images, the others unused; near-duplicates may be parted."""
    names = split.names("train")
    kept = {names[k] for k in np.random.default_rng(split.seed).permutation(len(names))[:count]}
    entries = tuple(
        replace(entry, part="unused") if entry.part == "train" and entry.name not in kept else entry
        for entry in split.entries
    )
    return replace(split, entries=entries, rule=f"{split.rule}; {count} of the training images")


def main() -> None:
    """Fit and judge every number of training images and seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with busi")
    parser.add_argument("--weights", required=True, help="backbone weights, as in umiad fit")
    parser.add_argument("--detectors", default="egmf,posgauss", help="names with commas between")
    options = parser.parse_args()
    remember()
    dataset = load_data(options.data / "busi")
    rows = []
    with RichReporter(Console(stderr=True)) as reporter:
        for seed in SEEDS:
            split = split_data(dataset, seed=seed, holdout=0.0, reporter=reporter)
            for name in options.detectors.split(","):
                for count in COUNTS:
                    detector = build(name, weights=options.weights, seed=seed)
                    chosen = shortened(split, count)
                    model = fit(detector, dataset, options=FitOptions(holdout=0.0, seed=seed), groups=chosen)
                    test = score_test(model, dataset, reporter=reporter)
                    found, _ = resample_scores(
                        test.image_scores,
                        test.labels,
                        list(test.groups),
                        test.maps,
                        test.masks,
                        n_resamples=0,
                    )
                    values = {metric: found[metric]["value"] for metric in METRICS}
                    rows.append({"detector": name, "n": count, "seed": seed, **values})
    facts = {
        "dataset": "busi",
        "weights": detector.config.weights,
        "size": detector.config.size,
        "commit": CODE,
    }
    write(RESULTS / "learning_curve-busi.json", {**facts, "rows": rows})


if __name__ == "__main__":
    main()
