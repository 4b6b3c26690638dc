"""A class list: from a CSV, as it comes from a registrar or a spreadsheet, to the students of the gradebook."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path

from tito.course.errors import CourseError

COLUMNS = {  # heading, lower case and without blanks, _ and -
    "id": "id", "studentid": "id", "name": "name", "fullname": "name", "firstname": "first_name",
    "lastname": "last_name", "email": "email", "mail": "email", "emailaddress": "email",
}  # fmt: skip
ID = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._@-]{0,98}[A-Za-z0-9_@-])?")
EMAIL = re.compile(r"[^@\s]+@[^@\s]+")
SUFFIXES = {"jr", "sr", "ii", "iii", "iv"}
MOST_BYTES, MOST_LETTERS, MOST_PROBLEMS = 10_000_000, 128, 20
ADVICE = (
    "Save it from the spreadsheet as CSV (UTF-8) with the columns id, name, email. An id becomes the name of a folder: "
    "up to 100 letters A-Z, digits, . _ - and @; it begins with a letter or digit and does not end with a dot. "
    "Nothing was changed."
)


@dataclass(frozen=True)
class Student:
    """One line of a class list. A field that the list does not tell is None."""

    id: str
    first_name: str | None = None
    last_name: str | None = None
    email: str | None = None


def read(path: Path) -> list[Student]:
    """The students in the CSV at `path`; all that is wrong with it is said at once, line by line."""
    text = _text(path)
    reader = csv.reader(io.StringIO(text, newline=None), delimiter=_delimiter(text), strict=True)
    rows = (row for row in reader if any(cell.strip() for cell in row))
    students, problems, seen = [], [], {}
    try:
        columns = _columns(path, next(rows, []))
        for row in rows:
            student, wrong = _student(columns, row)
            first = seen.setdefault(student.id.lower(), reader.line_num) if student.id else reader.line_num
            if first != reader.line_num:  # folders of ids that differ only in case are one folder on macOS
                wrong = [*wrong, f"id '{student.id}' stands in line {first} already"]
            problems += [f"line {reader.line_num}: {text}" for text in wrong]
            students.append(student)
    except csv.Error as error:
        problems.append(f"line {reader.line_num}: {error}")
    if problems:
        more = len(problems) - MOST_PROBLEMS
        shown = problems[:MOST_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
        raise CourseError("\n".join([f"{path} cannot be taken as a class list:", *shown]), ADVICE)
    if not students:
        raise CourseError(f"{path} lists no student.", ADVICE)
    return students


def _text(path: Path) -> str:
    """The text of the file: UTF-8, or UTF-16 with its mark, as spreadsheets write it."""
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise CourseError(f"{path} cannot be read: {error.strerror}.", "Name a CSV file.") from None
    if len(content) > MOST_BYTES:
        raise CourseError(f"{path} is larger than {MOST_BYTES // 10**6} MB: no class list.", ADVICE)
    wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        raise CourseError(f"{path} is not text in UTF-8.", ADVICE) from None
    if "\0" in text:
        raise CourseError(f"{path} is not text: it holds NUL.", ADVICE)
    return text


def _delimiter(text: str) -> str:
    """Comma, semicolon or tab: whichever the line with the headings has most of."""
    headings = next(filter(str.strip, text.splitlines()), "")
    return max(",;\t", key=headings.count)


def _columns(path: Path, headings: list[str]) -> list[str | None]:
    """What each column holds, None for one that we do not need."""
    columns = [COLUMNS.get(re.sub(r"[\s_-]", "", heading).lower()) for heading in headings]
    known = [column for column in columns if column]
    twice = sorted({column for column in known if known.count(column) > 1})
    if "id" not in known or twice:
        came = ", ".join(f"'{heading.strip()}'" for heading in headings) or "nothing"
        problem = f"two columns for {', '.join(twice)}" if twice else "no column id"
        raise CourseError(f"{path} has {problem} in its first line: {came}.", ADVICE)
    return columns


def _student(columns: list[str | None], row: list[str]) -> tuple[Student, list[str]]:
    """The student in a row, and what is wrong with it."""
    cells = [" ".join(cell.split()) for cell in row]
    found = {column: cell for column, cell in zip(columns, cells) if column and cell}
    name, wrong = found.pop("name", None), []
    if name and not found.keys() & {"first_name", "last_name"}:
        found["first_name"], found["last_name"] = split_name(name)
    student = Student(**{"id": "", **found})
    if len(row) > len(columns) and any(cells[len(columns) :]):
        wrong.append(f"{len(row)} fields under {len(columns)} headings; a name with a comma needs quotes")
    if not student.id:
        wrong.append("no id")
    elif not ID.fullmatch(student.id):
        wrong.append(f"id '{student.id[:40]}' cannot be the name of a folder")
    if student.email and not EMAIL.fullmatch(student.email):
        wrong.append(f"'{student.email}' is no e-mail address")
    for field in (student.first_name, student.last_name, student.email):
        if field and (len(field) > MOST_LETTERS or not field.isprintable()):
            wrong.append(f"'{field[:40]}' is longer than {MOST_LETTERS} letters or holds a control character")
    return student, wrong


def split_name(name: str) -> tuple[str, str]:
    """First and last name: "Doe, Jane" and "Jane Doe", "Ludwig van Beethoven", "John Doe, Jr", "Plato".

    >>> split_name("Ludwig van Beethoven"), split_name("Doe, Jr, John")
    (('Ludwig', 'van Beethoven'), ('John', 'Doe, Jr'))
    """
    parts = [part.strip() for part in name.split(",") if part.strip()]
    suffix = [part for part in parts if part.rstrip(".").lower() in SUFFIXES]
    plain = [part for part in parts if part not in suffix] or [name]
    if len(plain) > 1:
        first, last = " ".join(plain[1:]), plain[0]
    else:
        words = plain[0].split()
        particle = next((n for n, word in enumerate(words[1:-1], start=1) if word[0].islower()), len(words) - 1)
        first, last = " ".join(words[:particle]), " ".join(words[particle:])
    return first, ", ".join([last, *suffix])


@dataclass(frozen=True)
class Changes:
    """What a class list did to the gradebook: ids added, (id, field, old, new) corrected, how many it leaves alone."""

    added: tuple[str, ...]
    corrected: tuple[tuple[str, str, str, str], ...]
    unchanged: int
    not_listed: int


def enter(gradebook, students: list[Student]) -> Changes:
    """Add or correct `students` in nbgrader's gradebook, all in one transaction; nobody is removed."""
    from nbgrader.api import Student as Row

    rows = {row.id: row for row in gradebook.students}
    folders = {name.lower(): name for name in rows}
    clashes = [s.id for s in students if s.id not in rows and s.id.lower() in folders]
    if clashes:
        listed = ", ".join(f"'{name}' ('{folders[name.lower()]}' in the gradebook)" for name in clashes)
        raise CourseError(f"Ids differ from known ones in case alone: {listed}.", "Write them as the gradebook does.")
    added, corrected = [], []
    for student in students:
        told = {name: value for name, value in vars(student).items() if name != "id" and value is not None}
        if student.id not in rows:
            gradebook.db.add(Row(**vars(student)))
            added.append(student.id)
            continue
        row = rows[student.id]
        if _full_name(row.first_name, row.last_name) == _full_name(student.first_name, student.last_name):
            told = {"email": student.email} if student.email else {}  # a person may have split the name better
        for name, new in told.items():
            old = getattr(row, name) or ""
            if old != new:
                setattr(row, name, new)
                corrected.append((student.id, name, old, new))
    gradebook.db.commit()
    touched = {name for name, *_ in corrected} | set(added)
    return Changes(tuple(added), tuple(corrected), len(students) - len(touched), len(rows.keys() - _ids(students)))


def _ids(students: list[Student]) -> set[str]:
    return {student.id for student in students}


def _full_name(first: str | None, last: str | None) -> str:
    return " ".join(filter(None, [first, last]))
