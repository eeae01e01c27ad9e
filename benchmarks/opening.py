"""The paragraph that docs/results.md opens with: what reproduces, what does not, and what cannot; all counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ablations import verdicts
from printed import METRICS, NO_MASKS, reachable, unreachable
from results_store import DATASETS, Result, known, mean_of, paper_table, presets, select
from studies import DETECTOR, MODULES, STUDIES, Study, printed_row, published, runs_of
from table3 import METHODS
from umiad.report import Text

TITLE = "What reproduces, what does not, and what cannot"
DET_TABLES = (3, 5, 6, 7, 8)


@dataclass(frozen=True)
class Printed:
    """A printed value in percent beside our runs of the same thing."""

    dataset: str
    metric: str
    value: str
    runs: tuple[Result, ...]

    @property
    def checkable(self) -> bool:
        """Whether the value can occur at all and the public set has what its metric needs."""
        if self.metric == "det_auroc":
            return reachable(self.value, self.dataset)
        return self.dataset not in NO_MASKS

    @property
    def within(self) -> bool | None:
        """Whether it lies within ours: seed 0's interval and the range over seeds, united. None without runs."""
        ends = list(known(self.runs, self.metric))
        for run in self.runs:
            ends += run["metrics"][self.metric]["ci95"] or []
        return min(ends) <= float(self.value) / 100 <= max(ends) if ends else None

    @property
    def judged(self) -> bool:
        """Whether it counts."""
        return self.checkable and self.within is not None


def opening(results: Sequence[Result]) -> Text:
    """One paragraph, counted from the committed results."""
    rivals, own = list(rival_values(results)), list(own_values(results))
    return Text(TITLE, [f"{_reproduced(rivals, own)} {_modules(results)} {_cannot(results)}"])


def rival_values(results: Sequence[Result]) -> Iterator[Printed]:
    """The built methods of Table 3 other than the paper's own, at the presets that tables show."""
    for dataset in DATASETS:
        for method, detector in METHODS:
            if not detector or detector == DETECTOR:
                continue
            runs = [
                run
                for preset in presets(detector)
                for run in select(results, dataset=dataset, detector=detector, preset=preset)
            ]
            row = next(r for r in paper_table(3) if (r["dataset"], r["method"]) == (dataset, method))
            yield from _each(dataset, row, runs)


def own_values(results: Sequence[Result]) -> Iterator[Printed]:
    """UMIAD-EGMF and its ablations (Tables 3, 5 to 8), what is printed twice once; the whole beside preset "paper"."""
    met = set()
    for study in STUDIES:
        for row in study.rows:
            whole = (row.variant, row.size) == (MODULES.rows[-1].variant, MODULES.rows[-1].size)
            for dataset in DATASETS:
                runs = published(results, dataset) if whole else runs_of(results, dataset, row)
                for each in _each(dataset, printed_row(study, dataset, row), runs):
                    key = (row.variant, row.size, dataset, each.metric, each.value)
                    if key not in met:
                        met.add(key)
                        yield each


def _each(dataset: str, row: Mapping[str, str], runs: Sequence[Result]) -> Iterator[Printed]:
    return (Printed(dataset, metric, row[metric], tuple(runs)) for metric in METRICS)


def _reproduced(rivals: Sequence[Printed], own: Sequence[Printed]) -> str:
    judged = [each for each in [*rivals, *own] if each.judged]
    outside = [each for each in judged if not each.within]
    labels = ", ".join(sorted({run["weights"] for each in judged for run in each.runs})) or "none yet"
    return (
        f"What reproduces: of UMIAD-EGMF and its ablations (Tables 3 and 5 to 8) {_counts(own)}; of its rivals that "
        f"are built here (Table 3) {_counts(rivals)}. Counted are printed values that can occur, on sets that have "
        "what the metric needs, and that we have runs of; one reproduces where it lies within seed 0's 95 % interval "
        f"or the range over our seeds. These intervals of det_auroc are on average {_widths(judged)} points wide: "
        f"lying within a wide one says little. What does not: the other {len(outside)} of {len(judged)}. Weights "
        f"label of our runs: {labels}."
    )


def _widths(judged: Sequence[Printed]) -> str:
    """Mean width of seed 0's intervals of det_auroc per set, in points."""
    shown = []
    for dataset in DATASETS:
        runs = [run for each in judged if each.dataset == dataset for run in each.runs]
        ends = [run["metrics"]["det_auroc"]["ci95"] for run in runs]
        widths = [high - low for low, high in filter(None, ends)]
        shown += [f"{100 * mean_of(widths):.0f} ({dataset})"] if widths else []
    return ", ".join(shown) or "no"


def _counts(found: Sequence[Printed]) -> str:
    """Values that reproduce, per set and metric: "busi det_auroc 1 of 3, busi seg_auroc 0 of 3"."""
    judged = [each for each in found if each.judged]
    totals = Counter((each.dataset, each.metric) for each in judged)
    inside = Counter((each.dataset, each.metric) for each in judged if each.within)
    order = sorted(totals, key=lambda key: (DATASETS.index(key[0]), METRICS.index(key[1])))
    shown = [f"{' '.join(key)} {inside[key]} of {totals[key]}" for key in order]
    return ", ".join(shown) or "none is run yet"


def _modules(results: Sequence[Result]) -> str:
    """Whether the paper's modules help, in our runs."""
    parts = [_study(results, study) for study in STUDIES]
    return f"The paper's ablations, paired over seeds and images: {'; '.join(parts)}."


def _study(results: Sequence[Result], study: Study) -> str:
    name = f"Table {study.number} ({study.title})"
    found = [(step, verdicts(results, study, step)) for step in study.steps]
    steps = [f"{step.words}: {_tally(each)}" for step, each in found if each]
    return f"{name} {', '.join(steps) or 'is not run yet'}"


def _tally(found: Mapping[str, str]) -> str:
    """Verdicts of one comparison: "ahead in 1, behind in 0 of 5"."""
    ahead, behind = (sum(v.startswith(word) for v in found.values()) for word in ("ahead", "behind"))
    if not ahead and not behind:
        return f"no difference shown in any of {len(found)}"
    return f"ahead in {ahead} and behind in {behind} of {len(found)}"


def _cannot(results: Sequence[Result]) -> str:
    impossible = Counter(name for (name, _), wrong in unreachable(DET_TABLES).items() if wrong)
    places = " and ".join(f"{count} of {name}" for name, count in impossible.items())
    different = len(unreachable(DET_TABLES))
    table = paper_table(3)
    recall = sum("recall+precision: impossible at image level" in row["why"] for row in table)
    sam = any(run["variant"] == "sam" for run in results)
    absent = [method for method, detector in METHODS if not detector]
    waiting = [
        m for m, detector in METHODS if detector and not any(r["detector"] == detector for r in results)
    ]
    lines = [
        f"{sum(impossible.values())} of {different} different det_auroc values ({places}) are no possible AUROC of the "
        "paper's own test images",
        f"recall and precision in {recall} of {len(table)} rows of Table 3 are impossible as image-level figures, and "
        "the paper names no rule",
        f"the pixel figures of {' and '.join(NO_MASKS)} need lesion masks that the public sets do not have",
        *([] if sam else ["the row SAM of Table 7 needs a checkpoint (not run)"]),
        *([f"not built here: {', '.join(absent)}"] if absent else []),
        *([f"built here, and not run yet: {', '.join(waiting)}"] if waiting else []),
    ]
    return f"What cannot: {'; '.join(lines)}."
