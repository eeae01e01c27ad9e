"""How much memory this machine, or the container it stands for, has."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup/memory.max")


def total_memory() -> int | None:
    """Bytes of memory, or of what the control group (version 2) may have of it; None where the system does not say."""
    try:
        known = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
    try:
        limit = CGROUP.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return known
    return min(known, int(limit)) if limit.isdigit() else known
