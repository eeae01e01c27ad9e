"""What gives the label away without looking at the anatomy: size, form, depth, colour, text, brightness."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from umiad.duplicates import Fingerprint
from umiad.types import ABNORMAL, NORMAL, Case

LABELS = {NORMAL: "normal", ABNORMAL: "abnormal", None: "unlabelled"}
RARE_P = 0.01
Level: TypeAlias = Literal["error", "warning", "note"]
Row: TypeAlias = tuple[str, Case, Fingerprint]


@dataclass(frozen=True)
class Problem:
    """Something to know before fitting; an "error" must be solved, a "warning" weakens the results."""

    level: Level
    text: str
    files: tuple[str, ...] = ()


LEAK_AUROC = 0.65
COLOURED_FROM = 0.001  # an image is coloured when more than this fraction of its pixels is
LESS = {"larger": "smaller", "wider": "narrower", "more": "less"}
LEAKS: tuple[tuple[str, Level, str, str], ...] = (
    ("area", "warning", "image area", "larger"),
    ("aspect", "warning", "width / height", "wider"),
    ("bits", "warning", "bits per channel", "more"),
    ("colour", "warning", "colour", "more"),
    ("text", "warning", "text burnt into the pixels", "more"),
    ("brightness", "note", "mean grey value", "more"),
)
"""What is looked at, how serious it is, what it is called, and what more of it is called."""


@dataclass(frozen=True)
class Leaks:
    """How well one number alone tells abnormal from normal; AUROC 0.5 = not at all, None = undefined.

    Above 0.5 the abnormal images have more of it: area, width / height, bits per channel, coloured pixels, text and
    marks, mean grey value.
    """

    area_auroc: float | None
    aspect_auroc: float | None
    bits_auroc: float | None
    colour_auroc: float | None
    text_auroc: float | None
    brightness_auroc: float | None

    def aurocs(self) -> Iterator[tuple[str, float | None]]:
        """Name of the number, and its AUROC."""
        for each in dataclasses.fields(self):
            yield each.name.removesuffix("_auroc"), getattr(self, each.name)


def measure_leaks(rows: list[Row]) -> Leaks:
    """How well each number tells the labels apart."""
    facts: dict[str, Callable[[Fingerprint], float]] = {
        "area_auroc": lambda each: each.height * each.width,
        "aspect_auroc": lambda each: each.width / each.height,
        "bits_auroc": lambda each: each.bits,
        "colour_auroc": lambda each: each.coloured,
        "text_auroc": lambda each: each.burnt_in,
        "brightness_auroc": lambda each: float(each.thumbnail.mean()),
    }
    return Leaks(**{name: _auroc([(c.label, of(each)) for _, c, each in rows]) for name, of in facts.items()})


def _auroc(values: list[tuple[int | None, float]]) -> float | None:
    """AUROC of a number for abnormal against normal, by mean ranks (Mann-Whitney U); None without both."""
    from scipy.stats import rankdata

    known = [(label, value) for label, value in values if label is not None]
    abnormal = np.array([label == ABNORMAL for label, _ in known], dtype=bool)
    positives, negatives = int(abnormal.sum()), int((~abnormal).sum())
    if not positives or not negatives:
        return None
    ranks = rankdata([value for _, value in known])
    return float((ranks[abnormal].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def leak_problems(rows: list[Row], leaks: Leaks) -> Iterator[Problem]:
    """What gives the label away without looking at the anatomy."""
    for name, level, what, more in LEAKS:
        value = getattr(leaks, f"{name}_auroc")
        if value is not None and (best := max(value, 1 - value)) > LEAK_AUROC:
            side = more if value > 0.5 else LESS[more]
            text = f"{what} alone separates the labels: AUROC {best:.2f} ({side} if abnormal)"
            yield Problem(level, text)
    if marked := [name for name, _, each in rows if each.burnt_in]:
        text = f"text or marks seem burnt into {len(marked)} of {len(rows)} images: they count as unusual"
        if _by_label_p(rows) < RARE_P:
            text += ", and they give the label away"
        counts = Counter(LABELS[case.label] for _, case, each in rows if each.burnt_in)
        shares = ", ".join(f"{count} {label}" for label, count in sorted(counts.items()))
        yield Problem("warning", f"{text} ({shares})", tuple(marked))
    depths = [(name, case.label, f"{each.bits} bits") for name, case, each in rows]
    yield from _one_sided(depths, "warning", "of {0}")
    form = [(name, case.label, each.mode) for name, case, each in rows]
    yield from _one_sided(form, "warning", "stored as {0}")
    coloured = [(name, case.label, "coloured") for name, case, each in rows if each.coloured > COLOURED_FROM]
    grey = [(name, case.label, "") for name, case, each in rows if each.coloured <= COLOURED_FROM]
    yield from _one_sided(coloured + grey, "warning", "{0}")
    suffixes = [(name, case.label, case.path.suffix.lower()) for name, case, _ in rows]
    yield from _one_sided(suffixes, "note", "named *{0}")


def _one_sided(facts: list[tuple[str, int | None, str]], level: Level, words: str) -> Iterator[Problem]:
    """A property that only images of one label have, where both labels exist and properties differ."""
    both = {NORMAL, ABNORMAL} <= {label for _, label, _ in facts}
    values = sorted({value for *_, value in facts})
    for value in values if both and len(values) > 1 else ():
        owners = [(name, label) for name, label, each in facts if each == value and label is not None]
        labels = {label for _, label in owners}
        if value and len(labels) == 1:
            text = f"images {words.format(value)} ({len(owners)}), all of them {LABELS[labels.pop()]}"
            yield Problem(level, text, tuple(name for name, _ in owners))


def _by_label_p(rows: list[Row]) -> float:
    """How likely so uneven a share of marked images is if labels had nothing to do with it (Fisher's exact test).

    Marks in one image of ten can give that one away, which an AUROC over all hardly shows.
    """
    from scipy.stats import fisher_exact

    known = [(case.label, each.burnt_in > 0) for _, case, each in rows if case.label is not None]
    table = [[known.count((label, marked)) for marked in (True, False)] for label in (NORMAL, ABNORMAL)]
    return float(fisher_exact(table).pvalue)
