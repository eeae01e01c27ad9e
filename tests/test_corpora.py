"""Long runs over files that others, or chance, have damaged: corpora, mutants, beginnings. Run by `make slow`."""

import gzip
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pydicom.data import get_testdata_files

from make import grey_array
from umiad.errors import InputError
from umiad.io import Limits, read_frames
from umiad.types import Reading

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from attacks import formats  # noqa: E402 - the repository's root is put on the path first

CORPORA = ROOT.parent / "shared" / "corpora"
FOLDERS = ("png_suite", "fuzz_png", "fuzz_jpeg", "fuzz_tiff", "fuzz_bmp", "nifti")
MUTANTS = 10_000
SEEDS = 20
QUICK = Limits(child_seconds=3)
MOST = 8
"""Frames of a file that are looked at."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def outcome(path, *, frames=f":{MOST}", limits=QUICK):
    """R0: "ok" where all images are sound, else the reason. Any other exception escapes, and fails the test."""
    try:
        for image in read_frames(path, frames=frames, reading=Reading(nan="zero"), limits=limits):
            assert image.pixels.dtype == np.float32
            assert image.pixels.ndim == 3
            assert image.pixels.shape[0] in (1, 3)
            assert np.isfinite(image.pixels).all()
            assert 0 <= image.pixels.min() <= image.pixels.max() <= 1
    except InputError as error:
        refused = error
    else:
        return "ok"
    assert refused.path == str(path)
    assert refused.reason
    assert "\n" not in refused.reason
    return refused.reason


def record(record_property, case, found, what):
    """Keep the totals; `found` counts outcomes."""
    tried, ok = sum(found.values()), found["ok"]
    lost = sum(count for reason, count in found.items() if "made its decoder" in reason)
    text = f"{what}: {ok} read, {tried - ok} refused ({lost} because their decoder crashed)"
    record_property("reliability", {"case": case, "tried": tried, "passed": tried, "what": text})
    return tried


@pytest.mark.real
@pytest.mark.skipif(not CORPORA.is_dir(), reason="the corpora do not lie beside the repository")
@pytest.mark.parametrize("folder", FOLDERS)
def test_I2_files_of_the_corpora(folder, record_property):
    files = sorted(path for path in (CORPORA / folder).rglob("*") if path.is_file())
    found = Counter()
    for path in files:
        told = outcome(path)
        found[told] += 1
        damaged = path.name.split("__")[-1].startswith("x")  # PngSuite's name for a corrupt file
        assert not (damaged and told == "ok"), path.name
    assert record(record_property, "I2", found, f"files of {folder}") == len(files) > 0


def test_I2_files_of_pydicom(record_property):
    files = sorted({Path(name) for name in get_testdata_files() if Path(name).is_file()})
    found = Counter(outcome(path) for path in files)
    assert record(record_property, "I2", found, "files that come with pydicom") == len(files) > 100
    assert found["ok"] > 60


def seeds():
    """Twenty good small files of each format, by its name."""
    made = {}
    for seed in range(SEEDS):
        grey = grey_array((24, 20), seed)
        rng = np.random.default_rng(seed)
        colour = rng.integers(0, 255, (24, 20, 3), np.uint8)
        picture, even = (grey, colour)[seed % 2], seed % 4 < 2
        packed = b"".join(
            b"\x3f" + formats.picture(64, seed=seed).tobytes()[k : k + 64] for k in range(0, 4096, 64)
        )
        volume = formats.nifti(
            rng.integers(0, 99, (12, 10, 3)).astype((np.int16, np.uint8, np.float32)[seed % 3])
        )
        rle = formats.dicom(syntax=formats.RLE, pixels=formats.fragments(formats.rle_frame(packed)))
        compression = ("raw", "tiff_lzw", "packbits", "jpeg", "tiff_adobe_deflate")[seed % 5]
        files = {
            "PNG": formats.encoded(picture, "PNG"),
            "JPEG": formats.encoded(picture, "JPEG", progressive=even, quality=60 + seed),
            "TIFF": formats.encoded(picture, "TIFF", compression=compression),
            "BMP": formats.encoded(picture, "BMP"),
            "DICOM": rle if even else formats.dicom(t00281050=b"DS40", t00281051=b"DS400"),
            "NIfTI": volume,
            "NIfTI.gz": gzip.compress(volume, mtime=0),
        }
        for kind, content in files.items():
            made.setdefault(kind, []).append(content)
    return made


KINDS = tuple(seeds())


def mutated(content, rng):
    """The file with one byte changed; half of them in its first 512 bytes, where the headers are."""
    altered = bytearray(content)
    end = min(512, len(altered)) if rng.random() < 0.5 else len(altered)
    altered[rng.integers(end)] ^= rng.integers(1, 256)
    return bytes(altered)


@pytest.mark.parametrize("kind", KINDS)
def test_I3_mutants_of_one_byte(kind, tmp_path, record_property):
    """Each find becomes a file of `attacks.inputs`, or a regression test of its reader."""
    files, rng = seeds()[kind], np.random.default_rng(sum(kind.encode()))
    path, found = tmp_path / "mutant", Counter()
    for number in range(-(-MUTANTS // len(KINDS))):
        content = mutated(files[number % SEEDS], rng)
        path.write_bytes(content)
        try:
            found[outcome(path)] += 1
        except BaseException:
            (tmp_path / "found").write_bytes(content)
            raise
    record(record_property, "I3", found, f"{kind} files with one byte changed")


@pytest.mark.parametrize("kind", KINDS)
def test_I1_beginnings_at_every_byte(kind, tmp_path, record_property):
    """Refused, or complete with all pixels: nothing is ever filled in."""
    content, path, found = seeds()[kind][0], tmp_path / "cut", Counter()
    path.write_bytes(content)
    whole = [image.pixels for image in read_frames(path)]
    for cut in range(len(content)):
        path.write_bytes(content[:cut])
        told = outcome(path)
        found[told] += 1
        if told == "ok":
            for image, pixels in zip(read_frames(path), whole, strict=True):
                np.testing.assert_array_equal(image.pixels, pixels)
    record(record_property, "I1", found, f"beginnings of a {kind} file")
    assert found["ok"] <= 64  # the last bytes of some formats hold no pixels


@pytest.mark.parametrize("group", ["PNG", "DICOM", "NIfTI.gz"])
def test_I3_random_bytes_behind_a_good_start(group, tmp_path, record_property):
    start, rng = seeds()[group][1], np.random.default_rng(1)
    path, found = tmp_path / "random", Counter()
    for _ in range(300):
        cut = int(rng.integers(8, len(start)))
        path.write_bytes(start[:cut] + rng.bytes(int(rng.integers(1, 2000))))
        found[outcome(path)] += 1
    record(record_property, "I3", found, f"{group} files with random bytes behind their beginning")
    assert len(os.listdir(tmp_path)) == 1
