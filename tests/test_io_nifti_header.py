"""Headers and values of NIfTI files that are odd or make no sense (matrix I9)."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from make_nifti import (
    EXACT,
    MIB,
    growth_at_most,
    nii,
    notes,
    patched,
    pixels,
    refused,
    scan,
    source,
)
from umiad.io.nifti import open_nifti
from umiad.io.source import Limits


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
