"""Moodle's "Download all submissions", in a zip or unpacked.

    Jane Doe_1234567_assignsubmission_file_/memoization.ipynb      a folder for each participant
    Jane Doe_1234567_assignsubmission_file_memoization.ipynb       without folders

The number is the participant's in this one assignment, so it is the name that tells who it is. The time is that of the
file in the zip.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace

from tito.instructor.assignment import Assignment
from tito.instructor.intake import people
from tito.instructor.intake.model import Delivery, File, shown

FOLDER = re.compile(r"(?P<name>.+)_(?P<id>\d+)_assignsubmission_[a-z]+_?", re.DOTALL)
FLAT = re.compile(r"(?P<name>.+?)_(?P<id>\d+)_assignsubmission_[a-z]+_(?P<file>.+)", re.DOTALL)


def matches(files: list[File]) -> int:
    """How many files lie in a participant's folder or bear a participant's name."""
    return sum(_owner(file) is not None for file in files)


def deliveries(files: list[File], roster: people.Roster, assignment: Assignment) -> list[Delivery]:
    """One for each participant."""
    theirs, strange = defaultdict(list), []
    for file in files:
        owner = _owner(file)
        if owner:
            name, number, own = owner
            theirs[name, number].append(replace(file, name=own))
        elif file.is_notebook or file.problem:
            strange.append(Delivery(file.shown, None, problem="not named as Moodle names submissions", files=(file,)))
    participants = [
        people.delivery(
            f"{shown(name)} ({number})", roster.with_id(number) or roster.called(name), f"'{shown(name)}'",
            files=tuple(own),
        )
        for (name, number), own in sorted(theirs.items())
    ]  # fmt: skip
    return people.without_doubles(participants) + strange


def _owner(file: File) -> tuple[str, str, str] | None:
    """Name and number of the participant, and the student's own file name."""
    for part in file.path:
        found = FOLDER.fullmatch(part)
        if found:
            return found["name"], found["id"], file.name
    found = FLAT.fullmatch(file.path[-1])
    return (found["name"], found["id"], found["file"]) if found else None
