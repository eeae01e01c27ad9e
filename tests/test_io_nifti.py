from __future__ import annotations

import gzip
import itertools
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umiad.errors import InputError
from umiad.io import nifti
from umiad.io.nifti import open_nifti, open_nifti_mask, volume_bytes
from umiad.io.source import Limits, Source
from umiad.types import Geometry, Image, Stack

CORPORA = Path(__file__).resolve().parents[2] / "shared" / "corpora" / "nifti"
MIB = 1 << 20
AXES = ("axial", "coronal", "sagittal")
RAS = np.diag([1.0, 1.0, 1.0, 1.0])
EXACT = 1e-6  # float32 rounding of values in 0..1
ORIENTATIONS = list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))
TEXTS = ("descrip", "aux_file", "intent_name")


def nii(array: np.ndarray, affine: np.ndarray = RAS, *, version: int = 1, **fields: object) -> bytes:
    """A .nii file of an array in the file's own axes, values stored as they are; `fields` of the header."""
    kind = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
    image = kind(array, affine, dtype=array.dtype)
    image.header.set_slope_inter(1, 0)
    return patched(image.to_bytes(), **fields)


def patched(content: bytes, **fields: object) -> bytes:
    """The same file with fields of its header overwritten, sensible or not."""
    kind = nibabel.Nifti1Header if content[0] == 348 % 256 else nibabel.Nifti2Header
    header = kind(content[: kind.sizeof_hdr], check=False)
    for field, value in fields.items():
        header[field] = value
    return header.binaryblock + content[kind.sizeof_hdr :]


def source(kind: str = "NIfTI", **options: object) -> Source:
    return Source("scan.nii", kind, **options)  # type: ignore[arg-type]


def pixels(stack: Stack) -> np.ndarray:
    """All slices, [N,H,W]."""
    return np.stack([stack.frame(number).pixels[0] for number in range(stack.count)])


def notes(stack: Stack) -> str:
    return "; ".join(stack.frame(0).notes)


def scan(shape: tuple[int, ...] = (5, 6, 7), dtype: object = np.int16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)


def in_ras(
    array: np.ndarray, order: tuple[int, ...], signs: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Store an array given in RAS+ so that the file's axis j runs along RAS axis order[j] with sign signs[j]."""
    affine = np.zeros((4, 4))
    affine[:, 3] = (10, -20, 30, 1)
    stored = array.transpose(order)
    for own, (anatomical, sign) in enumerate(zip(order, signs, strict=True)):
        affine[anatomical, own] = sign * (2.0, 3.0, 4.0)[anatomical]
        stored = stored if sign > 0 else np.flip(stored, own)
    return stored, affine


def refused(content: bytes, reason: str | None, kind: str = "NIfTI", **options: object) -> InputError:
    with pytest.raises(InputError, match=reason) as caught:
        open_nifti(content, source(kind, **options))
    assert caught.value.path == "scan.nii"
    return caught.value


# --- orientation -----------------------------------------------------------------------------------------


def test_golden_slices_of_each_axis() -> None:
    array = np.arange(8, dtype=np.uint8).reshape(
        2, 2, 2
    )  # x, y, z: value = 4 right + 2 anterior + 1 superior
    golden = {
        "axial": [[[6, 2], [4, 0]], [[7, 3], [5, 1]]],  # anterior above, right at the left edge
        "coronal": [[[5, 1], [4, 0]], [[7, 3], [6, 2]]],  # superior above, right at the left edge
        "sagittal": [[[3, 1], [2, 0]], [[7, 5], [6, 4]]],  # superior above, anterior at the left edge
    }
    for axis, expected in golden.items():
        stack = open_nifti(nii(array), source(axis=axis))
        np.testing.assert_array_equal(pixels(stack) * 255, expected)
        assert (stack.count, stack.single) == (2, False)


@pytest.mark.parametrize("axis", AXES)
def test_all_48_orientations_look_alike_and_come_back(axis: str) -> None:
    array = scan((3, 4, 5), np.uint8)
    upright, affine = in_ras(array, (0, 1, 2), (1, 1, 1))
    expected = open_nifti(nii(upright, affine), source(axis=axis))
    along = AXES[::-1].index(axis)
    sizes = {"axial": (3.0, 2.0), "coronal": (4.0, 2.0), "sagittal": (4.0, 3.0)}
    assert expected.count == array.shape[along]
    for order, signs in ORIENTATIONS:
        stored, affine = in_ras(array, order, signs)
        stack = open_nifti(nii(stored, affine), source(axis=axis))
        np.testing.assert_array_equal(pixels(stack), pixels(expected))
        assert stack.frame(0).spacing == sizes[axis]
        assert stack.geometry is not None
        back = nibabel.Nifti1Image.from_bytes(volume_bytes(pixels(stack) * 255, stack.geometry))
        np.testing.assert_array_equal(np.asarray(back.dataobj), stored)
        np.testing.assert_array_equal(back.affine, affine)
        np.testing.assert_allclose(
            back.header.get_qform(coded=True)[0], affine, atol=1e-4
        )  # float32 quaternion
        assert back.header.get_zooms() == tuple(np.array((2, 3, 4))[list(order)])
        assert (back.header["sform_code"], back.header["qform_code"]) == (1, 1)
        assert back.get_data_dtype() == np.float32


@pytest.mark.parametrize("axis", AXES)
def test_slices_lie_where_nibabel_puts_them(axis: str) -> None:
    turn = np.array([[0.94, -0.34, 0.0], [0.34, 0.94, 0.0], [0.0, 0.0, 1.0]])
    affine = RAS.copy()
    affine[:3, :3] = turn @ np.diag([-2.0, 3.0, -1.5])
    array = scan((6, 7, 8), np.uint8)
    closest = np.asarray(nibabel.as_closest_canonical(nibabel.Nifti1Image(array, affine)).dataobj)
    stack = open_nifti(nii(array, affine), source(axis=axis))
    along = AXES[::-1].index(axis)
    for number in range(stack.count):
        expected = np.flip(np.take(closest, number, along)).T
        np.testing.assert_array_equal(stack.frame(number).pixels[0] * 255, expected)


def test_frames_can_be_asked_in_any_order_and_know_their_number() -> None:
    stack = open_nifti(nii(scan()), source())
    first = stack.frame(4)
    np.testing.assert_array_equal(first.pixels, stack.frame(4).pixels)
    assert (first.frame, first.mode, first.bits, first.name) == (4, "NIfTI", 16, "scan.nii")
    assert first.pixels.shape == (1, 6, 5)
    assert first.pixels.dtype == np.float32
    assert first.pixels.flags.c_contiguous
    for number in (7, -1):
        with pytest.raises(InputError, match=f"has no axial slice {number}, expected 0 to 6"):
            stack.frame(number)


def test_map_of_an_oblique_volume_comes_back() -> None:
    angle = 0.3
    affine = RAS.copy()
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine = np.float32(affine * 1.7).astype(np.float64)
    affine[3, 3] = 1
    place = Geometry((3, 4, 5), tuple(affine.flat), "coronal")
    frames = np.random.default_rng(0).random((4, 5, 3), dtype=np.float32)
    content = volume_bytes(list(frames), place)
    back = nibabel.Nifti1Image.from_bytes(content)
    np.testing.assert_array_equal(back.affine, affine)
    assert back.header["qform_code"] == 1
    stack = open_nifti(content, source(axis="coronal", window=(0.5, 1.0)))
    np.testing.assert_allclose(pixels(stack), frames, atol=EXACT)
    assert stack.geometry == place


def test_sheared_axes_have_no_qform() -> None:
    affine = RAS.copy()
    affine[0, 1] = 0.5
    place = Geometry((2, 2, 2), tuple(affine.flat), "axial")
    back = nibabel.Nifti1Image.from_bytes(volume_bytes(np.zeros((2, 2, 2)), place))
    np.testing.assert_array_equal(back.affine, affine)
    assert (back.header["sform_code"], back.header["qform_code"]) == (1, 0)


def test_maps_that_do_not_fit_are_refused() -> None:
    place = Geometry((3, 4, 5), tuple(RAS.flat), "axial")
    with pytest.raises(InputError, match="4 frames, expected 5"):
        volume_bytes(np.zeros((4, 4, 3)), place)
    with pytest.raises(InputError, match="frame 1 has 3 x 4 pixels, expected 4 x 3"):
        volume_bytes([np.zeros((4, 3)), np.zeros((3, 4)), *np.zeros((3, 4, 3))], place)
    with pytest.raises(InputError, match="not invertible"):
        volume_bytes(np.zeros((5, 4, 3)), Geometry((3, 4, 5), (0.0,) * 16, "axial"))
    with pytest.raises(InputError, match="40000 x 1 x 1 voxels, NIfTI-1 holds 1 to 32767"):
        volume_bytes(np.zeros((1, 1, 40000)), Geometry((40000, 1, 1), tuple(RAS.flat), "axial"))


# --- what is read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_versions_byte_orders_and_types(version: int, order: str, kind: str) -> None:
    array = scan()
    image = (nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image)(array, RAS, dtype=kind)
    image = type(image)(array, RAS, image.header.as_byteswapped(order), dtype=kind)
    image.header.set_slope_inter(1, 0)
    content = image.to_bytes()
    assert content[0] == (0 if order == ">" else (348, 540)[version - 1] % 256)
    stack = open_nifti(content, source(window=(50, 100)))
    expected = np.flip(array, (0, 1)).transpose(2, 1, 0) / 100
    np.testing.assert_allclose(pixels(stack), expected, atol=EXACT)
    assert stack.frame(0).bits == 8 * int(kind[1])
    zipped = open_nifti(gzip.compress(content), source("NIfTI.gz", window=(50, 100)))
    np.testing.assert_array_equal(pixels(zipped), pixels(stack))


def test_2_d_files_are_one_slice_and_trailing_ones_are_dropped() -> None:
    flat = scan((5, 6))
    stack = open_nifti(nii(flat), source(window=(50, 100)))
    assert stack.count == 1
    np.testing.assert_allclose(stack.frame(0).pixels[0], np.flip(flat).T / 100, atol=EXACT)
    deep = scan((5, 6, 7, 1, 1))
    stack = open_nifti(nii(deep), source())
    assert stack.count == 7
    assert stack.geometry is not None
    assert stack.geometry.shape == (5, 6, 7)


def test_header_extensions_are_skipped() -> None:
    image = nibabel.Nifti1Image(scan(), RAS)
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Doe^Jane" * 100))
    stack = open_nifti(image.to_bytes(), source())
    np.testing.assert_array_equal(pixels(stack), pixels(open_nifti(nii(scan()), source())))
    assert "Doe" not in notes(stack)


def test_several_gzip_members_are_one_file() -> None:
    content = nii(scan())
    cuts = (0, 100, 100, 400, len(content))
    members = b"".join(gzip.compress(content[a:b]) for a, b in itertools.pairwise(cuts))
    stack = open_nifti(members, source("NIfTI.gz"))
    np.testing.assert_array_equal(pixels(stack), pixels(open_nifti(content, source())))


def test_units_are_converted_to_millimetres() -> None:
    stack = open_nifti(nii(scan(), xyzt_units=3), source())
    assert stack.frame(0).spacing == (0.001, 0.001)
    assert "micrometres" in notes(stack)
    assert stack.geometry is not None
    assert stack.geometry.affine[0] == 0.001


def test_qform_alone_and_no_orientation() -> None:
    content = nii(scan(), np.diag([-2.0, 3.0, 4.0, 1.0]))
    image = nibabel.Nifti1Image.from_bytes(content)
    image.set_sform(None, code=0)
    image.set_qform(np.diag([-2.0, 3.0, 4.0, 1.0]), code=1)
    stack = open_nifti(image.to_bytes(), source(window="percentile"))
    np.testing.assert_array_equal(pixels(stack), pixels(open_nifti(content, source())))
    assert stack.frame(0).spacing == (3.0, 2.0)
    stack = open_nifti(patched(content, sform_code=0, qform_code=0), source())
    assert "left and right may be swapped" in notes(stack)


# --- grey values -----------------------------------------------------------------------------------------


def test_window_of_the_file() -> None:
    content = nii(scan(), cal_min=20, cal_max=60)
    expected = np.clip((np.flip(scan(), (0, 1)).transpose(2, 1, 0) - 20.0) / 40, 0, 1)
    np.testing.assert_allclose(pixels(open_nifti(content, source())), expected, atol=EXACT)
    for bad in ({"cal_max": 20}, {"cal_max": np.nan}, {"cal_max": np.inf}):
        assert "percentiles" in notes(open_nifti(patched(content, **bad), source()))


def test_bytes_keep_their_range_unless_they_are_scaled() -> None:
    content = nii(scan(dtype=np.uint8))
    stack = open_nifti(content, source())
    assert notes(stack) == ""
    expected = np.flip(scan(dtype=np.uint8), (0, 1)).transpose(2, 1, 0).astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(pixels(stack), expected)
    assert "percentiles" in notes(open_nifti(patched(content, scl_slope=2), source()))


def test_percentiles_are_of_the_whole_volume_and_told() -> None:
    array = np.arange(1001, dtype=np.float32).reshape(7, 11, 13)
    stack = open_nifti(nii(array), source())
    assert "grey values run from 5 to 995 (percentiles 0.5 and 99.5 of 1001 voxels)" in notes(stack)
    expected = np.clip((np.flip(array, (0, 1)).transpose(2, 1, 0) - 5) / 990, 0, 1)
    np.testing.assert_allclose(pixels(stack), expected, atol=EXACT)
    window = source(window="percentile")
    np.testing.assert_array_equal(pixels(open_nifti(nii(array, cal_min=1, cal_max=2), window)), pixels(stack))


def test_percentiles_of_large_volumes_come_from_a_fixed_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nifti, "_MOST_SAMPLED", 100)
    array = np.broadcast_to(np.arange(10, dtype=np.int16)[:, None, None], (10, 10, 10)).copy()
    stack = open_nifti(nii(array), source())
    assert "from 0 to 9" in notes(stack)  # each 10th voxel would have met one column only
    assert "(one in 11)" in notes(stack)


def test_equal_percentiles_give_way_to_the_whole_range() -> None:
    array = np.zeros((10, 10, 10), dtype=np.int16)
    array[0, 0, 0] = 7
    stack = open_nifti(nii(array), source())
    assert "from 0 to 7 (smallest and largest value" in notes(stack)
    assert pixels(stack).max() == 1.0


def test_full_range_goes_through_the_scaling() -> None:
    array = np.array([[[-32768, 0, 32767]]], dtype=np.int16)
    stack = open_nifti(nii(array), source(window="full"))
    np.testing.assert_allclose(pixels(stack).ravel(), [0, 32768 / 65535, 1], atol=EXACT)
    stack = open_nifti(nii(array, scl_slope=-2, scl_inter=5), source(window="full"))
    np.testing.assert_allclose(pixels(stack).ravel(), [1, 32767 / 65535, 0], atol=EXACT)
    refused(nii(scan(dtype=np.float32)), "has no full range", window="full")


def test_centre_and_width_are_in_the_files_own_units() -> None:
    array = np.array([[[0, 1, 2, 3, 4]]], dtype=np.int16)
    stack = open_nifti(nii(array, scl_slope=10, scl_inter=-5), source(window=(15, 20)))
    np.testing.assert_allclose(pixels(stack).ravel(), [0, 0, 0.5, 1, 1], atol=EXACT)
    for window in ((15, 0), (15, -1), (np.nan, 5), (0, np.inf), (1e30, 1)):
        refused(nii(array), "expected a finite width above 0", window=window)


def test_constant_volumes_need_a_window() -> None:
    for array in (np.full((3, 3, 3), 5.0, dtype=np.float32), np.full((3, 3, 3), 5, dtype=np.uint8)):
        refused(nii(array), r"holds one value only \(5\): nothing to see")
        refused(nii(array), "one value only", window="percentile")
        assert pixels(open_nifti(nii(array), source(window=(5, 10)))).max() == 0.5
        assert pixels(open_nifti(nii(array, cal_max=10), source())).max() == 0.5


def test_far_ends_of_float64_stay_in_range() -> None:
    array = np.array([[[-1e308, 0, 1e308]]])
    refused(nii(array), "shows nothing")
    stack = open_nifti(nii(array), source(window=(0, 1)))
    np.testing.assert_array_equal(pixels(stack).ravel(), [0, 0.5, 1])


# --- matrix I9 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_I9_values_that_are_not_finite(bad: float) -> None:
    array = scan(dtype=np.float32)
    array[0, 0, 0] = array[1, 2, 3] = bad
    error = refused(nii(array), r"2 of 210 voxels are not finite")
    assert "--nan zero" in error.hint
    stack = open_nifti(nii(array), source(nan="zero", window=(50, 100)))
    assert "2 of 210 voxels are not finite (NaN or infinite); taken as 0" in notes(stack)
    array[0, 0, 0] = array[1, 2, 3] = 0
    np.testing.assert_array_equal(pixels(stack), pixels(open_nifti(nii(array), source(window=(50, 100)))))


def test_I9_no_finite_value_at_all() -> None:
    array = np.full((3, 3, 3), np.nan, dtype=np.float32)
    refused(nii(array), "27 of 27 voxels are not finite")
    refused(nii(array), "one value only", nan="zero")


def test_I9_only_a_few_finite_values_that_are_equal() -> None:
    array = np.full((3, 3, 3), np.nan, dtype=np.float32)
    array[0, 0, 0] = 5
    stack = open_nifti(nii(array), source(nan="zero"))
    assert pixels(stack).sum() == 1.0


def test_I9_zero_volume() -> None:
    refused(nii(np.zeros((3, 3, 3), dtype=np.int16)), r"one value only \(0\)")


def test_I9_real_4_d() -> None:
    error = refused(nii(scan((3, 4, 5, 6))), r"holds 6 volumes \(3 x 4 x 5 x 6 voxels\), expected one")
    assert "fslroi" in error.hint
    refused(nii(scan((3, 4, 1, 2, 3))), "holds 6 volumes")


def test_I9_colour_and_complex_numbers() -> None:
    colour = np.zeros((3, 3, 3), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    refused(nii(colour), r"holds RGB colour \(data type code 128\)")
    refused(patched(nii(scan()), datatype=2304, bitpix=32), "holds RGBA colour")
    refused(nii(scan(dtype=np.complex64)), "holds complex numbers")


@pytest.mark.parametrize("code", [0, 1, 1536, 1792, 2048, 9999, -1])
def test_I9_types_that_are_not_read(code: int) -> None:
    refused(nii(scan(), datatype=code), rf"data type code {code}\), expected integers or floats")


def test_I9_bits_that_contradict_the_type() -> None:
    refused(nii(scan(), bitpix=8), "declares 8 bits per voxel, its data type has 16")


def test_I9_negative_and_zero_pixdim() -> None:
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    content = nii(scan(), affine)
    expected = open_nifti(content, source())
    stack = open_nifti(patched(content, pixdim=[1, -2, -3, -4, 0, 0, 0, 0]), source())
    assert stack.frame(0).spacing == expected.frame(0).spacing == (3.0, 2.0)
    assert notes(stack) == notes(expected)
    for bad in (0, np.nan, np.inf):
        stack = open_nifti(patched(content, pixdim=[1, bad, 3, 4, 0, 0, 0, 0]), source())
        assert stack.frame(0).spacing is None
        assert "the spacing is unknown" in notes(stack)
        np.testing.assert_array_equal(pixels(stack), pixels(expected))
        stack = open_nifti(patched(content, pixdim=[1, bad, 3, 4, 0, 0, 0, 0]), source(axis="sagittal"))
        assert stack.frame(0).spacing == (4.0, 3.0)
    stack = open_nifti(patched(content, pixdim=[1, 5, 3, 4, 0, 0, 0, 0]), source())
    assert stack.frame(0).spacing == (3.0, 2.0)
    assert "differ" in notes(stack)


@pytest.mark.parametrize("qfac", [0, -1, 1, 7, np.nan])
def test_I9_pixdim_with_a_qform(qfac: float) -> None:
    content = nii(scan(), sform_code=0, qform_code=1, pixdim=[qfac, -2, 3, 0, 0, 0, 0, 0])
    stack = open_nifti(content, source())
    assert stack.geometry is not None
    expected = np.diag([2.0, 3.0, -1.0 if qfac == -1 else 1.0, 1.0])
    np.testing.assert_allclose(
        np.reshape(stack.geometry.affine, (4, 4))[:3, :3], expected[:3, :3], atol=EXACT
    )
    assert stack.frame(0).spacing == (3.0, 2.0)


@pytest.mark.parametrize("offset", [0, 348, 351, -1, 352.5, np.nan, np.inf, -np.inf])
def test_I9_vox_offset_that_makes_no_sense(offset: float) -> None:
    refused(nii(scan(), vox_offset=offset), "its data start at byte .* expected a whole number from 352 on")
    if np.isfinite(offset) and float(offset).is_integer():
        refused(nii(scan(), version=2, vox_offset=offset), "from 544 on")


@pytest.mark.parametrize("offset", [368, 10_000, 2**40, 1e30])
def test_I9_vox_offset_past_the_end(offset: float) -> None:
    content = nii(scan(), vox_offset=offset)
    refused(content, r"expected \d+ bytes, got 772: truncated")
    refused(gzip.compress(content), "truncated|exceeds the ceiling|grows to more", "NIfTI.gz")


@pytest.mark.parametrize("edges", [(600, 600, 600), (32767, 32767, 32767), (500, 500, 500)])
@pytest.mark.parametrize("kind", ["NIfTI", "NIfTI.gz"])
def test_I9_lying_dims_cost_nothing(edges: tuple[int, int, int], kind: str) -> None:
    content = nii(scan(), dim=[3, *edges, 1, 1, 1, 1])
    content = content if kind == "NIfTI" else gzip.compress(content)
    with growth_at_most(MIB):
        refused(content, "declares .* voxels, the ceiling is|truncated|grows to more", kind)


def test_I9_lying_dims_of_version_2() -> None:
    content = nii(scan(), version=2, dim=[3, 2**62, 2**62, 2**62, 1, 1, 1, 1])
    with growth_at_most(MIB):
        refused(content, "the ceiling is 150000000")


@pytest.mark.parametrize(
    "dim",
    [
        [0, 5, 6, 7, 1, 1, 1, 1],
        [1, 5, 6, 7, 1, 1, 1, 1],
        [8, 5, 6, 7, 1, 1, 1, 1],
        [-1, 5, 6, 7, 1, 1, 1, 1],
        [3, 5, 0, 7, 1, 1, 1, 1],
        [3, -1, 6, 7, 1, 1, 1, 1],
        [4, 5, 6, 7, 0, 1, 1, 1],
    ],
)
def test_I9_dims_that_make_no_sense(dim: list[int]) -> None:
    refused(nii(scan(), dim=dim), r"declares -?\d dimensions of .* expected 2 or 3, none empty")


def test_I9_slope_0_means_no_scaling() -> None:
    stack = open_nifti(nii(scan(), scl_slope=0, scl_inter=9), source())
    assert "scl_slope is 0, which means that values are not scaled" in notes(stack)
    np.testing.assert_array_equal(pixels(stack), pixels(open_nifti(nii(scan()), source())))


def test_I9_other_slopes() -> None:
    for inter in (0, np.nan):
        stack = open_nifti(nii(scan(), scl_slope=np.nan, scl_inter=inter), source())
        assert "not a number" in notes(stack)
        np.testing.assert_array_equal(pixels(stack), pixels(open_nifti(nii(scan()), source())))
    for slope, inter in ((np.inf, 0), (-np.inf, 0), (2, np.inf), (2, np.nan)):
        refused(nii(scan(), scl_slope=slope, scl_inter=inter), "its scaling is .* expected finite numbers")
    refused(nii(scan(), version=2, scl_slope=1e308), "scaled values are not finite")


def test_I9_affines_without_inverse() -> None:
    for row in ([0, 0, 0, 0], [np.nan, 0, 0, 0], [np.inf, 0, 0, 0], [1, 0, 0, np.nan], [1e38, 0, 0, 0]):
        refused(nii(scan(), srow_x=row), "not finite or not invertible")
    refused(nii(scan(), srow_x=[0, 1, 0, 0]), "not invertible")
    refused(nii(scan(), sform_code=0, qform_code=1, quatern_b=np.nan), "not invertible|cannot be decoded")
    refused(nii(scan(), sform_code=0, qform_code=1, quatern_b=5), "cannot be decoded as NIfTI")


def test_I9_pairs_of_files() -> None:
    error = refused(nii(scan(), magic=b"ni1"), "is the header of a pair of files")
    assert ".nii" in error.hint
    refused(nii(scan(), version=2, magic=b"ni2"), "is the header of a pair of files")


def test_I9_foreign_headers() -> None:
    refused(nii(scan(), magic=b"xyz"), "lacks the magic number of NIfTI-1")
    refused(nii(scan(), version=2, magic=b"n+1"), "lacks the magic number of NIfTI-2")
    refused(nii(scan(), sizeof_hdr=349), "does not start with a NIfTI header")
    refused(nii(scan(), version=2, eol_check=[10, 10, 26, 10]), "copied as text")
    refused(b"", "does not start with a NIfTI header")
    refused(b"", "end in the middle", "NIfTI.gz")
    refused(gzip.compress(b""), "does not start with a NIfTI header", "NIfTI.gz")
    refused(b"<html>" * 200, "does not start with a NIfTI header")
    refused(b"<html>" * 200, "gzip data are damaged", "NIfTI.gz")


def test_I9_slices_beyond_the_ceilings() -> None:
    content = nii(scan((5, 6, 7)))
    refused(content, "has slices of 6 x 5 pixels", limits=Limits(max_pixels=29))
    refused(content, "has slices of 7 x 6 pixels", limits=Limits(max_pixels=41), axis="sagittal")
    refused(content, "at least 6 on each edge", limits=Limits(min_edge=6))
    refused(content, "5 x 6 x 7 = 210 voxels, the ceiling is 209", limits=Limits(max_voxels=209))
    assert open_nifti(content, source(limits=Limits(max_pixels=30, min_edge=5, max_voxels=210))).count == 7


# --- hostile files ---------------------------------------------------------------------------------------


class growth_at_most:
    """Fails when Python's memory, with numpy's, grew by more than `ceiling` bytes inside the block."""

    def __init__(self, ceiling: int) -> None:
        self.ceiling = ceiling

    def __enter__(self) -> None:
        tracemalloc.start()

    def __exit__(self, *_: object) -> None:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak <= self.ceiling


def bomb(head: bytes) -> bytes:
    """A gzip file of about 0.8 MB: `head` and more than 700 MB of zeros, in members of 8 MiB."""
    return gzip.compress(head) + gzip.compress(bytes(8 * MIB), mtime=0) * 95


def test_I8_gzip_bombs_are_refused_while_inflating() -> None:
    content = bomb(nii(scan()))
    assert len(content) < 900_000
    limits = Limits(max_inflated=16 * MIB)
    with growth_at_most(8 * MIB):
        refused(content, "inflated size exceeds the ceiling of 16777216 bytes", "NIfTI.gz", limits=limits)
    limits = Limits(max_ratio=20)
    with growth_at_most(8 * MIB):
        refused(content, "grows to more than 20 times its", "NIfTI.gz", limits=limits)


def test_I8_declared_size_is_checked_before_inflating() -> None:
    content = bomb(nii(scan(), dim=[3, 500, 500, 560, 1, 1, 1, 1]))
    headless = bomb(bytes(400))
    with growth_at_most(8 * MIB):
        refused(content, "grows to more than 200 times", "NIfTI.gz")
        refused(content, "exceeds the ceiling", "NIfTI.gz", limits=Limits(max_inflated=100 * MIB))
        refused(headless, "does not start with", "NIfTI.gz")


def test_I8_one_stream_of_zeros() -> None:
    packer = zlib.compressobj(wbits=31)
    content = packer.compress(nii(scan())) + packer.compress(bytes(32 * MIB)) + packer.flush()
    with growth_at_most(8 * MIB):
        refused(content, "grows to more than 200 times", "NIfTI.gz")
        refused(content, "exceeds the ceiling", "NIfTI.gz", limits=Limits(max_inflated=MIB))


def test_I8_bytes_after_the_data_are_not_kept() -> None:
    content = gzip.compress(nii(scan()) + bytes(24 * MIB))
    with growth_at_most(8 * MIB):
        stack = open_nifti(content, source("NIfTI.gz", limits=Limits(max_ratio=10_000)))
    np.testing.assert_array_equal(pixels(stack), pixels(open_nifti(nii(scan()), source())))


def test_I8_many_members(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nifti, "_MOST_MEMBERS", 50)
    content = gzip.compress(nii(scan()))
    assert open_nifti(content + gzip.compress(b"") * 49, source("NIfTI.gz")).count == 7
    refused(content + gzip.compress(b"") * 50, "more than 50 gzip members", "NIfTI.gz")


def test_gzip_checksum_length_and_garbage() -> None:
    content = gzip.compress(nii(scan()))
    for place in (len(content) - 8, len(content) - 1):  # CRC, length
        damaged = bytearray(content)
        damaged[place] ^= 1
        refused(bytes(damaged), "gzip data are damaged", "NIfTI.gz")
    refused(content + b"garbage", "gzip data are damaged", "NIfTI.gz")
    refused(content + b"\0", "gzip data", "NIfTI.gz")


def test_memory_is_the_buffer_and_one_slice() -> None:
    content = nii(np.arange(8 * MIB, dtype=np.int32).reshape(128, 256, 256))
    with growth_at_most(16 * MIB):  # blocks of a survey, the sample of the percentiles, one slice
        open_nifti(content, source()).frame(100)
    zipped = gzip.compress(content, 1)
    with growth_at_most(len(content) + 16 * MIB):
        open_nifti(zipped, source("NIfTI.gz")).frame(100)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", ["NIfTI", "NIfTI.gz"])
def test_I1_prefixes_are_refused(version: int, kind: str) -> None:
    content = nii(scan(), version=version)
    content = content if kind == "NIfTI" else gzip.compress(content)
    for cut in np.linspace(0, len(content) - 1, 64).astype(int):
        refused(content[:cut], None, kind)


@settings(max_examples=150, deadline=None)
@given(
    place=st.one_of(st.integers(0, 351), st.integers(0, 2000)),
    value=st.integers(0, 255),
    kind=st.sampled_from(["NIfTI", "NIfTI.gz"]),
    version=st.sampled_from([1, 2]),
    dtype=st.sampled_from([np.uint8, np.int16, np.float32, np.float64]),
)
def test_I3_one_byte_mutants_give_images_or_an_input_error(
    place: int, value: int, kind: str, version: int, dtype: type
) -> None:
    content = bytearray(nii(scan((4, 5, 6), dtype), version=version))
    if kind == "NIfTI.gz":
        content = bytearray(gzip.compress(content))
    content[place % len(content)] = value
    for axis in AXES:
        assert_sound(bytes(content), source(kind, axis=axis))


def assert_sound(content: bytes, given_source: Source) -> None:
    """Every slice is in 0..1, or there is one InputError."""
    found = outcome(content, given_source)
    if isinstance(found, InputError):
        assert found.path == given_source.name
        assert found.reason
        return
    for image in found:
        assert image.pixels.dtype == np.float32
        assert image.pixels.min() >= 0
        assert image.pixels.max() <= 1


def outcome(content: bytes, given_source: Source) -> list[Image] | InputError:
    try:
        stack = open_nifti(content, given_source)
        return [stack.frame(number) for number in range(min(stack.count, 300))]
    except InputError as error:
        return error


def told(content: bytes) -> Iterator[str]:
    """Everything that reading says."""
    for reader in (open_nifti, open_nifti_mask):
        try:
            yield notes(reader(content, source()))
        except InputError as error:
            yield str(error)


def test_texts_of_the_header_are_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    faults: tuple[dict[str, object], ...] = (
        {},
        {"magic": b"Doe"},
        {"datatype": 9999},
        {"dim": [3, 99, 99, 99, 1, 1, 1, 1]},
        {"srow_x": [0, 0, 0, 0]},
        {"scl_slope": 0},
        {"sform_code": 0, "qform_code": 1, "quatern_b": 5},
        {"bitpix": 8},
        {"vox_offset": 3},
    )
    for version, fields in itertools.product((1, 2), faults):
        texts = (*TEXTS, "db_name") if version == 1 else TEXTS
        planted: dict[str, object] = {field: b"Doe^J" for field in texts}
        content = nii(scan(), version=version, **planted, **fields)
        assert content.count(b"Doe^J") == len(planted)
        assert not any("Doe" in text for text in told(content))
    assert "Doe" not in caplog.text


@pytest.mark.parametrize("error", [ValueError("Doe"), KeyError("Doe"), struct.error("Doe"), MemoryError()])
def test_whatever_goes_wrong_becomes_one_input_error(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise error

    content = nii(scan())
    monkeypatch.setattr(nibabel.Nifti1Header, "get_best_affine", broken)
    caught = refused(content, "cannot be decoded as NIfTI|not enough memory")
    assert "Doe" not in str(caught)
    assert caught.hint
    assert caught.__cause__ is error


def test_warnings_of_nibabel_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    content, truth = nii(scan()), nibabel.Nifti1Header.get_best_affine

    def warned(header: nibabel.Nifti1Header) -> np.ndarray:
        warnings.warn("Doe", UserWarning, stacklevel=2)
        return truth(header)

    monkeypatch.setattr(nibabel.Nifti1Header, "get_best_affine", warned)
    assert "Doe" not in notes(open_nifti(content, source()))


READS_ALL = """
import resource, sys
import umiad.io.nifti as nifti
from umiad.io.source import Source
content, soft, broken = (bytes.fromhex(text) for text in sys.stdin.read().split())
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
stack = nifti.open_nifti(content, Source("a", "NIfTI", nan="zero"))
frames = [stack.frame(number).pixels[0] for number in range(stack.count)]
nifti.volume_bytes(frames, stack.geometry)
nifti.open_nifti_mask(soft, Source("a", "NIfTI.gz", nan="zero")).frame(0)
try:
    nifti.open_nifti(broken, Source("a", "NIfTI"))
except nifti.InputError as error:
    sys.stdout.write(str(error))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no ceiling on open files")
def test_reading_opens_no_file() -> None:
    array = scan(dtype=np.float32)
    array[0, 0, 0] = np.nan
    soft = np.array([[[0, 0.25, 0.5]]], dtype=np.float32)
    broken = nii(scan(), sform_code=0, qform_code=1, quatern_b=5)
    given_bytes = " ".join(content.hex() for content in (nii(array), gzip.compress(nii(soft)), broken))
    command = [sys.executable, "-c", READS_ALL]
    done = subprocess.run(command, input=given_bytes, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("a: cannot be decoded as NIfTI (ValueError)")


# --- masks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_every_label_of_a_mask_counts(dtype: type) -> None:
    array = np.array([[[0, 1, 2, 3, 0]]]).astype(dtype)
    stack = open_nifti_mask(nii(array), source())
    np.testing.assert_array_equal(pixels(stack).ravel(), [0, 1, 1, 1, 0])
    assert stack.frame(0).pixels.dtype == np.float32
    assert stack.geometry == open_nifti(nii(array), source()).geometry
    assert (stack.count, stack.single) == (5, False)


def test_masks_may_be_empty_or_full() -> None:
    for value in (0, 1):
        array = np.full((3, 4, 5), value, dtype=np.uint8)
        stack = open_nifti_mask(gzip.compress(nii(array)), source("NIfTI.gz"))
        assert (pixels(stack) == value).all()


def test_scaled_masks_are_judged_by_their_values() -> None:
    array = np.array([[[0, 1, 255]]], dtype=np.uint8)
    stack = open_nifti_mask(nii(array, scl_slope=1 / 255), source())
    np.testing.assert_array_equal(pixels(stack).ravel(), [0, 1, 1])
    stack = open_nifti_mask(nii(array, scl_inter=1), source())
    np.testing.assert_array_equal(pixels(stack).ravel(), [1, 1, 1])


def test_masks_lie_as_their_images() -> None:
    array = (scan((3, 4, 5), np.uint8) > 50).astype(np.uint8)
    for axis in AXES:
        stored, affine = in_ras(array, (2, 0, 1), (-1, 1, -1))
        image = open_nifti(nii(stored, affine), source(axis=axis, window=(0.5, 1)))
        np.testing.assert_array_equal(
            pixels(open_nifti_mask(nii(stored, affine), source(axis=axis))), pixels(image)
        )


def test_what_is_no_mask() -> None:
    with pytest.raises(InputError, match="is no mask: its smallest value is -1"):
        open_nifti_mask(nii(np.array([[[-1, 0, 1]]], dtype=np.int16)), source())
    soft = np.linspace(0.001, 0.999, 65, dtype=np.float32).reshape(5, 13, 1)
    with pytest.raises(InputError, match="more than 64 different values"):
        open_nifti_mask(nii(soft), source())
    soft[0, 0, 0] = 0
    assert pixels(open_nifti_mask(nii(soft), source())).sum() == 64
    ramp = np.arange(256, dtype=np.uint8).reshape(4, 8, 8)
    assert pixels(open_nifti_mask(nii(ramp), source())).sum() == 255
    with pytest.raises(InputError, match="more than 64 different values"):
        open_nifti_mask(nii(ramp, scl_slope=1 / 255), source())


def test_masks_with_values_that_are_not_finite() -> None:
    array = np.array([[[0, 1, np.nan]]], dtype=np.float32)
    with pytest.raises(InputError, match="1 of 3 voxels are not finite"):
        open_nifti_mask(nii(array), source())
    stack = open_nifti_mask(nii(array), source(nan="zero"))
    np.testing.assert_array_equal(pixels(stack).ravel(), [0, 1, 0])
    assert "taken as 0" in notes(stack)


# --- real files ------------------------------------------------------------------------------------------

REAL = {
    "anatomical.nii": (33, 41, 25),
    "reoriented_anat_moved.nii": (21, 26, 22),
    "resampled_anat_moved.nii": (17, 21, 3),
    "standard.nii.gz": (4, 5, 7),
    "example4d.nii.gz": 2,
    "example_nifti2.nii.gz": 2,
    "functional.nii": 20,
    "row_major.dconn.nii": None,
}


@pytest.mark.real
@pytest.mark.skipif(not CORPORA.is_dir(), reason="the corpora do not lie beside the repository")
@pytest.mark.parametrize("name", REAL)
def test_real_files(name: str) -> None:
    [path] = CORPORA.glob(f"*__{name}")
    content = path.read_bytes()
    kind = "NIfTI.gz" if name.endswith(".gz") else "NIfTI"
    expected = REAL[name]
    if not isinstance(expected, tuple):
        refused(content, f"holds {expected} volumes" if expected else "holds", kind)
        return
    for axis in AXES:
        stack = open_nifti(content, source(kind, axis=axis, nan="zero"))
        assert stack.geometry is not None
        assert stack.geometry.shape == expected
        back = nibabel.Nifti1Image.from_bytes(volume_bytes(pixels(stack), stack.geometry))
        np.testing.assert_allclose(back.affine, nibabel.load(path).affine, rtol=1e-6)
        again = open_nifti(back.to_bytes(), source(axis=axis, window=(0.5, 1.0)))
        np.testing.assert_allclose(pixels(again), pixels(stack), atol=EXACT)
        assert_sound(content, source(kind, axis=axis))
