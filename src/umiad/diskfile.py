"""Whole files, read without surprises and written so that a crash leaves the old or the new one.

Reading: regular files only, bounded, from one open handle. Writing: temporary file in the same folder, flush,
fsync, rename, fsync of the folder. Everything that reads or writes models and weights goes through here.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from umiad.errors import DiskError, InputError, ModelFileError

MIB = 1 << 20
HEAD_BYTES = MIB + 8


def read_regular(
    path: Path,
    *,
    limit: int,
    size: int | None = None,
    follow_links: bool = True,
    check_head: Callable[[bytes, int], None] | None = None,
) -> bytes:
    """Read a regular file of at most `limit` bytes, or of exactly `size` bytes where that is given.

    With `follow_links` False (members of a folder that came from elsewhere) symbolic links and files
    with more than one name are refused too. Pipes and devices are refused before they are opened.
    `check_head(first bytes, size of the file)` may raise before more than HEAD_BYTES are read.

    Raises:
        InputError: there is no such file, or the operating system refuses to read it.
        ModelFileError: not a regular file, of another size, or it changed while it was read.
    """
    try:
        _check_regular(path, path.stat(follow_symlinks=follow_links), follow_links=follow_links)
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
        handle = os.open(path, flags if follow_links else flags | getattr(os, "O_NOFOLLOW", 0))
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(file.fileno())
            _check_regular(path, found, follow_links=follow_links)
            _check_size(path, found.st_size, limit=limit, size=size)
            head = b""
            if check_head is not None:
                head = file.read(HEAD_BYTES)
                check_head(head, found.st_size)
                file.seek(0)
            content = file.read(found.st_size + 1)
    except FileNotFoundError as error:
        raise InputError(path, "no such file", "check the path") from error
    except OSError as error:
        raise InputError(
            path, f"cannot be read: {error.strerror or error}", "check its permissions"
        ) from error
    if len(content) != found.st_size or not content.startswith(head):
        raise ModelFileError(f"{path}: changed while it was read ({found.st_size} bytes expected); try again")
    return content


def _check_regular(path: Path, found: os.stat_result, *, follow_links: bool) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise ModelFileError(f"{path}: is a symbolic link, expected a regular file; copy the file itself")
    if not stat.S_ISREG(found.st_mode):
        kind = "folder" if stat.S_ISDIR(found.st_mode) else "special file (pipe, socket or device)"
        raise ModelFileError(f"{path}: is a {kind}, expected a regular file")
    if not follow_links and found.st_nlink > 1:
        raise ModelFileError(f"{path}: is a hard link, expected a file with one name; copy the file itself")


def _check_size(path: Path, found: int, *, limit: int, size: int | None) -> None:
    if size is not None and found != size:
        raise ModelFileError(f"{path}: has {found} bytes, expected {size} bytes; damaged or altered")
    if found > limit:
        raise ModelFileError(f"{path}: has {found} bytes, the ceiling is {limit} bytes")


def write_synced(path: Path, content: bytes) -> None:
    """Create `path` (it must not exist) with `content` and flush it to the disk. Raises OSError."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, where the platform can (Windows cannot). Raises OSError."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: bytes) -> None:
    """Write or replace one file; after any failure the old file is as it was. The folder is created.

    Raises:
        DiskError: disk full, read-only, no permission; with needed and free bytes.
    """
    temporary = path.with_name(f".{path.name}.umiad-new-{secrets.token_hex(4)}")
    with disk_errors(path, needed=len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_synced(temporary, content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file or link, or a folder with what it holds. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def swap_folder(fresh: Path, target: Path, *, aside: Path) -> None:
    """Rename the folder `fresh` to `target`; an older one stands `aside` meanwhile, and is put back if that fails.

    Raises OSError.
    """
    replaces = target.exists()
    if replaces:
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    try:
        fresh.rename(target)
    except OSError:
        if replaces:
            aside.rename(target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def disk_errors(path: Path, *, needed: int) -> Iterator[None]:
    """Turn an OSError of the enclosed writing into DiskError with `needed` and free bytes."""
    try:
        yield
    except OSError as error:
        free = free_bytes(path)
        space = "unknown" if free is None else f"{free}"
        raise DiskError(
            f"{path}: writing failed: {error.strerror or error}; needed {needed} bytes, free {space} bytes; "
            f"what lay there before is untouched; free some space or choose another folder"
        ) from error


def free_bytes(path: Path) -> int | None:
    """Free bytes on the disk that holds `path` or its nearest existing parent; None if unknown."""
    absolute = path.absolute()
    for folder in (absolute, *absolute.parents):
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            continue
    return None
