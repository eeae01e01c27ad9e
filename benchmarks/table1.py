"""The paper's Table 1 beside ours: how many images train and test, what the files are, which are the same.

python benchmarks/table1.py --data ../shared/data

Writes benchmarks/results/table1.json. Every file is read, nothing is fitted or scored.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from printed import Notes
from results_store import DATASETS, load_named, paper_table
from umiad.data import DataSet, load_data
from umiad.duplicates import Fingerprint, equal_groups, fingerprints, near_groups
from umiad.errors import InputError
from umiad.report import Block, Table, Text
from umiad.splits import make_split
from win_table import missing

NAME, SEED, TOTAL = "table1", 0, "total"
COMMAND = "python benchmarks/table1.py --data DATA"
COLUMNS = {"train_normal": "train", "test_normal": "test_normal", "test_anomaly": "test_abnormal"}
"""The paper's columns -> ours."""
WHY = {
    ("brain_mri", "test_anomaly"): (
        "the paper leaves out one of the {ours} abnormal images and does not say which; all {ours} are used here, for "
        "every figure of this page"
    ),
    (TOTAL, "test_anomaly"): "the abnormal image of brain_mri that the paper leaves out",
}
"""Why a count of ours differs from the printed one."""


# Measuring


def measure(data: DataSet, *, seed: int = SEED, threads: int = 1) -> dict[str, Any]:
    """Counts of one set under our split of `seed` (hold-out 0), sizes in pixels, equal and similar images.

    Raises InputError where a file cannot be read.
    """
    prints = [_readable(each) for each in fingerprints(data.cases, threads=threads)]
    split = make_split(data, prints, seed=seed, holdout=0.0)
    part = {entry.name: entry.part for entry in split.entries}
    kinds = [case.kind for case in data.cases]
    classes = []
    for kind in sorted(set(kinds)):
        rows = [k for k, each in enumerate(kinds) if each == kind]
        counted = [part[data.name_of(data.cases[k])] for k in rows]
        sizes = {name: _range([getattr(prints[k], name) for k in rows]) for name in ("height", "width")}
        label = data.cases[rows[0]].label
        masks = sum(bool(data.cases[k].masks) for k in rows)
        counts = {"images": len(rows), "train": counted.count("train"), "test": counted.count("test")}
        classes.append({"kind": kind, "label": label, **counts, "with_mask_file": masks, **sizes})
    same = {
        "identical_files": equal_groups([each.sha256 for each in prints]),
        "identical_pixels": equal_groups([each.pixels for each in prints]),
        "near": near_groups(prints),
    }
    return {
        "classes": classes,
        "duplicates": {name: _groups(found, kinds) for name, found in same.items()},
        "split_digest": split.digest,
        "rule": split.rule,
    }


def _readable(found: Fingerprint | InputError) -> Fingerprint:
    if isinstance(found, InputError):
        raise found
    return found


def _range(values: Sequence[int]) -> list[float]:
    """Smallest, median, largest."""
    return [min(values), float(np.median(values)), max(values)]


def _groups(found: Sequence[tuple[int, ...]], kinds: Sequence[str]) -> dict[str, int]:
    across = sum(len({kinds[k] for k in group}) > 1 for group in found)
    return {"groups": len(found), "files": sum(map(len, found)), "across_classes": across}


# Rendering


def table1_blocks() -> list[Block]:
    """Counts beside the paper's with the reason for each difference; then the files themselves."""
    facts = load_named(NAME)
    if not facts:
        return [missing("Table 1", f"benchmarks/results/{NAME}.json", COMMAND)]
    sets = {name: facts["sets"][name] for name in DATASETS if name in facts["sets"]}
    notes = Notes()
    tables: list[Block] = [_counts(sets, notes, facts), _files(sets), _same(sets)]
    return [*tables, Text("Notes on the paper's Table 1", notes.lines())]


def _counts(sets: Mapping[str, Any], notes: Notes, facts: Mapping[str, Any]) -> Table:
    ours = {name: parts(each) for name, each in sets.items()}
    if len(sets) == len(DATASETS):
        ours[TOTAL] = {key: sum(each[key] for each in ours.values()) for key in COLUMNS.values()}
    rows = []
    for printed in paper_table(1):
        name = printed["dataset"]
        if name not in ours:
            continue
        cells = [text for paper, own in COLUMNS.items() for text in (printed[paper], str(ours[name][own]))]
        remark = [printed["why"]] if printed["why"] else []  # some explain a count that is not suspect
        rows.append((notes.marked(name, remark), *cells, _why(printed, ours[name])))
    header = ("set", *(f"{name}, {who}" for name in COLUMNS.values() for who in ("paper", "ours")), "reason")
    caption = (
        f"Images. Ours: split of seed {facts['seed']}, hold-out 0: as many normal images train as the paper says, "
        "drawn by seed, near-duplicates kept on one side; the rest and every abnormal image are tested. Which images "
        f"the paper trained on is not said. Commit {facts['commit']}."
    )
    return Table("Table 1: images", header, rows, caption)


def parts(facts: Mapping[str, Any]) -> dict[str, int]:
    """Images of one set that train, and that are tested, normal and abnormal."""
    normal, abnormal = ([row for row in facts["classes"] if row["label"] == label] for label in (0, 1))
    return {
        "train": sum(row["train"] for row in facts["classes"]),
        "test_normal": sum(row["test"] for row in normal),
        "test_abnormal": sum(row["test"] for row in abnormal),
    }


def _why(printed: Mapping[str, str], ours: Mapping[str, int]) -> str:
    found = [
        WHY.get((printed["dataset"], paper), f"{own}: no reason known").format(ours=ours[own])
        for paper, own in COLUMNS.items()
        if int(printed[paper]) != ours[own]
    ]
    return "; ".join(found) or "the same"


def _files(sets: Mapping[str, Any]) -> Table:
    rows = [
        (
            name,
            row["kind"],
            *(str(row[key]) for key in ("images", "train", "test", "with_mask_file")),
            *(" / ".join(f"{value:g}" for value in row[key]) for key in ("height", "width")),
        )
        for name, each in sets.items()
        for row in each["classes"]
    ]
    header = ("set", "class", "images", "train", "test", "with mask file", "height", "width")
    caption = (
        "Height and width in pixels: smallest / median / largest. The files of busi were reduced to 512 px at most "
        "before they came here. busi's normal images have mask files too, all empty."
    )
    return Table("Table 1: files", header, rows, caption)


def _same(sets: Mapping[str, Any]) -> Table:
    rows = [
        (name, kind.replace("_", " "), *(str(found[key]) for key in ("groups", "files", "across_classes")))
        for name, each in sets.items()
        for kind, found in each["duplicates"].items()
    ]
    caption = (
        "Near: average hashes within 6 of 256 bits and 16 x 16 thumbnails correlated above 0.99. Such groups stay on "
        "one side of our splits, and with an abnormal image in them they are tested; the paper does not mention them."
    )
    return Table(
        "Table 1: duplicates", ("set", "kind", "groups", "files", "groups across classes"), rows, caption
    )


def main() -> None:
    """Measure the three sets unless the result is there."""
    from paper_protocol import CODE, RESULTS, write

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with busi, brain_mri, head_ct")
    options = parser.parse_args()
    if (target := RESULTS / f"{NAME}.json").exists():
        return
    sets = {name: measure(load_data(options.data / name)) for name in DATASETS}
    write(target, {"sets": sets, "seed": SEED, "commit": CODE})


if __name__ == "__main__":
    main()
