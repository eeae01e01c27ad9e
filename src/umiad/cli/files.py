"""Options on how files are found and opened, the same in every command that has them."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from umiad.errors import ConfigError
from umiad.types import FileOptions, Reading, Window

Frame = Annotated[
    str | None,
    typer.Option(
        "--frame",
        metavar="WHICH",
        help="Frames of a multi-frame DICOM, slices of a NIfTI volume: a number from 0, "
        "FIRST:END[:STEP], middle, all.",
    ),
]
WindowOption = Annotated[
    str,
    typer.Option(
        "--window",
        metavar="W",
        help="Grey values of DICOM and NIfTI: file (what the file says), full, percentile, or CENTRE,WIDTH.",
    ),
]
Axis = Annotated[
    Literal["axial", "coronal", "sagittal"], typer.Option("--axis", help="Direction of a volume's slices.")
]
Nan = Annotated[
    Literal["error", "zero"], typer.Option("--nan", help="zero: values that are not finite count as 0.")
]
Follow = Annotated[
    bool, typer.Option("--follow", help="Take files behind links that lead out of the folder.")
]
ShowNames = Annotated[
    bool,
    typer.Option(
        "--show-names", help="Name DICOM files by their path (it may name a patient), not by a hash."
    ),
]


def parse_window(text: str) -> Window:
    """`--window` as a value. Raises ConfigError."""
    if text in ("file", "full", "percentile"):
        return text  # type: ignore[return-value]
    try:
        centre, width = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--window {text!r}: expected file, full, percentile, or CENTRE,WIDTH such as 40,80"
        ) from None
    if not (abs(centre) < float("inf") and 0 < width < float("inf")):
        raise ConfigError(f"--window {text!r}: the centre must be finite and the width above 0")
    return centre, width


def reading(
    window: str, axis: Literal["axial", "coronal", "sagittal"], nan: Literal["error", "zero"]
) -> Reading:
    """How grey values are taken, from the options. Raises ConfigError."""
    return Reading(parse_window(window), axis, nan)


def file_options(
    frame: str | None, how: Reading, *, follow: bool, show_names: bool, default: str = "one"
) -> FileOptions:
    """Everything on files, from the options. Raises InputError for a choice of frames that is none."""
    from umiad.io.frames import check

    return FileOptions(check(frame or default), how, follow=follow, show_names=show_names)
