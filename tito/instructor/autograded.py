"""The notebook that formgrader opens: the student's as it was run, in the form in which nbgrader reads grades from it.

nbgrader takes a check's points from the outputs of its cell. So each check's outputs are brought into a form from
which `nbgrader.utils.determine_grade` comes to the points that were earned: an error for a failed check, none for a
passed one. And formgrader renders the notebook in the instructor's browser, beside a Jupyter server that obeys it. So
only text and plain pictures stay of outputs, a student's own prose is shown as it was typed, and metadata is ours.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tito.course.notebook import to_text
from tito.course.student_version import METADATA
from tito.instructor.assignment import Assignment
from tito.instructor.result import CheckGrade, Result

PICTURES = ("image/png", "image/jpeg")
BASE64 = re.compile(r"[A-Za-z0-9+/=\s]*")


def notebook_text(assignment: Assignment, result: Result, messages: dict[str, str], grading: dict) -> str:
    """The notebook of `result` (as released, where it has none that fits), with `grading` in its metadata."""
    notebook = _fitted(assignment, result.notebook) or _released(assignment)
    grades = {check.id: check for check in result.checks}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = [plain for output in cell["outputs"] if (plain := _plain(output))]
            grade = grades.get(cell["metadata"].get("nbgrader", {}).get("grade_id"))
            if grade:
                cell["outputs"] = _settled(cell["outputs"], grade, messages.get(grade.id, ""))
    notebook["metadata"] = {**METADATA, "tinytorch": {"grading": grading}}
    return to_text(notebook).encode("utf-8", "replace").decode()


def grading_in(path: Path) -> dict:
    """What `notebook_text` left in the metadata of the notebook at `path`; empty where there is nothing of it."""
    try:
        grading = json.loads(path.read_text(encoding="utf-8"))["metadata"]["tinytorch"]["grading"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return grading if isinstance(grading, dict) else {}


def _released(assignment: Assignment) -> dict:
    """The notebook as students got it, without outputs."""
    cells = []
    for cell in assignment.cells:
        raw = {"cell_type": cell.kind, "id": cell.id, "metadata": cell.metadata, "source": cell.released}
        cells.append(raw | ({"execution_count": None, "outputs": []} if cell.kind == "code" else {}))
    return {"cells": cells, "nbformat": 4, "nbformat_minor": 5}


def _fitted(assignment: Assignment, notebook: dict | None) -> dict | None:
    """A copy in which nbgrader finds each of its cells once and as released; None where that cannot be had."""
    import nbformat

    frozen = {cell.grade_id: cell for cell in assignment.cells if cell.grade_id}
    prose = {cell.released for cell in assignment.cells if cell.kind == "markdown"}
    found: set[str] = set()
    try:
        copy = json.loads(json.dumps(notebook))
        if len({cell["id"] for cell in copy["cells"]}) < len(copy["cells"]):
            return None
        nbformat.validate(nbformat.from_dict(copy))
        for cell in copy["cells"]:
            given = cell["metadata"].get("nbgrader")
            known = frozen.get(given.get("grade_id")) if isinstance(given, dict) else None
            if known and (known.kind != cell["cell_type"] or known.id in found):
                known = None
            found |= {known.id} if known else set()
            cell["metadata"] = known.metadata if known else {}
            source = "".join(cell["source"])
            if cell["cell_type"] != "code" and source not in prose:
                cell.pop("attachments", None)
                cell |= {"cell_type": "markdown", "source": _verbatim(source)}
    except (nbformat.ValidationError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return copy if len(found) == len(frozen) else None


def _verbatim(text: str) -> str:
    """`text` in a fence that nothing in it can close."""
    fence = max(["~~", *re.findall("~+", text)], key=len) + "~"
    return f"{fence}\n{text}\n{fence}"


def _plain(output: dict) -> dict | None:
    """An output without anything that a browser would run; None where nothing is left."""
    if output["output_type"] not in ("display_data", "execute_result"):
        return output
    data = {"text/plain": output["data"]["text/plain"]} if "text/plain" in output["data"] else {}
    for kind in PICTURES:
        picture = output["data"].get(kind, "")
        picture = "".join(picture) if isinstance(picture, list) else picture
        if picture and BASE64.fullmatch(picture):
            data[kind] = picture
    return {**output, "data": data, "metadata": {}} if data else None


def _settled(outputs: list[dict], grade: CheckGrade, message: str) -> list[dict]:
    """A check's outputs, such that nbgrader reads `grade.earned` from them."""
    failed = grade.earned < grade.points or bool(grade.message)
    settled, errors = [], []
    for output in outputs:
        if output["output_type"] == "error":
            errors.append(output)
        elif output["output_type"] == "execute_result":  # a number here would be taken for partial credit
            settled.append({"output_type": "display_data", "data": output["data"], "metadata": {}})
        else:  # a warning on stderr would cost all points
            settled.append({**output, "name": "stdout"} if output["output_type"] == "stream" else output)
    if failed:
        settled += errors or [_error(message)]
    if 0 < grade.earned < grade.points:
        number = {"text/plain": repr(float(grade.earned))}
        settled.insert(0, {"output_type": "execute_result", "data": number, "execution_count": None, "metadata": {}})
    return settled


def _error(message: str) -> dict:
    return {"output_type": "error", "ename": "CheckFailed", "evalue": message, "traceback": message.splitlines()}
