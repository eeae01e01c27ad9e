from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import nibabel
import numpy as np
import pytest

from make_nifti import (
    AXES,
    EXACT,
    RAS,
    assert_sound,
    nii,
    notes,
    patched,
    pixels,
    refused,
    scan,
    source,
)
from umiad.errors import InputError
from umiad.io import nifti
from umiad.io.nifti import open_nifti, open_nifti_mask, volume_bytes
from umiad.types import Geometry

CORPORA = Path(__file__).resolve().parents[2] / "shared" / "corpora" / "nifti"
ORIENTATIONS = list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))


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
