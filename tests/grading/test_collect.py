"""`tito grade collect`: every form of submissions, every accident and attack in them; nbgrader is the oracle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

pytest.importorskip("nbgrader", reason="nbgrader is not installed: pip install -e '.[grade]'")

from tito.course.errors import CourseError
from tito.instructor import assignment as assignments
from tito.instructor import init
from tito.instructor.assignment import Assignment, AssignmentCell
from tito.instructor.collect import collect
from tito.instructor.course import GradingCourse
from tito.instructor.intake import archive, git, people, repository, store, times, tree
from tito.instructor.intake.model import MOST_BYTES, MOST_FILES, Refusal
from tito.instructor.nbgrader_setup import open_gradebook
from tito.instructor.students import Student

NAME, WANTED = "17_memoization", "memoization.ipynb"
STUDENTS = [
    Student("alice", "Alice", "Doe", "alice@example.org"),
    Student("bob", "Bob", "van Brown", "bob@example.org"),
    Student("carol", "Carol", "Čapek", "carol@example.org"),
    Student("4711", "Sam", "Smith", "sam1@example.org"),
    Student("sam2", "Sam", "Smith", "sam2@example.org"),
]
needs_git = pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
posix = pytest.mark.skipif(os.name != "posix", reason="links and FIFOs as POSIX has them")


def notebook(answer: str = "1", lesson: str | None = "17", grade_id: str = "17-rows") -> bytes:
    """A notebook of one hole."""
    metadata = {"tinytorch": {"lesson": lesson}} if lesson else {}
    hole = {"grade_id": grade_id, "solution": True, "grade": False, "locked": False, "schema_version": 3, "task": False}
    cell = {"cell_type": "code", "id": "a", "metadata": {"nbgrader": hole}, "source": f"answer = {answer}"}
    cell |= {"outputs": [], "execution_count": None}
    return json.dumps({"cells": [cell], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}).encode()


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A course with five students and one released lesson."""
    root = tmp_path_factory.mktemp("template") / "course"
    init.make(root, STUDENTS, "tinytorch")
    hole = AssignmentCell("a", "code", "hole", "", "", {"nbgrader": {"grade_id": "17-rows", "solution": True}})
    lesson = Assignment(NAME, "memoization", "17", "Memoization", "tinytorch.x", (hole,), {}, {}, {}, {})
    assignments.save(GradingCourse(root), lesson)
    with open_gradebook(GradingCourse(root)) as gradebook:
        gradebook.add_assignment(NAME)
        gradebook.add_notebook("memoization", NAME)
    return root


@pytest.fixture
def course(template, tmp_path) -> GradingCourse:
    root = tmp_path / "course"
    shutil.copytree(template, root)
    return GradingCourse(root)


@pytest.fixture
def lesson(course) -> Assignment:
    return assignments.load(course, "17")


@pytest.fixture
def brought(course, capsys):
    """Collects and returns the exit code and, per student, the state and the whole line of the table."""

    def run(source, form="auto", due=None):
        code = collect(course, "17", source, form, due)
        lines = capsys.readouterr().out.splitlines()
        states = {"taken", "replaced", "unchanged", "older", "refused"}
        rows = {}
        for line in lines[1:]:
            found = next((word for word in line.split() if word in states), None)
            if line.startswith("  ") and found:
                rows[line[: line.index(f"  {found}")].strip()] = (found, line)
        return code, {name: state for name, (state, _) in rows.items()}, "\n".join(lines)

    return run


def collected(course: GradingCourse, student: str) -> bytes | None:
    path = course.submitted(student, NAME) / WANTED
    return path.read_bytes() if path.exists() else None


def tree_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes, links as their target."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def write(path: Path, data: bytes, when: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    if when:
        seconds = datetime.fromisoformat(when).replace(tzinfo=UTC).timestamp()
        os.utime(path, (seconds, seconds))
    return path


def zipped(path: Path, files: dict[str, bytes], when=(2025, 11, 20, 12, 0, 0)) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name, data in files.items():
            info = zipfile.ZipInfo(name, when)
            info.compress_type = zipfile.ZIP_DEFLATED
            made.writestr(info, data)
    return path


# ---- the forms


class TestFolder:
    @pytest.mark.parametrize(
        "place",
        [
            "alice/memoization.ipynb", "alice/17_memoization/memoization.ipynb", "alice.ipynb",
            "alice_memoization.ipynb", "memoization_alice.ipynb", "alice/modules/17_memoization/memoization.ipynb",
            "alice/homework/memoization.ipynb",
        ],
    )  # fmt: skip
    def test_every_place(self, place, course, brought, tmp_path):
        write(tmp_path / "in" / place, notebook())
        assert brought(tmp_path / "in")[:2] == (0, {"alice": "taken"})
        assert collected(course, "alice") == notebook()
        assert sorted(os.listdir(course.submitted("alice", NAME))) == [WANTED, "timestamp.txt"]

    def test_a_zip_of_a_folder_of_folders(self, course, brought, tmp_path):
        source = zipped(tmp_path / "in.zip", {
            "class/alice/memoization.ipynb": notebook("1"), "class/bob/17_memoization/memoization.ipynb": notebook("2"),
            "__MACOSX/class/alice/._memoization.ipynb": b"junk", "class/.DS_Store": b"junk",
        })  # fmt: skip
        assert brought(source)[:2] == (0, {"alice": "taken", "bob": "taken"})
        assert collected(course, "bob") == notebook("2")

    def test_other_lessons_and_checkpoints_are_not_looked_at(self, course, brought, tmp_path):
        own = tmp_path / "in" / "alice"
        write(own / "17_memoization" / WANTED, notebook("1"))
        write(own / "17_memoization" / ".ipynb_checkpoints" / WANTED, notebook("old"))
        write(own / "12_attention" / "attention.ipynb", notebook("3", "12", "12-x"))
        write(tmp_path / "in" / "notes.txt", b"not a submission")
        assert brought(tmp_path / "in")[:2] == (0, {"alice": "taken"})
        assert collected(course, "alice") == notebook("1")

    def test_the_time_is_that_of_timestamp_txt_else_the_files(self, course, brought, tmp_path):
        write(tmp_path / "in/alice" / WANTED, notebook(), "2025-11-20 10:00")
        write(tmp_path / "in/alice/timestamp.txt", b"2025-11-19 11:00:00.123456 CET\n")
        write(tmp_path / "in/bob" / WANTED, notebook(), "2025-11-20 10:00")
        write(tmp_path / "in/carol" / WANTED, notebook(), "2025-11-20 10:00")
        write(tmp_path / "in/carol/timestamp.txt", b"\xff not a time; 9999999999999")
        assert brought(tmp_path / "in")[0] == 0
        stamps = {s: (course.submitted(s, NAME) / "timestamp.txt").read_text() for s in ("alice", "bob", "carol")}
        assert stamps == {
            "alice": "2025-11-19 10:00:00 UTC", "bob": "2025-11-20 10:00:00 UTC", "carol": "2025-11-20 10:00:00 UTC",
        }  # fmt: skip

    def test_the_courses_own_submitted_folder_changes_nothing(self, course, brought, tmp_path):
        write(tmp_path / "in/alice" / WANTED, notebook())
        brought(tmp_path / "in")
        before = tree_of(course.root)
        assert brought(course.root / "submitted")[:2] == (0, {"alice": "unchanged"})
        assert tree_of(course.root) == before


class TestCanvas:
    def test_who_and_when(self, course, brought, tmp_path):
        source = zipped(tmp_path / "submissions.zip", {
            "doealice_101_9001_memoization.ipynb": notebook("1"),
            "vanbrownbob_LATE_102_9002_memoization-2.ipynb": notebook("2"),
            "capekcarol_103_9003_My Work (1).ipynb": notebook("3"),
            "smithsam_4711_9004_memoization.ipynb": notebook("4"),
        })  # fmt: skip
        code, states, out = brought(source, due="2025-11-10 12:00 UTC")
        assert (code, states) == (0, dict.fromkeys(["alice", "bob", "carol", "4711"], "taken"))
        assert collected(course, "4711") == notebook("4")  # by Canvas' number, where the name fits two
        late = [line.split()[0] for line in out.splitlines() if line.startswith("  ") and " d" in line]
        assert late == ["bob"], out  # the others are on time by Canvas, though downloaded after the due time
        assert "was called capekcarol_103_9003_My Work (1).ipynb" in out

    def test_ambiguous_and_unknown_names_are_not_guessed(self, course, brought, tmp_path):
        source = zipped(tmp_path / "s.zip", {
            "smithsam_201_1_memoization.ipynb": notebook(), "zedzoe_202_2_memoization.ipynb": notebook(),
            "doealice_203_3_memoization.ipynb": notebook("1"), "doealice_204_4_memoization.ipynb": notebook("2"),
        })  # fmt: skip
        code, states, out = brought(source)
        assert code == 1 and set(states.values()) == {"refused"} and len(states) == 4
        assert "several students: 4711, sam2" in out and "not in the roster: 'zedzoe'" in out
        assert "2 submissions fit alice" in out and not list((course.root / "submitted").iterdir())

    def test_the_last_upload_counts(self, course, brought, tmp_path):
        source = zipped(tmp_path / "s.zip", {
            "doealice_1_9_memoization.ipynb": notebook("1"), "doealice_1_9_memoization-10.ipynb": notebook("10"),
            "doealice_1_9_memoization-9.ipynb": notebook("9"),
        })  # fmt: skip
        assert brought(source)[:2] == (0, {"alice": "taken"})
        assert collected(course, "alice") == notebook("10")

    def test_unpacked_and_forced(self, course, brought, tmp_path):
        write(tmp_path / "in/doealice_1_9_memoization.ipynb", notebook())
        write(tmp_path / "in/hello.ipynb", notebook())
        code, states, out = brought(tmp_path / "in", "canvas")
        assert code == 1 and states == {"alice": "taken", "hello.ipynb": "refused"}
        assert "not named as Canvas names" in out


class TestMoodle:
    def test_folders_and_flat(self, course, brought, tmp_path):
        source = zipped(tmp_path / "s.zip", {
            "Alice Doe_1234_assignsubmission_file_/memoization.ipynb": notebook("1"),
            "Alice Doe_1234_assignsubmission_onlinetext_/onlinetext.html": b"<p>done</p>",
            "Čapek Carol_1235_assignsubmission_file/deep/memoization.ipynb": notebook("2"),
            "Bob van Brown_1236_assignsubmission_file_memoization.ipynb": notebook("3"),
            "Zoe Zed_1237_assignsubmission_file_/memoization.ipynb": notebook("4"),
            "Sam Smith_4711_assignsubmission_file_/memoization.ipynb": notebook("5"),
            "Sam Smith_1239_assignsubmission_file_/memoization.ipynb": notebook("6"),
        })  # fmt: skip
        code, states, out = brought(source)
        taken = {student for student, state in states.items() if state == "taken"}
        assert code == 1 and taken == {"alice", "bob", "carol", "4711"}
        assert collected(course, "carol") == notebook("2") and collected(course, "4711") == notebook("5")
        assert "several students: 4711, sam2" in out and "'Zoe Zed'" in out

    def test_an_empty_folder_is_reported(self, brought, tmp_path):
        (tmp_path / "in/Alice Doe_1_assignsubmission_file_").mkdir(parents=True)
        code, states, out = brought(tmp_path / "in")
        assert code == 1 and states == {"alice": "refused"} and "no notebook" in out


METADATA = """---
submission_5678:
  :submitters:
  - :name: Alice Doe
    :email: other@example.org
    :sid: 'alice'
  - :name: Bob van Brown
    :email: BOB@example.org
    :sid: '00123'
  :created_at: 2025-11-20 12:00:00.142817123 Z
  :results: !ruby/object:Gradescope::Thing
    score: 1
submission_5679:
  :submitters:
  - :name: Sam Smith
    :sid: 4711
  :created_at: 2025-11-20 13:30:00 +0100
submission_5680:
  :submitters:
  - :name: Zoe Zed
    :email: zoe@example.org
"""


class TestGradescope:
    def files(self, metadata: str = METADATA) -> dict[str, bytes]:
        top = "assignment_1234_export"
        return {
            f"{top}/submission_metadata.yml": metadata.encode(),
            f"{top}/submission_5678/memoization.ipynb": notebook("1"),
            f"{top}/submission_5679/memoization.ipynb": notebook("2"),
            f"{top}/submission_5680/memoization.ipynb": notebook("3"),
            f"{top}/submission_9999/memoization.ipynb": notebook("4"),
        }

    def test_who_and_when(self, course, brought, tmp_path):
        code, states, out = brought(zipped(tmp_path / "s.zip", self.files()))
        taken = {student for student, state in states.items() if state == "taken"}
        assert code == 1 and taken == {"alice", "bob", "4711"} and len(states) == 5
        assert collected(course, "alice") == collected(course, "bob") == notebook("1")  # a group
        stamps = [(course.submitted(s, NAME) / "timestamp.txt").read_text() for s in ("alice", "4711")]
        assert stamps == ["2025-11-20 12:00:00 UTC", "2025-11-20 12:30:00 UTC"]
        assert "zoe@example.org" in out and "names nobody" in out

    @pytest.mark.parametrize(
        "metadata",
        ["- a", "a: [", "\x00", "[a]: b", "", "? {}\n", "a: *b", "submission_1: &a [*a]",
         f"submission_1: {'[' * 200_000}{']' * 200_000}", f"submission_1: {'{a: ' * 200_000}"],
    )  # fmt: skip
    def test_a_broken_list_is_words(self, metadata, course, tmp_path):
        source = zipped(tmp_path / "s.zip", self.files(metadata))
        with pytest.raises(CourseError, match="submission_metadata.yml"):
            collect(course, "17", source, "auto", None)

    @pytest.mark.parametrize(
        "entry", ["1", "[1, 2]", "{':submitters': 3}", "{':submitters': [1, {}, {':sid': [alice]}]}"]
    )
    def test_a_strange_entry_is_refused(self, entry, brought, tmp_path):
        code, states, _ = brought(zipped(tmp_path / "s.zip", self.files(f"submission_5678: {entry}")))
        assert code == 1 and states and set(states.values()) == {"refused"}

    def test_tags_do_nothing(self, brought, tmp_path):
        trap = f"!!python/object/apply:os.system ['touch {tmp_path}/owned']"
        entry = f"submission_5678: {{':submitters': [{{':sid': alice}}], x: {trap}}}"
        assert brought(zipped(tmp_path / "s.zip", self.files(entry)))[1]["alice"] == "taken"
        assert not (tmp_path / "owned").exists()


@needs_git
class TestGit:
    ENV = {
        "GIT_AUTHOR_NAME": "A", "GIT_AUTHOR_EMAIL": "a@example.org", "GIT_COMMITTER_NAME": "A",
        "GIT_COMMITTER_EMAIL": "a@example.org", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_AUTHOR_DATE": "2025-11-20T12:00:00+01:00", "GIT_COMMITTER_DATE": "2025-11-20T12:00:00+01:00",
    }  # fmt: skip

    def git(self, *arguments, cwd=None):
        subprocess.run(["git", *arguments], cwd=cwd, check=True, capture_output=True, env={**os.environ, **self.ENV})

    def repository(self, path: Path, files: dict[str, bytes]) -> Path:
        self.git("init", "-q", "-b", "main", str(path))
        for name, data in files.items():
            write(path / name, data)
        self.git("add", "-A", cwd=path)
        self.git("commit", "-q", "-m", "work", cwd=path)
        return path

    def test_newest_commit_of_every_kind_of_repository(self, course, brought, tmp_path):
        place = f"modules/{NAME}/{WANTED}"
        alice = self.repository(tmp_path / "in/alice", {place: notebook("1"), f"old/{WANTED}": notebook("0")})
        write(alice / place, notebook("not committed"))
        bob = self.repository(tmp_path / "bob", {f"somewhere/{WANTED}": notebook("2")})
        self.git("clone", "-q", "--bare", str(bob), str(tmp_path / "in/bob.git"))
        carol = self.repository(tmp_path / "in/carol", {place: notebook("3")})
        self.git("pack-refs", "--all", cwd=carol)
        self.git("gc", "-q", cwd=carol)
        (tmp_path / "in/4711").mkdir()
        self.git("init", "-q", cwd=tmp_path / "in/4711")
        code, states, out = brought(tmp_path / "in")
        assert "from git" in out
        assert (code, states) == (1, {"alice": "taken", "bob": "taken", "carol": "taken", "4711": "refused"})
        assert [collected(course, s) for s in ("alice", "bob", "carol")] == [notebook(n) for n in "123"]
        assert (course.submitted("alice", NAME) / "timestamp.txt").read_text() == "2025-11-20 11:00:00 UTC"
        assert "no commit" in out

    def test_two_of_the_name_or_none_are_refused(self, brought, tmp_path):
        self.repository(tmp_path / "in/alice", {f"a/{WANTED}": notebook("1"), f"b/{WANTED}": notebook("2")})
        self.repository(tmp_path / "in/bob", {"readme.md": b"hello"})
        code, states, out = brought(tmp_path / "in", "git")
        assert code == 1 and states == {"alice": "refused", "bob": "refused"}
        assert f"2 notebooks called {WANTED}: a/{WANTED}, b/{WANTED}" in out and "no notebook" in out

    def test_nothing_of_the_repository_is_run(self, course, brought, tmp_path):
        alice = self.repository(tmp_path / "in/alice", {f"modules/{NAME}/{WANTED}": notebook("1")})
        trap = f"touch '{tmp_path / 'owned'}'"
        config = f'[core]\n\tfsmonitor = "{trap}"\n\tpager = "{trap}"\n\tsshCommand = "{trap}"\n\thooksPath = hooks\n'
        config += f'[filter "x"]\n\tsmudge = "{trap}"\n\tclean = "{trap}"\n[diff "x"]\n\ttextconv = "{trap}"\n'
        config += f'[alias]\n\tcat-file = "!{trap}"\n\tls-tree = "!{trap}"\n[include]\n\tpath = {tmp_path}/more\n'
        config += f'[remote "o"]\n\turl = "ext::sh -c {trap}"\n\tpromisor = true\n[extensions]\n\tpartialClone = o\n'
        config += "[core]\n\trepositoryFormatVersion = 1\n[extensions]\n\tunheardOf = true\n"  # who reads it, stops
        (alice / ".git/config").write_text(config)
        write(alice / ".git/info/attributes", b"*.ipynb filter=x diff=x\n")
        for hook in ("post-checkout", "reference-transaction", "post-index-change", "pre-auto-gc"):
            write(alice / ".git/hooks" / hook, f"#!/bin/sh\n{trap}\n".encode()).chmod(0o755)
        before = tree_of(alice)
        assert brought(tmp_path / "in")[:2] == (0, {"alice": "taken"})
        assert collected(course, "alice") == notebook("1")
        assert not (tmp_path / "owned").exists() and tree_of(alice) == before

    @posix
    def test_a_repository_that_leads_to_another_students_is_refused(self, course, brought, tmp_path):
        place = f"modules/{NAME}/{WANTED}"
        bob = self.repository(tmp_path / "in/bob", {place: notebook("2")})
        head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=bob, text=True).strip()
        for student in ("alice", "carol", "4711"):
            self.repository(tmp_path / "in" / student, {"x": b"x"})
        alice, carol, sam = (tmp_path / "in" / student / ".git" for student in ("alice", "carol", "4711"))
        write(alice / "refs/heads/main", f"{head}\n".encode())
        write(alice / "objects/info/alternates", b"../../../bob/.git/objects\n")
        shutil.rmtree(carol)
        carol.symlink_to("../bob/.git")
        shutil.rmtree(sam)
        sam.write_text("gitdir: ../bob/.git\n")
        (tmp_path / "in/sam2").symlink_to("bob")
        code, states, out = brought(tmp_path / "in")
        assert code == 1 and states == {"bob": "taken"} | dict.fromkeys(["alice", "carol", "4711", "sam2"], "refused")
        assert "borrows objects" in out

    @posix
    @pytest.mark.parametrize("damage", ["link", "fifo", "head", "ref", "object", "commit"])
    def test_a_damaged_repository_is_refused_and_the_rest_goes_on(self, damage, brought, tmp_path):
        self.repository(tmp_path / "in/bob", {WANTED: notebook("2")})
        own = self.repository(tmp_path / "in/alice", {WANTED: notebook("1")}) / ".git"
        main = own / "refs/heads/main"
        if damage == "link":
            main.unlink()
            main.symlink_to("../../../../bob/.git/refs/heads/main")
        elif damage == "fifo":
            (own / "HEAD").unlink()
            os.mkfifo(own / "HEAD")
        elif damage == "head":
            (own / "HEAD").write_text("ref: refs/heads/../../../../bob/.git/refs/heads/main")
        elif damage == "ref":
            main.write_text("--upload-pack=touch\n")
        elif damage == "object":
            for path in (own / "objects").glob("??/*"):
                path.chmod(0o644)
                path.write_bytes(b"junk")
        else:
            main.write_text("0" * 40 + "\n")
        assert brought(tmp_path / "in")[:2] == (1, {"alice": "refused", "bob": "taken"})

    def test_a_link_and_a_large_file_in_a_commit(self, brought, tmp_path, monkeypatch):
        monkeypatch.setattr(git, "MOST_BYTES", 100_000)
        self.repository(tmp_path / "in/alice", {WANTED: b" " * 100_001})
        bob = self.repository(tmp_path / "in/bob", {"x": b"x"})
        (bob / WANTED).symlink_to("x")
        self.git("add", "-A", cwd=bob)
        self.git("commit", "-q", "-m", "link", cwd=bob)
        code, states, out = brought(tmp_path / "in")
        assert code == 1 and set(states.values()) == {"refused"}
        assert "is a link" in out and "is larger than" in out

    def test_an_answer_longer_than_its_bound_is_cut_off(self, tmp_path):
        own = self.repository(tmp_path / "alice", {"big": b"x" * 300_000}) / ".git"
        (tmp_path / "private").mkdir()
        with pytest.raises(Refusal, match="longer"):
            blob = ["cat-file", "blob", "HEAD:big".replace("HEAD", repository.newest_commit(own))]
            repository.ask(own / "objects", tmp_path / "private", "sha1", blob, 100_000)
        assert (tmp_path / "private/answer").stat().st_size <= 100_001


@pytest.mark.skipif(sys.platform == "win32", reason="nbgrader's exchange is not for Windows")
class TestExchange:
    """nbgrader's own release and submit make what is collected."""

    @pytest.fixture
    def exchange(self, course, tmp_path) -> Path:
        root = tmp_path / "exchange"
        (root / "tinytorch/outbound" / NAME).mkdir(parents=True)
        write(root / "tinytorch/outbound" / NAME / WANTED, notebook())
        (root / "tinytorch/inbound").mkdir()
        with open(course.config, "a", encoding="utf-8") as file:
            file.write(f"\nc.Exchange.root = {str(root)!r}\n")
        return root

    def submit(self, course, exchange: Path, student: str, data: bytes) -> Path:
        from nbgrader.auth import Authenticator
        from nbgrader.coursedir import CourseDirectory
        from nbgrader.exchange import ExchangeFactory
        from traitlets.config import Config

        home = exchange.parent / "home" / student
        write(home / NAME / WANTED, data)
        config = Config()
        config.Exchange.root, config.Exchange.cache = str(exchange), str(home / "cache")
        config.Exchange.assignment_dir = str(home)
        config.CourseDirectory.course_id, config.CourseDirectory.assignment_id = "tinytorch", NAME
        config.CourseDirectory.student_id, config.CourseDirectory.root = student, str(home)
        before = set((exchange / "tinytorch/inbound").iterdir())
        ExchangeFactory(config=config).Submit(
            coursedir=CourseDirectory(config=config), authenticator=Authenticator(config=config), config=config
        ).start()
        (new,) = set((exchange / "tinytorch/inbound").iterdir()) - before
        return new

    def test_the_newest_of_each_student(self, course, exchange, brought):
        self.submit(course, exchange, "alice", notebook("1"))
        newest = self.submit(course, exchange, "alice", notebook("2"))
        self.submit(course, exchange, "bob", notebook("3"))
        code, states, out = brought(None)
        assert (code, states) == (0, {"alice": "taken", "bob": "taken"}) and "from exchange" in out
        assert collected(course, "alice") == notebook("2") and collected(course, "bob") == notebook("3")
        given = (newest / "timestamp.txt").read_text().partition(".")[0]
        assert (course.submitted("alice", NAME) / "timestamp.txt").read_text() == f"{given} UTC"
        assert "its folder belongs to" in out  # these were all made by one user of this machine
        assert brought(None)[:2] == (0, {"alice": "unchanged", "bob": "unchanged"})

    def test_links_and_strange_names_in_it(self, course, exchange, brought, tmp_path):
        inbound = exchange / "tinytorch/inbound"
        secret = write(tmp_path / "secret/memoization.ipynb", notebook("secret"))
        own = self.submit(course, exchange, "alice", notebook("1"))
        (own / WANTED).unlink()
        (own / WANTED).symlink_to(secret)
        (inbound / f"bob+{NAME}+2025-11-20 10:00:00 UTC").symlink_to(secret.parent)
        (inbound / f"carol+{NAME}+2025-11-20 10:00:00 UTC").symlink_to(tmp_path / "nowhere")
        (inbound / f"4711+{NAME}+gibberish").mkdir()
        self.submit(course, exchange, "sam2", notebook("5"))
        code, states, _ = brought(None)
        assert code == 1 and states.pop("sam2") == "taken"
        assert len(states) == 4 and set(states.values()) == {"refused"}
        assert not any(b"secret" in data for data in tree_of(course.root / "submitted").values())

    @pytest.mark.parametrize("what", ["no root", "no inbound"])
    def test_an_exchange_that_is_not_there_is_words(self, what, course, exchange):
        shutil.rmtree(exchange if what == "no root" else exchange / "tinytorch/inbound")
        with pytest.raises(CourseError, match="exchange") as error:
            collect(course, "17", None, "exchange", None)
        assert str(exchange) in error.value.message and "c.Exchange.root" in error.value.hint


# ---- which notebook


class TestChoice:
    @pytest.mark.parametrize(
        ("files", "taken", "words"),
        [
            ({WANTED: notebook("1"), "scratch.ipynb": notebook("2")}, "1", "left: alice/scratch.ipynb"),
            ({"a.ipynb": notebook("1"), "b.ipynb": notebook("2")}, None, "2 notebooks, and none is called"),
            ({f"x/{WANTED}": notebook("1"), f"y/{WANTED}": notebook("2")}, None, f"2 notebooks called {WANTED}"),
            ({"readme.txt": b"later"}, None, "no notebook (but alice/readme.txt)"),
            ({"mine.ipynb": notebook("1")}, "1", "was called alice/mine.ipynb"),
            ({"mine.ipynb": notebook("1", None)}, "1", "was called"),
            ({"Memoization.ipynb": notebook("1", "17", "x")}, "1", "was called"),
            ({"mine.ipynb": notebook("1", "12", "12-x")}, None, "is no notebook of this lesson"),
            ({"mine.ipynb": b"{"}, None, "is not valid JSON"),
            ({"work.zip": b"PK"}, None, "is packed"),
            ({WANTED: notebook("1"), "work.zip": b"PK"}, "1", "left: alice/work.zip"),
        ],
    )
    def test_of_several_files(self, files, taken, words, course, brought, tmp_path):
        for name, data in files.items():
            write(tmp_path / "in/alice" / name, data)
        write(tmp_path / "in/bob" / WANTED, notebook("9"))
        code, states, out = brought(tmp_path / "in", "folder")
        assert (code, states) == (
            (0, {"alice": "taken", "bob": "taken"}) if taken else (1, {"alice": "refused", "bob": "taken"})
        )
        assert collected(course, "alice") == (notebook(taken, *_like(files)) if taken else None)
        assert words in out

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            (b"", "is empty"), (b"{", "is not valid JSON"), (b"\xff\xfe\x00", "is not valid JSON"),
            (b"[" * 200_000, "is not valid JSON"), (b"[]", "not a notebook"), (b'{"cells": 3}', "not a notebook"),
            (b"9" * 10_000, "is not valid JSON"), (notebook("1", "12", "12-x"), "no cell of this lesson"),
            (b'{"cells": [3, null, {"metadata": {"nbgrader": [1]}}], "metadata": []}', "no cell of this lesson"),
        ],
    )  # fmt: skip
    def test_a_broken_notebook_comes_in_as_it_is_and_is_reported(self, data, words, course, brought, tmp_path):
        """So that grading gives a complete row with the reason."""
        write(tmp_path / "in/alice" / WANTED, data)
        code, states, out = brought(tmp_path / "in")
        assert (code, states) == (0, {"alice": "taken"}) and words in out
        assert collected(course, "alice") == data

    def test_a_name_that_would_steer_the_terminal_is_spelled_out(self, course, brought, tmp_path):
        name = "a\x1b[2Jb\u202ec\nd.ipynb"
        write(tmp_path / "in/alice" / name, notebook("1"))
        code, states, out = brought(tmp_path / "in")
        assert (code, states) == (0, {"alice": "taken"})
        assert not any(c in out for c in "\x1b\u202e") and r"a\x1b[2Jb\u202ec\nd.ipynb" in out

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux has names that are no text")
    def test_a_name_that_is_no_text(self, brought, tmp_path):
        write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/in/\xff\xfe/memoization.ipynb")), notebook("1"))
        assert brought(tmp_path / "in")[:2] == (1, {r"\udcff\udcfe": "refused"})


def _like(files: dict[str, bytes]) -> tuple:
    """Lesson and grade id of the notebook that a case holds."""
    data = json.loads(next(data for name, data in files.items() if name.endswith(".ipynb")))
    return data["metadata"].get("tinytorch", {}).get("lesson"), data["cells"][0]["metadata"]["nbgrader"]["grade_id"]


# ---- attacks


def entry(name: str, mode: int = 0, method: int = zipfile.ZIP_DEFLATED) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, (2025, 11, 20, 12, 0, 0))
    info.external_attr, info.compress_type = mode << 16, method
    return info


class TestHostileZip:
    @pytest.mark.parametrize(
        ("info", "words"),
        [
            (entry("../../alice/memoization.ipynb"), "leaves its folder"),
            (entry("alice/../../../memoization.ipynb"), "leaves its folder"),
            (entry("alice/..\\..\\memoization.ipynb"), "leaves its folder"),
            (entry("/alice/memoization.ipynb"), "absolute path"),
            (entry("C:\\alice\\memoization.ipynb"), "absolute path"),
            (entry("\\\\server\\alice\\memoization.ipynb"), "absolute path"),
            (entry("alice/memoization.ipynb", stat.S_IFLNK | 0o777), "is a link"),
            (entry("alice", stat.S_IFLNK | 0o777), "is a link"),
            (entry("alice/memoization.ipynb", stat.S_IFIFO | 0o666), "is no ordinary file"),
            (entry("alice/memoization.ipynb", method=zipfile.ZIP_LZMA), "packed in an unusual way"),
        ],
    )
    def test_an_entry_that_must_not_be_read(self, info, words, course, brought, tmp_path):
        with zipfile.ZipFile(tmp_path / "s.zip", "w") as made:
            made.writestr(info, notebook())
            made.writestr(entry("bob/memoization.ipynb"), notebook("2"))
        around = {path for path in tmp_path.rglob("*") if course.root not in path.parents}
        code, states, out = brought(tmp_path / "s.zip", "folder")
        assert code == 1 and states.pop("bob") == "taken"
        assert list(states.values()) == ["refused"] and words in out and collected(course, "alice") is None
        assert {path for path in tmp_path.rglob("*") if course.root not in path.parents} == around

    def test_a_size_is_what_was_read_not_what_is_said(self, course, brought, tmp_path):
        bomb = zipped(tmp_path / "s.zip", {
            "alice/memoization.ipynb": b" " * (MOST_BYTES + 1), "bob/memoization.ipynb": notebook("2"),
        })  # fmt: skip
        data = bomb.read_bytes().replace((MOST_BYTES + 1).to_bytes(4, "little"), (1000).to_bytes(4, "little"))
        assert len(data) < 100_000
        bomb.write_bytes(data)
        code, states, out = brought(bomb)
        assert code == 1 and states == {"alice": "refused", "bob": "taken"}

    def test_the_largest_notebook_and_one_byte_more(self, brought, tmp_path):
        fits = notebook() + b" " * (MOST_BYTES - len(notebook()))
        source = zipped(tmp_path / "s.zip", {"alice.ipynb": fits, "bob.ipynb": fits + b" "})
        code, states, out = brought(source)
        assert code == 1 and states == {"alice": "taken", "bob": "refused"} and "larger than 20 MiB" in out

    def test_encrypted_and_damaged_entries(self, brought, tmp_path):
        source = zipped(tmp_path / "s.zip", {f"{s}.ipynb": notebook(s) for s in ("alice", "bob", "carol")})
        with zipfile.ZipFile(source) as made:
            alice, bob = made.getinfo("alice.ipynb"), made.getinfo("bob.ipynb")
        data = bytearray(source.read_bytes())
        data[alice.header_offset + 6] |= 1
        data[data.index(b"PK\x01\x02") + 8] |= 1
        data[bob.header_offset + 30 + len("bob.ipynb") + 20] ^= 0xFF
        source.write_bytes(data)
        code, states, out = brought(source)
        assert code == 1 and states == {"alice": "refused", "bob": "refused", "carol": "taken"}
        assert "is encrypted" in out and "cannot be unpacked" in out

    def test_a_zip_of_too_much_ends_in_words_for_those_after(self, brought, tmp_path, monkeypatch):
        monkeypatch.setattr(archive._Budget, "__init__", lambda self: setattr(self, "left", 1000))
        source = zipped(tmp_path / "s.zip", {"alice.ipynb": notebook() + b" " * 1000, "bob.ipynb": notebook()})
        code, states, out = brought(source)
        assert code == 1 and states == {"alice": "taken", "bob": "refused"} and "it is not read" in out

    def test_too_many_entries(self, course, tmp_path):
        with zipfile.ZipFile(tmp_path / "s.zip", "w") as made:
            for number in range(MOST_FILES + 1):
                made.writestr(zipfile.ZipInfo(f"alice/{number}"), b"")
        with pytest.raises(CourseError, match="20001 files"):
            collect(course, "17", tmp_path / "s.zip", "auto", None)

    def test_the_same_entry_twice(self, brought, tmp_path):
        with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "s.zip", "w") as made:
            made.writestr("alice/memoization.ipynb", notebook("1"))
            made.writestr("alice/memoization.ipynb", notebook("2"))
        assert brought(tmp_path / "s.zip")[:2] == (1, {"alice": "refused"})

    @pytest.mark.parametrize("name", ["Čapek Carol", "Čapek Carol"])
    @pytest.mark.parametrize("flag", [True, False])
    def test_names_in_utf8_with_and_without_the_flag(self, name, flag, course, brought, tmp_path):
        source = zipped(tmp_path / "s.zip", {f"{name}_1_assignsubmission_file_/memoization.ipynb": notebook()})
        if not flag:
            data = source.read_bytes()
            for start, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
                at = data.index(start) + place
                data = data[:at] + bytes([data[at], data[at + 1] & ~0x08]) + data[at + 2 :]
            source.write_bytes(data)
        assert brought(source)[:2] == (0, {"carol": "taken"})

    @pytest.mark.parametrize("damage", ["no zip", "cut", "not utf-8"])
    def test_a_zip_that_cannot_be_opened_is_words(self, damage, course, tmp_path):
        source = zipped(tmp_path / "s.zip", {"Č/memoization.ipynb": notebook()})
        data = source.read_bytes()
        source.write_bytes(
            {"no zip": b"hello", "cut": data[:-30], "not utf-8": data.replace("Č".encode(), b"\xff\xff")}[damage]
        )
        with pytest.raises(CourseError):
            collect(course, "17", source, "auto", None)


@contextmanager
def ended_after(seconds: int):
    """Fails instead of waiting for ever, e.g. for somebody who writes into a FIFO."""

    def wake(*_):
        raise AssertionError(f"still waiting after {seconds} s")

    before = signal.signal(signal.SIGALRM, wake)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@posix
class TestHostileFolder:
    def test_links_and_special_files_are_neither_followed_nor_opened(self, course, brought, tmp_path):
        secret = write(tmp_path / "secret/memoization.ipynb", notebook("secret"))
        into = tmp_path / "in"
        write(into / "bob" / WANTED, notebook("2"))
        (into / "alice").symlink_to(secret.parent)
        (into / "carol").mkdir()
        (into / "carol" / WANTED).symlink_to(secret)
        (into / "4711").mkdir()
        (into / "4711" / NAME).symlink_to(secret.parent)
        (into / "sam2").mkdir()
        os.mkfifo(into / "sam2" / WANTED)
        code, states, out = brought(into)
        assert code == 1 and states.pop("bob") == "taken"
        assert states == dict.fromkeys(["alice", "carol", "4711", "sam2"], "refused")
        assert out.count("is a link") == 3 and "is no ordinary file" in out
        assert not any(b"secret" in data for data in tree_of(course.root / "submitted").values())

    @pytest.mark.parametrize("swapped", ["file", "parent", "fifo"])
    def test_a_link_or_fifo_put_there_after_the_listing(self, swapped, tmp_path):
        secret = write(tmp_path / "secret/memoization.ipynb", b"secret")
        path = write(tmp_path / "in/alice" / WANTED, b"own")
        (file,) = [file for file in tree.folder_files(tmp_path / "in") if file.is_notebook]
        assert file.read() == b"own"
        gone = path.parent if swapped == "parent" else path
        gone.rename(tmp_path / "gone")
        os.mkfifo(path) if swapped == "fifo" else gone.symlink_to(secret if swapped == "file" else secret.parent)
        with ended_after(20), pytest.raises(Refusal):
            file.read()

    def test_a_million_files_are_one_students_problem(self, brought, tmp_path, monkeypatch):
        monkeypatch.setattr(tree, "MOST_FILES", 20)
        for number in range(30):
            write(tmp_path / "in/alice" / f"{number}.txt", b"")
        write(tmp_path / "in/carol" / "/".join("d" * 25) / WANTED, notebook())
        write(tmp_path / "in/bob" / WANTED, notebook())
        code, states, out = brought(tmp_path / "in")
        assert code == 1 and states == {"alice": "refused", "bob": "taken", "carol": "refused"}
        assert "too many files" in out


# ---- what was there before


class TestSecondSubmission:
    def give(self, tmp_path, answer: str, when: str) -> Path:
        write(tmp_path / "in/alice" / WANTED, notebook(answer), when)
        return tmp_path / "in"

    def test_the_same_again_changes_nothing(self, course, brought, tmp_path):
        brought(self.give(tmp_path, "1", "2025-11-20 10:00"))
        before = tree_of(course.root)
        assert brought(self.give(tmp_path, "1", "2025-11-22 10:00"))[:2] == (0, {"alice": "unchanged"})
        assert tree_of(course.root) == before

    def test_a_newer_one_replaces_and_keeps_the_older(self, course, brought, tmp_path):
        brought(self.give(tmp_path, "1", "2025-11-20 10:00"))
        assert brought(self.give(tmp_path, "2", "2025-11-21 10:00"))[1] == {"alice": "replaced"}
        assert brought(self.give(tmp_path, "3", "2025-11-21 10:00"))[1] == {"alice": "replaced"}
        assert brought(self.give(tmp_path, "4", "2025-11-21 10:00"))[1] == {"alice": "replaced"}
        assert collected(course, "alice") == notebook("4")
        kept = tree_of(course.superseded("alice", NAME))
        assert kept == {
            "2025-11-20T100000Z/memoization.ipynb": notebook("1"),
            "2025-11-20T100000Z/timestamp.txt": b"2025-11-20 10:00:00 UTC",
            "2025-11-21T100000Z/memoization.ipynb": notebook("2"),
            "2025-11-21T100000Z/timestamp.txt": b"2025-11-21 10:00:00 UTC",
            "2025-11-21T100000Z-2/memoization.ipynb": notebook("3"),
            "2025-11-21T100000Z-2/timestamp.txt": b"2025-11-21 10:00:00 UTC",
        }

    def test_an_older_one_does_not_replace_and_is_kept_once(self, course, brought, tmp_path):
        brought(self.give(tmp_path, "2", "2025-11-21 10:00"))
        assert brought(self.give(tmp_path, "1", "2025-11-20 10:00"))[:2] == (0, {"alice": "older"})
        assert brought(self.give(tmp_path, "1", "2025-11-20 10:00"))[:2] == (0, {"alice": "older"})
        assert collected(course, "alice") == notebook("2")
        kept = {name: data for name, data in tree_of(course.superseded("alice", NAME)).items() if "ipynb" in name}
        assert kept == {"2025-11-20T100000Z/memoization.ipynb": notebook("1")}

    def test_what_nbgrader_itself_collected_is_kept_whole(self, course, brought, tmp_path):
        old = course.submitted("alice", NAME)
        write(old / WANTED, notebook("1"))
        write(old / "data.csv", b"1,2")
        write(old / "timestamp.txt", b"2025-11-20 10:00:00.123456 UTC\n")
        assert brought(self.give(tmp_path, "2", "2025-11-21 10:00"))[1] == {"alice": "replaced"}
        assert tree_of(course.superseded("alice", NAME) / "2025-11-20T100000Z").keys() == {
            WANTED, "data.csv", "timestamp.txt",
        }  # fmt: skip
        assert sorted(os.listdir(old)) == [WANTED, "timestamp.txt"]

    def test_two_submissions_of_one_student_in_one_export(self, course, brought, tmp_path):
        """The later one stays, in whatever order they stand, and a second collect changes nothing."""
        text = "".join(
            f"submission_{key}:\n  :submitters:\n  - :sid: alice\n  :created_at: 2025-11-{day} 12:00:00 Z\n"
            for key, day in ((1, 21), (2, 20), (3, 22))
        )
        files = {f"x/submission_{key}/memoization.ipynb": notebook(str(key)) for key in (1, 2, 3)}
        source = zipped(tmp_path / "s.zip", files | {"x/submission_metadata.yml": text.encode()})
        for _ in range(2):
            assert brought(source)[0] == 0
            assert collected(course, "alice") == notebook("3")
            assert len(list(course.superseded("alice", NAME).iterdir())) == 2

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
    def test_killed_at_any_rename_nothing_is_lost_and_the_next_collect_mends(self, course, lesson, capsys, tmp_path):
        """Dies before the n-th rename, for every n: both notebooks are there afterwards, each once."""
        deaths = 0
        for number in range(1, 10):
            shutil.rmtree(course.root / "submitted")
            shutil.rmtree(course.root / "superseded", ignore_errors=True)
            first, second = datetime(2025, 11, 20, tzinfo=UTC), datetime(2025, 11, 21, tzinfo=UTC)
            store.put(course, lesson, "alice", notebook("1"), first)
            child = os.fork()
            if child == 0:
                _die_before_rename(number)
                store.put(course, lesson, "alice", notebook("2"), second)
                os._exit(0)
            died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
            deaths += died
            (tmp_path / "empty").mkdir(exist_ok=True)
            assert collect(course, "17", tmp_path / "empty", "folder", None) == 0
            moved = (course.superseded("alice", NAME) / "2025-11-20T000000Z").exists()
            assert collected(course, "alice") == notebook("2" if moved else "1")
            write(tmp_path / "in/alice" / WANTED, notebook("2"), "2025-11-21 00:00")
            assert collect(course, "17", tmp_path / "in", "folder", None) == 0
            assert collected(course, "alice") == notebook("2")
            kept = course.superseded("alice", NAME) / "2025-11-20T000000Z"
            assert (kept / WANTED).read_bytes() == notebook("1")
            assert not list((course.grading(NAME) / "incoming").iterdir())
            if not died:
                break
        assert deaths == 3  # complete, the old one out, the new one in
        assert "Ended what a stopped collect had begun: alice." in capsys.readouterr().out

    def test_only_one_collect_at_a_time(self, course, tmp_path):
        pytest.importorskip("fcntl")
        write(tmp_path / "in/alice" / WANTED, notebook())
        with store.locked(course, NAME), pytest.raises(CourseError, match="running"):
            collect(course, "17", tmp_path / "in", "auto", None)
        assert collect(course, "17", tmp_path / "in", "auto", None) == 0

    def test_a_disk_that_refuses_is_one_students_problem(self, course, brought, tmp_path):
        write(course.root / "submitted/alice", b"a file where the folder should be")
        for student in ("alice", "bob"):
            write(tmp_path / "in" / student / WANTED, notebook())
        assert brought(tmp_path / "in")[:2] == (1, {"alice": "refused", "bob": "taken"})

    @pytest.mark.parametrize("student", ["", ".", "..", "../bob", "a/b", "a\\b", ".hidden", "a\0b"])
    def test_an_id_that_is_no_folder_name_is_refused(self, student, course, lesson):
        before = tree_of(course.root)
        with pytest.raises(Refusal):
            store.put(course, lesson, student, notebook(), datetime(2025, 1, 1, tzinfo=UTC))
        assert tree_of(course.root) == before


def _die_before_rename(number: int) -> None:
    """In this process: end at once, without any clean-up, in place of the rename of that number."""
    rename, seen = os.rename, 0

    def deadly(*arguments, **keywords):
        nonlocal seen
        seen += 1
        if seen == number:
            os._exit(9)
        return rename(*arguments, **keywords)

    os.rename = deadly


# ---- time


class TestDue:
    @pytest.mark.filterwarnings("ignore:Object of type")  # SQLAlchemy's, about nbgrader's add_submission
    def test_late_as_nbgrader_counts_it(self, course, brought, tmp_path):
        """nbgrader's autograde reads submitted/, and computes the same lateness, with an extension too."""
        for student, when in (
            ("alice", "2025-11-20 12:00:01"),
            ("bob", "2025-11-22 14:00"),
            ("carol", "2025-11-20 12:00"),
        ):
            write(tmp_path / "in" / student / WANTED, notebook(), when)
        with open_gradebook(course) as gradebook:
            gradebook.add_submission(NAME, "bob", extension=timedelta(days=1))
        code, states, out = brought(tmp_path / "in", due="2025-11-20 13:00 +01:00")
        rows = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ")}
        assert code == 0 and "3 taken; 2 late." in out
        assert "  1 s" in rows["alice"] and "  1 d 2 h" in rows["bob"] and rows["carol"].endswith(":00")
        assert _seconds_late(course) == {"alice": 1, "bob": 26 * 3600, "carol": 0}

    def test_the_stored_due_time_counts_where_none_is_given(self, course, brought, tmp_path):
        write(tmp_path / "in/alice" / WANTED, notebook(), "2025-11-20 13:00")
        assert "no due time" in brought(tmp_path / "in")[2]
        assert "1 late" in brought(tmp_path / "in", due="2025-11-20 12:00 UTC")[2]
        assert "1 late" in brought(tmp_path / "in")[2]
        assert "late." not in brought(tmp_path / "in", due="2025-11-20T14:00Z")[2]
        with open_gradebook(course) as gradebook:
            assert gradebook.find_assignment(NAME).duedate == datetime(2025, 11, 20, 14)

    @pytest.mark.parametrize(
        "due", ["", " ", "tomorrow", "2025-11-30", "2025-13-01 10:00", "2025-11-30 25:00", "30.11.2025 10:00",
                "2025-11-30 10:00 Nowhere/City", "2025-11-30 10:00 +99:00", "0001-01-01 00:00 +14:00", "9" * 5000],
    )  # fmt: skip
    def test_a_wrong_due_time_is_words_and_changes_nothing(self, due, course, tmp_path):
        write(tmp_path / "in/alice" / WANTED, notebook())
        before = tree_of(course.root)
        with pytest.raises(CourseError) as error:
            collect(course, "17", tmp_path / "in", "auto", due)
        assert '"2026-11-30 23:59"' in error.value.hint and len(error.value.message) < 200
        assert tree_of(course.root) == before

    @pytest.mark.parametrize(
        ("text", "zone", "utc"),
        [
            ("2026-11-30 23:59", "Asia/Tokyo", "2026-11-30 14:59"), ("2026-11-30T23:59", "UTC", "2026-11-30 23:59"),
            ("2026-07-01 12:00", "Europe/Berlin", "2026-07-01 10:00"),
            ("2026-11-30 23:59 Europe/Berlin", "Asia/Tokyo", "2026-11-30 22:59"),
            ("2026-11-30 23:59:30Z", "Asia/Tokyo", "2026-11-30 23:59:30"),
            ("2026-11-30 23:59 -0500", "Asia/Tokyo", "2026-12-01 04:59"),
        ],
    )  # fmt: skip
    @pytest.mark.skipif(not hasattr(__import__("time"), "tzset"), reason="sets the local zone by TZ")
    def test_local_time_unless_a_zone_is_given(self, text, zone, utc, monkeypatch):
        import time

        monkeypatch.setenv("TZ", zone)
        time.tzset()
        try:
            assert times.due(text) == datetime.fromisoformat(utc).replace(tzinfo=UTC)
        finally:
            monkeypatch.undo()
            time.tzset()

    @pytest.mark.parametrize(
        "text",
        ["2025-11-20 12:00:00 UTC", "2025-11-20 12:00:00.999999 UTC", "2025-11-20 12:00:00.5 CET",
         "2025-11-20T12:00:00", "2025-11-20 12:00", "2025-11-20 12:00:00 EST", "Nov 20 2025 3pm",
         "2025-11-20T12:00:00+05:30"],
    )  # fmt: skip
    def test_timestamps_are_read_as_nbgrader_reads_them(self, text, tmp_path):
        from nbgrader.coursedir import CourseDirectory

        write(tmp_path / "timestamp.txt", text.encode())
        theirs = CourseDirectory(root=str(tmp_path)).get_existing_timestamp(str(tmp_path))
        when = times.read_stamp(text)
        assert when.replace(tzinfo=None) == theirs.replace(microsecond=0)
        write(tmp_path / "timestamp.txt", times.stamp(when).encode())
        again = CourseDirectory(root=str(tmp_path)).get_existing_timestamp(str(tmp_path))
        assert again == when.replace(tzinfo=None)

    @pytest.mark.parametrize(
        "text", ["", "x", "0001-01-01 00:00:00 UTC", "9999-12-31 23:59:59 UTC", "\0", "(" * 999, "1" * 99]
    )
    def test_a_timestamp_that_is_none(self, text):
        assert times.read_stamp(text) is None


def _seconds_late(course: GradingCourse) -> dict[str, float]:
    """What `nbgrader autograde` notes before it runs a notebook: it finds the files, and says how late they are."""
    from nbgrader.converters import Autograde
    from nbgrader.coursedir import CourseDirectory
    from traitlets.config import Config

    config = Config()
    config.CourseDirectory.root, config.CourseDirectory.course_id = str(course.root), "tinytorch"
    config.CourseDirectory.assignment_id = NAME
    autograde = Autograde(coursedir=CourseDirectory(config=config), config=config)
    autograde.init_notebooks()
    students = sorted(Path(folder).parent.name for folder in autograde.assignments)
    for student in students:
        autograde.notebooks = autograde.assignments[str(course.submitted(student, NAME))]
        autograde.init_assignment(NAME, student)
    with open_gradebook(course) as gradebook:
        return {student: gradebook.find_submission(NAME, student).total_seconds_late for student in students}


# ---- the command


class TestCommand:
    def test_grades_and_students_of_the_gradebook_stay(self, course, brought, tmp_path):
        def rows():
            with open_gradebook(course) as gradebook:
                found = [(s.id, s.first_name, s.last_name, s.email) for s in gradebook.students]
                return sorted(found), [(s.student_id, s.timestamp) for s in gradebook.assignment_submissions(NAME)]

        before = rows()
        write(tmp_path / "in/alice" / WANTED, notebook())
        write(tmp_path / "in/zed" / WANTED, notebook())
        code, states, out = brought(tmp_path / "in", due="2025-11-20 12:00")
        assert code == 1 and states == {"alice": "taken", "zed": "refused"} and rows() == before
        assert "`tito grade roster CSV`" in out and "4 without a submission" in out

    def test_nothing_there(self, brought, tmp_path):
        (tmp_path / "in").mkdir()
        code, states, out = brought(tmp_path / "in")
        assert code == 0 and not states and "No submission was found." in out

    @pytest.mark.parametrize(
        ("source", "form"),
        [
            ("missing", "auto"),
            (None, "folder"),
            (None, "git"),
            ("in", "exchange"),
            ("in", "blackboard"),
            ("a.ipynb", "auto"),
        ],
    )
    def test_a_wrong_source_or_form_is_words(self, source, form, course, tmp_path):
        (tmp_path / "in").mkdir()
        write(tmp_path / "a.ipynb", notebook())
        with pytest.raises(CourseError) as error:
            collect(course, "17", tmp_path / source if source else None, form, None)
        assert error.value.hint

    def test_a_lesson_that_was_not_released_is_words(self, course, tmp_path):
        with pytest.raises(CourseError, match="not released"):
            collect(course, "12", tmp_path, "auto", None)

    def test_names_are_found_in_any_order_of_their_words(self):
        roster = people.Roster(people.Person(s.id, s.first_name, s.last_name, s.email) for s in STUDENTS)
        found = {name: roster.called(name) for name in ("VAN BROWN, Bob", "brownbobvan", "Bobvan Brown", "Brown", "")}
        assert found == {
            "VAN BROWN, Bob": ["bob"], "brownbobvan": ["bob"], "Bobvan Brown": ["bob"], "Brown": [], "": [],
        }  # fmt: skip
