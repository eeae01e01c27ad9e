from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from make import grey_array
from umiad.config import Preprocessing
from umiad.errors import InputError
from umiad.preprocess import (
    check_usable,
    from_array,
    luminance,
    original_size,
    resize_map,
    resize_mask,
    to_input,
)
from umiad.types import Image

EXACT = 1e-6  # float32 rounding of values in 0..1
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def grey(size: tuple[int, int] = (40, 50), seed: int = 0) -> np.ndarray:
    return (grey_array(size, seed) / np.float32(255)).astype(np.float32)[None]


def plain(pixels: np.ndarray, **options: object) -> np.ndarray:
    """The network's input before normalisation."""
    return to_input(Image(pixels, "a"), Preprocessing(**{"size": 64, **PLAIN, **options}))


def test_luminance_weights_and_range() -> None:
    primaries = np.eye(3, dtype=np.float32).reshape(3, 1, 3)
    np.testing.assert_allclose(luminance(primaries)[0, 0], [0.299, 0.587, 0.114], atol=EXACT)
    assert luminance(np.ones((3, 2, 2), np.float32)).max() == 1.0


def test_luminance_of_grey_stored_in_colour_is_bit_equal_to_grey() -> None:
    pixels = grey()
    np.testing.assert_array_equal(luminance(np.repeat(pixels, 3, axis=0)), pixels)
    np.testing.assert_array_equal(luminance(pixels), pixels)


def test_input_has_three_normalised_channels() -> None:
    preprocessing = Preprocessing(size=64)
    result = to_input(Image(np.full((1, 40, 50), 0.5, np.float32), "a"), preprocessing)
    assert result.shape == (3, 64, 64)
    assert result.dtype == np.float32
    expected = (0.5 - np.array(preprocessing.mean)) / np.array(preprocessing.std)
    np.testing.assert_allclose(result[:, 10, 20], expected, atol=1e-5)  # divided by 0.22, so 5 x EXACT


def test_grey_and_rgb() -> None:
    pixels = np.stack([np.full((40, 50), value, np.float32) for value in (1.0, 0.5, 0.0)])
    np.testing.assert_allclose(plain(pixels, colour="rgb")[:, 0, 0], [1.0, 0.5, 0.0], atol=EXACT)
    np.testing.assert_allclose(plain(pixels, colour="grey")[:, 0, 0], [0.299 + 0.2935] * 3, atol=EXACT)
    np.testing.assert_array_equal(plain(grey(), colour="rgb"), plain(grey(), colour="grey"))


def test_stretched_to_a_square_without_rounding_to_8_bits() -> None:
    ramp = np.linspace(0.0, 0.001, 256, dtype=np.float32)[None, None].repeat(40, axis=1)
    result = plain(ramp, size=256)
    assert result.shape == (3, 256, 256)
    np.testing.assert_allclose(result[0, 7], ramp[0, 0], atol=1e-8)
    assert len(np.unique(result)) > 200


def test_shrinking_averages() -> None:
    checkers = (np.indices((512, 512)).sum(axis=0) % 2).astype(np.float32)[None]
    # away from the border the triangle filter weighs both colours alike
    np.testing.assert_allclose(plain(checkers)[:, 2:-2, 2:-2], 0.5, atol=0.01)


def test_percentiles_stretch_a_dark_image_and_clip() -> None:
    pixels = grey() * np.float32(0.05)
    result = plain(pixels, intensity="percentile")
    assert result.min() < 0.1
    assert result.max() > 0.9
    assert result.min() >= 0
    assert result.max() <= 1
    np.testing.assert_allclose(result, plain(grey(), intensity="percentile"), atol=1e-4)  # 1e-6 / 0.05


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("intensity", ["full", "percentile"])
def test_constant_images_stay_constant(value: float, intensity: str) -> None:
    result = plain(np.full((1, 40, 50), value, np.float32), intensity=intensity)
    np.testing.assert_allclose(result, value, atol=EXACT)


def test_inputs_are_not_changed_and_not_shared() -> None:
    pixels = grey((64, 64))
    before = pixels.copy()
    to_input(Image(pixels, "a"), Preprocessing(size=64, intensity="percentile"))[:] = 9
    plain(pixels)[:] = 9
    np.testing.assert_array_equal(pixels, before)


@pytest.mark.parametrize("size", [(31, 40), (40, 31), (1, 1), (1, 500)])
def test_small_images_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=rf"too small: {size[0]} x {size[1]} pixels .* at least 32"):
        check_usable(Image(np.zeros((1, *size), np.float32), "a"))
    with pytest.raises(InputError, match="too small"):
        from_array(np.zeros(size, np.uint8))
    check_usable(Image(np.zeros((1, 32, 32), np.float32), "a"))


@pytest.mark.parametrize(
    ("dtype", "white"),
    [("uint8", 255), ("uint16", 65535), (">u2", 65535), ("float16", 1), ("float32", 1), ("float64", 1)],
)
def test_array_types_and_their_white(dtype: str, white: int) -> None:
    array = np.zeros((32, 33), dtype=dtype)
    array[3, 4] = white
    [image] = from_array(array)
    assert (image.name, image.size, image.pixels.dtype) == ("array", (32, 33), np.float32)
    assert image.pixels[0, 3, 4] == 1.0
    assert image.pixels.sum() == 1.0
    assert image.bits == np.dtype(dtype).itemsize * 8


def test_array_with_channels() -> None:
    array = np.full((32, 40, 4), 100, np.uint8)
    array[..., 3] = 255
    opaque, colour, one = (from_array(part)[0] for part in (array, array[..., :3], array[..., :1]))
    assert opaque.notes == ()
    np.testing.assert_array_equal(opaque.pixels, colour.pixels)
    assert colour.pixels.shape == (3, 32, 40)
    assert one.pixels.shape == (1, 32, 40)
    assert (opaque.mode, colour.mode, one.mode) == ("RGBA", "RGB", "L")


def test_array_with_transparency_lies_on_black_with_a_note() -> None:
    array = np.full((32, 40, 4), 0.5, np.float32)
    [image] = from_array(array)
    np.testing.assert_allclose(image.pixels, 0.25, atol=EXACT)
    assert image.notes == ("transparent pixels were composited on black",)


def test_stack_of_arrays_names_each_image() -> None:
    stack = np.stack([grey_array((32, 40), seed) for seed in range(4)])
    images = from_array(stack, name="volume")
    assert [image.name for image in images] == [f"volume[{index}]" for index in range(4)]
    np.testing.assert_allclose(images[2].pixels[0], stack[2] / 255, atol=EXACT)


def test_images_do_not_share_memory_with_the_array() -> None:
    array = np.zeros((32, 32), np.float32)
    [image] = from_array(array)
    array[:] = 1
    assert image.pixels.max() == 0


@pytest.mark.parametrize("dtype", ["int16", "int64", "uint32", "bool", "complex64", "U3", "longdouble"])
def test_other_array_types_are_refused(dtype: str) -> None:
    with pytest.raises(InputError, match=r"has type .*, expected uint8"):
        from_array(np.zeros((32, 32), dtype=dtype))


@pytest.mark.parametrize("worst", [np.nan, np.inf, -np.inf])
def test_arrays_with_values_that_are_not_finite_are_refused(worst: float) -> None:
    array = np.zeros((32, 32))
    array[0, 0] = worst
    with pytest.raises(InputError, match="NaN or infinity"):
        from_array(array, name="mine")


@pytest.mark.parametrize("worst", [255.0, -0.001, 1.001])
def test_float_arrays_out_of_range_are_refused(worst: float) -> None:
    array = np.zeros((32, 32))
    array[0, 0] = worst
    with pytest.raises(InputError, match=r"mine: holds values .* expected 0\.\.1 for type float64"):
        from_array(array, name="mine")


@pytest.mark.parametrize("shape", [(), (32,), (0, 32, 32), (2, 32, 32, 3), (1, 1, 1, 1, 1)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"has shape .* expected \[H,W\], \[H,W,C\]"):
        from_array(np.zeros(shape, np.uint8))


def test_empty_float_array_is_refused() -> None:
    with pytest.raises(InputError, match="too small"):
        from_array(np.zeros((0, 32)))


def test_resize_map_of_equal_size_is_the_same() -> None:
    values = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    np.testing.assert_array_equal(resize_map(values, (16, 24)), values)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    source=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_resize_map_stays_in_the_range_of_its_input(
    seed: int, source: tuple[int, int], size: tuple[int, int], scale: float
) -> None:
    values = (np.random.default_rng(seed).normal(size=source) * scale).astype(np.float32)
    resized = resize_map(values, size)
    assert resized.shape == size
    assert resized.dtype == np.float32
    assert resized.min() >= values.min()
    assert resized.max() <= values.max()


@settings(max_examples=60)
@given(st.data())
def test_resize_map_enlarges_as_pillow_does(data: st.DataObject) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=12))
    values = data.draw(hnp.arrays(np.float32, shape, elements=st.floats(-100, 100, width=32)))
    size = (data.draw(st.integers(shape[0], 40)), data.draw(st.integers(shape[1], 40)))
    expected = PIL.Image.fromarray(values).resize(size[::-1], PIL.Image.Resampling.BILINEAR)
    found = resize_map(values, size)
    assert found.flags.c_contiguous
    rounding = 4 * np.finfo(np.float32).eps * np.abs(values).max()
    np.testing.assert_allclose(found, np.asarray(expected), rtol=0, atol=rounding)


def test_resize_map_is_linear_between_cells() -> None:
    values = np.arange(4, dtype=np.float32)[None].repeat(2, axis=0)
    # cell centres lie at 0.5, 1.5, ... cells: eight pixels are spaced by half a cell
    expected = [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    np.testing.assert_allclose(resize_map(values, (2, 8))[0], expected, atol=EXACT)


def test_resize_mask_is_nearest() -> None:
    mask = np.array([[True, False], [False, True]])
    expected = np.kron(mask, np.ones((3, 3), dtype=bool))
    resized = resize_mask(mask, (6, 6))
    assert resized.dtype == bool
    np.testing.assert_array_equal(resized, expected)
    np.testing.assert_array_equal(resize_mask(expected, (2, 2)), mask)
    assert resize_mask(np.zeros((5, 7), dtype=bool), (3, 9)).shape == (3, 9)


def test_equalised_images_hold_no_detail_finer_than_the_edge() -> None:
    rng = np.random.default_rng(0)
    fine = Image(rng.random((1, 256, 320), dtype=np.float32), "fine")
    preprocessing = Preprocessing(size=128, equalise=32)
    network = to_input(fine, preprocessing)[0] * 0.229 + 0.485
    means = np.asarray(PIL.Image.fromarray(fine.pixels[0]).resize((32, 32), PIL.Image.Resampling.BOX))
    expected = np.asarray(PIL.Image.fromarray(means).resize((128, 128), PIL.Image.Resampling.BICUBIC))
    np.testing.assert_allclose(network, np.clip(expected, 0, 1), atol=1e-5)  # float32
    plain = to_input(fine, Preprocessing(size=128))[0]
    assert np.abs(np.diff(network)).mean() < 0.5 * np.abs(np.diff(plain)).mean() * 0.229


def test_equalising_hides_the_size_of_the_file() -> None:
    image = Image(np.zeros((1, 200, 300), dtype=np.float32), "wide")
    assert original_size(image, Preprocessing()) == (200, 300)
    assert original_size(image, Preprocessing(equalise=128)) == (128, 128)
