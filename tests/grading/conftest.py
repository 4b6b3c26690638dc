"""Lesson 17, frozen as it would be released, and a way to hand in any notebook for it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tito.course import manifest, source
from tito.course.errors import CourseError
from tito.instructor import freeze, sandbox
from tito.instructor.assignment import Assignment
from tito.instructor.job import Job
from tito.instructor.result import Result
from tito.instructor.run import run_job
from tito.instructor.sandbox import Limits

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = Limits(
    cell_seconds=2, seconds=20, memory_bytes=512 * 2**20, tmp_bytes=32 * 2**20, file_bytes=8 * 2**20,
    output_bytes=1_000_000,
)  # fmt: skip


@dataclass
class Lesson:
    """A lesson with its solutions: notebooks that students could have written, and their grades."""

    lesson: manifest.Lesson
    assignment: Assignment
    level: str
    limits: Limits = SMALL

    def solved(self, changed: dict[str, str] | None = None) -> dict:
        """Everything solved; `changed`: grade id of a hole -> what stands there instead."""
        return json.loads(source.solved_notebook(self.lesson, changed or {}))

    def released(self) -> dict:
        return json.loads(self.lesson.notebook.read_text(encoding="utf-8"))

    def wrong_bodies(self) -> list[tuple[str, str, str, str]]:
        """(check that must fail, what is wrong, hole, its source) of every wrong body in exercises.toml."""
        cells = {cell.grade_id: cell for cell in source.cells(self.lesson)}
        rows = []
        for exercise in source.exercises(self.lesson):
            hole = f"{self.lesson.number}-{exercise['id']}"
            for wrong in exercise.get("wrong", []):
                body = source.with_body(cells[hole].source, wrong["body"], wrong.get("hole", 1))
                rows.append((wrong.get("check", f"{hole}-test"), wrong["name"], hole, source.MARKER.sub("", body)))
        return rows

    def grade(self, notebook: dict | str | None, limits: Limits = SMALL, student: str = "ann", level="") -> Result:
        text = json.dumps(notebook) if isinstance(notebook, dict) else notebook
        job = Job(student, self.assignment.name, self.assignment.hash, text, limits=limits)
        return run_job(job, self.assignment, level or self.level)


@pytest.fixture(scope="session")
def level() -> str:
    """The strongest sandbox of this machine; `none`, in which only the limits hold, where there is none."""
    try:
        return sandbox.choose("auto")
    except CourseError:
        return "none"


@pytest.fixture(scope="session")
def wanted(level) -> str:
    """What to ask for by `--sandbox`, so that the same tests run where nothing holds."""
    return "none" if level == "none" else "auto"


@pytest.fixture(scope="session")
def contained(level) -> str:
    """For what needs walls: files, network."""
    if level == "none":
        pytest.skip(f"nothing contains a submission on this machine ({sys.platform}): only the limits are tested here")
    return level


@pytest.fixture(scope="session")
def lesson17(level) -> Lesson:
    lesson = manifest.load(REPOSITORY).lesson("17")
    return Lesson(lesson, freeze.freeze(lesson), level)
