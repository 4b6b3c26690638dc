"""An assignment as it was released: all that grading needs, frozen in one JSON file.

Grading reads nothing else of the course: neither src/ nor the package as it is now. So a grade says by its `hash`
what it was made with, and any machine that has this file makes the same grade.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tito.course.errors import CourseError
from tito.course.files import write_atomic
from tito.instructor.course import GradingCourse

FORMAT = 1  # of assignment.json


@dataclass(frozen=True)
class AssignmentCell:
    """One cell. `source` is what grading runs (a check with its hidden tests), `released` what students got."""

    id: str
    kind: str  # code, markdown
    role: str  # hole, check, locked (not graded, may not be edited), plain
    source: str
    released: str
    metadata: dict = field(default_factory=dict)  # the cell's whole metadata, nbgrader's with its checksum

    @property
    def grade_id(self) -> str | None:
        return self.metadata.get("nbgrader", {}).get("grade_id")

    @property
    def points(self) -> float:
        return float(self.metadata.get("nbgrader", {}).get("points", 0) or 0) if self.role == "check" else 0.0


@dataclass(frozen=True)
class Assignment:
    """One released lesson."""

    name: str  # 17_memoization, nbgrader's name of the assignment
    notebook: str  # memoization, nbgrader's name of the notebook
    number: str
    title: str
    module: str  # tinytorch.generation.kv_cache
    cells: tuple[AssignmentCell, ...]
    titles: dict[str, str]  # grade id of each check -> its title
    hints: dict[str, str]  # grade id of a check -> first hint of its exercise, where it has one
    controls: dict[str, str]  # grade id of a check -> the same check with wrong expectations
    package: dict[str, str]  # path -> text: tinytorch without this lesson's file and without later lessons

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of the whole."""
        return hashlib.sha256(self.as_text().encode()).hexdigest()

    @property
    def checks(self) -> tuple[AssignmentCell, ...]:
        return tuple(cell for cell in self.cells if cell.role == "check")

    @property
    def max_score(self) -> float:
        return sum(cell.points for cell in self.checks)

    @property
    def modules(self) -> list[str]:
        """Dotted names of the modules in `package`."""
        files = [name for name in self.package if not name.endswith("__init__.py")]
        return [name.removesuffix(".py").replace("/", ".") for name in files]

    def as_text(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, sort_keys=True) + "\n"


def from_text(text: str) -> Assignment:
    """The assignment that `as_text` wrote."""
    fields = json.loads(text)
    if (format := fields.pop("format", None)) != FORMAT:
        raise ValueError(f"it has format {format}, and this tito reads format {FORMAT}")
    fields["cells"] = tuple(AssignmentCell(**cell) for cell in fields["cells"])
    return Assignment(**fields)


def save(course: GradingCourse, assignment: Assignment) -> Path:
    """Freeze `assignment` in the course."""
    path = course.frozen(assignment.name)
    write_atomic(path, assignment.as_text())
    return path


def load(course: GradingCourse, text: str) -> Assignment:
    """The released assignment that `text` names: 17, memoization or 17_memoization."""
    wanted = text.strip().lower()
    for name in course.released():
        number, _, lesson = name.partition("_")
        if wanted in (name, lesson) or (wanted.isdigit() and wanted.zfill(2) == number):
            return read(course.frozen(name))
    names = ", ".join(course.released()) or "none yet"
    raise CourseError(
        f"Lesson '{text}' was not released in {course.root} (released: {names}).",
        f"`tito grade release {text}` releases it.",
    )


def read(path: Path) -> Assignment:
    """The assignment in the file `path`."""
    try:
        return from_text(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError) as error:
        raise CourseError(
            f"{path} cannot be read: {error}.", "Release the lesson again: `tito grade release` writes it anew."
        ) from None
