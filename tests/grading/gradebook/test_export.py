"""Grades for a spreadsheet, Canvas and Moodle, read back with Python's csv; nbgrader's scores are the oracle."""

from __future__ import annotations

import csv
import io
from datetime import datetime

import pytest

from tito.course.errors import CourseError
from tito.instructor.export import export
from tito.instructor.gradebook import Writer
from tito.instructor.lms import defused, identifier

NAME = "17_memoization"
HOSTILE = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", '=HYPERLINK("http://x","y")', "=cmd|' /C calc'!A0"]


@pytest.fixture
def graded(small):
    """ada has 5 of 5, bob 2.5 and is late, eve 0; dan handed nothing in."""
    late = datetime(2026, 12, 1, 0, 59)
    with Writer(small.course) as writer:
        writer.merge(small.assignment, small.result(), datetime(2026, 11, 1))
        writer.merge(small.assignment, small.result("bob", double=1.5, halve=1.0, flags=("=a", "b")), late)
        writer.merge(small.assignment, small.result("eve", double=0.0, halve=0.0))
    return small


def table(graded, form: str, like=None, lesson="17", out=None) -> list[dict]:
    """The exported file as csv.DictReader reads it."""
    assert export(graded.course, lesson, form, out, like) == 0
    path = out or graded.course.root / {"csv": "grades.csv"}.get(form, f"{form}.csv")
    assert not path.read_bytes().startswith(b"\xef\xbb\xbf")
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline=""), strict=True))


class TestTidy:
    def test_one_row_per_student_with_nbgraders_scores(self, graded):
        rows = {row["id"]: row for row in table(graded, "csv", lesson=None)}
        with graded.api().gradebook as gradebook:
            expected = {each["student"]: each["score"] for each in gradebook.submission_dicts(NAME)}
        assert {student: float(row["score"]) for student, row in rows.items() if row["score"]} == expected
        assert list(rows) == ["dan", "bob", "eve", "ada"] and list(rows["ada"]) == [
            "id", "name", "email", "assignment", "score", "max", "late_seconds", "sandbox", "flags"
        ]  # fmt: skip
        assert {row["assignment"] for row in rows.values()} == {NAME} and {row["max"] for row in rows.values()} == {"5"}
        assert (rows["bob"]["late_seconds"], rows["bob"]["sandbox"], rows["bob"]["flags"]) == (
            "7200",
            "bwrap",
            "'=a; b",
        )
        assert (rows["dan"]["score"], rows["dan"]["late_seconds"], rows["dan"]["name"]) == ("", "0", "dan")

    def test_names_come_back_whole_and_run_nowhere(self, graded):
        rows = {row["id"]: row for row in table(graded, "csv")}
        assert rows["bob"]["name"] == 'Bob, "Jr" <script>alert(1)</script>'
        assert rows["eve"]["name"] == 'Eve =HYPERLINK("http://x","y")' and rows["eve"]["email"] == "'=1+1|x@example.org"

    @pytest.mark.parametrize("text", HOSTILE)
    def test_no_cell_begins_like_a_formula(self, text):
        assert defused(text) == "'" + text
        assert defused("Ada " + text) == "Ada " + text

    @pytest.mark.parametrize("text", ["-42", "+49", "@ada", "ada@example.org", "0017", ""])
    def test_ids_that_are_plainly_ids_stay(self, text):
        assert identifier(text) == text

    @pytest.mark.parametrize("text", [text for text in HOSTILE if text not in ("+1", "-1")])
    def test_ids_that_are_none_do_not(self, text):
        assert identifier(text) == "'" + text


class TestMoodle:
    def test_the_columns_of_its_import(self, graded):
        rows = table(graded, "moodle")
        assert list(rows[0]) == ["ID number", "Email address", NAME]
        assert {row["ID number"]: row[NAME] for row in rows} == {"ada": "5", "bob": "2.5", "eve": "0", "dan": ""}
        assert {row["ID number"]: row["Email address"] for row in rows}["eve"] == "'=1+1|x@example.org"


class TestCanvas:
    HEAD = "Student,ID,SIS User ID,SIS Login ID,Section,Old one (1),17_memoization (4711),Current Score"
    LINES = [
        "    Points Possible,,,,,10,5,(read only)",
        '"Lovelace, Ada",901,ada,x,S1,7,,70',
        '"Jr, Bob",902,,bob@example.org,S1,8,1,80',
        '"=HYPERLINK(""http://x"",""y"") Eve",903,,,=S2,-1,,90',
        '"Student, Test",904,,test,S1,,,',
    ]

    @pytest.fixture
    def like(self, tmp_path):
        def write(lines=self.LINES, head=self.HEAD, mark="\ufeff", comma=","):
            path = tmp_path / "from canvas.csv"
            path.write_text(mark + "\n".join([head, *lines]).replace(",", comma) + "\n", encoding="utf-8")
            return path

        return write

    def test_a_new_assignment_from_the_roster(self, graded):
        rows = table(graded, "canvas")
        assert list(rows[0]) == ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", NAME]
        assert (rows[0]["Student"].strip(), rows[0][NAME]) == ("Points Possible", "5")
        by_id = {row["SIS User ID"]: row for row in rows[1:]}
        assert {student: row[NAME] for student, row in by_id.items()} == {
            "ada": "5",
            "bob": "2.5",
            "eve": "0",
            "dan": "",
        }
        assert by_id["ada"]["Student"] == "Lovelace, Ada" and by_id["eve"]["Student"].startswith("'=HYPERLINK")

    def test_its_own_export_with_one_column_filled(self, graded, like, capsys):
        path = like()
        before = list(csv.DictReader(path.open(encoding="utf-8-sig", newline="")))
        rows = table(graded, "canvas", like=path)
        assert [row["17_memoization (4711)"] for row in rows] == ["5", "5", "2.5", "0", ""]
        for old, new in zip(before, rows, strict=True):
            untouched = set(old) - {"17_memoization (4711)", "Student", "Section"}
            assert {key: new[key] for key in untouched} == {key: old[key] for key in untouched}
        assert rows[0]["Student"] == "    Points Possible"
        assert rows[3]["Student"].startswith("'=HYPERLINK") and rows[3]["Section"] == "'=S2"
        assert f"dan is not in {path}." in capsys.readouterr().out

    def test_semicolons_and_lms_ids(self, graded, like):
        with graded.api().gradebook as gradebook:
            gradebook.find_student("ada").lms_user_id = "77"
            gradebook.db.commit()
        head = "Student,ID,Section,Lesson 17: Small & simple (3)"
        rows = table(graded, "canvas", like=like(["Somebody,77,S,", "Ada Lovelace,78,S,1"], head, "", ";"))
        assert [row["Lesson 17: Small & simple (3)"] for row in rows] == ["5", "1"], "the id counts, not the name"

    def test_a_name_that_two_have_is_nobodys(self, graded, like):
        with graded.api().gradebook as gradebook:
            gradebook.add_student("zoe", first_name="Ada", last_name="Lovelace")
        rows = table(graded, "canvas", like=like(['"Lovelace, Ada",1,,,S,,,']))
        assert rows[0]["17_memoization (4711)"] == ""

    def test_where_nothing_was_graded_canvas_keeps_what_it_has(self, graded, like):
        rows = table(graded, "canvas", like=like(["Dan,5,dan,,S,,3,"]))
        assert rows[0]["17_memoization (4711)"] == "3"

    def test_points_that_differ_are_said(self, graded, like, capsys):
        table(graded, "canvas", like=like(["    Points Possible,,,,,10,20,", self.LINES[1]]))
        assert "20 points possible in Canvas, 5 here" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("head", "said"),
        [
            ("Student,ID,Section,Other (1)", "no column for any"),
            ("Student,ID,17_memoization (1),Memoization (2)", "several columns"),
            ("Name,Points,17_memoization (1)", "no gradebook export"),
            ("", "empty"),
        ],
    )
    def test_a_file_that_does_not_fit(self, graded, like, head, said):
        with pytest.raises(CourseError, match=said):
            export(graded.course, "17", "canvas", None, like([], head))
        assert not (graded.course.root / "canvas.csv").exists()

    def test_a_file_that_is_no_text(self, graded, tmp_path):
        for content in (b"\xff\xfe\x00", b"\x00" * 50):
            (tmp_path / "x.csv").write_bytes(content)
            with pytest.raises(CourseError):
                export(graded.course, "17", "canvas", None, tmp_path / "x.csv")


def test_the_file_may_lie_elsewhere(graded, tmp_path):
    assert len(table(graded, "csv", out=tmp_path / "new folder" / "g.csv")) == 4


def test_a_wrong_form_and_a_form_that_takes_no_file(graded, tmp_path):
    with pytest.raises(CourseError, match="no form 'excel'"):
        export(graded.course, "17", "excel", None, None)
    with pytest.raises(CourseError, match="--like"):
        export(graded.course, "17", "moodle", None, tmp_path / "x.csv")
