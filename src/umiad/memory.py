"""How much memory this machine has."""

from __future__ import annotations

import os


def total_memory() -> int | None:
    """Bytes of memory of the machine; None where the system does not say. Opens no file, so detectors may ask.

    Limits of a container, which stand in files, are not seen.
    """
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
