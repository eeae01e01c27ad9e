"""Which short schedule egmf's preset "ablation" takes: the likelihood of held-out normal images of BUSI decides.

    python benchmarks/ablation_schedule.py --data ../shared/data --weights FILE

No abnormal image is read. A quarter of the normals is held out; every schedule has 15 epochs, so the comparison is
between batch sizes and learning rates. A schedule that is in the result file already is not run again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from paper_protocol import CODE
from umiad.api import FitOptions, build, fit
from umiad.data import load_data
from umiad.progress import RichReporter
from umiad.types import NORMAL

TARGET = Path(__file__).parent / "results" / "ablation_schedule.json"
EPOCHS, HOLDOUT, SEED = 15, 0.25, 0
SCHEDULES: dict[str, dict[str, Any]] = {
    "1e-3, cosine, batches of 16": {"learning_rate": 1e-3, "schedule": "cosine", "batch_size": 16},
    "1e-3, cosine, batches of 32": {"learning_rate": 1e-3, "schedule": "cosine", "batch_size": 32},
    "2e-3, cosine, batches of 32": {"learning_rate": 2e-3, "schedule": "cosine", "batch_size": 32},
}


def main() -> None:
    """Run what is missing and store each result as it comes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with busi")
    parser.add_argument("--weights", required=True, help="backbone weights, as in umiad fit")
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(TARGET.read_text(encoding="utf-8")) if TARGET.exists() else {}
    dataset = load_data(options.data / "busi")
    normals = replace(dataset, cases=tuple(case for case in dataset.cases if case.label == NORMAL))
    for name, schedule in SCHEDULES.items():
        if name in found:
            continue
        training = {"epochs": EPOCHS, **schedule}
        detector = build("egmf", preset="paper", weights=options.weights, settings={"training": training})
        with RichReporter(Console(stderr=True)) as reporter:
            model = fit(detector, normals, options=FitOptions(holdout=HOLDOUT, seed=SEED), reporter=reporter)
        facts = (
            "weights",
            "n_train",
            "n_holdout",
            "epochs",
            "seed",
            "train_nats_per_dim",
            "holdout_nats_per_dim",
        )
        found[name] = {**{key: model.info[key] for key in facts}, "commit": CODE}
        TARGET.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(name, found[name]["holdout_nats_per_dim"])


if __name__ == "__main__":
    main()
