"""Runs of student code, nasty by accident: every run ends in time, says what happened, and leaves nothing behind.

Oracle: what Python itself does with the cell (an assertion holds or not, a process ends or not). The notebooks are
written here, cell by cell; a source that begins with `#check` is a graded cell of 2 points.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tito.course import processes
from tito.course.errors import CourseError
from tito.course.manifest import Check, Lesson
from tito.course.notebook import digest
from tito.course.runner import Limits, run_notebook, run_progressive

QUICK = Limits(seconds=40, cell_seconds=20)
posix = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")


class Bench:
    """A course of one lesson whose notebook each test writes."""

    def __init__(self, root: Path):
        self.root = root
        self.path = root / "modules" / "01_tiny" / "tiny.ipynb"
        self.path.parent.mkdir(parents=True)
        (root / "tinytorch").mkdir()
        (root / "tinytorch" / "__init__.py").write_text("")
        self.raw: list[dict] = []

    def write(self, *sources: str) -> Lesson:
        self.raw, checks = [], []
        for number, source in enumerate(sources, start=1):
            metadata = {}
            if source.startswith("#check"):
                name = f"01-c{number}-test"
                metadata = {"nbgrader": {"grade": True, "grade_id": name, "points": 2}}
                checks.append(Check(name, f"Check {number}", 2, digest(source)))
            self.raw.append({"cell_type": "code", "id": f"c{number}", "metadata": metadata, "source": source})
        self.save()
        return Lesson("01", "tiny", "Tiny", "", "tiny", (), 1, 2 * len(checks), checks=tuple(checks), root=self.root)

    def save(self, **changes) -> None:
        notebook = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": self.raw} | changes
        self.path.write_text(json.dumps(notebook), encoding="utf-8")

    def run(self, *sources: str, limits: Limits = QUICK):
        return run_notebook(self.write(*sources), limits=limits)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A bench; afterwards its notebook is as it was written, and neither process nor temporary file is left."""
    temporary = tmp_path / "t"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    marks = []
    token = processes.secrets.token_hex
    monkeypatch.setattr(processes.secrets, "token_hex", lambda n: marks.append(token(n)) or marks[-1])
    bench = Bench(tmp_path / "a course, für Übungen")
    before = {}
    save = bench.save
    bench.save = lambda **changes: (save(**changes), before.update(state=state(bench.path)))[0]
    yield bench
    if before:
        assert state(bench.path) == before["state"], "the learner's notebook was touched"
    assert list(temporary.iterdir()) == [], "temporary files were left"
    assert [survivors(mark) for mark in marks if survivors(mark)] == [], "processes were left"


def state(path: Path) -> tuple[bytes, int]:
    return path.read_bytes(), path.stat().st_mtime_ns


def survivors(mark: str) -> list[str]:
    """Command lines of living processes that carry the mark of a run."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(processes.MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline())[:200])
        except (psutil.Error, OSError):
            continue
    return found


# --- what counts -------------------------------------------------------------------------------------------------


def test_checks_are_judged_one_by_one(bench):
    run = bench.run(
        "def double(x):\n    return 2 * x",
        "#check\nassert double(2) == 4",
        "#check\nassert double(2) == 5, 'got 4, expected 5: was one forgotten?'",
        "#check\nassert double(3) == 6",
    )
    assert [check.passed for check in run.checks] == [True, False, True]
    assert run.checks[1].message == "got 4, expected 5: was one forgotten?"
    assert [check.cell for check in run.checks] == [2, 3, 4]
    assert (run.earned, run.points, run.problem, run.passed) == (4, 6, None, False)


def test_a_notebook_whose_checks_all_pass_has_passed(bench):
    run = bench.run("x = 1", "#check\nassert x == 1")
    assert (run.passed, run.earned, run.problem, run.notes) == (True, 2, None, ())


def test_empty_holes_name_the_exercise_and_earn_nothing(bench):
    run = bench.run(
        "def f():\n    raise NotImplementedError('Exercise 01-f is still to be written. tito module hint 01 f')",
        "#check\nassert f() == 1",
        "#check\nassert f() == 2",
    )
    assert run.earned == 0 and not run.passed
    assert all("Exercise 01-f is still to be written" in check.message for check in run.checks)


def test_a_notebook_without_cells_earns_nothing(bench):
    lesson = bench.write("x = 1", "#check\nassert x == 1")
    bench.raw = []
    bench.save()
    run = run_notebook(lesson, limits=QUICK)
    assert run.earned == 0 and not run.passed and "deleted" in run.checks[0].message


def test_a_deleted_check_is_not_passed(bench):
    lesson = bench.write("#check\nassert 1 + 1 == 2", "#check\nassert 1 == 1")
    del bench.raw[1]
    bench.save()
    run = run_notebook(lesson, limits=QUICK)
    assert [check.passed for check in run.checks] == [True, False]
    assert "deleted" in run.checks[1].message and "tito module reset 01" in run.checks[1].message
    assert run.checks[1].cell is None and run.earned == 2


@pytest.mark.parametrize("source", ["#check\npass", "#check\nassert x == 1 or True", "# assert x == 2", ""])
def test_a_changed_check_is_not_passed(bench, source):
    lesson = bench.write("x = 1", "#check\nassert x == 2")
    bench.raw[1]["source"] = source
    bench.save()
    run = run_notebook(lesson, limits=QUICK)
    assert run.earned == 0 and "changed" in run.checks[0].message and run.checks[0].cell == 2


def test_a_check_turned_into_text_is_not_passed(bench):
    lesson = bench.write("x = 1", "#check\nassert x == 1")
    bench.raw[1]["cell_type"] = "markdown"
    bench.save()
    run = run_notebook(lesson, limits=QUICK)
    assert run.earned == 0 and "text" in run.checks[0].message


def test_outputs_saved_in_the_notebook_prove_nothing(bench):
    lesson = bench.write("x = 1", "#check\nassert x == 2, 'x is 1'")
    text = {"output_type": "stream", "name": "stdout", "text": "All tests passed. 2/2 points"}
    bench.raw[1] |= {"outputs": [text], "execution_count": 7}
    bench.save()
    run = run_notebook(lesson, limits=QUICK)
    assert run.earned == 0 and run.checks[0].message == "x is 1"


@pytest.mark.parametrize(
    "mark",
    [
        "print('All tests passed. 100/100')",
        'import os; os.write(1, b\'{"event": "end", "cell": 2, "error": null, "late": false}\\n\')',
        'import sys; sys.__stdout__.write(\'{"event": "finished"}\\n\'); sys.__stdout__.flush()',
        "__name__ = 'imported'",
        "import subprocess; subprocess.run(['echo', 'PASSED'])",
    ],
)
def test_printed_marks_of_success_prove_nothing(bench, mark):
    run = bench.run(mark, "#check\nif __name__ == '__main__':\n    assert 1 == 2, 'one is not two'")
    assert run.earned == 0 and run.checks[0].message == "one is not two"


def test_a_cell_that_fails_on_the_way_is_named_and_the_others_run(bench):
    run = bench.run("import nowhere", "y = (", "x = 1", "#check\nassert x == 1", "#check\nassert y == 1")
    assert [check.passed for check in run.checks] == [True, False]
    assert "NameError: name 'y' is not defined (cell 5 (01-c5-test), line 2" in run.checks[1].message
    assert "cell 1 failed: ModuleNotFoundError: No module named 'nowhere' (cell 1, line 1" in run.notes[0]
    assert "cell 2 failed: SyntaxError" in run.notes[1] and "cell 2, line 1" in run.notes[1]


def test_the_place_of_an_error_is_the_students_line(bench):
    run = bench.run("def f(a):\n    b = a\n    return b[7]", "#check\nassert f([1]) == 1")
    assert run.checks[0].message == "IndexError: list index out of range (cell 1, line 3: return b[7])"


def test_an_assertion_without_words_shows_its_line(bench):
    assert "assert 1 == 2" in bench.run("#check\nassert 1 == 2").checks[0].message


def test_the_package_is_the_one_of_package_root(bench, tmp_path):
    (bench.root / "tinytorch" / "part.py").write_text("WHO = 'course'")
    other = tmp_path / "other"
    (other / "tinytorch").mkdir(parents=True)
    (other / "tinytorch" / "__init__.py").write_text("")
    (other / "tinytorch" / "part.py").write_text("WHO = 'other'")
    lesson = bench.write("#check\nfrom tinytorch.part import WHO\nassert WHO == 'course', WHO")
    assert run_notebook(lesson, limits=QUICK).passed
    assert run_notebook(lesson, package_root=other, limits=QUICK).checks[0].message == "other"


def test_asserts_hold_also_when_python_is_told_to_skip_them(bench, monkeypatch):
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")
    assert bench.run("#check\nassert 1 == 2, 'one is not two'").checks[0].message == "one is not two"


def test_the_surroundings_are_private(bench, monkeypatch, tmp_path):
    start = tmp_path / "start.py"
    start.write_text("raise SystemExit('the start-up file ran')")
    monkeypatch.setenv("PYTHONSTARTUP", str(start))
    monkeypatch.setenv("MPLBACKEND", "TkAgg")
    run = bench.run(
        "import os, tempfile",
        f"#check\nassert not os.listdir('.') and os.getcwd() != {str(bench.root)!r}, os.getcwd()",
        "#check\nassert tempfile.gettempdir().startswith(os.path.dirname(os.getcwd())), tempfile.gettempdir()",
        "#check\nassert os.environ['NO_COLOR'] and os.environ.get('MPLBACKEND') != 'TkAgg'",
        "open('left.txt', 'w').write('x'); os.mkdir('d'); open('d/f', 'w').close(); os.chmod('d', 0)",
    )
    assert run.passed, [check.message for check in run.checks]


# --- the four sentences of the issue, and their relatives --------------------------------------------------------


def test_a_loop_that_never_ends_is_interrupted_and_the_rest_runs(bench):
    started = time.monotonic()
    run = bench.run("while True:\n    pass", "#check\nassert 1 + 1 == 2", limits=Limits(seconds=60, cell_seconds=2))
    assert time.monotonic() - started < 40
    assert run.problem.startswith("Cell 1: took longer than 2 seconds") and "loop that never ends" in run.problem
    assert run.checks[0].passed and not run.passed


def test_a_check_that_meets_an_endless_loop_is_not_passed(bench):
    limits = Limits(seconds=60, cell_seconds=2)
    run = bench.run("def f():\n    while True: pass", "#check\nf()", "#check\nassert 1 + 1 == 2", limits=limits)
    assert [check.passed for check in run.checks] == [False, True]
    assert "Took longer than 2 seconds" in run.checks[0].message


STUBBORN = [
    "import time\nwhile True:\n    try:\n        time.sleep(1)\n    except BaseException:\n        pass",
    "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nsignal.pthread_sigmask(0, {2})\nwhile True: pass",
]


@posix
@pytest.mark.parametrize("source", STUBBORN)
def test_a_loop_that_cannot_be_interrupted_is_ended(bench, source):
    started = time.monotonic()
    run = bench.run(source, "#check\nassert 1 + 1 == 2", limits=Limits(seconds=60, cell_seconds=2))
    assert time.monotonic() - started < 40
    assert "Cell 1 took longer than 2 seconds" in run.problem and "loop that never ends" in run.problem
    assert run.earned == 0 and run.checks[0].message == "Not reached: the run ended in cell 1."


def test_the_whole_run_has_a_limit_too(bench):
    started = time.monotonic()
    run = bench.run(*["while True: pass"] * 50, "#check\nassert 1 + 1 == 2", limits=Limits(seconds=6, cell_seconds=2))
    assert time.monotonic() - started < 40
    assert "was stopped in cell" in run.problem and "a run may take 6 seconds" in run.problem
    assert run.earned == 0 and not run.passed


@pytest.mark.parametrize("source", ["name = input('Name? ')", "import getpass\ngetpass.getpass()"])
def test_asking_for_input_is_said_with_the_cell(bench, source):
    run = bench.run("x = 1", source, "#check\nassert x == 1")
    assert run.problem.startswith("Cell 2: asks for input") and not run.passed
    assert run.checks[0].passed, "the rest of the notebook runs"


def test_a_check_that_is_asked_for_input_is_not_passed(bench):
    run = bench.run("def f():\n    return input()", "#check\nassert f() is not None")
    assert run.earned == 0 and "Asks for input" in run.checks[0].message and "cell 1, line 2" in run.checks[0].message


def test_reading_standard_input_does_not_wait(bench):
    run = bench.run("#check\nimport sys\nassert sys.__stdin__.read() == ''", limits=QUICK)
    assert run.passed, run.checks


DEATHS = {
    "import os; os._exit(0)": "exit status 0",
    "import os; os._exit(3)": "exit status 3",
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": "SIGKILL",
    "import ctypes; ctypes.string_at(0)": "SIGSEGV",
    "import os; os.abort()": "SIGABRT",
    "import signal, time; signal.alarm(1); time.sleep(10)": "SIGALRM",
}


@posix
@pytest.mark.parametrize("source", DEATHS, ids=DEATHS.values())
def test_a_kernel_that_dies_is_said_with_the_cell(bench, source):
    run = bench.run("x = 1", "#check\nassert x == 1", f"#check\n{source}", "#check\nassert x == 1")
    assert run.problem.startswith("The kernel died in cell 3 (01-c3-test)") and DEATHS[source] in run.problem
    assert [check.passed for check in run.checks] == [True, False, False]
    assert "this very check" in run.checks[1].message
    assert run.checks[2].message == "Not reached: the run ended in cell 3 (01-c3-test)."
    assert not run.passed


def test_recursion_without_end_or_limit_ends_in_time(bench):
    source = "#check\nimport sys\nsys.setrecursionlimit(10**9)\ndef f(): return list(map(lambda _: f(), [0]))\nf()"
    limits = replace(QUICK, cell_seconds=5, memory_bytes=2**30)
    run = bench.run("x = 1", source, "#check\nassert x == 1", limits=limits)
    assert not run.checks[0].passed and not run.passed and run.seconds < 40


FLOODS = {
    "2 GB in one string": "print('x' * 2_000_000_000)",
    "many lines": "while True: print('x' * 100)",
    "standard error": "import sys\nwhile True: print('x' * 100, file=sys.stderr)",
    "the descriptor": "import os\nwhile True: os.write(1, b'x' * 10_000)",
    "a child": "import subprocess; subprocess.run(['yes'])",
    "a thread": "import threading\ndef f():\n    while True: print('x' * 1000)\n"
    "t = threading.Thread(target=f); t.start(); t.join()",
    "display": "while True: display('x' * 1000)",
    "a swallowed error": "while True:\n    try: print('x' * 1000)\n    except BaseException: pass",
}  # fmt: skip


@posix
@pytest.mark.parametrize("source", FLOODS.values(), ids=FLOODS)
def test_endless_output_is_stopped_early(bench, source, tmp_path):
    run = bench.run("x = 1", source, "#check\nassert x == 1")
    assert run.problem.startswith("The run was stopped in cell 2: it printed more than 2 MB")
    assert run.earned == 0 and "Not reached" in run.checks[0].message
    assert run.seconds < 40


@posix
def test_much_output_neither_fills_memory_nor_disk(bench):
    """The parent hears only events: its own memory does not grow with what is printed."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bench.run("while True: print('x' * 100_000)", "#check\npass")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 50_000, f"{grown} KiB"


def test_two_megabytes_of_text_and_some_pictures_are_allowed(bench):
    picture = "from IPython.display import Image\nfor _ in range(20):\n    display(Image(bytes(200_000), format='png'))"
    assert bench.run("print('x' * 1_000_000)", picture, "#check\nprint('y' * 900_000)").passed


@posix
def test_a_fork_that_comes_back_does_not_reply(bench):
    source = "#check\nimport os\npid = os.fork()\nif pid:\n    os.waitpid(pid, 0)\n    assert 0, 'the parent decides'"
    run = bench.run(source, "#check\nassert 1 == 1")
    assert [check.passed for check in run.checks] == [False, True]
    assert run.checks[0].message == "the parent decides"


def test_a_file_in_the_course_does_not_disturb_the_runner(bench):
    (bench.root / "queue.py").write_text("raise RuntimeError('not the library')")
    (bench.root / "random.py").write_text("raise RuntimeError('not the library')")
    assert bench.run("#check\nimport queue, random, subprocess\nassert queue.Queue").passed


@posix
@pytest.mark.parametrize(
    "source",
    ["bytearray(10**11)", "import numpy\nnumpy.ones(10**11)", "x = []\nwhile True: x.append(bytearray(2**27))"],
)
def test_a_memory_hog_fails_and_the_others_run(bench, source):
    limits = replace(QUICK, memory_bytes=2**30, cell_seconds=40, seconds=90)
    run = bench.run(
        f"def f():\n    {source.replace(chr(10), chr(10) + '    ')}", "#check\nf()", "#check\nassert 1", limits=limits
    )
    assert not run.checks[0].passed and not run.passed
    if run.problem is None:
        assert "MemoryError" in run.checks[0].message and "1 GiB" in run.checks[0].message
        assert run.checks[1].passed
    else:
        assert "1 GiB of memory" in run.problem


@posix
def test_memory_of_children_counts(bench):
    hog = 'x = b"x" * 400_000_000; import time; time.sleep(60)'
    source = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {hog!r}])"
    run = bench.run(source, "#check\npass", limits=replace(QUICK, memory_bytes=300_000_000))
    assert run.problem is None or "memory" in run.problem
    assert run.seconds < 30


@posix
def test_a_file_that_grows_without_end_stops_at_the_limit(bench):
    source = "#check\nwith open('big', 'wb') as file:\n    while True: file.write(b'x' * 2**20)"
    run = bench.run(source, limits=replace(QUICK, file_bytes=20 * 2**20))
    assert run.earned == 0 and "File too large" in run.checks[0].message + (run.problem or "")


# --- games, by accident ------------------------------------------------------------------------------------------

GAMES = {
    "stdout closed": "import sys\nsys.stdout = open('f', 'w')\nsys.stdout.close()",
    "stdout gone": "import sys\nsys.stdout = sys.stderr = None",
    "stdout without flush": "import sys\nsys.stdout = object()",
    "cwd changed": "import os\nos.chdir('/')",
    "cwd removed": "import os\nd = os.getcwd()\nos.mkdir(d + '/x'); os.chdir(d + '/x'); os.rmdir(d + '/x')",
    "builtins": "print = len = open = None",
    "excepthook": "import sys\nsys.excepthook = sys.displayhook = None",
    "thread left": "import threading, time\nthreading.Thread(target=lambda: time.sleep(3600)).start()",
    "child left": "import subprocess\nchild = subprocess.Popen(['sleep', '3600'])",
    "child in its own session": "import subprocess\nsubprocess.Popen(['sleep', '3600'], start_new_session=True)",
    "grandchild": "import subprocess\nsubprocess.run('sleep 3600 & sleep 3600 & exit', shell=True)",
    "exit()": "exit()",
    "alarm later": "import signal\nsignal.signal(signal.SIGALRM, lambda *_: None); signal.alarm(1)",
    "deep recursion": "def f(): return f()\ntry:\n    f()\nexcept RecursionError:\n    pass",
    "warnings": "import warnings\nwarnings.warn('careful')",
    "gc off": "import gc\ngc.disable(); gc.freeze()",
    "name in use": "get_ipython = json = traceback = None",
}  # fmt: skip


@posix
@pytest.mark.parametrize("source", GAMES.values(), ids=GAMES)
def test_games_of_another_cell_neither_help_nor_hurt(bench, source):
    run = bench.run(source, "#check\nassert 1 + 1 == 2", "#check\nassert 1 + 1 == 3, 'no'")
    assert [check.passed for check in run.checks] == [True, False], (run.problem, run.checks)
    assert run.checks[1].message == "no"


ERRORS = {
    "import sys\nsys.exit(0)": "ended itself by exit",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "raise BaseException('basic')": "BaseException: basic",
    "raise ExceptionGroup('several', [ValueError('a')])": "ExceptionGroup: several",
    "class E(Exception):\n    def __str__(self): raise ValueError\nraise E": "Error",
    "def f(): f()\nf()": "RecursionError",
    "raise NotImplementedError": "not written yet",
    "await __import__('asyncio').sleep(0.01)\nassert 0, 'async'": "async",
    "assert 0, 'ä\\N{SNOWMAN}\\ud800'": "ä\N{SNOWMAN}",
    "assert 0, 'long ' * 10_000": "long long",
    "%no_such_magic": "magic",
    "x = ": "SyntaxError",
}


@pytest.mark.parametrize("source", ERRORS, ids=ERRORS.values())
def test_every_kind_of_error_is_a_failure_with_words(bench, source):
    run = bench.run(f"#check\n{source}", "#check\nassert 1 == 1")
    assert [check.passed for check in run.checks] == [False, True], run
    assert ERRORS[source] in run.checks[0].message + "".join(run.notes)
    assert len(run.checks[0].message) < 5000 and "Traceback" not in run.checks[0].message


# --- files that are no notebooks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, words",
    [
        (json.dumps({"nbformat": 3, "worksheets": []}), "old notebook format"),
        ("{not json", "not valid JSON"),
        ("[1, 2]", "not a notebook"),
        (None, "no notebook"),
    ],
)
def test_a_file_that_cannot_be_run_is_said(bench, text, words):
    lesson = bench.write("#check\npass")
    if text is None:
        bench.path.rename(bench.path.with_suffix(".away"))
    else:
        bench.path.write_text(text)
    with pytest.raises(CourseError, match=words):
        run_notebook(lesson, limits=QUICK)
    bench.save()


# --- the ends of a run -------------------------------------------------------------------------------------------

DRIVER = """
import sys
from pathlib import Path
from tito.course.manifest import Check, Lesson
from tito.course.runner import Limits, run_notebook
lesson = Lesson("01", "tiny", "Tiny", "", "tiny", (), 1, 2, root=Path(sys.argv[1]))
run_notebook(lesson, limits=Limits(seconds=60, cell_seconds=60))
"""


@posix
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_when_tito_ends_everything_ends(bench, tmp_path, how):
    """Ctrl-C and even SIGKILL of tito itself leave no process and no temporary file."""
    flag = tmp_path / "flag"
    bench.write(
        "import subprocess\nsubprocess.Popen(['sleep', '3600'], start_new_session=True)\n"
        f"open({str(flag)!r}, 'w').close()\nwhile True: pass"
    )
    env = os.environ | {"TMPDIR": str(tmp_path / "t")}
    tito = subprocess.Popen([sys.executable, "-c", DRIVER, str(bench.root)], env=env, stderr=subprocess.DEVNULL)
    wait_for(flag.exists)
    family = psutil.Process(tito.pid).children(recursive=True)
    assert len(family) >= 3, "the job, the kernel and its child"
    tito.send_signal(how)
    tito.wait(20)
    wait_for(lambda: not [process for process in family if alive(process)])
    wait_for(lambda: not list((tmp_path / "t").iterdir()))


def wait_for(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@posix
def test_a_runner_that_is_killed_is_said(bench):
    source = "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nimport time; time.sleep(60)"
    run = bench.run(source, "#check\npass")
    assert "ended by itself" in run.problem and run.earned == 0


def test_progress_of_a_run_can_be_followed(bench):
    heard = []
    lesson = bench.write("x = 1", "y = 2", "#check\npass")
    run_notebook(lesson, limits=QUICK, tell=lambda done, total: heard.append((done, total)))
    assert heard[-1] == (3, 3) and heard == sorted(heard)


# --- progressive tests -------------------------------------------------------------------------------------------


@pytest.fixture
def suite(bench):
    """Writes a package file and a test file for it; returns the run of the tests."""

    def run(package: str, tests: str, limits: Limits = QUICK):
        (bench.root / "tinytorch" / "tiny.py").write_text(package)
        folder = bench.root / "tests" / "01_tiny"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "test_progressive_integration.py").write_text(tests)
        lesson = bench.write("#check\npass")
        return run_progressive([lesson], bench.root, limits)

    return run


def test_progressive_tests_pass_and_fail_with_their_words(suite):
    run = suite(
        "def f():\n    return 1",
        "from tinytorch.tiny import f\n"
        "class TestF:\n"
        "    def test_one(self): assert f() == 1\n"
        "    def test_two(self): assert f() == 2, 'got 1, expected 2'\n",
    )
    assert run.passed == 1 and run.problem is None and not run.ok
    assert run.failed == (("01_tiny: TestF.test_two", "got 1, expected 2"),)


def test_a_package_that_cannot_be_imported_fails(suite):
    run = suite("import nowhere", "def test_nothing(): pass\n")
    assert run.failed == (("import tinytorch.tiny", "ModuleNotFoundError: No module named 'nowhere'"),)
    assert not run.ok and run.passed == 0


def test_a_test_file_that_cannot_be_imported_fails(suite):
    run = suite("", "from tinytorch.tiny import missing\n")
    assert not run.ok and "missing" in run.failed[0][1] and "01_tiny" in run.failed[0][0]


@pytest.mark.parametrize(
    "test, words",
    [
        ("while True: pass", "stopped in 01_tiny: test_it"),
        ("import os; os._exit(0)", "ended by themselves in 01_tiny: test_it"),
        ("import ctypes; ctypes.string_at(0)", "ended by themselves in 01_tiny: test_it"),
    ],
)
def test_progressive_tests_that_do_not_come_to_their_end(suite, test, words):
    run = suite("", f"def test_it():\n    {test}\n", Limits(seconds=8))
    assert words in run.problem and not run.ok


@posix
def test_progressive_tests_that_print_without_end_do_no_harm(suite):
    package = "import sys\nfor _ in range(200):\n    print('x' * 1_000_000)\n    sys.stderr.write('y' * 1_000_000)"
    run = suite(package, "def test_it(): print('z' * 100_000_000)\n")
    assert run.ok and run.passed == 1


def test_ini_files_conftests_and_options_around_do_not_matter(suite, bench, monkeypatch):
    (bench.root / "tests").mkdir()
    (bench.root / "tests" / "conftest.py").write_text("raise RuntimeError('not for learners')")
    (bench.root / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    run = suite("", "def test_it(): pass\n")
    assert (run.ok, run.passed) == (True, 1)
    assert not list(bench.root.rglob(".pytest_cache"))
