"""umiad: find, score and outline what is abnormal in medical images, learning from normal images only.

Scores rise with abnormality and are no probabilities. Research use only.

>>> import umiad
>>> sorted(umiad.__all__)[:4]
['UmiadError', 'build', 'calibrate', 'evaluate']
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from umiad.errors import UmiadError

if TYPE_CHECKING:
    from umiad.api import build, calibrate, evaluate, fit, load, save, score
    from umiad.io import read_image

__version__ = "0.1.0"
__all__ = ["UmiadError", "build", "calibrate", "evaluate", "fit", "load", "read_image", "save", "score"]


def __getattr__(name: str) -> object:
    """Import the public names on first use, so that `import umiad` stays quick and leaves torch out."""
    if name in __all__:
        return getattr(importlib.import_module("umiad.io" if name == "read_image" else "umiad.api"), name)
    raise AttributeError(f"module 'umiad' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
