"""`tito grade autograde`, and its three steps apart: `plan` writes jobs, `run` makes results, `merge` records them.

A result is on disk before it is merged, and one that is there is not made again: whatever is killed and when, the
next call goes on from there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tito import show
from tito.course.errors import CourseError
from tito.course.files import write_atomic
from tito.instructor import assignment as assignments
from tito.instructor import job as jobs
from tito.instructor import pool, results, sandbox
from tito.instructor.assignment import Assignment
from tito.instructor.course import GradingCourse
from tito.instructor.plan import make_jobs, shard_of
from tito.instructor.result import Result
from tito.instructor.summary import show_summary


def autograde(
    course: GradingCourse, lesson: str, count: int | None, students: list[str], rerun: bool, wanted: str,
    cumulative: bool, scheduler: str | None,
) -> int:  # fmt: skip
    """Plan, run and merge; returns the exit code."""
    from tito.instructor.gradebook import Writer

    assignment = assignments.load(course, lesson)
    level = _level(wanted, scheduler)
    paths = make_jobs(course, assignment, students, cumulative)
    folder = course.grading(assignment.name)
    failed = 0
    with Writer(course) as writer, show.Progress(f"Grading {assignment.name}", len(paths)) as progress:
        for path, result, problem in _results(folder, assignment, paths, count, rerun, wanted, level, scheduler):
            if result:
                problem = _merge_one(course, assignment, writer, result)
            failed += bool(problem)
            progress.step(_line(path.stem, result, problem), bool(problem))
    show_summary(assignment, folder, [path.stem for path in paths])
    return 1 if failed else 0


def plan(course: GradingCourse, lesson: str, students: list[str], cumulative: bool) -> int:
    """Write jobs; returns the exit code."""
    assignment = assignments.load(course, lesson)
    paths = make_jobs(course, assignment, students, cumulative)
    folder = course.grading(assignment.name)
    show.line(f"{show.count(len(paths), 'job')} in {folder / 'jobs'}.")
    show.line(f"`tito grade run {folder}` runs them, here or in a copy of that folder on another machine.")
    return 0


def run(folder: Path, shard: str, count: int | None, rerun: bool, wanted: str) -> int:
    """Run the jobs of a folder that `plan` wrote; returns the exit code."""
    assignment = assignments.read(_there(folder / "assignment.json"))
    paths = shard_of(sorted((folder / "jobs").glob("*.json")), shard)
    level = _level(wanted, None)
    failed = 0
    with show.Progress(f"Running {assignment.name}", len(paths)) as progress:
        for path, result, problem in _results(folder, assignment, paths, count, rerun, wanted, level, None):
            failed += bool(problem)
            progress.step(_line(path.stem, result, problem), bool(problem))
    show.line(f"{show.count(len(paths) - failed, 'result')} in {folder / 'results'}; `tito grade merge` records them.")
    return 1 if failed else 0


def merge(course: GradingCourse, lesson: str) -> int:
    """Bring the results of a lesson into the gradebook; returns the exit code."""
    from tito.instructor.gradebook import Writer

    assignment = assignments.load(course, lesson)
    folder = course.grading(assignment.name)
    paths = sorted((folder / "results").glob("*.json"))
    if not paths:
        raise CourseError(f"There are no results in {folder / 'results'}.", "`tito grade run` makes them.")
    failed = 0
    with Writer(course) as writer, show.Progress(f"Merging {assignment.name}", len(paths)) as progress:
        for path in paths:
            result, problem = results.read(path)
            if result:
                problem = _merge_one(course, assignment, writer, result)
            failed += bool(problem)
            progress.step(_line(path.stem, result, problem), bool(problem))
    show_summary(assignment, folder, [path.stem for path in paths])
    return 1 if failed else 0


def _there(path: Path) -> Path:
    if not path.is_file():
        raise CourseError(f"{path} is missing.", "Name the folder that `tito grade plan` wrote, or a copy of it.")
    return path


def _level(wanted: str, scheduler: str | None) -> str:
    """The sandbox that will be used, said aloud; on a cluster each machine finds its own."""
    if scheduler:
        if wanted not in ("auto", "bwrap", "landlock", "none"):
            raise CourseError(f"There is no sandbox '{wanted}'.", "Choose auto, bwrap, landlock or none.")
        show.line(f"Sandbox: {wanted}, on each worker of {scheduler}.")
        return "landlock" if wanted == "auto" else wanted
    level = sandbox.choose(wanted)
    warning = "; a submission can read and change everything that you can" if level == "none" else ""
    show.line(f"Sandbox: {level}{warning}.")
    return level


def _results(
    folder: Path, assignment: Assignment, paths: list[Path], count: int | None, rerun: bool, wanted: str, level: str,
    scheduler: str | None,
) -> Iterator[tuple[Path, Result | None, str]]:  # fmt: skip
    """Every job's result: those that are there first, then the others, each on disk before it is told."""
    to_run = []
    for path in paths:
        known = None if rerun else results.known(folder, jobs.read(path), level)
        if known:
            yield path, known, ""
        else:
            to_run.append(path)
    if scheduler:
        outcomes = pool.on_cluster(to_run, assignment, wanted, scheduler)
    else:
        outcomes = pool.on_this_machine(to_run, assignment, wanted, count or os.cpu_count() or 1)
    for path, text, problem in outcomes:
        if text is None:
            yield path, None, f"Not graded: {problem}"
            continue
        result = results.from_text(text)
        write_atomic(folder / "results" / path.name, text)
        write_atomic(folder / "logs" / f"{path.stem}.log", results.log_of(assignment, result))
        yield path, result, ""


def _merge_one(course: GradingCourse, assignment: Assignment, writer, result: Result) -> str:
    """Record one result; why it could not be recorded, empty where it was."""
    if result.release != assignment.hash:
        return "Not merged: it was made with another release of the lesson. Run it again."
    try:
        writer.merge(assignment, result, _handed_in(course, result.student, assignment.name))
        return ""
    except CourseError as error:
        return f"Not merged: {error.message} {error.hint}"


def _handed_in(course: GradingCourse, student: str, name: str):
    """When it was handed in, as timestamp.txt says."""
    from nbgrader.utils import parse_utc

    path = course.submitted(student, name) / "timestamp.txt"
    try:
        return parse_utc(path.read_text(encoding="utf-8").strip()) if path.is_file() else None
    except (ValueError, OverflowError):
        return None


def _line(student: str, result: Result | None, problem: str) -> tuple[str, str, str]:
    """One submission in the list: its student, its points, a word on it."""
    if result is None:
        return student, "-", problem
    remark = problem or result.problem or ("please look: see its log" if result.flags else "")
    return student, f"{result.earned:g}/{result.max_score:g}", remark
