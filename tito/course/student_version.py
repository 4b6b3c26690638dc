"""What src/ becomes: the notebook that students get and the reference file of the package.

nbgrader's own preprocessors remove solutions, hidden tests and outputs. The same source always gives the same bytes:
cell ids are derived, nothing has a date.
"""

from __future__ import annotations

import json
import logging

from tito.course import source
from tito.course.errors import CourseError
from tito.course.export import module_source
from tito.course.manifest import Lesson
from tito.course.notebook import to_text

ORIGIN = "Built from {path} by `tito dev build`: change it there, not here."
METADATA = {  # of every notebook that we write
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def notebook_text(lesson: Lesson) -> str:
    """The student's notebook: without solutions, hidden tests and outputs."""
    preprocessors = _preprocessors()
    notebook = with_hidden_tests(lesson)
    for step in (preprocessors.ClearHiddenTests(), preprocessors.ComputeChecksums()):
        notebook, _ = step.preprocess(notebook, {})
    return as_text(notebook, lesson)


def with_hidden_tests(lesson: Lesson):
    """The student's notebook before its hidden tests are removed, as nbgrader's gradebook keeps its cells."""
    preprocessors = _preprocessors()
    titles = {f"{lesson.number}-{entry['id']}": entry["title"] for entry in source.exercises(lesson)}
    notebook = source.notebook_of(lesson)
    for step in (
        preprocessors.CheckCellMetadata(),
        preprocessors.LockCells(),
        _Holes(preprocessors.ClearSolutions(), titles),
        preprocessors.ClearOutput(),
        preprocessors.ComputeChecksums(),
    ):
        notebook, _ = step.preprocess(notebook, {})
    return tidied(notebook, lesson)


def _preprocessors():
    """nbgrader.preprocessors, imported in silence."""
    # nbgrader's logger writes to the terminal while it loads; it has nothing to say to us.
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        from nbgrader import preprocessors
    except ImportError:
        raise CourseError(
            "Building needs nbgrader, which is not installed.", "Run `pip install -e '.[dev,grade]'`."
        ) from None
    finally:
        logging.disable(disabled)
    return preprocessors


def tidied(notebook, lesson: Lesson):
    """`notebook` without what jupytext notes on the layout of the source, and with our metadata."""
    for cell in notebook.cells:
        cell.source = cell.source.rstrip()
        for name in ("cell_marker", "lines_to_next_cell"):
            cell.metadata.pop(name, None)
        if cell.cell_type == "code":
            cell.execution_count = None
    notebook.metadata = type(notebook.metadata)({**METADATA, "tinytorch": {"lesson": lesson.number}})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def as_text(notebook, lesson: Lesson) -> str:
    """The text of a notebook of nbformat, tidied."""
    plain = json.loads(json.dumps(tidied(notebook, lesson)))
    for cell in plain["cells"]:
        cell["source"] = cell["source"].splitlines(keepends=True)
    return to_text(plain)


class _Holes:
    """nbgrader's ClearSolutions, cell by cell, so that each hole's stub names its exercise."""

    def __init__(self, clear, titles: dict[str, str]):
        self.clear, self.titles = clear, titles

    def preprocess(self, notebook, resources):
        for number, cell in enumerate(notebook.cells):
            grading = cell.metadata.get("nbgrader", {})
            if grading.get("solution"):
                self.clear.code_stub = {"python": stub(grading["grade_id"], self.titles.get(grading["grade_id"]))}
                notebook.metadata.setdefault("kernelspec", {})["language"] = "python"
                resources["language"] = "python"
                notebook.cells[number], resources = self.clear.preprocess_cell(cell, resources, number)
        return notebook, resources


def stub(grade_id: str, title: str | None) -> str:
    """What is left of a solution: an error that names the exercise and the command for a hint."""
    number, exercise = grade_id.split("-", 1)
    return (
        "# Your code here.\n"
        f'raise NotImplementedError("Exercise {grade_id} ({title or exercise}) is still to be written. "\n'
        f'                          "A hint: tito module hint {number} {exercise}")'
    )


def reference_text(lesson: Lesson) -> str:
    """The reference file of the package."""
    origin = ORIGIN.format(path=lesson.source.relative_to(lesson.root).as_posix())
    return module_source(lesson, source.cells(lesson), origin)
