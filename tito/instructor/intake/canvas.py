"""Canvas' "Download Submissions": `doejane_LATE_12345_67890_memoization-1.ipynb`, in a zip or unpacked.

Name (last name first, letters only), LATE where Canvas saw it so, the user's number, the submission's number, the
student's own file name; -1, -2 … is added to a file that the student uploaded again. The zip holds no time of
submission, only that of the download. So a file without LATE counts as handed in by the due time at the latest.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace

from tito.instructor.assignment import Assignment
from tito.instructor.intake import people
from tito.instructor.intake.model import Delivery, File, shown

NAME = re.compile(r"(?P<name>.+?)_(?P<late>LATE_)?(?P<user>\d+)_(?P<submission>\d+)_(?P<file>.+)", re.DOTALL)
AGAIN = re.compile(r"(?P<stem>.+)-(?P<version>\d{1,4})(?P<suffix>\.\w+)", re.DOTALL)


def matches(files: list[File]) -> int:
    """How many files are named as Canvas names them."""
    return sum(bool(NAME.fullmatch(file.path[-1])) for file in files if not file.folder)


def deliveries(files: list[File], roster: people.Roster, assignment: Assignment) -> list[Delivery]:
    """One for each user of Canvas."""
    theirs, strange = defaultdict(list), []
    for file in files:
        found = NAME.fullmatch(file.path[-1])
        if found:
            theirs[found["name"], found["user"]].append((found, file))
        elif file.is_notebook or file.problem:
            strange.append(Delivery(file.shown, None, problem="not named as Canvas names submissions", files=(file,)))
    users = [_delivery(name, user, own, roster) for (name, user), own in sorted(theirs.items())]
    return people.without_doubles(users) + strange


def _delivery(name: str, user: str, own: list[tuple[re.Match, File]], roster: people.Roster) -> Delivery:
    late = any(found["late"] for found, _ in own)
    files = tuple(_own_name(found["file"], file) for found, file in own)
    label = f"{shown(name)} ({user})"
    found = roster.with_id(user) or roster.called(name)
    return people.delivery(label, found, f"'{shown(name)}'", files=files, marked_late=late, in_time=not late)


def _own_name(name: str, file: File) -> File:
    """`memoization-1.ipynb` is `memoization.ipynb`, uploaded again."""
    again = AGAIN.fullmatch(name)
    if again:
        return replace(file, name=again["stem"] + again["suffix"], version=int(again["version"]))
    return replace(file, name=name)
