"""`tito grade export`: grades as a tidy CSV, or as Canvas and Moodle import them."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from tito import show
from tito.course.errors import CourseError
from tito.course.files import write_atomic
from tito.instructor import assignment as assignments
from tito.instructor import lms
from tito.instructor.course import GradingCourse
from tito.instructor.lms import Graded, defused
from tito.instructor.pages import number
from tito.instructor.scores import scores

FORMS = {"csv": "grades.csv", "canvas": "canvas.csv", "moodle": "moodle.csv"}
COLUMNS = ("id", "name", "email", "assignment", "score", "max", "late_seconds", "sandbox", "flags")


def export(course: GradingCourse, lesson: str | None, form: str, out: Path | None, like: Path | None) -> int:
    """Write the grades of one lesson or of all that were released."""
    if form not in FORMS:
        raise CourseError(f"There is no form '{form}'.", f"Forms are: {', '.join(FORMS)}.")
    if like and form != "canvas":
        raise CourseError(f"--like is for Canvas's own export, and the form is {form}.", "Add `--to canvas`.")
    names = [assignments.load(course, lesson).name] if lesson else course.released()
    if not names:
        raise CourseError(f"No lesson was released in {course.root}.", "`tito grade release LESSON` releases one.")
    released = [assignments.read(course.frozen(name)) for name in names]
    graded = [Graded(assignment, scores(course, assignment)) for assignment in released]
    remarks: list[str] = []
    if form == "csv":
        table = tidy(graded)
    elif form == "moodle":
        table = lms.moodle(graded)
    else:
        table, remarks = lms.canvas_like(graded, like) if like else (lms.canvas(graded), [])
    path = out or course.root / FORMS[form]
    write_atomic(path, as_csv(table))
    for remark in remarks:
        show.line(remark)
    missing = sum(row.total is None for each in graded for row in each.rows)
    empty = f"; {show.count(missing, 'cell')} empty: nothing handed in, or not graded" if missing else ""
    rows = sum(len(each.rows) for each in graded)
    show.line(f"{show.count(rows, 'grade')} of {show.count(len(graded), 'lesson')} written to {path}{empty}.")
    return 0


def tidy(graded: list[Graded]) -> list[list[str]]:
    """One row per student and assignment. Without a submission the score is empty, which is not 0."""
    table = [list(COLUMNS)]
    for each in graded:
        for row in each.rows:
            person = [defused(text) for text in (row.student, row.name, row.email)]
            points = ["" if row.total is None else number(row.total), number(row.max), number(row.late_seconds)]
            table.append([*person, each.assignment.name, *points, defused(row.sandbox), defused("; ".join(row.flags))])
    return table


def as_csv(table: list[list[str]]) -> str:
    """Rows as CSV, quoted where needed."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    return text.getvalue()
