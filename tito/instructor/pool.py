"""Many jobs at once: threads that each drive a sandboxed process.

The unit of work is the same as on a cluster (cluster.py): a job's text in, a result's text out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from tito.course.errors import CourseError
from tito.instructor import assignment as assignments
from tito.instructor import job as jobs
from tito.instructor import sandbox, session
from tito.instructor.assignment import Assignment
from tito.instructor.run import run_job

Outcome = tuple[Path, str | None, str]  # the job's file; the result's text, or None and why it could not be graded
LONGEST = 300  # characters of an error that nobody foresaw


@functools.lru_cache(maxsize=4)
def _assignment(text: str) -> Assignment:
    return assignments.from_text(text)


def unit(job_text: str, assignment_text: str, wanted: str) -> str:
    """Grade one job in the sandbox that `wanted` means on this machine."""
    return run_job(jobs.from_text(job_text), _assignment(assignment_text), sandbox.choose(wanted)).as_text()


def on_this_machine(paths: list[Path], assignment: Assignment, wanted: str, count: int) -> Iterator[Outcome]:
    """Outcomes as they come; at most `count` submissions run at a time, and only their jobs are in memory."""
    text = assignment.as_text()
    with ThreadPoolExecutor(max_workers=count) as pool:
        try:
            yield from in_turn(paths, count, lambda path: pool.submit(unit, read(path), text, wanted), _some_of)
        except BaseException:  # Ctrl-C: nothing that was started may go on
            pool.shutdown(wait=False, cancel_futures=True)
            session.close_all()
            raise


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def in_turn(paths: list[Path], count: int, submit: Callable, some_of: Callable) -> Iterator[Outcome]:
    """Keep `count` submissions running and one more waiting each; yield those that `some_of` finds done."""
    waiting: dict[Future, Path] = {}
    left = iter(paths)
    while True:
        while len(waiting) < 2 * count and (path := next(left, None)) is not None:
            waiting[submit(path)] = path
        if not waiting:
            return
        for done in some_of(waiting):
            yield _outcome(waiting.pop(done), done)


def _some_of(waiting: dict[Future, Path]) -> list[Future]:
    return list(wait(waiting, return_when=FIRST_COMPLETED).done)


def _outcome(path: Path, done: Future) -> Outcome:
    try:
        return path, done.result(), ""
    except CourseError as error:
        return path, None, f"{error.message} {error.hint}".strip()
    except Exception as error:  # a mistake of ours or of the machine: no grade, and the others go on
        return path, None, f"{type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST]
