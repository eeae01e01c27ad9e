import os
import socket
import subprocess
import sys

import pytest

from umiad import workfolder
from umiad.errors import ConfigError, DiskError, InputError
from umiad.workfolder import LOCK, RUN, WorkFolder


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


HOLD = """
import sys
from pathlib import Path
from umiad.errors import InputError
from umiad.workfolder import WorkFolder

try:
    with WorkFolder(Path(sys.argv[1]), {}, resume=False, on_note=lambda text: print("note", text)):
        print("holds", flush=True)
        sys.stdin.readline()
except InputError as error:
    print(error)
"""


def other_run(model):
    command = [sys.executable, "-c", HOLD, str(model)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_T8_a_second_run_is_refused_and_a_stale_lock_taken_over_with_a_note(tmp_path):
    model, notes = tmp_path / "model", []
    first = other_run(model)
    assert first.stdout.readline() == "holds\n"
    with (
        pytest.raises(InputError, match=f"another fit is running.*{first.pid} {socket.gethostname()}"),
        WorkFolder(model, {}, resume=False, on_note=notes.append),
    ):
        pass
    assert notes == []
    first.kill()
    first.communicate()
    with WorkFolder(model, {}, resume=False, on_note=notes.append) as work:
        assert (work.path / LOCK).read_text() == f"{os.getpid()} {socket.gethostname()}"
        with pytest.raises(InputError, match=f"host: {os.getpid()} "), WorkFolder(model, {}, resume=False):
            pass  # nor twice in one process
        assert (work.path / LOCK).exists()
    assert [str(first.pid) in note and "taken over" in note for note in notes] == [True]


def test_T8_of_several_runs_that_find_a_stale_lock_exactly_one_wins(tmp_path):
    (tmp_path / "model.work").mkdir()
    (tmp_path / "model.work" / LOCK).write_text(f"1 {socket.gethostname()}")
    runs = [other_run(tmp_path / "model") for _ in range(4)]
    said = [run.stdout.readline() for run in runs]
    while any(text.startswith("note") for text in said):
        said = [
            run.stdout.readline() if text.startswith("note") else text
            for run, text in zip(runs, said, strict=True)
        ]
    for run in runs:
        run.communicate("\n")
    assert sorted("holds" in text for text in said) == [False, False, False, True]
    assert sum("another fit is running" in text for text in said) == 3


def test_T8_a_lock_of_another_host_is_respected_and_said_how_to_remove(tmp_path):
    (tmp_path / "model.work").mkdir()
    (tmp_path / "model.work" / LOCK).write_text("77 another-host")
    with (
        pytest.raises(InputError, match="77 another-host.*delete .*lock if you are sure"),
        WorkFolder(tmp_path / "model", {}, resume=False),
    ):
        pass
    assert (tmp_path / "model.work" / LOCK).read_text() == "77 another-host"


@pytest.mark.parametrize("content", [b"", bytes(20), b"\xff\xfe", b"12"])
def test_T8_a_damaged_lock_of_a_dead_run_locks_nobody_out(tmp_path, content):
    (tmp_path / "model.work").mkdir()
    (tmp_path / "model.work" / LOCK).write_bytes(content)
    with WorkFolder(tmp_path / "model", {}, resume=False):
        pass


def test_T8_without_locks_of_the_file_system_the_process_number_decides(tmp_path, monkeypatch):
    monkeypatch.setattr("umiad.workfolder._try_lock", lambda _: None)
    lock = tmp_path / "model.work" / LOCK
    lock.parent.mkdir()
    lock.write_text(f"1 {socket.gethostname()}")  # process 1 always runs
    with pytest.raises(InputError, match="another fit"), WorkFolder(tmp_path / "model", {}, resume=False):
        pass
    lock.write_text(f"{2**22 + os.getpid()} {socket.gethostname()}")  # beyond the largest process id
    with WorkFolder(tmp_path / "model", {}, resume=False):
        assert lock.read_text().startswith(f"{os.getpid()} ")


def test_T8_a_folder_removed_while_it_is_claimed_is_made_again(tmp_path, monkeypatch):
    original, removed = workfolder._try_lock, []

    def try_lock(handle):
        if not removed:  # as the holder does that ends just then
            removed.append(True)
            (tmp_path / "model.work" / LOCK).unlink()
            (tmp_path / "model.work").rmdir()
        return original(handle)

    monkeypatch.setattr("umiad.workfolder._try_lock", try_lock)
    with WorkFolder(tmp_path / "model", {}, resume=False) as work:
        assert (work.path / LOCK).exists()


@pytest.mark.parametrize("content", [b"", b"{", bytes(10), b"[1]"])
def test_T3_a_damaged_run_file_says_to_start_anew_and_unlocks(tmp_path, content):
    with WorkFolder(tmp_path / "model", {"seed": 1}, resume=False) as work:
        (work.path / RUN).write_bytes(content)
    with (
        pytest.raises(ConfigError, match="leave out --resume|differs"),
        WorkFolder(tmp_path / "model", {"seed": 1}, resume=True),
    ):
        pass
    assert not (tmp_path / "model.work" / LOCK).exists()


def test_T2_a_disk_that_refuses_the_run_file_is_a_disk_error_and_unlocks(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(DiskError, match="No space left on device; needed 3 bytes"),
        WorkFolder(tmp_path / "model", {}, resume=False),
    ):
        pass
    assert not list((tmp_path / "model.work").iterdir())


def test_a_folder_that_cannot_be_written_is_a_disk_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(DiskError, match="cannot be written"),
        WorkFolder(tmp_path / "file" / "m", {}, resume=False),
    ):
        pass
