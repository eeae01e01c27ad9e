import numpy as np
import pytest

from make import grey_png
from umiad.errors import InputError
from umiad.inputs import iter_images
from umiad.types import Image


def test_a_sequence_of_mixed_forms_gives_images_in_order(tmp_path):
    path = tmp_path / "scan.png"
    grey_png(path, size=(40, 50))
    stack = np.zeros((2, 64, 48), np.uint8)
    image = Image(np.zeros((1, 33, 34), np.float32), "held")
    found = list(iter_images([path, stack, image, str(path)]))
    assert [each.size for each in found] == [(40, 50), (64, 48), (64, 48), (33, 34), (40, 50)]
    assert found[2].name == "array[1][1]"


@pytest.mark.parametrize("bad", [None, 3.5, [None], [[{}]], {"path": "x"}])
def test_anything_else_names_its_place_and_kind(bad):
    with pytest.raises(InputError, match="expected a path, a NumPy array or a sequence"):
        list(iter_images(bad))


def test_small_files_and_arrays_are_refused_alike(tmp_path):
    grey_png(tmp_path / "tiny.png", size=(16, 64))
    for tiny in (tmp_path / "tiny.png", np.zeros((16, 64), np.uint8)):
        with pytest.raises(InputError, match="too small"):
            list(iter_images(tiny))
