"""The folder beside a model in which a running fit keeps what it needs to resume: one run at a time."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from types import TracebackType
from typing import Any

from umiad.config import canonical_json
from umiad.errors import ConfigError, DiskError, InputError
from umiad.strictjson import loads

RUN, LOCK = "run.json", "lock"


class WorkFolder:
    """`MODEL.work`: `run.json` (what is being fitted), the log, the resume checkpoint and a lock.

    Entering claims it: with `resume` it must exist and hold the same run, without it starts empty.
    Raises InputError when another process works in it, ConfigError when there is nothing to resume or the
    run differs, DiskError when it cannot be written.
    """

    def __init__(self, model: Path, run: dict[str, Any], *, resume: bool) -> None:
        self.path = model.with_name(model.name + ".work")
        self._run, self._resume = run, resume

    def __enter__(self) -> WorkFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
            self._claim()
        except OSError as error:
            raise DiskError(f"{self.path}: cannot be written: {error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        (self.path / LOCK).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder, once the model is saved."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _lock(self) -> None:
        lock, mine = self.path / LOCK, f"{os.getpid()} {socket.gethostname()}"
        try:
            with lock.open("x", encoding="utf-8") as file:
                file.write(mine)
        except FileExistsError:
            owner = lock.read_text(encoding="utf-8")
            if _alive(owner):
                raise InputError(
                    self.path, f"another fit is running there (process and host: {owner})"
                ) from None
            lock.write_text(mine, encoding="utf-8")

    def _claim(self) -> None:
        file, wanted = self.path / RUN, canonical_json(self._run)
        if not self._resume:
            for each in self.path.iterdir():
                if each.name != LOCK:
                    shutil.rmtree(each) if each.is_dir() else each.unlink()
            file.write_text(wanted, encoding="utf-8")
            return
        try:
            if not file.exists():
                raise ConfigError(f"{self.path}: nothing to resume; leave out --resume to start a new fit")
            found = loads(file.read_text(encoding="utf-8"), source=str(file))
            if found != self._run:
                raise ConfigError(
                    f"{self.path}: the run to resume differs in {_difference(found, self._run)}"
                )
        except ConfigError:
            (self.path / LOCK).unlink(missing_ok=True)
            raise


def _alive(owner: str) -> bool:
    """Whether the process of a lock still runs; one of another host is taken to be running."""
    number, _, host = owner.partition(" ")
    if host != socket.gethostname() or not number.isdigit():
        return bool(host)
    if int(number) == os.getpid():
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
