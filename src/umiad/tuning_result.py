"""What `tune` found: every candidate on the same held-out normals and synthetic anomalies, ranked. Pure.

Synthetic anomalies are no lesions: the numbers are a proxy for choosing settings, no estimate of accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
from pydantic import Field

import umiad
from umiad.bootstrap import PERCENTILES
from umiad.comparison_result import COMPARED, Difference, drawn_difference
from umiad.config import Config
from umiad.data import DEFAULT_FILES
from umiad.fitting import FitOptions
from umiad.synthetic import FAMILIES
from umiad.tuning_candidates import Candidate, quoted
from umiad.types import FileOptions

RANK = "rank_score"
JUDGED = (RANK, *COMPARED)
"""What has an interval: the mean of the three metrics, and each of them."""
SIZES = {"small": (0.0, 0.01), "medium": (0.01, 0.05), "large": (0.05, 1.0)}
"""Size classes by the share of the image that is altered: from the first number up, below the second."""
PARTS = (*FAMILIES, *SIZES)
NO_MAP = "does not localise: not ranked"


class TuneOptions(Config):
    """What all candidates share.

    `folds` of the normal images; `per_image`: synthetic anomalies in each held-out normal image; `weights`,
    `size`, `seed` (of the split, the folds, the anomalies and each detector) as in `umiad.build`; `equalise`,
    `device` as in `FitOptions`; `epochs`: instead of each candidate's own; `resamples` of the bootstrap.
    """

    folds: int = Field(default=3, ge=2)
    per_image: int = Field(default=4, ge=1)
    weights: str = "imagenet"
    size: int = 256
    seed: int = Field(default=0, ge=0)
    equalise: int | None = Field(default=None, ge=32)
    epochs: int | None = Field(default=None, ge=1)
    resamples: int = Field(default=500, ge=10)
    device: str = "auto"

    def settings(self, candidate: Candidate) -> dict[str, Any]:
        """The candidate's settings, with the number of epochs that holds for all."""
        if self.epochs is None:
            return dict(candidate.settings)
        training = {**candidate.settings.get("training", {}), "epochs": self.epochs}
        return {**candidate.settings, "training": training}

    def fitting(self) -> FitOptions:
        """How each candidate is fitted: nothing is set aside, since nothing is decided by a threshold."""
        return FitOptions(holdout=0.0, seed=self.seed, equalise=self.equalise, device=self.device)


class FoldResult(Config):
    """One candidate, fitted without one fold and judged on it.

    `metrics` (of COMPARED) and `parts` (PARTS -> metrics: those anomalies against all held-out normals) are
    fractions, None where undefined; `counts` of PARTS. `nats_fitted`, `nats_held_out`: mean negative
    log-likelihood in nats per dimension of fitted and held-out normals, None without a likelihood.
    `normal_scores`, `synthetic_scores`: image scores. `draws`: resamples of the metrics.
    """

    metrics: dict[str, float | None]
    parts: dict[str, dict[str, float | None]]
    counts: dict[str, int]
    nats_fitted: float | None
    nats_held_out: float | None
    fit_seconds: float
    normal_scores: tuple[float, ...]
    synthetic_scores: tuple[float, ...]
    draws: dict[str, tuple[float, ...]]


@dataclass(frozen=True, eq=False)
class Result:
    """One candidate on all folds; `detector_config`: every setting, as in a saved model.

    `maps` [G,S,S]: of the exhibits, by the model of the first fold; `map_threshold`: what 95 % of that fold's normal
    images stay below, `map_reference`: their largest map value, both for pictures only. `loaded`: whether an earlier
    run had computed it.
    """

    candidate: Candidate
    detector_config: dict[str, Any]
    localises: bool
    folds: tuple[FoldResult, ...]
    map_threshold: float
    map_reference: float
    maps: np.ndarray
    loaded: bool = False

    @property
    def name(self) -> str:
        """The candidate's name."""
        return self.candidate.name

    @property
    def rank_score(self) -> float | None:
        """Mean of det_auroc, seg_auroc and seg_aupro, each the mean over the folds; None without a map."""
        return self.value(RANK)

    @property
    def gap(self) -> float | None:
        """Nats per dimension by which held-out normals are less likely than fitted ones; 0 = no overfitting."""
        fitted, held_out = self.mean("nats_fitted"), self.mean("nats_held_out")
        return None if fitted is None or held_out is None else held_out - fitted

    @property
    def fit_seconds(self) -> float:
        """Seconds of a fit on one fold's rest, mean over the folds."""
        return float(np.mean([fold.fit_seconds for fold in self.folds]))

    def mean(self, name: str) -> float | None:
        """A number of the folds, such as "nats_fitted", mean over the folds."""
        return _mean([getattr(fold, name) for fold in self.folds])

    def value(self, metric: str) -> float | None:
        """A metric of JUDGED, mean over the folds."""
        if metric == RANK:
            values = [self.value(each) for each in COMPARED]
            return None if None in values else _mean(values)
        return _mean([fold.metrics[metric] for fold in self.folds])

    def part(self, part: str, metric: str) -> float | None:
        """A metric of COMPARED on one family or size class, mean over the folds that hold some of it."""
        return _mean([fold.parts[part][metric] for fold in self.folds])

    def draws(self, metric: str) -> np.ndarray:
        """The resamples of `value`, [R], moved so that their mean is `value`; none where it is undefined.

        A resample holds some sources twice, and with them more pairs of an anomaly and its own normal image, which
        are told apart more easily than others: without the move all resamples would lie too high.
        """
        if metric == RANK:
            rows = [self.draws(each) for each in COMPARED]
        else:
            rows = [np.array(fold.draws.get(metric, ())) for fold in self.folds]
        value = self.value(metric)
        if value is None or not all(map(len, rows)):
            return np.zeros(0)
        drawn = np.mean(rows, axis=0)
        return drawn - drawn.mean() + value

    def interval(self, metric: str) -> tuple[float, float] | None:
        """95 % interval of `value` by the bootstrap over source images, within 0..1."""
        if not len(drawn := self.draws(metric)):
            return None
        low, high = np.clip(np.percentile(drawn, PERCENTILES), 0.0, 1.0)
        return float(low), float(high)

    def to_json(self) -> dict[str, Any]:
        """Its numbers as plain values; scores and resamples stay in the candidate's own file."""
        own = {"draws", "normal_scores", "synthetic_scores"}
        return {
            **self.candidate.canonical(),
            "detector_config": self.detector_config,
            **{m: {"value": self.value(m), "ci95": self.interval(m)} for m in JUDGED},
            "reason": None if self.localises else NO_MAP,
            "parts": {part: {m: self.part(part, m) for m in COMPARED} for part in PARTS},
            "nats_fitted": self.mean("nats_fitted"),
            "nats_held_out": self.mean("nats_held_out"),
            "gap": self.gap,
            "fit_seconds": self.fit_seconds,
            "folds": [fold.model_dump(mode="json", exclude=own) for fold in self.folds],
        }


@dataclass(frozen=True, eq=False)
class Exhibit:
    """An image to look at: `pixels` float32 [S,S], its `mask` (None: normal), `family`, `area`, source image."""

    pixels: np.ndarray
    mask: np.ndarray | None
    family: str
    area: float
    source: str


@dataclass(frozen=True, eq=False)
class Tuning:
    """What `tune` returns; `umiad.tuning_files.write_tuning` makes a report of it.

    `results` from the best `rank_score` down, those without one last; `failures`: name -> reason. `data` as it was
    given (for the command line), `rule`: how the training part came about, `folds`: names of each fold's held-out
    normals.
    """

    options: TuneOptions
    results: tuple[Result, ...]
    failures: dict[str, str]
    data: str
    rule: str
    folds: tuple[tuple[str, ...], ...]
    exhibits: tuple[Exhibit, ...]
    notes: tuple[str, ...]
    files: FileOptions = DEFAULT_FILES

    @property
    def best(self) -> Result | None:
        """The first of the ranking, if it has a rank_score."""
        return next((each for each in self.results if each.rank_score is not None), None)

    @property
    def n_synthetic(self) -> int:
        """Number of synthetic anomalies."""
        return self.options.per_image * sum(map(len, self.folds))

    def differences(self) -> list[Difference]:
        """Every pair of candidates in everything of `JUDGED`."""
        return [_difference(m, a, b) for a, b in combinations(self.results, 2) for m in JUDGED]

    def against_best(self) -> list[Difference]:
        """The best candidate against each of the others, in everything of `JUDGED`."""
        best = self.best
        others = [each for each in self.results if each is not best]
        return [] if best is None else [_difference(m, best, each) for each in others for m in JUDGED]

    def command(self, result: Result) -> str:
        """The line for a shell that fits a candidate on all training images."""
        options = self.options
        words = ["umiad", "fit", self.data, "--out", "MODEL", *result.candidate.arguments()]
        shared = ("weights", "size", "seed", "epochs", "equalise")
        pairs = [(f"--{name}", getattr(options, name)) for name in shared]
        words += self.files.arguments()
        return quoted(words + [w for name, value in pairs if value is not None for w in (name, str(value))])

    def to_json(self) -> dict[str, Any]:
        """All numbers as plain values: what `tuning.json` holds."""
        best = self.best
        return {
            "what": "settings compared on synthetic anomalies: a proxy for choosing, no estimate of accuracy",
            "umiad": umiad.__version__,
            "options": self.options.canonical(),
            "data": self.data,
            "rule": self.rule,
            "folds": [list(names) for names in self.folds],
            "n_synthetic": self.n_synthetic,
            "notes": list(self.notes),
            "best": None if best is None else {"name": best.name, "command": self.command(best)},
            "candidates": [each.to_json() for each in self.results],
            "failures": self.failures,
            "differences": [asdict(each) for each in self.differences()],
        }


def ranked(results: Sequence[Result]) -> tuple[Result, ...]:
    """From the highest rank_score down; those without one last; equal ones in the order given."""
    return tuple(sorted(results, key=lambda each: -(-1.0 if each.rank_score is None else each.rank_score)))


def _difference(metric: str, first: Result, second: Result) -> Difference:
    values = [each.value(metric) for each in (first, second)]
    pair = (metric, first.name, second.name)
    if values[0] is None or values[1] is None:
        gaps = [each.name for each, v in zip((first, second), values, strict=True) if v is None]
        return Difference(*pair, None, None, 0, None, "; ".join(f"{name}: undefined" for name in gaps))
    return drawn_difference(pair, values[0] - values[1], first.draws(metric), second.draws(metric))


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that there are; None where there is none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
