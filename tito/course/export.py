"""From the cells of a notebook to the text of a package file, or to one clear error and nothing written.

The cells marked `#| export` go into the file, in order, and nothing else does. The same function serves the
reference (from src) and a learner's notebook.
"""

from __future__ import annotations

import ast
import re

from tito.course.errors import CourseError
from tito.course.manifest import Lesson
from tito.course.notebook import Cell, default_exp

DIRECTIVE = re.compile(r"^#\|\s*(\w+).*$")
MARKER = re.compile(r"^\s*### (BEGIN|END) SOLUTION\s*$")
MAGIC = re.compile(r"^\s*([%!]|get_ipython\()")


def module_source(lesson: Lesson, cells: tuple[Cell, ...], origin: str) -> str:
    """The text of `lesson`'s package file. `origin` is the line of its header that says where it comes from.

    Raises CourseError, with the cell and the line, for a wrong or missing target, a syntax error, a notebook
    command, a cell that lost its `#| export`, and a public name that the lesson exports and no cell defines.
    """
    _require_target(lesson, cells)
    exported = [cell for cell in cells if cell.kind == "code" and "export" in directives(cell)]
    trees = {cell.number: parse(cell) for cell in exported}
    names = [name for cell in exported for name in public_names(trees[cell.number])]
    _require_names(lesson, cells, set(names))
    listing = ",\n    ".join(f'"{name}"' for name in dict.fromkeys(names))
    head = f'"""{lesson.title}: {lesson.summary}.\n\nLesson {lesson.folder}. {origin}\n"""\n'
    parts = [head + (f"\n__all__ = [\n    {listing},\n]" if names else "\n__all__ = []")]
    parts += [f"# %% {cell.label}\n{body(cell)}" for cell in exported]
    return "\n\n\n".join(part.strip("\n") for part in parts) + "\n"


def directives(cell: Cell) -> set[str]:
    """The directives (`#| name …`) that open a cell."""
    found = set()
    for line in cell.source.splitlines():
        match = DIRECTIVE.match(line)
        if match:
            found.add(match.group(1))
        elif line.strip():
            break
    return found


def body(cell: Cell) -> str:
    """A cell's code as it goes into the package: without directives and solution markers."""
    lines = [line.rstrip() for line in cell.source.splitlines()]
    return "\n".join(line for line in lines if not DIRECTIVE.match(line) and not MARKER.match(line)).strip("\n")


def parse(cell: Cell) -> ast.Module:
    """The syntax tree of a cell; a notebook command or a syntax error is a CourseError with cell and line."""
    for number, line in enumerate(cell.source.splitlines(), start=1):
        if MAGIC.match(line):
            raise CourseError(
                f"{cell.label}, line {number}: '{line.strip()}' is a notebook command, and Python cannot import it.",
                "Move it to a cell without '#| export', or write it in Python.",
            )
    try:
        tree = ast.parse(cell.source)
        compile(cell.source, cell.label, "exec", dont_inherit=True)
        return tree
    except (SyntaxError, ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None) or 1
        text = (cell.source.splitlines() or [""])[min(line, len(cell.source.splitlines()) or 1) - 1].strip()
        raise CourseError(
            f"{cell.label}, line {line}: {getattr(error, 'msg', error)}: {text}",
            "Mend the line, run the cell, and try again. Nothing was written.",
        ) from None


def public_names(tree: ast.Module) -> list[str]:
    """Names that the top level of a cell defines and that do not begin with an underscore."""
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            targets = [name for target in node.targets for name in ast.walk(target)]
            names += [n.id for n in targets if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return [name for name in names if not name.startswith("_")]


def _require_target(lesson: Lesson, cells: tuple[Cell, ...]) -> None:
    found = default_exp(cells)
    if found is None:
        raise CourseError(
            f"No cell says where lesson {lesson.folder} goes: '#| default_exp {lesson.target}' is missing.",
            f"Put the line '#| default_exp {lesson.target}' back at the top of the first code cell.",
        )
    cell, target = found
    if target != lesson.target:
        raise CourseError(
            f"{cell.label} exports to '{target}', but lesson {lesson.folder} goes to '{lesson.target}'.",
            f"Write '#| default_exp {lesson.target}' there.",
        )


def _require_names(lesson: Lesson, cells: tuple[Cell, ...], names: set[str]) -> None:
    missing = [name for name in lesson.exports if name not in names]
    if not missing:
        return
    name = missing[0]
    for cell in cells:
        if cell.kind == "code" and re.search(rf"^(def|class)\s+{name}\b|^{name}\s*[:=]", cell.source, re.MULTILINE):
            raise CourseError(
                f"{cell.label} defines '{name}', but lacks the line '#| export', so it would not reach the package.",
                "Put '#| export' back as the first line of that cell.",
            )
    home = next((f" (cell {lesson.number}-{e.id})" for e in lesson.exercises if name in e.exports), "")
    others = f" (and {len(missing) - 1} more: {', '.join(missing[1:6])})" if len(missing) > 1 else ""
    raise CourseError(
        f"No exported cell defines '{name}'{home}, which lesson {lesson.folder} gives to the package{others}.",
        "The cell was deleted, or the name changed. Restore it; "
        f"`tito module reset {lesson.number}` brings a fresh notebook and keeps yours as a backup.",
    )
