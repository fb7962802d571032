"""A failure is named when it happens, on a line of its own, with the instruction set it ran under, if that is capped.

pytest prints an `F` and keeps the name for the end, which on a slow machine is minutes away.
"""

import os

import pytest

CAPPED = os.environ.get("ATEN_CPU_CAPABILITY", "")  # two such runs may write to one terminal


class Naming:
    """Lines of failures among the dots."""

    def __init__(self, terminal):
        self.terminal = terminal

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.say(f"FAILED {report.nodeid} [{report.when}] {CAPPED} {reason(report)}".rstrip())

    @pytest.hookimpl(trylast=True)
    def pytest_collectreport(self, report):
        if report.failed:
            self.say(f"NOT COLLECTED {report.nodeid}")

    def say(self, line):
        self.terminal.write_line(f"\n{line}", red=True)  # dots precede it
        self.terminal.flush()


def reason(report):
    """First line of the exception's message, if there is one."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message.partition("\n")[0] if crash is not None else ""


def name_failures(config):
    """Only the process with the terminal prints; workers of pytest-xdist have none to look at."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Naming(terminal), "naming")
