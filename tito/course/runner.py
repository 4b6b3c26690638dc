"""Runs of student code: a learner's notebook check by check, and the progressive tests of the package.

Everything happens in processes of their own with limits of time, memory and output (tito/jobs); this side judges
by what they report. A check passes only when its own unchanged cell ran to the end in this very run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from tito.course import verdict
from tito.course.manifest import Check, Lesson
from tito.course.notebook import Cell, digest, find_check, read
from tito.course.processes import Job, environment, private_folder


@dataclass(frozen=True)
class Limits:
    """What one run may use. `memory_bytes` holds per process, and for the kernel with all it started."""

    seconds: float = 300.0
    cell_seconds: float = 120.0
    output_bytes: int = 2_000_000
    memory_bytes: int = 4 * 2**30
    file_bytes: int = 2**30

    def as_spec(self) -> dict:
        return dict(vars(self))


@dataclass(frozen=True)
class CheckResult:
    """How one check ended. `message` says why it failed; `cell` is its number in the notebook, None if it is gone."""

    id: str
    title: str
    points: int
    passed: bool
    message: str = ""
    cell: int | None = None

    @property
    def earned(self) -> int:
        return self.points if self.passed else 0


@dataclass(frozen=True)
class Run:
    """One run of a notebook. `problem` concerns the run as a whole; `notes` are other cells that failed."""

    checks: tuple[CheckResult, ...]
    problem: str | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.problem is None and bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def earned(self) -> int:
        return sum(check.earned for check in self.checks)

    @property
    def points(self) -> int:
        return sum(check.points for check in self.checks)


@dataclass(frozen=True)
class TestRun:
    """How the progressive tests ended: how many passed, what failed with which message, and what stopped them."""

    __test__ = False  # the name is not pytest's

    passed: int = 0
    failed: tuple[tuple[str, str], ...] = ()
    problem: str | None = None

    @property
    def ok(self) -> bool:
        return self.problem is None and not self.failed


@dataclass
class _Story:
    """What a job told, put together event by event."""

    ended: dict[int, dict] = field(default_factory=dict)  # number of the cell -> its "end" event
    running: int | None = None
    stopped: dict | None = None
    finished: bool = False

    def take(self, event: dict) -> None:
        kind = event["event"]
        if kind == "start":
            self.running = event["cell"]
        elif kind == "end":
            self.ended[event["cell"]] = event
            self.running = None
        elif kind == "stopped":
            self.stopped = event
        elif kind == "finished":
            self.finished = True


def run_notebook(
    lesson: Lesson,
    path: Path | None = None,
    package_root: Path | None = None,
    limits: Limits | None = None,
    tell=lambda done, total: None,
) -> Run:
    """Run the notebook at `path` (default: the learner's) from top to bottom in a fresh kernel.

    `package_root` holds the `tinytorch` that the notebook imports (default: the course's). The notebook is only
    read, never written. `tell(done, total)` hears how many cells have run. Raises CourseError where the file is
    missing or no notebook.
    """
    limits = limits or Limits()
    cells = read(path or lesson.notebook)
    code = [cell for cell in cells if cell.kind == "code" and cell.source.strip()]
    started = time.monotonic()
    story, last_words = _run_cells(code, package_root or lesson.root, limits, tell)
    where = _names(cells)
    problem = verdict.problem_of_run(story, where, limits, last_words) or verdict.problem_of_cells(
        story.ended, where, limits
    )
    checks = tuple(_judge(check, lesson, cells, story, where, limits) for check in lesson.checks)
    own = {result.cell for result in checks}
    notes = tuple(
        f"{where[number]} failed: {verdict.sentence(event['error'], where, limits)}"
        for number, event in story.ended.items()
        if number not in own and event["error"] and not verdict.is_problem(event)
    )
    return Run(checks, problem, time.monotonic() - started, notes)


def _names(cells: tuple[Cell, ...]) -> dict[int, str]:
    return {cell.number: cell.label for cell in cells}


def _run_cells(code: list[Cell], package_root: Path, limits: Limits, tell) -> tuple[_Story, str]:
    """Let tito.jobs.run_notebook run the cells; whatever happens, it is gone when this returns."""
    story = _Story()
    with private_folder() as private:
        spec = limits.as_spec() | {
            "cells": [[cell.number, cell.source] for cell in code],
            "package_root": str(package_root),
        }
        # The job keeps the time itself; ours is for a job that cannot.
        deadline = time.monotonic() + limits.seconds + 10.0
        with Job("tito.jobs.run_notebook", spec, environment(private), private) as job:
            try:
                for event in job.events(deadline):
                    story.take(event)
                    tell(len(story.ended), len(code))
            except TimeoutError:
                story.stopped = {"why": "time", "cell": story.running, "code": None}
            return story, job.last_words()


def _judge(check: Check, lesson: Lesson, cells, story: _Story, where: dict[int, str], limits: Limits) -> CheckResult:
    """The result of one check, from its cell as it is now and from how that cell ended."""
    cell = find_check(cells, check)
    number = cell.number if cell else None

    def failed(message: str) -> CheckResult:
        return CheckResult(check.id, check.title, check.points, False, message, number)

    if cell is None:
        return failed(verdict.DELETED.format(lesson=lesson.number))
    if cell.kind != "code":
        return failed(verdict.NOT_CODE)
    if digest(cell.source) != check.digest:
        return failed(verdict.CHANGED.format(lesson=lesson.number))
    if number not in story.ended:
        return failed(verdict.not_reached(story, number, where))
    event = story.ended[number]
    if event["late"]:
        return failed(verdict.late(limits))
    if event["error"]:
        return failed(verdict.sentence(event["error"], where, limits))
    return CheckResult(check.id, check.title, check.points, True, "", number)


def run_progressive(
    lessons: list[Lesson],
    package_root: Path,
    limits: Limits | None = None,
    imports: list[Lesson] | None = None,
    tell=lambda done: None,
) -> TestRun:
    """Import the package files of `imports` from `package_root`, then run the tests of `lessons` against them."""
    limits = limits or Limits()
    passed, failed, running = 0, [], ""
    with private_folder() as private:
        env = environment(private) | {"MPLBACKEND": "Agg"}
        spec = limits.as_spec() | {
            "imports": [lesson.module for lesson in (lessons if imports is None else imports)],
            "package_root": str(package_root),
            "tests": [str(lesson.tests) for lesson in lessons if lesson.tests.is_dir()],
        }
        finished, timed_out = False, False
        with Job("tito.jobs.run_tests", spec, env, private) as job:
            try:
                for event in job.events(time.monotonic() + limits.seconds):
                    if event["event"] == "start":
                        running = event["test"]
                    elif event["event"] == "failed":
                        failed.append((event["test"], event["message"]))
                    elif event["event"] == "passed":
                        passed += 1
                        tell(passed)
                    elif event["event"] == "finished":
                        finished = True
            except TimeoutError:
                timed_out = True
            words = job.last_words()
    problem = None if finished else verdict.problem_of_tests(timed_out, running, limits, words)
    return TestRun(passed, tuple(failed), problem)
