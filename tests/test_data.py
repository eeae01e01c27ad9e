from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umiad.data import DataSet, list_images, load_data, natural_key
from umiad.errors import InputError
from umiad.types import Case

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_real = pytest.mark.skipif(
    not REAL.is_dir(), reason="the real image sets do not lie beside the repository"
)


def tree(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\x89PNG\r\n\x1a\n")
    return root


def facts(data: DataSet) -> dict[str, tuple[int | None, str]]:
    return {data.name_of(case): (case.label, case.kind) for case in data.cases}


def masks(data: DataSet) -> dict[str, list[str]]:
    return {data.name_of(c): [m.relative_to(data.root).as_posix() for m in c.masks] for c in data.cases}


def cases_of(normal: int, layout: str) -> DataSet:
    cases = tuple(Case(Path(f"{index}.png"), label=0) for index in range(normal))
    return DataSet("d", layout, Path(), cases)


# Layouts


def test_busi_layout_unites_the_masks_beside_the_images(tmp_path: Path) -> None:
    tree(tmp_path, "benign/benign (1).png", "benign/benign (1)_mask.png", "benign/benign (1)_mask_1.png")
    tree(tmp_path, "malignant/m.png", "normal/normal (2).png", "normal/normal (2)_mask.png", "normal/n10.png")
    data = load_data(tmp_path)
    assert (data.name, data.layout, data.notes) == ("busi", "busi", ())
    assert masks(data) == {
        "benign/benign (1).png": ["benign/benign (1)_mask.png", "benign/benign (1)_mask_1.png"],
        "malignant/m.png": [],
        "normal/n10.png": [],
        "normal/normal (2).png": ["normal/normal (2)_mask.png"],
    }
    assert facts(data)["benign/benign (1).png"] == (1, "benign")
    assert facts(data)["normal/n10.png"] == (0, "normal")


def test_class_folders_are_known_in_any_case_and_named_as_on_disk(tmp_path: Path) -> None:
    data = load_data(tree(tmp_path, "Yes/a.JPG", "NO/b.png"))
    assert data.layout == "brain_mri"
    assert facts(data) == {"Yes/a.JPG": (1, "Yes"), "NO/b.png": (0, "NO")}


def test_labels_csv_and_system_files_are_stray_and_not_cases(tmp_path: Path) -> None:
    tree(
        tmp_path,
        "hemorrhage/1.png",
        "normal/2.png",
        "labels.csv",
        ".DS_Store",
        "normal/Thumbs.db",
        ".git/x.png",
    )
    (tmp_path / "labels.csv").write_text("id, hemorrhage\n")
    (tmp_path / "normal" / "Thumbs.db").write_text("thumbs")
    data = load_data(tmp_path)
    assert data.layout == "head_ct"
    assert {path.name for path in data.stray} == {"labels.csv", ".DS_Store", "Thumbs.db"}
    assert len(data.cases) == 2


def test_mvtec_keeps_the_official_split_and_finds_masks_by_kind(tmp_path: Path) -> None:
    tree(tmp_path, "train/good/000.png", "test/good/000.png", "test/crack/000.png", "test/hole/000.png")
    tree(
        tmp_path,
        "ground_truth/crack/000_mask.png",
        "ground_truth/hole/000.png",
        "extra/x.png",
        "train/loose.png",
    )
    data = load_data(tmp_path)
    assert data.layout == "mvtec"
    assert {data.name_of(c): (c.label, c.split) for c in data.cases} == {
        "train/good/000.png": (0, "train"),
        "test/good/000.png": (0, "test"),
        "test/crack/000.png": (1, "test"),
        "test/hole/000.png": (1, "test"),
    }
    assert masks(data)["test/crack/000.png"] == ["ground_truth/crack/000_mask.png"]
    assert masks(data)["test/hole/000.png"] == ["ground_truth/hole/000.png"]
    assert any("extra" in note for note in data.notes)
    assert any("train/loose.png" in note for note in data.notes)


def test_mvtec_mask_of_a_missing_image_is_not_given_to_another_kind(tmp_path: Path) -> None:
    tree(tmp_path, "train/good/1.png", "test/crack/2.png", "test/hole/3.png", "ground_truth/hole/2_mask.png")
    data = load_data(tmp_path)
    assert not any(case.masks for case in data.cases)
    assert any("ground_truth/hole/2_mask.png" in note for note in data.notes)


@pytest.mark.parametrize("folder", ["masks", "mask", "ground_truth", "Masks"])
@pytest.mark.parametrize("mask", ["7.png", "7_mask.png", "7_MASK_2.tif", "7_1.bmp"])
def test_masks_in_a_folder_match_by_stem_and_prefer_the_abnormal_image(
    tmp_path: Path, folder: str, mask: str
) -> None:
    data = load_data(tree(tmp_path, "normal/7.png", "abnormal/7.jpg", f"{folder}/{mask}"))
    assert data.layout == "folders"
    assert masks(data) == {"abnormal/7.jpg": [f"{folder}/{mask}"], "normal/7.png": []}


def test_an_exact_stem_wins_over_a_shortened_one(tmp_path: Path) -> None:
    data = load_data(tree(tmp_path, "normal/n.png", "abnormal/a.png", "abnormal/a_1.png", "masks/a_1.png"))
    assert masks(data)["abnormal/a_1.png"] == ["masks/a_1.png"]
    assert masks(data)["abnormal/a.png"] == []


def test_masks_inside_a_class_folder_follow_the_patient_folder(tmp_path: Path) -> None:
    tree(tmp_path, "good/n.png", "lesion/p1/images/1.png", "lesion/p1/masks/1.png")
    tree(tmp_path, "lesion/p2/images/1.png", "lesion/p2/masks/1.png")
    found = masks(load_data(tmp_path))
    assert found["lesion/p1/images/1.png"] == ["lesion/p1/masks/1.png"]
    assert found["lesion/p2/images/1.png"] == ["lesion/p2/masks/1.png"]


def test_a_mask_without_exactly_one_image_is_a_note(tmp_path: Path) -> None:
    tree(tmp_path, "normal/n.png", "normal/x_mask.png", "abnormal/a/1.png", "abnormal/b/1.png", "masks/1.png")
    data = load_data(tmp_path)
    assert not any(case.masks for case in data.cases)
    assert [note for note in data.notes if "normal/x_mask.png" in note and "masks/1.png" in note]


def test_a_folder_of_unknown_class_is_kept_without_label_and_said_so(tmp_path: Path) -> None:
    data = load_data(tree(tmp_path, "normal/a.png", "abnormal/b.png", "strange/c.png", "loose.png"))
    assert facts(data)["strange/c.png"] == (None, "strange")
    assert any("strange" in note for note in data.notes)
    assert any("loose.png" in note for note in data.notes)


def test_only_a_normal_folder(tmp_path: Path) -> None:
    data = load_data(tree(tmp_path / "set", "healthy/a.png"))
    assert (data.layout, data.name, data.cases[0].label) == ("normal_only", "set", 0)


def test_a_flat_folder_is_normal_and_says_so(tmp_path: Path) -> None:
    data = load_data(tree(tmp_path, "b10.png", "b2.png", "b2_mask.png", "masks/b10.png", "old/c.png"))
    assert data.layout == "flat"
    assert [case.path.name for case in data.cases] == ["b2.png", "b10.png"]
    assert {case.label for case in data.cases} == {0}
    assert masks(data) == {"b2.png": ["b2_mask.png"], "b10.png": ["masks/b10.png"]}
    assert any("all 2 images are taken as normal" in note for note in data.notes)
    assert any("old" in note for note in data.notes)


def test_foreign_medical_formats_are_cases_not_stray(tmp_path: Path) -> None:
    for name in ("a.dcm", "b.nii.gz", "c.png"):
        (tmp_path / name).write_bytes(b"")
    assert len(load_data(tmp_path).cases) == 3


def test_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    tree(tmp_path, "normal/a.png", "abnormal/b.png")
    (tmp_path / "normal" / "loop").symlink_to(tmp_path, target_is_directory=True)
    data = load_data(tmp_path)
    assert len(data.cases) == 2
    assert any("normal/loop" in note for note in data.notes)


def test_pipes_and_broken_links_with_the_names_of_images_are_not_passed_over(tmp_path: Path) -> None:
    tree(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere.png")
    data = load_data(tmp_path)
    assert {case.path.name for case in data.cases} == {"a.png", "pipe.png", "broken.png"}


# Refusals


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_data(tmp_path / "nowhere")


def test_a_single_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="single file"):
        load_data(tree(tmp_path, "a.png") / "a.png")


def test_an_unknown_structure_lists_what_was_found_and_what_is_understood(tmp_path: Path) -> None:
    tree(tmp_path, "cats/a.png", "dogs/b.png")
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(InputError) as caught:
        load_data(tmp_path)
    for word in ("cats", "dogs", ".txt", "normal/ and abnormal/", "train/good"):
        assert word in str(caught.value)


def test_class_folders_without_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "normal").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        load_data(tmp_path)


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        load_data(tmp_path)


# CSV


def manifest(root: Path, text: str) -> Path:
    tree(root, "img/a.png", "img/b.png", "img/b_1.png", "img/b_2.png")
    path = root / "set.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_with_every_column(tmp_path: Path) -> None:
    text = "\ufeffpath,Label,mask,patient,split\nimg/b.png,1,img/b_1.png; img/b_2.png,P1,test\n"
    text += "img/a.png,good,,P2,train\n"
    data = load_data(manifest(tmp_path, text))
    assert (data.name, data.layout) == ("set", "csv")
    first, second = data.cases
    assert (data.name_of(first), first.label, first.kind, first.group, first.split) == (
        *("img/a.png", 0, "good", "P2", "train"),
    )
    assert (second.label, second.kind, second.split) == (1, "abnormal", "test")
    assert [mask.name for mask in second.masks] == ["b_1.png", "b_2.png"]


def test_csv_with_path_and_label_only_and_an_unknown_label(tmp_path: Path) -> None:
    data = load_data(manifest(tmp_path, "path,label\nimg/a.png,0\nimg/b.png,\n"))
    assert [(case.label, case.kind) for case in data.cases] == [(0, "normal"), (None, "unknown")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,lable\n", "unknown column 'lable' \\(did you mean 'label'"),
        ("path\nimg/a.png\n", "no column 'label'"),
        ("", "no column 'path'"),
        ("path,label,label\n", "twice"),
        ("path,label\n", "no rows"),
        ("path,label\nimg/a.png,normel\n", "row 2: unknown label 'normel' \\(did you mean 'normal'"),
        ("path,label\nimg/a.png,0\nimg/../img/a.png,0\n", "row 3: .* listed twice"),
        ("path,label\nimg/z.png,0\n", "row 2: no such file"),
        ("path,label\n,0\n", "row 2: no such file"),
        ("path,label,mask\nimg/b.png,1,img/z.png\n", "row 2: no such file"),
        ("path,label\nimg/a.png,0,x\n", "row 2: more cells"),
        ("path,label,split\nimg/a.png,0,val\n", "split 'val', expected train, test"),
        ('path,label\n"img/a.png,0\n', "cannot be read as CSV"),
        ("path,label\n" + "x" * 300 + ".png,0\n", "no such file"),
    ],
)
def test_csv_refusals_name_the_row_and_the_remedy(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_data(manifest(tmp_path, text))


def test_csv_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_bytes(b"path,label\n\xff\xfe\x00,0\n")
    with pytest.raises(InputError, match="cannot be read as CSV"):
        load_data(path)


# Names, order, counts


def test_names_are_the_same_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path / "set", "normal/a b.png", "abnormal/é.png")
    absolute = load_data(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    relative = load_data("set")
    assert list(facts(absolute)) == list(facts(relative)) == ["abnormal/é.png", "normal/a b.png"]


def test_a_name_that_is_no_unicode_still_has_a_text_name(tmp_path: Path) -> None:
    try:
        tree(tmp_path, os.fsdecode(b"\xff.png"))
    except OSError:
        pytest.skip("this file system allows Unicode names only")
    data = load_data(tmp_path)
    assert data.name_of(data.cases[0]) == "\\xff.png"


@given(st.lists(st.text(max_size=12), max_size=8))
def test_natural_order_is_total(names: list[str]) -> None:
    clean = [name.replace("\0", "") for name in names]
    assert sorted(clean, key=natural_key) == sorted(reversed(clean), key=natural_key)


def test_natural_order_counts() -> None:
    assert sorted(["a10", "a2", "A1", "b1/2", "b1/10"], key=natural_key) == [
        "A1",
        "a2",
        "a10",
        "b1/2",
        "b1/10",
    ]


@pytest.mark.parametrize(
    ("layout", "total", "expected"),
    [
        ("busi", 133, 99),
        ("brain_mri", 98, 88),
        ("head_ct", 100, 90),
        ("head_ct", 50, 45),
        ("folders", 10, 8),
        ("folders", 100, 80),
        ("folders", 2, 1),
        ("folders", 1, 1),
        ("folders", 0, 0),
    ],
)
def test_training_normals(layout: str, total: int, expected: int) -> None:
    assert cases_of(total, layout).train_normals == expected


# Lists of images


def test_list_images_takes_files_and_folders(tmp_path: Path) -> None:
    tree(
        tmp_path,
        "d/a10.png",
        "d/a2.png",
        "d/a2_mask.png",
        "d/sub/b.png",
        "d/lone_mask.png",
        "d/masks/q.png",
        "x.txt",
    )
    (tmp_path / "x.txt").write_text("text")
    (tmp_path / "d" / "notes.txt").write_text("text")
    images, stray = list_images([tmp_path / "d", tmp_path / "x.txt", tmp_path / "d" / "a2.png"])
    names = [path.relative_to(tmp_path).as_posix() for path in images]
    assert names == ["d/a2.png", "d/a10.png", "d/lone_mask.png", "d/sub/b.png", "x.txt"]
    assert {path.name for path in stray} == {"a2_mask.png", "notes.txt", "q.png"}


def test_list_images_always_takes_a_mask_given_by_name(tmp_path: Path) -> None:
    tree(tmp_path, "a.png", "a_mask.png")
    images, stray = list_images([tmp_path, tmp_path / "a_mask.png"])
    assert [path.name for path in images] == ["a.png", "a_mask.png"]
    assert stray == []


def test_list_images_refuses_a_missing_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        list_images([tmp_path / "nowhere"])


# The real sets


@pytest.mark.real
@needs_real
@pytest.mark.parametrize(
    ("name", "normal", "abnormal", "with_masks", "files", "stray"),
    [("busi", 133, 647, 780, 798, 0), ("brain_mri", 98, 155, 0, 0, 0), ("head_ct", 100, 100, 0, 0, 1)],
)
def test_real_sets_have_the_counts_of_the_manifest(
    name: str, normal: int, abnormal: int, with_masks: int, files: int, stray: int
) -> None:
    data = load_data(REAL / name)
    labels = [case.label for case in data.cases]
    assert (data.name, data.layout) == (name, name)
    assert (labels.count(0), labels.count(1), len(data.stray)) == (normal, abnormal, stray)
    assert sum(bool(case.masks) for case in data.cases) == with_masks
    assert sum(len(case.masks) for case in data.cases) == files
    assert data.notes == ()
