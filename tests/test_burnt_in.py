"""Text and marks in the pixels: found where they are, not where anatomy is."""

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umiad.burnt_in import BurntIn, find_burnt_in
from umiad.phantoms import draw_phantom


def written(text, at=(20, 30), size=18, edge=256, background=None, ink=255):
    """A grey image with `text` drawn on it."""
    grey = np.zeros((edge, edge), np.uint8) if background is None else (background * 255).astype(np.uint8)
    picture = PIL.Image.fromarray(grey)
    PIL.ImageDraw.Draw(picture).text(at, text, fill=ink, font=PIL.ImageFont.load_default(size))
    return np.asarray(picture, np.float32) / 255


def normal(seed, edge=256):
    return draw_phantom(np.random.default_rng(seed), size=edge, lesions=0)[0]


@pytest.mark.parametrize("size", [12, 18, 28])
@pytest.mark.parametrize("text", ["RIGHT BREAST", "LT AXILLA 34"])
def test_a_line_of_text_is_found_on_black_and_on_anatomy(text, size):
    assert find_burnt_in(written(text, size=size)).characters >= 4
    dim = np.clip(normal(0) * 0.4, 0, 1)
    assert find_burnt_in(written(text, size=size, background=dim)).characters >= 4


def test_a_single_letter_counts_where_nothing_is_around_it():
    assert find_burnt_in(written("R", size=24)) == BurntIn(0, 1)
    on_grey = np.full((256, 256), 0.3)
    assert find_burnt_in(written("R", size=24, background=on_grey)).count == 0


@pytest.mark.parametrize("seed", range(20))
def test_phantoms_hold_no_text(seed):
    assert find_burnt_in(normal(seed)).count == 0


def test_noise_and_flat_images_hold_no_text():
    rng = np.random.default_rng(0)
    for image in (np.zeros((64, 64)), np.ones((64, 64)), rng.random((256, 256)), rng.random((40, 1))):
        assert find_burnt_in(image.astype(np.float32)).count == 0


def test_large_images_are_reduced_first():
    big = np.kron(written("RIGHT BREAST", size=18), np.ones((5, 5), np.float32))
    assert find_burnt_in(big).characters >= 4


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 80), width=st.integers(1, 80), seed=st.integers(0, 99))
def test_any_shape_is_taken_and_the_answer_is_always_the_same(height, width, seed):
    image = np.random.default_rng(seed).random((height, width), dtype=np.float32)
    assert find_burnt_in(image) == find_burnt_in(image)
