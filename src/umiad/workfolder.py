"""The folder beside a model in which a running fit keeps what it needs to resume: one run at a time."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from umiad import diskfile, strictjson
from umiad.errors import ConfigError, DiskError, InputError, ModelFileError

RUN, LOCK = "run.json", "lock"
MAX_RUN_BYTES = diskfile.MIB
_TRIES = 100
_LOCKED_BYTE = 1 << 30  # Windows locks bytes, and others could not read a locked one


class WorkFolder:
    """`MODEL.work`: `run.json` (what is being fitted), the log, the resume checkpoints and a lock.

    Entering claims it: with `resume` it must exist and hold the same run, without it starts empty. `on_note` is
    told when the lock of a run that has ended without giving it back is taken over.
    Raises InputError when another process works in it, ConfigError when there is nothing to resume or the
    run differs, DiskError when it cannot be written.
    """

    def __init__(
        self,
        model: Path,
        run: dict[str, Any],
        *,
        resume: bool,
        on_note: Callable[[str], None] | None = None,
    ) -> None:
        self.path = model.with_name(model.name + ".work")
        self._run, self._resume, self._on_note = run, resume, on_note
        self._lock = FolderLock(self.path)

    def __enter__(self) -> WorkFolder:
        try:
            stale = self._lock.acquire()
            if stale and self._on_note is not None:
                self._on_note(f"{self.path}: a run that was cut off had left its lock ({stale}): taken over")
            self._claim()
        except BaseException as error:
            self._lock.release()
            if isinstance(error, OSError):
                raise DiskError(f"{self.path}: cannot be written: {error}") from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def remove(self) -> None:
        """Remove the folder, once the model is saved; what cannot be removed is left."""
        with suppress(OSError):
            for each in self.path.iterdir():
                if each.name != LOCK:
                    diskfile.remove(each)
            (self.path / LOCK).unlink(missing_ok=True)
            self.path.rmdir()

    def _claim(self) -> None:
        file = self.path / RUN
        if not self._resume:
            for each in self.path.iterdir():
                if each.name != LOCK:
                    diskfile.remove(each)
            diskfile.write_atomic(file, strictjson.dump_bytes(self._run, source=RUN))
            return
        if not file.exists():
            raise ConfigError(f"{self.path}: nothing to resume; leave out --resume to start a new fit")
        try:
            found = strictjson.loads(diskfile.read_regular(file, limit=MAX_RUN_BYTES), source=str(file))
        except (InputError, ModelFileError) as error:
            raise ConfigError(f"{error}; leave out --resume to start a new fit") from error
        if found != self._run:
            raise ConfigError(f"{self.path}: the run to resume differs in {_difference(found, self._run)}")


class FolderLock:
    """At most one holder of a folder, across processes; the file `lock` in it names process and host.

    The operating system gives the lock back when its holder ends in whatever way, so that a file left behind
    by a dead process locks nobody out, two processes cannot both take it over, and a process number that is
    in use again does not count. A file that names another host is respected, since locks may not reach that
    far. Where a file system knows no locks, the process number decides. `job` is what others are told is running.
    """

    def __init__(self, folder: Path, *, job: str = "fit") -> None:
        self.path = folder / LOCK
        self._job = job
        self._handle: int | None = None

    def acquire(self) -> str:
        """Create the folder and take the lock; returns who held it and never gave it back ("" if nobody).

        Raises InputError when another process holds it, OSError when the folder cannot be written.
        """
        for _ in range(_TRIES):  # another round whenever a holder has just removed file or folder
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
                locked, owner = _try_lock(self._handle), _text(self._handle)
                if locked is False:
                    self._refuse(owner)
                if self._is_current():
                    if _is_running(owner, locks=locked is not None):
                        self._refuse(owner)
                    _rewrite(self._handle, f"{os.getpid()} {socket.gethostname()}")
                    return owner
            self._close()
        raise OSError(f"{self.path}: comes and goes")

    def release(self) -> None:
        """Give it back, if it is held here."""
        if self._handle is None:
            return
        with suppress(OSError):
            if sys.platform == "win32":  # an open file cannot be removed there, so nobody else's is
                self._close()
                self.path.unlink()
            elif self._is_current():
                self.path.unlink()
        self._close()

    def _refuse(self, owner: str) -> NoReturn:
        self._close()
        raise InputError(
            self.path.parent,
            f"another {self._job} is running there (process and host: {owner or 'not known yet'})",
            f"wait for it, or delete {self.path} if you are sure that it has ended",
        )

    def _is_current(self) -> bool:
        """Whether the open file is still the one that others find under the name."""
        if self._handle is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._handle), self.path.stat())
        except FileNotFoundError:
            return False

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _try_lock(handle: int) -> bool | None:
    """Whether the open file could be locked; None where the file system knows no locks."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _text(handle: int) -> str:
    os.lseek(handle, 0, os.SEEK_SET)
    return os.read(handle, 1000).decode("utf-8", errors="replace").strip("\0\n ")


def _rewrite(handle: int, text: str) -> None:
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, text.encode())


def _is_running(owner: str, *, locks: bool) -> bool:
    """Whether who is named in a lock that is free may still run; one of another host is taken to be running.

    With `locks` a free lock shows that its process on this host has ended.
    """
    number, _, host = owner.partition(" ")
    if host != socket.gethostname() or not number.isdigit():
        return bool(host)
    if locks or int(number) == os.getpid():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _difference(found: object, wanted: object, where: str = "") -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) != wanted.get(key):
                return _difference(found.get(key), wanted.get(key), f"{where}.{key}" if where else str(key))
    return f"{where or 'its settings'}: was {found!r}, now {wanted!r}"
