"""CPU seconds of the tests, including the processes that they start and those forked for them."""

import resource
import time
from collections import defaultdict
from collections.abc import Generator

import pytest

of_forked_processes = 0.0
"""CPU seconds of the processes that the warm server has forked for this one (processes.py adds them up)."""
SLOWEST = 20
"""Number of lines of each table."""
_KEY = "cpu seconds"
_SEEN = pytest.StashKey[float]()


def _cpu() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime + of_forked_processes


class Costs:
    """A pytest plugin that reports the most expensive tests and files, and the total, at the end.

    The cost of a module's fixtures counts for the first test that uses them.
    """

    def __init__(self) -> None:
        self._tests: dict[str, float] = defaultdict(float)
        self._began = time.monotonic()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        item.stash[_SEEN] = _cpu()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        now = _cpu()
        report.user_properties = [*report.user_properties, (_KEY, now - item.stash[_SEEN])]
        item.stash[_SEEN] = now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == _KEY and isinstance(value, float):
                self._tests[report.nodeid] += value

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        files: dict[str, float] = defaultdict(float)
        for test, seconds in self._tests.items():
            files[test.partition("::")[0]] += seconds
        terminalreporter.section("CPU seconds of tests and files")
        for table in (self._tests, files):
            for name in sorted(table, key=table.__getitem__, reverse=True)[:SLOWEST]:
                terminalreporter.write_line(f"{table[name]:8.1f}  {name}")
            terminalreporter.write_line("")
        total, wall = sum(self._tests.values()), time.monotonic() - self._began
        terminalreporter.write_line(f"{len(self._tests)} tests: {total:.0f} CPU seconds, {wall:.0f} seconds in all")
