"""What a terminal gets: colour only where it is wanted, characters that it can carry, lines that fit it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest

ESCAPE = "\x1b["
COMMANDS = [["--help"], ["module", "list"], ["status"], ["module", "start", "4"], ["module", "hint", "4"], ["modul"]]


@pytest.fixture
def in_a_terminal(course, read_terminal):
    """Run tito in a pseudo terminal; returns exit code and what was on screen, with its escape codes."""
    pty, fcntl = pytest.importorskip("pty"), pytest.importorskip("fcntl")
    import struct
    import termios

    def run(*arguments: str, columns: int = 80, **environment: str) -> tuple[int, str]:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        unwanted = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "CI", "TITO_DEBUG")
        kept = {name: value for name, value in os.environ.items() if name not in unwanted}
        env = {**kept, "TERM": "xterm", "PYTHONIOENCODING": "utf-8", **environment}
        command = [sys.executable, "-m", "tito", *arguments]
        process = subprocess.Popen(command, cwd=course.root, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        seen = read_terminal(ours)
        return process.wait(60), seen.decode(environment.get("PYTHONIOENCODING", "utf-8"))

    return run


def plain(text: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "").splitlines()


class TestColour:
    def test_on_a_terminal_there_is_some(self, in_a_terminal):
        assert ESCAPE in in_a_terminal("status")[1]

    def test_no_color_means_no_colour(self, in_a_terminal):
        code, text = in_a_terminal("status", NO_COLOR="1")
        assert code == 0 and not re.search(r"\x1b\[[0-9;]*3[0-7]m", text), repr(text)

    @pytest.mark.parametrize("arguments", COMMANDS)
    def test_in_a_pipe_there_is_none(self, course, arguments):
        done = course.tito(*arguments)
        assert ESCAPE not in done.stdout + done.stderr

    def test_nor_does_one_come_from_a_learners_message(self, course):
        said = 'chr(27) + "[31mred" + chr(27) + "[0m" + chr(0x9b) + " and [bold]markup[/bold]"'
        course.solve("4", count=f"raise ValueError({said})")
        done = course.tito("module", "test", "4")
        assert "red and [bold]markup[/bold]" in done.stdout and not re.search("[\x1b\x9b]", done.stdout)

    def test_what_is_running_is_not_said_in_a_pipe(self, course):
        done = course.tito("module", "test", "4")
        assert ESCAPE not in done.stdout and "fresh kernel" not in done.stdout and done.stderr == ""


class TestCharacters:
    @pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "cp437"])
    @pytest.mark.parametrize("arguments", COMMANDS)
    def test_every_encoding_can_carry_the_output(self, course, encoding, arguments):
        done = course.tito(*arguments, PYTHONIOENCODING=encoding)
        assert done.returncode == (2 if arguments == ["modul"] else 0), done.stderr
        said = re.sub(r"Did you mean .*\?", "", done.stderr)
        assert "Traceback" not in said and "?" not in done.stdout + said

    def test_an_arrow_is_spelled_where_the_console_has_none(self, course):
        assert "Text, counted → a table." in course.tito("module", "start", "4").stdout
        assert "Text, counted -> a table." in course.tito("module", "start", "4", PYTHONIOENCODING="cp1252").stdout

    def test_a_checks_own_message_may_hold_anything(self, course):
        course.solve("4", count="return 0")
        done = course.tito("module", "test", "4", PYTHONIOENCODING="cp1252")
        assert done.returncode == 1 and "blanks -> words?" in done.stdout

    def test_columns_stay_aligned_where_a_character_is_spelled(self, course):
        out = course.tito("module", "list", PYTHONIOENCODING="ascii").stdout
        table = [line for line in out.splitlines() if line.startswith("  ")]
        starts = {line.index(name) for line, name in zip(table[1:], ("scale", "shift", "words"), strict=True)}
        assert len(starts) == 1, out


class TestWidth:
    def test_on_a_terminal_no_line_is_longer_than_it(self, course, in_a_terminal):
        course.solve("1", double="return x")
        for arguments in (["module", "start", "1", "--no-open"], ["status"], ["module", "test", "1"]):
            for line in plain(in_a_terminal(*arguments, columns=60)[1]):
                words = line.split()
                assert len(line) <= 60 or len(words) <= 2 or "/" in line, f"{len(line)} columns: {line}"

    def test_in_a_pipe_a_path_stays_whole(self, course):
        assert str(course.lesson("1").notebook) in course.tito("module", "start", "1", COLUMNS="40").stdout


class TestInterrupt:
    @pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to a process group")
    def test_ctrl_c_ends_in_one_line_and_leaves_nothing(self, course):
        course.solve("1", double="while True: pass")
        before = course.lesson("1").package_file.read_bytes()
        process = subprocess.Popen(
            [sys.executable, "-m", "tito", "module", "complete", "1"], cwd=course.root, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        )  # fmt: skip
        scratch = course.root / ".tito"
        deadline = time.monotonic() + 30
        while not list(scratch.glob("scratch-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        for _ in range(3):  # Python itself swallows a Ctrl-C that meets certain moments, and a person repeats it
            os.killpg(process.pid, signal.SIGINT)
            try:
                out, err = process.communicate(timeout=20)
                break
            except subprocess.TimeoutExpired:
                continue
        assert process.returncode == 130 and out == "" and err.strip() == "tito: stopped."
        assert not list(scratch.glob("scratch-*")) and course.lesson("1").package_file.read_bytes() == before
