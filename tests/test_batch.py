"""Scoring a folder of everything: good files of all kinds, volumes, and what must be skipped with its reason."""

import json
import os
import zlib
from pathlib import Path

import nibabel
import numpy as np
import PIL.Image
import pytest

from make import dicom_file, grey_array, grey_png, nifti_file, save_array, tiny_set
from umiad import api
from umiad.batch import Outputs, score_files
from umiad.errors import InputError
from umiad.types import FileOptions


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    data = tiny_set(tmp_path_factory.mktemp("data"), n_normal=30, n_abnormal=2, size=80)
    detector = api.build("padim", preset="quick", weights="random", size=64)
    return api.fit(detector, data)


def lines(out):
    return [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]


def volume(shape=(60, 50, 12), seed=0):
    return np.random.default_rng(seed).integers(0, 200, shape).astype(np.int16)


def bomb(path, edge=30_000):
    """A complete 1-bit PNG of edge x edge pixels in a few hundred kilobytes."""
    import struct

    def chunk(name, content):
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    rows = zlib.compress(bytes((edge // 8 + 1) * edge), 9)
    header = struct.pack(">IIBBBBB", edge, edge, 1, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
    return path


@pytest.fixture
def mixed(tmp_path):
    root = tmp_path / "mixed"
    good = grey_png(root / "good.png", (70, 90))
    save_array(root / "deep.png", grey_array((70, 90)).astype(np.uint16) * 257)
    dicom_file(root / "DOE_JANE.dcm", grey_array((64, 80)), PixelSpacing=[0.5, 0.5])
    dicom_file(root / "cine", np.stack([grey_array(seed=k) for k in range(3)]))
    nifti_file(root / "volume.nii.gz", volume(), np.diag([-2.0, 2, 3, 1]))
    bomb(root / "bomb.png")
    (root / "cut.png").write_bytes(good.read_bytes()[:2000])
    (root / "text.dcm").write_text("this is no image")
    os.mkfifo(root / "pipe.png")
    return root


BAD = {
    "bomb.png": "declares too many pixels",
    "cut.png": "truncated",
    "pipe.png": "special file",
}


def test_every_good_file_of_a_mixed_folder_is_scored_and_each_bad_one_has_its_reason(model, mixed, tmp_path):
    out = tmp_path / "out"
    summary = score_files(model, [mixed], out)
    assert len(summary.findings) == 1 + 1 + 1 + 3 + 12
    reasons = dict(summary.skipped)
    assert len(reasons) == 4
    for name, reason in BAD.items():
        assert reason in reasons[str(mixed / name)]
    [text] = [reason for name, reason in reasons.items() if name.startswith("dicom-")]
    assert "no known image format" in text
    record = json.loads((out / "summary.json").read_text())
    assert record["scored"] == 18
    assert len(record["skipped"]) == 4
    assert record["peak_memory_mb"][0] > 0
    assert (out / "report.html").exists()


def test_a_patients_name_is_in_no_file_that_scoring_writes(model, mixed, tmp_path, capfd):
    out = tmp_path / "out"
    score_files(model, [mixed], out)
    written = [path for path in out.rglob("*") if path.is_file()]
    assert written
    for path in written:
        assert b"DOE_JANE" not in path.read_bytes()
        assert "DOE" not in path.name
    assert "DOE" not in "".join(capfd.readouterr())
    score_files(model, [mixed], tmp_path / "named", files=FileOptions(frames="all", show_names=True))
    assert b"DOE_JANE" in (tmp_path / "named" / "scores.jsonl").read_bytes()


def test_areas_of_regions_are_in_square_millimetres(model, mixed, tmp_path):
    score_files(model, [mixed / "DOE_JANE.dcm"], tmp_path / "out")
    [line] = lines(tmp_path / "out")
    assert line["spacing_mm"] == [0.5, 0.5]
    assert all(region["area_mm2"] == region["area"] * 0.25 for region in line["regions"])


def test_a_volume_comes_back_as_a_volume_in_its_own_place(model, tmp_path):
    affine = np.array([[0, -2.0, 0, 10], [0, 0, 3, -5], [1.5, 0, 0, 7], [0, 0, 0, 1]])
    path = nifti_file(tmp_path / "v.nii.gz", volume((36, 50, 40)), affine)
    summary = score_files(model, [path], tmp_path / "out")
    [facts] = summary.volumes
    back = nibabel.load(tmp_path / "out" / facts["map"])
    assert back.shape == (36, 50, 40)
    np.testing.assert_allclose(back.affine, affine)
    found = lines(tmp_path / "out")
    assert [line["frame"] for line in found] == list(range(facts["frames"]))
    scores = [line["image_score"] for line in found]
    assert facts["highest_frame"] == int(np.argmax(scores))
    assert facts["expected_above_if_normal"] == pytest.approx(0.05 * len(scores), abs=0.01)
    assert np.isfinite(back.get_fdata()).all()
    assert (tmp_path / "out" / facts["picture"]).exists()


def test_slices_of_a_volume_score_as_they_do_alone(model, tmp_path):
    path = nifti_file(tmp_path / "v.nii", volume())
    score_files(model, [path], tmp_path / "out", outputs=Outputs(pictures="none", maps="none"))
    alone = [finding.image_score for finding in model.score(path)]
    assert [line["image_score"] for line in lines(tmp_path / "out")] == pytest.approx(alone, rel=1e-6)
    assert [finding.frame for finding in model.score(path)] == list(range(12))


def test_slices_that_were_not_chosen_are_empty_in_the_volume(model, tmp_path):
    path = nifti_file(tmp_path / "v.nii", volume())
    summary = score_files(model, [path], tmp_path / "out", files=FileOptions(frames="2:4"))
    [facts] = summary.volumes
    values = nibabel.load(tmp_path / "out" / facts["map"]).get_fdata()
    assert (facts["scored"], facts["frames"]) == (2, 12)
    assert np.isfinite(values[:, :, 2:4]).all()
    assert np.isnan(np.delete(values, [2, 3], axis=2)).all()


def test_frames_come_back_as_one_array(model, tmp_path):
    path = dicom_file(tmp_path / "cine.dcm", np.stack([grey_array((40, 56), seed=k) for k in range(3)]))
    summary = score_files(model, [path], tmp_path / "out")
    maps = np.load(tmp_path / "out" / summary.volumes[0]["map"], allow_pickle=False)
    assert maps.shape == (3, 40, 56)
    assert all(line["map"] == summary.volumes[0]["map"] for line in lines(tmp_path / "out"))


def test_of_a_volume_that_breaks_off_nothing_is_kept(model, tmp_path):
    stored = np.stack([grey_array(seed=k) for k in range(3)])
    path = dicom_file(tmp_path / "cine.dcm", stored)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - stored[0].nbytes])
    good = grey_png(tmp_path / "good.png")
    summary = score_files(model, [path, good], tmp_path / "out")
    assert [line["file"] for line in lines(tmp_path / "out")] == [str(good)]
    assert len(summary.skipped) == 1


@pytest.mark.parametrize("what", ["map", "score"])
def test_a_score_that_is_not_finite_is_the_files_fault_and_the_run_goes_on(
    what, model, tmp_path, monkeypatch
):
    data = tmp_path / "data"
    nifti_file(data / "b.nii", volume())
    for name in ("a", "c"):
        save_array(data / f"{name}.png", np.random.default_rng(3).integers(0, 255, (64, 64), dtype=np.uint8))
    score = type(model).run

    def broken(self, inputs, sizes):
        maps, scores = score(self, inputs, sizes)
        volumes = np.array([size != (64, 64) for size in sizes])
        (maps if what == "map" else scores)[volumes] = np.nan
        return maps, scores

    monkeypatch.setattr(type(model), "run", broken)
    summary = score_files(model, [data], tmp_path / "out")
    [(name, reason)] = summary.skipped
    assert name == str(data / "b.nii")
    assert "finite" in reason
    assert [Path(line["file"]).name for line in lines(tmp_path / "out")] == ["a.png", "c.png"]
    assert not list((tmp_path / "out" / "maps").glob("*b*"))


def test_a_folder_without_images_is_an_input_error(model, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="no images found .*DICOM and NIfTI"):
        score_files(model, [tmp_path], tmp_path / "out")


def test_equal_names_with_and_without_suffix_keep_their_own_maps(model, tmp_path):
    nifti_file(tmp_path / "a" / "scan.nii.gz", volume(seed=1))
    nifti_file(tmp_path / "b" / "scan.nii", volume(seed=2))
    PIL.Image.fromarray(grey_array()).save(tmp_path / "scan.png")
    score_files(model, [tmp_path], tmp_path / "out")
    assert len({line["map"].casefold() for line in lines(tmp_path / "out")}) == 3


def test_a_model_fitted_on_slices_evaluates_slices(tmp_path):
    for index in range(6):
        nifti_file(tmp_path / "set" / "normal" / f"n{index}.nii", volume(seed=index))
        kind = volume(seed=100 + index)
        labels = np.zeros(kind.shape, np.uint8)
        labels[10:30, 10:30, 6] = 1
        nifti_file(tmp_path / "set" / "abnormal" / f"a{index}.nii", kind)
        nifti_file(tmp_path / "set" / "masks" / f"a{index}_mask.nii.gz", labels)
    detector = api.build("intensity", size=64)
    options = api.FitOptions(files=FileOptions(frames="middle"), holdout=0.0)
    fitted = api.fit(detector, tmp_path / "set", options=options)
    assert fitted.config.preprocessing.frames == "middle"
    assert all(entry.name.endswith("#6") for entry in fitted.split.entries)
    found = api.evaluate(fitted, tmp_path / "set", n_resamples=20)
    assert found.counts["n_abnormal"] == 6
    assert found.counts["n_masked"] == 6
