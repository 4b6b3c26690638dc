"""What the code of a cell binds and uses, read off its syntax tree."""

from __future__ import annotations

import ast

LONGEST_CELL = 200_000  # characters; a syntax tree takes a hundred times as much memory, and this process is shared


def bound_names(source: str) -> list[str]:
    """Names that the top level of a cell binds."""
    names: list[str] = []
    for node in tree(source).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.append(node.name)
            continue
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                names.append(inner.id)
            elif isinstance(inner, (ast.Import, ast.ImportFrom)):
                names += [alias.asname or alias.name.split(".")[0] for alias in inner.names]
    return names


def used_names(source: str) -> set[str]:
    """All names that occur in a cell."""
    return {node.id for node in ast.walk(tree(source)) if isinstance(node, ast.Name)}


def imported_modules(source: str) -> set[str]:
    """Modules of TinyTorch that a cell imports from."""
    found = {node.module or "" for node in ast.walk(tree(source)) if isinstance(node, ast.ImportFrom)}
    return {name for name in found if name.startswith("tinytorch")}


def earlier(source: str, before: list[str], quiet: bool = False) -> list[str]:
    """Those of the checks `before` whose names the check `source` uses; `quiet`: their tests do nothing."""
    wanted, chosen = used_names(source), []
    for each in reversed(before):
        if wanted & set(bound_names(each)):
            chosen.insert(0, each)
            wanted |= used_names(each)
    if quiet:
        tests = [name for each in chosen for name in bound_names(each) if name.startswith("test_")]
        chosen += [f"def {name}(*args, **kwargs): pass" for name in tests]
    return chosen


def python_of(source: str) -> str:
    """A student's cell as Python: where it is none, without notebook commands (lines that begin with % or !)."""
    if len(source) > LONGEST_CELL or tree(source, None) is not None:
        return source
    lines = source.split("\n")
    return "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in lines)


def tree(source: str, otherwise: ast.Module | None = ast.Module([], [])) -> ast.Module | None:  # noqa: B008
    """The syntax tree of a cell; `otherwise` (an empty one) where it is no Python."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return otherwise
