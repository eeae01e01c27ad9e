"""The fast suite once more under `python -O`, which drops assert statements and sets `__debug__` to False.

pytest turns the asserts of test modules into plain raises before Python compiles them, so they hold under -O as
well (the first test shows it); pytest warns all the same, and that warning is let through. What -O removes
is every assert in the sources: there must be none that the package relies on.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PYTEST = [
    *(sys.executable, "-O", "-m", "pytest", "-q", "-p", "no:cacheprovider"),
    *("-W", "ignore:assertions not in test modules:pytest.PytestConfigWarning"),
    *("-W", "ignore:invalid escape sequence"),  # libraries are compiled anew for -O, and Python tells again
]
OPTIMISED = {**os.environ, "PYTHONOPTIMIZE": "1"}  # children of the tests too


def test_T9_asserts_of_test_modules_hold_under_O(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "def test_it():\n    assert not __debug__\n    assert 1 == 2, 'held'\n"
    )
    done = subprocess.run([*PYTEST, str(tmp_path)], capture_output=True, text=True, env=OPTIMISED)
    assert done.returncode == 1
    assert "AssertionError: held" in done.stdout


@pytest.mark.timeout(3600)
def test_T9_the_fast_suite_passes_under_O():
    done = subprocess.run(
        [*PYTEST, "-x", "tests"], capture_output=True, text=True, env=OPTIMISED, cwd=ROOT, timeout=3590
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
