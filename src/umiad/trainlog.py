"""The training log: one row per epoch, in memory and in a file that people and programs can follow."""

from __future__ import annotations

import json
from pathlib import Path

from umiad.diskfile import disk_errors, write_atomic

LOG = "log.jsonl"
Row = dict[str, float | int | None]
"""Of an epoch: its number, seconds, mean losses and monitors; None where there is no value."""


class TrainingLog:
    """The training log, in memory and one JSON object a line in a file, and how many batches were skipped.

    Both are part of every checkpoint; a resumed run writes the file again from there. Raises DiskError.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.restore([], skipped=0)

    def restore(self, rows: list[Row], *, skipped: int) -> None:
        """Begin with these rows; what the file held is replaced."""
        self.rows, self.skipped = list(rows), skipped
        if self._path is not None:
            write_atomic(self._path, "".join(map(_line, rows)).encode())

    def append(self, row: Row) -> None:
        """Add the row of an epoch that has ended."""
        self.rows.append(row)
        if self._path is not None:
            line = _line(row)
            with disk_errors(self._path, needed=len(line)), self._path.open("a", encoding="utf-8") as file:
                file.write(line)


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
