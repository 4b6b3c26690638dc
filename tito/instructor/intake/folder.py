"""A folder (or a zip of one) with the students' own names: theirs as nbgrader keeps them, or one file each.

    STUDENT/memoization.ipynb                          STUDENT.ipynb
    STUDENT/17_memoization/memoization.ipynb           STUDENT_memoization.ipynb   memoization_STUDENT.ipynb

The time is that of nbgrader's timestamp.txt beside the notebook, else the file's own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from pathlib import PurePath

from tito.instructor.assignment import Assignment
from tito.instructor.intake import people, times
from tito.instructor.intake.choose import is_zip
from tito.instructor.intake.model import Delivery, File, Refusal, shown

LESSON = re.compile(r"\d\d_\w+")
MOST_STAMP = 1000  # bytes of a timestamp.txt


def matches(files: list[File]) -> int:
    """Any file fits; the other forms are asked first."""
    return 0


def deliveries(files: list[File], roster: people.Roster, assignment: Assignment) -> list[Delivery]:
    """One for each student's folder or file."""
    theirs = defaultdict(list)
    for file in _without_root(files, roster):
        if len(file.path) > 1 or file.folder:
            theirs[file.path[0]].append(file)
        else:
            owner = _owner(file, roster, assignment)
            if owner is not None:
                theirs[owner].append(_renamed(file, assignment))
    return [
        people.delivery(shown(name), roster.with_id(name), f"'{shown(name)}'", files=of_lesson(own, assignment))
        for name, own in sorted(theirs.items())
    ]


def of_lesson(files: list[File], assignment: Assignment) -> tuple[File, ...]:
    """A student's files without those of other lessons, with the time that a timestamp.txt gives them."""
    inside = [file for file in files if assignment.name in file.path[1:-1]]
    own = inside or [file for file in files if not any(LESSON.fullmatch(part) for part in file.path[1:-1])]
    stamps = {file.path[:-1]: _stamp(file) for file in own if file.name == "timestamp.txt" and not file.problem}
    return tuple(replace(file, when=stamps.get(file.path[:-1]) or file.when) for file in own)


def _stamp(file: File):
    try:
        return times.read_stamp(file.read()[:MOST_STAMP].decode("utf-8", "replace"))
    except Refusal:
        return None


def _without_root(files: list[File], roster: people.Roster) -> list[File]:
    """`submitted/alice/…` -> `alice/…` where a zip holds one folder that holds the students'."""
    roots = {file.path[0] for file in files}
    below = [replace(file, path=file.path[1:]) for file in files if len(file.path) > 1]
    if len(roots) != 1 or roster.with_id(*roots) or not any(roster.with_id(file.path[0]) for file in below):
        return files
    return below


def _owner(file: File, roster: people.Roster, assignment: Assignment) -> str | None:
    """Whose a file is that lies in no folder; None where it is no submission at all."""
    stem = PurePath(file.path[0]).stem if file.is_notebook or is_zip(file) else file.path[0]
    if roster.with_id(stem):
        return stem
    if not (file.is_notebook or is_zip(file) or file.problem):
        return None
    return stem.removesuffix(f"_{assignment.notebook}").removeprefix(f"{assignment.notebook}_")


def _renamed(file: File, assignment: Assignment) -> File:
    """A file named after the student is the notebook."""
    return replace(file, name=f"{assignment.notebook}.ipynb") if file.is_notebook else file
