"""NIfTI files for tests, in memory. Import as `from make_nifti import ...`."""

from __future__ import annotations

import tracemalloc

import nibabel
import numpy as np
import pytest

from umiad.errors import InputError
from umiad.io.nifti import open_nifti
from umiad.io.source import Source
from umiad.types import Image, Stack

MIB = 1 << 20
AXES = ("axial", "coronal", "sagittal")
RAS = np.diag([1.0, 1.0, 1.0, 1.0])
EXACT = 1e-6  # float32 rounding of values in 0..1


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


def refused(content: bytes, reason: str | None, kind: str = "NIfTI", **options: object) -> InputError:
    with pytest.raises(InputError, match=reason) as caught:
        open_nifti(content, source(kind, **options))
    assert caught.value.path == "scan.nii"
    return caught.value


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
