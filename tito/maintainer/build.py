"""`tito dev build`: from src/ to the students' notebooks, the reference package and the index.

Building twice changes no byte: ids are derived, nothing has a date, and only what differs is written.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tito.course import source
from tito.course.export import directives, parse, public_names
from tito.course.files import write_atomic
from tito.course.manifest import INDEX, Lesson
from tito.course.notebook import cells_of, digest
from tito.course.student_version import notebook_text, reference_text


def build(root: Path, numbers: list[str] | None = None) -> list[Path]:
    """Build the lessons `numbers` (default: all) and the index; return the files that changed."""
    lessons = source.bare_lessons(root)
    chosen = [lesson for lesson in lessons if not numbers or lesson.number in numbers]
    changed = []
    for lesson in chosen:
        for path, text in built_files(lesson).items():
            changed += _write(path, text)
    changed += _write(root / INDEX, index_text(root, lessons, chosen))
    return changed


def built_files(lesson: Lesson) -> dict[Path, str]:
    """What the build makes of one lesson: its notebook and its reference file, as texts."""
    return {lesson.notebook: notebook_text(lesson), lesson.package_file: reference_text(lesson)}


def index_text(root: Path, lessons: list[Lesson], chosen: list[Lesson]) -> str:
    """modules/index.json: what student commands know of the course; lessons not `chosen` keep their entries."""
    old = json.loads((root / INDEX).read_text(encoding="utf-8"))["lessons"] if (root / INDEX).is_file() else []
    known = {entry["number"]: entry for entry in old} | {lesson.number: index_entry(lesson) for lesson in chosen}
    entries = [known[lesson.number] for lesson in lessons if lesson.number in known]
    index = {"comment": "Built by `tito dev build`.", "course": source.registry(root)["course"], "lessons": entries}
    return json.dumps(index, indent=1, ensure_ascii=False) + "\n"


def index_entry(lesson: Lesson) -> dict:
    """The registry's entry with what the notebook and the exercises add to it."""
    text = lesson.notebook.read_text(encoding="utf-8")
    released = cells_of(json.loads(text), str(lesson.notebook))
    solved = {cell.grade_id: cell for cell in source.cells(lesson) if cell.grade_id}
    titles = {entry["id"]: entry["title"] for entry in source.exercises(lesson)}
    raw = json.loads(text)["cells"]
    checks = []
    for cell in released:
        if cell.is_check:
            points = raw[cell.number - 1]["metadata"]["nbgrader"]["points"]
            exercise = cell.grade_id.removeprefix(f"{lesson.number}-").removesuffix("-test")
            title = titles.get(exercise, "The whole lesson" if exercise == "module" else _words(exercise))
            checks.append({"id": cell.grade_id, "title": title, "points": points, "digest": digest(cell.source)})
    exercises = [
        {
            "id": entry["id"],
            "title": entry["title"],
            "hints": entry.get("hints", []),
            "exports": _exports(solved.get(f"{lesson.number}-{entry['id']}")),
        }
        for entry in source.exercises(lesson)
    ]
    names = ("number", "name", "title", "summary", "target", "minutes", "points")
    entry = {name: getattr(lesson, name) for name in names} | {"needs": list(lesson.needs)}
    exports = [name for cell in source.cells(lesson) for name in _exports(cell)]
    return entry | {
        "exports": list(dict.fromkeys(exports)),
        "exercises": exercises,
        "checks": checks,
        "notebook_digest": hashlib.sha256(text.encode("utf-8")).hexdigest(),
    }


def _exports(cell) -> list[str]:
    """The public names that a cell gives to the package."""
    if cell is None or cell.kind != "code" or "export" not in directives(cell):
        return []
    return public_names(parse(cell))


def _words(name: str) -> str:
    """failed-pass -> Failed pass: the title of a check that has no exercise of its own."""
    return name.replace("-", " ").capitalize()


def _write(path: Path, text: str) -> list[Path]:
    if path.is_file() and path.read_bytes() == text.encode("utf-8"):
        return []
    write_atomic(path, text)
    return [path]
