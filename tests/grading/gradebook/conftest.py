"""A small course whose gradebook nbgrader itself has made, results written by hand, and nbgrader's view of both."""

from __future__ import annotations

import shutil
import sqlite3
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import pytest

from tito.course.notebook import to_text
from tito.instructor import assignment as assignments
from tito.instructor.assignment import Assignment, AssignmentCell
from tito.instructor.course import GradingCourse
from tito.instructor.nbgrader_setup import nbgrader_ready, settings
from tito.instructor.result import CheckGrade, Result

NAME, NOTEBOOK = "17_memoization", "memoization"
CONFIG = 'c = get_config()  # noqa\nc.CourseDirectory.course_id = "small"\n'
DUE = datetime(2026, 11, 30, 22, 59)
STUDENTS = {
    "ada": ("Ada", "Lovelace", "ada@example.org"),
    "bob": ('Bob, "Jr"', "<script>alert(1)</script>", "bob@example.org"),
    "eve": ("Eve", '=HYPERLINK("http://x","y")', "=1+1|x@example.org"),
    "dan": ("", "", ""),
}
DOUBLE = 'def check_double():\n    assert double(2) == 4, "2 doubled is 4"\n'
DOUBLE_HIDDEN = "    assert double(\"'ab'\") == \"'ab''ab'\", \"a hidden one\"\n"
HALVE = "def check_halve():\n    assert halve(4) == 2\n"
HALVE_HIDDEN = "    assert halve(1729) == 864.5\n"
BEGIN, END = "    ### BEGIN HIDDEN TESTS\n", "    ### END HIDDEN TESTS\n"


def cell(grade_id: str, role: str, source: str, hidden: str = "", points: int = 0) -> AssignmentCell:
    """A cell as it is frozen, with nbgrader's metadata."""
    nbgrader = {"grade_id": grade_id, "grade": role == "check", "solution": role == "hole", "locked": role != "hole"}
    nbgrader |= {"schema_version": 3, "task": False} | ({"points": points} if points else {})
    full = source + (BEGIN + hidden + END if hidden else "")
    return AssignmentCell(grade_id, "code", role, full, source, {"nbgrader": nbgrader})


def small_lesson() -> Assignment:
    """Two holes, two checks with hidden tests, and prose."""
    cells = (
        AssignmentCell("17-intro", "markdown", "plain", "# Small", "# Small"),
        cell("17-double", "hole", "def double(x):\n    raise NotImplementedError\n"),
        cell("17-double-test", "check", DOUBLE, DOUBLE_HIDDEN, 2),
        cell("17-halve", "hole", "def halve(x):\n    raise NotImplementedError\n"),
        cell("17-halve-test", "check", HALVE, HALVE_HIDDEN, 3),
    )
    return Assignment(
        NAME, NOTEBOOK, "17", "Small & simple", "tinytorch.generation.kv_cache", cells,
        {"17-double-test": "Doubling", "17-halve-test": "Halving"}, {"17-double-test": "What is 2 + 2?"},
        {"17-halve-test": "    assert halve(1729) == 865.5\n"}, {},
    )  # fmt: skip


def notebook(assignment: Assignment, outputs: dict[str, list] | None = None, extra: tuple = (), full=True) -> dict:
    """The assignment's notebook with the given outputs, by cell; `full`: with the hidden tests."""
    cells = []
    for each in assignment.cells:
        source = each.source if full else each.released
        raw = {"cell_type": each.kind, "id": each.id, "metadata": each.metadata, "source": source}
        if each.kind == "code":
            raw |= {"outputs": (outputs or {}).get(each.id, []), "execution_count": 1}
        cells.append(raw)
    return {"cells": [*cells, *extra], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


@dataclass
class Small:
    """The course, its lesson, and helpers that go round the code under test."""

    course: GradingCourse
    assignment: Assignment

    def result(self, student="ada", double=2.0, halve=3.0, messages=None, **fields) -> Result:
        """A result by hand; `messages` by grade id."""
        said = {"17-double-test": "got 5", "17-halve-test": "got 1"} | (messages or {})
        pairs = (("17-double-test", 2.0, double), ("17-halve-test", 3.0, halve))
        checks = tuple(CheckGrade(i, most, got, "" if got == most else said[i]) for i, most, got in pairs)
        known = Result("job-1", student, NAME, self.assignment.hash, "bwrap", checks)
        return replace(known, **({"notebook": notebook(self.assignment)} | fields))

    def save(self, result: Result) -> None:
        """Put the result where runners put it."""
        path = self.course.grading(NAME) / "results" / f"{result.student}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(result.as_text(), encoding="utf-8")

    def autograded(self, student="ada") -> Path:
        return self.course.autograded(student, NAME) / f"{NOTEBOOK}.ipynb"

    def page(self, student="ada") -> Path:
        return self.course.feedback(student, NAME) / f"{NOTEBOOK}.html"

    def dump(self) -> list[str]:
        """Everything that the database holds."""
        with sqlite3.connect(self.course.gradebook) as connection:
            return list(connection.iterdump())

    def api(self):
        """nbgrader's own API on this course."""
        from nbgrader.apps.api import NbGraderAPI

        return NbGraderAPI(config=settings(self.course))

    def by_hand(self, change, student="ada") -> None:
        """What formgrader does: change an nbgrader object and commit. `change` gets grades and comments by name."""
        with self.api().gradebook as gradebook:
            submitted = gradebook.find_submission_notebook(NOTEBOOK, NAME, student)
            change({grade.name: grade for grade in submitted.grades}, {c.name: c for c in submitted.comments})
            gradebook.db.commit()


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    """The course before anybody has handed in, registered by nbgrader's own generate_assignment."""
    course = GradingCourse(tmp_path_factory.mktemp("template") / "course")
    lesson = small_lesson()
    source = course.source(NAME) / f"{NOTEBOOK}.ipynb"
    source.parent.mkdir(parents=True)
    course.config.write_text(CONFIG, encoding="utf-8")
    source.write_text(to_text(notebook(lesson)), encoding="utf-8")
    with nbgrader_ready():
        small = Small(course, lesson)
        made = small.api().generate_assignment(NAME)
        assert made["success"], made
        with small.api().gradebook as gradebook:
            gradebook.update_or_create_assignment(NAME, duedate=DUE)
            for student, (first, last, email) in STUDENTS.items():
                gradebook.add_student(student, first_name=first, last_name=last, email=email)
    assignments.save(course, lesson)
    return course.root


@pytest.fixture
def small(template, tmp_path) -> Small:
    """A course of its own for each test."""
    root = tmp_path / "course"
    shutil.copytree(template, root)
    with nbgrader_ready():
        yield Small(GradingCourse(root), small_lesson())
