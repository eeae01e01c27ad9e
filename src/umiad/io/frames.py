"""Which frames or slices of a file are meant, in words that fit a command line."""

from __future__ import annotations

import re
from collections.abc import Sequence

from umiad.errors import InputError

ONE, MIDDLE, ALL = "one", "middle", "all"
_NUMBER = re.compile(r"\d{1,9}")
_RANGE = re.compile(r"(\d{1,9})?:(\d{1,9})?(?::(\d{1,9}))?")
EXPECTED = "one, middle, all, a number such as 12, or FIRST:END[:STEP] such as 40:90:5"


def check(choice: str) -> str:
    """Return `choice` if it is in the form of a choice. Raises InputError."""
    if choice in (ONE, MIDDLE, ALL) or _NUMBER.fullmatch(choice):
        return choice
    match = _RANGE.fullmatch(choice)
    if match is None or match[3] == "0":
        raise InputError("--frame", f"{choice!r} is no choice of frames, expected {EXPECTED}")
    return choice


def resolve(choice: str | Sequence[int], count: int, *, name: str, single: bool = False) -> Sequence[int]:
    """The numbers, counted from 0, of the frames that `choice` means in a file of `count` frames.

    "one": the only frame; "middle": number count // 2; "all"; "12"; "40:90:5" as Python slices; or numbers.
    A file that is one image by nature (`single`) has no frames to choose from: every choice means that image.

    Raises:
        InputError: "one" of a file with several (says how many), a number outside, an empty range, bad form.
    """
    if single:
        return range(1)
    if not isinstance(choice, str):
        return _inside(choice, count, name)
    check(choice)
    if choice == ALL:
        return range(count)
    if choice == MIDDLE:
        return range(count // 2, count // 2 + 1)
    if choice == ONE:
        if count != 1:
            reason = f"holds {count} frames or slices, expected one"
            raise InputError(
                name, reason, f"choose: --frame K (0 to {count - 1}), --frame middle or --frame all"
            )
        return range(1)
    if ":" in choice:
        first, end, step = (int(part) if part else None for part in (*choice.split(":"), "")[:3])
        found = range(count)[slice(first, end, step)]
        if not found:
            raise InputError(name, f"no frame in {choice} of its {count} frames or slices")
        return found
    return _inside([int(choice)], count, name)


def _inside(numbers: Sequence[int], count: int, name: str) -> Sequence[int]:
    if (last := max(numbers)) >= count:
        raise InputError(name, f"there is no frame {last}, it holds {count} (counted from 0)")
    return numbers
