"""No test may be skipped for a reason that nobody agreed to."""

from __future__ import annotations

import re

import pytest

# A skip whose reason matches none of these makes the whole run fail.
ALLOWED_SKIPS = (
    re.compile(r"Requires: CUDA GPU SM >= \d+\.\d+"),
    re.compile(r"Requires: node, npm and libnss3"),
)


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return the reason of a skipped report without pytest's prefix."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return str(report.longrepr)


class SkipGuard:
    """Collects skipped reports and fails the session when a reason is not in `ALLOWED_SKIPS`."""

    def __init__(self) -> None:
        self.unexpected: list[str] = []

    def record(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        reason = skip_reason(report)
        if not any(pattern.fullmatch(reason) for pattern in ALLOWED_SKIPS):
            self.unexpected.append(f"{report.nodeid}: {reason}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.record(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.record(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unexpected:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.unexpected:
            terminalreporter.section("skips that tests/conftest.py does not allow", red=True)
            for line in self.unexpected:
                terminalreporter.write_line(line)
