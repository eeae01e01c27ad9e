"""From files to cases: frames, aliases, masks of volumes, patients."""

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest

import umiad.cases
from make import dicom_file, grey_array, grey_png, nifti_file
from umiad import api
from umiad.cases import alias_of, case_images, case_masks, case_pixels, expand
from umiad.data import load_data
from umiad.duplicates import case_sha256, fingerprint, fingerprints
from umiad.errors import InputError
from umiad.io import read_frames, read_image
from umiad.types import Case, FileOptions, Reading


def volume(shape=(40, 48, 5), seed=0):
    return np.random.default_rng(seed).integers(0, 200, shape).astype(np.uint8)


def test_a_volume_without_a_choice_of_slice_is_one_case_that_says_how_many_there_are(tmp_path):
    path = nifti_file(tmp_path / "normal" / "a.nii.gz", volume())
    [case] = expand([Case(path)], FileOptions())
    with pytest.raises(InputError, match=r"holds 5 frames or slices, expected one .*--frame K \(0 to 4\)"):
        case_pixels(case)


@pytest.mark.parametrize(
    ("frames", "numbers"),
    [("all", [0, 1, 2, 3, 4]), ("middle", [2]), ("3", [3]), ("1:4", [1, 2, 3]), ("::2", [0, 2, 4])],
)
def test_a_choice_of_frames_makes_cases_that_stay_together(tmp_path, frames, numbers):
    path = nifti_file(tmp_path / "a.nii", volume())
    cases = expand([Case(path)], FileOptions(frames=frames))
    assert [case.frame for case in cases] == numbers
    assert len({case.group for case in cases}) == 1
    assert len({case_sha256(case) for case in cases}) == len(numbers)
    assert [case.name for case in cases] == [f"{path}#{k}" for k in numbers]
    assert case_pixels(cases[0]).frame == numbers[0]


@pytest.mark.parametrize("frames", ["9", "7:9"])
def test_frames_that_a_file_does_not_have_are_an_error(tmp_path, frames):
    path = nifti_file(tmp_path / "a.nii", volume())
    with pytest.raises(InputError, match="5"):
        expand([Case(path)], FileOptions(frames=frames))


@pytest.mark.parametrize("frames", ["", "first", "-1", "1:2:0", "1,2"])
def test_words_that_are_no_choice_of_frames_are_refused(frames):
    with pytest.raises(InputError, match="no choice of frames"):
        expand([], FileOptions(frames=frames))


def test_files_of_one_image_know_no_frames(tmp_path):
    files = [grey_png(tmp_path / "a.png"), dicom_file(tmp_path / "b.dcm", grey_array())]
    cases = expand([Case(file) for file in files], FileOptions(frames="all"))
    assert [case.frame for case in cases] == [None, None]


def test_a_damaged_file_stays_one_case_whatever_frames_are_chosen(tmp_path):
    path = tmp_path / "a.nii"
    path.write_bytes(nifti_file(tmp_path / "b.nii", volume()).read_bytes()[:900])
    assert len(expand([Case(path)], FileOptions(frames="all"))) == 1


def test_I10_frame_k_is_bit_equal_to_its_own_file(tmp_path):
    frames = np.stack([grey_array(seed=k) for k in range(3)])
    path = dicom_file(tmp_path / "cine.dcm", frames)
    cases = expand([Case(path)], FileOptions(frames="all"))
    for case, frame in zip(cases, frames, strict=True):
        np.testing.assert_array_equal(case_pixels(case).pixels[0], frame.astype(np.float32) / np.float32(255))


def test_a_dicom_file_is_named_by_its_content(tmp_path):
    path = dicom_file(tmp_path / "DOE_JANE.dcm", grey_array())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    copied = tmp_path / "elsewhere"
    copied.write_bytes(path.read_bytes())
    assert alias_of(path) == alias_of(copied) == f"dicom-{digest[:12]}"
    assert alias_of(grey_png(tmp_path / "a.png")) == ""
    assert alias_of(tmp_path / "lost.dcm").startswith("dicom-")
    [case] = expand([Case(path)], FileOptions())
    assert case_pixels(case).name == case.name == alias_of(path)
    [shown] = expand([Case(path)], FileOptions(show_names=True))
    assert shown.name == str(path)


def test_errors_of_a_dicom_file_do_not_name_its_path(tmp_path):
    whole = dicom_file(tmp_path / "x" / "DOE_JANE.dcm", grey_array()).read_bytes()
    path = tmp_path / "DOE_JANE.dcm"
    path.write_bytes(whole[:-100])
    [case] = expand([Case(path)], FileOptions())
    with pytest.raises(InputError, match="^dicom-") as caught:
        case_pixels(case)
    assert "DOE" not in str(caught.value)


def test_a_data_set_of_dicom_files_holds_no_file_name(tmp_path):
    for index in range(3):
        dicom_file(tmp_path / "normal" / f"DOE_{index}.dcm", grey_array(seed=index))
    data = load_data(tmp_path)
    assert all(data.name_of(case).startswith("dicom-") for case in data.cases)
    named = load_data(tmp_path, files=FileOptions(show_names=True))
    assert {named.name_of(case) for case in named.cases} == {f"normal/DOE_{k}.dcm" for k in range(3)}


def test_the_window_of_the_reading_decides_the_grey_values(tmp_path):
    stored = np.full((40, 40), 100, np.uint16)
    stored[:20] = 300
    path = dicom_file(tmp_path / "a.dcm", stored)
    [full] = expand([Case(path)], FileOptions(reading=Reading(window="full")))
    [narrow] = expand([Case(path)], FileOptions(reading=Reading(window=(200.0, 100.0))))
    assert np.unique(case_pixels(full).pixels) == pytest.approx([100 / 65535, 300 / 65535])
    assert np.unique(case_pixels(narrow).pixels).tolist() == [0.0, 1.0]


def test_a_label_volume_is_the_mask_of_a_volume_slice_by_slice(tmp_path):
    labels = np.zeros((40, 48, 5), np.uint8)
    labels[10:20, 5:9, 2] = 3
    case = Case(
        nifti_file(tmp_path / "a.nii", volume()), masks=(nifti_file(tmp_path / "m.nii.gz", labels),), frame=2
    )
    mask = case_masks(case, case_pixels(case).size)
    assert mask.shape == (48, 40)
    assert mask.sum() == 40
    assert not case_masks(Case(case.path, masks=case.masks, frame=1), (48, 40)).any()


def test_images_of_one_patient_share_a_token_that_is_written_nowhere(tmp_path):
    one, two = (dicom_file(tmp_path / f"{k}.dcm", grey_array(seed=k)) for k in range(2))
    other = dicom_file(tmp_path / "o.dcm", grey_array(seed=9), PatientID="4712")
    tokens = [case_pixels(Case(path)).patient for path in (one, two, other)]
    assert tokens[0] == tokens[1] != tokens[2]
    assert "4711" not in repr(case_pixels(Case(Path(one))))
    assert tokens[0] not in repr(fingerprint(one))


def test_every_choice_of_frames_means_a_file_that_is_one_image(tmp_path):
    files = [grey_png(tmp_path / "a.png"), dicom_file(tmp_path / "b.dcm", grey_array())]
    for path, choice in itertools.product(files, ("all", "middle", "3", "40:90")):
        [image] = read_frames(path, frames=choice)
        assert image.frame is None
    with pytest.raises(InputError, match="no frame 3, it holds a single image"):
        read_image(files[0], frame=3)


def test_evaluating_reads_image_and_mask_as_the_model_does(tmp_path):
    for index in range(4):
        nifti_file(tmp_path / "set" / "normal" / f"n{index}.nii", volume((36, 40, 44), index))
        nifti_file(tmp_path / "set" / "abnormal" / f"a{index}.nii", volume((36, 40, 44), 50 + index))
        labels = np.zeros((36, 40, 44), np.uint8)
        labels[5:20, 18:23, 5:20] = 1
        nifti_file(tmp_path / "set" / "masks" / f"a{index}_mask.nii", labels)
    files = FileOptions(frames="middle", reading=Reading(axis="coronal"))
    detector = api.build("intensity", size=64)
    model = api.fit(detector, tmp_path / "set", options=api.FitOptions(files=files, holdout=0.0))
    otherwise = load_data(tmp_path / "set", files=FileOptions(frames="20"))  # axial: masks of another size
    assert api.evaluate(model, otherwise, n_resamples=20).counts["n_masked"] == 4


def test_slices_of_a_file_are_read_in_one_pass_and_give_what_they_give_alone(tmp_path, monkeypatch):
    path = nifti_file(tmp_path / "a.nii.gz", volume((40, 48, 9)))
    cases = [Case(grey_png(tmp_path / "b.png")), *expand([Case(path)], FileOptions(frames="1:8:3"))]
    alone = [case_pixels(case) for case in cases]
    opened = []
    monkeypatch.setattr(umiad.cases, "read_frames", lambda *a, **k: opened.append(k) or read_frames(*a, **k))
    for found, expected in zip(case_images(cases), alone, strict=True):
        assert (found.name, found.frame) == (expected.name, expected.frame)
        np.testing.assert_array_equal(found.pixels, expected.pixels)
    assert [each["frames"] for each in opened] == [[1, 4, 7]]


def test_a_slice_that_cannot_be_read_leaves_its_error_and_the_others_their_pixels(tmp_path):
    path = nifti_file(tmp_path / "a.nii", volume((40, 48, 3)))
    cases = [Case(path, frame=number) for number in (0, 9, 2)]
    first, second, third = case_images(cases)
    assert (first.frame, third.frame) == (0, 2)
    assert isinstance(second, InputError)
    prints = fingerprints(cases)
    assert [isinstance(each, InputError) for each in prints] == [False, True, False]
    assert prints[0].sha256 == case_sha256(cases[0]) != prints[2].sha256
