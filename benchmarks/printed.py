"""The paper's printed values: what is suspect in them and why, and whether a detection AUROC can occur at all."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence

from results_store import paper_table

METRICS = ("det_auroc", "seg_auroc", "seg_aupro")
NO_MASKS = ("brain_mri", "head_ct")
"""Sets that have no lesion masks in public, though the paper prints pixel figures for them."""
PRINTED_HALF_STEP = 0.005
"""Printed percentages have two decimals."""

_NAMES = r"(?:all|[a-z_]+(?:\+[a-z_]+)*): "
_BETWEEN = re.compile(rf"; (?={_NAMES})")
_REASON = re.compile(rf"({_NAMES})?(.*)", re.DOTALL)


def reasons(row: Mapping[str, str], column: str) -> list[str]:
    """Why `column` of a printed row is suspect; reasons that name no column, or "all", hold for each."""
    if row["suspect"] != "yes":
        return []
    found = []
    for part in _BETWEEN.split(row["why"]):
        match = _REASON.match(part)
        names, text = (match[1] or "all", match[2]) if match else ("all", part)
        columns = set(names.removesuffix(": ").split("+"))
        if "all" in columns or column in columns:
            found.append(text)
    return found


class Notes:
    """Footnotes of one table: equal reasons share a number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, row: Mapping[str, str], column: str) -> str:
        """The printed value, with the numbers of its notes: "95.83 (note 2)"; a dash where nothing is printed."""
        return self.marked(row.get(column) or "-", reasons(row, column))

    def marked(self, text: str, why: Sequence[str]) -> str:
        """A text with the numbers of its notes."""
        found = [self._numbers.setdefault(each, len(self._numbers) + 1) for each in why]
        return f"{text} (note {', '.join(map(str, sorted(found)))})" if found else text

    def lines(self) -> list[str]:
        """One sentence per note, in order of their numbers."""
        return [f"Note {number}: {reason}." for reason, number in self._numbers.items()]


@functools.cache
def paper_counts(dataset: str) -> tuple[int, int]:
    """Normal and abnormal test images of a set as the paper's Table 1 prints them."""
    row = next(row for row in paper_table(1) if row["dataset"] == dataset)
    return int(row["test_normal"]), int(row["test_anomaly"])


def nearest(printed: str, n_normal: int, n_abnormal: int) -> float:
    """The AUROC in percent that is nearest to a printed one among those that can occur.

    An AUROC is a share of n_normal * n_abnormal pairs, a tie counting half.
    """
    halves = 2 * n_normal * n_abnormal
    return 100 * round(float(printed) / 100 * halves) / halves


def reachable(printed: str, dataset: str) -> bool:
    """Whether some ranking of the paper's test images has the printed AUROC (percent, rounded to two decimals)."""
    found = nearest(printed, *paper_counts(dataset))
    return abs(found - float(printed)) <= PRINTED_HALF_STEP + 1e-9


def reachable_text(printed: str, dataset: str) -> str:
    """In words: "yes", or "no (nearest 90.84)" with the nearest value that can occur."""
    if reachable(printed, dataset):
        return "yes"
    return f"no (nearest {nearest(printed, *paper_counts(dataset)):.2f})"


def can_occur(printed: str, dataset: str, metric: str) -> str:
    """`reachable_text` of a detection AUROC; whether a pixel figure can be checked at all."""
    if metric == "det_auroc":
        return reachable_text(printed, dataset)
    return "no masks" if dataset in NO_MASKS else "-"


def unreachable(tables: Sequence[int]) -> dict[tuple[str, str], bool]:
    """(dataset, printed det_auroc) of the named tables, each once -> whether it cannot occur."""
    rows = [row for number in tables for row in paper_table(number)]
    return {
        (row["dataset"], row["det_auroc"]): not reachable(row["det_auroc"], row["dataset"]) for row in rows
    }
