"""The doors between the rooms: who may import whom, and what an import may do."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ROOMS = ("student", "instructor", "maintainer")
PACKAGE = sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "tinytorch").rglob("*.py"))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def offenders(sources, wrong) -> list[str]:
    """`file:line imports name` for each import that `wrong(source, name)` objects to."""
    return [
        f"{source.name}:{line} imports {name}"
        for source in sources
        for line, name in source.imports()
        if wrong(source, name)
    ]


class TestPackage:
    def test_the_tensor_imports_numpy_and_nothing_else(self, files):
        """Nothing that has to be installed and nothing of ours; Python's own modules come with Python."""
        allowed = {"numpy"} | set(sys.stdlib_module_names)
        tensor = [source for source in files("tinytorch") if source.module == "tinytorch.core.tensor"]
        assert tensor, "tinytorch/core/tensor.py is missing"
        assert not offenders(tensor, lambda source, name: name.split(".")[0] not in allowed)

    def test_a_lesson_imports_only_lessons_with_a_smaller_number(self, files, order):
        lessons = [source for source in files("tinytorch") if source.module in order]

        def wrong(source, name) -> bool:
            if not within(name, "tinytorch"):
                return False
            imported = next((number for module, number in order.items() if within(name, module)), None)
            return imported is None or imported >= order[source.module]

        assert not offenders(lessons, wrong)

    def test_no_lesson_and_no_test_of_a_lesson_imports_tito(self, files):
        tests = [folder.name for folder in (REPOSITORY / "tests").iterdir() if folder.name[:2].isdigit()]
        sources = files("tinytorch", "src", *(f"tests/{name}" for name in tests))
        assert sources and not offenders(sources, lambda source, name: within(name, "tito"))

    def test_the_progressive_tests_need_only_what_a_student_has(self, files):
        tests = [folder.name for folder in (REPOSITORY / "tests").iterdir() if folder.name[:2].isdigit()]
        sources = files(*(f"tests/{name}" for name in tests))
        allowed = {"tinytorch", "numpy", "pytest"} | set(sys.stdlib_module_names)
        assert not offenders(sources, lambda source, name: name.split(".")[0] not in allowed)


class TestTito:
    def test_student_instructor_and_maintainer_never_import_each_other(self, files):
        for room in ROOMS:
            others = [f"tito.{other}" for other in ROOMS if other != room]
            sources = files(f"tito/{room}")
            assert not offenders(sources, lambda source, name, others=others: any(within(name, o) for o in others))

    def test_the_course_knows_neither_its_users_nor_the_terminal(self, files):
        above = [*(f"tito.{room}" for room in ROOMS), "tito.main", "tito.show", "typer", "rich", "click"]
        sources = files("tito/course")
        assert sources and not offenders(sources, lambda source, name: any(within(name, other) for other in above))

    def test_the_course_never_prints(self, files):
        found = []
        for source in files("tito/course"):
            for node in ast.walk(source.tree()):
                called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
                stream = isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stderr")
                if called or stream:
                    found.append(f"{source.name}:{node.lineno} {ast.unparse(node)[:60]}")
        assert not found

    def test_only_the_jobs_import_the_package(self, files):
        sources = [source for source in files("tito") if not within(source.module, "tito.jobs")]
        assert not offenders(sources, lambda source, name: within(name, "tinytorch"))

    def test_only_show_prints(self, files):
        """tito/main.py prints its help and version; the jobs are programs of their own."""
        found = []
        for source in files("tito"):
            if source.name in ("tito/show.py", "tito/main.py") or within(source.module, "tito.jobs"):
                continue
            for node in ast.walk(source.tree()):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                    found.append(f"{source.name}:{node.lineno}")
        assert not found


# Runs in a process of its own. Whatever the import does that an import should not is heard by an audit hook; what
# NumPy itself does while it loads is not the package's doing.
PROBE = """
import importlib.abc, json, os, sys
blocked = {"matplotlib", "torch", "transformers", "scipy", "pandas", "tito"}

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ImportError(name + " is not there")

sys.meta_path.insert(0, Blocker())
import numpy, numpy.random
heard = []

def hear(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        heard.append("opens " + repr(arguments[0]) + " for writing")
    elif event.split(".")[0] in ("subprocess", "socket", "shutil", "tempfile") and event != "socket.gethostname":
        heard.append(event)
    elif event in ("_thread.start_new_thread", "os.fork", "os.posix_spawn", "os.system", "os.exec", "os.mkdir",
                   "os.remove", "os.rename", "signal.pthread_kill", "webbrowser.open"):
        heard.append(event)

sys.addaudithook(hear)
importlib.import_module(sys.argv[1])
sys.stderr.write("HEARD " + json.dumps(heard))
"""


@pytest.mark.parametrize("path", PACKAGE)
def test_importing_a_file_does_nothing_else(path, tmp_path):
    """Prints nothing, writes nothing, starts no thread or process, and needs neither matplotlib nor torch."""
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, module], cwd=tmp_path, env=env, capture_output=True, encoding="utf-8", timeout=120
    )
    said, mark, heard = done.stderr.partition("HEARD ")
    assert done.returncode == 0 and mark, f"import {module} fails: {done.stderr.strip().splitlines()[-1:]}"
    assert done.stdout == "" and said == "", f"import {module} prints {done.stdout + said!r}"
    assert json.loads(heard) == [], f"import {module} does more than define names"
    assert list(tmp_path.iterdir()) == []
