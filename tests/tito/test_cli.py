"""The command line as a student meets it: help, names of lessons, wrong input, exit codes, JSON."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tito import guard


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def expect(done, code: int):
    """The exit code, and a complaint that shows what was printed if it is another."""
    assert done.returncode == code, f"exit code {done.returncode}, expected {code}:\n{done.stdout}\n{done.stderr}"
    return done


class TestHelp:
    def test_no_command_shows_all_commands_in_a_students_order(self, course):
        done = expect(course.tito(), 0)
        shown = re.findall(r"^  (\w+)", done.stdout.split("Commands:")[1], re.M)
        assert shown == ["module", "status", "doctor", "demo", "generate", "model", "serve", "explore", "grade", "dev"]

    @pytest.mark.parametrize("group", ["module", "model", "dev"])
    def test_a_group_alone_shows_its_commands(self, course, group):
        assert "Commands:" in expect(course.tito(group), 0).stdout

    @pytest.mark.parametrize("command", ["start", "test", "complete", "reset", "hint", "list"])
    def test_every_lesson_command_explains_itself(self, course, command):
        for flag in ("--help", "-h"):
            assert f"tito module {command}" in expect(course.tito("module", command, flag), 0).stdout

    def test_no_help_line_is_cut_off(self, course):
        for arguments in ([], ["module"], ["model"], ["grade"], ["dev"]):
            assert "..." not in course.tito(*arguments).stdout.split("Commands:")[1]

    def test_version(self, course):
        assert re.fullmatch(r"tito \d+\.\d+\.\d+", expect(course.tito("--version"), 0).stdout.strip())


class TestWrongInput:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["modul"], "Did you mean 'module'"),
            (["module", "strat", "1"], "Did you mean 'start'?"),
            (["module", "start"], "Missing argument 'LESSON'"),
            (["module", "list", "--jsn"], "--json"),
            (["generate", "x", "--top-k", "0"], "--top-k"),
        ],
    )
    def test_a_wrong_command_line_is_explained(self, course, arguments, words):
        done = expect(course.tito(*arguments), 2)
        assert done.stdout == "" and words in done.stderr and "--help" in done.stderr, done.stderr

    @pytest.mark.parametrize("command", ["start", "test", "complete", "reset", "hint"])
    def test_an_unknown_lesson_suggests_the_nearest(self, course, command):
        done = expect(course.tito("module", command, "scael"), 1)
        assert "There is no lesson 'scael'. Did you mean 'scale'?" in done.stderr and done.stdout == ""

    def test_a_number_that_the_course_leaves_out(self, course):
        assert "There is no lesson '3'" in expect(course.tito("module", "start", "3"), 1).stderr

    def test_an_unknown_exercise_suggests_the_nearest_and_lists_all(self, course):
        done = expect(course.tito("module", "hint", "1", "duoble"), 1)
        assert "Did you mean 'double'?" in done.stderr and "double, total" in done.stderr

    @pytest.mark.parametrize("name", ["1", "01", "scale", "01_scale", "SCALE"])
    def test_a_lesson_has_several_names(self, course, name):
        assert "Lesson 01: Scale" in expect(course.tito("module", "start", name), 0).stdout

    def test_outside_of_a_course(self, course, tmp_path):
        for arguments in (["status"], ["module", "list"], ["module", "test", "1"]):
            done = expect(course.tito(*arguments, cwd=tmp_path), 1)
            assert "No course here" in done.stderr and "Change into the folder" in done.stderr

    def test_from_a_folder_inside_the_course(self, course):
        assert "Mini" in expect(course.tito("status", cwd=course.root / "modules" / "01_scale"), 0).stdout

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("{ not json", "is not valid JSON"),
            ("[1, 2]", "not a notebook"),
            ('{"nbformat": 3, "worksheets": []}', "old notebook format 3"),
            (None, "There is no notebook"),
        ],
    )
    @pytest.mark.parametrize("command", ["start", "test", "complete"])
    def test_a_damaged_notebook_is_said_in_words(self, course, command, text, words):
        path = course.lesson("1").notebook
        path.unlink() if text is None else path.write_text(text, encoding="utf-8")
        done = expect(course.tito("module", command, "1"), 1)
        assert words in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
        assert not path.exists() if text is None else path.read_text(encoding="utf-8") == text

    def test_a_damaged_progress_file_is_not_overwritten(self, course):
        path = course.root / ".tito" / "progress.json"
        path.parent.mkdir()
        path.write_text("{", encoding="utf-8")
        for arguments in (["status"], ["module", "list"], ["module", "hint", "1", "double"]):
            assert "progress.json cannot be read" in expect(course.tito(*arguments), 1).stderr
        assert path.read_text(encoding="utf-8") == "{"

    def test_what_the_system_refuses_is_said_with_its_path(self, course):
        (course.root / ".tito").write_text("a file where tito keeps its folder", encoding="utf-8")
        done = expect(course.tito("module", "list"), 1)
        assert ".tito" in done.stderr and "tito doctor" in done.stderr and "Traceback" not in done.stderr

    @pytest.mark.parametrize("command", ["build", "verify"])
    def test_a_maintainers_command_needs_the_sources(self, course, command):
        done = expect(course.tito("dev", command), 1)
        assert "No src/course.toml" in done.stderr and "maintainers' repository" in done.stderr

    def test_an_error_of_ours_is_one_clear_line(self, course, tmp_path):
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / "sitecustomize.py").write_text(
            "import tito.course.manifest as m\ndef load(*_): raise RuntimeError('no course today')\nm.load = load\n",
            encoding="utf-8",
        )
        done = expect(course.tito("status", PYTHONPATH=str(broken)), 70)
        assert "RuntimeError: no course today" in done.stderr and "TITO_DEBUG=1" in done.stderr
        assert "Traceback" not in done.stderr
        assert "Traceback" in course.tito("status", PYTHONPATH=str(broken), TITO_DEBUG="1").stderr


class TestJson:
    def test_list_and_status_agree(self, course):
        lessons = json.loads(expect(course.tito("module", "list", "--json"), 0).stdout)["lessons"]
        status = json.loads(expect(course.tito("status", "--json"), 0).stdout)
        assert [lesson["number"] for lesson in lessons] == ["01", "02", "04"]
        assert status["files"] == lessons
        assert status["totals"] == {"completed": 0, "lessons": 3, "earned": 0, "points": 10}

    def test_a_mistake_is_json_too(self, course):
        done = expect(course.tito("module", "test", "scael", "--json"), 1)
        assert "Did you mean" in json.loads(done.stdout)["error"] and done.stderr == ""

    def test_test_and_complete(self, course):
        course.solve("1", double="return x")
        done = expect(course.tito("module", "test", "1", "--json"), 1)
        result = json.loads(done.stdout)
        assert result["passed"] is False and result["earned"] == 3 and result["points"] == 6
        first = result["checks"][0]
        assert first["id"] == "01-double-test" and first["passed"] is False and "was the factor" in first["message"]
        course.solve("1")
        result = json.loads(expect(course.tito("module", "complete", "1", "--json"), 0).stdout)
        assert result["passed"] is True and result["earned"] == 6 and result["next"] == "02"
        assert result["tests"] == {"passed": 1, "failed": [], "problem": None}
        assert "tinytorch/core/scale.py" in result["changed"]

    def test_every_document_is_ascii(self, course):
        for arguments in (["module", "list"], ["status"], ["module", "hint", "4"]):
            assert course.tito(*arguments, "--json").stdout.isascii()


def test_a_reader_that_leaves_early_is_no_error(course):
    if shutil.which("head") is None:
        pytest.skip("needs head")
    command = f'"{sys.executable}" -m tito module list | head -n 1'
    done = subprocess.run(command, shell=True, cwd=course.root, capture_output=True, encoding="utf-8", timeout=60)
    assert done.stdout.startswith("Mini") and done.stderr == ""


def test_files_that_could_not_be_copied_are_one_sentence(course, monkeypatch, capsys):
    """shutil.copytree collects all its errors in one list; where the disk is full that is every file."""
    why = "[Errno 28] No space left on device: '/from/{0}' -> '/to/{0}'"
    failed = [(f"/from/{name}", f"/to/{name}", why.format(name)) for name in ("one.py", "two.py")]

    def full_disk(*arguments, **options):
        raise shutil.Error(failed)

    assert guard.run(full_disk, ["status"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("tito: /to/one.py: [Errno 28] No space left on device.") and "two.py" not in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [("status", 1, "No space left"), ("status --json", 1, "No space left"), ("status --json --bad", 2, "option")],
)
def test_a_full_disk_behind_stdout_is_one_sentence(arguments, code, words, unbuffered, course):
    """A document on an error cannot go where documents fail: then words on stderr are left."""
    command = [sys.executable, "-m", "tito", *arguments.split()]
    given = {"cwd": course.root, "env": {**os.environ, "PYTHONUNBUFFERED": unbuffered}, "timeout": 60, "text": True}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, **given)
    assert done.returncode == code and words in done.stderr
    assert done.stderr.startswith("tito: ") and "Traceback" not in done.stderr and "ignored" not in done.stderr
