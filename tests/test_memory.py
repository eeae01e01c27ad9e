"""How much memory there is: the machine's, or the smaller share of its control group."""

import os

import pytest

from umiad import memory


@pytest.fixture
def group(monkeypatch, tmp_path):
    path = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CGROUP", path)
    monkeypatch.setattr(
        os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.__getitem__, raising=False
    )
    return path


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (None, 4_096_000),
        ("max", 4_096_000),
        ("1000000", 1_000_000),
        ("999999999999", 4_096_000),
        ("", 4_096_000),
    ],
)
def test_the_smaller_of_machine_and_control_group_counts(group, limit, expected):
    if limit is not None:
        group.write_text(f"{limit}\n", encoding="ascii")
    assert memory.total_memory() == expected


def test_a_system_that_does_not_say_is_none(monkeypatch):
    def sysconf(name):
        raise ValueError(name)

    monkeypatch.setattr(os, "sysconf", sysconf, raising=False)
    assert memory.total_memory() is None
