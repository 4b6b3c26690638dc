"""The habits of grain: prints who is longer than usual. Only what is far too long fails.

Where a thing is better longer, it may be longer and says why in one line; so these are warnings to look at.
"""

from __future__ import annotations

import ast
import json
import statistics
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE_FILE, FUNCTION, TITO_FILE, CODE_CELL, PROSE_CELL = 250, 40, 200, 25, 120
MEDIAN_CODE_CELL, MEDIAN_PROSE_CELL = 12, 50
HARD_FUNCTION, HARD_TITO_FILE = 80, 300
LONGER = {"tito/jobs/grade_cells.py": 500}  # one program, since the sandbox shows it no other file of ours


class GrainWarning(UserWarning):
    """Something is longer than is our habit."""


def tell(habit: str, offenders: list[tuple[int, str]]) -> None:
    """One warning per habit, the longest first."""
    if offenders:
        listed = "".join(f"\n  {size:4d}  {name}" for size, name in sorted(offenders, reverse=True))
        warnings.warn(f"{habit}:{listed}", GrainWarning, stacklevel=2)


def functions(tree: ast.Module) -> Iterator[tuple[int, ast.AST]]:
    """Length in lines, without the docstring, of every function and method."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0]
            quoted = ast.get_docstring(node) is not None
            yield node.end_lineno - node.lineno + 1 - (quoted * (first.end_lineno - first.lineno + 1)), node


def lines_of(source) -> int:
    return len(source.text.splitlines())


def too_long_functions(sources, most: int) -> list[tuple[int, str]]:
    return [
        (length, f"{source.name}:{node.lineno} {node.name}")
        for source in sources
        for length, node in functions(source.tree())
        if length > most
    ]


class TestPackage:
    def test_files_are_about_250_lines(self, files):
        long = [(lines_of(s), s.name) for s in files("tinytorch") if lines_of(s) > PACKAGE_FILE]
        tell(f"package files of more than {PACKAGE_FILE} lines", long)

    def test_functions_are_about_40_lines(self, files):
        tell(f"package functions of more than {FUNCTION} lines", too_long_functions(files("tinytorch"), FUNCTION))

    def test_no_function_is_longer_than_80_lines(self, files):
        assert not too_long_functions(files("tinytorch"), HARD_FUNCTION)


class TestTito:
    def test_files_are_about_200_lines(self, files):
        long = [(lines_of(s), s.name) for s in files("tito") if lines_of(s) > TITO_FILE]
        tell(f"files of tito of more than {TITO_FILE} lines", long)

    def test_functions_are_about_40_lines(self, files):
        tell(f"functions of tito of more than {FUNCTION} lines", too_long_functions(files("tito"), FUNCTION))

    def test_no_file_is_longer_than_300_lines(self, files):
        assert not [(lines_of(s), s.name) for s in files("tito") if lines_of(s) > LONGER.get(s.name, HARD_TITO_FILE)]


def notebooks() -> list[Path]:
    return sorted((REPOSITORY / "modules").glob("[0-9]*/*.ipynb"))


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.parent.name)
def test_cells_are_short_and_prose_is_shorter(path):
    """Code cells by the lines that say something, prose cells by words."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sizes = {"code": [], "markdown": []}
    long = []
    for number, cell in enumerate(cells, start=1):
        text = "".join(cell["source"])
        is_code = cell["cell_type"] == "code"
        size = sum(bool(line.strip()) for line in text.splitlines()) if is_code else len(text.split())
        sizes[cell["cell_type"]].append(size)
        if size > (CODE_CELL if is_code else PROSE_CELL):
            long.append((size, f"cell {number} ({cell['id']}), {'lines' if is_code else 'words'}"))
    name = path.relative_to(REPOSITORY).as_posix()
    assert sizes["code"] and sizes["markdown"], f"{name} has no code or no prose"
    tell(f"{name}: code cells of more than {CODE_CELL} lines, prose cells of more than {PROSE_CELL} words", long)
    medians = [
        (statistics.median(sizes["code"]), MEDIAN_CODE_CELL, "lines in a code cell"),
        (statistics.median(sizes["markdown"]), MEDIAN_PROSE_CELL, "words in a prose cell"),
    ]
    over = [(int(median), f"{what}, our habit is {most}") for median, most, what in medians if median > most]
    tell(f"{name}: medians above our habit", over)
