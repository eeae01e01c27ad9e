"""Training faults that take minutes to provoke: T1 in full, T9, T10."""

import json
import os
import shutil
import subprocess

import numpy as np
import pytest

from test_faults import ALONE, check_kills, job

pytestmark = pytest.mark.slow


def test_T1_killed_at_thirty_seeded_points_and_resumed_ends_bit_equal(tmp_path):
    result = check_kills(tmp_path / "job", seed=20, delays=12, points=18)
    assert any(
        kill["first"] and kill["first"] > 1 for kill in result["kills"]
    )  # some went on from a checkpoint


def comma_locale(folder):
    """A locale that writes 1,5 for 1.5: one that is installed or can be compiled into `folder`; else None."""
    names = ("de_DE.UTF-8", "de_DE.utf8", "tr_TR.UTF-8", "tr_TR.utf8")
    listed = subprocess.run(["locale", "-a"], capture_output=True, text=True).stdout.split()
    if found := [name for name in names if name in listed]:
        return {"LC_ALL": found[0]}
    if shutil.which("localedef") is None:
        return None
    made = subprocess.run(
        ["localedef", "-i", "tr_TR", "-f", "UTF-8", str(folder / "tr_TR.UTF-8")], capture_output=True
    )
    return None if made.returncode else {"LC_ALL": "tr_TR.UTF-8", "LOCPATH": str(folder)}


def test_T9_hash_seed_time_zone_locale_clock_and_optimisation_change_nothing(tmp_path):
    surroundings = {
        "as it is": {},
        "hash seed 0": {"PYTHONHASHSEED": "0"},
        "hash seed 1": {"PYTHONHASHSEED": "1"},
        "random hash seed": {"PYTHONHASHSEED": "random"},
        "odd time zone": {"TZ": "Pacific/Chatham"},
        "time zone of 23 hours": {"TZ": "XXX+23:59"},
        "plain locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        "comma locale": comma_locale(tmp_path) or {"LC_ALL": "C"},
        "python -O": {"PYTHONOPTIMIZE": "1"},
        "python -OO": {"PYTHONOPTIMIZE": "2"},
        "clock that goes back": {},
    }
    digests = {}
    for number, (name, settings) in enumerate(surroundings.items()):
        folder = tmp_path / f"job {number}"
        folder.mkdir()
        words = ["--clock-back"] if "clock" in name else []
        done = job("fit", folder, *words, env={**ALONE, **settings})
        assert done.returncode == 0, (name, done.stderr)
        digests[name] = done.stdout.split()[-1]
    assert set(digests.values()) == {digests["as it is"]}, digests


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads memory from /proc")
def test_T10_ten_times_longer_needs_no_more_memory_and_no_more_files(tmp_path):
    (tmp_path / "a").mkdir()
    done = job("long", tmp_path / "a", 50)
    assert done.returncode == 0, done.stderr
    epochs, resident, files = np.array(json.loads(done.stdout.splitlines()[-1])).T
    late = epochs > 3
    slope = np.polyfit(epochs[late], resident[late], 1)[0]
    assert slope < 1e6, f"{slope:.0f} bytes an epoch"
    assert set(files[late]) == {files[3]}
