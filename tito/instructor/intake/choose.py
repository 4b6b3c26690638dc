"""Which of a student's files is the notebook. Where it is not plain, none is taken and the reason says why."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime

from tito.instructor.assignment import Assignment
from tito.instructor.intake.model import File, Refusal, listed


@dataclass(frozen=True)
class Chosen:
    """The notebook of one student, as it was handed in."""

    data: bytes
    when: datetime
    remarks: tuple[str, ...] = ()


def choose(files: tuple[File, ...], assignment: Assignment) -> Chosen:
    """The one notebook with the right name; else the only notebook, if it is of this lesson. Else Refusal."""
    found = [file for file in files if not file.folder]
    right = _right(found, assignment)
    if right is None:
        return _other_name(found, assignment)
    data = _read(right)
    beside = [file for file in found if file is not right and (file.is_notebook or file.problem or is_zip(file))]
    remarks = [f"left: {listed([_described(file) for file in beside])}"] if beside else []
    return Chosen(data, right.when, (*remarks, *_look(data, assignment)))


def is_zip(file: File) -> bool:
    """A student's own zip file, which is not opened."""
    return file.name.lower().endswith((".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"))


def _right(found: list[File], assignment: Assignment) -> File | None:
    wanted = f"{assignment.notebook}.ipynb"
    right = [file for file in found if file.name == wanted and not file.problem]
    latest = max((file.version for file in right), default=0)
    right = [file for file in right if file.version == latest]
    if len(right) > 1:
        raise Refusal(f"{len(right)} notebooks called {wanted}: {listed([file.shown for file in right])}")
    return right[0] if right else None


def _other_name(found: list[File], assignment: Assignment) -> Chosen:
    """No notebook has the right name: a single one that is of this lesson is meant."""
    wanted = f"{assignment.notebook}.ipynb"
    for file in found:
        if file.problem:
            raise Refusal(_described(file))
    notebooks = [file for file in found if file.is_notebook]
    if len(notebooks) > 1:
        names = listed([file.shown for file in notebooks])
        raise Refusal(f"{len(notebooks)} notebooks, and none is called {wanted}: {names}")
    if not notebooks:
        for file in found:
            if is_zip(file):
                raise Refusal(f"{file.shown} is packed; unpack it there and collect again")
        others = f" (but {listed([file.shown for file in found])})" if found else ""
        raise Refusal(f"no notebook{others}")
    only = notebooks[0]
    data = _read(only)
    try:
        of_this_lesson = belongs(as_json(data), assignment)
    except Refusal as reason:
        raise Refusal(f"{only.shown} is not called {wanted}, and {reason}") from None
    if not of_this_lesson:
        raise Refusal(f"{only.shown} is not called {wanted}, and is no notebook of this lesson")
    return Chosen(data, only.when, (f"was called {only.shown}",))


def _described(file: File) -> str:
    return f"{file.shown} {file.problem}" if file.problem else file.shown


def _read(file: File) -> bytes:
    try:
        return file.read()
    except Refusal as reason:
        raise Refusal(f"{file.shown} {reason}") from None


def _look(data: bytes, assignment: Assignment) -> tuple[str, ...]:
    """What an instructor should know about a notebook that is taken as it is: grading says the same to the student."""
    try:
        return () if belongs(as_json(data), assignment) else ("it holds no cell of this lesson",)
    except Refusal as reason:
        return (f"it {reason}",)


def as_json(data: bytes) -> dict:
    """The notebook's JSON; Refusal where it is none."""
    try:
        notebook = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno}: {error.msg})" if isinstance(error, json.JSONDecodeError) else ""
        raise Refusal(f"is not valid JSON{where}" if data.strip() else "is empty") from None
    if not isinstance(notebook, dict) or not isinstance(notebook.get("cells"), list):
        raise Refusal("is JSON, but not a notebook")
    return notebook


def belongs(notebook: dict, assignment: Assignment) -> bool:
    """Whether it is of this lesson: it says so, or holds one of its graded cells or holes."""
    if _at(notebook, "metadata", "tinytorch", "lesson") == assignment.number:
        return True
    ours = {cell.grade_id for cell in assignment.cells if cell.grade_id}
    theirs = (_at(cell, "metadata", "nbgrader", "grade_id") for cell in notebook["cells"])
    return any(isinstance(grade_id, str) and grade_id in ours for grade_id in theirs)


def _at(value: object, *names: str) -> object:
    """`value[a][b]…`, None where a stranger's JSON has something else there."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value
