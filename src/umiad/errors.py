"""Every error that umiad raises on purpose, with the exit code that the command line gives it."""

from __future__ import annotations

import importlib
import os
from types import ModuleType


class UmiadError(Exception):
    """Base of all errors raised on purpose; the message says what, what was expected, and what to do."""

    exit_code = 1


class InputError(UmiadError):
    """A file, folder or array that cannot be used.

    `path` is the file or a name for the array, `reason` what is wrong (both what was found and what
    was expected), `hint` what the user can do about it (may be empty).
    """

    exit_code = 3

    def __init__(self, path: str | os.PathLike[str], reason: str, hint: str = "") -> None:
        self.path = os.fspath(path)
        self.reason = reason
        self.hint = hint
        super().__init__(f"{self.path}: {reason}" + (f" (hint: {hint})" if hint else ""))


class DiskError(UmiadError):
    """Writing failed: disk full, read-only, no permission. What lay there before is untouched."""

    exit_code = 4


class ModelFileError(UmiadError):
    """A saved model, checkpoint or weights file that must not be used: damaged, altered or foreign."""

    exit_code = 5


class ConfigError(UmiadError):
    """A configuration value or option that is unknown or out of range."""

    exit_code = 2


class TrainingError(UmiadError):
    """Training had to stop: the loss is no longer finite, or there is nothing to train on."""


class NotFittedError(UmiadError):
    """A detector was asked for scores before it was fitted."""


class MissingExtraError(UmiadError):
    """An optional dependency is needed for what was asked."""

    exit_code = 2


def first_line(error: BaseException) -> str:
    """Kind and first line of an error of a library, at most 200 characters of it."""
    text = (str(error).strip() or "no reason given").splitlines()[0][:200]
    return f"{type(error).__name__}: {text}"


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency, or raise MissingExtraError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f"{purpose} needs {module}: pip install 'umiad[{extra}]'") from error
