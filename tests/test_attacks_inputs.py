"""Every hostile file of `attacks/inputs.py` is an image or exactly one InputError; no name in it harms what is written.

R0 for the matrix of inputs, I1 to I18; the corpora and the long runs are in `test_corpora`.
"""

import ast
import errno
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from make import grey_array, grey_png, mask_png, save_array, tiny_set
from umiad import fitted
from umiad.batch import Outputs, score_files
from umiad.cases import case_masks, case_pixels
from umiad.config import Preprocessing
from umiad.data import list_images, load_data
from umiad.duplicates import fingerprint, fingerprints
from umiad.errors import InputError
from umiad.io import Limits, kind_of_file, looks_like_image, read_frames, read_image, read_mask, read_stack
from umiad.preprocess import check_usable, from_array, to_input
from umiad.report import POLICY
from umiad.survey import survey
from umiad.types import Case, FileOptions

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from attacks import formats, inputs  # noqa: E402 - the repository's root is put on the path first
from attacks.names import NAMES  # noqa: E402

MODEL = Path(__file__).parent / "golden" / "model-1" / "padim"
QUICK = Limits(child_seconds=2)
MIB = 1 << 20
CUTS = 64
BARE = Outputs(pictures="none", maps="none")
posix = pytest.mark.skipif(os.name != "posix", reason="links, pipes and limits of POSIX")


@pytest.fixture(scope="module")
def model():
    return fitted.load(MODEL)


@pytest.fixture
def record(record_property):
    """Keep how many files of a case were tried, and how many ended as they should."""

    def keep(case, tried, passed, what):
        record_property("reliability", {"case": case, "tried": tried, "passed": passed, "what": what})
        assert passed == tried > 0

    return keep


def named(attacks):
    return [f"{each.id} {each.name}" for each in attacks]


def of(*wanted):
    found = [each for each in inputs.ATTACKS if each.id in wanted]
    return pytest.mark.parametrize("attack", found, ids=named(found))


def outcome(path, *, frame="one", limits=QUICK):
    """(image, None) or (None, error). Any other exception escapes, and fails the test."""
    try:
        return read_image(path, frame=frame, limits=limits), None
    except InputError as error:
        return None, error


def refusal(way, path):
    """What the InputError names that a way to open a file ends with; None where it is opened."""
    try:
        way(path)
    except InputError as error:
        return error.path
    return None


def check(attack, folder):
    """R0 for one file: the image that was expected, or the one error."""
    path = attack.make(folder)
    image, error = outcome(path, frame="middle" if attack.id == "I9" else "one")
    if attack.expect == inputs.OK:
        assert error is None, error
        assert image.name.startswith(str(path))
        assert image.pixels.dtype == np.float32
        assert image.pixels.shape[0] in (1, 3)
        assert 0 <= image.pixels.min() <= image.pixels.max() <= 1
        return image
    assert image is None
    assert re.search(attack.expect, error.reason), error
    assert error.path == str(path)
    assert "\n" not in error.reason
    assert len(error.reason) < 400
    return error


def scored(model, folder, out, **options):
    summary = score_files(model, [folder], out, outputs=BARE, **options)
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text(encoding="ascii").splitlines()]
    return summary, lines


def test_attacks_have_distinct_names_and_cover_the_matrix(tmp_path):
    assert len(set(named(inputs.ATTACKS))) == len(inputs.ATTACKS) >= 150
    assert {each.id for each in inputs.ATTACKS} == {"I5", "I7", "I8", "I9", "I12", "I13", "I14", "I15"}
    inputs.main(tmp_path / "all")
    assert len((tmp_path / "all" / "index.txt").read_text().splitlines()) == len(inputs.ATTACKS)
    shutil.rmtree(tmp_path / "all")


# ---- I1: cut files


def sample_files():
    """Good small files of each format, by name."""
    grey, packed = (
        formats.picture(),
        b"".join(b"\x3f" + formats.picture().tobytes()[k : k + 64] for k in range(0, 4096, 64)),
    )
    volume = formats.nifti()
    return {
        "PNG": formats.encoded(grey, "PNG"),
        "JPEG": formats.encoded(grey, "JPEG"),
        "progressive JPEG": formats.encoded(grey, "JPEG", progressive=True),
        "TIFF": formats.encoded(grey, "TIFF"),
        "LZW TIFF": formats.encoded(grey, "TIFF", compression="tiff_lzw"),
        "BMP": formats.encoded(grey, "BMP"),
        "DICOM": formats.dicom(),
        "RLE DICOM": formats.dicom(syntax=formats.RLE, pixels=formats.fragments(formats.rle_frame(packed))),
        "NIfTI": volume,
        "NIfTI.gz": gzip.compress(volume, mtime=0),
    }  # fmt: skip


@pytest.mark.parametrize("kind", sample_files())
def test_I1_a_cut_file_is_refused_or_complete(kind, tmp_path, record):
    content = sample_files()[kind]
    whole = read_image(inputs.write(tmp_path, content), frame="middle").pixels
    refused = 0
    cuts = np.unique(np.linspace(0, len(content) - 1, CUTS).astype(int))
    for cut in cuts:
        image, error = outcome(inputs.write(tmp_path, content[:cut]), frame="middle")
        if error is None:
            np.testing.assert_array_equal(image.pixels, whole)
        refused += error is not None
    assert refused >= CUTS - 2
    record("I1", len(cuts), len(cuts), f"beginnings of a {kind} file: refused, or all pixels")


def test_I1_a_cut_file_is_never_filled_by_the_source():
    files = sorted((ROOT / "src").rglob("*.py"))
    assert len(files) > 50
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node, "attr", getattr(node, "id", getattr(node, "value", "")))
            assert name != "LOAD_TRUNCATED_IMAGES", path


def test_I1_a_jpeg_that_ends_before_its_pixels_is_refused(tmp_path):
    assert outcome(inputs.write(tmp_path, formats.lying_jpeg(2000, 2000)))[0] is None


# ---- one by one


@of("I5")
def test_I5_a_file_of_another_mode(attack, tmp_path):
    check(attack, tmp_path)


@of("I7")
def test_I7_a_tiny_image_is_read_and_then_too_small(attack, tmp_path):
    image = check(attack, tmp_path)
    with pytest.raises(InputError, match="is too small: .* expected at least 32 on each edge"):
        check_usable(image)
    with pytest.raises(InputError, match="is too small"):
        from_array(image.pixels[0])
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        for intensity in ("full", "percentile"):
            made = to_input(image, Preprocessing(size=64, intensity=intensity))
            assert np.isfinite(made).all()


def test_I7_tiny_images_are_skipped_with_their_reason(model, tmp_path):
    for width, height in ((1, 1), (1, 64), (64, 1), (2, 2), (31, 31), (31, 64), (32, 32), (33, 700)):
        save_array(tmp_path / "in" / f"{width}x{height}.png", grey_array((height, width)))
    summary, lines = scored(model, tmp_path / "in", tmp_path / "out")
    assert {Path(line["file"]).stem for line in lines} == {"32x32", "33x700"}
    assert all("is too small" in reason for _, reason in summary.skipped)
    assert len(summary.skipped) == 6


@posix
@of("I8")
@pytest.mark.timeout(90)
def test_I8_a_bomb(attack, tmp_path):
    check(attack, tmp_path)


MEASURE = """
import sys, tempfile
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from attacks import formats, inputs
from umiad.errors import InputError
from umiad.io import Limits, pool, read_image

def peak():  # megabytes; ru_maxrss would start at that of the process which started this one
    here = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    return int(here) // 1000, (pool.current().peak or 0) // 1_000_000
def read(make):
    with tempfile.TemporaryDirectory() as folder:
        path = make(Path(folder))
        try: read_image(path, limits=Limits(child_seconds=2))
        except InputError: pass

for content in (formats.good_png, formats.dicom, formats.nifti):
    read(lambda folder: inputs.write(folder, content))
before, tried = peak(), 0
for attack in inputs.ATTACKS:
    if (attack.id == "I8" and "scans" not in attack.name) or "dims of" in attack.name:
        read(attack.make)
        tried += 1
print(tried, *(after - first for after, first in zip(peak(), before)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_I8_I9_bombs_take_little_memory_here_and_in_the_child(record):
    command = [sys.executable, "-c", MEASURE, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    tried, here, child = map(int, done.stdout.split())
    assert 0 <= here <= 64
    assert 0 <= child <= 512
    record("I8", tried, tried, f"bombs and lying sizes: {here} MB more here, {child} MB more in the child")


@of("I9")
def test_I9_a_nifti_that_lies(attack, tmp_path):
    check(attack, tmp_path)


@of("I12")
def test_I12_a_dicom_that_lies(attack, tmp_path):
    check(attack, tmp_path)


@posix
@of("I13")
@pytest.mark.timeout(30)
def test_I13_content_decides_and_nothing_hangs(attack, tmp_path):
    check(attack, tmp_path)
    path = next(tmp_path.iterdir())
    assert looks_like_image(path) in (True, False)
    assert kind_of_file(path) in ("", "PNG", "JPEG", "TIFF", "BMP", "DICOM", "NIfTI", "NIfTI.gz", "gzip")


@posix
@of("I14")
def test_I14_a_link(attack, tmp_path):
    check(attack, tmp_path)


@of("I15")
def test_I15_a_name(attack, tmp_path):
    image = check(attack, tmp_path)
    assert os.fsencode(image.name) == os.fsencode(tmp_path) + b"/" + os.listdir(os.fsencode(tmp_path))[0]


@of("I9", "I12", "I13")
def test_every_way_to_open_a_file_gives_one_kind_of_error(attack, tmp_path):
    path = attack.make(tmp_path)
    stack, images, mask = (
        refusal(way, path)
        for way in (read_stack, lambda each: list(read_frames(each)), lambda each: read_mask([each]))
    )
    if attack.expect != inputs.OK:
        assert images == mask == str(path)
    assert {stack, images, mask} <= {str(path), None}


# ---- whole folders


@pytest.fixture
def everything(tmp_path):
    """All attacks but the slow ones in one folder, as a data set; returns it and the number of files."""
    root = tmp_path / "set"
    for number, attack in enumerate(inputs.ATTACKS):
        if attack.id not in ("I8", "I15"):
            own = root / ("normal" if number % 2 else "abnormal") / f"{number:03d}"
            own.mkdir(parents=True)
            attack.make(own)
    grey_png(root / "normal" / "good.png")
    return root


@posix
@pytest.mark.timeout(120)
def test_I13_a_folder_of_everything_ends_with_each_file_scored_or_named(model, everything, tmp_path, record):
    notes = []
    found, stray = list_images([everything], notes=notes)
    assert len(load_data(everything).cases) == len(found)
    summary, lines = scored(model, everything, tmp_path / "out", files=FileOptions(frames="middle"))
    assert len(lines) + len(summary.skipped) == len(found)
    assert str(everything / "normal" / "good.png") in {line["file"] for line in lines}
    assert all(isinstance(reason, str) and reason for _, reason in summary.skipped)
    written = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert written["scored"] == len(lines)
    assert len(written["skipped"]) == len(summary.skipped)
    assert any("a loop" in note for note in notes)
    assert not stray  # all of them have names of images
    record(
        "I13", len(found), len(lines) + len(summary.skipped), "hostile files in one folder: scored, or named"
    )


@posix
def test_I14_ten_thousand_links_terminate(tmp_path):
    folder = tmp_path / "links"
    good = grey_png(folder / "good.png")
    for number in range(10_000):
        os.symlink(good.name if number % 2 else f"{number}.png", folder / f"{number}.png")
    notes = []
    images, _ = list_images([folder], notes=notes)
    assert len(images) == 5001
    assert len(notes) <= 5000


@posix
def test_I14_links_out_of_a_data_set_are_left_out_with_a_note(tmp_path):
    outside = grey_png(tmp_path / "outside" / "secret.png")
    for kind in ("normal", "abnormal"):
        grey_png(tmp_path / "set" / kind / "good.png", seed=len(kind))
    os.symlink(outside, tmp_path / "set" / "normal" / "link.png")
    os.symlink(outside.parent, tmp_path / "set" / "normal" / "folder")
    os.symlink(tmp_path / "set", tmp_path / "set" / "normal" / "up")
    os.link(outside, tmp_path / "set" / "normal" / "hard.png")
    data = load_data(tmp_path / "set")
    assert sorted(case.path.name for case in data.cases) == ["good.png", "good.png", "hard.png"]
    assert any("outside of the folder are not followed: normal/link.png" in note for note in data.notes)
    followed = load_data(tmp_path / "set", files=FileOptions(follow=True))
    assert len(followed.cases) == 4


@posix
def test_I14_depth_200_terminates(tmp_path):
    folder = tmp_path / "deep"
    folder.mkdir()
    grey_png(folder / "top.png")
    here = os.open(folder, os.O_RDONLY)
    try:
        for _ in range(200):  # with names of 30 letters the path is longer than a system call takes
            os.mkdir("d" * 30, dir_fd=here)
            below = os.open("d" * 30, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
    finally:
        os.close(here)
    notes = []
    images, _ = list_images([folder], notes=notes)
    assert [path.name for path in images] == ["top.png"]
    assert any("deeper than" in note for note in notes)


# ---- I15: names go through everything that is written


class Tags(HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = set(), [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def odd(tmp_path):
    """A flat folder with one image for each odd name."""
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in NAMES:
        inputs.write(folder, formats.good_png, name)
    return folder


@posix
def test_I15_names_make_the_round_trip(model, odd, tmp_path, record):
    wanted = {os.fsencode(odd / os.fsdecode(name)) for name in NAMES}
    assert {os.fsencode(path) for path in list_images([odd])[0]} == wanted
    data = load_data(odd)
    assert len({data.name_of(case) for case in data.cases}) == len(NAMES)
    for case in data.cases:
        data.name_of(case).encode("utf-8")  # what is stored is text
        assert os.fsencode(case_pixels(case).name) == os.fsencode(case.path)
    summary = score_files(model, [odd], tmp_path / "out")
    assert not summary.skipped
    lines = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_bytes().splitlines()]
    assert {os.fsencode(line["file"]) for line in lines} == wanted
    for kind in ("map", "picture"):
        written = {(tmp_path / "out" / line[kind]).resolve() for line in lines}
        assert len(written) == len(NAMES)
        assert all(path.is_file() and path.parent.parent == tmp_path / "out" for path in written)
    assert {path.name for path in tmp_path.iterdir()} == {"odd", "out"}
    record("I15", len(NAMES), len(lines), "names that come back byte for byte from scores.jsonl")


@posix
def test_I15_names_do_nothing_in_the_page(model, odd, tmp_path, record):
    for name in NAMES[::2]:
        inputs.write(odd, b"damaged", name)
    score_files(model, [odd], tmp_path / "out", outputs=Outputs(maps="none"))
    page = (tmp_path / "out" / "report.html").read_bytes().decode("utf-8")
    assert POLICY in page.replace("&#x27;", "'")
    found = Tags(page)
    assert not found.tags & {"script", "svg", "a", "iframe", "link", "object", "form", "base"}
    assert not [name for name, _ in found.attributes if name.startswith("on") or name in ("href", "srcdoc")]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", page)
    assert "<img src=x onerror=alert(1)>.png" in found.text
    assert "=cmd|' !A0.png" in found.text
    record("I15", len(NAMES), len(NAMES), "names that do nothing in report.html")


@posix
def test_I15_names_are_told_apart_from_options(model, tmp_path):
    grey_png(tmp_path / "-rf.png")
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        summary = score_files(model, ["-rf.png"], tmp_path / "out", outputs=BARE)
    finally:
        os.chdir(here)
    assert [finding.name for finding in summary.findings] == ["-rf.png"]


# ---- I16: what happens to a file while it is read


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_I16_a_file_without_permission(model, tmp_path):
    path = grey_png(tmp_path / "in" / "a.png")
    grey_png(tmp_path / "in" / "b.png")
    path.chmod(0)
    summary, lines = scored(model, tmp_path / "in", tmp_path / "out")
    assert len(lines) == 1
    assert "no permission" in summary.skipped[0][1]


def fault(monkeypatch, path, kind):
    """Make something happen to `path` when it is opened or read."""
    truth = os.open

    def opened(name, *arguments, **options):
        if os.fspath(name) != str(path):
            return truth(name, *arguments, **options)
        if kind == "vanishes":
            path.unlink()
        if kind == "is replaced by a pipe":
            path.unlink()
            os.mkfifo(path)
        if kind == "has an error":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if kind == "loses its permission":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        handle = truth(name, *arguments, **options)
        if kind == "shrinks":
            os.truncate(path, 100)
        if kind == "grows":
            with path.open("ab") as file:
                file.write(bytes(100))
        return handle

    monkeypatch.setattr(os, "open", opened)


FAULTS = {
    "vanishes": "no such file",
    "is replaced by a pipe": "special file",
    "has an error": "cannot be read: Input/output error",
    "loses its permission": "no permission",
    "shrinks": "PNG|changed",
    "grows": inputs.OK,
}


@posix
@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", FAULTS)
def test_I16_a_file_that_changes_at_the_last_moment(kind, model, tmp_path, monkeypatch):
    for number in range(3):
        grey_png(tmp_path / "in" / f"{number}.png", seed=number)
    path = tmp_path / "in" / "1.png"
    fault(monkeypatch, path, kind)
    summary, lines = scored(model, tmp_path / "in", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "summary.json").read_text())
    expected = FAULTS[kind]
    assert len(lines) == written["scored"] == (3 if expected == inputs.OK else 2)
    assert [each["file"] for each in written["skipped"]] == ([] if expected == inputs.OK else [str(path)])
    assert all(re.search(expected, each["reason"]) for each in written["skipped"])
    assert len(written["skipped"]) == len(summary.skipped)


@pytest.mark.parametrize("grown", [1, -1])
def test_I16_a_file_that_changes_while_it_is_read(grown, tmp_path, monkeypatch):
    path, truth = grey_png(tmp_path / "a.png"), os.fstat

    def stat(handle):
        found = list(truth(handle))
        found[6] += grown
        return os.stat_result(found)

    monkeypatch.setattr(os, "fstat", stat)
    with pytest.raises(InputError, match="changed while it was read"):
        read_image(path)


# ---- I17: masks


def masked(tmp_path, *masks, size=(64, 64)):
    return case_masks(Case(tmp_path / "a.png", label=1, masks=tuple(masks)), size)


@pytest.mark.parametrize("size", [(64, 63), (63, 64), (32, 32), (65, 65), (1, 1)])
def test_I17_a_mask_of_another_size_is_refused_even_by_one_pixel(size, tmp_path):
    with pytest.raises(InputError, match="expected 64 x 64 as its image"):
        masked(tmp_path, mask_png(tmp_path / "m.png", size))


def test_I17_absent_and_empty_masks_are_empty(tmp_path):
    assert not masked(tmp_path).any()
    assert not masked(tmp_path, mask_png(tmp_path / "m.png")).any()


@pytest.mark.parametrize(
    ("values", "white"),
    [
        ((0, 255), 255),
        ((0, 127, 255), 255),
        ((0, 1, 127, 128, 254), 128),
        ((0, 30, 200), 200),
        ((0, 26), 255),
    ],
)
def test_I17_soft_masks_are_cut_above_127(values, white, tmp_path):
    soft = np.resize(np.array(values, np.uint8), (64, 64))
    np.testing.assert_array_equal(masked(tmp_path, save_array(tmp_path / "m.png", soft)), soft >= white)


def test_I17_label_numbers_are_refused(tmp_path):
    path = save_array(tmp_path / "m.png", np.eye(64, dtype=np.uint8))
    with pytest.raises(InputError, match="not as a label number"):
        masked(tmp_path, path)


def test_I17_colour_counts_by_its_brightest_channel(tmp_path):
    colour = np.zeros((64, 64, 3), np.uint8)
    colour[3, 4], colour[5, 6] = (255, 0, 0), (100, 100, 100)
    assert np.argwhere(masked(tmp_path, save_array(tmp_path / "m.png", colour))).tolist() == [[3, 4]]


def test_I17_two_masks_of_one_image_are_united(tmp_path):
    for kind in ("normal", "abnormal"):
        grey_png(tmp_path / kind / "a.png", seed=len(kind))
    mask_png(tmp_path / "abnormal" / "a_mask.png", box=(0, 0, 8, 8))
    mask_png(tmp_path / "abnormal" / "a_mask_1.png", box=(4, 4, 12, 12))
    [case] = [each for each in load_data(tmp_path).cases if each.label == 1]
    assert case_masks(case, (64, 64)).sum() == 2 * 64 - 16


# ---- I18: duplicates


@pytest.mark.parametrize("encoding", ["copied", "as PNG again", "as TIFF"])
def test_I18_images_in_train_and_test_are_found_in_pairs(encoding, tmp_path, record):
    for number in range(6):
        grey_png(tmp_path / "train" / "good" / f"{number}.png", seed=number)
        grey_png(tmp_path / "test" / "bad" / f"{number}.png", seed=100 + number)
    for number in range(3):
        source = tmp_path / "train" / "good" / f"{number}.png"
        target = tmp_path / "test" / "good" / f"copy{number}.png"
        target.parent.mkdir(exist_ok=True)
        if encoding == "copied":
            shutil.copyfile(source, target)
        else:
            picture, kind = PIL.Image.open(source), "PNG" if encoding == "as PNG again" else "TIFF"
            picture.save(target, kind, **({"compress_level": 1} if kind == "PNG" else {}))
            assert target.read_bytes() != source.read_bytes()
            assert fingerprint(Case(target)).pixels == fingerprint(Case(source)).pixels
    data = load_data(tmp_path)
    found = survey(data, fingerprints(data.cases), seed=0, holdout=0.2)
    [error] = [
        each for each in found.problems if "of equal images in the train and the test part" in each.text
    ]
    assert error.level == "error"
    pairs = sum(f"test/good/copy{k}.png = train/good/{k}.png" in error.files for k in range(3))
    record("I18", 3, pairs, f"images in train and test, {encoding}, that are found")


def test_I18_a_class_without_images_and_a_set_of_one(tmp_path):
    root = tiny_set(tmp_path / "set", n_normal=1, n_abnormal=1)
    assert len(load_data(root).cases) == 2
    shutil.rmtree(root / "normal")
    (root / "normal").mkdir()
    assert all(case.label == 1 for case in load_data(root).cases)
