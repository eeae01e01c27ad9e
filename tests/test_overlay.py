from __future__ import annotations

from io import BytesIO

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from make import blob_image, grey_array
from umiad.errors import InputError
from umiad.overlay import ColourScale, colour_scale, draw_image, draw_overlay, png_bytes
from umiad.types import Image, Region

SCALE = colour_scale(1.0, 1.2)
GREEN = np.array([0, 230, 64])


def flat(size: tuple[int, int] = (256, 256), value: float = 0.4, bits: int = 8) -> Image:
    return Image(np.full((1, *size), value, np.float32), "flat", bits=bits)


def panels(picture: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The two panels of a picture whose panels have `width` columns."""
    return picture[:, :width], picture[:, width + 8 : 2 * width + 8]


def is_colour(picture: np.ndarray) -> np.ndarray:
    return np.ptp(picture.astype(int), axis=2) > 3


def has(picture: np.ndarray, colour: object) -> np.ndarray:
    return (picture == np.asarray(colour)).all(axis=2)


def luma(colours: np.ndarray) -> np.ndarray:
    linear = (colours / 255.0) ** 2.2
    return linear @ np.array([0.2126, 0.7152, 0.0722])


# --- the scale -------------------------------------------------------------------------------------------


def test_scale_runs_from_half_to_twice_the_threshold() -> None:
    assert (SCALE.low, SCALE.threshold, SCALE.high) == (0.5, 1.0, 2.0)
    np.testing.assert_allclose(
        SCALE.position(np.array([-5.0, 0.5, 0.75, 1.0, 2.0, 99.0])), [0, 0, 0.25, 0.5, 1, 1]
    )


def test_scale_without_threshold_runs_to_the_reference() -> None:
    scale = colour_scale(None, 4.0)
    np.testing.assert_allclose(scale.position(np.array([-1.0, 0.0, 1.0, 4.0, 9.0])), [0, 0, 0.25, 1, 1])
    assert scale.ticks()[-1][1] == "4 reference"


@settings(max_examples=80, deadline=None)
@given(
    threshold=st.none() | st.floats(-1e6, 1e6, allow_subnormal=False),
    reference=st.floats(-1e6, 1e6, allow_subnormal=False),
)
def test_every_finite_scale_is_usable_and_monotone(threshold: float | None, reference: float) -> None:
    scale = colour_scale(threshold, reference)
    assert scale.low < scale.high
    values = np.linspace(scale.low - 1, scale.high + 1, 101)
    place = scale.position(values)
    assert np.isfinite(place).all()
    assert (np.diff(place) >= 0).all()
    assert (place[0], place[-1]) == (0.0, 1.0)
    if threshold is not None:
        assert scale.position(np.array([threshold]))[0] == 0.5


@pytest.mark.parametrize(("threshold", "reference"), [(np.nan, 1.0), (1.0, np.inf), (None, np.nan)])
def test_scale_of_values_that_are_not_finite_is_refused(threshold: float | None, reference: float) -> None:
    with pytest.raises(InputError, match="expected finite"):
        colour_scale(threshold, reference)


@pytest.mark.parametrize("scale", [SCALE, colour_scale(None, 1.0)])
def test_colours_grow_lighter_and_more_opaque(scale: ColourScale) -> None:
    colour, opacity = scale.colours(np.linspace(0, 1, 65))
    assert colour.dtype == np.uint8
    assert (np.diff(luma(colour)) > 0).all()
    assert opacity[0] == 0
    assert (np.diff(opacity) >= 0).all()
    assert opacity[-1] < 1


def test_hue_changes_from_cold_to_warm_at_the_threshold() -> None:
    (below, above), _ = SCALE.colours(SCALE.position(np.array([0.999, 1.0])))
    assert below[0] < below[1]
    assert below[0] < below[2]
    assert above[0] > above[1]
    assert above[0] > above[2]


# --- the picture -----------------------------------------------------------------------------------------


def test_below_half_the_threshold_the_image_stays_as_it_is() -> None:
    left, right = panels(draw_overlay(flat(), np.full((256, 256), 0.5), scale=SCALE), 256)
    np.testing.assert_array_equal(left, right)
    assert (left == round(0.4 * 255)).all()


def test_same_value_same_colour_whatever_else_is_in_the_image() -> None:
    quiet, loud = np.full((256, 256), 0.3), np.full((256, 256), 0.3)
    quiet[100:120, 100:120] = loud[100:120, 100:120] = 0.9
    loud[200:220, 200:220] = 50.0
    first, second = (draw_overlay(flat(), each, scale=SCALE) for each in (quiet, loud))
    np.testing.assert_array_equal(first[:190], second[:190])
    assert is_colour(panels(first, 256)[1])[110, 110]


def test_segmentation_has_a_white_and_a_black_line() -> None:
    anomaly_map = np.zeros((256, 256))
    anomaly_map[100:140, 60:120] = 1.5
    right = panels(draw_overlay(flat(), anomaly_map, scale=SCALE), 256)[1]
    white, black = has(right, (255, 255, 255)), has(right, (0, 0, 0))
    assert white[100, 60:120].all()
    assert white[100:140, 119].all()
    assert black[99, 59:121].all()
    assert black[99:141, 120].all()
    assert not white[102:138, 62:118].any()


def test_only_given_regions_are_outlined() -> None:
    anomaly_map = np.zeros((256, 256))
    anomaly_map[20:40, 30:60] = anomaly_map[150:170, 100:140] = 1.5
    region = Region((30, 20, 60, 40), 600, 1.5)
    right = panels(draw_overlay(flat(), anomaly_map, scale=SCALE, regions=[region]), 256)[1]
    white = has(right, (255, 255, 255))
    assert white[20, 30:60].all()
    assert not white[140:180, 90:150].any()


def test_without_threshold_nothing_is_outlined() -> None:
    right = panels(draw_overlay(flat(), np.full((256, 256), 5.0), scale=colour_scale(None, 1.0)), 256)[1]
    assert len(np.unique(right.reshape(-1, 3), axis=0)) == 1


def test_mask_is_a_dashed_green_line_in_both_panels() -> None:
    mask = np.zeros((256, 256), dtype=bool)
    mask[50:150, 80:180] = True
    for panel in panels(draw_overlay(flat(), np.zeros((256, 256)), scale=SCALE, mask=mask), 256):
        green = has(panel, GREEN)
        assert 0.4 < green[50, 80:180].mean() < 0.9
        assert not green[52:148, 82:178].any()
        assert not green[~mask].any()


def test_empty_mask_draws_nothing() -> None:
    empty = np.zeros((64, 64), dtype=bool)
    image = blob_image(64)
    plain = draw_overlay(image, np.zeros((64, 64)), scale=SCALE)
    np.testing.assert_array_equal(draw_overlay(image, np.zeros((64, 64)), scale=SCALE, mask=empty), plain)


@pytest.mark.parametrize(
    ("size", "panel"),
    [
        ((64, 64), (256, 256)),
        ((300, 200), (300, 200)),
        ((2048, 1024), (1024, 512)),
        ((32, 320), (102, 1024)),
        ((1, 5000), (1, 1024)),
    ],
)
def test_small_images_are_enlarged_and_large_ones_shrunk(
    size: tuple[int, int], panel: tuple[int, int]
) -> None:
    picture = draw_overlay(flat(size), np.zeros(size), scale=SCALE)
    assert picture.dtype == np.uint8
    assert picture.shape[0] == max(panel[0], 128)
    assert 2 * panel[1] + 30 < picture.shape[1] < 2 * panel[1] + 200
    assert (picture[: panel[0], : panel[1]] == round(0.4 * 255)).all()


def test_a_single_hot_pixel_of_a_large_image_is_outlined() -> None:
    anomaly_map = np.zeros((2048, 2048))
    anomaly_map[1000, 1000] = 3.0
    right = panels(draw_overlay(flat((2048, 2048)), anomaly_map, scale=SCALE), 1024)[1]
    assert has(right, (255, 255, 255))[495:505, 495:505].any()


def test_colour_images_are_shown_in_grey_and_deep_ones_windowed() -> None:
    colour = Image(np.random.default_rng(0).random((3, 256, 256), dtype=np.float32), "colour")
    assert not is_colour(panels(draw_overlay(colour, np.zeros((256, 256)), scale=SCALE), 256)[0]).any()
    dark = Image(grey_array((256, 256)).astype(np.float32)[None] / 65535, "dark", "I;16", 16)
    left = panels(draw_overlay(dark, np.zeros((256, 256)), scale=SCALE), 256)[0]
    assert left.min() == 0
    assert left.max() == 255
    constant = draw_overlay(flat(bits=16), np.zeros((256, 256)), scale=SCALE)
    assert (constant[:, :256] == round(0.4 * 255)).all()


def test_bar_depends_on_the_scale_only() -> None:
    rng = np.random.default_rng(0)
    bars = [
        draw_overlay(blob_image(64, seed=seed), rng.random((64, 64)) * seed, scale=SCALE)[:, 2 * (256 + 8) :]
        for seed in (1, 5)
    ]
    np.testing.assert_array_equal(*bars)
    other = draw_overlay(blob_image(64), np.zeros((64, 64)), scale=colour_scale(3.21, 4))[:, 2 * (256 + 8) :]
    assert not np.array_equal(bars[0], other)
    assert [label for _, label in SCALE.ticks()] == ["0.5", "1 threshold", "2"]


def test_the_image_and_the_overlay_can_be_drawn_apart() -> None:
    image, mask = blob_image(300, blob=True), np.zeros((300, 300), bool)
    mask[100:140, 60:90] = True
    anomaly_map = np.linspace(0, 2, 300 * 300, dtype=np.float32).reshape(300, 300)
    both = draw_overlay(image, anomaly_map, scale=SCALE, mask=mask)
    left, right = panels(both, 300)
    assert np.array_equal(draw_image(image, mask=mask), left)
    assert has(draw_image(image, mask=mask), GREEN).any()
    assert not has(draw_image(image), GREEN).any()
    alone = draw_overlay(image, anomaly_map, scale=SCALE, mask=mask, beside=False)
    assert np.array_equal(alone[:, :300], right)
    assert np.array_equal(alone, both[:, 308:])
    with pytest.raises(InputError, match="mask"):
        draw_image(image, mask=mask[1:])


def test_inputs_stay_unchanged() -> None:
    image, anomaly_map, mask = blob_image(64), np.full((64, 64), 1.5), np.ones((64, 64), dtype=bool)
    before = image.pixels.copy(), anomaly_map.copy(), mask.copy()
    draw_overlay(image, anomaly_map, scale=SCALE, mask=mask)
    for found, expected in zip((image.pixels, anomaly_map, mask), before, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_map_or_mask_of_another_size_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"anomaly map has shape \[32, 64\], expected the image's \[64, 64\]"
    ):
        draw_overlay(blob_image(64), np.zeros((32, 64)), scale=SCALE)
    with pytest.raises(InputError, match="the mask has shape"):
        draw_overlay(blob_image(64), np.zeros((64, 64)), scale=SCALE, mask=np.zeros((64, 65), dtype=bool))


# --- PNG -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "dtype"), [((5, 7), "uint8"), ((5, 7), "uint16"), ((5, 7, 3), "uint8")])
def test_png_round_trip(shape: tuple[int, ...], dtype: str) -> None:
    array = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)
    with PIL.Image.open(BytesIO(png_bytes(array))) as picture:
        assert picture.format == "PNG"
        np.testing.assert_array_equal(np.asarray(picture), array)


def test_png_of_bool_is_black_and_white() -> None:
    with PIL.Image.open(BytesIO(png_bytes(np.array([[True, False]])))) as picture:
        np.testing.assert_array_equal(np.asarray(picture), [[255, 0]])


@pytest.mark.parametrize(
    ("shape", "dtype"), [((5, 7), "float32"), ((5, 7, 4), "uint8"), ((5,), "uint8"), ((0, 5), "uint8")]
)
def test_png_of_another_shape_or_type_is_refused(shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(InputError, match=r"expected \[H,W\]"):
        png_bytes(np.zeros(shape, dtype=dtype))
