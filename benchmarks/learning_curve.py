"""How many normal images does the default of egmf need? benchmarks/results/learning_curve-busi.json.

python benchmarks/learning_curve.py --data ../shared/data --weights FILE

The same test images per seed for every number; the smaller training sets are the beginnings of one random order of the
larger ones, drawn from the seed. Closed forms only: the backbone sees every image once, all fits share its features.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from paper_protocol import CODE, RESULTS, write
from umiad.api import build
from umiad.bootstrap import resample_scores
from umiad.config import Preprocessing
from umiad.data import load_data
from umiad.detectors.contract import CollectingDetector
from umiad.evaluation import case_mask
from umiad.fitting import case_image, split_data
from umiad.preprocess import to_input
from umiad.progress import RichReporter
from umiad.splits import Split

COUNTS, SEEDS, BATCH = (10, 25, 50, 75, 99), (0, 1, 2), 16
METRICS = ("det_auroc", "seg_auroc", "seg_aupro")


def fitted(name: str, weights: str, seed: int, prepared: dict[str, Tensor]) -> CollectingDetector:
    """A closed form, fitted on prepared images."""
    detector = build(name, weights=weights, seed=seed)
    if not (isinstance(detector, CollectingDetector) and detector.info.closed_form):
        raise SystemExit(f"{name} is no closed form")
    for rows in torch.arange(len(next(iter(prepared.values())))).split(BATCH):
        detector.collect({key: values[rows] for key, values in prepared.items()})
    detector.finish(torch.Generator().manual_seed(seed))
    return detector


def judged(
    detector: CollectingDetector,
    prepared: dict[str, Tensor],
    labels: np.ndarray,
    masks: list[np.ndarray | None],
) -> dict[str, float | None]:
    """Metrics on prepared test images."""
    count = len(next(iter(prepared.values())))
    found = [
        detector.score_prepared({key: values[rows] for key, values in prepared.items()})
        for rows in torch.arange(count).split(BATCH)
    ]
    scores = torch.cat([each.image_score for each in found]).double().numpy()
    maps = torch.cat([each.anomaly_map for each in found]).numpy()
    metrics, _ = resample_scores(scores, labels, [""] * count, maps, masks, n_resamples=0)
    return {metric: metrics[metric]["value"] for metric in METRICS}


def main() -> None:
    """Fit and judge every number of training images, seed and detector."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with busi")
    parser.add_argument("--weights", required=True, help="backbone weights, as in umiad fit")
    parser.add_argument("--detectors", default="egmf,posgauss", help="names with commas between")
    options = parser.parse_args()
    if (target := RESULTS / "learning_curve-busi.json").exists():
        return
    dataset, rows = load_data(options.data / "busi"), []
    with RichReporter(Console(stderr=True)) as reporter:
        splits: dict[int, Split] = {
            seed: split_data(dataset, seed=seed, holdout=0.0, reporter=reporter) for seed in SEEDS
        }
        images = [case_image(case) for case in dataset.cases]
        inputs = np.stack([to_input(image, Preprocessing()) for image in images])
        place = {dataset.name_of(case): k for k, case in enumerate(dataset.cases)}
        pairs = zip(dataset.cases, images, strict=True)
        masks = [case_mask(case, image, Preprocessing().size) for case, image in pairs]
        for name in options.detectors.split(","):
            probe = build(name, weights=options.weights)
            batches = []
            for start in range(0, len(inputs), BATCH):
                batches.append(probe.prepare(torch.from_numpy(inputs[start : start + BATCH])))
                reporter.stage(f"{name}: features", min(start + BATCH, len(inputs)), len(inputs))
            prepared = {key: torch.cat([each[key] for each in batches]) for key in batches[0]}
            for seed, split in splits.items():
                train, test = ([place[n] for n in split.names(part)] for part in ("train", "test"))
                order = np.random.default_rng(seed).permutation(len(train))
                labels = np.array([int(dataset.cases[k].label or 0) for k in test])
                tested = {key: values[test] for key, values in prepared.items()}
                for count in COUNTS:
                    chosen = [train[k] for k in order[:count]]
                    model = fitted(name, options.weights, seed, {k: v[chosen] for k, v in prepared.items()})
                    values = judged(model, tested, labels, [masks[k] for k in test])
                    rows.append({"detector": name, "n": count, "seed": seed, **values})
                    reporter.stage(f"{name}, seed {seed}", COUNTS.index(count) + 1, len(COUNTS))
            facts = {
                "dataset": "busi",
                "weights": probe.config.weights,
                "size": probe.config.size,
                "commit": CODE,
            }
            write(target, {**facts, "rows": rows})


if __name__ == "__main__":
    main()
