"""From what was collected to jobs: one self-contained file per student in grading/LESSON/jobs/."""

from __future__ import annotations

import re
from pathlib import Path

from tito.course.errors import CourseError
from tito.course.export import body, directives, parse
from tito.course.files import write_atomic
from tito.course.notebook import Cell
from tito.course.verdict import small
from tito.instructor import assignment as assignments
from tito.instructor.assignment import Assignment
from tito.instructor.course import GradingCourse
from tito.instructor.intake import store
from tito.instructor.job import Job
from tito.instructor.submission import notebook_of, submitted_text
from tito.instructor.transplant import transplant


def make_jobs(course: GradingCourse, assignment: Assignment, students: list[str], cumulative: bool) -> list[Path]:
    """Write the jobs of `students` (default: all who handed in) and return their files, in order."""
    with store.locked(course, assignment.name):
        store.repair(course, assignment.name)  # a submission that a killed `collect` had half brought in
    there = course.submitters(assignment.name)
    unknown = sorted(set(students) - set(there))
    if unknown:
        raise CourseError(
            f"Nothing of {', '.join(unknown)} was collected for {assignment.name}.",
            f"`tito grade collect {assignment.number} PATH` brings submissions in.",
        )
    if not there:
        raise CourseError(
            f"No submission of {assignment.name} was collected.",
            f"`tito grade collect {assignment.number} PATH` brings submissions in.",
        )
    folder = course.grading(assignment.name) / "jobs"
    paths = []
    for student in sorted(set(students)) or there:
        path = folder / f"{student}.json"
        text = job_of(course, assignment, student, cumulative).as_text()
        if not path.is_file() or path.read_bytes() != text.encode():
            write_atomic(path, text)
        paths.append(path)
    if not students:
        for path in set(folder.glob("*.json")) - set(paths):
            path.unlink()
    return sorted(paths)


def job_of(course: GradingCourse, assignment: Assignment, student: str, cumulative: bool) -> Job:
    """The job of one student's submission."""
    notebook, problem = submitted_text(course, assignment, student)
    package, notes = own_package(course, assignment, student) if cumulative else ({}, [])
    return Job(student, assignment.name, assignment.hash, notebook, problem, package, tuple(notes))


def own_package(course: GradingCourse, assignment: Assignment, student: str) -> tuple[dict[str, str], list[str]]:
    """The student's own files for the lessons before `assignment`, and which of them the reference stands in for."""
    files, notes = {}, []
    for name in course.released():
        earlier = assignments.read(course.frozen(name))
        if earlier.number >= assignment.number:
            continue
        text, problem = submitted_text(course, earlier, student)
        notebook = None
        if text is not None:
            notebook, problem = notebook_of(text)
        if notebook is None:
            notes.append(f"Lesson {name} was run from the reference: {small(problem)}")
            continue
        try:
            files[f"{earlier.module.replace('.', '/')}.py"] = module_text(earlier, notebook)
        except CourseError as error:
            notes.append(f"Lesson {name} was run from the reference, for yours cannot be imported: {error.message}")
    return files, notes


def module_text(assignment: Assignment, notebook: dict) -> str:
    """The package file that the notebook exports: the cells marked `#| export`, as `tito module complete` joins them.

    Raises CourseError for a cell that is no Python.
    """
    cells, _ = transplant(assignment, notebook)
    parts = [f'"""Lesson {assignment.name}, as it was handed in."""']
    for number, each in enumerate(cells, start=1):
        cell = Cell(number, "", each.kind, each.source, each.grade_id)
        if each.kind == "code" and "export" in directives(cell):
            parse(cell)
            parts.append(body(cell))
    return "\n\n\n".join(parts) + "\n"


def shard_of(paths: list[Path], text: str) -> list[Path]:
    """Every N-th of `paths`, from the I-th, for `text` "I/N"."""
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    first, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= first <= count:
        raise CourseError(f"There is no shard '{text}'.", "Write I/N with 1 <= I <= N, for instance 2/4.")
    return paths[first - 1 :: count]
