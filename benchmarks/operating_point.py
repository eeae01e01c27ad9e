"""What the threshold of a plain fit does on test images: sensitivity and specificity of egmf's default."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from results_store import DATASETS, Result, cell, select
from umiad.report import Block, Table
from win_table import missing

NAME = "At the threshold that a fit sets"
COMMAND = "python benchmarks/paper_protocol.py --data DATA --weights FILE benchmarks/foundation.toml"
VARIANTS = {"holdout": "hold-out", "folds": "five folds"}
"""Variant of a run -> what its threshold comes from."""
CAPTION = (
    "egmf, preset default, threshold at a false-positive rate of 5 %: from a fifth of the training normals held out "
    "(at least 19), as `umiad fit` does by itself, or from five folds (`--folds 5`), fitted on all. Sensitivity and "
    "specificity of whole images, in percent, intervals as elsewhere; nothing of the test images is used. Ten normal "
    "test images move the specificity in steps of 10."
)


def operating_blocks(results: Sequence[Result]) -> list[Block]:
    """One table over sets and seeds."""
    lines = []
    for dataset, variant in itertools.product(DATASETS, VARIANTS):
        for run in select(results, dataset=dataset, detector="egmf", variant=variant):
            counts, metrics = run["counts"], run["metrics"]
            lines.append(
                (
                    dataset,
                    VARIANTS[variant],
                    f"{run['seed']}",
                    f"{run['n_train']} / {run['n_holdout'] or run['n_train']}",
                    f"{counts['n_normal']} / {counts['n_abnormal']}",
                    cell(metrics["det_sensitivity"]),
                    cell(metrics["det_specificity"]),
                    cell(metrics["det_auroc"]),
                    f"{run['weights']}, {run['commit']}",
                )
            )
    if not lines:
        return [missing(NAME, "benchmarks/results/*-egmf-*.json, variant holdout", COMMAND)]
    header = (
        "data",
        "threshold from",
        "seed",
        "normals fitted / for the threshold",
        "test normal / abnormal",
        "sensitivity",
        "specificity",
        "det_auroc",
        "weights, commit",
    )
    return [Table(NAME, header, lines, CAPTION)]
