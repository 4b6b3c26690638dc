"""The notebook as it was run, with its outputs: what formgrader shows and nbgrader's own functions read."""

from __future__ import annotations

from dataclasses import dataclass

from tito.course.student_version import METADATA
from tito.instructor.assignment import Assignment
from tito.instructor.result import CheckGrade
from tito.instructor.transplant import RunCell


@dataclass(frozen=True)
class Executed:
    """What came of a cell: its printed text, and its error as the worker reports it."""

    output: str = ""
    error: dict | None = None
    late: bool = False


def executed_notebook(
    assignment: Assignment, cells: tuple[RunCell, ...], executed: dict[int, Executed], grades: dict[str, CheckGrade]
) -> dict:
    """The notebook as JSON of nbformat 4.5. A check has an error among its outputs exactly where it earned nothing."""
    made, count = [], 0
    for index, cell in enumerate(cells):
        entry = {
            "cell_type": cell.kind,
            "id": cell.origin.id if cell.origin else f"own-{index}",
            "metadata": dict(cell.origin.metadata) if cell.origin else {},
            "source": cell.source,
        }
        if cell.kind == "code":
            done = executed.get(index)
            count += done is not None
            grade = grades.get(cell.grade_id) if cell.role == "check" else None
            entry |= {"execution_count": count if done else None, "outputs": _outputs(done or Executed(), grade)}
        made.append(entry)
    metadata = {**METADATA, "tinytorch": {"lesson": assignment.number}}
    return {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def _outputs(done: Executed, grade: CheckGrade | None) -> list[dict]:
    outputs = [{"output_type": "stream", "name": "stdout", "text": done.output}] if done.output else []
    if grade is not None:
        if grade.earned < grade.points:
            name = done.error["name"] if done.error else "NotPassed"
            outputs.append(_error(name, grade.message))
    elif done.error:
        outputs.append(_error(done.error["name"], done.error["text"]))
    elif done.late:
        outputs.append(_error("Late", "It was interrupted at its time limit."))
    return outputs


def _error(name: str, text: str) -> dict:
    return {"output_type": "error", "ename": name, "evalue": text, "traceback": [f"{name}: {text}"]}
