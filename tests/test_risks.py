"""docs/risks.md and SECURITY.md: every hazard and every rule has a test, and the tests they name exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
NAMED = re.compile(r"`([^`]*::[^`]*)`")
SUBJECTS = {
    "taken for a normal one": 3,
    "taken for a diagnosis": 2,
    "shown for another": 2,
    "on the wrong side": 1,
    "stale or foreign model": 1,
    "patient's data leaks": 2,
    "Wrong intensities": 3,
    "in silence": 1,
    "promise too much": 4,
    "cannot be repeated": 1,
    "hostile file": 1,
    "hostile model": 1,
    "Memory or disk": 2,
}
"""Words of hazards that must stay on the page, and in how many lines at least."""


def rows(path):
    """Cells of the lines of tables, without headers."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [each for each in cells if set(each[0]) != {"-"} and each[0] not in ("hazard", "advisory")]


RISKS, RULES = rows(ROOT / "docs" / "risks.md"), rows(ROOT / "SECURITY.md")


@cache
def existing():
    """All tests, as file::function."""
    return {
        f"{path.name}::{node.name}"
        for path in TESTS.glob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


@pytest.mark.parametrize("row", RISKS + RULES, ids=lambda row: row[0][:40])
def test_every_line_names_tests_that_exist(row):
    assert len(row) == 4
    assert all(row)
    named = NAMED.findall(row[3])
    assert named
    assert NAMED.sub("", row[3]).strip(" ,") == ""
    assert sorted(set(named) - existing()) == []


def test_nothing_else_on_these_pages_looks_like_a_test_without_being_one():
    for path in (ROOT / "docs" / "risks.md", ROOT / "SECURITY.md"):
        assert sorted(set(NAMED.findall(path.read_text(encoding="utf-8"))) - existing()) == []


@pytest.mark.parametrize(("words", "least"), SUBJECTS.items())
def test_hazards_stay_on_the_page(words, least):
    assert sum(words in row[0] for row in RISKS) >= least


def test_files_that_rules_name_exist():
    for row in RULES:
        for name in re.findall(r"`([\w/]+\.(?:py|toml))`", row[2]):
            assert (ROOT / "src" / "umiad" / name).is_file() or (ROOT / name).is_file(), name


def test_the_page_claims_no_compliance():
    text = (ROOT / "docs" / "risks.md").read_text(encoding="utf-8")
    assert "claims no compliance" in text
    assert "not a medical device" in text
