"""Which form a source has, and its deliveries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tito.course.errors import CourseError
from tito.instructor.assignment import Assignment
from tito.instructor.course import GradingCourse
from tito.instructor.intake import canvas, exchange, folder, git, gradescope, moodle, people, tree
from tito.instructor.intake.model import Delivery, File

FILED = {"gradescope": gradescope, "moodle": moodle, "canvas": canvas, "folder": folder}  # folders and zips of files
NAMES = ("auto", *reversed(FILED), "git", "exchange")


@contextmanager
def opened(
    course: GradingCourse, assignment: Assignment, source: Path | None, form: str, roster: people.Roster
) -> Iterator[tuple[str, list[Delivery]]]:
    """The form's name and the deliveries, which can be read while the `with` block lasts."""
    form = _require(source, form)
    if form == "exchange":
        with exchange.opened(course, roster, assignment) as found:
            yield form, found
    elif form == "git" or (form == "auto" and source.is_dir() and git.matches(source)):
        if not source.is_dir():
            raise CourseError(f"{source} is no folder of repositories.", "Name the folder that holds them.")
        with git.opened(source, roster, assignment) as found:
            yield "git", found
    else:
        with tree.opened(source) as files:
            form = detected(files) if form == "auto" else form
            yield form, FILED[form].deliveries(files, roster, assignment)


def detected(files: list[File]) -> str:
    """The form that knows most files; a folder of students where none knows any."""
    known = {name: module.matches(files) for name, module in FILED.items()}
    best = max(known, key=known.get)
    return best if known[best] else "folder"


def _require(source: Path | None, form: str) -> str:
    if form not in NAMES:
        raise CourseError(f"--from '{form}' is not a form of submissions.", f"There are: {', '.join(NAMES)}.")
    if source is None and form in ("auto", "exchange"):
        return "exchange"
    if source is None:
        raise CourseError(
            f"--from {form} needs a folder or a zip file.", f"`tito grade collect LESSON PATH --from {form}`."
        )
    if form == "exchange":
        raise CourseError(
            "The exchange has its own place, which nbgrader_config.py names.", "Leave the path out: `--from exchange`."
        )
    if not source.exists():
        raise CourseError(f"There is no {source}.", "Name the folder or the zip file with the submissions.")
    return form
