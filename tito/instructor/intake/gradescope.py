"""Gradescope's "Export Submissions": `assignment_1234_export/submission_5678/memoization.ipynb`, in a zip or unpacked.

Who handed in and when stands in submission_metadata.yml; a group's submission is that of each of its members.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from datetime import UTC, datetime

from tito.course.errors import CourseError
from tito.instructor.assignment import Assignment
from tito.instructor.intake import people, times
from tito.instructor.intake.model import Delivery, File, Refusal, shown

METADATA = "submission_metadata.yml"
DEEPEST = 50  # lists within lists; three are what an export has
AGAIN = "Fetch the export again (Review Grades, Export Submissions), and leave it as it is."
SUBMISSION = re.compile(r"submission_\d+")


def matches(files: list[File]) -> int:
    """How many files lie in a submission's folder, where there is a list of submissions."""
    listed = any(file.name == METADATA and len(file.path) <= 2 for file in files)
    return sum(_submission(file) is not None for file in files) + 1 if listed else 0


def deliveries(files: list[File], roster: people.Roster, assignment: Assignment) -> list[Delivery]:
    """One for each submitter of each submission, the oldest first."""
    known = _metadata(files)
    theirs = defaultdict(list)
    for file in files:
        key = _submission(file)
        if key:
            theirs[key].append(file)
    found = []
    for key in sorted(set(theirs) | set(known)):
        entry = known.get(key)
        entry = entry if isinstance(entry, dict) else {}
        when = _created(entry)
        own = tuple(replace(file, when=when or file.when) for file in theirs[key])
        submitters = entry.get(":submitters")
        submitters = [one for one in submitters if isinstance(one, dict)] if isinstance(submitters, list) else []
        if not submitters:
            why = f"{METADATA} names nobody for it"
            found.append((when, Delivery(shown(key), None, problem=why, files=own)))
        found += [(when, _of(submitter, key, own, roster)) for submitter in submitters]
    return [one for _, one in sorted(found, key=lambda pair: pair[0] or times.EARLIEST)]


def _of(submitter: dict, key: str, files: tuple[File, ...], roster: people.Roster) -> Delivery:
    name, number, email = (str(submitter.get(field) or "") for field in (":name", ":sid", ":email"))
    found = roster.with_id(number) or roster.with_email(email)
    return people.delivery(f"{shown(name or number)} ({key})", found, shown(f"{number} {email}".strip()), files=files)


def _submission(file: File) -> str | None:
    folders = file.path if file.folder else file.path[:-1]
    return next((part for part in folders if SUBMISSION.fullmatch(part)), None)


def _metadata(files: list[File]) -> dict:
    """The list of submissions: key of a submission -> what the export says of it."""
    import yaml

    listing = [file for file in files if file.name == METADATA and len(file.path) <= 2]
    if len(listing) != 1:
        raise CourseError(f"A Gradescope export has one {METADATA}; here there are {len(listing)}.", AGAIN)
    try:
        known = _yaml(listing[0].read().decode("utf-8-sig"))
    except (Refusal, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CourseError(f"{METADATA} cannot be read: {shown(why)}.", AGAIN) from None
    if not isinstance(known, dict):
        raise CourseError(f"{METADATA} lists no submissions.", AGAIN)
    return {key: entry for key, entry in known.items() if isinstance(key, str) and SUBMISSION.fullmatch(key)}


def _yaml(text: str) -> object:
    """Plain lists and dicts of strings: a student number keeps its zeros, and tags do nothing."""
    import yaml

    loader, depth = getattr(yaml, "CBaseLoader", yaml.BaseLoader), 0
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:  # the loader in C dies of a thousand brackets
            raise Refusal("it is nested too deep")
    return yaml.load(text, Loader=loader)


def _created(entry: dict) -> datetime | None:
    """`:created_at: 2026-11-20 12:00:00.142817000 Z`."""
    try:
        return times.parse(str(entry.get(":created_at")), UTC)
    except ValueError:
        return None
