"""Ctrl-C and SIGTERM as a request to stop at the next safe point; a second one stops at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from umiad.errors import UmiadError


class Interrupted(UmiadError):
    """Stopped on request (exit code 130 or 143); the run can be resumed."""

    def __init__(self, number: int, *, when: str) -> None:
        self.exit_code = 128 + number
        super().__init__(
            f"stopped {when}; repeat the command with --resume to go on from the last saved state"
        )


class Interrupt:
    """Inside the `with` block the first signal only sets `signal`, the second one stops at once.

    Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise Interrupted(number, when="at once")
        self.signal = number
