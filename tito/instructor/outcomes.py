"""What every job comes to: results that are there, then those of the runs, each on disk before it is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from tito.course.errors import CourseError
from tito.course.files import write_atomic
from tito.instructor import job as jobs
from tito.instructor import pool, results
from tito.instructor.assignment import Assignment
from tito.instructor.result import Result

Told = tuple[str, Result | None, str]  # student; the result, None where there is none; what is wrong
Run = Callable[[list[Path]], Iterator[pool.Outcome]]


def of_jobs(
    folder: Path, assignment: Assignment, paths: list[Path], rerun: bool, level: str, run: Run
) -> Iterator[Told]:
    """A result or a problem for each of the jobs at `paths`; those without a result at `level` are run by `run`."""
    to_run = []
    for path in paths:
        try:
            job = _job(path, assignment)
        except CourseError as error:
            yield path.stem, None, f"Not graded: {error.message} {error.hint}"
            continue
        known = None if rerun else results.known(folder, job, level)
        if known:
            yield path.stem, known, ""
        else:
            to_run.append(path)
    with closing(run(to_run)) as outcomes:
        for path, text, problem in outcomes:
            yield _kept(folder, assignment, path, text) if text else (path.stem, None, f"Not graded: {problem}")


def of_results(folder: Path, paths: list[Path]) -> Iterator[Told]:
    """What is in the files of results; one that was made for another job than the planned one is a problem."""
    for path in paths:
        result, problem = results.read(path)
        plan = folder / "jobs" / path.name
        if result and result.student != path.stem:
            result, problem = None, f"{path} is the result of another student."
        elif result and plan.is_file() and results.made_for(plan) not in (None, result.job):
            result, problem = None, "Not merged: the submission was planned anew since. Run it again."
        yield path.stem, result, problem


def _job(path: Path, assignment: Assignment) -> jobs.Job:
    job = jobs.read(path)
    if (job.student, job.release) != (path.stem, assignment.hash):
        raise CourseError(
            f"{path} was planned for another student or another release of the lesson.",
            "`tito grade plan` writes it anew.",
        )
    return job


def _kept(folder: Path, assignment: Assignment, path: Path, text: str) -> Told:
    """Put a new result and its log on disk. A result that cannot be kept is none: it would be lost in a kill."""
    result = results.from_text(text)
    try:
        write_atomic(folder / "results" / path.name, text)
        write_atomic(folder / "logs" / f"{path.stem}.log", results.log_of(assignment, result))
    except OSError as error:
        return path.stem, None, f"Not kept in {folder}: {error.strerror}. Make room there and run it again."
    return path.stem, result, ""
