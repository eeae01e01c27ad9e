"""What scoring found in one file, as a value that goes to disk and comes back equal; pixels and maps stay out."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import PlainValidator, TypeAdapter, ValidationError

from umiad import strictjson
from umiad.errors import InputError, ModelFileError
from umiad.types import Finding, Region, framed

CHECK_DIGITS = 16
Suffix = Literal[".npy", ".png", ".nii"]


def _text(value: object) -> str:
    """Any text, also file names that are no Unicode, which pydantic's own check refuses."""
    if not isinstance(value, str):
        raise ValueError(f"{type(value).__name__} found, expected text")
    return value


Text = Annotated[str, PlainValidator(_text)]


@dataclass(frozen=True)
class ImageRecord:
    """The `Finding` of one image or frame without its name and map; `size` = (height, width) in pixels."""

    image_score: float
    p_value: float | None
    above_threshold: bool | None
    threshold: float | None
    regions: tuple[Region, ...]
    size: tuple[int, int]
    reason: Text
    notes: tuple[Text, ...]
    frame: int | None
    spacing: tuple[float, float] | None

    @classmethod
    def of(cls, finding: Finding) -> ImageRecord:
        """Take over what a finding says."""
        height, width = finding.anomaly_map.shape
        return cls(
            image_score=finding.image_score,
            p_value=finding.p_value,
            above_threshold=finding.above_threshold,
            threshold=finding.threshold,
            regions=finding.regions,
            size=(height, width),
            reason=finding.reason,
            notes=finding.notes,
            frame=finding.frame,
            spacing=finding.spacing,
        )

    def finding(self, name: str) -> Finding:
        """The finding again; its map is an empty view of the right size."""
        values = {key: getattr(self, key) for key in self.__dataclass_fields__ if key != "size"}
        blank = np.broadcast_to(np.float32(0), self.size)
        return Finding(name=framed(name, self.frame), anomaly_map=blank, **values)


@dataclass(frozen=True)
class Stored:
    """A map's or picture's kind and size in bytes. Its name is never read from disk but made from the stem."""

    suffix: Suffix
    size: int


@dataclass(frozen=True)
class FileRecord:
    """One file of the work list.

    `index`: its place in the whole list, from 0. `name`: its path as given, or what stands for the path of a
    DICOM file (`aliased`, not numbered yet). `frames`: how many the file holds, None where it is one image by
    nature. A file that cannot be read has an `error` (reason, hint) and no images.
    """

    index: int
    name: Text
    aliased: bool = False
    frames: int | None = None
    images: tuple[ImageRecord, ...] = ()
    map: Stored | None = None
    picture: Stored | None = None
    error: tuple[Text, Text] | None = None

    @property
    def highest(self) -> ImageRecord:
        """The image with the highest score, the first of equals; the picture is of it."""
        return max(self.images, key=lambda image: image.image_score)

    @property
    def picture_stem(self) -> str:
        """What a picture's name has after the file's stem: "-0012" for frame 12."""
        return "" if self.frames is None else f"-{self.highest.frame or 0:04d}"

    def outputs(self, stem: str) -> Iterator[tuple[str, int]]:
        """Names (relative to the results' folder) and sizes in bytes of its map and picture."""
        if self.map is not None:
            yield f"maps/{stem}{self.map.suffix}", self.map.size
        if self.picture is not None:
            yield f"pictures/{stem}{self.picture_stem}{self.picture.suffix}", self.picture.size

    def named(self, stem: str) -> dict[str, str | None]:
        """The names of map and picture, None for what was not asked for."""
        names = {name.partition("/")[0]: name for name, _ in self.outputs(stem)}
        return {"map": names.get("maps"), "picture": names.get("pictures")}

    def is_whole(self, folder: Path, stem: str) -> bool:
        """Whether map and picture are there in the size they were written in."""
        return all(_size(folder / name) == size for name, size in self.outputs(stem))

    def to_line(self) -> bytes:
        """One line of JSON: a check of the rest, and the record."""
        text = _plain(asdict(self))
        return f'["{_check(text)}",{text}]\n'.encode("ascii")

    @classmethod
    def from_line(cls, line: bytes, *, source: str) -> FileRecord:
        """The record of a whole line. Raises InputError for any other; `source` names the file."""
        try:
            value = strictjson.loads(line, source=source) if line.endswith(b"\n") else None
            if isinstance(value, list) and len(value) == 2 and value[0] == _check(_plain(value[1])):
                record = _adapter().validate_python(value[1])
                if record.error is None and not record.images:
                    raise ValueError("neither images nor an error")
                return record
        except (ModelFileError, ValidationError, ValueError) as error:
            raise InputError(source, f"holds a damaged line: {error}") from error
        raise InputError(source, "holds a line that is not whole")


class Names:
    """The names of files in results and the stems of their maps and pictures, given in the order of the list.

    DICOM files of equal content are numbered from the second on ("-2", ...), and so are stems that an earlier file
    has; a stem is as long as file systems allow. Files that cannot be read take no stem.
    """

    def __init__(self) -> None:
        self._times: dict[str, int] = {}
        self._used: set[str] = set()

    def of(self, record: FileRecord) -> tuple[str, str]:
        """Name and stem of the next file; the stem is "" where there is nothing to write."""
        name = record.name
        if record.aliased:
            self._times[name] = times = self._times.get(name, 0) + 1
            name = name if times == 1 else f"{name}-{times}"
        return name, "" if record.error is not None else self._unique(name)

    def _unique(self, name: str) -> str:
        stem = Path(Path(name).name.removesuffix(".gz")).stem[:200] or "image"
        chosen, number = stem, 1
        while chosen.casefold() in self._used:
            number += 1
            chosen = f"{stem}-{number}"
        self._used.add(chosen.casefold())
        return chosen


def by_index(record: FileRecord) -> tuple[str, str]:
    """Name and stem inside a shard, which does not see the other files: the place in the list."""
    return record.name, f"{record.index:06d}"


@cache
def _adapter() -> TypeAdapter[FileRecord]:
    return TypeAdapter(FileRecord)


def _plain(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False)


def _check(text: str) -> str:
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:CHECK_DIGITS]


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
