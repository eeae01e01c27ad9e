from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from umiad.data import DataSet, load_data
from umiad.duplicates import Fingerprint, fingerprints
from umiad.errors import ConfigError, InputError
from umiad.splits import PARTS, Split, make_split, read_groups
from umiad.types import Case

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_real = pytest.mark.skipif(
    not REAL.is_dir(), reason="the real image sets do not lie beside the repository"
)


def print_of(content: object) -> Fingerprint:
    """A fingerprint that is far from that of any other content."""
    digest = hashlib.sha256(repr(content).encode()).digest()
    thumbnail = np.unpackbits(np.frombuffer(digest, np.uint8)).astype(np.float32).reshape(16, 16)
    return Fingerprint(digest.hex(), digest.hex(), digest, thumbnail, 64, 64, "L", 8, 0.0)


def made(
    normal: int = 20,
    abnormal: int = 5,
    *,
    unknown: int = 0,
    layout: str = "folders",
    root: str = "/somewhere",
) -> tuple[DataSet, list[Fingerprint | InputError]]:
    kinds = [("normal", 0)] * normal + [("abnormal", 1)] * abnormal + [("odd", None)] * unknown
    names = [(f"{kind}/{index:03}.png", kind, label) for index, (kind, label) in enumerate(kinds)]
    cases = tuple(Case(Path(root) / name, label=label, kind=kind) for name, kind, label in names)
    return DataSet("made", layout, Path(root), cases), [print_of(name) for name, _, _ in names]


def with_case(data: DataSet, index: int, **changes: object) -> DataSet:
    cases = list(data.cases)
    cases[index] = replace(cases[index], **changes)  # type: ignore[arg-type]
    return replace(data, cases=tuple(cases))


def sizes(split: Split) -> dict[str, int]:
    return {part: len(split.part(part)) for part in PARTS}


def part_of(split: Split) -> dict[str, str]:
    return {entry.name: entry.part for entry in split.entries}


# The rule


@pytest.mark.parametrize(
    ("layout", "normal", "train", "holdout"),
    [("busi", 133, 79, 20), ("brain_mri", 98, 69, 19), ("head_ct", 100, 71, 19), ("folders", 20, 13, 3)],
)
def test_the_papers_sizes_and_the_hold_out(layout: str, normal: int, train: int, holdout: int) -> None:
    split = make_split(*made(normal, 7, layout=layout))
    assert sizes(split) == {
        "train": train,
        "holdout": holdout,
        "test": normal - train - holdout + 7,
        "unused": 0,
    }
    assert all(entry.label == 0 for part in ("train", "holdout") for entry in split.part(part))


def test_the_seed_decides_and_nothing_else_does() -> None:
    data, prints = made(30, 5)
    base = make_split(data, prints, seed=3)
    order = list(range(len(prints)))
    random.Random(1).shuffle(order)
    shuffled = replace(data, cases=tuple(data.cases[i] for i in order))
    assert make_split(shuffled, [prints[i] for i in order], seed=3) == base
    assert make_split(*made(30, 5, root="elsewhere/set"), seed=3) == base
    assert make_split(data, prints, seed=4).names("train") != base.names("train")
    assert base.digest == make_split(data, prints, seed=3).digest != make_split(data, prints, seed=4).digest


def test_the_split_of_a_seed_never_changes() -> None:
    split = make_split(*made(8, 2), seed=7, holdout=0.25)
    found = {part: [name[-7:-4] for name in split.names(part) if "abnormal" not in name] for part in PARTS}
    assert found["train"] == ["000", "003", "006", "007"]
    assert found["holdout"] == ["002", "004"]
    assert found["test"] == ["001", "005"]


def test_the_hold_out_is_part_of_the_training_normals_of_the_seed() -> None:
    data, prints = made(40, 5)
    whole, none = make_split(data, prints, holdout=0.3), make_split(data, prints, holdout=0)
    assert sizes(none)["holdout"] == 0
    assert {*whole.names("train"), *whole.names("holdout")} == set(none.names("train"))
    assert "none held out" in none.rule


@pytest.mark.parametrize(
    ("normals", "fraction", "expected"),
    [(74, 0.01, 1), (75, 0.01, 19), (75, 0.5, 30), (2, 0.9, 0), (3, 0.9, 1), (12, 0.9, 9)],
)
def test_nineteen_are_held_out_once_sixty_train(normals: int, fraction: float, expected: int) -> None:
    # 80 % of 74 normals are 59, of 75 they are 60; one normal is always left to train.
    assert sizes(make_split(*made(normals, 1), holdout=fraction))["holdout"] == expected


@pytest.mark.parametrize("holdout", [-0.1, 0.91, float("nan")])
def test_a_hold_out_out_of_range_is_refused(holdout: float) -> None:
    with pytest.raises(ConfigError, match=r"expected 0 to 0\.9"):
        make_split(*made(), holdout=holdout)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ConfigError, match="seed -1"):
        make_split(*made(), seed=-1)


def test_unlabelled_images_are_unused() -> None:
    split = make_split(*made(10, 2, unknown=3))
    assert {entry.label for entry in split.part("unused")} == {None}
    assert sizes(split)["unused"] == 3


def test_normals_only_all_train_and_the_rule_says_so() -> None:
    split = make_split(*made(10, 0), holdout=0.2)
    assert sizes(split) == {"train": 8, "holdout": 2, "test": 0, "unused": 0}
    assert "normal images only" in split.rule


def test_no_normals_are_refused() -> None:
    with pytest.raises(InputError, match="none of 5 images is normal"):
        make_split(*made(0, 5))


# Groups


@pytest.mark.parametrize("seed", range(4))
def test_equal_and_near_images_stay_on_one_side(seed: int) -> None:
    data, prints = made(40, 5)
    first, second, third = (each for each in prints[:3] if isinstance(each, Fingerprint))
    prints[1] = replace(second, sha256=first.sha256)
    prints[2] = replace(third, pixels=first.pixels)
    prints[3] = replace(first, sha256="0" * 64, pixels="near")
    split = make_split(data, prints, seed=seed)
    names = [f"normal/00{index}.png" for index in range(4)]
    assert len({part_of(split)[name] for name in names}) == 1
    assert {entry.group for entry in split.entries if entry.name in names} == {"normal/000.png"}
    assert sizes(split)["train"] + sizes(split)["holdout"] == 32


@pytest.mark.parametrize("source", ["case", "file"])
def test_a_group_with_an_abnormal_image_is_tested(source: str) -> None:
    data, prints = made(20, 5)
    groups = {"normal/000.png": "P", "normal/001.png": "P", "abnormal/020.png": "P"}
    if source == "case":
        for index in (0, 1, 20):
            data = with_case(data, index, group="P")
    split = make_split(data, prints, groups=groups if source == "file" else None)
    assert {part_of(split)[name] for name in groups} == {"test"}
    assert "2 normals are tested for being grouped" in split.rule


def test_groups_of_different_reasons_are_united() -> None:
    data, prints = made(20, 5)
    first, second = prints[0], prints[1]
    assert isinstance(first, Fingerprint)
    assert isinstance(second, Fingerprint)
    prints[1] = replace(second, pixels=first.pixels)
    split = make_split(data, prints, groups={"normal/001.png": "g", "abnormal/020.png": "g"})
    assert part_of(split)["normal/000.png"] == "test"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=12, max_size=30), st.integers(0, 5), st.floats(0, 0.9))
def test_no_group_is_ever_divided(assignment: list[int], seed: int, holdout: float) -> None:
    data, prints = made(len(assignment), 4)
    groups = {f"normal/{index:03}.png": str(group) for index, group in enumerate(assignment) if group}
    assume(max(Counter(assignment).values()) <= data.train_normals)  # else there may be nothing to train on
    split = make_split(data, prints, seed=seed, holdout=holdout, groups=groups)
    parts = part_of(split)
    for group in set(groups.values()):
        assert len({parts[name] for name, own in groups.items() if own == group}) == 1
    trained = sizes(split)["train"] + sizes(split)["holdout"]
    assert 1 <= trained <= data.train_normals
    assert sizes(split)["train"] >= 1


def test_a_group_too_large_to_train_on_is_refused() -> None:
    data, prints = made(10, 2)
    with pytest.raises(InputError, match="no normal image is left to train"):
        make_split(data, prints, groups={f"normal/{index:03}.png": "one" for index in range(10)})


def test_fewer_train_where_groups_do_not_allow_more() -> None:
    data, prints = made(10, 2)
    groups = {f"normal/{index:03}.png": str(index // 5) for index in range(10)}
    split = make_split(data, prints, holdout=0, groups=groups)
    assert sizes(split)["train"] == 5
    assert "8 were wanted" in split.rule


def test_a_group_for_an_unknown_name_is_refused() -> None:
    with pytest.raises(InputError, match=r"1 names .* 'normal/00.png' .*such as 'abnormal/020.png'"):
        make_split(*made(), groups={"normal/00.png": "a"})


# The official split


def official(
    *, train: tuple[int, ...], test: tuple[int, ...]
) -> tuple[DataSet, list[Fingerprint | InputError]]:
    data, prints = made(6, 3)
    for part, indices in (("train", train), ("test", test)):
        for index in indices:
            data = with_case(data, index, split=part)
    return data, prints


def test_the_official_split_is_kept_whatever_the_seed() -> None:
    data, prints = official(train=(0, 1, 2, 3), test=(4, 5, 6, 7, 8))
    for seed in (0, 1):
        split = make_split(data, prints, seed=seed, holdout=0.25)
        assert (sizes(split)["train"], sizes(split)["holdout"], sizes(split)["test"]) == (3, 1, 5)
        assert {*split.names("train"), *split.names("holdout")} == {f"normal/00{i}.png" for i in range(4)}
        assert "official" in split.rule


def test_a_case_without_official_part_is_unused() -> None:
    data, prints = official(train=(0, 1, 2), test=(3, 6))
    assert sizes(make_split(data, prints, holdout=0)) == {"train": 3, "holdout": 0, "test": 2, "unused": 4}


def test_an_abnormal_image_in_the_official_training_part_is_refused() -> None:
    with pytest.raises(InputError, match=r"abnormal image 'abnormal/006.png'"):
        make_split(*official(train=(0, 6), test=(7,)))


def test_an_official_training_part_without_normals_is_refused() -> None:
    with pytest.raises(InputError, match="holds no normal image"):
        make_split(*official(train=(), test=(0, 6)))


# Fingerprints that do not fit


def test_an_unreadable_image_is_raised() -> None:
    data, prints = made()
    prints[3] = InputError("normal/003.png", "is damaged")
    with pytest.raises(InputError, match="is damaged"):
        make_split(data, prints)


def test_too_few_fingerprints_are_refused() -> None:
    data, prints = made(20, 5)
    with pytest.raises(InputError, match="24 fingerprints for 25 images"):
        make_split(data, prints[1:])


# The file


def test_a_split_survives_its_file(tmp_path: Path) -> None:
    split = make_split(*made(20, 5, unknown=2), seed=5, groups={"normal/001.png": "ä", "normal/002.png": "ä"})
    split.write(tmp_path / "sub" / "split.json")
    again = Split.read(tmp_path / "sub" / "split.json")
    assert again == split
    assert again.digest == split.digest
    assert split.digest == hashlib.sha256((tmp_path / "sub" / "split.json").read_bytes()).hexdigest()
    assert Split.from_json(json.loads(json.dumps(split.to_json()))) == split
    assert len(split.names("train")) == len(split.hashes("train"))


def damaged(change: str) -> dict[str, object]:
    values = json.loads(json.dumps(make_split(*made(4, 1)).to_json()))
    entry = values["entries"][0]
    match change:
        case "format":
            values["format"] = "other"
        case "unknown key":
            values["extra"] = 1
        case "part":
            entry["part"] = "training"
        case "hash":
            entry["sha256"] = "0" * 63
        case "label":
            entry["label"] = 2
        case "missing":
            del values["rule"]
        case "seed":
            values["seed"] = "0"
        case "nan":
            values["holdout"] = float("nan")
        case "twice":
            values["entries"].append(entry)
    return values


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("format", "is no split: format is 'other'"),
        ("unknown key", "damaged split: extra"),
        ("part", r"damaged split: entries.0.part"),
        ("hash", r"damaged split: entries.0.sha256"),
        ("label", r"damaged split: entries.0.label"),
        ("missing", "damaged split: rule"),
        ("seed", "damaged split: seed"),
        ("nan", "damaged split"),
        ("twice", "listed twice"),
    ],
)
def test_a_damaged_split_is_refused(change: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Split.from_json(damaged(change))


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"{}", b'{"format":1,"format":2}', b"\xff", b"[" * 100_000]
)
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "split.json").write_bytes(content)
    with pytest.raises(InputError, match="is no split"):
        Split.read(tmp_path / "split.json")


def test_a_missing_split_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        Split.read(tmp_path / "split.json")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_cut_file_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "split.json"
    make_split(*made(4, 1)).write(path)
    content = path.read_bytes().rstrip()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match="is no split"):
        Split.read(path)


# Groups from a file


def test_groups_are_read_from_csv(tmp_path: Path) -> None:
    (tmp_path / "g.csv").write_text('\ufeffpath,group\n"a, b.png",P1\nc.png, P2\n\n', encoding="utf-8")
    assert read_groups(tmp_path / "g.csv") == {"a, b.png": "P1", "c.png": "P2"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "first line is 'nothing'"),
        (b"file,group\n", "first line is 'file,group'"),
        (b"path,group\na.png\n", "expected a path and a group"),
        (b"path,group\na.png,\n", "expected a path and a group"),
        (b"path,group\na.png,1,2\n", "expected a path and a group"),
        (b"path,group\na.png,1\na.png,2\n", "listed twice"),
        (b"path,group\n\xff,1\n", "cannot be read as CSV"),
    ],
)
def test_a_bad_groups_file_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "g.csv").write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_groups(tmp_path / "g.csv")


# The real sets


@pytest.mark.real
@needs_real
@pytest.mark.parametrize(
    ("name", "train", "holdout", "test_normal", "test_abnormal"),
    [
        pytest.param("busi", 79, 20, 34, 647, marks=pytest.mark.slow),
        ("brain_mri", 69, 19, 10, 155),
        ("head_ct", 71, 19, 10, 100),
    ],
)
def test_real_sets_get_the_papers_sizes(
    name: str, train: int, holdout: int, test_normal: int, test_abnormal: int
) -> None:
    data = load_data(REAL / name)
    prints = fingerprints(data.cases)
    digests = set()
    for seed in range(3):
        split = make_split(data, prints, seed=seed)
        labels = [entry.label for entry in split.part("test")]
        assert (sizes(split)["train"], sizes(split)["holdout"]) == (train, holdout)
        assert (labels.count(0), labels.count(1)) == (test_normal, test_abnormal)
        assert not set(split.hashes("test")) & {*split.hashes("train"), *split.hashes("holdout")}
        digests.add(split.digest)
    assert len(digests) == 3
