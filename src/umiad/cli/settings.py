"""`--set name=value` of the command line: values are JSON where they parse as JSON, else text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from umiad.errors import ConfigError


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """["fusion=none", "training.epochs=5"] -> {"fusion": "none", "training": {"epochs": 5}}.

    Raises ConfigError for text without "=" or for a name given twice.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {text!r}: expected name=value, for example fusion=none")
        *parents, last = name.split(".")
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
        if not isinstance(place, dict) or last in place:
            raise ConfigError(f"--set {text!r}: {name!r} is given twice")
        place[last] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
