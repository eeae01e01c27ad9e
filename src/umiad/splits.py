"""Who trains, who calibrates, who tests: decided once, written to a file that reproduces itself."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from umiad.data import DataSet
from umiad.diskfile import read_regular, write_atomic
from umiad.duplicates import Fingerprint, components, equal_groups, near_groups
from umiad.errors import ConfigError, InputError, ModelFileError
from umiad.strictjson import dump_bytes, load_object
from umiad.types import ABNORMAL, NORMAL, Case

FORMAT = "umiad-split-1"
MAX_HOLDOUT = 0.9
HOLDOUT_MIN, HOLDOUT_MIN_FROM = 19, 60  # 19 held-out normals are the fewest that allow p = 0.05
MAX_BYTES = 256 << 20

Part: TypeAlias = Literal["train", "holdout", "test", "unused"]
PARTS: tuple[Part, ...] = ("train", "holdout", "test", "unused")
_STRICT = ConfigDict(strict=True, extra="forbid")


@dataclass(frozen=True)
class SplitEntry:
    """One image: `name` relative to the data's root, `sha256` of its bytes, its `label`, its part.

    `group` is the first name of the group that stays together; empty for an image on its own.
    """

    __pydantic_config__ = _STRICT

    name: Annotated[str, Field(min_length=1)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    label: Literal[0, 1] | None
    group: str
    part: Part


@dataclass(frozen=True)
class Split:
    """A data set's parts, with everything needed to make them again; `rule` says in words how they came.

    "train" is fitted, "holdout" are training normals set aside for the threshold, "test" is everything
    evaluated, "unused" has no label or no part.
    """

    __pydantic_config__ = _STRICT

    dataset: str
    seed: Annotated[int, Field(ge=0)]
    holdout: Annotated[float, Field(ge=0, le=MAX_HOLDOUT)]
    rule: str
    entries: tuple[SplitEntry, ...]

    def part(self, part: Part) -> tuple[SplitEntry, ...]:
        """Entries of one part, in the order of their names."""
        return tuple(entry for entry in self.entries if entry.part == part)

    def names(self, part: Part) -> tuple[str, ...]:
        """Names of one part, relative to the data's root."""
        return tuple(entry.name for entry in self.part(part))

    def hashes(self, part: Part) -> tuple[str, ...]:
        """SHA-256 of the files of one part, in the order of `names`."""
        return tuple(entry.sha256 for entry in self.part(part))

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON; the same as of the file that `write` writes."""
        return hashlib.sha256(dump_bytes(self.to_json(), source="split")).hexdigest()

    def to_json(self) -> dict[str, object]:
        """Plain values, ready for canonical JSON."""
        return {"format": FORMAT, **_ADAPTER.dump_python(self, mode="json")}

    @classmethod
    def from_json(cls, values: Mapping[str, object], *, source: str = "split") -> Self:
        """Build from plain values; `source` names their origin in errors. Raises InputError."""
        if values.get("format") != FORMAT:
            found = repr(values.get("format"))[:80]
            raise InputError(source, f"is no split: format is {found}, expected {FORMAT!r}")
        fields = {key: each for key, each in values.items() if key != "format"}
        try:
            split = _ADAPTER.validate_json(dump_bytes(fields, source=source))
        except ConfigError as error:
            raise InputError(source, f"damaged split: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise InputError(
                source, f"damaged split: {where}: {first['msg']}", "make the split anew"
            ) from error
        if twice := equal_groups([entry.name for entry in split.entries]):
            raise InputError(source, f"damaged split: {split.entries[twice[0][0]].name!r} is listed twice")
        return cls(split.dataset, split.seed, split.holdout, split.rule, split.entries)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the canonical JSON, whole or not at all. Raises DiskError."""
        write_atomic(Path(path), dump_bytes(self.to_json(), source="split"))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `write` wrote. Raises InputError for a missing, damaged or foreign file."""
        source = os.fspath(path)
        try:
            values = load_object(read_regular(Path(path), limit=MAX_BYTES), source=source)
        except ModelFileError as error:
            reason = str(error).removeprefix(f"{source}: ")
            raise InputError(source, f"is no split: {reason}", "give a split.json of umiad") from error
        return cls.from_json(values, source=source)


_ADAPTER = TypeAdapter(Split)


@dataclass(frozen=True)
class _Draft:
    """The data in the order of names, and the groups that stay together (every image is in one)."""

    names: list[str]
    cases: list[Case]
    prints: list[Fingerprint]
    groups: list[tuple[int, ...]]


def make_split(
    data: DataSet,
    fingerprints: Sequence[Fingerprint | InputError],
    *,
    seed: int = 0,
    holdout: float = 0.2,
    groups: Mapping[str, str] | None = None,
) -> Split:
    """Split `data`; `fingerprints` are those of `data.cases`, in the same order.

    An official train/test split is kept and `seed` governs the hold-out only. Otherwise all abnormal images
    and as many normals as `DataSet.train_normals` leaves over are the test part. Images with equal bytes or
    pixels, near-duplicates, of one patient, equal `Case.group` and equal `groups` (name -> group) stay on one
    side; a group with an abnormal image is tested. The hold-out is `holdout` of the training normals, at least 19 of
    60 or more. The result depends on names, contents, seed and hold-out only, not on order or location.

    Raises:
        ConfigError: `holdout` outside 0..0.9, negative seed.
        InputError: unreadable images, no normals to train on, abnormal images in an official training part,
            a group for an unknown name.
    """
    if not 0 <= holdout <= MAX_HOLDOUT:
        raise ConfigError(f"holdout {holdout} is out of range, expected 0 to {MAX_HOLDOUT}")
    if seed < 0:
        raise ConfigError(f"seed {seed} is negative, expected 0 or more")
    draft = _draft(data, fingerprints, groups or {})
    labels = [case.label for case in draft.cases]
    if NORMAL not in labels:
        raise InputError(data.root, f"none of {len(labels)} images is normal", "only normals are fitted")
    parts: list[Part]
    if any(case.split for case in draft.cases):
        parts, rule = _official(data, draft)
    elif ABNORMAL not in labels:
        parts = ["train" if label == NORMAL else "unused" for label in labels]
        rule = "normal images only: all are fitted, none is left to test"
    else:
        parts, rule = _drawn(data, draft, seed)
    rule += "; " + _hold_out(draft, parts, holdout, seed)
    return Split(data.name, seed, float(holdout), rule, _entries(draft, parts))


def fold_numbers(entries: Sequence[SplitEntry], folds: int, *, seed: int) -> list[int]:
    """The fold (0 to folds - 1) of each image; images of one group share it, every fold has 2 groups or more.

    Rounds of `folds` groups, the largest groups first and equal ones in an order drawn by `seed`: in each round the
    largest goes to the fold that has the fewest images so far. Raises InputError below 2 * folds groups.
    """
    members: dict[tuple[str, str], list[int]] = {}
    for place, entry in enumerate(entries):
        key = ("group", entry.group) if entry.group else ("name", entry.name)
        members.setdefault(key, []).append(place)
    if len(members) < 2 * folds:
        reason = (
            f"{len(entries)} normal images to train on, in {len(members)} groups that stay together (duplicates, "
            f"patients); {folds} folds need at least {2 * folds} groups"
        )
        raise InputError("normal images", reason, "fewer folds, or more normal images")
    groups = list(members.values())
    drawn = np.random.PCG64(np.random.SeedSequence((seed, 2))).random_raw(len(groups))
    order = sorted(range(len(groups)), key=lambda index: (-len(groups[index]), int(drawn[index])))
    found, images = [0] * len(entries), [0] * folds
    for start in range(0, len(order), folds):
        emptiest = sorted(range(folds), key=lambda fold: images[fold])
        for fold, index in zip(emptiest, order[start : start + folds], strict=False):
            images[fold] += len(groups[index])
            for place in groups[index]:
                found[place] = fold
    return found


def read_groups(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read a CSV with the columns path,group: which images stay together. Paths are relative to the data.

    Raises:
        InputError: unreadable, other columns, an empty cell, or a path given twice.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file, strict=True) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(path, f"cannot be read as CSV: {error}", "save it as UTF-8 text") from error
    if not rows or rows[0] != ["path", "group"]:
        found = ",".join(rows[0]) if rows else "nothing"
        raise InputError(path, f"the first line is {found[:80]!r}, expected 'path,group'")
    result: dict[str, str] = {}
    for row in rows[1:]:
        if len(row) != 2 or not all(row):
            raise InputError(
                path, f"line {','.join(row)[:80]!r}: expected a path and a group", "quote commas"
            )
        if row[0] in result:
            raise InputError(path, f"{row[0]!r} is listed twice", "an image has one group")
        result[row[0]] = row[1]
    return result


def _draft(
    data: DataSet, fingerprints: Sequence[Fingerprint | InputError], groups: Mapping[str, str]
) -> _Draft:
    if len(fingerprints) != len(data.cases):
        raise InputError(data.root, f"{len(fingerprints)} fingerprints for {len(data.cases)} images")
    rows = []
    for case, each in zip(data.cases, fingerprints, strict=True):
        if isinstance(each, InputError):
            raise each
        rows.append((data.name_of(case), case, each))
    rows.sort(key=lambda row: row[0])
    names = [name for name, _, _ in rows]
    given = {data.path_of(case): name for name, case, _ in rows if case.frame is None}
    groups = {
        given.get(name, name): group for name, group in groups.items()
    }  # aliased files go by their path too
    if unknown := sorted(groups.keys() - set(names)):
        reason = f"{len(unknown)} names in the groups are not in the data, the first is {unknown[0]!r}"
        raise InputError(
            data.root, reason, f"names are relative to the data, such as {names[0]!r}" if names else ""
        )
    cases, prints = [case for _, case, _ in rows], [each for _, _, each in rows]
    return _Draft(names, cases, prints, _together(names, cases, prints, groups))


def _together(
    names: list[str], cases: list[Case], prints: list[Fingerprint], groups: Mapping[str, str]
) -> list[tuple[int, ...]]:
    """Every reason to stay together, united; images without any are groups of one."""
    alone = [(index,) for index in range(len(names))]
    reasons = [
        *equal_groups([each.sha256 for each in prints]),
        *equal_groups([each.pixels for each in prints]),
        *near_groups(prints),
        *equal_groups([each.patient or one for each, one in zip(prints, alone, strict=True)]),
        *equal_groups([case.group or one for case, one in zip(cases, alone, strict=True)]),
        *equal_groups([groups.get(name) or one for name, one in zip(names, alone, strict=True)]),
    ]
    pairs = [(group[0], other) for group in reasons for other in group[1:]]
    united = components(len(names), np.array(pairs, dtype=np.int64).reshape(-1, 2))
    inside = {index for group in united for index in group}
    return sorted([*united, *(one for one in alone if one[0] not in inside)])


def _official(data: DataSet, draft: _Draft) -> tuple[list[Part], str]:
    """Keep the parts that came with the data."""
    parts: list[Part] = []
    for name, case in zip(draft.names, draft.cases, strict=True):
        if case.split == "train" and case.label == ABNORMAL:
            raise InputError(
                data.root,
                f"the training part holds the abnormal image {name!r}",
                "only normal images may be fitted: move it to the test part",
            )
        known = case.label is not None and case.split in ("train", "test")
        parts.append(("train" if case.split == "train" else "test") if known else "unused")
    if "train" not in parts:
        raise InputError(data.root, "the official training part holds no normal image")
    return parts, f"official split of the data ({parts.count('train')} training normals)"


def _drawn(data: DataSet, draft: _Draft, seed: int) -> tuple[list[Part], str]:
    """Groups of normals in an order drawn by `seed` until enough images train; the rest is tested."""
    parts: list[Part] = ["unused" if case.label is None else "test" for case in draft.cases]
    normals = [i for i, case in enumerate(draft.cases) if case.label == NORMAL]
    free = [g for g in draft.groups if all(draft.cases[i].label != ABNORMAL for i in g)]
    chosen = _fill(_only(free, normals), data.train_normals, seed=seed, stage=0)
    bound = len(normals) - sum(len(group) for group in _only(free, normals))
    for index in chosen:
        parts[index] = "train"
    if not chosen:
        raise InputError(
            data.root,
            f"no normal image is left to train: {bound} of {len(normals)} are grouped with abnormal images, "
            f"and no other group has at most {data.train_normals} images",
            "give smaller groups, or images of more patients",
        )
    rule = f"{len(chosen)} of {len(normals)} normals train, drawn by seed in groups of duplicates"
    if len(chosen) < data.train_normals:
        rule += f" ({data.train_normals} were wanted, but groups are kept together)"
    return parts, rule + (
        f"; {bound} normals are tested for being grouped with abnormal images" if bound else ""
    )


def _hold_out(draft: _Draft, parts: list[Part], fraction: float, seed: int) -> str:
    """Move a share of the training images to "holdout", in place; says in words what was done."""
    trained = [index for index, part in enumerate(parts) if part == "train"]
    target = round(fraction * len(trained))
    if fraction > 0 and len(trained) >= HOLDOUT_MIN_FROM:
        target = max(target, HOLDOUT_MIN)
    chosen = _fill(_only(draft.groups, trained), min(target, len(trained) - 1), seed=seed, stage=1)
    for index in chosen:
        parts[index] = "holdout"
    return f"{len(chosen)} of these {len(trained)} held out" if chosen else "none held out"


def _only(groups: Iterable[tuple[int, ...]], wanted: Iterable[int]) -> list[tuple[int, ...]]:
    """The groups restricted to `wanted`, without those that become empty."""
    keep = set(wanted)
    restricted = (tuple(index for index in group if index in keep) for group in groups)
    return [group for group in restricted if group]


def _fill(groups: Sequence[tuple[int, ...]], target: int, *, seed: int, stage: int) -> list[int]:
    """Take groups in a drawn order, leaving out any that would exceed `target` images.

    The order comes from the raw output of PCG64, which NumPy promises to keep; its shuffles are not promised.
    """
    keys = np.random.PCG64(np.random.SeedSequence((seed, stage))).random_raw(len(groups))
    chosen: list[int] = []
    for position in np.argsort(keys, kind="stable"):
        if len(chosen) + len(groups[position]) <= target:
            chosen.extend(groups[position])
    return chosen


def _entries(draft: _Draft, parts: Sequence[Part]) -> tuple[SplitEntry, ...]:
    first = {index: draft.names[group[0]] for group in draft.groups if len(group) > 1 for index in group}
    rows = zip(draft.names, draft.prints, draft.cases, parts, strict=True)
    return tuple(
        SplitEntry(name, each.sha256, _known(case.label), first.get(index, ""), part)
        for index, (name, each, case, part) in enumerate(rows)
    )


def _known(label: int | None) -> Literal[0, 1] | None:
    return None if label is None else 1 if label == ABNORMAL else 0
