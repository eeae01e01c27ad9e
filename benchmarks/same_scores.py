"""Whether what makes scoring fast leaves scores as they were, on the three sets; for docs/performance.md.

    python benchmarks/same_scores.py --data ../shared/data --weights FILE

The default, fitted with hold-out 0.2 (seed 0), scores test images, evenly chosen, as it ships: folded backbone,
channels-last, batches of 8. The same images are scored by the plain network (BatchNorm as layers, PyTorch's default
layout), one at a time, and with the backbone in bfloat16 (imitated where the processor has none: slow). Ends with an
error where anything that stays in float32 changes more than 1e-4, or a decision.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from paper_protocol import CODE, manifest
from umiad import api, bfloat16
from umiad.agreement import changed_decisions, map_difference
from umiad.data import load_data
from umiad.duplicates import case_sha256
from umiad.fitted import FittedModel
from umiad.fitting import usable_images
from umiad.metrics import det_auroc
from umiad.nn.encoder import Pyramid
from umiad.preprocess import original_size, to_input
from umiad.progress import RichReporter
from umiad.scorer import BATCH_SIZE

TARGET = Path(__file__).parent / "results" / "same_scores.json"
DATASETS = ("head_ct", "brain_mri", "busi")
IMAGES = 96
TOLERANCE = 1e-4
"""What a map may change by, as a share of its range, and a score, as a share of the scores' spread, in float32."""
IN_BFLOAT16 = "backbone in bfloat16"
Scored = tuple[np.ndarray, np.ndarray]


def score(model: FittedModel, inputs: np.ndarray, sizes: list[tuple[int, int]], *, batch: int) -> Scored:
    """Maps [N,S,S] and image scores [N]."""
    parts = [model.run(inputs[k : k + batch], sizes[k : k + batch]) for k in range(0, len(inputs), batch)]
    return np.concatenate([maps for maps, _ in parts]), np.concatenate([scores for _, scores in parts])


@contextmanager
def plain(model: FittedModel) -> Iterator[None]:
    """Inside, backbones run layer by layer as they would be trained, nothing folded, in PyTorch's default layout."""

    def network_of(pyramid: Pyramid) -> Callable[[], Callable[..., tuple[Tensor, ...]]]:
        def run(images: Tensor, *, depth: int) -> tuple[Tensor, ...]:
            part = pyramid.get_submodule
            with torch.no_grad():
                maps = [part("maxpool")(F.relu(part("bn1")(part("conv1")(images))))]
                for stage in range(1, depth + 1):
                    maps.append(part(f"layer{stage}")(maps[-1]))
            return tuple(maps[1:])

        return lambda: run

    found = bfloat16.backbones(model)
    for each in found:
        each._network = network_of(each)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        for each in found:
            del each._network


@contextmanager
def rounded(model: FittedModel) -> Iterator[None]:
    """Inside, backbones run in bfloat16."""
    found = bfloat16.backbones(model)
    for each in found:
        each.dtype = torch.bfloat16
    try:
        yield
    finally:
        for each in found:
            each.dtype = None


def compared(model: FittedModel, expected: Scored, found: Scored, labels: np.ndarray) -> dict[str, Any]:
    """How far one way of scoring is from the shipped one."""
    calibration = model.config.calibration
    assert calibration is not None  # noqa: S101 - fitted with a hold-out
    maps = [map_difference(*pair) for pair in zip(expected[0], found[0], strict=True)]
    return {
        "map_median": float(f"{np.median(maps):.2e}"),
        "map_most": float(f"{max(maps):.2e}"),
        "score_most": float(f"{np.abs(found[1] - expected[1]).max() / expected[1].std():.2e}"),
        "decisions_changed": changed_decisions(expected, found, calibration),
        "decisions": 2 * len(labels),
        "det_auroc": [round(100 * det_auroc(each[1], labels), 3) for each in (expected, found)],
    }


def measure(folder: Path, weights: str, reporter: RichReporter) -> dict[str, Any]:
    """One set: facts of the fit, and the comparisons by name."""
    dataset = load_data(folder)
    model = api.fit(api.build("egmf", weights=weights), dataset, reporter=reporter)
    place = {case_sha256(case): case for case in dataset.cases}
    entries = [entry for entry in model.split.entries if entry.part == "test"]
    chosen = [entries[int(k)] for k in np.linspace(0, len(entries) - 1, min(IMAGES, len(entries)))]
    images = list(usable_images(place[entry.sha256] for entry in chosen))
    preprocessing = model.config.preprocessing
    inputs = np.stack([to_input(image, preprocessing) for image in images])
    sizes = [original_size(image, preprocessing) for image in images]
    labels = np.array([entry.label for entry in chosen])
    expected = score(model, inputs, sizes, batch=BATCH_SIZE)
    found = {"one image at a time": score(model, inputs, sizes, batch=1)}
    with plain(model):
        found["plain network"] = score(model, inputs, sizes, batch=BATCH_SIZE)
    with rounded(model):
        found[IN_BFLOAT16] = score(model, inputs, sizes, batch=BATCH_SIZE)
    return {
        "dataset": folder.name,
        "images": len(images),
        "weights": model.detector.config.weights,
        "seed": 0,
        "split_digest": model.split.digest,
        "data_manifest": manifest(folder),
        "bfloat16_native": bfloat16.native(),
        "torch": torch.__version__,
        "commit": CODE,
        "compared": {name: compared(model, expected, each, labels) for name, each in found.items()},
    }


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, type=Path, help="folder with busi, brain_mri, head_ct")
    parser.add_argument("--weights", required=True, help="backbone weights, as in umiad fit")
    parser.add_argument("--again", action="store_true", help="also what was measured before, by older code")
    given = parser.parse_args()
    rows = json.loads(TARGET.read_text(encoding="utf-8")) if TARGET.exists() and not given.again else []
    with RichReporter(Console(stderr=True)) as reporter:
        for name in DATASETS:
            if name not in {row["dataset"] for row in rows}:
                rows.append(measure(given.data / name, given.weights, reporter))
                TARGET.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if lost := beyond(rows):
        raise SystemExit(f"scores are not the same: {'; '.join(lost)} (at most {TOLERANCE:.0e} is allowed)")


def beyond(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What changed more than `TOLERANCE`, or a decision, among the ways that stay in float32."""
    return [
        f"{row['dataset']}, {name}: maps {each['map_most']:.1e}, scores {each['score_most']:.1e}, "
        f"{each['decisions_changed']} decisions"
        for row in rows
        for name, each in row["compared"].items()
        if name != IN_BFLOAT16
        and (max(each["map_most"], each["score_most"]) > TOLERANCE or each["decisions_changed"])
    ]


if __name__ == "__main__":
    main()
