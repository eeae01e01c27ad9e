import os
import socket

import pytest

from umiad.errors import ConfigError, DiskError, InputError
from umiad.workfolder import LOCK, WorkFolder


def test_a_new_run_starts_empty_and_unlocks_at_the_end(tmp_path):
    (tmp_path / "model.work" / "last").mkdir(parents=True)
    (tmp_path / "model.work" / "old.txt").write_text("left over")
    with WorkFolder(tmp_path / "model", {"seed": 1}, resume=False) as work:
        assert sorted(p.name for p in work.path.iterdir()) == ["lock", "run.json"]
    assert [p.name for p in work.path.iterdir()] == ["run.json"]
    work.remove()
    assert not work.path.exists()


def test_resuming_needs_the_same_run(tmp_path):
    with WorkFolder(tmp_path / "model", {"config": {"epochs": 3}}, resume=False) as work:
        (work.path / "log.jsonl").write_text("{}\n")
    with WorkFolder(tmp_path / "model", {"config": {"epochs": 3}}, resume=True) as work:
        assert (work.path / "log.jsonl").exists()
    with (
        pytest.raises(ConfigError, match=r"differs in config.epochs: was 3, now 4"),
        WorkFolder(tmp_path / "model", {"config": {"epochs": 4}}, resume=True),
    ):
        pass
    assert not (tmp_path / "model.work" / LOCK).exists()


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ConfigError, match="nothing to resume"), WorkFolder(tmp_path / "m", {}, resume=True):
        pass


def test_a_second_run_is_refused_and_a_stale_lock_taken_over(tmp_path):
    folder = tmp_path / "model.work"
    folder.mkdir()
    (folder / LOCK).write_text(f"1 {socket.gethostname()}")  # process 1 always runs
    with (
        pytest.raises(InputError, match="another fit is running"),
        WorkFolder(tmp_path / "model", {}, resume=False),
    ):
        pass
    (folder / LOCK).write_text(
        f"{2**22 + os.getpid()} {socket.gethostname()}"
    )  # beyond the largest process id
    with WorkFolder(tmp_path / "model", {}, resume=False) as work:
        assert (work.path / LOCK).read_text().startswith(f"{os.getpid()} ")
    (folder / LOCK).write_text("77 another-host")
    with pytest.raises(InputError, match="another-host"), WorkFolder(tmp_path / "model", {}, resume=False):
        pass


def test_a_folder_that_cannot_be_written_is_a_disk_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(DiskError, match="cannot be written"),
        WorkFolder(tmp_path / "file" / "m", {}, resume=False),
    ):
        pass
