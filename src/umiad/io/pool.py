"""Decoding in child processes: a few are kept, started when needed and replaced when one dies."""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from umiad.errors import InputError, UmiadError
from umiad.io import wire
from umiad.io.files import RASTER_KINDS
from umiad.io.source import Limits, Source
from umiad.types import Geometry, Image, Stack, framed

WORKERS = max(1, min(4, os.cpu_count() or 1))
"""Children per group of formats that are kept; a reader that finds none idle starts one, so none waits."""
PATIENCE = 12
"""A child that is silent for this many times its ceiling of processor time is taken to hang."""
START_SECONDS = 120
LOOK_SECONDS, IDLE_LOOKS = 0.5, 60
HINT = "it is damaged, or made to do harm; export it again"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Pool:
    """Children of this process, by group of formats; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[str, list[_Worker]] = {}
        self._coming: dict[str, threading.Thread] = {}
        self._closed = False
        self.peak: int | None = None
        """Bytes that the largest child held at most; None before the first file, and where it is unknown."""

    def prepare(self, kind: str) -> None:
        """Start a child for files of `kind` in the background, unless there is one: the first file then waits less.

        Nothing is raised: what keeps a child from starting is told when a file needs it.
        """
        group = _group(kind)

        def start() -> None:
            with contextlib.suppress(UmiadError, OSError):
                self._give_back(group, _Worker(group), usable=True)

        with self._lock:
            if not (self._closed or self._idle.get(group) or group in self._coming):
                self._coming[group] = threading.Thread(target=start, name="umiad-start", daemon=True)
                self._coming[group].start()

    def decode(
        self, content: bytes, source: Source, *, frames: str | Sequence[int] | None = None, mask: bool = False
    ) -> Iterator[Stack | Image]:
        """Yield the stack (its `frame` cannot be called), then the images that `frames` means.

        Raises InputError for whatever happens to the child, UmiadError when none can be started.
        """
        group = _group(source.kind)
        worker = self._take(group)
        done = False
        try:
            yield from worker.ask(content, source, frames=frames, mask=mask)
            done = True
        except _Refused as refused:
            done = True
            raise InputError(source.name, *refused.args) from None
        finally:
            if worker.peak is not None:
                self.peak = max(self.peak or 0, worker.peak)
            self._give_back(group, worker, usable=done)

    def close(self) -> None:
        """End all idle children; one that is busy ends with its file."""
        with self._lock:
            self._closed = True
            coming = list(self._coming.values())
            self._coming.clear()
        for each in coming:
            each.join()
        self.end_idle()

    def end_idle(self) -> None:
        """End the children that have nothing to do; the next file starts others."""
        with self._lock:
            workers = [each for group in self._idle.values() for each in group]
            self._idle.clear()
        for each in workers:
            each.end()

    def forget(self) -> None:
        """Let go of the children of the process that this one was forked from."""
        for group in self._idle.values():
            for each in group:
                each.forget()

    def _take(self, group: str) -> _Worker:
        with self._lock:
            coming = self._coming.pop(group, None)
        if coming is not None:
            coming.join()
        while True:
            with self._lock:
                idle = self._idle.get(group)
                worker = idle.pop() if idle else None
            if worker is None:
                return _Worker(group)
            if worker.alive:
                return worker
            worker.end()  # someone has killed it while it had nothing to do

    def _give_back(self, group: str, worker: _Worker, *, usable: bool) -> None:
        if usable and worker.alive:
            with self._lock:
                idle = self._idle.setdefault(group, [])
                if not self._closed and len(idle) < WORKERS:
                    idle.append(worker)
                    return
        worker.end()


class _Watch:
    """Kills processes that are silent for too long: one thread for all, since starting one costs milliseconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until: dict[int, tuple[float, subprocess.Popen[bytes]]] = {}
        self._killed: set[int] = set()
        self._running = False

    def begin(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        """Give `process` so many seconds from now."""
        with self._lock:
            self._until[process.pid] = time.monotonic() + seconds, process
            start, self._running = not self._running, True
        if start:
            threading.Thread(target=self._look, name="umiad-watch", daemon=True).start()

    def end(self, process: subprocess.Popen[bytes]) -> bool:
        """It answered, or ended; whether it was killed for its silence."""
        with self._lock:
            self._until.pop(process.pid, None)
            killed = process.pid in self._killed
            self._killed.discard(process.pid)
        return killed

    def _look(self) -> None:
        idle = 0
        while idle < IDLE_LOOKS:
            time.sleep(LOOK_SECONDS)
            with self._lock:
                late = [each for until, each in self._until.values() if time.monotonic() > until]
                for process in late:
                    process.kill()
                    del self._until[process.pid]
                    self._killed.add(process.pid)
                idle = 0 if self._until else idle + 1
                self._running = idle < IDLE_LOOKS


class _Refused(Exception):
    """The child's answer that a file cannot be used: reason, hint."""


class _Worker:
    """One child process and the pipes to it."""

    def __init__(self, group: str) -> None:
        if not sys.executable:
            raise UmiadError(
                "files are decoded in a process of their own, but this Python names no executable; "
                "set sys.executable, or pass Limits(isolated=False) for files that you trust"
            )
        self.peak: int | None = None
        command = [sys.executable, "-P", "-m", "umiad.io.child", group]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(  # noqa: S603 - our own module under our own interpreter
            command, stdin=pipe, stdout=pipe, stderr=pipe, env=_environment(), bufsize=-1
        )
        _PROCESS.watch.begin(self._process, START_SECONDS)
        try:
            header, _ = self._receive()
            if header != {"ready": group}:
                raise wire.BrokenWire("no greeting")
        except (wire.BrokenWire, OSError) as error:
            self._process.kill()
            stderr = self._process.stderr
            told = stderr.read().decode(errors="replace").strip().splitlines() if stderr else []
            self.end()
            raise UmiadError(
                f"the process that decodes files could not be started: {(told or ['no message'])[-1]}; "
                "try `python -m umiad.io.child raster`, or pass Limits(isolated=False) for files that you trust"
            ) from error
        finally:
            _PROCESS.watch.end(self._process)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(
        self, content: bytes, source: Source, *, frames: str | Sequence[int] | None, mask: bool
    ) -> Iterator[Stack | Image]:
        """One file's stack and images. Raises _Refused, or InputError when the child is lost."""
        request = _request(source, frames=frames, mask=mask)
        stack: Stack | None = None
        while True:
            _PROCESS.watch.begin(self._process, PATIENCE * source.limits.child_seconds)
            try:
                if stack is None:
                    self._send(request, content)
                header, payload = self._receive()
            except (wire.BrokenWire, OSError):
                raise self._lost(source, timed_out=_PROCESS.watch.end(self._process)) from None
            finally:
                _PROCESS.watch.end(self._process)
            self.peak = header.get("peak", self.peak)
            if "error" in header:
                raise _Refused(*header["error"])
            if "end" in header:
                return
            try:
                found: Stack | Image = _stack(header) if stack is None else _image(header, payload, source)
            except (LookupError, TypeError, ValueError) as error:
                raise InputError(
                    source.name, "made its decoder answer in a way that is none", HINT
                ) from error
            if isinstance(found, Stack):
                stack = found
            yield found

    def end(self) -> None:
        """Stop the child and wait for it."""
        process = self._process
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        if process.poll() is None:
            process.kill()
        process.wait()

    def forget(self) -> None:
        """In a forked process: close our ends of the pipes, and leave the child to its parent."""
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    os.close(stream.fileno())
                with contextlib.suppress(OSError):
                    stream.close()
        self._process.returncode = 0

    def _send(self, request: dict[str, Any], content: bytes) -> None:
        if self._process.stdin is None:
            raise wire.BrokenWire("no pipe")
        wire.send(self._process.stdin, request, content)  # type: ignore[arg-type]

    def _receive(self) -> tuple[dict[str, Any], bytearray]:
        if self._process.stdout is None:
            raise wire.BrokenWire("no pipe")
        return wire.receive(self._process.stdout)  # type: ignore[arg-type]

    def _lost(self, source: Source, *, timed_out: bool) -> InputError:
        """Why the child ended, in the user's words."""
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        limits = source.limits
        if code == -getattr(signal, "SIGXCPU", math.inf):
            reason = f"needs more than {limits.child_seconds} s of processor time to decode"
        elif timed_out:
            reason = f"was not decoded within {PATIENCE * limits.child_seconds} s"
        elif code < 0:
            reason = f"made its decoder crash (signal {signal.Signals(-code).name})"
        else:
            reason = f"made its decoder end unexpectedly (exit code {code})"
        return InputError(source.name, reason, HINT)


def _group(kind: str) -> str:
    """The children that decode files of this kind (`umiad.io.files.KINDS`)."""
    return "raster" if kind in RASTER_KINDS else kind.removesuffix(".gz")


def _request(source: Source, *, frames: str | Sequence[int] | None, mask: bool) -> dict[str, Any]:
    return {
        "name": os.fsencode(source.name).decode(errors="backslashreplace"),
        "kind": source.kind,
        "limits": asdict(source.limits),
        "window": source.window,
        "axis": source.axis,
        "nan": source.nan,
        "key": source.key.hex(),
        "frames": frames,
        "mask": mask,
    }


def _stack(header: dict[str, Any]) -> Stack:
    place = header["geometry"]
    geometry = None if place is None else Geometry(tuple(place[0]), tuple(place[1]), place[2])
    return Stack(header["count"], _not_here, header["single"], geometry)


def _not_here(_: int) -> Image:
    raise InputError("stack", "its frames come from the decoding process one after another")


def _image(header: dict[str, Any], payload: bytearray, source: Source) -> Image:
    pixels = np.frombuffer(payload, dtype=np.float32).reshape(header["shape"])
    spacing = header["spacing"]
    return Image(
        pixels=pixels,
        name=framed(source.name, header["frame"]),
        mode=header["mode"],
        bits=header["bits"],
        notes=tuple(header["notes"]),
        spacing=None if spacing is None else (spacing[0], spacing[1]),
        frame=header["frame"],
        patient=header["patient"],
    )


def _environment() -> dict[str, str]:
    """Ours, with one thread per library; where umiad lies outside of site-packages, the way to it."""
    environment = {**os.environ, **dict.fromkeys(_THREAD_VARIABLES, "1")}
    root = Path(__file__).parents[2]
    if root.name not in ("site-packages", "dist-packages"):
        known = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{root}{os.pathsep}{known}" if known else str(root)
    return environment


class _Process:
    """What belongs to this process alone: its children, their watch, and the key of its patient tokens."""

    def __init__(self) -> None:
        self.pool, self.watch = Pool(), _Watch()
        self.key = secrets.token_bytes(32)


_PROCESS = _Process()


def current() -> Pool:
    """The pool of this process."""
    return _PROCESS.pool


def patient_key() -> bytes:
    """The key of this process for the tokens of patients; it is not kept anywhere."""
    return _PROCESS.key


def _after_fork() -> None:
    _PROCESS.pool.forget()
    _PROCESS.pool, _PROCESS.watch = Pool(), _Watch()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(lambda: _PROCESS.pool.close())

__all__ = ["Limits", "Pool", "current", "patient_key"]
