"""Warnings of the decoders, kept from the user's terminal and from turning into errors.

`warnings.catch_warnings` changes a setting of the whole process, so one lock guards it for all readers: what is
decoded in two threads at a time would otherwise restore each other's filters in the wrong order.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.RLock()


@contextmanager
def silent_warnings() -> Iterator[None]:
    """Drop every warning of the block."""
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def recorded_warnings(*, dropped: type[Warning]) -> Iterator[list[str]]:
    """Record the warnings of the block but those of the category `dropped`; the list holds their texts afterwards.

    It stays empty where the block raises.
    """
    messages: list[str] = []
    with _LOCK, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", dropped)
        yield messages
    messages += [str(each.message).strip() for each in caught]
