"""What a comparison of detectors found: results on one test part, and paired differences with intervals.

A difference is judged by a paired bootstrap: every detector is resampled with the same images, so what an easy
or a hard image does to both cancels. Pure: no files, no clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal, TypeAlias

import numpy as np
from pydantic import Field

import umiad
from umiad import detectors
from umiad.bootstrap import NO_INTERVAL, PERCENTILES, Draws
from umiad.config import Config
from umiad.detectors.contract import DetectorInfo
from umiad.errors import ConfigError
from umiad.evaluation import Evaluation
from umiad.fitting import FitOptions
from umiad.overlay import ColourScale
from umiad.splits import Split
from umiad.types import ABNORMAL, Case

COMPARED = ("det_auroc", "seg_auroc", "seg_aupro")
"""Metrics whose differences are judged."""
BETTER, WORSE, SAME = "better", "worse", "no difference shown"
Post: TypeAlias = Literal["official", "common"]
POSTS: tuple[Post, ...] = ("official", "common")
ABNORMAL_SHOWN, NORMAL_SHOWN = 5, 3


class CompareOptions(Config):
    """What all detectors of a comparison share.

    `preset`, `weights`, `backbone`, `size`, `seed` (of the split and of each detector) as in `umiad.build`;
    `epochs`: instead of the preset's, for those that train; `holdout`, `equalise`, `device` as in `FitOptions`;
    `resamples` of the bootstrap.
    """

    preset: str = "default"
    weights: str = "imagenet"
    backbone: Literal["resnet18", "resnet34", "resnet50"] = "resnet18"
    size: int = 256
    seed: int = Field(default=0, ge=0)
    epochs: int | None = Field(default=None, ge=1)
    holdout: float = Field(default=0.2, ge=0, lt=0.9)
    equalise: int | None = Field(default=None, ge=32)
    resamples: int = Field(default=1000, ge=10)
    device: str = "auto"

    def settings(self) -> dict[str, Any]:
        """What overrides a detector's preset."""
        training = {} if self.epochs is None else {"training": {"epochs": self.epochs}}
        return {"backbone": self.backbone, **training}

    def fitting(self) -> FitOptions:
        """How each detector is fitted."""
        chosen = {name: getattr(self, name) for name in ("holdout", "seed", "equalise", "device")}
        return FitOptions(**chosen)


@dataclass(frozen=True)
class Cost:
    """What a detector needs: parameters, and seconds measured here.

    `origin`: "fitted", "resumed" or "loaded" (then `fit_seconds` is what the fit took, None if unknown).
    `image_seconds` and `encoder_seconds` per image: the detector and the bare backbone (all four stages),
    measured in turn on the same batch; their ratio hardly depends on the machine's load.
    """

    origin: str
    fit_seconds: float | None
    parameters: int
    trainable: int
    image_seconds: float
    encoder_seconds: float

    @property
    def ratio(self) -> float:
        """Seconds per image as a multiple of the bare backbone's."""
        return self.image_seconds / self.encoder_seconds


@dataclass(frozen=True, eq=False)
class Result:
    """One detector on the test part.

    `evaluation`: under its own post-processing; `common`, `common_draws`, `common_scores`: metrics, resamples and
    image scores under the common one (`umiad.scoring.common`). `maps` [G,S,S]: those of the gallery's images, to
    be drawn on `scale`. A detector that does not localise has no pixel metric.
    """

    name: str
    info: DetectorInfo
    evaluation: Evaluation
    common: dict[str, dict[str, Any]]
    common_draws: Draws
    common_scores: np.ndarray
    cost: Cost
    digest: str
    scale: ColourScale
    maps: np.ndarray

    def metrics(self, post: Post) -> dict[str, dict[str, Any]]:
        """Every metric under one of the two post-processings."""
        return self.evaluation.metrics if post == "official" else self.common

    def draws(self, post: Post) -> Draws:
        """The resamples of `metrics`."""
        return self.evaluation.draws if post == "official" else self.common_draws


@dataclass(frozen=True)
class Exhibit:
    """An image of the gallery; `row`: its place in the test part, `lesion`: masked share of the image, or None."""

    case: Case
    row: int
    lesion: float | None


@dataclass(frozen=True)
class Difference:
    """`first` minus `second` in one metric (a fraction), with its 95 % interval of the paired bootstrap.

    `verdict`: "better", "worse" (the interval leaves out 0) or "no difference shown"; None with a `reason`.
    """

    metric: str
    first: str
    second: str
    value: float | None
    ci95: tuple[float, float] | None
    n_resamples: int
    verdict: str | None
    reason: str | None


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` returns; `umiad.comparison_files.write_comparison` makes a report of it.

    `names` in the order asked for; each is in `results` or, with its reason, in `failures`. Raises ConfigError
    when the results do not rest on one split and the same test images.
    """

    options: CompareOptions
    names: tuple[str, ...]
    results: tuple[Result, ...]
    failures: Mapping[str, str]
    split: Split
    gallery: tuple[Exhibit, ...]
    notes: tuple[str, ...]

    def __post_init__(self) -> None:
        for each in self.results:
            seen = [(case.name, case.label, case.group) for case in each.evaluation.cases]
            first = [(case.name, case.label, case.group) for case in self.results[0].evaluation.cases]
            if each.digest != self.split.digest or seen != first:
                raise ConfigError(
                    f"{each.name}: judged on split {each.digest[:12]} and {len(seen)} images, expected "
                    f"{self.split.digest[:12]} and the same {len(first)} images as {self.results[0].name}"
                )

    @property
    def has_masks(self) -> bool:
        """Whether any lesion of the test part has a mask."""
        return any(each.evaluation.counts["n_masked"] for each in self.results)

    def differences(self, post: Post) -> list[Difference]:
        """Every pair of detectors in every metric of `COMPARED`."""
        pairs = combinations(self.results, 2)
        return [paired_difference(m, a, b, post=post) for a, b in pairs for m in COMPARED]

    def against_best(self, post: Post) -> list[Difference]:
        """In every metric of `COMPARED` the detector with the highest value against each of the others."""
        found = []
        for metric in COMPARED:
            ranked = [(v, r) for r in self.results if (v := r.metrics(post)[metric]["value"]) is not None]
            ranked.sort(key=lambda pair: -pair[0])
            found += [paired_difference(metric, ranked[0][1], r, post=post) for _, r in ranked[1:]]
        return found

    def to_json(self) -> dict[str, Any]:
        """All numbers as plain values: what `comparison.json` holds."""
        parts = {part: len(self.split.part(part)) for part in ("train", "holdout", "test")}
        split = {"digest": self.split.digest, "rule": self.split.rule, "seed": self.split.seed, **parts}
        return {
            "options": self.options.canonical(),
            "data": self.split.dataset,
            "umiad": umiad.__version__,
            "split": split,
            "counts": self.results[0].evaluation.counts if self.results else None,
            "notes": list(self.notes),
            "detectors": [self._detector(name) for name in self.names],
            "differences": {post: [asdict(each) for each in self.differences(post)] for post in POSTS},
            "cases": list(self._cases()),
            "gallery": [{"name": each.case.name, "lesion": each.lesion} for each in self.gallery],
        }

    def info(self, name: str) -> DetectorInfo:
        """Facts about a detector: of the design that was fitted, or where its fit failed, of the registered class."""
        fitted = (each.info for each in self.results if each.name == name)
        found: DetectorInfo = next(fitted, None) or detectors.detector_class(name).info
        return found

    def _detector(self, name: str) -> dict[str, Any]:
        info = self.info(name)
        facts: dict[str, Any] = {key: getattr(info, key) for key in ("reference", "fidelity", "localises")}
        facts = {"name": name, **facts, "failed": self.failures.get(name)}
        result = next((each for each in self.results if each.name == name), None)
        if result is None:
            return facts
        shown = result.evaluation
        return facts | {
            "metrics": {post: result.metrics(post) for post in POSTS},
            "cost": {**asdict(result.cost), "ratio": result.cost.ratio},
            "provenance": shown.provenance,
            "curves": {"roc": shown.roc, "pro": shown.pro},
        }

    def _cases(self) -> Iterator[dict[str, Any]]:
        """One row per test image: what it is, and the scores of every detector."""
        for row, case in enumerate(self.results[0].evaluation.cases if self.results else ()):
            scores = {}
            for each in self.results:
                own = each.evaluation.cases[row]
                scores[each.name] = {
                    "image_score": own.image_score,
                    "common_score": float(each.common_scores[row]),
                    "p_value": own.p_value,
                    "above_threshold": own.above_threshold,
                }
            facts = ("name", "kind", "label", "group", "has_mask")
            yield {**{key: getattr(case, key) for key in facts}, "scores": scores}


def paired_difference(metric: str, first: Result, second: Result, *, post: Post) -> Difference:
    """How much higher `first` is than `second`: resample by resample, both on the same images."""
    values = [each.metrics(post)[metric] for each in (first, second)]
    pair = (metric, first.name, second.name)
    if values[0]["value"] is None or values[1]["value"] is None:
        reasons = (f"{r.name}: {v['reason']}" for r, v in zip((first, second), values, strict=True))
        gaps = [text for text, v in zip(reasons, values, strict=True) if v["value"] is None]
        return Difference(*pair, None, None, 0, None, "; ".join(gaps))
    value = values[0]["value"] - values[1]["value"]
    drawn = [each.draws(post).get(metric, np.zeros(0)) for each in (first, second)]
    return drawn_difference(pair, value, *drawn)


def drawn_difference(
    pair: tuple[str, str, str], value: float, first: np.ndarray, second: np.ndarray
) -> Difference:
    """The difference `value` of (metric, first name, second name) with its interval, from paired resamples [R]."""
    differences = first - second
    differences = differences[np.isfinite(differences)]
    if not len(differences):
        return Difference(*pair, value, None, 0, None, NO_INTERVAL)
    low, high = (float(end) for end in np.percentile(differences, PERCENTILES))
    verdict = BETTER if low > 0 else WORSE if high < 0 else SAME
    return Difference(*pair, value, (low, high), len(differences), verdict, None)


def choose_gallery(
    labels: Sequence[int], lesions: Sequence[float | None], groups: Sequence[str]
) -> list[int]:
    """Which test images every detector is shown on, from labels and lesion sizes alone: places in the test part.

    Five abnormal images from the smallest lesion to the largest (evenly spaced by rank; without any mask: by place),
    then three normal ones, evenly spaced by place. Of a group (patient, near-duplicates) only the first counts.
    """
    seen: set[str] = set()
    rows = []
    for row, group in enumerate(groups):
        if not group or group not in seen:
            rows.append(row)
        seen.add(group)
    abnormal = [row for row in rows if labels[row] == ABNORMAL]
    sizes = {row: size for row in abnormal if (size := lesions[row])}
    ranked = sorted(sizes, key=lambda row: sizes[row]) or abnormal
    normal = [row for row in rows if labels[row] != ABNORMAL]
    return _spread(ranked, ABNORMAL_SHOWN) + _spread(normal, NORMAL_SHOWN)


def _spread(rows: Sequence[int], n: int) -> list[int]:
    """At most `n` of `rows`, evenly spaced, the first and the last among them."""
    if len(rows) <= n:
        return list(rows)
    return [rows[round(k)] for k in np.linspace(0, len(rows) - 1, n)]
