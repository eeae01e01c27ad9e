import json
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest

from umiad.types import Case, Finding, Image, Region


def finding():
    return Finding(
        "a.png", 1.5, np.zeros((4, 6), np.float32), 0.25, True, 1.0, (Region((1, 2, 3, 4), 4, 2.0),)
    )


def test_a_finding_is_one_json_object_without_its_map():
    record = json.loads(json.dumps(finding().to_json(), allow_nan=False))
    assert (record["height"], record["width"]) == (4, 6)
    assert record["regions"] == [{"box": [1, 2, 3, 4], "area": 4, "peak": 2.0}]
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
