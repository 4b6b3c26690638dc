"""A submitted notebook, read with care: the file is a stranger's, and so is what stands in it."""

from __future__ import annotations

import json
import os
import stat

from tito.instructor.assignment import Assignment
from tito.instructor.course import GradingCourse

LARGEST = 20 * 2**20  # bytes; `collect` takes none that is larger
TOO_LARGE = f"The notebook is larger than {LARGEST / 2**20:g} MiB. Clear its outputs, save it and hand it in again."


def submitted_text(course: GradingCourse, assignment: Assignment, student: str) -> tuple[str | None, str | None]:
    """The text of the submitted notebook, or None and the reason. Reads a regular file and nothing else."""
    path = course.submitted(student, assignment.name) / f"{assignment.notebook}.ipynb"
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        return None, f"No notebook {path.name} was handed in."
    except OSError as error:
        return None, f"The submitted {path.name} cannot be read: {error.strerror}."
    with os.fdopen(handle, "rb") as stream:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return None, f"The submitted {path.name} is no file."
        data = stream.read(LARGEST + 1)
    if len(data) > LARGEST:
        return None, TOO_LARGE
    try:
        return data.decode("utf-8-sig"), None
    except UnicodeDecodeError as error:
        return None, f"The file is no notebook: it is not UTF-8 (byte {error.start}). Hand it in as Jupyter saves it."


def notebook_of(text: str) -> tuple[dict | None, str | None]:
    """The notebook in a submitted text, or None and the reason why there is none to run."""
    again = "Hand in the notebook as Jupyter saves it."
    if len(text) > LARGEST:
        return None, TOO_LARGE
    try:
        notebook = json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno}: {error.msg})" if isinstance(error, json.JSONDecodeError) else ""
        return None, f"The file is no notebook: it is not valid JSON{where}. {again}"
    if isinstance(notebook, dict) and "worksheets" in notebook:
        return None, "The notebook has an old format (nbformat 3). Open it in Jupyter, save it and hand it in again."
    if not isinstance(notebook, dict) or not isinstance(notebook.get("cells"), list):
        return None, f"The file is no notebook: it has no list of cells. {again}"
    return notebook, None
