"""NIfTI files that are bombs, damaged or full of secrets; what reading costs."""

from __future__ import annotations

import gzip
import itertools
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Iterator

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from make_nifti import (
    AXES,
    MIB,
    assert_sound,
    growth_at_most,
    nii,
    notes,
    pixels,
    refused,
    scan,
    source,
)
from umiad.errors import InputError
from umiad.io import nifti
from umiad.io.nifti import open_nifti, open_nifti_mask
from umiad.io.source import Limits

TEXTS = ("descrip", "aux_file", "intent_name")


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
    content = packer.compress(nii(scan())) + packer.compress(bytes(96 * MIB)) + packer.flush()
    with growth_at_most(8 * MIB):
        refused(content, "grows to more than 200 times", "NIfTI.gz")
        refused(content, "exceeds the ceiling", "NIfTI.gz", limits=Limits(max_inflated=MIB))


def test_I8_bytes_after_the_data_are_not_kept() -> None:
    content = gzip.compress(nii(scan()) + bytes(24 * MIB))
    with growth_at_most(8 * MIB):
        stack = open_nifti(content, source("NIfTI.gz"))
    np.testing.assert_array_equal(pixels(stack), pixels(open_nifti(nii(scan()), source())))


@pytest.mark.parametrize(
    ("size", "most"),
    [(1, 64 * MIB), (64 * MIB // 200, 64 * MIB), (MIB, 200 * MIB), (3 * MIB, 512 * MIB), (10**9, 512 * MIB)],
)
def test_I8_the_ratio_counts_beyond_64_mib(size: int, most: int) -> None:
    assert Limits().most_inflated(size) == most
    assert Limits(max_inflated=5).most_inflated(size) == 5


def test_I8_zeros_up_to_64_mib_are_no_bomb_and_one_byte_more_is() -> None:
    head = nii(scan())
    content = gzip.compress(head + bytes(64 * MIB - len(head)))
    with growth_at_most(8 * MIB):
        assert open_nifti(content, source("NIfTI.gz")).count == 7
        refused(content + gzip.compress(b"\0"), "grows to more than 200 times .* beyond 67108864", "NIfTI.gz")


def test_an_ordinary_sparse_mask_is_read() -> None:
    mask = np.zeros((256, 256, 150), dtype=np.uint8)
    mask[100:140, 90:130, 60:75] = 1
    content = gzip.compress(nii(mask))
    assert mask.nbytes > 500 * len(content)
    stack = open_nifti_mask(content, source("NIfTI.gz"))
    assert stack.count == 150
    areas = [int(stack.frame(number).pixels.sum()) for number in (0, 59, 60, 74, 75, 149)]
    assert areas == [0, 0, 1600, 1600, 0, 0]


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
    caught = refused(content, "cannot be decoded as NIfTI|needs more memory")
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
