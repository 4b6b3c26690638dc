"""A student's way through lessons: start, hint, test, complete, status, reset; with right and wrong notebooks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest


def contents(root: Path) -> dict[str, str]:
    """Digest of every file below `root` but tito's own state."""
    files = (path for path in root.rglob("*") if path.is_file() and ".tito" not in path.parts)
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.strip()]


class TestStart:
    def test_says_what_the_lesson_builds_needs_and_exports_and_where_it_lies(self, course):
        done = course.tito("module", "start", "2")
        assert done.returncode == 0, done.stderr
        for words in (
            "Lesson 02: Shift   about 5 minutes, 3 points",
            "Numbers, moved along.",
            "1: shift",
            "01 scale (reference)",
            "tinytorch/core/shift.py (now: reference)",
            str(course.lesson("2").notebook),
            "tito module test 02",
        ):
            assert words in done.stdout, f"{words!r} is missing in:\n{done.stdout}"

    def test_changes_nothing_and_opens_nothing_without_a_terminal(self, course):
        before = contents(course.root)
        assert "JupyterLab" not in course.tito("module", "start", "1").stdout
        assert contents(course.root) == before


class TestHint:
    def test_goes_one_step_further_each_time_and_ends_at_the_last(self, course):
        shown = [course.tito("module", "hint", "1", "double").stdout for _ in range(4)]
        assert [out.split("hint ")[1][:6] for out in shown] == ["1 of 3", "2 of 3", "3 of 3", "3 of 3"]
        assert "The idea of double." not in shown[0] and "The idea of double." in shown[1]
        assert "The steps of double" not in shown[1] and "The steps of double" in shown[2]
        assert "that was the last hint" in shown[2]

    def test_without_an_exercise_lists_them_and_takes_no_hint(self, course):
        course.tito("module", "hint", "1", "total")
        for _ in range(2):
            done = course.tito("module", "hint", "scale")
            table = rows(done.stdout)
            assert ["double", "Twice", "a", "number", "to", "do", "0", "of", "3"] in table
            assert ["total", "The", "sum", "to", "do", "1", "of", "3"] in table
            assert "tito module hint 01 double" in done.stdout  # the first that is to do

    def test_a_written_exercise_is_not_suggested(self, course):
        course.solve("1", total='raise NotImplementedError("Exercise 01-total is still to be written.")')
        found = json.loads(course.tito("module", "hint", "1", "--json").stdout)["exercises"]
        assert [(e["exercise"], e["written"]) for e in found] == [("double", True), ("total", False)]
        assert "tito module hint 01 total" in course.tito("module", "hint", "1").stdout


class TestTest:
    def test_an_empty_notebook_earns_nothing_and_says_which_exercises_are_to_do(self, course):
        done = course.tito("module", "test", "1")
        assert done.returncode == 1
        table = rows(done.stdout)
        assert ["to", "do", "0/2", "Twice", "a", "number", "01-double-test"] in table
        assert ["to", "do", "0/3", "The", "sum", "01-total-test"] in table
        assert ["waits", "for", "01-double"] in table  # the check of the whole lesson
        assert "0 of 6 points." in done.stdout and "2 exercises still to be written, from 01-double on." in done.stdout
        assert "Traceback" not in done.stdout + done.stderr

    def test_a_wrong_notebook_shows_each_check_with_points_cell_and_message(self, course):
        course.solve("1", double="return x")
        done = course.tito("module", "test", "1")
        table = rows(done.stdout)
        assert done.returncode == 1
        assert ["FAIL", "0/2", "Twice", "a", "number", "01-double-test"] in table
        assert ["pass", "3/3", "The", "sum", "01-total-test"] in table
        assert "cell 4: double(4): got 4, expected 8: was the factor forgotten?" in done.stdout
        assert "3 of 6 points." in done.stdout and "tito module hint 01 double" in done.stdout

    def test_a_check_that_was_deleted_or_changed_says_so(self, course):
        path = course.solve("1")
        notebook = json.loads(path.read_text(encoding="utf-8"))
        cells = {cell["id"]: cell for cell in notebook["cells"]}
        cells["01-double-test"]["source"] = ["pass\n"]
        notebook["cells"] = [cell for cell in notebook["cells"] if cell["id"] != "01-total-test"]
        path.write_text(json.dumps(notebook), encoding="utf-8")
        done = course.tito("module", "test", "1")
        assert done.returncode == 1 and "1 of 6 points." in done.stdout
        assert "was changed" in done.stdout and "was deleted" in done.stdout and "tito module reset 01" in done.stdout

    def test_a_failure_elsewhere_in_the_notebook_is_noted(self, course):
        path = course.solve("1", double="return x")
        notebook = json.loads(path.read_text(encoding="utf-8"))
        extra = {"cell_type": "code", "id": "mine", "metadata": {}, "source": "1 / 0", "outputs": []}
        notebook["cells"].append({**extra, "execution_count": None})
        path.write_text(json.dumps(notebook), encoding="utf-8")
        assert "ZeroDivisionError" in course.tito("module", "test", "1").stdout

    def test_a_message_as_long_as_an_array_is_clipped_and_whole_in_json(self, course):
        rows_of_numbers = 'raise ValueError("\\n".join(f"row {n}" for n in range(100)))'
        course.solve("1", double=rows_of_numbers)
        done = course.tito("module", "test", "1")
        assert "row 0" in done.stdout and "row 99" in done.stdout and "row 50" not in done.stdout
        assert "lines more; `--json` has them all" in done.stdout
        assert "row 50" in json.loads(course.tito("module", "test", "1", "--json").stdout)["checks"][0]["message"]

    def test_a_right_notebook_passes_and_nothing_is_changed(self, course):
        course.solve("1")
        before = contents(course.root)
        done = course.tito("module", "test", "1")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "6 of 6 points." in done.stdout and "tito module complete 01" in done.stdout
        assert contents(course.root) == before, "test must not write to the notebook or the package"


class TestComplete:
    def test_puts_the_learners_code_into_the_package_and_says_what_comes_next(self, course):
        notebook = course.solve("1")
        before = notebook.read_bytes()
        done = course.tito("module", "complete", "1")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Lesson 01 is completed. tinytorch/core/scale.py is now yours." in done.stdout
        assert "tito module start 02" in done.stdout
        assert notebook.read_bytes() == before
        assert "tito module complete 01" in course.lesson("1").package_file.read_text(encoding="utf-8")

    def test_the_last_lesson_leads_to_the_demo(self, course):
        course.solve("4")
        assert "tito demo" in course.tito("module", "complete", "4").stdout

    def test_a_wrong_notebook_is_not_completed_and_the_package_stays(self, course):
        course.solve("1", total="return x[0]")
        before = contents(course.root)
        done = course.tito("module", "complete", "1")
        assert done.returncode == 1
        assert "Not completed: the package is as it was." in done.stdout
        assert "was only one number taken?" in done.stdout
        assert contents(course.root) == before
        assert "0 of 3 lessons completed" in course.tito("status").stdout

    def test_what_cannot_be_exported_is_said_with_its_cell(self, course):
        path = course.solve("1")
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell.get("id") == "01-total":
                cell["source"] = [line for line in cell["source"] if "#| export" not in line]
        path.write_text(json.dumps(notebook), encoding="utf-8")
        done = course.tito("module", "complete", "1")
        assert done.returncode == 1
        assert "cannot be exported" in done.stdout and "total" in done.stdout.split("cannot be exported")[1]

    def test_a_file_that_breaks_a_later_test_is_not_swapped_in(self, course):
        tests = course.root / "tests" / "01_scale" / "test_progressive_integration.py"
        text = tests.read_text(encoding="utf-8").replace("== 6", "== 7")
        tests.write_text(text, encoding="utf-8")
        course.solve("1")
        before = course.lesson("1").package_file.read_bytes()
        done = course.tito("module", "complete", "1")
        assert done.returncode == 1, done.stdout
        assert "0 of 1 test passed" in done.stdout and "does not fit with the lessons before it" in done.stdout
        assert "Not completed" in done.stdout and course.lesson("1").package_file.read_bytes() == before


class TestStatusAndReset:
    def test_status_tells_whose_each_file_is(self, course):
        course.solve("1")
        assert course.tito("module", "complete", "1").returncode == 0
        course.solve("2", shift="return x")
        course.lesson("4").package_file.unlink()
        table = rows(course.tito("status").stdout)
        assert ["01", "tinytorch/core/scale.py", "yours", "completed,", "6/6", "points"] in table
        assert ["02", "tinytorch/core/shift.py", "reference", "notebook", "begun"] in table
        assert ["04", "tinytorch/text/words.py", "missing"] in table
        assert "1 of 3 lessons completed, 6 of 10 points." in course.tito("status").stdout
        assert "02 shift" not in course.tito("module", "start", "2").stdout
        assert "01 scale (yours)" in course.tito("module", "start", "2").stdout

    def test_a_file_that_was_edited_by_hand_is_said_to_be_changed(self, course):
        course.solve("1")
        course.tito("module", "complete", "1")
        with course.lesson("1").package_file.open("a", encoding="utf-8") as stream:
            stream.write("\n# by hand\n")
        done = course.tito("status")
        assert ["01", "tinytorch/core/scale.py", "changed", "completed,", "6/6", "points"] in rows(done.stdout)
        assert "tito module complete 01" in done.stdout and "tito module reset 01" in done.stdout

    def test_reset_brings_everything_back_and_keeps_the_notebook(self, course):
        before = contents(course.root)
        course.tito("module", "list")
        solved = course.solve("1").read_bytes()
        course.tito("module", "complete", "1")
        done = course.tito("module", "reset", "1")
        assert done.returncode == 0, done.stderr
        backups = list((course.root / "modules" / "01_scale" / "backups").iterdir())
        assert len(backups) == 1 and backups[0].read_bytes() == solved
        assert backups[0].name in done.stdout
        backups[0].unlink()
        assert contents(course.root) == before
        assert "0 of 3 lessons completed" in course.tito("status").stdout

    def test_list_shows_how_far_each_lesson_is(self, course):
        course.solve("1")
        course.tito("module", "complete", "1")
        course.solve("4", count="return 0")
        table = rows(course.tito("module", "list").stdout)
        assert ["01", "scale", "Scale", "10", "6/6", "completed"] in table
        assert ["02", "shift", "Shift", "5", "3"] in table
        assert ["04", "words", "Words", "5", "1", "started"] in table


class TestDoctor:
    def test_all_is_well_in_a_good_course(self, course):
        done = course.tito("doctor", PYTHONPATH=str(course.root))
        assert done.returncode == 0, done.stdout + done.stderr
        states = {row[1]: row[0] for row in rows(done.stdout) if row[0] in ("ok", "note", "problem")}
        for subject in ("Python", "numpy", "typer", "course", "write", "disk", "progress", "package", "kernel"):
            assert states.get(subject) == "ok", f"{subject} is not ok:\n{done.stdout}"

    def test_outside_of_a_course_it_says_where_to_go(self, course, tmp_path):
        done = course.tito("doctor", cwd=tmp_path)
        assert done.returncode == 1 and "Change into the folder of the course" in done.stdout

    @pytest.mark.parametrize("subject", ["package", "progress", "course"])
    def test_each_problem_comes_with_what_to_do(self, course, subject):
        if subject == "package":
            course.lesson("2").package_file.write_text("def (:\n", encoding="utf-8")
        elif subject == "progress":
            (course.root / ".tito").mkdir()
            (course.root / ".tito" / "progress.json").write_text("[]", encoding="utf-8")
        else:
            course.lesson("2").notebook.unlink()
        done = course.tito("doctor", "--json")
        found = json.loads(done.stdout)
        assert done.returncode == 1 and found["ok"] is False
        problems = {
            finding["subject"]: finding["advice"] for finding in found["findings"] if finding["state"] == "problem"
        }
        assert list(problems) == [subject] and "`" in problems[subject] or "Mend" in problems[subject], problems

    def test_leaves_nothing_behind(self, course):
        before = contents(course.root)
        course.tito("doctor")
        assert contents(course.root) == before
