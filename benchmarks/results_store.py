"""The committed results of the protocol, and the paper's printed values: what every table reads."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from umiad.bootstrap import PERCENTILES, resample_scores
from umiad.report import p_text, percent

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAPER = ROOT / "benchmarks" / "paper"
DATASETS = ("busi", "brain_mri", "head_ct")
SHOWN_PRESETS = {"egmf": ("default", "paper")}
"""The presets of a detector that tables show, each in a row of its own, where "default" is not the only one."""
N_DRAWS, MIN_SEEDS, MIN_PAIRS = 1000, 3, 3
"""Bootstrap resamples of a difference; fewest seeds for an interval over seeds alone; fewest pairs to rank."""

Result = dict[str, Any]


def load_results() -> list[Result]:
    """All committed runs of the protocol."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    return [each for each in found if "metrics" in each]


def load_named(name: str) -> dict[str, Any] | None:
    """A result file that is no run of the protocol, without ".json"; None where it is not there."""
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return found


def load_speed() -> dict[tuple[str, str], dict[str, Any]]:
    """(detector, preset) -> "ratio", "threads", "commit" and, if measured, "model_mb": speed_scoring*.json."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(RESULTS.glob("speed_scoring*.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        for name, row in facts["detectors"].items():
            key = (name.split(",")[0], row["preset"])
            if key in rows:
                raise SystemExit(f"{path.name}: {title(*key)} is timed twice; delete the stale result")
            rows[key] = {**row, "threads": facts["threads"], "commit": facts["commit"]}
    return rows


def presets(detector: str) -> tuple[str, ...]:
    """The presets of `detector` that tables show."""
    return SHOWN_PRESETS.get(detector, ("default",))


def title(detector: str, preset: str) -> str:
    """How rows call a detector: the preset is named where it is not "default"."""
    return detector if preset == "default" else f"{detector}, preset {preset}"


def select(
    results: Sequence[Result],
    *,
    dataset: str,
    detector: str,
    variant: str = "main",
    preset: str = "default",
    size: int | None = None,
) -> list[Result]:
    """The runs of one row of a table, by seed. Two results for one seed are an error: one of them is stale.

    `size` in pixels matters where a table compares sizes; None takes any.
    """
    wanted = (dataset, detector, preset, variant)
    found = [r for r in results if (r["dataset"], r["detector"], r["preset"], r["variant"]) == wanted]
    found = [r for r in found if size in (None, r["size"])]
    seeds = [run["seed"] for run in found]
    if len(set(seeds)) < len(seeds):
        raise SystemExit(f"{' '.join(wanted)}: two results for one seed; delete the stale one")
    return sorted(found, key=lambda run: int(run["seed"]))


def paper_table(number: int) -> list[dict[str, str]]:
    """The printed rows of a table of the paper, with the columns `suspect` and `why`."""
    with (PAPER / f"table{number}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def cell(metric: dict[str, Any] | None) -> str:
    """A value in percent with its interval, or a dash."""
    if metric is None or metric["value"] is None:
        return "-"
    low, high = metric["ci95"] or (None, None)
    return percent(metric["value"]) + (f" [{percent(low)}, {percent(high)}]" if low is not None else "")


def spread(values: Sequence[float]) -> str:
    """Mean and range over seeds: "86.8 (78.3 to 92.4, n = 5)"; a dash for fewer than two."""
    if len(values) < 2:
        return "-"
    mean = percent(sum(values) / len(values))
    return f"{mean} ({percent(min(values))} to {percent(max(values))}, n = {len(values)})"


def over_seeds(values: Sequence[float]) -> str:
    """Like `spread`, but "86.8 (n = 1)" for one value; a dash for none."""
    return spread(values) if len(values) != 1 else f"{percent(values[0])} (n = 1)"


def points(value: float) -> str:
    """A difference of fractions in percentage points with its sign: "+1.5"."""
    return f"{round(100 * value, 1) + 0.0:+.1f}"


def value(run: Result, metric: str = "det_auroc") -> float:
    """A metric of a run that is known to have it, as a fraction."""
    return float(run["metrics"][metric]["value"])


def known(runs: Sequence[Result], metric: str) -> list[float]:
    """A metric of those runs that have it."""
    return [value(run, metric) for run in runs if run["metrics"][metric]["value"] is not None]


def mean_of(values: Sequence[float]) -> float:
    """Plain mean."""
    return sum(values) / len(values)


def provenance(runs: Sequence[Result]) -> str:
    """Where the numbers of a table come from, in a sentence: weights, size, seeds, epochs, commits."""

    def each(values: set[str]) -> str:
        return ", ".join(sorted(values))

    return (
        f"Weights label {each({run['weights'] for run in runs})}; {each({str(run['size']) for run in runs})} px; seeds "
        f"{each({str(run['seed']) for run in runs})}; epochs "
        f"{each({str(run['epochs'] or 'closed form') for run in runs})}; commit "
        f"{each({run['commit'] for run in runs})}."
    )


# Differences of two rows


@dataclass(frozen=True)
class Difference:
    """First minus second, in fractions, one of `values` per seed that both have (`seeds`).

    `ends`: 95 % interval of their mean, None where there is none; `apart`: then the two unpaired intervals of
    seed 0 lie apart, first above (1) or below (-1), or they touch (0); None where they are not there either.
    `over_seeds_alone`: the interval says nothing of other test images.
    """

    seeds: tuple[int, ...]
    values: tuple[float, ...]
    ends: tuple[float, float] | None
    apart: int | None = None
    over_seeds_alone: bool = False

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return mean_of(self.values)

    @property
    def sign(self) -> int:
        """1 and -1: the interval holds neither 0 nor the other sign; else 0."""
        low, high = self.ends or (0.0, 0.0)
        return int(low > 0) - int(high < 0)

    @property
    def verdict(self) -> str:
        """In words, for the first."""
        words = {1: "ahead", -1: "behind", 0: "no difference shown"}
        if self.ends is not None:
            return words[self.sign] + (" (these images)" if self.sign and self.over_seeds_alone else "")
        return "no interval" if self.apart is None else f"{words[self.apart]} (seed 0)"

    @property
    def text(self) -> str:
        """Mean in percentage points, with the interval if there is one: "+1.5 [-0.2, +3.1]"."""
        ends = f" [{', '.join(map(points, self.ends))}]" if self.ends else ""
        return points(self.mean) + ends


def difference(first: Sequence[Result], second: Sequence[Result], metric: str) -> Difference | None:
    """`image_difference` for det_auroc, `seed_difference` for every other metric."""
    if metric == "det_auroc":
        return image_difference(first, second)
    return seed_difference(first, second, metric)


def image_difference(first: Sequence[Result], second: Sequence[Result]) -> Difference | None:
    """det_auroc of two rows' runs, paired; None without a common seed.

    Interval: a bootstrap over seeds and images. A resample draws as many of the common seeds as there are, with
    replacement, and for each an independent resample of its groups of images, the same one for both rows.
    Raises SystemExit where a seed's test images differ.
    """
    pairs = _pairs(first, second)
    if not pairs:
        return None
    values, seeds = _values(pairs, "det_auroc"), tuple(int(one["seed"]) for one, _ in pairs)
    drawn = np.array([auroc_draws(one) - auroc_draws(two) for one, two in pairs])
    if not drawn.size:
        return Difference(seeds, values, None)
    rng, shape = np.random.default_rng(0), (drawn.shape[1], len(pairs))
    resampled = drawn[rng.integers(len(pairs), size=shape), rng.integers(drawn.shape[1], size=shape)].mean(
        axis=1
    )
    low, high = np.percentile(resampled, PERCENTILES)
    return Difference(seeds, values, (float(low), float(high)))


def seed_difference(first: Sequence[Result], second: Sequence[Result], metric: str) -> Difference | None:
    """A pixel metric of two rows' runs; None without a common seed that has it.

    Interval: Student's t over at least MIN_SEEDS seeds, since no image's own pixels are kept.
    """
    pairs = [
        pair
        for pair in _pairs(first, second)
        if all(run["metrics"][metric]["value"] is not None for run in pair)
    ]
    if not pairs:
        return None
    values, seeds = _values(pairs, metric), tuple(int(one["seed"]) for one, _ in pairs)
    if len(values) < MIN_SEEDS:
        return Difference(seeds, values, None, _apart(pairs, metric))
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    mean = mean_of(values)
    return Difference(seeds, values, (mean - half, mean + half), over_seeds_alone=True)


def auroc_draws(run: Result, scores: str = "image_scores") -> np.ndarray:
    """det_auroc in each resample of the run's test images [N_DRAWS]; the same resamples for the same images.

    Empty where a class is one single group.
    """
    cases = run["cases"]
    return _draws(tuple(cases[scores]), cases["labels"], tuple(cases["groups"]))


@functools.cache
def _draws(scores: tuple[float, ...], labels: str, groups: tuple[str, ...]) -> np.ndarray:
    truth = [int(digit) for digit in labels]
    _, draws = resample_scores(scores, truth, groups, None, None, n_resamples=N_DRAWS)
    return draws.get("det_auroc", np.zeros(0))


def _pairs(first: Sequence[Result], second: Sequence[Result]) -> list[tuple[Result, Result]]:
    others = {run["seed"]: run for run in second}
    pairs = [(run, others[run["seed"]]) for run in first if run["seed"] in others]
    for one, two in pairs:
        if one["split_digest"] != two["split_digest"]:
            names = " and ".join(f"{title(r['detector'], r['preset'])} {r['variant']}" for r in (one, two))
            raise SystemExit(f"{one['dataset']}, seed {one['seed']}: {names} have different test images")
    return pairs


def _values(pairs: Sequence[tuple[Result, Result]], metric: str) -> tuple[float, ...]:
    return tuple(value(one, metric) - value(two, metric) for one, two in pairs)


def _apart(pairs: Sequence[tuple[Result, Result]], metric: str) -> int | None:
    found = [run["metrics"][metric]["ci95"] for pair in pairs for run in pair if run["seed"] == 0]
    if len(found) < 2 or None in found:
        return None
    (low, high), (other_low, other_high) = found
    return int(low > other_high) - int(high < other_low)


def rank_agreement(
    proxies: Sequence[dict[str, Any]],
    real: Sequence[dict[str, list[float]]],
    *,
    proxy_key: str,
    real_key: str,
) -> str:
    """Spearman's rank correlation of a proxy's figure and a real one, over the candidates that have both.

    `proxies` and `real` [N]: a candidate's figures by name, the real ones one per seed.
    """
    pairs = [
        (proxy[proxy_key], mean_of(values[real_key]))
        for proxy, values in zip(proxies, real, strict=True)
        if proxy[proxy_key] is not None and values[real_key]
    ]
    words = f"Proxy {proxy_key} and real {real_key}, {len(pairs)} candidates"
    xs, ys = ([pair[place] for pair in pairs] for place in (0, 1))
    if len(pairs) < MIN_PAIRS or len(set(xs)) < 2 or len(set(ys)) < 2:
        return f"{words}: too few with both to rank, or all alike."
    found = stats.spearmanr(xs, ys)
    return f"{words}: Spearman's rho {found.statistic:+.2f}, p = {p_text(float(found.pvalue))}."
