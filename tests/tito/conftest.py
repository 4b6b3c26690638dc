"""A temporary course for every test, in a folder with blanks and umlauts, and the command `tito` run in it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tito.course import manifest, source

REPOSITORY = Path(__file__).resolve().parents[2]
STUDENTS_FOLDERS = ("modules", "tests", "tinytorch")  # a release has no src/

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background; what a test starts would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass
class TemporaryCourse:
    """A course in a folder of its own, as a student has it: no src/. `origin` is where its sources are."""

    root: Path
    origin: Path
    environment: dict = field(default_factory=dict)

    def load(self) -> manifest.Course:
        return manifest.load(self.root)

    def lesson(self, text: str) -> manifest.Lesson:
        return self.load().lesson(text)

    def solve(self, text: str, **wrong: str) -> Path:
        """Write the solved notebook of a lesson where the student works; `double="return x"` spoils one hole."""
        lesson = manifest.load(self.origin).lesson(text)
        spoiled = {}
        for exercise, body in wrong.items():
            grade_id = f"{lesson.number}-{exercise.replace('_', '-')}"
            cell = next(cell for cell in source.cells(lesson) if cell.grade_id == grade_id)
            spoiled[grade_id] = source.with_body(cell.source, body)
        path = self.lesson(text).notebook
        path.write_text(source.solved_notebook(lesson, spoiled), encoding="utf-8", newline="\n")
        return path

    def tito(self, *arguments: str, cwd: Path | None = None, timeout: float = 240, **environment: str):
        """Run the command as a student without a terminal does; returns the CompletedProcess with texts."""
        encoding = environment.get("PYTHONIOENCODING", "utf-8")
        return subprocess.run(
            [sys.executable, "-m", "tito", *arguments],
            cwd=cwd or self.root, env={**plain_environment(), **self.environment, **environment},
            stdin=subprocess.DEVNULL, capture_output=True, encoding=encoding, timeout=timeout,
        )  # fmt: skip


def plain_environment() -> dict[str, str]:
    """This process's environment without what would colour, widen or redirect tito."""
    unwanted = ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "TITO_DEBUG", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    return {**kept, "PYTHONIOENCODING": "utf-8", "PYTHONDONTWRITEBYTECODE": "1"}


def copied(origin: Path, root: Path) -> TemporaryCourse:
    """What a student gets of the course at `origin`, copied to `root`."""
    for name in STUDENTS_FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "backups", "tito", "architecture")
        shutil.copytree(origin / name, root / name, ignore=ignored)
    return TemporaryCourse(root, origin)


@pytest.fixture(scope="session")
def mini_origin(tmp_path_factory) -> Path:
    """The mini course of mini.py, written and built once."""
    pytest.importorskip("nbgrader", reason="building the mini course needs nbgrader")
    spec = importlib.util.spec_from_file_location("mini", Path(__file__).with_name("mini.py"))
    mini = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mini)
    root = tmp_path_factory.mktemp("origin")
    mini.write(root)
    return root


@pytest.fixture
def course(mini_origin, tmp_path) -> TemporaryCourse:
    """The mini course (01 scale, 02 shift needs scale, 04 words), in a path with blanks and umlauts."""
    return copied(mini_origin, tmp_path / "Übung für später")


@pytest.fixture
def real_course(tmp_path) -> TemporaryCourse:
    """The real course of this repository, as a student gets it."""
    if not (REPOSITORY / manifest.INDEX).is_file():
        pytest.skip("modules/index.json is not built")
    return copied(REPOSITORY, tmp_path / "a real course")
