"""What users hand in, as images: paths, arrays, or a sequence of them of mixed sizes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np

from umiad.errors import InputError
from umiad.io import read_frames
from umiad.preprocess import check_usable, from_array
from umiad.types import Image, Reading

DEFAULT_READING = Reading()

ImageInput: TypeAlias = str | os.PathLike[str] | np.ndarray | Image | Sequence[object]
"""A path, an array [H,W], [H,W,C] or [N,H,W], an `Image`, or a sequence of these."""


def iter_images(
    source: ImageInput, *, name: str = "array", reading: Reading = DEFAULT_READING
) -> Iterator[Image]:
    """Yield the images of `source` in order, decoding files one at a time.

    Arrays: uint8 means 0..255, uint16 0..65535, float 0..1; anything else is an InputError. A path is one
    image file, or a file of several frames or slices, all of which are yielded, read as `reading` says; for folders
    see `umiad.data.list_images`. Raises InputError for what cannot be used.
    """
    if isinstance(source, Image):
        yield source
    elif isinstance(source, np.ndarray):
        yield from from_array(source, name=name)
    elif isinstance(source, (str, os.PathLike)):
        for image in read_frames(source, reading=reading):
            check_usable(image)
            yield image
    elif isinstance(source, Sequence):
        for number, each in enumerate(source):
            if not isinstance(each, (str, os.PathLike, np.ndarray, Image)):
                raise _unusable(f"{name}[{number}]", each)
            yield from iter_images(each, name=f"{name}[{number}]", reading=reading)
    else:
        raise _unusable(name, source)


def _unusable(name: str, value: object) -> InputError:
    kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
    hint = "use tensor.numpy()" if kind.startswith("torch.") else ""
    return InputError(name, f"is a {kind}, expected a path, a NumPy array or a sequence of them", hint)
