"""What the paper's Tables 5 to 8 compare, and which of our runs stand beside each printed row.

All runs are egmf's preset "ablation", the paper's network with fewer epochs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from results_store import Result, paper_table, select

DETECTOR, PRESET, PUBLISHED = "egmf", "ablation", "paper"
SIZE, SEEDS = 256, (0, 1, 2)


@dataclass(frozen=True)
class Row:
    """One row: its name, the printed row's key and the runs that belong beside it."""

    name: str
    key: Mapping[str, str]
    variant: str
    size: int = SIZE
    seeds: tuple[int, ...] = SEEDS


@dataclass(frozen=True)
class Step:
    """A comparison: what row `of` has and row `against` has not, in words."""

    words: str
    of: str
    against: str


@dataclass(frozen=True)
class Study:
    """One of the paper's tables. `costs`: seconds are shown; `lists`: what makes its runs."""

    number: int
    title: str
    rows: tuple[Row, ...]
    steps: tuple[Step, ...]
    about: str
    costs: bool = field(default=False, kw_only=True)
    lists: str = field(default="benchmarks/ablation.toml", kw_only=True)


def _modules(egm: str, eam: str, mff: str) -> dict[str, str]:
    return {"egm": egm, "eam": eam, "mff": mff}


SIZES = Study(
    5,
    "image size",
    (
        Row("128 px", {"resolution": "128x128"}, "main", 128),
        Row("256 px", {"resolution": "256x256"}, "main", 256),
        Row("512 px", {"resolution": "512x512"}, "main", 512, (0,)),
    ),
    (Step("256 instead of 128 px", "256 px", "128 px"), Step("512 instead of 256 px", "512 px", "256 px")),
    "All modules. 512 px: seed 0 alone, since such a run costs several times one at 256 px (see the table of costs).",
    costs=True,
    lists="benchmarks/ablation.toml benchmarks/ablation_sizes.toml",
)
MODULES = Study(
    6,
    "modules",
    (
        Row("none", _modules("no", "no", "no"), "none"),
        Row("EGM", _modules("yes", "no", "no"), "egm"),
        Row("EGM + EAM", _modules("yes", "yes", "no"), "egm-eam"),
        Row("MFF", _modules("no", "no", "yes"), "mff"),
        Row("EGM + EAM + MFF", _modules("yes", "yes", "yes"), "main"),
    ),
    (
        Step("EGM added", "EGM", "none"),
        Step("EAM added to EGM", "EGM + EAM", "EGM"),
        Step("MFF added", "MFF", "none"),
        Step("MFF added to EGM and EAM", "EGM + EAM + MFF", "EGM + EAM"),
        Step("all three added", "EGM + EAM + MFF", "none"),
    ),
    "None: four conditional flows alone. EGM without EAM: its edge features, projected, are added to F4.",
)
EDGES = Study(
    7,
    "edges",
    (
        Row("Prewitt", {"edge": "Prewitt"}, "prewitt"),
        Row("SAM", {"edge": "SAM"}, "sam"),
        Row("EGM", {"edge": "EGM"}, "egm"),
    ),
    (
        Step("SAM instead of Prewitt", "SAM", "Prewitt"),
        Step("EGM instead of Prewitt", "EGM", "Prewitt"),
        Step("EGM instead of SAM", "EGM", "SAM"),
    ),
    "Without EAM and MFF: edge features, projected, are added to F4. EGM is 'EGM' of Table 6, as in the paper.",
)
AGGREGATION = Study(
    8,
    "aggregation",
    (
        Row("ADD", {"aggregation": "ADD"}, "egm"),
        Row("MUL", {"aggregation": "MUL"}, "mul"),
        Row("EAM", {"aggregation": "EAM"}, "egm-eam"),
    ),
    (
        Step("MUL instead of ADD", "MUL", "ADD"),
        Step("EAM instead of ADD", "EAM", "ADD"),
        Step("EAM instead of MUL", "EAM", "MUL"),
    ),
    "With EGM, without MFF; EAM is 'EGM + EAM' of Table 6, as in the paper. ADD is 'EGM' of Table 6: without an EAM "
    "the edge features, projected, are added to F4. The paper prints other values for the two and does not say how "
    "its 'EGM' brings them in. ADD and MUL share the projection and differ in the operator only.",
)
STUDIES = (SIZES, MODULES, EDGES, AGGREGATION)


def runs_of(results: Sequence[Result], dataset: str, row: Row) -> list[Result]:
    """Our runs of a row on a set, by seed."""
    words = {"dataset": dataset, "detector": DETECTOR, "preset": PRESET}
    return select(results, **words, variant=row.variant, size=row.size)


def published(results: Sequence[Result], dataset: str) -> list[Result]:
    """The whole network as the paper trains it (preset "paper"), by seed."""
    return select(results, dataset=dataset, detector=DETECTOR, preset=PUBLISHED)


def printed_row(study: Study, dataset: str, row: Row) -> dict[str, str]:
    """The paper's row beside ours."""
    wanted = {"dataset": dataset, **row.key}.items()
    return next(each for each in paper_table(study.number) if wanted <= each.items())


def row_named(study: Study, name: str) -> Row:
    """The row of a study by its name."""
    return next(row for row in study.rows if row.name == name)
