"""Into submitted/, and what was there before into superseded/: by renames, so that a kill loses nothing.

A submission is built whole in grading/ASSIGNMENT/incoming/STUDENT. Then the old one moves out and the new one in: two
renames. After a kill between them `repair` does the second.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tito.course.errors import CourseError
from tito.course.processes import remove_tree
from tito.instructor.assignment import Assignment
from tito.instructor.course import GradingCourse
from tito.instructor.intake import times
from tito.instructor.intake.model import Refusal

TIMESTAMP = "timestamp.txt"  # nbgrader's name


@dataclass(frozen=True)
class Stored:
    """What became of a submission: taken, replaced (an older one), unchanged, or older (than what is there)."""

    state: str
    when: datetime  # of what lies in submitted/ now


@contextmanager
def locked(course: GradingCourse, assignment: str) -> Iterator[None]:
    """Only one `collect` of an assignment at a time."""
    folder = course.grading(assignment)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "collect.lock", "w") as file:
        try:
            import fcntl  # not on Windows

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except OSError:
            raise CourseError(
                f"Another `tito grade collect` of {assignment} is running.", "Wait for its end and try again."
            ) from None
        yield


def repair(course: GradingCourse, assignment: str) -> list[str]:
    """End what a killed `collect` had begun; the students whose submission was brought in so."""
    incoming, mended = _incoming(course, assignment), []
    for built in sorted(incoming.iterdir()) if incoming.is_dir() else []:
        place = course.submitted(built.name, assignment)
        if built.name.startswith(".") or os.path.lexists(place):  # half built, or the old one did not yet move
            remove_tree(built)
        else:
            _move(built, place)
            mended.append(built.name)
    return mended


def put(course: GradingCourse, assignment: Assignment, student: str, data: bytes, when: datetime) -> Stored:
    """Bring one notebook in. The same bytes again change nothing, and an older one does not replace a newer one."""
    if not is_folder_name(student):
        raise Refusal("the student's id cannot be the name of a folder")
    when = when.astimezone(UTC).replace(microsecond=0)
    place, name = course.submitted(student, assignment.name), f"{assignment.notebook}.ipynb"
    if not os.path.lexists(place):
        _move(_build(course, assignment, student, data, when), place)
        return Stored("taken", when)
    before = time_of(place, name)
    if _holds(place, name, data):
        return Stored("unchanged", before)
    kept = course.superseded(student, assignment.name)
    if when < before:
        if not any(_holds(folder, name, data) for folder in kept.glob(f"{times.folder_name(when)}*")):
            _move(_build(course, assignment, student, data, when), _free(kept, when))
        return Stored("older", before)
    built = _build(course, assignment, student, data, when)
    _move(place, _free(kept, before))
    _move(built, place)
    return Stored("replaced", when)


def is_folder_name(student: str) -> bool:
    """Whether an id is one plain folder name, which keeps every path inside the course."""
    return bool(student) and not student.startswith(".") and not any(c in "/\\\0" for c in student)


def time_of(place: Path, notebook: str) -> datetime:
    """When the submission in `place` was handed in: its timestamp, else the age of its file."""
    try:
        when = times.read_stamp((place / TIMESTAMP).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        when = None
    file = place / notebook
    return when or times.from_seconds((file if file.exists() else place).stat().st_mtime)


def _incoming(course: GradingCourse, assignment: str) -> Path:
    return course.grading(assignment) / "incoming"


def _build(course: GradingCourse, assignment: Assignment, student: str, data: bytes, when: datetime) -> Path:
    """The whole submission beside its place; it has the student's name only when it is complete."""
    incoming = _incoming(course, assignment.name)
    building, built = incoming / f".{student}", incoming / student
    for folder in (building, built):
        if folder.exists():
            remove_tree(folder)
    building.mkdir(parents=True)
    _write(building / f"{assignment.notebook}.ipynb", data)
    _write(building / TIMESTAMP, times.stamp(when).encode())
    os.rename(building, built)
    return built


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _move(folder: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    os.rename(folder, place)


def _free(kept: Path, when: datetime) -> Path:
    """A folder of that time in superseded/ that is not there yet."""
    name = times.folder_name(when)
    number = 1
    while os.path.lexists(kept / (name if number == 1 else f"{name}-{number}")):
        number += 1
    return kept / (name if number == 1 else f"{name}-{number}")


def _holds(place: Path, name: str, data: bytes) -> bool:
    try:
        return (place / name).read_bytes() == data
    except OSError:
        return False
