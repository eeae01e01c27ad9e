"""`pytest --reliability FILE` writes what was tried, case by case, after the session (see `reliability`)."""

from pathlib import Path

import pytest
from hypothesis import settings

from reliability import Collector, facts, summary, to_bytes

PLUGIN = "umiad-reliability"

settings.register_profile("umiad", deadline=None)  # no test asserts a wall-clock time
settings.load_profile("umiad")


def pytest_addoption(parser):
    parser.addoption(
        "--reliability", metavar="FILE", help="write what was tried per reliability case as JSON"
    )


def pytest_configure(config):
    target = config.getoption("--reliability")
    if target and not hasattr(config, "workerinput"):  # with xdist, the process that hears of all tests
        config.pluginmanager.register(Recorder(config, Path(target)), PLUGIN)


class Recorder(Collector):
    """Writes the file at the end of a session that was not interrupted, and shows the totals."""

    def __init__(self, config, target):
        super().__init__()
        self.target = config.invocation_params.dir / target
        self.facts = facts(config.getoption("markexpr") or "all")  # now: whatever is edited meanwhile
        self.found = None

    def pytest_sessionfinish(self, exitstatus):
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            from umiad.diskfile import write_atomic  # only now: nothing of umiad is imported before the tests

            self.found = self.to_json(self.facts)
            write_atomic(self.target, to_bytes(self.found))

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("reliability")
        if self.found is None:
            terminalreporter.write_line("nothing written: the session did not run to its end")
            return
        for line in summary(self.found["cases"]):
            terminalreporter.write_line(line)
