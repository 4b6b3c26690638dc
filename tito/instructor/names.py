"""What the code of a cell binds and uses, read off its syntax tree."""

from __future__ import annotations

import ast
import functools

# Asked of the assignment's own cells, for every submission anew.
_remembered = functools.lru_cache(maxsize=4096)


@_remembered
def bound_names(source: str) -> tuple[str, ...]:
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
    return tuple(names)


@_remembered
def used_names(source: str) -> frozenset[str]:
    """All names that occur in a cell."""
    return frozenset(node.id for node in ast.walk(tree(source)) if isinstance(node, ast.Name))


@_remembered
def imported_modules(source: str) -> frozenset[str]:
    """Modules of TinyTorch that a cell imports from."""
    found = {node.module or "" for node in ast.walk(tree(source)) if isinstance(node, ast.ImportFrom)}
    return frozenset(name for name in found if name.startswith("tinytorch"))


def earlier(source: str, before: list[str]) -> list[str]:
    """Those of the checks `before` whose names the check `source` uses."""
    wanted, chosen = set(used_names(source)), []
    for each in reversed(before):
        if wanted & set(bound_names(each)):
            chosen.insert(0, each)
            wanted |= used_names(each)
    return chosen


def no_tests(checks: list[str]) -> list[str]:
    """Definitions that make the tests of `checks` do nothing: a control is to run its own alone."""
    tests = [name for each in checks for name in bound_names(each) if name.startswith("test_")]
    return [f"def {name}(*args, **kwargs): pass" for name in tests]


def imports_of(assignment) -> list[str]:
    """Modules of an assignment's package that the lesson's own cells import."""
    found = {name for cell in assignment.cells if cell.kind == "code" for name in imported_modules(cell.released)}
    return sorted(found & set(assignment.modules))


def tree(source: str) -> ast.Module:
    """The syntax tree of a cell; an empty one where it is no Python."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module([], [])
