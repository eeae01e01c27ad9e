"""Layer 5: the command line. It parses, calls the public functions and prints; no mathematics here."""

from __future__ import annotations

import atexit
import gc
import sys


def main() -> None:
    """Run the command line; exit codes: 0 ok, 2 usage, 3 input, 4 disk, 5 model file, 130/143 signals."""
    from umiad.cli.app import app

    for stream in (sys.stdout, sys.stderr):  # file names may hold what the terminal's encoding lacks
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    atexit.register(gc.freeze)  # or Python looks for garbage among all of torch before it ends: half a second
    app()
