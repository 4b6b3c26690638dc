"""`tito grade autograde` on a small class: killed, stopped, spread over machines, and on damaged files.

The oracle is the same course, graded once without any disturbance: the rows that its gradebook holds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("nbgrader")

from tito.course.errors import CourseError
from tito.course.notebook import to_text
from tito.course.processes import MARK
from tito.instructor import assignment as assignments
from tito.instructor import autograde, pool, results, sandbox
from tito.instructor.assignment import Assignment, AssignmentCell
from tito.instructor.course import GradingCourse
from tito.instructor.nbgrader_setup import nbgrader_ready, settings
from tito.instructor.plan import shard_of

REPOSITORY = Path(__file__).resolve().parents[2]
FIRST, SECOND = "01_scale", "02_sums"
SOLVED = {
    "01-double": "#| export\ndef double(x):\n    return 2 * x\n",
    "02-quadruple": "from tinytorch.core.scale import double\n\n\ndef quadruple(x):\n    return double(double(x))\n",
    "02-total": "def total(values):\n    return sum(values)\n",
}
CHECKS = {
    "01-double": "assert double(3) == 6, 'double 3 is 6'\nassert double(5) == 10\n",
    "02-quadruple": "assert quadruple(3) == 12, f'got {quadruple(3)}'\nassert quadruple(5) == 20\n",
    "02-total": "assert total([1, 2]) == 3, f'got {total([1, 2])}'\nassert total([4, 4]) == 8\n",
}
POINTS = {"01-double": 1, "02-quadruple": 2, "02-total": 3}
STUDENTS = {"ada": 5.0, "bob": 2.0, "cyd": 0.0, "dan": 0.0}  # and what lesson 02 earns them


def lesson(name: str, package: dict[str, str]) -> Assignment:
    """A lesson of one hole and one check per exercise, as it is frozen."""
    number, _, notebook = name.partition("_")
    cells = []
    for grade_id in [each for each in SOLVED if each.startswith(number)]:
        for role, cell_id, source in (
            ("hole", grade_id, "raise NotImplementedError\n"), ("check", f"{grade_id}-test", CHECKS[grade_id])
        ):  # fmt: skip
            nbgrader = {"grade_id": cell_id, "grade": role == "check", "solution": role == "hole"}
            nbgrader |= {"locked": role == "check", "schema_version": 3, "task": False}
            nbgrader |= {"points": POINTS[grade_id]} if role == "check" else {}
            cells.append(AssignmentCell(cell_id, "code", role, source, source, {"nbgrader": nbgrader}))
    titles = {f"{grade_id}-test": grade_id for grade_id in SOLVED if grade_id.startswith(number)}
    return Assignment(
        name, notebook, number, name, f"tinytorch.core.{notebook}", tuple(cells), titles, {}, {}, package
    )  # fmt: skip


def notebook(assignment: Assignment, **holes: str) -> str:
    """A submission: solved, but for `holes` (total="def total(values): ...")."""
    number = assignment.number
    written = SOLVED | {f"{number}-{name}": source for name, source in holes.items()}
    cells = [
        {"cell_type": "code", "id": cell.id, "metadata": cell.metadata, "outputs": [], "execution_count": None,
         "source": written.get(cell.id, cell.released)}
        for cell in assignment.cells
    ]  # fmt: skip
    return to_text({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def hand_in(course: GradingCourse, student: str, assignment: Assignment, text: str) -> None:
    path = course.submitted(student, assignment.name) / f"{assignment.notebook}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A course of two released lessons with four submissions of the second, registered by nbgrader itself."""
    from nbgrader.apps.api import NbGraderAPI

    course = GradingCourse(tmp_path_factory.mktemp("class") / "course")
    package = {"tinytorch/__init__.py": "", "tinytorch/core/__init__.py": ""}
    first = lesson(FIRST, package)
    second = lesson(SECOND, package | {"tinytorch/core/scale.py": SOLVED["01-double"]})
    course.root.mkdir()
    course.config.write_text('c = get_config()  # noqa\nc.CourseDirectory.course_id = "small"\n', encoding="utf-8")
    with nbgrader_ready():
        for each in (first, second):
            source = course.source(each.name) / f"{each.notebook}.ipynb"
            source.parent.mkdir(parents=True)
            source.write_text(notebook(each), encoding="utf-8")
            made = NbGraderAPI(config=settings(course)).generate_assignment(each.name)
            assert made["success"], made
            assignments.save(course, each)
        with NbGraderAPI(config=settings(course)).gradebook as gradebook:
            for student in STUDENTS:
                gradebook.add_student(student)
    hand_in(course, "ada", second, notebook(second))
    hand_in(course, "bob", second, notebook(second, total="def total(values):\n    return values[0]\n"))
    hand_in(course, "cyd", second, "{ this is no JSON")
    hand_in(course, "dan", second, notebook(second, quadruple="raise NotImplementedError\n", total="x = = 1\n"))
    return course.root


@pytest.fixture(scope="module")
def undisturbed(template, tmp_path_factory, wanted) -> GradingCourse:
    """The course, graded once."""
    root = tmp_path_factory.mktemp("undisturbed") / "course"
    shutil.copytree(template, root)
    course = GradingCourse(root)
    assert grade(course, wanted) == 0
    return course


@pytest.fixture
def course(template, tmp_path) -> GradingCourse:
    shutil.copytree(template, tmp_path / "course")
    return GradingCourse(tmp_path / "course")


def grade(course: GradingCourse, wanted: str, students=(), rerun=False, cumulative=False, count=2) -> int:
    """`tito grade autograde 02`, in this process."""
    return autograde.autograde(course, "02", count, list(students), rerun, wanted, cumulative, None)


def rows(course: GradingCourse) -> list[tuple]:
    """What the gradebook holds of submissions, without its random ids; every row, also one that is there twice."""
    told = []
    with sqlite3.connect(course.gradebook) as db:
        for table, columns in (
            ("grade", "auto_score, manual_score, extra_credit, needs_manual_grade"), ("comment", "auto_comment")
        ):  # fmt: skip
            told += db.execute(
                f"""SELECT '{table}', a.student_id, b.name, {columns}, a.timestamp FROM {table} g
                JOIN submitted_notebook n ON g.notebook_id = n.id JOIN submitted_assignment a ON n.assignment_id = a.id
                JOIN base_cell b ON g.cell_id = b.id"""
            ).fetchall()
        counts = [db.execute(f"SELECT count(*) FROM submitted_{t}").fetchone() for t in ("assignment", "notebook")]
    return sorted(map(repr, told)) + counts


def points(course: GradingCourse) -> dict[str, float]:
    """Points per student, as nbgrader's own tables add them up."""
    with sqlite3.connect(course.gradebook) as db:
        return dict(
            db.execute(
                """SELECT a.student_id, sum(g.auto_score) FROM grade g JOIN submitted_notebook n ON g.notebook_id = n.id
                JOIN submitted_assignment a ON n.assignment_id = a.id GROUP BY a.student_id"""
            )
        )


def kept(course: GradingCourse) -> dict[str, dict]:
    """The results on disk, without the seconds that they took."""
    found = {}
    for path in sorted((course.grading(SECOND) / "results").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        for timed in (result, *result["checks"]):
            timed.pop("seconds")
        found[path.stem] = result
    return found


def result(course: GradingCourse, student: str) -> results.Result:
    return results.read(course.grading(SECOND) / "results" / f"{student}.json")[0]


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Students whose submissions this process runs, as it runs them."""
    students, unit = [], pool.unit

    def counted(job_text, *rest):
        students.append(json.loads(job_text)["student"])
        return unit(job_text, *rest)

    monkeypatch.setattr(pool, "unit", counted)
    return students


# Runs tito with a fault put in: `die(OWNER, NAME, N)` kills this process at the N-th call of a function of ours. The
# mark of every sandbox is written to a file.
DRIVER = """
import os, signal, sys
from pathlib import Path
from tito import main
from tito.instructor import gradebook, outcomes, sandbox

start = sandbox.start

def noted(level, program, package, limits, private, mark):
    with open(Path(sys.argv[1], "marks"), "a") as marks:
        marks.write(mark + chr(10))
    return start(level, program, package, limits, private, mark)

def die(owner, name, number):
    original, calls = getattr(owner, name), []
    def dying(*values, **named):
        calls.append(1)
        if len(calls) >= number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*values, **named)
    setattr(owner, name, dying)

sandbox.start = noted
exec(sys.argv[2])
sys.exit(main.run(sys.argv[3:]))
"""


def command(course: GradingCourse, fault: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", DRIVER, str(course.root.parent), fault, "grade", *arguments]


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR", "TITO_DEBUG")}
    return kept | {"PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "utf-8"}


def tito(course: GradingCourse, *arguments: str, fault: str = "") -> subprocess.CompletedProcess:
    """The command in a process of its own, in the course's folder."""
    return subprocess.run(
        command(course, fault, *arguments), cwd=course.root, env=environment(), stdin=subprocess.DEVNULL,
        capture_output=True, encoding="utf-8", timeout=300,
    )  # fmt: skip


def left_over(course: GradingCourse) -> list[int]:
    """Processes of sandboxes that `tito` started and that are still there after a while."""
    import psutil

    marks = set((course.root.parent / "marks").read_text().split())
    assert marks
    deadline = time.monotonic() + 20
    while True:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) in marks and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
            except (psutil.Error, OSError):
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def test_a_submission_that_a_killed_collect_left_half_brought_in_is_graded(course, wanted):
    incoming = course.grading(SECOND) / "incoming" / "ada"
    incoming.parent.mkdir(parents=True)
    course.submitted("ada", SECOND).rename(incoming)
    assert grade(course, wanted) == 0 and points(course) == STUDENTS


class TestAgain:
    def test_points_are_what_the_submissions_deserve(self, undisturbed):
        assert points(undisturbed) == STUDENTS

    def test_a_second_run_starts_nothing_and_changes_nothing(self, undisturbed, tmp_path, wanted, ran):
        course = GradingCourse(shutil.copytree(undisturbed.root, tmp_path / "course"))
        before = kept(course), rows(course)
        assert grade(course, wanted) == 0
        assert ran == [] and (kept(course), rows(course)) == before

    @pytest.mark.parametrize("count", [1, 2])
    def test_a_rerun_gives_the_same_bit_for_bit(self, undisturbed, tmp_path, wanted, count):
        course = GradingCourse(shutil.copytree(undisturbed.root, tmp_path / "course"))
        shutil.rmtree(course.grading(SECOND) / "logs")
        assert grade(course, wanted, rerun=True, count=count) == 0
        assert len(list((course.grading(SECOND) / "logs").glob("*.log"))) == len(STUDENTS)
        assert kept(course) == kept(undisturbed) and rows(course) == rows(undisturbed)

    def test_only_the_named_student_is_graded(self, course, wanted):
        assert grade(course, wanted, students=["bob", "bob"]) == 0
        assert points(course) == {"bob": 2.0} and list(kept(course)) == ["bob"]

    def test_a_new_submission_alone_is_run_again(self, undisturbed, tmp_path, wanted, ran):
        course = GradingCourse(shutil.copytree(undisturbed.root, tmp_path / "course"))
        second = assignments.load(course, "02")
        hand_in(course, "dan", second, notebook(second))
        assert grade(course, wanted) == 0
        assert ran == ["dan"] and points(course) == STUDENTS | {"dan": 5.0}

    def test_a_result_of_a_weaker_sandbox_does_not_do(self, course, wanted):
        if wanted == "none":
            pytest.skip("no sandbox holds here")
        assert grade(course, "none", students=["ada"]) == 0
        assert result(course, "ada").sandbox == "none"
        assert grade(course, "auto", students=["ada"]) == 0
        assert result(course, "ada").sandbox == sandbox.choose("auto")


KILLS = {
    "while sandboxes run": "die(sandbox, 'end', 2)",
    "before a result is written": "die(outcomes, 'write_atomic', 3)",
    "between a result and its log": "die(outcomes, 'write_atomic', 4)",
    "between result and merge": "die(gradebook.Writer, 'merge', 2)",
    "in the merge, before the commit": "die(gradebook.Writer, '_set_comments', 2)",
    "in the merge, after the commit": "die(gradebook.Writer, '_write_files', 2)",
}


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
@pytest.mark.parametrize("fault", KILLS.values(), ids=KILLS)
def test_killed_it_goes_on_where_it_was(course, undisturbed, wanted, ran, fault):
    """What has a result is not run again, and no grade is lost or doubled."""
    killed = tito(course, "autograde", "02", "--jobs", "2", "--sandbox", wanted, fault=fault)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if wanted != "none":
        assert left_over(course) == []
    finished = set(kept(course))
    assert grade(course, wanted) == 0
    assert sorted(ran) == sorted(set(STUDENTS) - finished)
    assert kept(course) == kept(undisturbed) and rows(course) == rows(undisturbed)


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_ends_everything_and_says_how_to_go_on(course, wanted):
    second = assignments.load(course, "02")
    for student in ("bob", "dan"):
        hand_in(course, student, second, notebook(second, total="while True: pass\n"))
    process = subprocess.Popen(
        command(course, "", "autograde", "02", "--jobs", "4", "--sandbox", wanted), cwd=course.root, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(kept(course)) < 2 and time.monotonic() < deadline:  # then the endless ones are all that runs
        time.sleep(0.05)
    for _ in range(3):  # Python itself swallows a Ctrl-C that meets certain moments, and a person repeats it
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=15)
            break
        except subprocess.TimeoutExpired:
            continue
    assert process.returncode == 130 and err.strip() == "tito: stopped.", err
    assert "the same command goes on from there" in out
    assert left_over(course) == [] and set(kept(course)) == {"ada", "cyd"}


class TestApart:
    def test_shards_in_copied_folders_come_to_the_same(self, course, undisturbed, wanted, tmp_path):
        assert autograde.plan(course, "02", [], False) == 0
        copies = [shutil.copytree(course.grading(SECOND), tmp_path / f"machine{n}" / SECOND) for n in (1, 2)]
        for number, copy in enumerate(copies, start=1):
            assert autograde.run(copy, f"{number}/2", 1, False, wanted) == 0
            assert len(list((copy / "results").iterdir())) == 2
            shutil.copytree(copy / "results", course.grading(SECOND) / "results", dirs_exist_ok=True)
        for _ in range(2):
            assert autograde.merge(course, "02") == 0
            assert kept(course) == kept(undisturbed) and rows(course) == rows(undisturbed)

    @pytest.mark.parametrize("text", ["0/2", "3/2", "2", "1/0", "-1/2", "a/b", ""])
    def test_a_shard_that_cannot_be(self, text):
        with pytest.raises(CourseError, match="no shard"):
            shard_of([], text)

    def test_together_the_shards_are_the_whole(self):
        paths = [Path(str(number)) for number in range(10)]
        shards = [shard_of(paths, f"{number}/3") for number in (1, 2, 3)]
        assert sorted(sum(shards, [])) == sorted(paths)

    def test_a_job_of_a_withdrawn_submission_is_removed(self, course):
        assert autograde.plan(course, "02", [], False) == 0
        shutil.rmtree(course.submitted("dan", SECOND))
        assert autograde.plan(course, "02", ["ada"], False) == 0
        assert (course.grading(SECOND) / "jobs" / "dan.json").is_file()
        assert autograde.plan(course, "02", [], False) == 0
        assert not (course.grading(SECOND) / "jobs" / "dan.json").exists()

    def test_a_result_of_an_earlier_submission_is_not_merged(self, undisturbed, tmp_path, capsys):
        course = GradingCourse(shutil.copytree(undisturbed.root, tmp_path / "course"))
        second = assignments.load(course, "02")
        hand_in(course, "bob", second, notebook(second))
        autograde.plan(course, "02", [], False)
        assert autograde.merge(course, "02") == 1
        assert "bob  -  Not merged: the submission was planned anew since" in capsys.readouterr().out
        assert points(course) == STUDENTS


class TestDamage:
    """One file is broken: words for that student, and the others are graded."""

    def others_are_graded(self, course, student: str, out: str, words: str) -> None:
        assert points(course) == {name: earned for name, earned in STUDENTS.items() if name != student}
        line = next(line for line in out.splitlines() if line.startswith(student))
        assert words in line, line

    def test_a_job_that_cannot_be_read(self, course, wanted, capsys):
        autograde.plan(course, "02", [], False)
        for text in ("{", '{"student": "ada"}', "[]"):
            (course.grading(SECOND) / "jobs" / "ada.json").write_text(text)
            assert autograde.run(course.grading(SECOND), "1/1", 2, False, wanted) == 1
        assert autograde.merge(course, "02") == 0
        self.others_are_graded(course, "ada", capsys.readouterr().out, "cannot be read")

    def test_a_job_of_another_release(self, course, wanted, capsys):
        autograde.plan(course, "02", [], False)
        path = course.grading(SECOND) / "jobs" / "ada.json"
        path.write_text(path.read_text().replace(assignments.load(course, "02").hash, "0" * 64))
        assert autograde.run(course.grading(SECOND), "1/1", 2, False, wanted) == 1
        autograde.merge(course, "02")
        self.others_are_graded(course, "ada", capsys.readouterr().out, "another release")

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"checks": 3}', '{"checks": [{}]}'])
    def test_a_result_that_cannot_be_read_is_made_again(self, undisturbed, tmp_path, wanted, capsys, text):
        course = GradingCourse(shutil.copytree(undisturbed.root, tmp_path / "course"))
        path = course.grading(SECOND) / "results" / "ada.json"
        path.write_text(text)
        assert autograde.merge(course, "02") == 1
        assert re.search(r"^ada  -  .*ada\.json cannot be read", capsys.readouterr().out, re.MULTILINE)
        assert grade(course, wanted) == 0 and kept(course) == kept(undisturbed)

    def test_a_result_under_another_name(self, undisturbed, tmp_path):
        course = GradingCourse(shutil.copytree(undisturbed.root, tmp_path / "course"))
        folder = course.grading(SECOND) / "results"
        shutil.copy(folder / "ada.json", folder / "dan.json")
        assert autograde.merge(course, "02") == 1
        assert points(course) == STUDENTS

    def test_a_result_that_cannot_be_written(self, course, wanted, capsys):
        (course.grading(SECOND) / "results" / "ada.json").mkdir(parents=True)
        assert grade(course, wanted) == 1
        self.others_are_graded(course, "ada", capsys.readouterr().out, "Not kept in ")

    def test_no_room_for_any_result(self, course, wanted, capsys):
        (course.grading(SECOND) / "results").write_text("a file where the folder should be")
        assert grade(course, wanted) == 1
        out = capsys.readouterr().out
        assert out.count("Not kept in ") == len(STUDENTS) and "4 of 4 could not be graded" in out
        assert points(course) == {}

    def test_a_student_who_is_not_in_the_roster(self, course, wanted, capsys):
        second = assignments.load(course, "02")
        hand_in(course, "zoe", second, notebook(second))
        assert grade(course, wanted) == 1
        self.others_are_graded(course, "zoe", capsys.readouterr().out, "tito grade roster")

    def test_a_mistake_of_ours_in_one_of_them(self, course, wanted, capsys, monkeypatch):
        from tito.instructor.gradebook import Writer

        merge = Writer.merge

        def failing(self, assignment, result, timestamp=None):
            if result.student == "ada":
                raise KeyError("ours")
            return merge(self, assignment, result, timestamp)

        monkeypatch.setattr(Writer, "merge", failing)
        assert grade(course, wanted) == 1
        self.others_are_graded(course, "ada", capsys.readouterr().out, "Not merged: KeyError: 'ours'")

    def test_nobody_handed_in_and_nobody_of_that_name(self, course, wanted):
        with pytest.raises(CourseError, match="Nothing of eve was collected"):
            grade(course, wanted, students=["eve"])
        shutil.rmtree(course.root / "submitted")
        with pytest.raises(CourseError, match="No submission of 02_sums"):
            grade(course, wanted)

    def test_a_folder_that_is_none_of_plans(self, course, wanted, tmp_path):
        with pytest.raises(CourseError, match="assignment.json is missing"):
            autograde.run(tmp_path, "1/1", 1, False, wanted)
        with pytest.raises(CourseError, match="no jobs"):
            autograde.run(course.grading(SECOND), "1/1", 1, False, wanted)
        with pytest.raises(CourseError, match="no results"):
            autograde.merge(course, "02")


class TestCumulative:
    """Ada's lesson 02 is right and stands on her lesson 01."""

    def graded(self, course, wanted, first: str | None, cumulative: bool = True) -> results.Result:
        if first is not None:
            hand_in(course, "ada", assignments.load(course, "01"), first)
        assert grade(course, wanted, students=["ada"], cumulative=cumulative) == 0
        return result(course, "ada")

    def test_a_mistake_in_an_earlier_lesson_costs_points_only_so(self, course, wanted):
        first = notebook(assignments.load(course, "01"), double="#| export\ndef double(x):\n    return 3 * x\n")
        told = self.graded(course, wanted, first)
        assert [(check.earned, check.message) for check in told.checks] == [(0.0, "got 27"), (3.0, "")]
        assert told.findings == () and self.graded(course, wanted, None, cumulative=False).earned == 5.0

    def test_the_own_package_does_when_it_is_right(self, course, wanted):
        own = "#| export\ndef double(x):\n    return x + x\n"
        told = self.graded(course, wanted, notebook(assignments.load(course, "01"), double=own))
        job = json.loads((course.grading(SECOND) / "jobs" / "ada.json").read_text())
        assert told.earned == 5.0 and "return x + x" in job["package"]["tinytorch/core/scale.py"]

    @pytest.mark.parametrize(
        ("first", "words"),
        [(None, "No notebook scale.ipynb was handed in."), ("{", "not valid JSON"), ("broken", "cannot be imported")],
    )
    def test_where_there_is_none_the_reference_stands_in(self, course, wanted, first, words):
        if first == "broken":
            first = notebook(assignments.load(course, "01"), double="#| export\ndef double(x) return 3 * x\n")
        told = self.graded(course, wanted, first)
        assert told.earned == 5.0
        (note,) = told.findings
        assert note.startswith("Lesson 01_scale was run from the reference") and words.lower() in note.lower()


class TestOutput:
    def test_in_a_pipe_a_line_for_each_and_a_summary(self, course, wanted):
        done = tito(course, "autograde", "02", "--sandbox", wanted)
        assert done.returncode == 0 and done.stderr == "" and "\x1b" not in done.stdout
        lines = done.stdout.splitlines()
        for student, earned in STUDENTS.items():
            assert any(re.match(rf"{student}  {earned:g}/5(  |$)", line) for line in lines), done.stdout
        assert re.search(r"02-quadruple-test +2 +2/4 ", done.stdout)
        assert re.search(r"02-total-test +3 +1/4 ", done.stdout)
        assert "02-total-test      1x  got 1" in done.stdout or re.search(r"02-total-test +1x +got 1", done.stdout)
        log = (course.grading(SECOND) / "logs" / "bob.log").read_text()
        assert "bob: 02_sums, 2 of 5 points" in log and "0/3  02-total-test" in log and "got 1" in log

    def test_no_message_steers_the_terminal_on_which_its_log_is_read(self, undisturbed):
        known = result(undisturbed, "bob")
        checks = tuple(replace(check, message="\x1b[2Jgone\x9b31m\r\x07") for check in known.checks)
        text = results.log_of(assignments.load(undisturbed, "02"), replace(known, checks=checks))
        assert "gone" in text and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)

    def test_on_a_terminal_a_bar_and_no_line_too_long(self, course, wanted, read_terminal):
        pty, fcntl = pytest.importorskip("pty"), pytest.importorskip("fcntl")
        import struct
        import termios

        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        kept = {name: value for name, value in environment().items() if name not in ("NO_COLOR", "CI")}
        process = subprocess.Popen(
            command(course, "", "autograde", "02", "--sandbox", wanted), cwd=course.root, env=kept | {"TERM": "xterm"},
            stdin=theirs, stdout=theirs, stderr=theirs,
        )  # fmt: skip
        os.close(theirs)
        text = read_terminal(ours).decode()
        assert process.wait(60) == 0
        assert "Grading 02_sums" in text and re.search(r"[1-4]/4", text)
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()
        assert not [line for line in plain if len(line) > 80 and str(course.root) not in line]


def test_a_log_says_what_an_instructor_asks(undisturbed):
    frozen = assignments.load(undisturbed, "02")
    extra = {"flags": ("Look here.",), "findings": ("A cell was added.",), "problem": "Slow."}
    flagged = replace(result(undisturbed, "bob"), **extra)
    text = results.log_of(frozen, flagged)
    for words in ("please look: Look here.", "found: A cell was added.", "problem: Slow.", flagged.release[:12]):
        assert words in text
