"""The worker inside the sandbox, spoken to directly: what a session may rely on, whatever student code does."""

from __future__ import annotations

import json
import sys
import textwrap

import pytest

from tito.course.processes import private_folder
from tito.instructor.sandbox import Limits
from tito.instructor.session import Gone, Session, sound_reply

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="checks run in forks")


class Worker:
    """A worker without a package: `cell` and `check` run a source and return the reply."""

    def __init__(self, session: Session):
        self.session, self.count = session, 0

    def cell(self, source: str, given=(), forget=(), seconds=5.0) -> dict:
        self.count += 1
        return self.session.ask(
            20, do="cell", id=self.count, source=source, given=given, forget=forget, seconds=seconds
        )  # fmt: skip

    def check(self, source: str, control=False, define=(), seconds=5.0) -> dict:
        self.count += 1
        return self.session.ask(
            20, do="check", id=self.count, source=source, control=control, define=define, seconds=seconds
        )  # fmt: skip

    def passes(self, source: str) -> bool:
        reply = self.check(source)
        return reply["error"] is None and not reply["late"] and not reply["odd"] and reply["ended"] is None


@pytest.fixture
def worker(tmp_path):
    with private_folder() as private:
        session = Session("none", tmp_path, Limits(output_bytes=100_000), private)
        try:
            session.begin(60, seed=7, imports=[])
            yield Worker(session)
        finally:
            session.close()


def test_a_cell_leaves_its_names_and_a_check_leaves_nothing(worker):
    worker.cell("x = [1]")
    assert worker.passes("x.append(2); y = 3\nassert x == [1, 2]")
    assert worker.passes("assert x == [1]")
    assert not worker.passes("y")


def test_given_names_are_put_back_for_a_check_and_a_hole_may_take_one_over(worker):
    worker.cell("def helper(): return 1", given=["helper"])
    worker.cell("def helper(): return 2")
    assert worker.passes("assert helper() == 1")
    worker.cell("def helper(): return 3", forget=["helper"])
    assert worker.passes("assert helper() == 3")


def test_classes_of_given_cells_are_put_back(worker):
    worker.cell("class Box:\n    def size(self): return 1", given=["Box"])
    worker.cell("Box.size = lambda self: 2\nBox.__eq__ = lambda self, other: True")
    assert worker.passes("assert Box().size() == 1 and Box() != Box()")


def test_what_a_cell_patched_is_whole_again_in_a_check(worker):
    worker.cell("import numpy as np, math, builtins\nmath.pi = 3")
    worker.cell("np.array_equal = np.abs = builtins.len = lambda *a: True")
    assert worker.passes("import numpy as np, math\nassert not np.array_equal(1, 2) and np.abs(-2) == 2 == len('ab')")
    assert worker.passes("import math\nassert math.pi > 3.1")


def test_student_code_sees_no_difference_between_a_check_and_its_control(worker):
    worker.cell("def look():\n    return sorted(globals())")
    real = worker.check("test_it = 1\nprint(look())")
    wrong = worker.check("_claim(0, lambda: False)\nprint(look())", control=True)
    assert real["output"] == wrong["output"] and "test_it" not in real["output"]
    assert (wrong["made"], wrong["held"]) == ([0], [])


def test_a_control_tells_what_held_and_what_was_reached(worker):
    reply = worker.check("_claim(0, lambda: True)\n_claim(1, lambda: 1 / 0)\nraise SystemExit\n_claim(2, None)", True)
    assert (reply["made"], reply["held"]) == ([0, 1], [0])
    reply = worker.check("_claim(0, lambda: _same(None, 1, 1))\n_claim(1, lambda: _same(None, E(), 1))", True)
    assert reply["held"] == []
    worker.cell("class E(int):\n    def __eq__(self, other): return True\n    __hash__ = None")
    both = "_claim(0, lambda: _same(None, E(), 1))\n_claim(1, lambda: _same(None, 1, E()))"
    assert worker.check(both, control=True)["held"] == [0, 1]


@pytest.mark.parametrize(
    "value",
    ["0", "1.5", "-np.inf", "True", "None", "'a'", "b''", "()", "[1, 2]", "{}", "{1}", "{'a': 2}", "np.zeros(3)",
     "np.array([True])", "np.float32('inf')", "np.array(['a'])"],
)  # fmt: skip
def test_a_tilted_value_differs(worker, value):
    source = f"import numpy as np\nv = {value}\n_claim(0, lambda: not np.array_equal(v, _tilt(v)))"
    assert worker.check(source, control=True)["held"] == [0]


def test_output_is_cut_in_the_middle_and_ends_the_check_at_the_limit(worker):
    assert worker.cell("print('x' * 50_000)")["output"].endswith("... 30001 more bytes ...\n")
    assert worker.check("print('x' * 200_000)")["ended"] == 197
    with pytest.raises(Gone, match="output"):
        worker.cell("print('x' * 200_000)")


def test_a_check_that_is_late_or_ends_is_told_and_the_worker_goes_on(worker):
    assert worker.check("while True: pass", seconds=0.2)["late"]
    assert worker.check("import os; os._exit(3)")["ended"] == 3
    assert worker.check("import os; os.kill(os.getpid(), 9)")["ended"] == -9
    assert worker.passes("pass")


def test_what_looks_inside_is_refused_and_told(worker):
    for source, event in (
        ("import sys; sys._getframe()", "sys._getframe"),
        ("import gc; gc.get_objects()", "gc.get_objects"),
        ("import ctypes; ctypes.string_at(0)", "ctypes.string_at"),
        ("def f(): pass\nf.__code__ = f.__code__", "__setattr__ of __code__"),
    ):
        assert worker.cell(source)["error"]["name"] == "PermissionError"
        assert worker.session.take_heard() == [event]


def test_ordinary_code_that_looks_at_frames_is_not(worker):
    source = """
    import collections, dataclasses, enum, functools, inspect, logging, traceback, typing, warnings, timeit, contextlib
    Point = collections.namedtuple("Point", "x y", defaults=[1])
    class Row(typing.NamedTuple):
        a: int = 1
    @dataclasses.dataclass
    class Data:
        b: int = 2
    Colour = enum.Enum("Colour", "red green")
    try:
        1 / 0
    except ZeroDivisionError as error:
        traceback.format_exc(), traceback.print_exc(), traceback.extract_tb(error.__traceback__)
        logging.getLogger("x").warning("so", exc_info=True)
    warnings.warn("hm")
    inspect.signature(Data), timeit.timeit("1 + 1", number=3), exec("1"), eval("2"), compile("3", "<mine>", "eval")
    import numpy as np
    np.testing.assert_allclose(1, 1)
    with contextlib.suppress(ValueError):
        raise ValueError
    """
    reply = worker.cell(textwrap.dedent(source))
    assert reply["error"] is None, reply["error"]
    assert worker.session.take_heard() == []


def test_magics_are_left_out_only_where_a_cell_is_no_python(worker):
    assert worker.cell("%matplotlib inline\n!ls\nx = 1")["error"] is None
    assert worker.passes("assert x == 1")
    assert worker.cell('text = """\n%d\n"""\nassert text == "\\n%d\\n"')["error"] is None


@pytest.mark.parametrize(
    "line",
    [b"", b"nonsense", b"[]", b"{}", b"[" * 5000, b'{"token": 2}', b'{"token": 1, "error": 5}', b'{"token": "1"}',
     b'{"token": 1, "error": {"name": "E"}}', b'{"token": 1, "held": 3}', b'{"token": 1, "output": null}',
     b'{"token": 1, "late": "no"}', b'{"token": 1, "odd": 1}', b'{"token": 1, "ended": "x"}'],
)  # fmt: skip
def test_a_reply_that_is_not_sound_is_none(line):
    assert sound_reply(line, 1) is None


def test_a_sound_reply_can_be_written_as_utf8():
    place = {"line": 1, "cell": 2, "code": "\ud800"}
    reply = {"token": 1, "error": {"name": "E\ud800", "text": "\udfff", "place": place}}
    sound = sound_reply(json.dumps(reply).encode(), 1)
    json.dumps(sound, ensure_ascii=False).encode("utf-8")
    assert sound["error"]["place"]["line"] == 1 and sound["held"] is None
