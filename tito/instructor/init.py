"""`tito grade init`: a new course directory of nbgrader, whole or not at all."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from tito import show
from tito.course.errors import CourseError
from tito.course.processes import remove_tree
from tito.instructor import students
from tito.instructor.course import CONFIG, GradingCourse
from tito.instructor.nbgrader_setup import open_gradebook

COURSE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
FOLDERS = ("source", "release", "submitted")
TEXT = '''"""Settings of nbgrader for this course; `tito grade` reads them too.

There is no `c.CourseDirectory.root` here on purpose: nbgrader takes the folder that it is started in, so the course
may be moved. Start `nbgrader` and `jupyter lab` in this folder.
"""

c = get_config()  # noqa: F821  nbgrader defines it

# One name of the course everywhere. Do not change it once there are grades: nbgrader would begin a second course.
c.CourseDirectory.course_id = "{course_id}"

# Any text on stderr in a graded cell would score 0 in `nbgrader autograde`, a warning of NumPy included.
c.IgnorePattern.enabled = True
c.IgnorePattern.pattern = ".*Warning.*"

# Only where students use this very machine: the folder over which nbgrader hands out and takes in.
# c.Exchange.root = "/srv/nbgrader/exchange"

# source/ and release/ are written by `tito grade release`. `nbgrader generate_assignment` works too, but its notebook
# says "YOUR CODE HERE" where ours names the exercise.
'''


def init(directory: Path, roster: Path | None, course_id: str) -> int:
    """Make a course in `directory` and say what to do next."""
    if not COURSE_ID.fullmatch(course_id):
        raise CourseError(
            f"'{course_id}' cannot be the name of a course.",
            "It may hold letters A-Z, digits, . _ and -, and begins with a letter or digit.",
        )
    target = _free(directory)
    listed = students.read(roster) if roster else []
    with show.Working("making a gradebook"):
        make(target, listed, course_id)
    show.line(f"{target} is a course of nbgrader now, with {show.count(len(listed), 'student')}.")
    steps = [(f"cd {_quoted(directory)}", "all other commands work in this folder")]
    if not listed:
        steps.append(("tito grade roster class.csv", "the students: columns id, name, email"))
    show.steps(*steps, ("tito grade release 01", "the first lesson, and the folder that students get"))
    return 0


def make(target: Path, listed: list[students.Student], course_id: str) -> None:
    """Build the course beside `target` and put it there in one step; a kill leaves at most a hidden folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
    try:
        building.chmod(0o755)
        for name in FOLDERS:
            (building / name).mkdir()
        (building / CONFIG).write_text(TEXT.format(course_id=course_id), encoding="utf-8")
        with open_gradebook(GradingCourse(building)) as gradebook:
            students.enter(gradebook, listed)
        if target.is_dir():
            target.rmdir()  # Windows does not rename over an empty folder; one that filled meanwhile stays
        os.rename(building, target)
    except BaseException:
        remove_tree(building)
        raise


def _free(directory: Path) -> Path:
    """`directory`, resolved, where a course may be made."""
    target = directory.resolve()
    if (target / CONFIG).exists():
        raise CourseError(
            f"{target} is a course already.", "Choose another folder, or `cd` into this one and go on with it."
        )
    if target.exists() and not target.is_dir():
        raise CourseError(f"{target} is a file.", "Name a new or empty folder.")
    if target.is_dir() and any(target.iterdir()):
        raise CourseError(f"{target} is not empty.", "Name a new or empty folder.")
    odd = sorted(set("*?[]") & set(str(target)))
    if odd:
        raise CourseError(
            f"The path {target} holds {' '.join(odd)}, which nbgrader takes for a pattern.", "Choose another folder."
        )
    return target


def _quoted(path: Path) -> str:
    return f'"{path}"' if " " in str(path) else str(path)
