"""A class of synthetic students: honest, careless and hostile, with the points that each of them must get.

Attacks, accidents and odd but right solutions stand in attacks.toml, accidents.toml and odds.toml. Honest students are
graded by nbgrader itself as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import threading
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tito.course import source
from tito.instructor.course import GradingCourse
from tito.instructor.nbgrader_setup import nbgrader_ready, settings
from tito.instructor.run import UNTRUSTED

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
HOLE = "17-count-rows"
STUB = "def token_rows(prompt_len, max_new_tokens, cached):\n    return 0\n\n"
LOST = {"17-count-rows-test", "17-equal-test", "17-module-test"}  # the checks that call token_rows

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="checks run in forks")


def rows(name: str) -> list[dict]:
    """The table of a TOML file."""
    return tomllib.loads((HERE / f"{name}s.toml").read_text(encoding="utf-8"))[name]


ATTACKS, ACCIDENTS, ODD = rows("attack"), rows("accident"), rows("odd")


def points_of(result) -> dict[str, float]:
    return {check.id: check.earned for check in result.checks}


def all_words(result) -> str:
    texts = [check.message for check in result.checks]
    return "\n".join([*texts, *result.findings, *result.flags, result.problem or ""])


def assert_sentences(result) -> None:
    """Every check without its points says why; what is said can be written, and is more than the name of an error."""
    assert all(check.message for check in result.checks if check.earned < check.points)
    for text in (*result.findings, *result.flags, *([result.problem] if result.problem else [])):
        assert text.rstrip().endswith((".", "?", ")", "'")) and len(text) > 20, text
    all_words(result).encode("utf-8")


def expected(lesson17, lost: set[str]) -> dict[str, float]:
    return {check.grade_id: 0.0 if check.grade_id in lost else check.points for check in lesson17.assignment.checks}


def in_class(lesson17, notebooks: dict[str, dict]) -> dict:
    """Grade all notebooks, a few at a time."""
    with ThreadPoolExecutor(4) as pool:
        graded = {name: pool.submit(lesson17.grade, notebook, student=name) for name, notebook in notebooks.items()}
    return {name: future.result() for name, future in graded.items()}


class World:
    """What a submission must leave alone: a course with grades, other submissions and hidden tests, and a network."""

    def __init__(self, root: Path, lesson17):
        self.course = root / "course"
        for name in ("source", "submitted/bob", "submitted/ann", "grading"):
            folder = self.course / name / lesson17.assignment.name
            folder.mkdir(parents=True)
            (folder / "memoization.ipynb").write_text(json.dumps(lesson17.solved()))
        (self.course / "gradebook.db").write_bytes(b"all the grades")
        (self.course / "grading" / "assignment.json").write_text(lesson17.assignment.as_text())
        self.heard: list[str] = []
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.port = self.tcp.getsockname()[1]
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", self.port))
        self.unix, self.path = socket.socket(socket.AF_UNIX), str(root / "s")
        self.unix.bind(self.path)
        self.unix.listen()
        for listener in (self.tcp, self.udp, self.unix):
            threading.Thread(target=self._listen, args=(listener,), daemon=True).start()
        self.before = self.listing()

    def _listen(self, listener: socket.socket) -> None:
        try:
            listener.recv(10) if listener is self.udp else listener.accept()
            self.heard.append(str(listener))
        except OSError:
            pass

    def listing(self) -> dict[str, str]:
        """Every file with its hash."""
        files = [path for path in sorted(self.course.rglob("*")) if path.is_file()]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def constants(self) -> str:
        return f"REPOSITORY, COURSE, PORT, SOCKET = {(str(REPOSITORY), str(self.course), self.port, self.path)!r}\n"


@pytest.fixture(scope="module")
def world(lesson17, tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("w"), lesson17)


class TestAttacks:
    @pytest.mark.parametrize("attack", ATTACKS, ids=lambda row: row["name"])
    def test_earns_what_the_honest_part_earns_and_leaves_no_trace(self, attack, world, lesson17, request):
        if attack.get("contained"):
            request.getfixturevalue("contained")
        limits = replace(lesson17.limits, seconds=6) if attack.get("sabotage") else lesson17.limits
        result = lesson17.grade(lesson17.solved({HOLE: world.constants() + STUB + attack["code"]}), limits)
        points, honest = points_of(result), expected(lesson17, LOST)
        if attack.get("sabotage"):
            assert all(points[name] <= honest[name] for name in honest), all_words(result)
        else:
            assert points == honest, all_words(result)
        assert "flagged" not in attack or bool(result.flags) == attack["flagged"], result.flags
        assert attack.get("words", "").lower() in all_words(result).lower(), all_words(result)
        assert_sentences(result)
        assert world.listing() == world.before
        assert world.heard == []

    def test_the_listener_would_have_heard(self, lesson17, tmp_path):
        world = World(tmp_path, lesson17)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"x", ("127.0.0.1", world.port))
        for thread in threading.enumerate():
            if thread._target == world._listen and thread._args == (world.udp,):
                thread.join(10)
        assert len(world.heard) == 1


class TestAccidents:
    @pytest.mark.parametrize("accident", ACCIDENTS, ids=lambda row: row["name"])
    def test_costs_its_own_checks_and_says_why(self, accident, lesson17):
        result = lesson17.grade(lesson17.solved({HOLE: STUB + accident["code"]}))
        assert points_of(result) == expected(lesson17, LOST), all_words(result)
        assert result.flags == ()
        words = accident.get("words", "")
        words = [words] if isinstance(words, str) else words
        assert any(each.lower() in all_words(result).lower() for each in words), all_words(result)
        assert_sentences(result)

    def test_one_harms_no_other(self, lesson17):
        """Some of the worst, side by side with one who did everything right."""
        worst = ("a memory bomb", "a fork bomb", "ten gigabytes below Python's streams", "the process is aborted")
        class_ = {row["name"]: lesson17.solved({HOLE: STUB + row["code"]}) for row in ACCIDENTS if row["name"] in worst}
        results = in_class(lesson17, class_ | {"ann": lesson17.solved()})
        assert results["ann"].earned == results["ann"].max_score and not results["ann"].findings
        assert all(points_of(results[name]) == expected(lesson17, LOST) for name in worst)

    def test_a_run_has_a_limit_of_its_own(self, lesson17):
        endless = "def token_rows(*a, **k):\n    while True:\n        pass\n"
        limits = replace(lesson17.limits, cell_seconds=60, seconds=3)
        result = lesson17.grade(lesson17.solved({HOLE: endless}), limits)
        assert "3 seconds" in result.problem
        assert result.earned == 0 and all(check.message for check in result.checks)


class TestHonest:
    def test_everything_solved_earns_everything(self, lesson17):
        result = lesson17.grade(lesson17.solved())
        assert points_of(result) == expected(lesson17, set())
        assert (result.problem, result.findings, result.flags) == (None, (), ())

    def test_nothing_written_earns_nothing_and_each_check_names_the_exercise(self, lesson17):
        result = lesson17.grade(lesson17.released())
        assert result.earned == 0 and result.findings == () and result.flags == ()
        assert all("is still to be written. A hint: tito module hint 17" in check.message for check in result.checks)

    def test_each_wrong_body_fails_its_check(self, lesson17):
        wrong = {f"{check}: {name}": (check, hole, text) for check, name, hole, text in lesson17.wrong_bodies()}
        results = in_class(lesson17, {name: lesson17.solved({hole: text}) for name, (_, hole, text) in wrong.items()})
        passed = [name for name, (check, _, _) in wrong.items() if points_of(results[name])[check] > 0]
        flagged = [name for name, result in results.items() if result.flags]
        assert (passed, flagged) == ([], []) and len(wrong) > 30

    def test_odd_solutions_are_not_flagged(self, lesson17):
        result = lesson17.grade(lesson17.solved({row["hole"]: row["code"] for row in ODD}))
        assert points_of(result) == expected(lesson17, set()), all_words(result)
        assert (result.flags, result.findings) == ((), ())

    def test_a_helper_of_ones_own_and_an_import_in_a_given_cell(self, lesson17):
        notebook = lesson17.solved({HOLE: "def token_rows(p, n, cached):\n    return my_rows(p, n, cached)\n"})
        cells = notebook["cells"]
        place = next(i for i, c in enumerate(cells) if c["metadata"].get("nbgrader", {}).get("grade_id") == HOLE)
        helper = "def my_rows(p, n, cached):\n    return n and (p + n - 1 if cached else p * n + math.comb(n, 2))\n"
        cells.insert(place, {"cell_type": "code", "id": "mine", "metadata": {}, "source": helper, "outputs": []})
        first = next(c for c in cells if c["cell_type"] == "code")
        first["source"] = "import math\n" + "".join(first["source"])
        result = lesson17.grade(notebook)
        assert points_of(result) == expected(lesson17, set()), all_words(result)
        assert (result.flags, result.findings) == ((), ())

    def test_twice_the_same(self, lesson17):
        noise = "print(np.random.default_rng().random(), hash('a'), {'a', 'b'})\nassert False, np.random.rand()\n"
        raising = "def check_room(*a):\n    raise ValueError(np.random.default_rng().random())\n"
        notebook = lesson17.solved({HOLE: STUB + noise, "17-room": raising})
        first, second = (replace(lesson17.grade(notebook), seconds=0.0) for _ in range(2))
        bare = [replace(r, checks=tuple(replace(c, seconds=0.0) for c in r.checks)) for r in (first, second)]
        assert bare[0].as_text() == bare[1].as_text()


class TestAsNbgrader:
    """The oracle: nbgrader's own autograder, on the same submissions."""

    def students(self, lesson17) -> dict[str, dict]:
        solutions = source.solutions(lesson17.lesson)
        late_holes = [cell.grade_id for cell in lesson17.assignment.cells if cell.role == "hole"][6:]
        released = {cell.grade_id: cell.released for cell in lesson17.assignment.cells}
        wrong = lesson17.wrong_bodies()
        return {
            "perfect": lesson17.solved(),
            "empty": lesson17.released(),
            "half": lesson17.solved({hole: released[hole] for hole in late_holes if hole in solutions}),
        } | {f"wrong{n}": lesson17.solved({wrong[n][2]: wrong[n][3]}) for n in (0, 9, 30)}

    def test_the_same_points_check_by_check(self, lesson17, tmp_path, monkeypatch):
        pytest.importorskip("nbgrader")
        students, assignment = self.students(lesson17), lesson17.assignment
        course = GradingCourse(tmp_path / "course")
        monkeypatch.setenv("PYTHONPATH", self.package(tmp_path, assignment))
        self.write(course.source(assignment.name), assignment.notebook, self.with_hidden(assignment))
        course.config.write_text("c = get_config()  # noqa\nc.CourseDirectory.course_id = 'oracle'\n")
        for name, notebook in students.items():
            self.write(course.submitted(name, assignment.name), assignment.notebook, notebook)
        ours = {name: points_of(result) for name, result in in_class(lesson17, students).items()}
        assert self.graded_by_nbgrader(course, assignment, students) == ours

    @staticmethod
    def package(root: Path, assignment) -> str:
        for name, text in assignment.package.items():
            path = root / "package" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return str(root / "package")

    @staticmethod
    def write(folder: Path, name: str, notebook: dict) -> None:
        folder.mkdir(parents=True)
        (folder / f"{name}.ipynb").write_text(json.dumps(notebook), encoding="utf-8")

    @staticmethod
    def with_hidden(assignment) -> dict:
        cells = [
            {"cell_type": c.kind, "id": c.id, "metadata": c.metadata, "source": c.source}
            | ({"outputs": [], "execution_count": None} if c.kind == "code" else {})
            for c in assignment.cells
        ]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        return {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}

    @staticmethod
    def graded_by_nbgrader(course, assignment, students) -> dict[str, dict[str, float]]:
        with nbgrader_ready():
            from nbgrader.apps.api import NbGraderAPI

            config = settings(course)
            config.ExecutePreprocessor.timeout = 60
            api = NbGraderAPI(config=config)
            made = api.generate_assignment(assignment.name, force=True)
            assert made["success"], made
            points = {}
            for name in students:
                done = api.autograde(assignment.name, name, force=True, create=True)
                assert done["success"], done
                with api.gradebook as gradebook:
                    submission = gradebook.find_submission_notebook(assignment.notebook, assignment.name, name)
                    points[name] = {grade.name: float(grade.auto_score or 0) for grade in submission.grades}
        return points


DAMAGED: dict[str, Callable[[dict], object]] = {
    "cells is a dict": lambda nb: {**nb, "cells": {}},
    "cells is a number": lambda nb: {**nb, "cells": 7},
    "no cells": lambda nb: {**nb, "cells": []},
    "cells of every kind but cells": lambda nb: {**nb, "cells": [None, 1, "x", [], {}, {"source": 5}]},
    "source is a number": lambda nb: each(nb, source=5),
    "source is a list of numbers": lambda nb: each(nb, source=[1, None, {}]),
    "metadata is a list": lambda nb: each(nb, metadata=[1]),
    "nbgrader is a string": lambda nb: each(nb, metadata={"nbgrader": "yes"}),
    "grade_id is a list": lambda nb: each(nb, metadata={"nbgrader": {"grade_id": [1], "grade": True}}),
    "points is text": lambda nb: each(nb, metadata={"nbgrader": {"grade_id": "17-write-test", "points": "NaN"}}),
    "ids are missing": lambda nb: each(nb, id=None),
    "ids are dicts": lambda nb: each(nb, id={"a": {}}),
    "cell types are unknown": lambda nb: each(nb, cell_type=9),
    "no metadata at all": lambda nb: {"cells": nb["cells"]},
    "a list": lambda nb: [],
    "an empty object": lambda nb: {},
    "null": lambda nb: None,
    "a word": lambda nb: "notebook",
    "nbformat 3": lambda nb: {"nbformat": 3, "worksheets": [{"cells": nb["cells"]}]},
    "too many cells": lambda nb: {**nb, "cells": nb["cells"] + [{"cell_type": "code", "source": "1"}] * 5000},
    "surrogates": lambda nb: each(nb, source="'\ud800\udfff'"),
    "NUL bytes": lambda nb: each(nb, source="x = 1\0"),
    "a name without end": lambda nb: each(nb, metadata={"nbgrader": {"grade_id": "\x1b[2J" * 10**4, "grade": True}}),
    "every cell a cell of text": lambda nb: each(nb, cell_type="markdown"),
}
BROKEN = {
    "an empty file": "",
    "blanks": " \n",
    "half of a notebook": '{"cells": [{"cell_type": "code", "source": "x',
    "brackets without end": "[" * 10**6,
    "a number without end": '{"cells": [' + "9" * 10**5 + "]}",
    "thirty megabytes": '{"cells": [], "x": "' + "x" * 30_000_000 + '"}',
}


def each(notebook: dict, **fields) -> dict:
    """Every cell with these fields."""
    return {**notebook, "cells": [{**cell, **fields} for cell in notebook["cells"]]}


class TestDamage:
    @pytest.mark.parametrize("name", [*DAMAGED, *BROKEN])
    def test_every_check_has_a_row_and_a_reason(self, name, lesson17):
        text = BROKEN[name] if name in BROKEN else json.dumps(DAMAGED[name](lesson17.solved()))
        result = lesson17.grade(text)
        assert [check.id for check in result.checks] == [cell.grade_id for cell in lesson17.assignment.checks]
        assert all(check.message for check in result.checks if check.earned < check.points)
        assert result.earned == result.max_score or result.problem or result.findings
        assert not result.flags and len(all_words(result)) < 60_000
        assert_sentences(result)
        if name in ("ids are missing", "ids are dicts", "no metadata at all", "too many cells"):
            assert result.earned == result.max_score
        if name in BROKEN:
            assert "hand" in result.problem.lower(), "it says what to do"

    def test_no_notebook(self, lesson17):
        result = lesson17.grade(None)
        assert result.earned == 0 and len(result.checks) == len(lesson17.assignment.checks)


def test_untrusted_says_what_to_do():
    assert "instructor" in UNTRUSTED and os.linesep not in UNTRUSTED
