"""Walking through a folder of files that nobody vouches for: images, the rest, and what was passed over."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from umiad.errors import InputError
from umiad.io import looks_like_image

DEEPEST = 64
"""Folders below the root that are looked into; deeper ones are named and left out."""
_DIGITS = re.compile(r"([0-9]+)")


def natural_key(path: str | os.PathLike[str]) -> tuple[object, ...]:
    """Sort key under which "a2" comes before "a10", and equal-looking names keep a fixed order."""
    text = Path(path).as_posix()
    pieces = _DIGITS.split(text.lower())  # text, digits, text, ..., text
    return tuple(int(piece) if index % 2 else piece for index, piece in enumerate(pieces)), text


class Walk:
    """Goes through folders once; collects in `stray` what is no image, and in `notes` what was passed over.

    Links to folders are not followed, so a loop of links ends nowhere. Links to files are taken where they stay
    inside the root; those that leave it only with `follow`.
    """

    def __init__(self, root: Path, *, follow: bool = False) -> None:
        self.root = root
        self.stray: list[Path] = []
        self.notes: list[str] = []
        self._follow = follow
        self._home = Path(os.path.realpath(root))
        self._outside: list[Path] = []

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                return sorted(entries, key=lambda entry: natural_key(entry.name))
        except OSError as error:
            raise InputError(
                folder, f"cannot be listed: {error.strerror}", "check the permissions"
            ) from error

    def folders_of(self, folder: Path) -> list[Path]:
        """Direct sub-folders that may hold images; hidden ones and links are left out."""
        names = [e.name for e in self._entries(folder) if e.is_dir(follow_symlinks=False)]
        return [folder / name for name in names if not name.startswith((".", "__MACOSX"))]

    def images_in(self, folder: Path) -> list[Path]:
        """Images directly in `folder`; the other files there become stray."""
        images = []
        for entry in self._entries(folder):
            path = folder / entry.name
            if entry.is_dir(follow_symlinks=False):
                continue
            if entry.is_symlink() and self._passed_over(path, entry):
                continue
            if not entry.name.startswith(".") and _is_image(path):
                images.append(path)
            else:
                self.stray.append(path)
        return images

    def images_under(self, folder: Path, *, depth: int = 0) -> Iterator[Path]:
        """Images in `folder` and below."""
        yield from self.images_in(folder)
        children = self.folders_of(folder)
        if children and depth >= DEEPEST:
            self.notes.append(
                f"{self.short(folder)}: folders deeper than {DEEPEST} levels are not looked into"
            )
            return
        for child in children:
            yield from self.images_under(child, depth=depth + 1)

    def short(self, path: Path) -> str:
        """The path relative to the root, for messages."""
        return path.relative_to(self.root).as_posix()

    def inside(self, path: Path) -> set[str]:
        """Names of the folders between the root and the file, in lower case."""
        return {part.lower() for part in path.relative_to(self.root).parts[:-1]}

    def remarks(self) -> tuple[str, ...]:
        """The notes, and one on the links that were not followed."""
        if not self._outside:
            return tuple(self.notes)
        named = ", ".join(self.short(path) for path in self._outside[:3])
        text = f"{len(self._outside)} links to files outside of the folder are not followed: {named}"
        return (*self.notes, f"{text} (--follow takes them)")

    def _passed_over(self, path: Path, entry: os.DirEntry[str]) -> bool:
        """Whether a link is left out, with a note: to a folder, in a loop, or out of the root."""
        try:
            if entry.is_dir():
                self.notes.append(f"{self.short(path)}: a link to a folder is not followed")
                return True
        except OSError as error:
            why = "leads nowhere (a loop)" if error.errno == errno.ELOOP else f"fails: {error.strerror}"
            self.notes.append(f"{self.short(path)}: a link that {why}")
            return True
        if self._follow or Path(os.path.realpath(path)).is_relative_to(self._home):
            return False
        self._outside.append(path)
        return True


def _is_image(path: Path) -> bool:
    """By content or suffix: a damaged `.png` (or a pipe of that name) is reported as unreadable, not passed over."""
    return path.name.upper() != "DICOMDIR" and looks_like_image(path)
