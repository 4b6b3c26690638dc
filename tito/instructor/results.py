"""Results on disk: found again, read with care, and told as a log for a person."""

from __future__ import annotations

from pathlib import Path

from tito.course.errors import CourseError
from tito.instructor import job as jobs
from tito.instructor.assignment import Assignment
from tito.instructor.hidden import plain
from tito.instructor.job import Job
from tito.instructor.result import Result
from tito.instructor.result import from_text as from_text
from tito.instructor.sandbox import LEVELS


def read(path: Path) -> tuple[Result | None, str]:
    """The result in a file, or None and what is wrong with it."""
    try:
        return from_text(path.read_text(encoding="utf-8")), ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"{path} cannot be read ({type(error).__name__}). Run this submission again."


def known(folder: Path, job: Job, level: str) -> Result | None:
    """The result of exactly this job, made in a sandbox at least as strong as `level`; None where there is none."""
    path = folder / "results" / f"{job.student}.json"
    result = read(path)[0] if path.is_file() else None
    if result is None or result.job != job.key or result.sandbox not in LEVELS:
        return None
    return result if LEVELS.index(result.sandbox) <= LEVELS.index(level) else None


def made_for(path: Path) -> str | None:
    """The key of the job in a file; None where it cannot be read."""
    try:
        return jobs.read(path).key
    except CourseError:
        return None


def log_of(assignment: Assignment, result: Result) -> str:
    """Everything about one submission, for the instructor."""
    lines = [
        f"{result.student}: {assignment.name}, {result.earned:g} of {result.max_score:g} points",
        f"sandbox {result.sandbox}, release {result.release[:12]}, {result.seconds:g} s",
    ]
    lines += [f"problem: {result.problem}"] if result.problem else []
    lines += [f"please look: {flag}" for flag in result.flags]
    lines += [f"found: {finding}" for finding in result.findings]
    lines.append("")
    for check in result.checks:
        lines.append(f"{check.earned:g}/{check.points:g}  {check.id}  {assignment.titles.get(check.id, '')}")
        lines += [f"        {line}" for line in check.message.splitlines()]
    return plain("\n".join(lines)) + "\n"  # a message may be a student's, and the log is read on a terminal
