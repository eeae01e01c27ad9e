import errno
import io

import numpy as np
import pytest
import torch

from umiad.errors import DiskError
from umiad.rows import Rows


@pytest.mark.parametrize("memory_limit", [1 << 20, 0])
@pytest.mark.parametrize("dtype", [np.float32, np.bool_])
def test_rows_come_back_as_appended_in_memory_and_on_disk(memory_limit, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    wanted = np.random.default_rng(0).standard_normal((5, 3, 4)).round().astype(dtype)
    rows = Rows(6, (3, 4), dtype, memory_limit=memory_limit)
    for row in wanted:
        rows.append(row)
    found = rows.array()
    assert rows.on_disk == (memory_limit == 0)
    assert (len(rows), found.dtype, isinstance(found, np.memmap)) == (5, dtype, rows.on_disk)
    np.testing.assert_array_equal(found, wanted)
    assert torch.equal(torch.from_numpy(found[1:3]), torch.from_numpy(wanted[1:3]))  # writable: no warning


def test_nothing_is_left_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rows = Rows(2, (4,), np.float32, memory_limit=0)
    rows.append(np.ones(4))
    found = rows.array()
    del rows
    assert found.tolist() == [[1.0] * 4]
    del found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("memory_limit", [1 << 20, 0])
def test_no_rows_at_all(memory_limit):
    assert Rows(3, (2, 2), np.float32, memory_limit=memory_limit).array().shape == (0, 2, 2)
    assert Rows(0, (2, 2), np.float32, memory_limit=memory_limit).array().shape == (0, 2, 2)


def test_a_row_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \[3\], expected \[4\]"):
        Rows(1, (4,), np.float32, memory_limit=0).append(np.ones(3))


def test_a_disk_that_is_too_small_is_said_at_the_start(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(DiskError, match=r"keeping anomaly maps needs 0.0 GB, 0.0 GB are free \(set TMPDIR"):
        Rows(1, (4,), np.float32, memory_limit=0)


def test_a_folder_that_cannot_be_written_is_a_disk_error(monkeypatch):
    def refuse(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(DiskError, match="Read-only file system"):
        Rows(1, (4,), np.float32, memory_limit=0)


def test_a_disk_that_fills_up_is_a_disk_error(monkeypatch):
    class Full(io.BytesIO):
        """Takes five bytes at a time, and twenty in all."""

        def write(self, data):
            if self.tell() >= 20:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(bytes(data[:5]))

    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: Full())
    rows = Rows(2, (4,), np.float32, memory_limit=0)
    rows.append(np.ones(4))
    with pytest.raises(DiskError, match="more than 1 rows: No space left on device"):
        rows.append(np.ones(4))
