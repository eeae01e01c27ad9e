"""What a scoring run has to do: the files in their order, a digest that stands for them, and whose share they are."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from umiad.data import list_images
from umiad.errors import ConfigError, InputError
from umiad.io import READABLE

_SPEC = re.compile(r"([0-9]{1,6})/([0-9]{1,6})")
_FOLDER = re.compile(r"([1-9][0-9]{0,5})-of-([1-9][0-9]{0,5})")


@dataclass(frozen=True, order=True)
class Shard:
    """Share `number` of `of`, counted from 1: every `of`-th file, so that shares are of one length and mixture."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Take "2/8" as a value. Raises ConfigError."""
        match = _SPEC.fullmatch(text)
        number, of = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= number <= of:
            raise ConfigError(
                f"--shard {text!r}: expected I/N with I from 1 to N, for example 2/8 (the second of eight shards)"
            )
        return cls(number, of)

    @classmethod
    def of_folder(cls, name: str) -> Shard | None:
        """The shard whose folder has this name; None for any other name."""
        match = _FOLDER.fullmatch(name)
        return cls(int(match[1]), int(match[2])) if match and int(match[1]) <= int(match[2]) else None

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def folder(self) -> str:
        """The name of its folder: "2-of-8"."""
        return f"{self.number}-of-{self.of}"

    def indices(self, total: int) -> range:
        """Which of `total` files, counted from 0, are its own."""
        return range(self.number - 1, total, self.of)


@dataclass(frozen=True)
class WorkList:
    """The files to score, in order. `sha256` stands for their order, relative names and sizes.

    It is the same wherever the files lie, and another one as soon as a file is added, taken away, renamed or
    changed in size. Contents of equal size are not told apart.
    """

    files: tuple[Path, ...]
    sha256: str


def find_work(
    paths: Sequence[str | os.PathLike[str]], *, follow: bool = False, notes: list[str] | None = None
) -> WorkList:
    """The images among `paths` (files and folders), in the order given, folders in natural order.

    The order in which a disk lists a folder plays no part. `follow` and `notes` as in `list_images`.
    Raises InputError for a path that does not exist, and when there is no image at all.
    """
    found, stray = list_images(paths, follow=follow, notes=notes)
    if not found:
        first = os.fspath(paths[0]) if paths else "paths"
        raise InputError(first, "no images found", f"umiad reads {READABLE}")
    if stray and notes is not None:
        notes.append(f"{len(stray)} files are no images to score and were ignored: {stray[0].name}, ...")
    return WorkList(tuple(found), _digest(found, _root(paths)))


def _root(paths: Iterable[str | os.PathLike[str]]) -> str:
    """The folder that all of `paths` lie in, and which is left out of the digest; "" where there is none."""
    given = [os.path.abspath(os.fspath(path)) for path in paths]
    try:
        return os.path.commonpath([path if os.path.isdir(path) else os.path.dirname(path) for path in given])
    except ValueError:  # drives of Windows have nothing in common
        return ""


def _digest(files: Iterable[Path], root: str) -> str:
    total = hashlib.sha256()
    for file in files:
        path = os.path.abspath(file)
        name = Path(os.path.relpath(path, root) if root else path).as_posix()
        total.update(b"%s\0%d\0" % (os.fsencode(name), _size(file)))
    return total.hexdigest()


def _size(file: Path) -> int:
    """Size in bytes, -1 where it cannot be told: reading will say why."""
    try:
        return file.stat().st_size
    except OSError:
        return -1
