"""The data check: what is in a data set, what is wrong with it, and which split would be made."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from umiad.cases import alias_of
from umiad.data import DataSet
from umiad.duplicates import Fingerprint, equal_groups, near_groups
from umiad.errors import InputError
from umiad.io import kind_of_file, read_image, read_mask
from umiad.leaks import COLOURED_FROM, LABELS, Leaks, Level, Problem, Row, leak_problems, measure_leaks
from umiad.splits import HOLDOUT_MIN, PARTS, make_split
from umiad.types import Case

LEVELS = ("error", "warning", "note")


@dataclass(frozen=True)
class MaskSummary:
    """Names of the cases by the state of their masks; "several" are united, "empty" mark no pixel.

    `marked`: how many mark something. A volume is empty where none of its slices that are cases is marked.
    `unreadable` lists files with the reason.
    """

    with_mask: int
    without: int
    marked: int
    empty: tuple[str, ...] = ()
    several: tuple[str, ...] = ()
    wrong_size: tuple[str, ...] = ()
    non_binary: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClassSummary:
    """One class folder. `heights`, `widths`: (minimum, median, maximum) pixels, None if unreadable.

    `coloured`, `burnt_in`: images with colour, with text or marks in their pixels. `patients`: how many, None
    where no file says.
    """

    kind: str
    label: str
    count: int
    heights: tuple[float, float, float] | None
    widths: tuple[float, float, float] | None
    modes: dict[str, int]
    bits: dict[int, int]
    coloured: int
    burnt_in: int
    patients: int | None
    masks: MaskSummary


@dataclass(frozen=True)
class Duplicates:
    """Groups of names: equal bytes, equal luminance, nearly equal; `across` are those of several classes."""

    content: tuple[tuple[str, ...], ...]
    pixels: tuple[tuple[str, ...], ...]
    near: tuple[tuple[str, ...], ...]
    across: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class SplitSummary:
    """The split that would be made: `counts[part][label]`, and how many groups keep images together."""

    rule: str
    digest: str
    counts: dict[str, dict[str, int]]
    groups: int


@dataclass(frozen=True)
class Survey:
    """Everything the data check found; `split` is None where none can be made (a problem says why)."""

    name: str
    layout: str
    classes: tuple[ClassSummary, ...]
    duplicates: Duplicates
    leaks: Leaks
    split: SplitSummary | None
    stray: tuple[str, ...]
    unreadable: dict[str, str]
    problems: tuple[Problem, ...]

    def to_json(self) -> dict[str, object]:
        """The survey as one JSON object."""
        return dataclasses.asdict(self)


def survey(
    data: DataSet,
    fingerprints: Sequence[Fingerprint | InputError],
    *,
    seed: int,
    holdout: float,
    groups: Mapping[str, str] | None = None,
) -> Survey:
    """Describe `data`, look for trouble and try the split. `fingerprints` as for `make_split`.

    Unreadable images are reported and left out of everything else. Raises ConfigError for a bad seed or
    hold-out, as `make_split` does.
    """
    pairs = list(zip(data.cases, fingerprints, strict=True))
    rows = [(data.name_of(case), case, each) for case, each in pairs if isinstance(each, Fingerprint)]
    unreadable = {data.name_of(case): each.reason for case, each in pairs if isinstance(each, InputError)}
    classes = _classes(data, rows)
    duplicates = _duplicates(rows)
    leaks = measure_leaks(rows)
    stray = tuple(data.name_of(Case(path)) for path in data.stray)
    split, problems = _try_split(data, rows, seed=seed, holdout=holdout, groups=groups or {})
    problems += _file_problems(data, unreadable, stray)
    problems += _duplicate_problems(rows, duplicates)
    problems += [each for summary in classes for each in _mask_problems(summary)]
    problems += leak_problems(rows, leaks)
    ranked = tuple(sorted(problems, key=lambda problem: LEVELS.index(problem.level)))
    return Survey(data.name, data.layout, classes, duplicates, leaks, split, stray, unreadable, ranked)


def _try_split(
    data: DataSet, rows: list[Row], *, seed: int, holdout: float, groups: Mapping[str, str]
) -> tuple[SplitSummary | None, list[Problem]]:
    """The split of the readable images, or None and the reason; groups of unreadable images are left out."""
    readable = dataclasses.replace(data, cases=tuple(case for _, case, _ in rows))
    lost = {data.name_of(case) for case in data.cases} - {name for name, *_ in rows}
    given = {name: group for name, group in groups.items() if name not in lost}
    try:
        split = make_split(readable, [each for *_, each in rows], seed=seed, holdout=holdout, groups=given)
    except InputError as error:
        return None, [Problem("error", f"no split can be made: {error.reason}")]
    counts: dict[str, dict[str, int]] = {part: dict.fromkeys(LABELS.values(), 0) for part in PARTS}
    for entry in split.entries:
        counts[entry.part][LABELS[entry.label]] += 1
    together = len({entry.group for entry in split.entries if entry.group})
    problems = []
    if 0 < (held_out := counts["holdout"]["normal"]) < HOLDOUT_MIN:
        text = f"{held_out} held-out normals: no p-value below {1 / (held_out + 1):.3f} is possible"
        problems.append(Problem("warning", text))
    return SplitSummary(split.rule, split.digest, counts, together), problems


def _classes(data: DataSet, rows: list[Row]) -> tuple[ClassSummary, ...]:
    keys = dict.fromkeys((case.kind, case.label) for case in data.cases)
    return tuple(
        _class(data, [row for row in rows if (row[1].kind, row[1].label) == key], key) for key in keys
    )


def _class(data: DataSet, rows: list[Row], key: tuple[str, int | None]) -> ClassSummary:
    prints = [each for *_, each in rows]
    return ClassSummary(
        kind=key[0],
        label=LABELS[key[1]],
        count=sum((case.kind, case.label) == key for case in data.cases),
        heights=_spread([each.height for each in prints]),
        widths=_spread([each.width for each in prints]),
        modes=dict(sorted(Counter(each.mode for each in prints).items())),
        bits=dict(sorted(Counter(each.bits for each in prints).items())),
        coloured=sum(each.coloured > COLOURED_FROM for each in prints),
        burnt_in=sum(each.burnt_in > 0 for each in prints),
        patients=len({each.patient for each in prints if each.patient}) or None,
        masks=_masks(rows),
    )


def _spread(values: list[int]) -> tuple[float, float, float] | None:
    return (min(values), float(np.median(values)), max(values)) if values else None


def _masks(rows: list[Row]) -> MaskSummary:
    masked = [row for row in rows if row[1].masks]
    with ThreadPoolExecutor(max_workers=2) as pool:
        states = list(pool.map(_mask_states, masked))
    fields = ("several", "wrong_size", "non_binary", "unreadable")
    found = {field: tuple(state[field] for state in states if field in state) for field in fields}
    marked = {case.path for (_, case, _), state in zip(masked, states, strict=True) if "marked" in state}
    empty = {
        case.path: name if case.frame is None else name.removesuffix(f"#{case.frame}")
        for (name, case, _), state in zip(masked, states, strict=True)
        if case.path not in marked and "unreadable" not in state
    }
    count = sum("marked" in state for state in states)
    return MaskSummary(len(masked), len(rows) - len(masked), count, tuple(empty.values()), **found)


def _mask_states(row: Row) -> dict[str, str]:
    """What is worth saying about one case's masks: field of MaskSummary -> what to list there."""
    name, case, each = row
    states = {"several": name} if len(case.masks) > 1 else {}
    marked = False
    try:
        for path in case.masks:
            mask = read_mask([path], frame=case.frame, reading=case.reading)
            marked |= bool(mask.any())
            if mask.shape != (each.height, each.width):
                states["wrong_size"] = name
            if not kind_of_file(path).startswith("NIfTI"):  # there every label but 0 counts, nothing is cut
                levels = read_image(path, reading=case.reading).pixels.max(axis=0)
                if ((levels > 0) & (levels < 1)).any():
                    states["non_binary"] = name
    except InputError as error:
        return states | {"unreadable": f"{name}, mask {alias_of(path) or path.name}: {error.reason}"}
    return states | {"marked": name} if marked else states


def _duplicates(rows: list[Row]) -> Duplicates:
    prints = [each for *_, each in rows]

    def named(groups: Iterable[tuple[int, ...]]) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(rows[index][0] for index in group) for group in groups)

    content = equal_groups([each.sha256 for each in prints])
    pixels = equal_groups([each.pixels for each in prints])
    near = near_groups(prints)
    every = dict.fromkeys([*content, *pixels, *near])
    across = [group for group in every if len({rows[index][1].kind for index in group}) > 1]
    return Duplicates(named(content), named(pixels), named(near), named(across))


def _file_problems(data: DataSet, unreadable: dict[str, str], stray: tuple[str, ...]) -> Iterator[Problem]:
    if unreadable:
        listing = tuple(f"{name}: {reason}" for name, reason in unreadable.items())
        yield Problem("error", f"images that cannot be read ({len(unreadable)})", listing)
    if unlabelled := [data.name_of(case) for case in data.cases if case.label is None]:
        yield Problem("note", f"images without a label, not used ({len(unlabelled)})", tuple(unlabelled))
    if stray:
        yield Problem("note", f"files that are no images, ignored ({len(stray)})", stray)
    for note in data.notes:
        yield Problem("note", note)


def _duplicate_problems(rows: list[Row], duplicates: Duplicates) -> Iterator[Problem]:
    """Equal images with different labels or in both official parts are errors, near ones are warnings."""
    cases = {name: case for name, case, _ in rows}
    equal = duplicates.pixels  # equal bytes are equal pixels too
    near = tuple(group for group in duplicates.near if group not in set(equal))
    own = equal_groups([each.patient or case.group or (name,) for name, case, each in rows])
    patients = tuple(tuple(rows[index][0] for index in group) for group in own)
    checks: tuple[tuple[Level, str, tuple[tuple[str, ...], ...]], ...] = (
        ("error", "equal images", equal),
        ("warning", "nearly equal images", near),
        ("error", "images of one patient", patients),
    )
    for level, what, groups in checks:
        labels = _mixed(groups, {name: case.label for name, case in cases.items()})
        kinds = _mixed(groups, {name: case.kind for name, case in cases.items()})
        if groups is not patients:
            yield from _group_problem(level, f"{what} with different labels", labels)
            only_kinds = [group for group in kinds if group not in labels]
            yield from _group_problem("warning", f"{what} in different classes", only_kinds)
        else:
            yield from _group_problem("note", f"{what} with different labels", labels)
        parts = _mixed(groups, {name: case.split for name, case in cases.items()})
        yield from _group_problem(level, f"{what} in the train and the test part", parts)
    if inside := sum(len(group) - 1 for group in equal if group not in duplicates.across):
        yield Problem("note", f"images that repeat another of their class ({inside}); they stay on one side")


def _mixed(groups: Iterable[tuple[str, ...]], facts: Mapping[str, object]) -> list[tuple[str, ...]]:
    return [group for group in groups if len({facts[name] for name in group}) > 1]


def _group_problem(level: Level, text: str, groups: list[tuple[str, ...]]) -> Iterator[Problem]:
    if groups:
        listing = tuple(" = ".join(group) for group in groups)
        yield Problem(level, f"groups of {text} ({len(groups)})", listing)


def _mask_problems(summary: ClassSummary) -> Iterator[Problem]:
    masks, where = summary.masks, f"class {summary.kind!r}"
    if masks.unreadable:
        yield Problem("error", f"{where}: masks cannot be read", masks.unreadable)
    if masks.wrong_size:
        yield Problem("error", f"{where}: masks of another size than their image", masks.wrong_size)
    if masks.non_binary:
        text = f"{where}: masks with values between black and white; they are cut in the middle"
        yield Problem("warning", text, masks.non_binary)
    if summary.label == "abnormal" and masks.empty:
        yield Problem("warning", f"{where}: masks that mark nothing", masks.empty)
    if summary.label == "abnormal" and masks.without:
        text = f"{where}: {masks.without} of {masks.without + masks.with_mask} images have no mask"
        yield Problem("note", f"{text}: no pixel metrics for them")
    if summary.label == "normal" and masks.marked:
        yield Problem("warning", f"{where}: {masks.marked} of its masks mark something in normal images")
