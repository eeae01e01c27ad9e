import os
from pathlib import Path

import pytest

from umiad import diskfile
from umiad.errors import DiskError, InputError, ModelFileError

LIMIT = 1000


def test_reads_what_was_written(tmp_path: Path) -> None:
    diskfile.write_atomic(tmp_path / "new" / "a.bin", b"hello")
    assert diskfile.read_regular(tmp_path / "new" / "a.bin", limit=LIMIT) == b"hello"


def test_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    for content in (b"old", b"new"):
        diskfile.write_atomic(tmp_path / "a.bin", content)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"new"


def test_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        diskfile.read_regular(tmp_path / "none", limit=LIMIT)


def test_unreadable_file_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"x")

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        diskfile.read_regular(path, limit=LIMIT)


def test_too_large_and_wrong_size_name_both_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"x" * 11)
    with pytest.raises(ModelFileError, match="has 11 bytes, the ceiling is 10 bytes"):
        diskfile.read_regular(path, limit=10)
    with pytest.raises(ModelFileError, match="has 11 bytes, expected 12 bytes"):
        diskfile.read_regular(path, limit=LIMIT, size=12)


def test_a_head_check_sees_the_start_and_the_size_and_may_refuse(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(diskfile.HEAD_BYTES + 5))
    seen: list[tuple[int, int]] = []
    content = diskfile.read_regular(
        path, limit=1 << 30, check_head=lambda head, size: seen.append((len(head), size))
    )
    assert seen == [(diskfile.HEAD_BYTES, diskfile.HEAD_BYTES + 5)]
    assert len(content) == diskfile.HEAD_BYTES + 5


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(diskfile.HEAD_BYTES + 5))

    def grow(head: bytes, size: int) -> None:
        with path.open("ab") as file:
            file.write(b"more")

    with pytest.raises(ModelFileError, match="changed while it was read"):
        diskfile.read_regular(path, limit=1 << 30, check_head=grow)


def test_a_file_whose_checked_head_is_replaced_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(diskfile.HEAD_BYTES + 5))

    def replace(head: bytes, size: int) -> None:
        with path.open("r+b") as file:
            file.write(b"other")

    with pytest.raises(ModelFileError, match="changed while it was read"):
        diskfile.read_regular(path, limit=1 << 30, check_head=replace)


@pytest.mark.skipif(os.name == "nt", reason="links and pipes need POSIX")
def test_links_pipes_and_folders(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"hello")
    (tmp_path / "soft").symlink_to(path)
    assert diskfile.read_regular(tmp_path / "soft", limit=LIMIT) == b"hello"
    with pytest.raises(ModelFileError, match="symbolic link"):
        diskfile.read_regular(tmp_path / "soft", limit=LIMIT, follow_links=False)
    os.link(path, tmp_path / "hard")
    with pytest.raises(ModelFileError, match="hard link"):
        diskfile.read_regular(tmp_path / "hard", limit=LIMIT, follow_links=False)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelFileError, match="special file"):
        diskfile.read_regular(tmp_path / "pipe", limit=LIMIT)
    with pytest.raises(ModelFileError, match="is a folder"):
        diskfile.read_regular(tmp_path, limit=LIMIT)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "a.bin"
    diskfile.write_atomic(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path if step == "replace" else os, step, fail)
    with pytest.raises(DiskError, match=r"No space left on device; needed 3 bytes, free [0-9]+ bytes"):
        diskfile.write_atomic(path, b"new")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("a.bin", b"old")]


def test_free_bytes_of_a_path_yet_to_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = diskfile.free_bytes(tmp_path / "not" / "yet")
    assert free is not None
    assert free > 0

    def fail(_: object) -> None:
        raise OSError

    monkeypatch.setattr("shutil.disk_usage", fail)
    assert diskfile.free_bytes(tmp_path) is None
    with pytest.raises(DiskError, match="free unknown bytes"), diskfile.disk_errors(tmp_path, needed=1):
        raise OSError(5, "Input/output error")
