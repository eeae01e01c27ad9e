"""From files to cases, and from cases to pixels: frames, aliases, and the one way in which a case is read."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np

from umiad.errors import InputError
from umiad.io import DEFAULT_LIMITS, frames, kind_of_file, read_frames, read_image, read_mask, read_stack
from umiad.io.files import read_bytes
from umiad.types import Case, FileOptions, Image

ALIAS_DIGITS = 12
_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")


def expand(cases: Iterable[Case], files: FileOptions) -> tuple[Case, ...]:
    """Each file's cases: one, or one per frame that `files.frames` means; frames of a file stay together.

    A file that cannot be opened stays one case: reading it says what is wrong. Raises InputError for a choice of
    frames that is none, or that a file does not have.
    """
    frames.check(files.frames)
    aliases = Aliases(show_names=files.show_names)
    return tuple(each for case in cases for each in _frames_of(case, files, aliases.of(case.path)))


def _frames_of(case: Case, files: FileOptions, alias: str) -> Iterator[Case]:
    plain = replace(case, reading=files.reading, alias=alias)
    if files.frames == frames.ONE or not kind_of_file(case.path).startswith(("DICOM", "NIfTI")):
        yield plain
        return
    try:
        stack = read_stack(case.path, reading=files.reading)
    except InputError:
        yield plain
        return
    if stack.single:
        yield plain
        return
    group = case.group or alias or str(case.path)
    for number in frames.resolve(files.frames, stack.count, name=alias or str(case.path)):
        yield replace(plain, frame=number, group=group)


def case_pixels(case: Case) -> Image:
    """The pixels of a case, from its file or from memory; named as the case is. Raises InputError."""
    if case.image is not None:
        return case.image
    choice = frames.ONE if case.frame is None else case.frame
    try:
        image = read_image(case.path, frame=choice, reading=case.reading)
    except InputError as error:
        raise renamed(error, case) from error
    return replace(image, name=case.name)


def case_images(cases: Iterable[Case]) -> Iterator[Image | InputError]:
    """The pixels of cases, in order; slices of one file that follow each other are read in one pass.

    A case that cannot be read leaves its InputError in its place.
    """
    for _, run in groupby(cases, key=_file_of):
        slices = list(run)
        done = 0
        if len(slices) > 1:
            first, numbers = slices[0], [each.frame for each in slices if each.frame is not None]
            with suppress(InputError):  # the rest is then read one by one, each with its own error
                for image in read_frames(first.path, frames=numbers, reading=first.reading):
                    yield replace(image, name=slices[done].name)
                    done += 1
        for case in slices[done:]:
            try:
                yield case_pixels(case)
            except InputError as error:
                yield error


def _file_of(case: Case) -> tuple[object, ...]:
    """Equal for slices that can be read together, and different for everything else."""
    return (case.path, case.reading) if case.frame is not None and case.image is None else (id(case),)


def case_masks(case: Case, size: tuple[int, int]) -> np.ndarray:
    """The united mask of a case, bool [H,W] of `size`. Raises InputError."""
    return read_mask(case.masks, size=size, frame=case.frame, reading=case.reading)


def renamed(error: InputError, case: Case) -> InputError:
    """The error of a case's file under the case's own name, which may be an alias."""
    return InputError(case.name, error.reason, error.hint)


def alias_of(path: str | os.PathLike[str]) -> str:
    """What a DICOM file is called where its path may name a patient: "dicom-" and 12 digits; "" for others.

    The digits are the first of the SHA-256 of the file's content, so the file can be found again with any tool that
    prints those; where it cannot be read, of its path.
    """
    if kind_of_file(path) != "DICOM" and Path(path).suffix.lower() not in _DICOM_SUFFIXES:
        return ""
    try:
        content = read_bytes(path, limit=DEFAULT_LIMITS.max_bytes)
    except InputError:
        content = os.fsencode(path)
    return f"dicom-{hashlib.sha256(content).hexdigest()[:ALIAS_DIGITS]}"


class Aliases:
    """Names for the DICOM files of one job; those of equal content are numbered from the second on ("-2", ...)."""

    def __init__(self, *, show_names: bool) -> None:
        self._shown = show_names
        self._times: Counter[str] = Counter()

    def of(self, path: Path) -> str:
        """What to call the file, "" for its path."""
        alias = "" if self._shown else alias_of(path)
        self._times[alias] += 1
        return alias if not alias or self._times[alias] == 1 else f"{alias}-{self._times[alias]}"


__all__ = ["Aliases", "alias_of", "case_images", "case_masks", "case_pixels", "expand", "renamed"]
