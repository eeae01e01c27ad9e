"""Equal arrays one after another: in memory, or in a temporary file where they are too many."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike

from umiad.errors import DiskError


class Rows:
    """Up to `count` rows of one shape and type; `array()` gives those appended so far as [n, *shape].

    Up to `memory_limit` bytes they live in memory, above it in a temporary file without a name, which the system
    removes when the array is no longer used, also after a crash. Rows are written before they are mapped: a full
    disk is a DiskError, never a fault of the process.

    Raises DiskError when the temporary folder has too little room, at the start or while writing.
    """

    def __init__(self, count: int, shape: tuple[int, ...], dtype: DTypeLike, *, memory_limit: int) -> None:
        self._shape, self._dtype = shape, np.dtype(dtype)
        self._size = 0
        needed = count * int(np.prod(shape)) * self._dtype.itemsize
        self._file: IO[bytes] | None = None
        self._memory = np.empty((count if needed <= memory_limit else 0, *shape), dtype=self._dtype)
        if needed > memory_limit:
            free = shutil.disk_usage(tempfile.gettempdir()).free
            if free < needed:
                raise _too_small(f"{needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
            try:
                self._file = tempfile.TemporaryFile(prefix="umiad-rows-", buffering=0)  # noqa: SIM115
            except OSError as error:
                raise _too_small(f"{needed / 1e9:.1f} GB: {error.strerror or error}") from error
            weakref.finalize(self, self._file.close)  # what is mapped stays

    def __len__(self) -> int:
        return self._size

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return self._dtype.itemsize

    @property
    def on_disk(self) -> bool:
        """Whether the rows go to a file."""
        return self._file is not None

    def append(self, row: Any) -> None:
        """Add a row, an array of the stated shape; it is converted to the stated type."""
        values = np.ascontiguousarray(row, dtype=self._dtype)
        if values.shape != self._shape:
            raise ValueError(f"a row of shape {list(values.shape)}, expected {list(self._shape)}")
        if self._file is None:
            self._memory[self._size] = values
        else:
            self._write(self._file, values.tobytes())
        self._size += 1

    def _write(self, file: IO[bytes], content: bytes) -> None:
        rest = memoryview(content)
        try:
            while rest:  # a disk that fills up takes a part
                rest = rest[file.write(rest) :]
        except OSError as error:
            raise _too_small(f"more than {self._size} rows: {error.strerror or error}") from error

    def array(self) -> np.ndarray:
        """All rows [n, *shape]; writing into it changes no file."""
        if self._file is None:
            return self._memory[: self._size]
        if not self._size:
            return self._memory
        return np.memmap(self._file, dtype=self._dtype, mode="c", shape=(self._size, *self._shape))


def _too_small(need: str) -> DiskError:
    return DiskError(
        f"{tempfile.gettempdir()}: keeping anomaly maps needs {need} "
        "(set TMPDIR to a larger disk, or evaluate fewer images)"
    )
