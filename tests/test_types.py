import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest

from umiad.types import Case, FileOptions, Finding, Image, Reading, Region


def finding():
    return Finding(
        "a.png", 1.5, np.zeros((4, 6), np.float32), 0.25, True, 1.0, (Region((1, 2, 3, 4), 4, 2.0),)
    )


def test_a_finding_is_one_json_object_without_its_map():
    record = json.loads(json.dumps(finding().to_json(), allow_nan=False))
    assert (record["height"], record["width"]) == (4, 6)
    assert record["regions"] == [{"box": [1, 2, 3, 4], "area": 4, "area_mm2": None, "peak": 2.0}]
    assert record["reason"] is None


def test_values_are_frozen():
    with pytest.raises(FrozenInstanceError):
        finding().image_score = 0.0


def test_cases_are_compared_by_what_they_stand_for_not_by_their_pixels():
    image = Image(np.zeros((1, 4, 5), np.float32), "a")
    assert Case(Path("a"), 0, image=image) == Case(Path("a"), 0)
    assert len({Case(Path("a"), 0, image=image), Case(Path("a"), 0)}) == 1
    assert image.size == (4, 5)
    assert Case(Path("x/a.png")).name == str(Path("x/a.png"))


def test_areas_are_in_square_millimetres_where_the_spacing_is_known():
    record = replace(finding(), spacing=(0.5, 0.25), frame=7).to_json()
    assert record["regions"][0]["area_mm2"] == 4 * 0.5 * 0.25
    assert (record["frame"], record["spacing_mm"]) == (7, [0.5, 0.25])


def test_a_case_is_named_by_its_alias_and_its_frame():
    assert Case(Path("a/DOE_JANE.dcm"), alias="dicom-0123", frame=3).name == "dicom-0123#3"
    assert Case(Path("a/b.png")).name == "a/b.png"


def test_file_options_as_words_of_the_command_line():
    assert FileOptions().arguments() == []
    options = FileOptions("40:90", Reading((40.0, 80.0), "coronal", "zero"), follow=True)
    assert options.arguments() == [
        *("--frame", "40:90", "--window", "40,80", "--axis", "coronal", "--nan", "zero", "--follow"),
    ]
