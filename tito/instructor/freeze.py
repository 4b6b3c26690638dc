"""From src/ to a frozen `Assignment`: the cells with and without hidden tests, and all else that grading needs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from tito.course import manifest, source, student_version
from tito.course.errors import CourseError
from tito.course.manifest import INDEX, Lesson
from tito.instructor.assignment import Assignment, AssignmentCell


def freeze(lesson: Lesson) -> Assignment:
    """`lesson`, which comes from the index (`tito.course.manifest.load`), as it is in src/ now."""
    text = student_version.notebook_text(lesson)
    require_up_to_date(lesson, text)
    hints = {f"{lesson.number}-{exercise.id}-test": exercise.hints for exercise in lesson.exercises}
    assignment = Assignment(
        name=lesson.folder,
        notebook=lesson.name,
        number=lesson.number,
        title=lesson.title,
        module=lesson.module,
        cells=_cells(lesson, text),
        titles={check.id: check.title for check in lesson.checks},
        hints={check.id: hints[check.id][0] for check in lesson.checks if hints.get(check.id)},
        controls={},
        package=package_before(lesson),
    )
    return dataclasses.replace(assignment, controls=_controls(assignment, source.solutions(lesson)))


def require_up_to_date(lesson: Lesson, text: str) -> None:
    """A CourseError unless the index was built from the present src/."""
    if hashlib.sha256(text.encode("utf-8")).hexdigest() != lesson.notebook_digest:
        raise CourseError(
            f"{INDEX.as_posix()} is not built from the present {lesson.source.relative_to(lesson.root).as_posix()}.",
            f"Run `tito dev build {lesson.number}` in {lesson.root} and try again.",
        )


def _cells(lesson: Lesson, text: str) -> tuple[AssignmentCell, ...]:
    """Each cell as grading runs it and as students get it."""
    graded = student_version.with_hidden_tests(lesson).cells
    released = json.loads(text)["cells"]
    return tuple(
        AssignmentCell(
            id=cell["id"],
            kind=cell["cell_type"],
            role=_role(cell["metadata"].get("nbgrader", {})),
            source=full.source,
            released="".join(cell["source"]),
            metadata=cell["metadata"],
        )
        for full, cell in zip(graded, released, strict=True)
    )


def _role(grading: dict) -> str:
    if grading.get("solution"):
        return "hole"
    if grading.get("grade"):
        return "check"
    return "locked" if grading.get("locked") else "plain"


def package_before(lesson: Lesson) -> dict[str, str]:
    """Path -> text of the package that a student of `lesson` has: the reference of each lesson before it."""
    lessons = manifest.load(lesson.root).lessons
    before = lessons[: lessons.index(lesson)]
    return rooms(lesson.root) | {
        other.package_path.as_posix(): student_version.reference_text(other) for other in before
    }


def rooms(root: Path) -> dict[str, str]:
    """The files that make folders of tinytorch/ a package, those left out that are built from no lesson."""
    paths = sorted((root / "tinytorch").rglob("__init__.py"))
    texts = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    return {path: text for path, text in texts.items() if not path.startswith(manifest.UNTAUGHT)}


def _controls(assignment: Assignment, solutions: dict[str, str]) -> dict[str, str]:
    """Checks that must fail for any honest work; making them shows that the solution passes every check."""
    from tito.instructor import controls

    return controls.make(assignment, solutions)
