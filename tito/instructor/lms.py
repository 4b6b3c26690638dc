"""The forms in which Canvas and Moodle import grades.

Names and addresses are a student's to choose, and a spreadsheet runs a cell that begins with `=`. So such a cell gets
a leading apostrophe; ids and addresses that are plainly ids stay as they are, since rows are matched by them.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tito.course.errors import CourseError
from tito.instructor.assignment import Assignment
from tito.instructor.pages import number
from tito.instructor.scores import Row

CANVAS = ("Student", "ID", "SIS User ID", "SIS Login ID", "Section")
POINTS = "    Points Possible"  # Canvas's own spelling
LARGEST = 20_000_000  # bytes of a gradebook export
EXPORT_IT = "In Canvas: Grades, Export, Export Entire Gradebook; give that file by --like."


@dataclass(frozen=True)
class Graded:
    """A lesson and the rows of all students."""

    assignment: Assignment
    rows: list[Row]


def defused(text: str) -> str:
    """`text` as a cell that no spreadsheet takes for a formula."""
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r", "\n") else text


def identifier(text: str) -> str:
    """An id or address as it is, as long as it can be one."""
    return text if re.fullmatch(r"[-+@]?[\w.@+-]*", text) else defused(text)


def _score(row: Row | None) -> str:
    return "" if row is None or row.total is None else number(row.total)


def _by_student(graded: list[Graded]) -> list[tuple[Row, list[str]]]:
    """Each student once, with the scores of all lessons."""
    columns = [{row.student: row for row in each.rows} for each in graded]
    return [(row, [_score(column.get(row.student)) for column in columns]) for row in graded[0].rows]


def moodle(graded: list[Graded]) -> list[list[str]]:
    """Moodle's grade import: students by ID number or address, one column per assignment."""
    table = [["ID number", "Email address", *(each.assignment.name for each in graded)]]
    for row, cells in _by_student(graded):
        table.append([identifier(row.student), identifier(row.email), *cells])
    return table


def canvas(graded: list[Graded]) -> list[list[str]]:
    """A file from the roster alone; Canvas makes new assignments of its columns."""
    table = [[*CANVAS, *(each.assignment.name for each in graded)]]
    table.append([POINTS, "", "", "", "", *(number(each.assignment.max_score) for each in graded)])
    for row, cells in _by_student(graded):
        name = ", ".join(filter(None, [row.last_name, row.first_name])) or row.student
        ids = [identifier(text) for text in (row.lms_id, row.student, row.email or row.student)]
        table.append([defused(name), *ids, "", *cells])
    return table


def canvas_like(graded: list[Graded], like: Path) -> tuple[list[list[str]], list[str]]:
    """Canvas's own export with the lessons' columns filled in, and remarks on what was left out."""
    table = _read(like)
    head, remarks, filled = [cell.strip() for cell in table[0]], [], 0
    if not {"Student", "ID"} <= set(head):
        raise CourseError(f"{like} is no gradebook export of Canvas: it has no columns Student and ID.", EXPORT_IT)
    for row in table[1:]:
        row += [""] * (len(head) - len(row))
    matches = _matches(head, table, graded[0].rows)
    columns = {each.assignment.name: _column(head, each.assignment, like) for each in graded}
    for each in graded:
        column, known = columns[each.assignment.name], {row.student: row for row in each.rows}
        if column is None:
            remarks.append(f"{like} has no column for {each.assignment.name}; it was left out.")
            continue
        filled += 1
        for line, student in matches.items():
            table[line][column] = _score(known[student]) or table[line][column]
        possible = next((row[column] for row in table[1:] if _is_points(row)), "").strip()
        if possible and possible != number(each.assignment.max_score):
            most = number(each.assignment.max_score)
            remarks.append(f"{head[column]}: {possible} points possible in Canvas, {most} here; scores are as here.")
    if not filled:
        wanted = f"{graded[0].assignment.name} (12345)"
        raise CourseError(f"{like} has no column for any of these lessons, e.g. '{wanted}'.", EXPORT_IT)
    left = [row.name for row in graded[0].rows if row.student not in matches.values()]
    remarks += [f"{name} is not in {like}." for name in left]
    for row in table[1:]:
        for title in ("Student", "Section"):
            if title in head and not _is_points(row):
                row[head.index(title)] = defused(row[head.index(title)])
    return table, remarks


def _read(path: Path) -> list[list[str]]:
    """The rows of a CSV, whether its cells are parted by commas, semicolons or tabs."""
    try:
        if path.stat().st_size > LARGEST:
            raise CourseError(f"{path} is larger than {LARGEST // 10**6} MB.", EXPORT_IT)
        text = path.read_text(encoding="utf-8-sig")
        first = text.partition("\n")[0]
        table = list(csv.reader(io.StringIO(text), delimiter=max(",;\t", key=first.count)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CourseError(f"{path} cannot be read: {error}.", EXPORT_IT) from None
    table = [row for row in table if row]
    if not table:
        raise CourseError(f"{path} is empty.", EXPORT_IT)
    return table


def _column(head: list[str], assignment: Assignment, like: Path) -> int | None:
    """Where the assignment's scores go: its name, with or without Canvas's id behind it."""
    _, _, name = assignment.name.partition("_")
    wanted = {name, assignment.name, assignment.title, f"{assignment.number} {assignment.title}"}
    wanted = {_plain(text) for text in wanted}
    titles = [_plain(re.sub(r"\s*\(\d+\)$", "", title)).removeprefix("lesson ") for title in head]
    found = [at for at, title in enumerate(titles) if title in wanted]
    if len(found) > 1:
        several = ", ".join(f"'{head[at]}'" for at in found)
        raise CourseError(f"{like} has several columns for {assignment.name}: {several}.", "Delete all but one there.")
    return found[0] if found else None


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold().replace("_", " ")))


def _is_points(row: list[str]) -> bool:
    return row[0].strip().casefold() == "points possible"


def _matches(head: list[str], table: list[list[str]], students: list[Row]) -> dict[int, str]:
    """Line of the table -> student: by ids first, and by name only who has no row by then."""
    tiers: list[tuple[str, Callable[[Row], tuple[str, ...]]]] = [
        ("SIS User ID", lambda row: (row.student,)),
        ("ID", lambda row: (row.lms_id,)),
        ("SIS Login ID", lambda row: (row.student, row.email)),
        ("Student", lambda row: (" ".join(sorted(_plain(row.name).split())),)),
    ]
    matches: dict[int, str] = {}
    for title, keys in tiers:
        if title not in head:
            continue
        open_lines = [at for at, row in enumerate(table) if at and at not in matches and not _is_points(row)]
        cells = {at: _key(table[at][head.index(title)], title) for at in open_lines}
        lines = {cell: at for at, cell in cells.items() if cell and Counter(cells.values())[cell] == 1}
        free = [row for row in students if row.student not in matches.values()]
        names = Counter(key for row in free for key in {key.casefold() for key in keys(row)})
        for row in free:
            for key in dict.fromkeys(key.casefold() for key in keys(row)):
                if names[key] == 1 and key in lines and lines[key] not in matches:
                    matches[lines[key]] = row.student
                    break
    return matches


def _key(cell: str, title: str) -> str:
    """A cell as students are looked up by it; of a name, its words in any order: "Doe, Ada" is "Ada Doe"."""
    return " ".join(sorted(_plain(cell).split())) if title == "Student" else cell.strip().casefold()
