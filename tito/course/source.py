"""The maintainer's text of a lesson: src/NN_name/NN_name.py and its exercises.toml, read with jupytext."""

from __future__ import annotations

import copy
import functools
import hashlib
import re
import sys
import textwrap
import tomllib
from pathlib import Path

from tito.course.errors import CourseError
from tito.course.manifest import Course, Lesson
from tito.course.notebook import Cell, cells_of, fill

REGION = re.compile(r"^(?P<indent>[ \t]*)### BEGIN SOLUTION[ \t]*\n.*?^[ \t]*### END SOLUTION[ \t]*$", re.M | re.S)
MARKER = re.compile(r"^[ \t]*### (BEGIN|END) SOLUTION[ \t]*\n?", re.M)


def find_root(start: Path | None = None) -> Path:
    """The maintainers' repository: the nearest folder from `start` upwards that holds src/course.toml."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "src" / "course.toml").is_file():
            return folder
    raise CourseError(
        f"No src/course.toml in {here} or a folder above it.", "This command needs the maintainers' repository."
    )


def chosen(root: Path, texts: list[str]) -> list[str]:
    """The numbers of the lessons that `texts` name (as 17, 17_memoization or memoization); empty means all."""
    course = Course(root, "", "", tuple(bare_lessons(root)))
    return [course.lesson(text).number for text in texts]


def registry(root: Path) -> dict:
    """src/course.toml."""
    path = root / "src" / "course.toml"
    if not path.is_file():
        raise CourseError(f"{path} is missing.", "This command needs the maintainers' repository, with src/.")
    return tomllib.loads(path.read_text(encoding="utf-8"))


def bare_lessons(root: Path) -> list[Lesson]:
    """The lessons as the registry tells them, before anything is derived from their notebooks."""
    entries = registry(root)["lesson"]
    return [Lesson(**{**entry, "needs": tuple(entry["needs"])}, root=root) for entry in entries]


def exercises(lesson: Lesson) -> list[dict]:
    """The entries of exercises.toml."""
    path = lesson.source.parent / "exercises.toml"
    if not path.is_file():
        raise CourseError(f"{path} is missing.", "Every lesson has one: hints and wrong bodies per exercise.")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")).get("exercise", [])
    except tomllib.TOMLDecodeError as error:
        raise CourseError(f"{path}: {error}.", "Mend the file.") from None


@functools.lru_cache(maxsize=64)
def _read(path: Path, stamp: int):
    # jsonschema imports a slow grammar where JupyterLab is installed; our notebooks need none of it.
    sys.modules.setdefault("rfc3987_syntax", None)
    import jupytext

    return jupytext.reads(path.read_text(encoding="utf-8"), fmt="py:percent")


def notebook_of(lesson: Lesson):
    """The lesson as an nbformat notebook, with solutions, hidden tests and stable cell ids."""
    if not lesson.source.is_file():
        raise CourseError(f"{lesson.source} is missing.", "Each lesson in src/course.toml has its source there.")
    notebook = copy.deepcopy(_read(lesson.source, lesson.source.stat().st_mtime_ns))
    used: set[str] = set()
    for cell in notebook.cells:
        grade_id = cell.metadata.get("nbgrader", {}).get("grade_id")
        cell["id"] = _fresh(grade_id or f"{lesson.number}-{_hash(cell.source)}", used)
    return notebook


def cells(lesson: Lesson) -> tuple[Cell, ...]:
    """The lesson's cells, with solutions."""
    return cells_of(notebook_of(lesson), str(lesson.source))


def solutions(lesson: Lesson) -> dict[str, str]:
    """grade id -> source of each hole, solved, without the markers."""
    return {cell.grade_id: MARKER.sub("", cell.source) for cell in cells(lesson) if cell.is_hole}


def solved_notebook(lesson: Lesson, replace: dict[str, str] | None = None) -> str:
    """The text of the released notebook with every hole solved (`replace` puts other sources into some)."""
    return fill(lesson.notebook.read_text(encoding="utf-8"), {**solutions(lesson), **(replace or {})})


def with_body(source: str, body: str, hole: int = 1) -> str:
    """A hole's source with its solution region number `hole` replaced by `body`, indented as the region is."""
    regions = list(REGION.finditer(source))
    if not 1 <= hole <= len(regions):
        raise CourseError(f"There is no solution region {hole}: the cell has {len(regions)}.", "Mend `hole`.")
    region = regions[hole - 1]
    new = textwrap.indent(textwrap.dedent(body).strip("\n"), region["indent"])
    return source[: region.start()] + new + source[region.end() :]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _fresh(wanted: str, used: set[str]) -> str:
    """`wanted`, or with a number behind it where the notebook has it already; remembers it in `used`."""
    name, count = wanted, 1
    while name in used:
        count += 1
        name = f"{wanted}-{count}"
    used.add(name)
    return name
