"""A grading course: a course directory of nbgrader, and where tito keeps its own things in it.

    nbgrader_config.py  gradebook.db  source/  release/  submitted/  autograded/  feedback/      nbgrader's
    grading/17_memoization/assignment.json                the assignment as released: all that grading needs
    grading/17_memoization/jobs/  results/  logs/         one file per student
    superseded/STUDENT/17_memoization/WHEN/               submissions that a newer one replaced
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tito.course.errors import CourseError

CONFIG = "nbgrader_config.py"


@dataclass(frozen=True)
class GradingCourse:
    """The folder of a grading course; every path in it is made here."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / CONFIG

    @property
    def gradebook(self) -> Path:
        return self.root / "gradebook.db"

    def source(self, assignment: str) -> Path:
        return self.root / "source" / assignment

    def release(self, assignment: str) -> Path:
        return self.root / "release" / assignment

    def submitted(self, student: str, assignment: str) -> Path:
        return self.root / "submitted" / student / assignment

    def superseded(self, student: str, assignment: str) -> Path:
        return self.root / "superseded" / student / assignment

    def autograded(self, student: str, assignment: str) -> Path:
        return self.root / "autograded" / student / assignment

    def feedback(self, student: str, assignment: str) -> Path:
        return self.root / "feedback" / student / assignment

    def grading(self, assignment: str) -> Path:
        return self.root / "grading" / assignment

    def frozen(self, assignment: str) -> Path:
        return self.grading(assignment) / "assignment.json"

    def released(self) -> list[str]:
        """Names of the assignments that were released, in order."""
        return sorted(path.parent.name for path in (self.root / "grading").glob("*/assignment.json"))

    def submitters(self, assignment: str) -> list[str]:
        """Student ids with a folder for this assignment in submitted/, in order."""
        return sorted(path.parent.name for path in (self.root / "submitted").glob(f"*/{assignment}") if path.is_dir())


def find(start: Path | None = None) -> GradingCourse:
    """The grading course that `start` (default: the current folder) lies in."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / CONFIG).is_file():
            return GradingCourse(folder)
    raise CourseError(
        f"No grading course here: neither {here} nor a folder above it holds {CONFIG}.",
        "Change into the course's folder or name it by --course; `tito grade init DIRECTORY` makes one.",
    )
