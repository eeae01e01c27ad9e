"""The folder in which a scoring run keeps what it has done, file by file, so that it can go on after any end.

`shard.json` says what is scored (`ShardFacts`), `files.jsonl` has a line per file that is done, in order; a line is
written after the file's map and picture, so what it tells of is there. `lock` keeps a second run out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import IO, TypeAlias

from umiad import __version__, diskfile, strictjson
from umiad.config import Config
from umiad.errors import ConfigError, DiskError, InputError, ModelFileError
from umiad.filerecord import FileRecord
from umiad.workfolder import LOCK, FolderLock
from umiad.worklist import Shard

SHARD, FILES, SHARDS, UNFINISHED = "shard.json", "files.jsonl", "shards", "score.work"
KIND = "umiad shard"
MAX_SHARD_BYTES = diskfile.MIB
Memory: TypeAlias = tuple[int, int | None]
Naming: TypeAlias = Callable[[FileRecord], tuple[str, str]]


class ShardFacts(Config):
    """What a shard is a part of, and what is needed to merge it without the model.

    `files`: length of the whole list. `options`: those that change results. `model`: provenance, in order. `fpr`: the
    rate that the threshold keeps, None without one. `peak_memory` (megabytes): see `Summary`; set at the end.
    """

    kind: str = KIND
    number: int
    of: int
    files: int
    list_sha256: str
    model_sha256: str
    options: dict[str, str | int | bool]
    version: str = __version__
    model: tuple[tuple[str, str | int | float | None], ...]
    fpr: float | None
    png16_full_scale: float | None
    peak_memory: Memory | None = None

    @property
    def shard(self) -> Shard:
        """Which one."""
        return Shard(self.number, self.of)

    def difference(self, other: ShardFacts) -> str:
        """What `other` was made with that this was not, in words; "" where their results belong together."""
        if self.model_sha256 != other.model_sha256:
            return "another model"
        if (self.list_sha256, self.files) != (other.list_sha256, other.files):
            return f"another list of files ({other.files} in place of {self.files}, or other names, sizes or order)"
        for name in sorted(self.options.keys() | other.options.keys()):
            if self.options.get(name) != other.options.get(name):
                return f"{name} {other.options.get(name)!r} in place of {self.options.get(name)!r}"
        return "" if self.version == other.version else f"umiad {other.version} in place of {self.version}"


class Journal:
    """Entering claims the folder; then `done` are the files of an earlier start, in order, and `add` appends.

    With `resume` the folder must hold the same work, without it starts empty; None resumes where something is.
    `on_note` is told what the user should know. Raises InputError when another process works there or it holds other
    work, ConfigError when there is nothing to resume, DiskError when it cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        facts: ShardFacts,
        *,
        resume: bool | None,
        on_note: Callable[[str], None],
    ) -> None:
        self.folder, self.facts = folder, facts
        self.done: list[FileRecord] = []
        self._resume, self._on_note = resume, on_note
        self._lock = FolderLock(folder, job="scoring run")
        self._lines: IO[bytes] | None = None
        self._ends: list[int] = []

    def __enter__(self) -> Journal:
        if self._resume and not (self.folder / SHARD).exists():
            raise ConfigError(f"{self.folder}: nothing to resume; leave out --resume to score from the start")
        try:
            if owner := self._lock.acquire():
                self._on_note(
                    f"{self.folder}: a run that was cut off had left its lock ({owner}): taken over"
                )
            self._claim()
        except BaseException as error:
            self._close()
            if isinstance(error, OSError):
                raise DiskError(f"{self.folder}: cannot be written: {error}") from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def keep(self, count: int) -> None:
        """Keep the first `count` files of an earlier start and forget the rest. Raises OSError."""
        if lost := len(self.done) - count:
            self._on_note(f"{self.folder}: results of {lost} files are missing or cut; they are scored again")
        del self.done[count:]
        lines = self._open()
        lines.truncate(self._ends[count])
        lines.seek(0, 2)

    def add(self, record: FileRecord) -> None:
        """Note that a file is done. Raises OSError."""
        lines = self._open()
        lines.write(record.to_line())
        lines.flush()

    def finish(self, memory: Memory | None) -> None:
        """Note that all is done. Raises DiskError."""
        self._write(self.facts.model_copy(update={"peak_memory": memory}))

    def remove(self) -> None:
        """Remove the folder, once all that it tells of has been taken over; what cannot be removed is left."""
        self._close_lines()
        with suppress(OSError):
            self._clear()
            (self.folder / LOCK).unlink(missing_ok=True)
            self.folder.rmdir()

    def _claim(self) -> None:
        if self._resume is False or not (self.folder / SHARD).exists():
            self._clear()
            self._write(self.facts)
        elif words := self.facts.difference(found := read_facts(self.folder)):
            reason = f"holds results made with {words}"
            raise InputError(self.folder, reason, "delete that folder, or choose another --out")
        elif (found.number, found.of) != (self.facts.number, self.facts.of):
            raise InputError(self.folder, f"holds shard {found.shard}", "delete that folder")
        self.done, self._ends = read_records(self.folder, self.facts)

    def _clear(self) -> None:
        for each in self.folder.iterdir():
            if each.name != LOCK:
                diskfile.remove(each)

    def _write(self, facts: ShardFacts) -> None:
        diskfile.write_atomic(
            self.folder / SHARD, strictjson.dump_bytes(facts.canonical(), source=str(self.folder / SHARD))
        )

    def _open(self) -> IO[bytes]:
        if self._lines is None:
            self._lines = (self.folder / FILES).open("ab")
        return self._lines

    def _close_lines(self) -> None:
        if self._lines is not None:
            self._lines.close()
            self._lines = None

    def _close(self) -> None:
        try:
            self._close_lines()
        finally:
            self._lock.release()


def shard_folder(out: Path, shard: Shard) -> Path:
    """Where a shard of the results in `out` lies."""
    return out / SHARDS / shard.folder


def read_facts(folder: Path) -> ShardFacts:
    """What a folder says it holds. Raises InputError where it says nothing that can be used."""
    path = folder / SHARD
    try:
        content = diskfile.read_regular(path, limit=MAX_SHARD_BYTES)
        facts = ShardFacts.parse(strictjson.load_object(content, source=str(path)))
        known = {"image_threshold", "threshold_rule"} <= dict(facts.model).keys()
        if facts.kind != KIND or not 1 <= facts.number <= facts.of or facts.files < 0 or not known:
            raise ConfigError(f"{path}: is not the description of a shard")
    except (InputError, ModelFileError, ConfigError) as error:
        raise InputError(
            folder, f"its {SHARD} is missing or damaged: {error}", f"delete {folder} and score it again"
        ) from error
    return facts


def read_records(folder: Path, facts: ShardFacts) -> tuple[list[FileRecord], list[int]]:
    """The files that are done, up to the first line that is damaged or cut, and where lines end (from 0 on).

    Raises InputError when the lines cannot be read.
    """
    found: list[FileRecord] = []
    ends, path = [0], folder / FILES
    try:
        with path.open("rb") as lines:
            for index, line in zip(facts.shard.indices(facts.files), lines, strict=False):
                try:
                    record = FileRecord.from_line(line, source=str(path))
                except InputError:
                    break
                if record.index != index:
                    break
                found.append(record)
                ends.append(ends[-1] + len(line))
    except FileNotFoundError:
        return [], [0]
    except OSError as error:
        raise InputError(path, f"cannot be read: {error.strerror}", "check its permissions") from error
    return found, ends


def whole(records: Iterable[FileRecord], root: Path, naming: Naming) -> int:
    """How many of `records` have their map and picture below `root`, up to the first that has not.

    `naming` gives name and stem of each, in order.
    """
    return sum(1 for _ in takewhile(lambda record: record.is_whole(root, naming(record)[1]), records))
