"""The notebook that is run for a submission: the assignment as released, with the student's own code put in.

Whatever was done to the structure of the submitted notebook, what runs has every cell of the assignment, in its
order: checks and locked cells from the source, holes and other code from the student, found by grade id, else by
cell id, else by their text, else (holes) by what they define. Cells that the student added stand where they were put.
"""

from __future__ import annotations

from dataclasses import dataclass

from tito.course.notebook import digest
from tito.instructor.assignment import Assignment, AssignmentCell

MAX_CELLS = 2000
MAX_FINDINGS = 50
LOST = "had lost nbgrader's marks; the original was run in its place."


@dataclass(frozen=True)
class RunCell:
    """One cell to run. `origin` is the assignment's cell, None for one that the student added."""

    kind: str  # code, markdown
    role: str  # hole, check, locked, plain (as released), edited (plain, in the student's wording), own
    source: str
    origin: AssignmentCell | None = None

    @property
    def grade_id(self) -> str | None:
        return self.origin.grade_id if self.origin else None


@dataclass(frozen=True)
class _Submitted:
    """A cell of the submitted notebook, whatever is wrong with it."""

    id: str
    kind: str
    source: str
    grade_id: str | None
    grading: dict


def transplant(assignment: Assignment, notebook: dict) -> tuple[tuple[RunCell, ...], tuple[str, ...]]:
    """The cells to run, and what was found on the way: a sentence for each thing that was repaired or left out."""
    findings: list[str] = []
    submitted = _cells(notebook, findings)
    places = _match(assignment, submitted, findings)
    cells = [_cell(cell, submitted, places.get(number, []), findings) for number, cell in enumerate(assignment.cells)]
    home = {index: number for number, indices in places.items() for index in indices}
    own: dict[int, list[RunCell]] = {}
    before = -1
    for index, cell in enumerate(submitted):
        before = home.get(index, before)
        if index in home or not cell.source.strip():
            continue
        if cell.grading.get("grade") or cell.grading.get("locked"):
            name = "".join(filter(str.isprintable, cell.grade_id or "without a name"))[:60]
            findings.append(f"A cell ({name}) calls itself graded or locked, and the lesson has none such: no points.")
        own.setdefault(before, []).append(RunCell(cell.kind, "own", cell.source))
    if submitted and not any(cell.grading for cell in submitted):
        findings = [text for text in findings if not text.endswith(LOST)]
        findings.append("The notebook had lost all of nbgrader's marks. Cells were found by what stands in them.")
    result = list(own.get(-1, []))
    for number, cell in enumerate(cells):
        result += [cell, *own.get(number, [])]
    return tuple(result), _bounded(list(dict.fromkeys(findings)))


def _bounded(findings: list[str]) -> tuple[str, ...]:
    """No more than anybody would read."""
    more = len(findings) - MAX_FINDINGS
    return (*findings[:MAX_FINDINGS], *([f"... and {more} findings more."] if more > 0 else []))


def _cells(notebook: dict, findings: list[str]) -> list[_Submitted]:
    """The submitted cells that can be read, up to MAX_CELLS."""
    cells, raw = [], notebook.get("cells")
    raw = raw if isinstance(raw, list) else []
    if len(raw) > MAX_CELLS:
        findings.append(f"The notebook has {len(raw)} cells; those after the first {MAX_CELLS} were left out.")
    for entry in raw[:MAX_CELLS]:
        source = entry.get("source") if isinstance(entry, dict) else None
        if isinstance(source, list):
            source = "".join(piece for piece in source if isinstance(piece, str))
        if not isinstance(source, str):
            findings.append("A cell without text was left out.")
            continue
        metadata = entry.get("metadata")
        grading = metadata.get("nbgrader") if isinstance(metadata, dict) else None
        grading = grading if isinstance(grading, dict) else {}
        name, number = grading.get("grade_id"), entry.get("id")
        source = source.replace("\r\n", "\n").encode("utf-8", "replace").decode("utf-8")
        kind = "code" if entry.get("cell_type") == "code" else "markdown"
        number, name = (each if isinstance(each, str) else None for each in (number, name))
        cells.append(_Submitted(number or "", kind, source, name, grading))
    return cells


def _match(assignment: Assignment, submitted: list[_Submitted], findings: list[str]) -> dict[int, list[int]]:
    """Number of each cell of the assignment -> indices of the submitted cells that stand for it, in order."""
    by_grade = {cell.grade_id: n for n, cell in enumerate(assignment.cells) if cell.grade_id}
    by_id = {cell.id: n for n, cell in enumerate(assignment.cells)}
    places: dict[int, list[int]] = {}
    left = []
    for index, cell in enumerate(submitted):
        number = by_grade.get(cell.grade_id)
        if number is None and (cell.grade_id is None or cell.grade_id not in by_grade):
            number = by_id.get(cell.id)
        if number is None:
            left.append(index)
        else:
            places.setdefault(number, []).append(index)
    texts: dict[tuple[str, str], list[int]] = {}  # Colab and others make new ids: such cells are known by their text
    for number, cell in enumerate(assignment.cells):
        if number not in places:
            texts.setdefault((cell.kind, digest(cell.released)), []).append(number)
    unknown = []
    for index in left:
        waiting = texts.get((submitted[index].kind, digest(submitted[index].source)))
        if waiting:
            places.setdefault(waiting.pop(0), []).append(index)
        else:
            unknown.append(index)
    _match_holes(assignment, submitted, unknown, places)
    return places


def _match_holes(
    assignment: Assignment, submitted: list[_Submitted], unknown: list[int], places: dict[int, list[int]]
) -> None:
    """A hole that lost its marks: known by the definition that it begins with, else as the only code in its place."""
    unknown = [index for index in unknown if submitted[index].kind == "code" and submitted[index].source.strip()]
    for number, cell in enumerate(assignment.cells):
        if cell.role != "hole" or number in places:
            continue
        first = next((line for line in cell.released.splitlines() if line.startswith(("def ", "class "))), None)
        after = max((i for n, found in places.items() if n < number for i in found), default=-1)
        until = min((i for n, found in places.items() if n > number for i in found), default=len(submitted))
        here = [i for i in unknown if after < i < until]
        same = [i for i in unknown if first and first in submitted[i].source.splitlines()]
        found = same or (here if len(here) == 1 else [])
        if found:
            places[number] = found
            unknown = [index for index in unknown if index not in found]


def _cell(cell: AssignmentCell, submitted: list[_Submitted], indices: list[int], findings: list[str]) -> RunCell:
    """What runs in the place of one cell of the assignment."""
    found = [submitted[index] for index in indices]
    name = cell.grade_id or cell.id
    if cell.role in ("check", "locked"):
        _compare(cell, found, findings)
        return RunCell(cell.kind, cell.role, cell.source, cell)
    edited = [each for each in found if digest(each.source) != digest(cell.released)]
    taken = (edited or found or [None])[-1]
    if cell.role == "hole":
        if len(found) > 1:
            findings.append(f"Cell {name} is there {len(found)} times; the last one that was worked on counts.")
        if taken is None:
            findings.append(f"Cell {name} was deleted: there is nothing to grade in its place.")
            return RunCell(cell.kind, "hole", cell.released, cell)
        if taken.kind != "code":
            findings.append(f"Cell {name} was turned into text, so its code did not run.")
            return RunCell(cell.kind, "hole", cell.released, cell)
        return RunCell(cell.kind, "hole", taken.source, cell)
    if taken is None or taken.kind != cell.kind or not edited:
        return RunCell(cell.kind, "plain", cell.released, cell)
    return RunCell(cell.kind, "edited", taken.source, cell)


def _compare(cell: AssignmentCell, found: list[_Submitted], findings: list[str]) -> None:
    """Report what was done to a check or a locked cell."""
    name, what = cell.grade_id, "Test cell" if cell.role == "check" else "Locked cell"
    again = "the original was run in its place"
    if not found:
        findings.append(f"{what} {name} was deleted; {again}.")
        return
    if len(found) > 1:
        findings.append(f"{what} {name} is there {len(found)} times; it was run once, as the original.")
    if any(digest(each.source) != digest(cell.released) for each in found):
        findings.append(f"{what} {name} was changed; {again}.")
    if any(each.kind != cell.kind for each in found):
        findings.append(f"{what} {name} was turned into text; {again}.")
    expected = cell.metadata.get("nbgrader", {})
    for key in ("grade", "solution", "locked", "points", "grade_id"):
        if any(each.grading and each.grading.get(key) != expected.get(key) for each in found):
            findings.append(f"{what} {name}: its '{key}' was changed; the original counts.")
    if any(not each.grading for each in found):
        findings.append(f"{what} {name} {LOST}")
