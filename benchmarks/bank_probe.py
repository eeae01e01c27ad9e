"""Is patchcore's default bank too short? Banks of 2,048 items and of 10 %, greedy and random, on BUSI's seed 0.

    python benchmarks/bank_probe.py --data ../shared/data/busi --weights FILE

A diagnosis on test images, made after the presets were fixed by cost; nothing was chosen from it. All normal test
images and 80 abnormal ones; pixels subsampled by 4.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from paper_protocol import CODE
from umiad.api import build
from umiad.config import Preprocessing
from umiad.data import load_data
from umiad.detectors.patchcore import PatchCore, fibres_of, greedy_coreset
from umiad.duplicates import fingerprints
from umiad.fitting import case_image
from umiad.io import read_mask
from umiad.metrics import det_auroc, seg_auroc
from umiad.preprocess import resize_mask, to_input
from umiad.scoring import top_mean
from umiad.splits import make_split
from umiad.types import Case

TARGET = Path(__file__).parent / "results" / "bank-busi-patchcore.json"
SIZE, SHORT, FRACTION, PROJECTION, ABNORMAL = 256, 2048, 0.1, 128, 80


def features(detector: PatchCore, cases: Sequence[Case]) -> Tensor:
    """Joined features of layers 2 and 3, [N,C,h,w]."""
    inputs = [to_input(case_image(case), Preprocessing(size=SIZE)) for case in cases]
    batches = torch.from_numpy(np.stack(inputs)).split(8)
    return torch.cat([detector.prepare(batch)["features"] for batch in batches])


def mask(case: Case) -> np.ndarray:
    """The lesion at the model's size; empty for a normal image."""
    if not case.masks:
        return np.zeros((SIZE, SIZE), dtype=bool)
    return resize_mask(read_mask(case.masks, size=case_image(case).size), (SIZE, SIZE))


def main() -> None:
    """Fit the four banks on the same fibres and judge them on the same images."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", required=True)
    options = parser.parse_args()
    data = load_data(options.data)
    prints = fingerprints(data.cases)
    split = make_split(data, prints, seed=0, holdout=0.0)
    by_hash = {each.sha256: case for each, case in zip(prints, data.cases, strict=True)}
    test = [by_hash[each] for each in split.hashes("test")]
    abnormal = [case for case in test if case.label == 1]
    chosen = np.random.default_rng(0).choice(len(abnormal), ABNORMAL, replace=False)
    test = [case for case in test if case.label == 0] + [abnormal[k] for k in chosen]
    labels, masks = np.array([case.label for case in test]), np.stack([mask(case) for case in test])

    detector = build("patchcore", weights=options.weights)
    assert isinstance(detector, PatchCore)  # noqa: S101
    fibres = fibres_of(features(detector, [by_hash[each] for each in split.hashes("train")]))
    rng = torch.Generator().manual_seed(0)
    projection = torch.randn(fibres.shape[1], PROJECTION, generator=rng) / PROJECTION**0.5
    greedy = greedy_coreset(fibres @ projection, round(FRACTION * len(fibres)))
    random = torch.randperm(len(fibres), generator=rng)[: len(greedy)]
    prepared, found = features(detector, test), {}
    for name, index in (("greedy", greedy), ("random", random)):
        for length in (SHORT, len(index)):
            detector.bank.fibres = fibres[index[:length]].clone()
            detector.fitted = True
            scores = [detector.score_prepared({"features": batch}) for batch in prepared.split(8)]
            maps = torch.cat([each.anomaly_map for each in scores])
            own = torch.cat([each.image_score for each in scores]).numpy()
            found[f"{name} {length}"] = {
                "det_auroc": det_auroc(own, labels),
                "det_auroc_top3percent": det_auroc(top_mean(maps, 0.03).numpy(), labels),
                "seg_auroc": seg_auroc(maps[:, ::4, ::4].numpy(), masks[:, ::4, ::4]),
            }
            print(name, length, {key: round(value, 3) for key, value in found[f"{name} {length}"].items()})
    facts = {
        "what": " ".join((__doc__ or "").split("\n\n")[2].split()),
        "weights": detector.config.weights,
        "seed": 0,
        "commit": CODE,
        "banks": found,
    }
    TARGET.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
