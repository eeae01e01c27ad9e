"""What `pytest --reliability FILE` writes, and the page that is made of it."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from reliability import ALSO, CASES, Collector, Tally, cases_in, cases_of, order, plain, summary

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def report(node, outcome="passed", when="call", *records):
    properties = [("reliability", record) for record in records]
    return SimpleNamespace(nodeid=f"tests/{node}", outcome=outcome, when=when, user_properties=properties)


def collected(*reports):
    collector = Collector()
    for each in reports:
        collector.pytest_runtest_logreport(each)
    return {each["case"]: each for each in collector.to_json({})["cases"]}


def counts(entry):
    return entry["tried"], entry["passed"], entry["failed"], entry["skipped"]


@pytest.mark.parametrize(
    ("node", "cases"),
    [
        ("test_a.py::test_I8_a_bomb", {"I8"}),
        ("test_a.py::test_I8_I9_two_cases[x]", {"I8", "I9"}),
        ("test_a.py::test_M2_M3_M4_refused[M3 huge channels]", {"M3"}),
        ("test_a.py::test_I10_ten_is_not_one", {"I10"}),
        ("test_a.py::test_in_I8_the_middle", set()),
        ("test_a.py::test_nothing", set()),
        ("test_detectors.py::test_battery[padim-quick-seeds]", {"D1"}),
        ("test_detectors.py::test_battery[padim-quick-batches]", {"D2"}),
        ("test_detectors.py::test_battery[padim-quick-monitor]", set()),
        ("test_io_raster.py::test_16_bit_ramp_keeps_its_depth[PNG]", {"I4"}),
    ],
)
def test_a_test_counts_for_the_cases_of_its_name(node, cases):
    assert cases_of(f"tests/{node}") == cases


def test_without_a_record_each_test_is_one_try():
    found = collected(
        report("test_a.py::test_I8_a[1]"),
        report("test_a.py::test_I8_a[2]", "failed"),
        report("test_a.py::test_I8_b", "skipped", "setup"),
    )["I8"]
    assert counts(found) == (2, 1, 1, 1)
    assert found["tests"] == ["test_a.py::test_I8_a", "test_a.py::test_I8_b"]
    assert found["what"] == "2 tests"


def test_what_a_test_recorded_takes_the_place_of_the_test():
    files = {"case": "I2", "tried": 7, "passed": 7, "what": "files"}
    cuts = {"case": "I1", "tried": 3, "passed": 2, "what": "cuts"}
    found = collected(
        report("test_a.py::test_I2_all", "passed", "call", files, cuts), report("test_a.py::test_I2_b")
    )
    assert counts(found["I2"]) == (8, 8, 0, 0)
    assert found["I2"]["what"] == "7 files; 1 test"
    assert counts(found["I1"]) == (3, 2, 1, 0)


def test_a_failed_test_has_a_try_that_failed_whatever_it_recorded():
    record = {"case": "I2", "tried": 7, "passed": 7, "what": "files"}
    found = collected(report("test_a.py::test_I2_all", "failed", "call", record))["I2"]
    assert counts(found) == (7, 6, 1, 0)


@pytest.mark.parametrize("record", [3, None, {}, {"case": "I2"}, {"case": "?", "tried": 1, "passed": 1}])
def test_a_record_that_cannot_be_read_leaves_the_test_as_one_try(record):
    found = collected(report("test_a.py::test_I2_all", "passed", "call", record))["I2"]
    assert counts(found) == (1, 1, 0, 0)


def test_what_fails_before_or_after_the_test_counts_as_failed():
    phases = [("setup", "passed"), ("call", "passed"), ("teardown", "failed")]
    found = collected(*(report("test_a.py::test_T1_a", outcome, when) for when, outcome in phases))["T1"]
    assert counts(found) == (1, 0, 1, 0)
    assert counts(collected(report("test_a.py::test_T1_a", "failed", "setup"))["T1"]) == (1, 0, 1, 0)


def test_a_test_that_skips_itself_is_skipped():
    phases = [("setup", "passed"), ("call", "skipped"), ("teardown", "passed")]
    found = collected(*(report("test_a.py::test_T1_a", outcome, when) for when, outcome in phases))["T1"]
    assert counts(found) == (0, 0, 0, 1)
    assert found["what"] == "skipped"


def test_every_case_is_listed_in_order_with_or_without_a_test():
    collector = Collector()
    collector.pytest_deselected([SimpleNamespace(nodeid="tests/test_a.py::test_T10_slow")])
    cases = collector.to_json({})["cases"]
    assert [each["case"] for each in cases] == list(CASES) == sorted(CASES, key=order)
    words = {each["case"]: each["what"] for each in cases}
    assert words["I3"] == "not in this session"
    assert words["T10"] == "not selected"
    assert words["D4"].startswith("no test: needs an accelerator")
    assert "T10 0/0 (1 left out)  not selected" in summary(cases)


def test_a_case_without_any_test_says_so(tmp_path):
    (tmp_path / "test_a.py").write_text("def test_I8_a():\n    pass\n")
    assert cases_in(tmp_path) == {"I8"}
    assert Tally().to_json("I3")["what"] == "no test"
    assert Tally().to_json("I3", exists=True)["what"] == "not in this session"


def test_every_test_that_is_assigned_to_a_case_exists():
    names = {
        f"{path.name}::{node.name}"
        for path in TESTS.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert {plain(test) for tests in ALSO.values() for test in tests} <= names
    assert set(ALSO) <= set(CASES)


@pytest.mark.parametrize(
    "spread",
    [pytest.param([], id="alone"), pytest.param(["-n", "2"], id="two processes", marks=pytest.mark.slow)],
)
def test_a_session_writes_the_file_and_shows_the_totals(tmp_path, spread):
    for name in ("conftest.py", "reliability.py"):
        shutil.copy(TESTS / name, tmp_path)
    (tmp_path / "test_a.py").write_text(
        "import pytest\n"
        "def test_I2_files(record_property):\n"
        "    record_property('reliability', {'case': 'I2', 'tried': 5, 'passed': 5, 'what': 'files'})\n"
        "@pytest.mark.parametrize('n', [1, 2])\n"
        "def test_I3_each(n):\n"
        "    assert n == 1\n"
    )
    words = ["-q", "-c", "/dev/null", "--rootdir", ".", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *words, *spread, "--reliability", "out/found.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "found.json").read_text(encoding="utf-8"))
    assert {"commit", "python", "torch", "platform", "when", "selection", "ran", "cases"} == found.keys()
    assert str(tmp_path) not in json.dumps(found)
    by_case = {each["case"]: each for each in found["cases"]}
    assert counts(by_case["I2"]) == (5, 5, 0, 0)
    assert counts(by_case["I3"]) == (2, 1, 1, 0)
    assert "I2  5/5  5 files" in done.stdout
    assert "I3  1/2 (1 failed)  2 tests" in done.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["found.json"]


# the page


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import reliability_table

    return reliability_table


def test_the_page_is_made_of_the_committed_numbers(table):
    assert table.PAGE.read_text(encoding="utf-8") == table.page(table.load())


def test_every_case_has_its_words(table):
    assert set(table.TRIED) == set(CASES)


def test_numbers_are_traced_from_json_to_the_cell(table):
    entry = {"case": "I2", "tests": ["test_x.py::test_a", "test_x.py::test_b", "test_y.py::test_c"]}
    entry |= {"tried": 1234, "passed": 1233, "failed": 1, "skipped": 2, "left_out": 0, "what": "1234 files"}
    line = table.row(entry)
    assert line.startswith("| I2 | ")
    assert "| 1,233 of 1,234: **1 failed**, 2 skipped | 1234 files |" in line
    assert line.endswith("| `test_x.py` (2), `test_y.py` (1) |")
    assert table.row(
        {**entry, "tried": 0, "passed": 0, "failed": 0, "tests": [], "what": "no test"}
    ).endswith("| no test | - |")


def test_ceilings_on_the_page_are_those_of_the_code(table):
    from umiad.io import Limits

    page = table.page(table.load())
    for value in (Limits().max_voxels, Limits().max_pixels, Limits().max_frames):
        assert f"{value:,}" in page
