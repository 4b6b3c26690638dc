"""Imports package files and runs progressive tests on them: `python -m tito.jobs.run_tests SPEC`.

This program does run student code: its standard streams lead nowhere, and what tito hears comes from a plugin of
pytest over a line of its own, never from printed text.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

from tito.jobs.line import Line


class Reporter:
    """A pytest plugin: tells how each test ended, and why it failed."""

    def __init__(self, line: Line):
        self.line = line

    def pytest_runtest_logstart(self, nodeid):
        self.line.say(event="start", test=name_of(nodeid))

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.line.say(event="failed", test=name_of(report.nodeid), message=message_of(report))
        elif report.when == "call" and report.passed:
            self.line.say(event="passed", test=name_of(report.nodeid))

    def pytest_collectreport(self, report):
        if report.failed:
            self.line.say(event="failed", test=name_of(report.nodeid), message=message_of(report))


def name_of(nodeid: str) -> str:
    """`tests/01_tensor/test_x.py::TestA::test_b` as `01_tensor: TestA.test_b`."""
    file, _, rest = nodeid.partition("::")
    return f"{Path(file).parent.name}: {rest.replace('::', '.') or Path(file).name}"


def message_of(report) -> str:
    """The last error of a report in words: pytest's own short form, without its traceback."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr).strip()
    if not crash:  # a file that could not be imported: the last line that pytest marked as the error
        errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
        text = errors[-1] if errors else text
    text = text.split("\nassert ")[0].removeprefix("AssertionError: ")
    return text if len(text) <= 4000 else text[:4000] + " ..."


def import_all(names: list[str], package_root: str, line: Line) -> bool:
    """Import each module and make sure that it is the one in `package_root`."""
    for name in names:
        try:
            file = importlib.import_module(name).__file__
        except BaseException as error:
            reason = traceback.format_exception_only(error)[-1].strip()
            line.say(event="failed", test=f"import {name}", message=reason[:4000])
            return False
        if not Path(file).resolve().is_relative_to(Path(package_root).resolve()):
            line.say(event="failed", test=f"import {name}", message=f"{file} was imported in its place")
            return False
    return True


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    line = Line(spec["private"], spec["mark"])
    import pytest

    from tito.jobs.kernel import bound_resources, use_package

    bound_resources(spec["memory_bytes"], spec["file_bytes"])
    use_package(spec["package_root"])
    if import_all(spec["imports"], spec["package_root"], line) and spec["tests"]:
        config = Path(spec["private"]) / "pytest.ini"
        config.write_text("[pytest]\n", encoding="utf-8")
        pytest.main(
            [*spec["tests"], "-c", str(config), f"--rootdir={Path(spec['tests'][0]).parent}", "--noconftest",
             "--import-mode=importlib", "-p", "no:cacheprovider", "-s", "-q", "--tb=short"],
            plugins=[Reporter(line)],
        )  # fmt: skip
    line.say(event="finished")
    os._exit(0)


if __name__ == "__main__":
    main()
