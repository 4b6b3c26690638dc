"""A lesson in nbgrader's gradebook: the cells it has there, whether they may still change, and entering them."""

from __future__ import annotations

import difflib

from tito.course import student_version
from tito.course.errors import CourseError
from tito.course.manifest import Lesson
from tito.instructor import assignment as frozen
from tito.instructor.assignment import Assignment
from tito.instructor.course import GradingCourse
from tito.instructor.nbgrader_setup import nbgrader_ready, open_gradebook

ALIKE = 0.8  # a cell whose text is this much like a removed one's was renamed


def register(course: GradingCourse, lesson: Lesson) -> None:
    """Enter assignment, notebook and cells as `nbgrader generate_assignment` would; a second time changes nothing."""
    with open_gradebook(course) as gradebook:
        gradebook.update_or_create_assignment(lesson.folder)
    with nbgrader_ready():
        from nbgrader.preprocessors import SaveCells

        names = {"assignment": lesson.folder, "notebook": lesson.name, "db_url": f"sqlite:///{course.gradebook}"}
        SaveCells().preprocess(student_version.with_hidden_tests(lesson), {"nbgrader": names})


def require_same_cells(course: GradingCourse, new: Assignment) -> None:
    """A CourseError where work was handed in and the new release has other grade ids or points than the old one."""
    with open_gradebook(course) as gradebook:
        graded = [row.student.id for row in gradebook.assignment_submissions(new.name)] if _has(gradebook, new) else []
        old = _known_cells(course, gradebook, new)
    students = sorted({*graded, *course.submitters(new.name)})
    if not students or old is None:
        return
    differences = _differences(old, _cells(new))
    if differences:
        raise CourseError(
            "\n".join([
                f"{len(students)} submissions of {new.name} are in the course, and the release would change its cells:",
                *differences,
            ]),
            "Grade ids and points are fixed once work is handed in: bring them back in src/ and run `tito dev build`. "
            "Texts and tests may change. Nothing was changed.",
        )  # fmt: skip


def _has(gradebook, new: Assignment) -> bool:
    from nbgrader.api import MissingEntry

    try:
        gradebook.find_notebook(new.notebook, new.name)
    except MissingEntry:
        return False
    return True


def _known_cells(course: GradingCourse, gradebook, new: Assignment) -> dict[str, tuple[float, str]] | None:
    """grade id -> points and source as released before; None where it never was."""
    if _has(gradebook, new):
        notebook = gradebook.find_notebook(new.notebook, new.name)
        points = {cell.name: float(cell.max_score) for cell in notebook.grade_cells}
        return {cell.name: (points.get(cell.name, 0.0), cell.source or "") for cell in notebook.source_cells}
    path = course.frozen(new.name)
    return _cells(frozen.read(path)) if path.is_file() else None


def _cells(assignment: Assignment) -> dict[str, tuple[float, str]]:
    return {cell.grade_id: (cell.points, cell.source) for cell in assignment.cells if cell.role != "plain"}


def _differences(old: dict[str, tuple[float, str]], new: dict[str, tuple[float, str]]) -> list[str]:
    """What was removed, added, renamed or got other points, one sentence each."""
    removed, added, found = [i for i in old if i not in new], [i for i in new if i not in old], []
    for name in list(removed):
        likeness = {other: difflib.SequenceMatcher(None, old[name][1], new[other][1]).ratio() for other in added}
        nearest = max(likeness, key=likeness.get, default=None)
        if nearest and likeness[nearest] >= ALIKE:
            found.append(f"renamed: {name} is now {nearest}")
            removed.remove(name), added.remove(nearest)
    found += [f"removed: {name}" for name in removed] + [f"added: {name}" for name in added]
    for name in old.keys() & new.keys():
        if old[name][0] != new[name][0]:
            found.append(f"points: {name} had {old[name][0]:g} and would have {new[name][0]:g}")
    return sorted(found)
