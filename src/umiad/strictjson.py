"""JSON from and to files that others may have altered: one meaning per text, or an error."""

from __future__ import annotations

import json
import math
from typing import NoReturn

from umiad.config import canonical_json
from umiad.errors import ConfigError, ModelFileError


class _RefusedError(ValueError):
    """What is wrong with a JSON text; becomes a ModelFileError that names the source."""


def loads(text: str | bytes, *, source: str) -> object:
    """Parse one JSON value strictly; `source` names the file in errors. Bytes must be UTF-8.

    Stricter than `json.loads`: a key given twice, NaN, Infinity and numbers beyond float64 are refused,
    and neither deep nesting nor giant integers let another exception out. The size is the caller's duty.

    Raises:
        ModelFileError: naming `source`, what was found and what was expected.
    """
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(
            decoded, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite_float
        )
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{source}: not UTF-8 at byte {error.start}, expected JSON in UTF-8") from error
    except RecursionError as error:
        raise ModelFileError(f"{source}: JSON nested too deep, expected a few levels") from error
    except ValueError as error:
        raise ModelFileError(f"{source}: not acceptable JSON: {error}") from error


def load_object(text: str | bytes, *, source: str) -> dict[str, object]:
    """Parse one JSON object strictly. Raises ModelFileError as `loads` does, or if it is no object."""
    value = loads(text, source=source)
    if not isinstance(value, dict):
        raise ModelFileError(
            f"{source}: a JSON {type(value).__name__} at the top, expected an object {{...}}"
        )
    return value


def dump_bytes(value: object, *, source: str) -> bytes:
    r"""Canonical JSON in UTF-8, ending in a newline: equal values give equal bytes.

    File names that are not Unicode (lone surrogates in Python) become `\uXXXX` escapes and read back equal.

    Raises:
        ConfigError: a value that JSON cannot hold (NaN, infinity, an object, nested without end).
    """
    try:
        return (canonical_json(value) + "\n").encode("utf-8", errors="backslashreplace")
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: cannot be written as JSON: {error}") from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _RefusedError(f"key {twice[:80]!r} appears twice, expected once")
    return result


def _no_constant(word: str) -> NoReturn:
    raise _RefusedError(f"{word} found, expected a finite number")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _RefusedError(f"number {digits[:40]} is beyond float64, expected a finite number")
    return value
