from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont
from rich.console import Console

from make import dicom_file, grey_array, grey_png, nifti_file, save_array
from umiad.data import DataSet, load_data
from umiad.duplicates import Fingerprint, fingerprints
from umiad.errors import ConfigError
from umiad.splits import make_split
from umiad.survey import Survey, survey
from umiad.survey_view import render
from umiad.types import FileOptions

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_real = pytest.mark.skipif(
    not REAL.is_dir(), reason="the real image sets do not lie beside the repository"
)


def picture(path: Path, seed: int, *, size: tuple[int, int] = (48, 40), mode: str = "L") -> Path:
    """A coarse random picture of `size` (height, width), unlike that of another seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
    grey = Pillow.fromarray(coarse).resize(size[::-1], Pillow.Resampling.NEAREST)
    grey.convert(mode).save(path)
    return path


def mask(path: Path, *values: int, size: tuple[int, int] = (48, 40)) -> Path:
    """A mask with the given grey values in its first pixels, 0 elsewhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(size, np.uint8)
    for row, value in enumerate(values):
        pixels[row] = value
    Pillow.fromarray(pixels).save(path)
    return path


def small_set(root: Path, *, normal: int = 8, abnormal: int = 4) -> Path:
    for index in range(normal):
        picture(root / "normal" / f"{index}.png", index)
    for index in range(abnormal):
        picture(root / "abnormal" / f"{index}.png", 100 + index)
    return root


def look(root: Path | DataSet, *, holdout: float = 0.2, groups: dict[str, str] | None = None) -> Survey:
    data = load_data(root) if isinstance(root, Path) else root
    return survey(data, fingerprints(data.cases), seed=0, holdout=holdout, groups=groups)


def texts(found: Survey, level: str) -> str:
    return "\n".join(f"{p.text} | {', '.join(p.files)}" for p in found.problems if p.level == level)


def test_a_clean_set_is_counted_and_has_no_errors(tmp_path: Path) -> None:
    found = look(small_set(tmp_path))
    abnormal, normal = found.classes
    assert (normal.kind, normal.label, normal.count, normal.modes, normal.bits) == (
        "normal",
        "normal",
        8,
        {"L": 8},
        {8: 8},
    )
    assert (abnormal.heights, abnormal.widths) == ((48, 48.0, 48), (40, 40.0, 40))
    assert (abnormal.masks.with_mask, abnormal.masks.without) == (0, 4)
    assert found.duplicates.near == ()
    assert (found.leaks.area_auroc, found.leaks.aspect_auroc) == (0.5, 0.5)
    assert found.split is not None
    assert found.split.counts["train"] == {"normal": 5, "abnormal": 0, "unlabelled": 0}
    assert found.split.counts["test"] == {"normal": 2, "abnormal": 4, "unlabelled": 0}
    assert not texts(found, "error")
    assert "1 held-out normals: no p-value below 0.500" in texts(found, "warning")


def test_it_is_one_json_object(tmp_path: Path) -> None:
    found = look(small_set(tmp_path))
    values = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert values["classes"][1]["count"] == 8
    assert values["split"]["digest"] == found.split.digest  # type: ignore[union-attr]
    assert {problem["level"] for problem in values["problems"]} == {"warning", "note"}


def test_unreadable_images_are_errors_with_the_reason_and_are_left_out(tmp_path: Path) -> None:
    small_set(tmp_path)
    (tmp_path / "normal" / "bad.png").write_bytes(b"no picture")
    found = look(tmp_path, groups={"normal/bad.png": "g", "normal/1.png": "g"})
    assert list(found.unreadable) == ["normal/bad.png"]
    assert "normal/bad.png: " in texts(found, "error")
    assert {each.kind: each.count for each in found.classes}["normal"] == 9
    assert found.split is not None
    assert sum(map(sum, (part.values() for part in found.split.counts.values()))) == 12


def test_a_class_of_unreadable_images_has_no_sizes(tmp_path: Path) -> None:
    (tmp_path / "normal").mkdir()
    (tmp_path / "normal" / "bad.png").write_bytes(b"no picture")
    found = look(tmp_path)
    assert (found.classes[0].heights, found.split) == (None, None)
    assert "no split can be made" in texts(found, "error")
    show(found)


def test_stray_files_unlabelled_images_and_notes_are_notes(tmp_path: Path) -> None:
    small_set(tmp_path)
    picture(tmp_path / "strange" / "s.png", 50)
    (tmp_path / "labels.csv").write_text("id\n")
    found = look(tmp_path)
    assert found.stray == ("labels.csv",)
    for words in ("ignored (1) | labels.csv", "not used (1) | strange/s.png", "folder 'strange'"):
        assert words in texts(found, "note")


def test_masks_are_described_by_what_is_wrong_with_them(tmp_path: Path) -> None:
    small_set(tmp_path, abnormal=6)
    folder = tmp_path / "masks"
    mask(folder / "0_mask.png", 255)
    mask(folder / "0_mask_1.png", 0)
    mask(folder / "1_mask.png", 0)
    mask(folder / "2_mask.png", 255, size=(20, 20))
    mask(folder / "3_mask.png", 255, 200)
    (folder / "4_mask.png").write_bytes(b"no picture")
    found = look(tmp_path)
    masks = found.classes[0].masks
    assert (masks.with_mask, masks.without) == (5, 1)
    assert masks.several == ("abnormal/0.png",)
    assert masks.empty == ("abnormal/1.png",)
    assert masks.wrong_size == ("abnormal/2.png",)
    assert masks.non_binary == ("abnormal/3.png",)
    assert len(masks.unreadable) == 1
    assert "4_mask.png: " in masks.unreadable[0]
    assert "another size than their image | abnormal/2.png" in texts(found, "error")
    assert "masks cannot be read" in texts(found, "error")
    assert "between black and white" in texts(found, "warning")
    assert "mark nothing | abnormal/1.png" in texts(found, "warning")
    assert "1 of 6 images have no mask" in texts(found, "note")


def test_empty_masks_of_normal_images_are_fine_and_others_are_not(tmp_path: Path) -> None:
    small_set(tmp_path)
    mask(tmp_path / "normal" / "0_mask.png", 0)
    assert "mark" not in texts(look(tmp_path), "warning")
    mask(tmp_path / "normal" / "1_mask.png", 255)
    assert "1 of its masks mark something in normal images" in texts(look(tmp_path), "warning")


def test_equal_images_with_different_labels_are_an_error(tmp_path: Path) -> None:
    small_set(tmp_path)
    picture(tmp_path / "abnormal" / "copy.bmp", 3)
    found = look(tmp_path)
    assert found.duplicates.content == ()
    assert found.duplicates.pixels == found.duplicates.across == (("abnormal/copy.bmp", "normal/3.png"),)
    assert "different labels (1) | abnormal/copy.bmp = normal/3.png" in texts(found, "error")


def test_equal_images_of_one_class_are_a_note_and_of_two_kinds_a_warning(tmp_path: Path) -> None:
    small_set(tmp_path)
    picture(tmp_path / "normal" / "again.png", 3)
    picture(tmp_path / "lesion" / "again.png", 102)
    found = look(tmp_path)
    assert ("normal/3.png", "normal/again.png") in found.duplicates.content
    assert "repeat another of their class (1)" in texts(found, "note")
    assert "equal images in different classes (1) | abnormal/2.png = lesion/again.png" in texts(
        found, "warning"
    )
    assert not texts(found, "error")


def test_equal_bytes_within_equal_pixels_are_counted_once(tmp_path: Path) -> None:
    small_set(tmp_path)
    picture(tmp_path / "normal" / "again.png", 3)
    picture(tmp_path / "normal" / "again.bmp", 3)
    assert "repeat another of their class (2)" in texts(look(tmp_path), "note")


def test_near_images_with_different_labels_are_a_warning(tmp_path: Path) -> None:
    small_set(tmp_path)
    picture(tmp_path / "abnormal" / "larger.png", 3, size=(96, 80))
    found = look(tmp_path)
    assert found.duplicates.near == (("abnormal/larger.png", "normal/3.png"),)
    assert "nearly equal images with different labels (1)" in texts(found, "warning")
    assert not texts(found, "error")


def test_what_crosses_the_official_split_is_an_error(tmp_path: Path) -> None:
    for index in range(4):
        picture(tmp_path / "train" / "good" / f"{index}.png", index)
    picture(tmp_path / "test" / "good" / "same.png", 2)
    picture(tmp_path / "test" / "good" / "patient.png", 60)
    picture(tmp_path / "test" / "crack" / "c.png", 70)
    data = load_data(tmp_path)
    patients = {"0.png": "P", "patient.png": "P", "1.png": "Q"}
    data = replace(data, cases=tuple(replace(c, group=patients.get(c.path.name, "")) for c in data.cases))
    errors = texts(look(data), "error")
    assert "equal images in the train and the test part (1) | test/good/same.png = train/good/2.png" in errors
    assert "images of one patient in the train and the test part (1) | test/good/patient.png" in errors


def test_mode_colour_and_suffix_of_one_label_only_are_leaks(tmp_path: Path) -> None:
    small_set(tmp_path)
    picture(tmp_path / "normal" / "alpha.png", 20, mode="RGBA")
    picture(tmp_path / "abnormal" / "saved.bmp", 21)
    rgb = np.stack([np.random.default_rng(22).integers(0, 256, (48, 40), dtype=np.uint8)] * 3, axis=-1)
    rgb[:4, :4] = (255, 0, 0)
    Pillow.fromarray(rgb).save(tmp_path / "normal" / "marked.png")
    found = look(tmp_path)
    warnings = texts(found, "warning")
    assert "stored as RGBA (1), all of them normal | normal/alpha.png" in warnings
    assert "coloured (1), all of them normal | normal/marked.png" in warnings
    assert "stored as L " not in warnings
    assert "named *.bmp (1), all of them abnormal | abnormal/saved.bmp" in texts(found, "note")
    assert {each.kind: each.coloured for each in found.classes} == {"abnormal": 0, "normal": 1}


@pytest.mark.parametrize(("size", "side"), [((96, 80), "larger"), ((24, 20), "smaller")])
def test_size_alone_is_a_leak_beyond_065(tmp_path: Path, size: tuple[int, int], side: str) -> None:
    small_set(tmp_path)
    for index in range(2):
        picture(tmp_path / "abnormal" / f"{index}.png", 200 + index, size=size)
    found = look(tmp_path)
    assert found.leaks.area_auroc == (0.75 if side == "larger" else 0.25)  # half are ties: (2 + 2 / 2) / 4
    assert f"AUROC 0.75 ({side} if abnormal)" in texts(found, "warning")
    picture(tmp_path / "abnormal" / "1.png", 201)
    assert "image area" not in texts(look(tmp_path), "warning")  # 0.625 is below the limit


def test_one_label_alone_has_no_leaks(tmp_path: Path) -> None:
    small_set(tmp_path, abnormal=0)
    picture(tmp_path / "normal" / "alpha.png", 20, mode="RGBA")
    found = look(tmp_path)
    assert (found.leaks.area_auroc, found.leaks.aspect_auroc) == (None, None)
    assert "RGBA" not in texts(found, "warning")


def test_a_set_without_normals_has_no_split(tmp_path: Path) -> None:
    small_set(tmp_path)
    data = load_data(tmp_path)
    abnormal = replace(data, cases=tuple(case for case in data.cases if case.label == 1))
    assert "none of 4 images is normal" in texts(look(abnormal), "error")


def test_a_bad_hold_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        look(small_set(tmp_path), holdout=2)


def show(found: Survey, *, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    render(found, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_page_shows_classes_split_and_problems(tmp_path: Path) -> None:
    small_set(tmp_path)
    picture(tmp_path / "abnormal" / "copy.bmp", 3)
    page = show(look(tmp_path))
    for words in (
        "layout folders",
        "abnormal",
        "48..48..48",
        "holdout",
        "1 equal pixels",
        "area 0.50",
        "error groups",
    ):
        assert words in page


def test_names_cannot_style_the_page(tmp_path: Path) -> None:
    root = small_set(tmp_path / "[red]set:smile:")
    (root / "[bold]x\x1b[31m.txt").write_text("stray")
    page = show(look(root))
    assert "[red]set:smile:" in page
    assert "[bold]x\\x1b[31m.txt" in page


def test_a_page_without_problems_says_so(tmp_path: Path) -> None:
    found = replace(look(small_set(tmp_path)), problems=())
    assert "no problems found" in show(found)


def test_bits_that_only_one_class_has_are_a_warning(tmp_path: Path) -> None:
    small_set(tmp_path, abnormal=0)
    for index in range(4):
        save_array(tmp_path / "abnormal" / f"{index}.png", grey_array(seed=index).astype(np.uint16) * 257)
    found = look(tmp_path)
    assert found.leaks.bits_auroc == 1.0
    assert "bits per channel alone separates the labels: AUROC 1.00 (more if abnormal)" in texts(
        found, "warning"
    )
    assert "images of 16 bits (4), all of them abnormal" in texts(found, "warning")


def test_text_burnt_into_one_class_is_a_warning_that_names_the_images(tmp_path: Path) -> None:
    for index in range(4):
        grey_png(tmp_path / "normal" / f"{index}.png", (200, 240), seed=index)
        shown = Pillow.fromarray(grey_array((200, 240), seed=10 + index) // 3)
        ImageDraw.Draw(shown).text((20, 40), "LEFT BREAST", fill=255, font=ImageFont.load_default(18))
        (tmp_path / "abnormal").mkdir(exist_ok=True)
        shown.save(tmp_path / "abnormal" / f"{index}.png")
    found = look(tmp_path)
    assert [each.burnt_in for each in found.classes] == [4, 0]
    warnings = texts(found, "warning")
    assert "text or marks seem burnt into 4 of 8 images: they count as unusual (4 abnormal)" in warnings
    assert "abnormal/0.png" in warnings
    assert "text burnt into the pixels alone separates the labels: AUROC 1.00" in warnings


def test_brightness_that_separates_the_labels_is_a_note(tmp_path: Path) -> None:
    for index in range(5):
        save_array(tmp_path / "normal" / f"{index}.png", grey_array(seed=index) // 2)
        save_array(tmp_path / "abnormal" / f"{index}.png", grey_array(seed=10 + index))
    found = look(tmp_path)
    assert found.leaks.brightness_auroc == 1.0
    assert "mean grey value alone separates the labels" in texts(found, "note")


def test_I18_one_patient_in_train_and_test_is_an_error_and_stays_together_otherwise(tmp_path: Path) -> None:
    for index in range(6):
        folder = tmp_path / "train" / "good" if index < 4 else tmp_path / "test" / "good"
        dicom_file(folder / f"n{index}.dcm", grey_array(seed=index), PatientID=str(index % 4))
    dicom_file(tmp_path / "test" / "bad" / "a.dcm", grey_array(seed=9), PatientID="9")
    found = look(tmp_path)
    errors = texts(found, "error")
    assert "groups of images of one patient in the train and the test part (2)" in errors


def test_patients_are_counted_and_their_images_stay_on_one_side_of_a_drawn_split(tmp_path: Path) -> None:
    def unlike(seed: int) -> np.ndarray:
        coarse = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
        return np.kron(coarse, np.ones((6, 6), np.uint8))

    for index in range(12):
        dicom_file(tmp_path / "normal" / f"n{index}.dcm", unlike(index), PatientID=str(index // 3))
    dicom_file(tmp_path / "abnormal" / "a.dcm", unlike(99), PatientID="99")
    data = load_data(tmp_path)
    found = look(data)
    assert {each.kind: each.patients for each in found.classes} == {"normal": 4, "abnormal": 1}
    split = make_split(data, fingerprints(data.cases), seed=0, holdout=0.0)
    sides: dict[str, set[str]] = {}
    for entry in split.entries:
        sides.setdefault(entry.group, set()).add(entry.part)
    assert all(len(parts) == 1 for group, parts in sides.items() if group)
    assert len([group for group in sides if group]) == 4


@pytest.mark.real
@needs_real
def test_head_ct_gives_its_labels_away() -> None:
    found = look(load_data(REAL / "head_ct"))
    warnings = texts(found, "warning")
    assert found.leaks.area_auroc == pytest.approx(0.80, abs=0.005)  # the manifest's value has two digits
    assert "image area alone separates the labels: AUROC 0.80 (larger if abnormal)" in warnings
    assert "stored as RGBA (12), all of them normal" in warnings
    assert "coloured (23), all of them normal" in warnings


@pytest.mark.real
@needs_real
def test_brain_mri_gives_its_labels_away() -> None:
    found = look(load_data(REAL / "brain_mri"))
    warnings = texts(found, "warning")
    assert "stored as RGBA (5), all of them normal" in warnings
    assert "stored as P (1), all of them normal" in warnings
    assert "width / height alone separates the labels: AUROC 0.73" in warnings
    assert found.leaks.area_auroc == pytest.approx(0.63, abs=0.005)  # the manifest's value has two digits


@pytest.mark.slow  # reads all 780 images
@pytest.mark.real
@needs_real
def test_busi_has_its_masks_and_its_pair_across_classes() -> None:
    found = look(load_data(REAL / "busi"))
    states = {each.kind: each.masks for each in found.classes}
    assert {kind: len(masks.empty) for kind, masks in states.items()} == {
        "benign": 0,
        "malignant": 0,
        "normal": 133,
    }
    assert {kind: len(masks.several) for kind, masks in states.items()} == {
        "benign": 16,
        "malignant": 1,
        "normal": 0,
    }
    assert "benign/benign (433).png = malignant/malignant (145).png" in texts(found, "warning")
    assert not texts(found, "error")


def test_masks_of_volumes_are_looked_at_slice_by_slice(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(5):
        volume = rng.integers(0, 200, (40, 44, 4)).astype(np.uint8)
        nifti_file(tmp_path / "normal" / f"n{index}.nii", volume)
        nifti_file(tmp_path / "abnormal" / f"a{index}.nii", volume[::-1])
        labels = np.zeros((40, 44, 4), np.uint8)
        labels[5:20, 5:20, 2] = 2
        nifti_file(tmp_path / "masks" / f"a{index}_mask.nii.gz", labels)
    found = look(load_data(tmp_path, files=FileOptions(frames="all")))
    assert not texts(found, "error")
    assert "masks" not in texts(found, "warning")
    [masks] = [each.masks for each in found.classes if each.kind == "abnormal"]
    assert (masks.with_mask, masks.empty) == (20, ())


def test_an_unreadable_mask_of_a_dicom_file_is_named_without_its_path(tmp_path: Path) -> None:
    small_set(tmp_path)
    dicom_file(tmp_path / "abnormal" / "0_mask.dcm", grey_array())
    found = look(tmp_path)
    assert "masks cannot be read | abnormal/0.png, mask dicom-" in texts(found, "error")


def test_a_patient_with_images_of_both_labels_is_a_note(tmp_path: Path) -> None:
    small_set(tmp_path)
    for kind in ("normal", "abnormal"):
        picture(tmp_path / "plain.png", 77 if kind == "normal" else 78, size=(48, 40))
        stored = np.asarray(Pillow.open(tmp_path / "plain.png"))
        dicom_file(tmp_path / kind / "p.dcm", stored, PatientID="7")
    (tmp_path / "plain.png").unlink()
    assert "groups of images of one patient with different labels (1)" in texts(look(tmp_path), "note")


def test_rare_text_in_one_class_alone_gives_the_label_away(tmp_path: Path) -> None:
    prints = fingerprints(load_data(small_set(tmp_path, normal=40, abnormal=40)).cases)
    data = load_data(tmp_path)
    marked = [
        replace(each, burnt_in=9) if isinstance(each, Fingerprint) and index < 8 else each
        for index, each in enumerate(prints)  # abnormal/ comes first
    ]
    found = survey(data, marked, seed=0, holdout=0.2)
    assert found.leaks.text_auroc == pytest.approx(0.6)
    assert "burnt into 8 of 80 images: they count as unusual, and they give the label away" in texts(
        found, "warning"
    )


def test_I18_copies_of_a_dicom_file_under_both_labels_are_an_error(tmp_path: Path) -> None:
    small_set(tmp_path)
    for kind in ("normal", "abnormal"):
        dicom_file(tmp_path / kind / "same.dcm", grey_array())
    data = load_data(tmp_path)
    assert len({data.name_of(case) for case in data.cases}) == len(data.cases)
    assert "groups of equal images with different labels (1)" in texts(look(data), "error")


def test_volumes_of_normals_with_empty_masks_are_no_warning_and_of_abnormals_one_each(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for kind in ("normal", "abnormal"):
        for index in range(3):
            nifti_file(
                tmp_path / kind / f"{kind}{index}.nii", rng.integers(0, 200, (40, 44, 3)).astype(np.uint8)
            )
            nifti_file(tmp_path / "masks" / f"{kind}{index}_mask.nii", np.zeros((40, 44, 3), np.uint8))
    found = look(load_data(tmp_path, files=FileOptions(frames="all")))
    warnings = texts(found, "warning")
    assert "mark something in normal images" not in warnings
    assert "masks that mark nothing | abnormal/abnormal0.nii, abnormal/abnormal1.nii" in warnings
    assert "named *" not in texts(found, "note")
