"""Candidates: named settings of detectors that `tune` compares, from a TOML file or from presets."""

from __future__ import annotations

import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator

from umiad import detectors
from umiad.config import Config, nearest
from umiad.diskfile import MIB, read_regular
from umiad.errors import ConfigError, InputError, ModelFileError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9+=_.-]{0,63}")
"""Names of candidates are names of files."""
SHARED = ("size", "seed", "weights", "preset")
"""Fields of a detector's configuration that are no settings of a candidate."""


class Candidate(Config):
    """A detector under a preset with `settings` on top, as `settings` of `umiad.build`.

    `name`: letters, digits and + = _ . - (64 at most); a file is named after it. Size, seed and weights are not
    among the settings: all candidates share them.
    """

    name: str
    detector: str
    preset: str = "default"
    settings: dict[str, Any] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _file_safe(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError("expected 1 to 64 letters, digits and + = _ . - and no mark at its start")
        return value

    @field_validator("settings")
    @classmethod
    def _own(cls, value: dict[str, Any]) -> dict[str, Any]:
        if shared := [name for name in SHARED if name in value]:
            raise ValueError(f"{shared[0]!r} is no setting of a candidate")
        if not isinstance(value.get("training", {}), dict):
            raise ValueError("'training' is no table, expected for example training.epochs = 5")
        return value

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain values. Raises ConfigError, also for a detector or preset that is unknown."""
        if unknown := sorted(values.keys() - cls.model_fields.keys()):
            raise ConfigError(f"unknown key {unknown[0]!r}{nearest(unknown[0], list(cls.model_fields))}")
        found = super().parse(values)
        presets = detectors.detector_class(found.detector).presets
        if found.preset not in presets:
            raise ConfigError(
                f"unknown preset {found.preset!r} for {found.detector}{nearest(found.preset, list(presets))}"
            )
        return found

    def arguments(self) -> list[str]:
        """The words of `umiad fit` that choose this detector and these settings."""
        chosen = ["--detector", self.detector, "--preset", self.preset]
        return chosen + [word for text in setting_texts(self.settings) for word in ("--set", text)]


def setting_texts(settings: Mapping[str, Any]) -> list[str]:
    """What `--set` takes: {"training": {"epochs": 5}, "fusion": "none"} -> ["training.epochs=5", "fusion=none"]."""
    return [f"{name}={_text(value)}" for name, value in _flat(settings)]


def read_candidates(path: str | os.PathLike[str]) -> list[Candidate]:
    """Candidates from a TOML file: tables [[candidate]] with name, detector, preset and [candidate.settings].

    Raises:
        InputError: no such file, or no TOML.
        ConfigError: unknown keys, detectors or presets (the nearest is named), no candidate, equal names.
    """
    try:
        values = tomllib.loads(read_regular(Path(path), limit=MIB).decode("utf-8"))
    except (ModelFileError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(path, f"is no TOML file of candidates: {error}") from error
    if unknown := sorted(values.keys() - {"candidate"}):
        raise ConfigError(f"{path}: unknown key {unknown[0]!r}{nearest(unknown[0], ['candidate'])}")
    rows = values.get("candidate", [])
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{path}: no candidate, expected tables [[candidate]]")
    found = []
    for number, row in enumerate(rows, start=1):
        try:
            found.append(Candidate.parse(row))
        except ConfigError as error:
            raise ConfigError(f"{path}: candidate {number}: {error}") from error
    check_names(found)
    return found


def preset_candidates(
    detector: str, *, preset: str = "default", variants: Sequence[Mapping[str, Any]] = ()
) -> list[Candidate]:
    """The presets default, paper and quick of a detector, as far as they differ, and `preset` with each variant.

    Raises ConfigError for an unknown detector or preset, and for a variant that cannot be a setting.
    """
    rows: list[dict[str, Any]] = []
    seen = []
    there = [
        name for name in ("default", "paper", "quick") if name in detectors.detector_class(detector).presets
    ]
    for name in dict.fromkeys((preset, *there)):
        config = detectors.preset_config(detector, name).model_copy(update={"preset": ""})
        if config not in seen:
            seen.append(config)
            rows.append({"name": name, "detector": detector, "preset": name})
    for variant in variants:
        text = re.sub(r"[\[\]{}\"\s]+", "", "+".join([preset, *setting_texts(variant)]))
        text = re.sub(r"[^A-Za-z0-9+=_.-]+", "_", text)
        rows.append({"name": text[:60], "detector": detector, "preset": preset, "settings": dict(variant)})
    taken: set[str] = set()
    for row in rows:
        stem, number = row["name"], 2
        while row["name"].lower() in taken:
            row["name"], number = f"{stem}-{number}", number + 1
        taken.add(row["name"].lower())
    return [Candidate.parse(row) for row in rows]


def check_names(candidates: Sequence[Candidate]) -> None:
    """Refuse no candidates, and names that are equal or differ in case only. Raises ConfigError."""
    if not candidates:
        raise ConfigError("no candidate given")
    taken: dict[str, str] = {}
    for each in candidates:
        if (key := each.name.lower()) in taken:
            raise ConfigError(
                f"two candidates are named {taken[key]!r} and {each.name!r}, expected other names"
            )
        taken[key] = each.name


def as_toml(candidate: Candidate) -> str:
    """The candidate as a table of a TOML file of candidates; what TOML cannot hold (null) becomes a comment."""
    facts = {"name": candidate.name, "detector": candidate.detector, "preset": candidate.preset}
    lines = ["[[candidate]]", *(f"{key} = {_toml(value)}" for key, value in facts.items())]
    if candidate.settings:
        lines.append("[candidate.settings]")
    for name, value in _flat(candidate.settings):
        key = ".".join(
            part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else _toml(part) for part in name.split(".")
        )
        lines.append(f"{key} = {_toml(value)}" if value is not None else f"# {key}=null has no form in TOML")
    return "\n".join(lines) + "\n"


def quoted(words: Sequence[str]) -> str:
    """Words as one line for a shell."""
    return shlex.join(words)


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Nested tables as pairs of a dotted name and a value."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _text(value: Any) -> str:
    """The value as `--set` reads it: JSON, or plain text where that is no JSON."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except json.JSONDecodeError:
            return value
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _toml(value: Any) -> str:
    """Numbers, texts, truth values and lists of these: there JSON and TOML agree, but for DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
