"""How `umiad tune` ranks settings on each public set, from normal images only: benchmarks/results/proxy-SET.json.

python benchmarks/proxy.py --data ../shared/data --weights FILE

The names of the candidates say which runs on the real test images they belong to: detector-preset-variant.
benchmarks/win_table.py sets both beside each other. Other candidates go to a file with the name of their list:

python benchmarks/proxy.py busi --candidates benchmarks/medvit_schedule.toml --folds 2 --data DATA --weights FILE
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from paper_protocol import CODE, RESULTS, write
from remember import remember
from umiad.progress import RichReporter
from umiad.tuning import TuneOptions, tune
from umiad.tuning_candidates import read_candidates

CANDIDATES = Path(__file__).parent / "proxy.toml"
FOLDS = TuneOptions().folds
KEPT = (
    "name",
    "detector",
    "preset",
    "rank_score",
    "det_auroc",
    "seg_auroc",
    "seg_aupro",
    "gap",
    "fit_seconds",
    "parts",
)


def main() -> None:
    """Tune on every set named that has no result yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", nargs="*", default=["head_ct", "brain_mri", "busi"])
    parser.add_argument("--data", type=Path, required=True, help="folder with busi, brain_mri, head_ct")
    parser.add_argument("--weights", required=True, help="backbone weights, as in umiad fit")
    parser.add_argument("--scratch", type=Path, help="keep finished candidates here, to go on after a stop")
    parser.add_argument("--candidates", type=Path, default=CANDIDATES, help="list as for umiad tune")
    parser.add_argument("--folds", type=int, default=FOLDS, help=f"of cross-validation, {FOLDS} by default")
    options = parser.parse_args()
    remember()
    for name in options.sets:
        target = RESULTS / f"{options.candidates.stem}-{name}.json"
        if target.exists():
            continue
        out = options.scratch / name if options.scratch else None
        with RichReporter(Console(stderr=True)) as reporter:
            found = tune(
                options.data / name,
                read_candidates(options.candidates),
                options=TuneOptions(weights=options.weights, folds=options.folds),
                out=out,
                reporter=reporter,
            )
        rows = []
        for each in found.results:
            values = each.to_json()
            row = {key: values[key] for key in KEPT}
            for metric in ("rank_score", "det_auroc", "seg_auroc", "seg_aupro"):
                row[metric] = values[metric]["value"]
            row["variant"] = each.name.removeprefix(f"{each.candidate.detector}-{each.candidate.preset}-")
            rows.append(row)
        facts = {
            "dataset": name,
            "seed": found.options.seed,
            "folds": found.options.folds,
            "per_image": found.options.per_image,
            "n_normal": sum(map(len, found.folds)),
            "n_synthetic": found.n_synthetic,
            "commit": CODE,
        }
        facts["weights"] = found.results[0].detector_config["weights"]
        write(target, {**facts, "candidates": rows})


if __name__ == "__main__":
    main()
