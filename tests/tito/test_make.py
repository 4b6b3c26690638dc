"""The Makefile makes an environment where there is none or half of one, and keeps a whole one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(os.name == "nt" or not shutil.which("make"), reason="needs make")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkout whose path has a blank and an umlaut, with nothing but what make reads."""
    folder = tmp_path / "tiny törch"
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, folder)
    return folder


def would_do(folder: Path) -> str:
    """The commands that `make demo` would run."""
    done = subprocess.run(["make", "-n", "demo"], cwd=folder, capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_an_environment_it_is_made_first(folder):
    shutil.rmtree(folder / ".venv")
    commands = would_do(folder)
    assert 0 < commands.index("-m venv") < commands.index("pip install") < commands.index("-m tito demo")


def test_what_an_interrupted_run_left_is_made_anew(folder):
    """Its python is the system's: pip would advise to break the system's packages."""
    (folder / ".venv" / "bin" / "python").symlink_to(Path(sys.base_prefix, "bin", "python3"))
    (folder / ".venv" / "student").touch()
    commands = would_do(folder)
    assert "-m venv" in commands and "pip install" in commands


def test_a_whole_environment_is_kept(folder):
    subprocess.run([sys.executable, "-m", "venv", str(folder / ".venv")], check=True, timeout=240)
    (folder / ".venv" / "student").touch()
    commands = would_do(folder)
    assert "-m venv" not in commands and "pip install" not in commands and "-m tito demo" in commands
