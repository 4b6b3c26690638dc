"""`tito grade roster`: the students of a CSV into the gradebook."""

from __future__ import annotations

from pathlib import Path

from tito import show
from tito.instructor import students
from tito.instructor.course import GradingCourse
from tito.instructor.nbgrader_setup import open_gradebook

MOST_SHOWN = 20


def update(course: GradingCourse, file: Path) -> int:
    """Add or correct students, and say what changed."""
    listed = students.read(file)
    with open_gradebook(course) as gradebook:
        changes = students.enter(gradebook, listed)
    show.line(
        f"{show.count(len(changes.added), 'student')} added, {show.count(len(changes.corrected), 'field')} corrected, "
        f"{changes.unchanged} as before."
    )
    if changes.corrected:
        table = [(name, field.replace("_", " "), old or "-", new) for name, field, old, new in changes.corrected]
        show.rows(table[:MOST_SHOWN], ("Student", "Field", "Was", "Is"))
        if len(table) > MOST_SHOWN:
            show.line(f"and {len(table) - MOST_SHOWN} more", indent=2)
    if changes.not_listed:
        known = show.count(changes.not_listed, "student")
        show.line(f"{known} of the gradebook not in {file.name}: kept; `nbgrader db student remove ID` removes one.")
    return 0
