"""A notebook as plain cells: read with clear errors, found by grade id, filled with other solutions.

Notebooks are JSON; reading them needs neither nbformat nor jupytext, so this costs nothing at start-up.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from tito.course.errors import CourseError
from tito.course.manifest import Check

OLD_FORMAT = "Open it in Jupyter and save it once, which brings it to the present format (4.5), and try again."


@dataclass(frozen=True)
class Cell:
    """One cell. `number` counts from 1, as a person counts; `grade_id` is nbgrader's, None where there is none."""

    number: int
    id: str
    kind: str
    source: str
    grade_id: str | None = None
    is_hole: bool = False
    is_check: bool = False

    @property
    def label(self) -> str:
        """How messages name the cell: "cell 12 (01-matmul)"."""
        return f"cell {self.number}" + (f" ({self.grade_id})" if self.grade_id else "")


def digest(source: str) -> str:
    """SHA-256 of a cell's source; blanks at line ends and blank lines at the end do not count."""
    lines = [line.rstrip() for line in source.replace("\r\n", "\n").split("\n")]
    return hashlib.sha256("\n".join(lines).rstrip("\n").encode()).hexdigest()


def load_json(path: Path) -> dict:
    """The notebook at `path` as JSON, or a CourseError that says what is wrong with the file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise CourseError(
            f"There is no notebook {path}.", "`tito module reset NN` brings it back as it was released."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CourseError(
            f"{path} cannot be read: {error}.", "A backup or `tito module reset NN` brings it back."
        ) from None
    try:
        notebook = json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno}: {error.msg})" if isinstance(error, json.JSONDecodeError) else ""
        raise CourseError(
            f"{path} is not valid JSON{where}.",
            "A merge or an editor may have damaged it; take a backup, or `tito module reset NN` for a fresh one.",
        ) from None
    if not isinstance(notebook, dict) or "nbformat" not in notebook:
        raise CourseError(f"{path} is JSON, but not a notebook.", "`tito module reset NN` brings a fresh one.")
    version = notebook["nbformat"]
    if not isinstance(version, int) or version < 4:
        raise CourseError(f"{path} is in the old notebook format {version}.", OLD_FORMAT)
    if not isinstance(notebook.get("cells"), list):
        raise CourseError(f"{path} has no list of cells.", "`tito module reset NN` brings a fresh one.")
    return notebook


def read(path: Path) -> tuple[Cell, ...]:
    """The cells of the notebook at `path`."""
    return cells_of(load_json(path), str(path))


def cells_of(notebook: dict, name: str) -> tuple[Cell, ...]:
    """The cells of a notebook that is already JSON; `name` is for messages."""
    return tuple(_cell(number, raw, name) for number, raw in enumerate(notebook["cells"], start=1))


def _cell(number: int, raw: object, name: str) -> Cell:
    if not isinstance(raw, dict) or not isinstance(raw.get("source"), (str, list)):
        raise CourseError(f"{name}: cell {number} has no source.", "`tito module reset NN` brings a fresh one.")
    source = raw["source"] if isinstance(raw["source"], str) else "".join(map(str, raw["source"]))
    metadata = raw.get("metadata")
    grading = metadata.get("nbgrader") if isinstance(metadata, dict) else None
    grading = grading if isinstance(grading, dict) else {}
    return Cell(
        number,
        str(raw.get("id", "")),
        str(raw.get("cell_type", "")),
        source,
        grading.get("grade_id"),
        bool(grading.get("solution")),
        bool(grading.get("grade")),
    )


def find(cells: tuple[Cell, ...], grade_id: str) -> Cell | None:
    """The cell with this grade id; where an editor has dropped the metadata, the one with this cell id."""
    by_grade = [cell for cell in cells if cell.grade_id == grade_id]
    by_id = [cell for cell in cells if cell.id == grade_id]
    return next(iter(by_grade + by_id), None)


def find_check(cells: tuple[Cell, ...], check: Check) -> Cell | None:
    """The cell of `check` in a learner's notebook, or None where it was deleted."""
    return find(cells, check.id)


def default_exp(cells: tuple[Cell, ...]) -> tuple[Cell, str] | None:
    """The cell and the value of the directive `#| default_exp`, None where no cell has it."""
    for cell in cells:
        found = re.search(r"^#\|\s*default_exp\s+(\S+)", cell.source, re.MULTILINE)
        if cell.kind == "code" and found:
            return cell, found.group(1)
    return None


def fill(released: str, solutions: dict[str, str]) -> str:
    """The text of the notebook `released` with the source of each hole in `solutions` put in, by grade id."""
    notebook = json.loads(released)
    missing = set(solutions)
    for raw in notebook["cells"]:
        grade_id = raw["metadata"].get("nbgrader", {}).get("grade_id")
        if grade_id in solutions:
            raw["source"] = solutions[grade_id].splitlines(keepends=True)
            missing.discard(grade_id)
    if missing:
        raise CourseError(f"The notebook has no cell for {', '.join(sorted(missing))}.", "Run `tito dev build`.")
    return to_text(notebook)


def to_text(notebook: dict) -> str:
    """A notebook's JSON in the one layout that Jupyter itself writes."""
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
