"""Submissions as no instructor wishes for: accidents of students and of editors, and attempts on the grader.

Each is made from a solved notebook. None of them does harm where nothing contains it, beyond its own course folder.
"""

import json
from collections.abc import Callable

ENDLESS = "while True:\n    pass"
CODE = {  # a cell at the end of the first exercise's hole
    "exits": "import os\nos._exit(0)",
    "exits-softly": "import sys\nsys.exit(0)",
    "segfaults": "import ctypes\nctypes.string_at(0)",
    "kills-itself": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "never-ends": ENDLESS,
    "never-ends-deaf": "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" + ENDLESS,
    "sleeps": "import time\ntime.sleep(1000)",
    "asks": "name = input('your name? ')",
    "recurses": "def f(n):\n    return f(n + 1)\nf(0)",
    "recurses-in-c": "import sys\nsys.setrecursionlimit(10**8)\ndef f(n):\n    return f(n + 1)\nf(0)",
    "prints-much": "for _ in range(30):\n    print('x' * 10**6)",
    "syntax-error": "def broken(:",
    "missing-import": "import a_module_that_nobody_has",
    "magic": "%matplotlib inline\n!ls",
    "no-asserts": "import numpy as np\nnp.testing.assert_allclose = lambda *a, **k: None",
    "no-print": "import builtins\nbuiltins.print = None",
    "equal-to-all": "class All(float):\n    __eq__ = __le__ = __ge__ = __lt__ = __gt__ = lambda *a: True\n"
    "    __hash__ = float.__hash__\nimport builtins\nbuiltins.abs = lambda x: All(0)",
    "quits-at-exit": "import atexit, os\natexit.register(os._exit, 0)",
    "closes-streams": "import os\nfor number in range(3, 64):\n    try:\n        os.close(number)\n"
    "    except OSError:\n        pass",
    "thread-forever": "import threading\nthreading.Thread(target=lambda: [None for _ in iter(int, 1)]).start()",
}


def _without_checks(notebook: dict) -> None:
    notebook["cells"] = [c for c in notebook["cells"] if not _grading(c).get("grade")]


def _doubled_check(notebook: dict) -> None:
    check = next(c for c in notebook["cells"] if _grading(c).get("grade"))
    notebook["cells"].append({**check, "id": "a-copy"})


def _stripped(notebook: dict) -> None:
    for number, cell in enumerate(notebook["cells"]):
        cell["metadata"], cell["id"] = {}, f"cell{number}"


def _changed_check(notebook: dict) -> None:
    for cell in notebook["cells"]:
        if _grading(cell).get("grade"):
            cell["source"] = "pass"


def _raised_points(notebook: dict) -> None:
    for cell in notebook["cells"]:
        if _grading(cell).get("grade"):
            cell["metadata"]["nbgrader"]["points"] = 1000


def _without_holes(notebook: dict) -> None:
    notebook["cells"] = [c for c in notebook["cells"] if not _grading(c).get("solution")]


def _as_text(notebook: dict) -> None:
    for cell in notebook["cells"]:
        cell["cell_type"] = "markdown"
        cell.pop("outputs", None), cell.pop("execution_count", None)


DAMAGE: dict[str, Callable[[dict], None]] = {
    "check-deleted": _without_checks, "check-twice": _doubled_check, "metadata-stripped": _stripped,
    "checks-emptied": _changed_check, "points-raised": _raised_points, "holes-deleted": _without_holes,
    "all-markdown": _as_text,
}  # fmt: skip


def _grading(cell: dict) -> dict:
    return cell["metadata"].get("nbgrader", {})


def submissions(solved: str) -> dict[str, str]:
    """Name -> the text of a notebook."""
    texts = {"bad-json": solved[: len(solved) // 2], "not-a-notebook": "[]\n", "empty-file": ""}
    for name, change in DAMAGE.items():
        notebook = json.loads(solved)
        change(notebook)
        texts[name] = json.dumps(notebook)
    for name, code in CODE.items():
        notebook = json.loads(solved)
        hole = next(c for c in notebook["cells"] if _grading(c).get("solution"))
        hole["source"] = "".join(hole["source"]) + "\n\n" + code + "\n"
        texts[name] = json.dumps(notebook)
    return texts
