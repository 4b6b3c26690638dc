"""The writer of the gradebook; the oracle is nbgrader: its API, its grades of cells, its feedback and its export."""

from __future__ import annotations

import csv
import json
import os
import sqlite3
import stat
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from tito.course.errors import CourseError
from tito.instructor import patience
from tito.instructor.gradebook import Writer, scores

REPOSITORY = Path(__file__).resolve().parents[3]
NAME, NOTEBOOK = "17_memoization", "memoization"
IN_TIME = datetime(2026, 11, 30, 20, 0, 0, 123456)


@pytest.fixture
def writer(small):
    with Writer(small.course) as opened:
        yield opened


def handed_in(small, student: str, timestamp: datetime) -> None:
    """A folder in submitted/ as nbgrader's exchange writes it."""
    folder = small.course.submitted(student, NAME)
    folder.mkdir(parents=True)
    (folder / "timestamp.txt").write_text(f"{timestamp} UTC", encoding="utf-8")


def row_of(small, student="ada"):
    """The row that `scores` gives of a student."""
    return next(row for row in scores(small.course, small.assignment) if row.student == student)


def shown(small) -> dict:
    """The only submission, as nbgrader lists it."""
    with small.api().gradebook as gradebook:
        (submission,) = gradebook.submission_dicts(NAME)
    return submission


def determined(small, student="ada") -> dict[str, float]:
    """What nbgrader reads from the autograded notebook's outputs."""
    import nbformat
    from nbgrader.utils import determine_grade, is_grade

    nb = nbformat.read(small.autograded(student), as_version=4)
    nbformat.validate(nb)
    return {cell.metadata.nbgrader.grade_id: determine_grade(cell)[0] for cell in nb.cells if is_grade(cell)}


def errors(small, student="ada") -> dict[str, list[str]]:
    """Messages of the error outputs of each check."""
    cells = json.loads(small.autograded(student).read_text(encoding="utf-8"))["cells"]
    return {
        cell["id"]: [output["evalue"] for output in cell["outputs"] if output["output_type"] == "error"]
        for cell in cells
        if cell["metadata"].get("nbgrader", {}).get("grade")
    }


class TestNbgraderSeesTheSame:
    def test_points_comments_and_state(self, small, writer):
        handed_in(small, "ada", IN_TIME)
        handed_in(small, "bob", IN_TIME)
        assert writer.merge(small.assignment, small.result(double=0.0), IN_TIME)
        api = small.api()
        ada, bob = api.get_submissions(NAME)
        assert (ada["student"], ada["score"], ada["max_score"], ada["autograded"]) == ("ada", 3.0, 5.0, True)
        assert not ada["needs_manual_grade"] and ada["timestamp"] == IN_TIME.isoformat()
        assert (bob["student"], bob["autograded"], bob["submitted"]) == ("bob", False, True)
        assert api.get_submission(NAME, "ada")["code_score"] == 3.0
        (listed,) = api.get_notebook_submissions(NAME, NOTEBOOK)
        assert listed["failed_tests"] and listed["score"] == 3.0 and listed["index"] == 0
        with api.gradebook as gradebook:
            comment = gradebook.find_comment("17-double", NOTEBOOK, NAME, "ada")
            assert (comment.auto_comment, comment.comment) == ("got 5", "got 5")
            assert gradebook.find_comment("17-halve", NOTEBOOK, NAME, "ada").comment is None
            assert gradebook.submission_dicts(NAME)[0]["score"] == 3.0

    def test_every_check_has_a_score_when_there_was_no_notebook(self, small, writer):
        messages = {"17-double-test": "no notebook", "17-halve-test": "no notebook"}
        writer.merge(small.assignment, small.result(double=0.0, halve=0.0, messages=messages, notebook=None))
        assert determined(small) == {"17-double-test": 0, "17-halve-test": 0}
        assert errors(small) == {"17-double-test": ["no notebook"], "17-halve-test": ["no notebook"]}
        with small.api().gradebook as gradebook:
            grades = gradebook.find_submission_notebook(NOTEBOOK, NAME, "ada").grades
            assert [(grade.auto_score, grade.needs_manual_grade) for grade in grades] == [(0.0, False)] * 2
        assert "HIDDEN" not in small.autograded().read_text(encoding="utf-8")

    def test_its_feedback_and_export(self, small, writer):
        writer.merge(small.assignment, small.result(halve=0.0), IN_TIME)
        assert small.api().generate_feedback(NAME)["success"]
        assert "got 1" in small.page().read_text(encoding="utf-8")
        here = small.course.root / "nbgrader.csv"
        with small.api().gradebook as gradebook:
            from nbgrader.plugins import CsvExportPlugin

            CsvExportPlugin(to=str(here), student=["ada"]).export(gradebook)
        (row,) = csv.DictReader(here.open(encoding="utf-8"))
        assert (row["student_id"], float(row["score"]), float(row["max_score"])) == ("ada", 2.0, 5.0)

    def test_files_are_read_only_as_nbgrader_makes_them(self, small, writer):
        writer.merge(small.assignment, small.result(), IN_TIME)
        assert stat.S_IMODE(small.autograded().stat().st_mode) == 0o444
        stamp = small.autograded().with_name("timestamp.txt")
        assert small.api().coursedir.get_existing_timestamp(str(stamp.parent)) == IN_TIME
        assert writer.merge(small.assignment, small.result(), None) and not stamp.exists()

    def test_a_time_with_a_zone_becomes_utc(self, small, writer):
        berlin = timezone(timedelta(hours=1))
        writer.merge(small.assignment, small.result(), IN_TIME.replace(tzinfo=UTC).astimezone(berlin))
        assert row_of(small).submitted == IN_TIME


class TestTheNotebookAgreesWithThePoints:
    ERROR = {"output_type": "error", "ename": "E", "evalue": "as it ran", "traceback": ["E: as it ran"]}
    STDERR = {"output_type": "stream", "name": "stderr", "text": "RuntimeWarning: overflow"}

    @staticmethod
    def value(text):
        return {"output_type": "execute_result", "data": {"text/plain": text}, "metadata": {}, "execution_count": 1}

    @pytest.mark.parametrize("earned", [0.0, 1.25, 2.0])
    @pytest.mark.parametrize("outputs", ["", "E", "S", "5", "0", "SE5", "0E", "9"])
    def test_whatever_the_outputs_are(self, small, writer, earned, outputs):
        made = [{"E": self.ERROR, "S": self.STDERR}.get(letter) or self.value(letter) for letter in outputs]
        notebook = small.result().notebook
        notebook["cells"][2]["outputs"] = made
        writer.merge(small.assignment, small.result(double=earned, notebook=notebook))
        assert determined(small) == {"17-double-test": earned, "17-halve-test": 3.0}
        said = errors(small)["17-double-test"]
        assert said == ([] if earned == 2.0 else ["as it ran"] if "E" in outputs else ["got 5"])

    def test_a_notebook_that_does_not_fit_is_replaced_by_the_released_one(self, small, writer):
        whole = small.result().notebook
        broken = [
            whole | {"cells": whole["cells"][:-1]},
            whole | {"cells": [*whole["cells"], whole["cells"][1]]},
            whole | {"cells": "none"},
            {"nbformat": 4},
            {},
        ]
        for notebook in broken:
            writer.merge(small.assignment, small.result(halve=0.0, notebook=notebook))
            assert determined(small) == {"17-double-test": 2.0, "17-halve-test": 0}
            assert small.api().get_notebook_submissions(NAME, NOTEBOOK)[0]["score"] == 2.0
            assert small.api().generate_feedback(NAME)["success"]

    def test_cells_that_claim_to_be_checks_are_none(self, small, writer):
        def claim(name, **fields):
            grading = {"grade_id": name, "schema_version": 3, "task": False, "locked": False, **fields}
            raw = {"cell_type": "code", "id": f"own-{name}", "metadata": {"nbgrader": grading}, "source": "1"}
            return raw | {"outputs": [], "execution_count": None}

        notebook = small.result().notebook
        notebook["cells"][4]["metadata"] = {"nbgrader": notebook["cells"][4]["metadata"]["nbgrader"] | {"points": 300}}
        again = claim("17-halve-test", grade=True, solution=False, points=300)
        notebook["cells"] += [again, claim("own", grade=True, solution=False, points=9)]
        notebook["cells"] += [claim("mine", grade=False, solution=True)]
        writer.merge(small.assignment, small.result(notebook=notebook))
        assert determined(small) == {"17-double-test": 2.0, "17-halve-test": 3.0}
        assert small.api().generate_feedback(NAME)["success"]
        assert "own-mine" in small.autograded().read_text(encoding="utf-8"), "the cells themselves stay"

    def test_no_markup_of_the_student_reaches_the_browser(self, small, writer):
        evil = "<script>alert('x')</script>"
        data = {"text/html": evil, "image/svg+xml": evil, "image/png": '"' + evil, "text/plain": "plain"}
        own = {"cell_type": "markdown", "id": "own-1", "metadata": {"tags": ['"' + evil]}, "source": "~~~\n" + evil}
        raw = {"cell_type": "raw", "id": "own-2", "metadata": {"raw_mimetype": "text/html"}, "source": [evil]}
        notebook = small.result().notebook
        notebook["metadata"] = {"title": evil}
        notebook["cells"][1]["outputs"] = [{"output_type": "display_data", "data": data, "metadata": {}}]
        notebook["cells"] += [own, raw]
        writer.merge(small.assignment, small.result(notebook=notebook))
        assert small.api().generate_feedback(NAME)["success"]
        page = small.page().read_text(encoding="utf-8")
        assert evil not in page and page.count("alert(") == 2  # the two cells, as they were typed
        assert "plain" in page

    def test_a_message_that_utf8_cannot_carry(self, small, writer):
        result = small.result(halve=0.0, messages={"17-halve-test": "\ud800 \x00 \x1b[31mred"}, flags=("\udfff",))
        assert writer.merge(small.assignment, result)
        assert errors(small)["17-halve-test"] == ["  red"]
        assert not writer.merge(small.assignment, result)


class TestTwice:
    def test_the_same_result_changes_nothing(self, small, writer):
        assert writer.merge(small.assignment, small.result(double=0.0), IN_TIME)
        first, notebook = small.dump(), small.autograded().read_bytes()
        inode = small.autograded().stat().st_ino
        assert not writer.merge(small.assignment, small.result(double=0.0), IN_TIME)
        assert small.dump() == first and small.autograded().read_bytes() == notebook
        assert small.autograded().stat().st_ino == inode

    def test_a_second_writer_says_so_too(self, small, writer):
        writer.merge(small.assignment, small.result(), IN_TIME)
        with Writer(small.course) as other:
            assert not other.merge(small.assignment, small.result(), IN_TIME)

    def test_a_new_result_replaces_the_old_one(self, small, writer):
        writer.merge(small.assignment, small.result(double=0.0), IN_TIME)
        assert writer.merge(small.assignment, small.result(), IN_TIME + timedelta(hours=1))
        assert shown(small)["score"] == 5.0 and determined(small) == {"17-double-test": 2.0, "17-halve-test": 3.0}
        with small.api().gradebook as gradebook:
            assert gradebook.find_comment("17-double", NOTEBOOK, NAME, "ada").comment is None

    def test_what_was_done_by_hand_survives(self, small, writer):
        writer.merge(small.assignment, small.result(double=0.0), IN_TIME)

        def person(grades, comments):
            grades["17-double-test"].manual_score, grades["17-double-test"].extra_credit = 1.5, 0.25
            comments["17-double"].manual_comment = "nearly"

        small.by_hand(person)
        writer.merge(small.assignment, small.result(double=0.0, job="job-2"), IN_TIME)
        seen = shown(small)
        assert (seen["score"], seen["needs_manual_grade"]) == (4.75, False)
        writer.merge(small.assignment, small.result(double=0.5), IN_TIME)
        seen = shown(small)
        assert (seen["score"], seen["needs_manual_grade"]) == (4.75, True)
        writer.merge(small.assignment, small.result(double=0.5, job="job-3"), IN_TIME)
        assert shown(small)["needs_manual_grade"], "nobody has looked yet"
        row = row_of(small)
        assert (row.total, row.needs_manual_grade, row.comments) == (4.75, True, {"17-double": "nearly"})
        assert [(check.auto, check.manual, check.extra, check.earned) for check in row.checks] == [
            (0.5, 1.5, 0.25, 1.75),
            (3.0, None, 0.0, 3.0),
        ]

    def test_flags_are_nbgraders_mark_until_a_person_takes_it_away(self, small, writer):
        def flagged() -> bool:
            with small.api().gradebook as gradebook:
                return gradebook.find_submission_notebook(NOTEBOOK, NAME, "ada").flagged

        writer.merge(small.assignment, small.result(), IN_TIME)
        assert not flagged()
        writer.merge(small.assignment, small.result(flags=("look",)), IN_TIME)
        assert flagged()
        with small.api().gradebook as gradebook:
            gradebook.find_submission_notebook(NOTEBOOK, NAME, "ada").flagged = False
            gradebook.db.commit()
        writer.merge(small.assignment, small.result(flags=("look",), job="job-2"), IN_TIME)
        assert not flagged(), "a person has looked at this flag"
        writer.merge(small.assignment, small.result(flags=("look", "and here")), IN_TIME)
        assert flagged(), "this one is new"

    def test_what_another_program_changed_is_mended(self, small, writer):
        writer.merge(small.assignment, small.result(), IN_TIME)
        first = small.dump()
        small.by_hand(lambda grades, _: setattr(grades["17-halve-test"], "auto_score", None))
        assert small.dump() != first
        assert writer.merge(small.assignment, small.result(), IN_TIME)
        assert small.dump() == first


# A program that is killed as the database is about to commit ("commit"), or as the notebook is about to be renamed.
KILLED = """
import json, os, signal, sys
from pathlib import Path
from tito.instructor import assignment, gradebook
from tito.instructor.course import GradingCourse
from tito.instructor.result import from_text

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

course, point = GradingCourse(Path(sys.argv[1])), sys.argv[2]
lesson = assignment.load(course, "17")
result = from_text((course.grading(lesson.name) / "results" / "ada.json").read_text(encoding="utf-8"))
with gradebook.Writer(course) as writer:
    if point == "commit":
        writer._db().commit = die
    else:
        gradebook.write_atomic = die
    writer.merge(lesson, result)
"""


class TestKilled:
    def killed(self, small, point: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-c", KILLED, str(small.course.root), point]
        done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=120)
        assert done.returncode == -9, done.stderr

    @pytest.mark.skipif(os.name == "nt", reason="kills by signal")
    def test_before_the_commit_nothing_has_happened(self, small):
        before = small.dump()
        small.save(small.result(double=0.0))
        self.killed(small, "commit")
        assert small.dump() == before and not small.autograded().exists()
        with Writer(small.course) as writer:
            assert writer.merge(small.assignment, small.result(double=0.0))
        assert shown(small)["score"] == 3.0

    @pytest.mark.skipif(os.name == "nt", reason="kills by signal")
    def test_between_commit_and_rename_the_next_merge_writes_the_notebook(self, small):
        small.save(small.result(double=0.0))
        self.killed(small, "rename")
        committed = small.dump()
        assert not small.autograded().exists()
        with Writer(small.course) as writer:
            assert writer.merge(small.assignment, small.result(double=0.0))
            assert not writer.merge(small.assignment, small.result(double=0.0))
        assert small.dump() == committed and determined(small)["17-double-test"] == 0

    def test_an_error_between_rows_takes_all_of_them_back(self, small, writer, monkeypatch):
        before = small.dump()
        monkeypatch.setattr(Writer, "_set_comments", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            writer.merge(small.assignment, small.result())
        assert small.dump() == before
        monkeypatch.undo()
        assert writer.merge(small.assignment, small.result())


class TestLocked:
    @pytest.fixture
    def lock(self, small):
        connection = sqlite3.connect(small.course.gradebook, isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        yield connection
        connection.close()

    def test_it_gives_up_in_words_and_nothing_is_lost(self, small, lock):
        with Writer(small.course, patience=0) as writer:
            with pytest.raises(CourseError, match="locked by another program") as caught:
                writer.merge(small.assignment, small.result())
            assert "Nothing was lost" in caught.value.hint
            lock.rollback()
            assert writer.merge(small.assignment, small.result())

    def test_it_waits_until_the_other_is_done(self, small, lock, monkeypatch):
        waited = []
        monkeypatch.setattr(patience, "pause", lambda: waited.append(lock.in_transaction) or lock.rollback())
        monkeypatch.setattr("tito.instructor.gradebook.ATTEMPT", 0)
        with Writer(small.course) as writer:
            assert writer.merge(small.assignment, small.result())
        assert waited == [True]

    def test_a_database_that_is_none(self, small):
        small.course.gradebook.write_bytes(b"no database" * 1000)
        with pytest.raises(CourseError), Writer(small.course, patience=0):
            pass


class TestRefused:
    @pytest.mark.parametrize("student", ["nobody", "../ada", "", "..", "a/b", "a\\b", "a\x00b"])
    def test_a_student_who_is_not_in_the_roster(self, small, writer, student):
        before = small.dump()
        with pytest.raises(CourseError):
            writer.merge(small.assignment, small.result(student=student))
        assert small.dump() == before and not (small.course.root / "autograded").exists()
        assert writer.merge(small.assignment, small.result()), "the others go on"

    def test_an_id_that_leads_out_of_its_folder(self, small, writer):
        with small.api().gradebook as gradebook:
            gradebook.add_student("../ada")
        with pytest.raises(CourseError, match="cannot be a student's id"):
            writer.merge(small.assignment, small.result(student="../ada"))
        assert not (small.course.root / "ada").exists() and not (small.course.root / "autograded").exists()

    def test_a_result_that_is_not_of_this_release(self, small, writer):
        good = small.result()
        first, second = good.checks
        bad = [
            replace(good, release="0" * 64),
            replace(good, assignment="01_tensor"),
            replace(good, checks=(first,)),
            replace(good, checks=(first, first, second)),
            replace(good, checks=(first, replace(second, earned=4.0))),
            replace(good, checks=(first, replace(second, earned=-1.0))),
            replace(good, checks=(first, replace(second, earned=float("nan")))),
            replace(good, checks=(first, replace(second, points=300.0, earned=300.0))),
        ]
        for result in bad:
            with pytest.raises(CourseError, match="^The result of ada (is of|does not hold every check)"):
                writer.merge(small.assignment, result)
        assert not row_of(small).checks

    def test_a_lesson_that_the_gradebook_does_not_know(self, small, writer):
        other = replace(small.assignment, name="18_other")
        with pytest.raises(CourseError, match="18_other"):
            writer.merge(other, replace(small.result(), assignment="18_other", release=other.hash))


class TestLate:
    LATE = datetime(2026, 12, 1, 0, 59)

    def test_it_is_said_and_costs_nothing_by_default(self, small, writer):
        writer.merge(small.assignment, small.result(), self.LATE)
        row = row_of(small)
        assert (row.late_seconds, row.penalty, row.total) == (7200.0, 0.0, 5.0)

    def test_the_penalty_is_the_one_of_nbgraders_settings(self, small):
        with small.course.config.open("a", encoding="utf-8") as config:
            config.write('c.LateSubmissionPlugin.penalty_method = "zero"\n')
        with Writer(small.course) as writer:
            writer.merge(small.assignment, small.result(), self.LATE)
            row = row_of(small)
            assert (row.penalty, row.total) == (5.0, 0.0)
            with small.api().gradebook as gradebook:
                assert gradebook.find_submission(NAME, "ada").late_submission_penalty == 5.0
                gradebook.grant_extension(NAME, "ada", hours=3)
            assert writer.merge(small.assignment, small.result(), self.LATE), "an extension takes the penalty back"
            row = row_of(small)
            assert (row.late_seconds, row.penalty, row.total) == (0.0, 0.0, 5.0)

    def test_a_penalty_that_fails_is_said_in_words(self, small):
        with small.course.config.open("a", encoding="utf-8") as config:
            config.write('c.AssignLatePenalties.plugin_class = "no.such.Plugin"\n')
        with Writer(small.course) as writer:
            with pytest.raises(CourseError, match="penalty"):
                writer.merge(small.assignment, small.result(), self.LATE)


def test_scores_list_the_whole_roster_and_how_each_was_graded(small, writer):
    writer.merge(small.assignment, small.result(flags=("a control passed",), sandbox="landlock"), IN_TIME)
    rows = {row.student: row for row in scores(small.course, small.assignment)}
    assert set(rows) == {"ada", "bob", "eve", "dan"}
    assert (rows["ada"].sandbox, rows["ada"].flags) == ("landlock", ("a control passed",))
    assert [check.id for check in rows["ada"].checks] == ["17-double-test", "17-halve-test"]
    assert (rows["bob"].total, rows["bob"].max, rows["bob"].checks) == (None, 5.0, ())
    assert rows["dan"].name == "dan" and rows["ada"].name == "Ada Lovelace"
    assert rows["ada"].total == shown(small)["score"]
