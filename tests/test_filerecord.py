import os
from dataclasses import replace

import numpy as np
import pytest

from umiad.errors import InputError
from umiad.filerecord import FileRecord, ImageRecord, Names, Stored, by_index
from umiad.types import Finding, Region

REGION = Region((1, 2, 3, 4), 4, 0.1 + 0.2)
FINDING = Finding(
    name="x.png",
    image_score=1 / 3,
    anomaly_map=np.zeros((5, 7), np.float32),
    p_value=0.05,
    above_threshold=True,
    threshold=-0.0,
    regions=(REGION,),
    reason="",
    notes=("a note", "µ"),
    frame=None,
    spacing=(0.1, 0.7),
)
UNJUDGED = replace(FINDING, p_value=None, above_threshold=None, threshold=None, regions=(), reason="none")
GOOD = FileRecord(
    3, "a/x.png", images=(ImageRecord.of(FINDING),), map=Stored(".npy", 268), picture=Stored(".png", 9)
)


def volume(name="v.nii.gz"):
    frames = [replace(UNJUDGED, frame=k, image_score=s) for k, s in ((4, 0.5), (5, 0.75), (6, 0.75))]
    images = tuple(map(ImageRecord.of, frames))
    return FileRecord(0, name, frames=9, images=images, map=Stored(".nii", 1), picture=Stored(".png", 2))


@pytest.mark.parametrize("finding", [FINDING, UNJUDGED, replace(FINDING, frame=12, spacing=None)])
def test_a_finding_comes_back_with_the_same_json(finding):
    record = FileRecord(0, "x.png", images=(ImageRecord.of(finding),))
    [image] = FileRecord.from_line(record.to_line(), source="f").images
    expected = replace(finding, name="x.png" if finding.frame is None else "x.png#12")
    assert list(image.finding("x.png").to_json().items()) == list(expected.to_json().items())


@pytest.mark.parametrize(
    "record",
    [
        GOOD,
        volume(),
        FileRecord(7, "dicom-0123", aliased=True, error=("no image", "")),
        replace(GOOD, name="\udce9\n"),
    ],
)
def test_a_record_comes_back_equal_from_its_line(record):
    line = record.to_line()
    assert line.count(b"\n") == 1
    assert FileRecord.from_line(line, source="f") == record


def test_a_cut_or_altered_line_is_no_record():
    line = GOOD.to_line()
    for end in range(len(line)):
        with pytest.raises(InputError):
            FileRecord.from_line(line[:end], source="f")
    for place in range(0, len(line) - 1, 7):
        altered = line[:place] + bytes([line[place] ^ 1]) + line[place + 1 :]
        with pytest.raises(InputError, match="f: holds a"):
            FileRecord.from_line(altered, source="f")


@pytest.mark.parametrize(
    "record",
    [
        FileRecord(0, "x"),
        replace(GOOD, map=Stored("/../../x", 1)),
        replace(GOOD, name=5),
        replace(GOOD, error=("only a reason",)),
    ],
)
def test_a_line_with_a_right_check_but_a_wrong_shape_is_refused(record):
    with pytest.raises(InputError, match="damaged line"):
        FileRecord.from_line(record.to_line(), source="f")


def test_outputs_are_named_by_the_stem_and_the_highest_frame():
    assert GOOD.named("x-2") == {"map": "maps/x-2.npy", "picture": "pictures/x-2.png"}
    assert volume().named("v") == {"map": "maps/v.nii", "picture": "pictures/v-0005.png"}
    assert replace(GOOD, map=None, picture=None).named("x") == {"map": None, "picture": None}


def test_a_record_is_whole_where_its_outputs_have_their_sizes(tmp_path):
    (tmp_path / "maps").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "maps" / "x.npy").write_bytes(bytes(268))
    assert not GOOD.is_whole(tmp_path, "x")
    (tmp_path / "pictures" / "x.png").write_bytes(bytes(8))
    assert not GOOD.is_whole(tmp_path, "x")
    (tmp_path / "pictures" / "x.png").write_bytes(bytes(9))
    assert GOOD.is_whole(tmp_path, "x")
    assert FileRecord(0, "bad.png", error=("no image", "")).is_whole(tmp_path / "nowhere", "")


def test_names_and_stems_are_given_in_order_and_unreadable_files_take_no_stem():
    names, bad = Names(), ("no image", "")
    given = [
        names.of(FileRecord(0, "a/scan.png", error=bad)),
        names.of(replace(GOOD, name="b/Scan.png")),
        names.of(replace(GOOD, name="scan.nii.gz")),
        names.of(replace(GOOD, name="dicom-1", aliased=True)),
        names.of(FileRecord(4, "dicom-1", aliased=True, error=bad)),
        names.of(replace(GOOD, name="dicom-1", aliased=True)),
    ]
    assert given == [
        ("a/scan.png", ""),
        ("b/Scan.png", "Scan"),
        ("scan.nii.gz", "scan-2"),
        ("dicom-1", "dicom-1"),
        ("dicom-1-2", ""),
        ("dicom-1-3", "dicom-1-3"),
    ]
    assert by_index(GOOD) == ("a/x.png", "000003")
    assert len(os.fsencode(names.of(replace(GOOD, name="x" * 250 + ".png"))[1])) == 200
