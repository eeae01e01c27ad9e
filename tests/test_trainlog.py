import json

import pytest

from umiad.errors import DiskError
from umiad.trainlog import LOG, TrainingLog


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_in_memory_and_in_the_file_at_once(tmp_path):
    log = TrainingLog(tmp_path / LOG)
    for epoch in (1, 2):
        log.append({"epoch": epoch, "loss": 0.5, "note": None})
        assert lines(tmp_path / LOG) == log.rows
    assert len(log.rows) == 2


def test_restoring_replaces_what_the_file_held(tmp_path):
    (tmp_path / LOG).write_bytes(bytes(10))
    log = TrainingLog(tmp_path / LOG)
    assert (tmp_path / LOG).read_bytes() == b""
    log.restore([{"epoch": 1}], skipped=2)
    assert (lines(tmp_path / LOG), log.skipped) == ([{"epoch": 1}], 2)


def test_without_a_file_it_only_remembers():
    log = TrainingLog(None)
    log.append({"epoch": 1})
    assert log.rows == [{"epoch": 1}]


def test_T2_a_log_that_cannot_be_written_is_a_disk_error(tmp_path):
    log = TrainingLog(tmp_path / LOG)
    (tmp_path / LOG).unlink()
    (tmp_path / LOG).mkdir()
    with pytest.raises(DiskError, match="Is a directory; needed 13 bytes, free"):
        log.append({"epoch": 1})
