"""What the tests of the architecture look at: files, their syntax trees, and the lessons in their order."""

from __future__ import annotations

import ast
import json
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Source:
    """A Python file: its place in the repository, its text, and what it imports."""

    path: Path
    text: str

    @property
    def name(self) -> str:
        return self.path.relative_to(REPOSITORY).as_posix()

    @property
    def module(self) -> str:
        """Dotted name: tinytorch.core.tensor."""
        parts = self.path.relative_to(REPOSITORY).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.name)

    def imports(self) -> list[tuple[int, str]]:
        """Line and dotted name of everything imported, at the top or anywhere else; `from a import b` is `a.b`."""
        found = []
        for node in ast.walk(self.tree()):
            if isinstance(node, ast.Import):
                found += [(node.lineno, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                package = self.module.split(".") if self.path.name == "__init__.py" else self.module.split(".")[:-1]
                above = package[: len(package) - node.level + 1] if node.level else []
                start = ".".join([*above, *filter(None, [node.module])])
                found += [(node.lineno, f"{start}.{alias.name}") for alias in node.names]
        return found


def python_files(*folders: str) -> list[Source]:
    """All Python files below the folders, in order."""
    paths = [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    return [Source(path, path.read_text(encoding="utf-8")) for path in paths]


@pytest.fixture(scope="session")
def files():
    return python_files


@pytest.fixture(scope="session")
def order() -> dict[str, int]:
    """Module -> number of its lesson, from the index and, for lessons that are not built yet, the registry."""
    found = {}
    registry, index = REPOSITORY / "src" / "course.toml", REPOSITORY / "modules" / "index.json"
    if registry.is_file():
        found |= {e["target"]: e["number"] for e in tomllib.loads(registry.read_text(encoding="utf-8"))["lesson"]}
    if index.is_file():
        found |= {e["target"]: e["number"] for e in json.loads(index.read_text(encoding="utf-8"))["lessons"]}
    assert found, "neither modules/index.json nor src/course.toml lists a lesson"
    return {f"tinytorch.{target}": int(number) for target, number in found.items()}


@pytest.fixture(scope="session")
def tracked() -> list[Path]:
    """Every file that git tracks."""
    command = ["git", "ls-files", "-z"]
    try:
        listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = [REPOSITORY / name for name in listed.split("\0") if name]
    return [path for path in paths if path.is_file()]
