"""What limits detection: the features, the number of normal images, or the method? benchmarks/results/limits.json.

python benchmarks/limits.py --data ../shared/data --weights FILE

`oracle`: a logistic regression that is given labels of both classes (which no detector here has), on the same frozen
features, averaged and maximised over positions, cross-validated with near-duplicates kept together. It says what the
features hold, not what normal images alone can tell.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from paper_protocol import CODE, RESULTS, write
from umiad.api import build
from umiad.config import Preprocessing
from umiad.data import load_data
from umiad.fitting import case_image, split_data
from umiad.preprocess import to_input
from umiad.progress import RichReporter
from umiad.weights import resolve

FOLDS, STRENGTH, BATCH = 5, 0.01, 8


def pooled(inputs: np.ndarray, weights: str) -> np.ndarray:
    """Mean and maximum over positions of the fibres of egmf's default, [N,2C]."""
    detector = build("egmf", weights=weights)
    found = []
    for start in range(0, len(inputs), BATCH):
        fibres = detector.prepare(torch.from_numpy(inputs[start : start + BATCH]))["fibres"]
        found.append(torch.cat([fibres.mean(1), fibres.amax(1)], dim=1).numpy())
    return np.concatenate(found)


def main() -> None:
    """Measure all three sets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with busi, brain_mri, head_ct")
    parser.add_argument("--weights", required=True, help="backbone weights, as in umiad fit")
    options = parser.parse_args()
    if (target := RESULTS / "limits.json").exists():
        return
    rows = {}
    for name in ("head_ct", "brain_mri", "busi"):
        dataset = load_data(options.data / name)
        with RichReporter(Console(stderr=True)) as reporter:
            split = split_data(dataset, seed=0, holdout=0.0, reporter=reporter)
        place = {dataset.name_of(case): case for case in dataset.cases}
        cases = [place[entry.name] for entry in split.entries]
        inputs = np.stack([to_input(case_image(case), Preprocessing()) for case in cases])
        labels = np.array([entry.label for entry in split.entries])
        groups = [entry.group or entry.name for entry in split.entries]
        features = pooled(inputs, options.weights)
        model = make_pipeline(
            StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=2000, class_weight="balanced")
        )
        folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
        values = []
        for fitted, tested in folds.split(features, labels, groups):
            model.fit(features[fitted], labels[fitted])
            values.append(float(roc_auc_score(labels[tested], model.decision_function(features[tested]))))
        rows[name] = {
            "oracle_supervised_auroc": round(float(np.mean(values)), 4),
            "folds": values,
            "n": len(labels),
        }
    label = resolve(options.weights).label
    write(target, {"rows": rows, "strength": STRENGTH, "weights": label, "seed": 0, "commit": CODE})


if __name__ == "__main__":
    main()
