"""`tito grade autograde`, and its three steps apart: `plan` writes jobs, `run` makes results, `merge` records them.

A result is on disk before it is merged, and one that is there is not made again: whatever is killed and when, the
next call goes on from there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from tito import show
from tito.course.errors import CourseError
from tito.instructor import assignment as assignments
from tito.instructor import cluster, outcomes, pool, sandbox
from tito.instructor.assignment import Assignment
from tito.instructor.course import GradingCourse
from tito.instructor.outcomes import Told
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
    run = _runner(assignment, count, wanted, scheduler)
    told = outcomes.of_jobs(folder, assignment, paths, rerun, level, run)
    with Writer(course) as writer:
        failed = _tell("Grading", assignment, paths, _merged(course, assignment, writer, told))
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
    planned = sorted((folder / "jobs").glob("*.json"))
    if not planned:
        raise CourseError(f"There are no jobs in {folder / 'jobs'}.", "`tito grade plan` writes them.")
    paths = shard_of(planned, shard)
    level = _level(wanted, None)
    told = outcomes.of_jobs(folder, assignment, paths, rerun, level, _runner(assignment, count, wanted, None))
    failed = _tell("Running", assignment, paths, told)
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
    told = outcomes.of_results(folder, paths)
    with Writer(course) as writer:
        failed = _tell("Merging", assignment, paths, _merged(course, assignment, writer, told))
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
        return "landlock" if wanted == "auto" else wanted  # the least that a result must have to be kept
    level = sandbox.choose(wanted)
    warning = "; a submission can read and change everything that you can" if level == "none" else ""
    show.line(f"Sandbox: {level}{warning}.")
    return level


def _runner(assignment: Assignment, count: int | None, wanted: str, scheduler: str | None) -> outcomes.Run:
    """How jobs are run: on a cluster, or on this machine with one at a time per core."""
    if scheduler:
        return lambda paths: cluster.on_cluster(paths, assignment, wanted, scheduler)
    return lambda paths: pool.on_this_machine(paths, assignment, wanted, count or os.cpu_count() or 1)


def _tell(doing: str, assignment: Assignment, paths: list[Path], told: Iterator[Told]) -> int:
    """Show what every job came to, as it comes; returns how many have no grade."""
    failed, width = 0, max(len(path.stem) for path in paths) if paths else 0
    try:
        with show.Progress(f"{doing} {assignment.name}", len(paths)) as progress, closing(told):
            for student, result, problem in told:
                failed += bool(problem)
                progress.step(_line(student.ljust(width), result, problem), bool(problem))
    except KeyboardInterrupt:
        show.line("Stopped. What was finished is kept: the same command goes on from there.")
        raise
    if failed:
        show.line(f"{failed} of {len(paths)} could not be graded or recorded; the same command tries them again.")
    return failed


def _merged(course: GradingCourse, assignment: Assignment, writer, told: Iterator[Told]) -> Iterator[Told]:
    """The same, each result in the gradebook before it is told."""
    with closing(told):
        for student, result, problem in told:
            yield student, result, _merge_one(course, assignment, writer, result) if result else problem


def _merge_one(course: GradingCourse, assignment: Assignment, writer, result: Result) -> str:
    """Record one result; why it could not be recorded, empty where it was."""
    if result.release != assignment.hash:
        return "Not merged: it was made with another release of the lesson. Run it again."
    try:
        writer.merge(assignment, result, _handed_in(course, result.student, assignment.name))
        return ""
    except CourseError as error:
        return f"Not merged: {error.message} {error.hint}"
    except Exception as error:  # a mistake of ours: the result is kept, and the others go on
        return f"Not merged: {type(error).__name__}: {error}"


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
