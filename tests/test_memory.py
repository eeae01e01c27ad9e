"""How much memory there is."""

import os

from umiad import memory


def test_pages_times_their_size(monkeypatch):
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__, raising=False)
    assert memory.total_memory() == 4_096_000


def test_a_system_that_does_not_say_is_none(monkeypatch):
    def sysconf(name):
        raise ValueError(name)

    monkeypatch.setattr(os, "sysconf", sysconf, raising=False)
    assert memory.total_memory() is None
