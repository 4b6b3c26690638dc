"""From a submitted notebook, however it was treated, to the cells that run. No student code runs here."""

from __future__ import annotations

import copy

import pytest

from tito.instructor.assignment import Assignment, AssignmentCell
from tito.instructor.transplant import MAX_CELLS, MAX_FINDINGS, transplant


def made(grade_id: str, role: str, released: str, hidden: str = "", points: int = 0) -> AssignmentCell:
    marks = {"grade_id": grade_id, "grade": role == "check", "solution": role == "hole", "locked": role != "hole"}
    marks |= {"points": points} if points else {}
    return AssignmentCell(f"id-{grade_id}", "code", role, released + hidden, released, {"nbgrader": marks})


CELLS = (
    AssignmentCell("intro", "markdown", "plain", "# A lesson", "# A lesson"),
    AssignmentCell("imports", "code", "plain", "import math", "import math"),
    made("double", "hole", "def double(x):\n    raise NotImplementedError\n"),
    made("double-test", "check", "assert double(2) == 4\n", "assert double(7) == 14\n", 2),
    made("guess", "hole", "# guess = ...\n"),
    made("guess-test", "check", "assert guess\n", "", 1),
)
LESSON = Assignment("99_small", "small", "99", "Small", "tinytorch.small", CELLS, {}, {}, {}, {})


@pytest.fixture
def notebook() -> dict:
    """The released notebook, solved."""
    cells = [
        {"id": c.id, "cell_type": c.kind, "source": c.released, "metadata": copy.deepcopy(c.metadata)} for c in CELLS
    ]
    cells[2]["source"], cells[4]["source"] = "def double(x):\n    return 2 * x\n", "guess = 1\n"
    return {"cells": cells, "nbformat": 4}


def sources(notebook: dict) -> list[str]:
    return [cell.source for cell in transplant(LESSON, notebook)[0]]


SOLVED = [
    "# A lesson", "import math", "def double(x):\n    return 2 * x\n", CELLS[3].source, "guess = 1\n", CELLS[5].source,
]  # fmt: skip


def test_holes_are_the_students_and_checks_have_their_hidden_tests(notebook):
    assert sources(notebook) == SOLVED
    assert transplant(LESSON, notebook)[1] == ()


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda cells: cells.pop(3), "double-test was deleted"),
        (lambda cells: cells.append(cells[3]), "is there 2 times"),
        (lambda cells: cells[3].update(source="pass"), "double-test was changed"),
        (lambda cells: cells[3].update(cell_type="markdown"), "turned into text"),
        (lambda cells: cells[3]["metadata"]["nbgrader"].update(points=1000), "its 'points' was changed"),
        (lambda cells: cells[3]["metadata"]["nbgrader"].update(grade=False), "its 'grade' was changed"),
        (lambda cells: cells[3].update(metadata={}), "had lost nbgrader's marks"),
        (lambda cells: cells.reverse(), ""),
        (lambda cells: [cell.pop("id") for cell in cells], ""),
        (lambda cells: [cell.update(metadata={}) for cell in cells], "all of nbgrader's marks"),
        (lambda cells: [cell.update(id="", metadata={"colab": {}}) for cell in cells], "all of nbgrader's marks"),
        (lambda cells: cells[2].update(source="def double(x):\r\n    return 2 * x\r\n"), ""),
    ],
)
def test_whatever_is_done_to_the_structure_the_same_cells_run(notebook, change, finding):
    change(notebook["cells"])
    cells, findings = transplant(LESSON, notebook)
    assert [cell.source for cell in cells if cell.role != "own"] == SOLVED
    assert len(findings) == bool(finding) and finding in "".join(findings)


@pytest.mark.parametrize("points", [1000, 2])
def test_a_cell_that_calls_itself_graded_is_reported_and_is_none(notebook, points):
    marks = {"grade_id": "more" * 1000, "grade": True, "points": points, "locked": True}
    notebook["cells"].insert(3, {"cell_type": "code", "source": "x = 1", "metadata": {"nbgrader": marks}})
    cells, findings = transplant(LESSON, notebook)
    assert [cell.role for cell in cells] == ["plain", "plain", "hole", "own", "check", "hole", "check"]
    assert "calls itself graded" in findings[0] and len(findings[0]) < 200


def test_a_check_under_the_name_of_a_hole_stays_a_hole(notebook):
    notebook["cells"][3]["metadata"]["nbgrader"]["grade_id"] = "double"
    cells, findings = transplant(LESSON, notebook)
    assert cells[3].source == CELLS[3].source and "double-test was deleted" in " ".join(findings)


def test_of_two_cells_for_a_hole_the_last_one_that_was_worked_on_counts(notebook):
    again = copy.deepcopy(notebook["cells"][2])
    again["source"] = "def double(x):\n    return x + x\n"
    untouched = copy.deepcopy(notebook["cells"][2])
    untouched["source"] = CELLS[2].released
    notebook["cells"] += [again, untouched]
    cells, findings = transplant(LESSON, notebook)
    assert cells[2].source == again["source"] and "3 times" in findings[0]


def test_a_deleted_hole_and_one_that_is_text_are_reported(notebook):
    notebook["cells"][4]["cell_type"] = "markdown"
    del notebook["cells"][2]
    cells, findings = transplant(LESSON, notebook)
    assert cells[2].source == CELLS[2].released
    assert ["deleted" in findings[0], "turned into text" in findings[1]] == [True, True]


def test_helpers_stand_where_they_were_put_and_imports_in_a_given_cell_are_kept(notebook):
    notebook["cells"].insert(2, {"cell_type": "code", "source": "def helper(): pass"})
    notebook["cells"][1]["source"] += "\nimport json"
    cells = transplant(LESSON, notebook)[0]
    assert [cell.role for cell in cells][:4] == ["plain", "edited", "own", "hole"]
    assert cells[1].source.endswith("import json") and cells[1].origin is CELLS[1]


def test_no_flood(notebook):
    marked = [{"cell_type": "code", "source": str(n), "metadata": {"nbgrader": {"grade_id": f"x{n}", "grade": True}}}
              for n in range(3 * MAX_CELLS)]  # fmt: skip
    notebook["cells"] += marked
    cells, findings = transplant(LESSON, notebook)
    assert len(cells) <= MAX_CELLS + len(CELLS) and len(findings) == MAX_FINDINGS + 1
