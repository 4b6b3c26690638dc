"""A lesson goes into the package all or nothing, and comes out again the same way, whatever ends tito in between.

Oracle: the bytes of package file and progress are those of before or those of after, both at once.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tito.course import journal, progress, released, transaction
from tito.course.errors import CourseError

posix = pytest.mark.skipif(os.name != "posix", reason="signals and fork of POSIX")


def imports(root: Path, expression: str) -> str:
    """What a fresh Python prints for `expression` with the package at `root`."""
    code = f"import tinytorch.core.scale as scale, tinytorch.core.shift as shift; print({expression})"
    env = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()


def snapshot(root: Path) -> dict[str, bytes]:
    """All files of the course but caches and locks."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".lock"
    }


def leftovers(root: Path) -> list[str]:
    """Names of files that only live while tito changes something."""
    names = [path.name for path in root.rglob("*")]
    return [n for n in names if n.endswith(".tmp") or n.startswith("scratch-") or n == "journal.json"]


def complete(course, text: str):
    return transaction.complete(course.load(), course.lesson(text))


# --- complete ----------------------------------------------------------------------------------------------------


def test_complete_puts_the_learners_file_in_place(course):
    path = course.solve("01")
    notebook, lesson = path.read_bytes(), course.lesson("01")
    reference = lesson.package_file.read_text(encoding="utf-8")
    steps = []
    result = transaction.complete(course.load(), lesson, tell=steps.append)
    assert result.passed and (result.earned, result.of) == (6, 6) and result.next.number == "02"
    assert len(steps) == 3 and result.tests.passed == 1
    assert "tito module complete 01" in lesson.package_file.read_text(encoding="utf-8")
    assert imports(course.root, "scale.double(4), scale.__doc__.count('Exported from')") == "8 1"
    entry = progress.read(course.root).lessons["01"]
    assert (entry.points, entry.of) == (6, 6) and entry.completed[:2] == "20"
    assert progress.owner(lesson, progress.read(course.root)) == "learner"
    assert (course.root / released.kept_reference(lesson)).read_text(encoding="utf-8") == reference
    assert path.read_bytes() == notebook and leftovers(course.root) == []


def test_starting_with_a_later_lesson_works(course):
    course.solve("02")
    assert complete(course, "02").passed
    known = progress.read(course.root)
    owners = [progress.owner(lesson, known) for lesson in course.load().lessons]
    assert owners == ["reference", "learner", "reference"]


def test_lessons_one_after_another(course):
    for number in ("01", "02", "04"):
        course.solve(number)
        assert complete(course, number).passed, number
    assert sorted(progress.read(course.root).lessons) == ["01", "02", "04"]
    assert imports(course.root, "shift.shift(3)") == "7"


def test_check_changes_nothing_a_learner_can_see(course):
    course.solve("01")
    before = snapshot(course.root)
    result = transaction.check(course.load(), course.lesson("01"))
    assert result.passed and result.tests.passed == 1 and result.written == ()
    after = snapshot(course.root)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith(".tito/pristine/") for name in after.keys() - before.keys())


@pytest.mark.parametrize(
    "wrong, points, words",
    [
        ({"double": "return 0"}, 3, "was the factor forgotten?"),
        ({"double": "return x"}, 3, "was the factor forgotten?"),
        ({"total": "return [0 for _ in x]"}, 2, "was only one number taken?"),
    ],
)
def test_a_wrong_lesson_is_not_completed(course, wrong, points, words):
    course.solve("01", **wrong)
    before = course.lesson("01").package_file.read_bytes()
    result = complete(course, "01")
    assert not result.passed and result.tests is None and result.written == () and result.earned == points
    assert any(words in check.message for check in result.run.checks)
    assert course.lesson("01").package_file.read_bytes() == before
    assert progress.read(course.root) == progress.Progress() and leftovers(course.root) == []


def test_an_empty_lesson_is_not_completed(course):
    result = complete(course, "01")
    assert result.earned == 0 and result.of == 6 and not result.passed
    assert all("still to be written" in check.message for check in result.run.checks)


def edit(path: Path, change) -> None:
    """Change the cells of a notebook."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["cells"] = change(content["cells"])
    path.write_text(json.dumps(content), encoding="utf-8")


def test_a_deleted_check_is_not_completed(course):
    path = course.solve("01")
    edit(path, lambda cells: [c for c in cells if c["metadata"].get("nbgrader", {}).get("grade_id") != "01-total-test"])
    result = complete(course, "01")
    assert not result.passed and result.earned == 3 and result.written == ()
    assert "deleted" in next(check for check in result.run.checks if check.id == "01-total-test").message


def replaced(old: str, new: str):
    """A change that replaces text in all code cells."""

    def change(cells):
        for cell in cells:
            source = cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])
            if not cell["metadata"].get("nbgrader", {}).get("grade"):
                cell["source"] = source.replace(old, new)
        return cells

    return change


def test_a_cell_without_its_export_is_refused(course):
    path = course.solve("01")
    edit(path, replaced("#| export\ndef total", "def total"))
    result = complete(course, "01")
    assert result.run.passed and not result.passed and result.written == ()
    assert "01-total" in result.refusal.message and "#| export" in result.refusal.message


def test_a_file_that_cannot_be_imported_is_not_swapped_in(course):
    path = course.solve("01")
    edit(
        path, replaced("UNIT = 1", "UNIT = 1\nif __name__ != '__main__':\n    raise RuntimeError('only in a notebook')")
    )
    before = course.lesson("01").package_file.read_bytes()
    result = complete(course, "01")
    assert result.run.passed and not result.passed
    assert result.tests.failed == (("import tinytorch.core.scale", "RuntimeError: only in a notebook"),)
    assert course.lesson("01").package_file.read_bytes() == before


def test_a_file_that_breaks_a_later_lesson_is_not_swapped_in(course):
    path = course.solve("01")
    edit(path, replaced("return 2 * x", "return 2 * x\n\nif __name__ != '__main__':\n    del double"))
    result = complete(course, "01")
    assert result.run.passed and not result.passed
    assert "cannot import name 'double'" in dict(result.tests.failed)["import tinytorch.core.shift"]


def test_a_failing_progressive_test_keeps_the_package(course):
    course.solve("01")
    tests = course.lesson("01").tests / "test_progressive_integration.py"
    tests.write_text(tests.read_text() + "\n\ndef test_more():\n    assert lesson.double(1) == 3, 'needs 3'\n")
    before = course.lesson("01").package_file.read_bytes()
    result = complete(course, "01")
    assert result.run.passed and not result.passed and result.tests.passed == 1
    assert result.tests.failed == (("01_scale: test_more", "needs 3"),)
    assert course.lesson("01").package_file.read_bytes() == before


def test_what_was_run_is_what_is_exported(course, monkeypatch):
    """A learner who saves the notebook during the run gets the version that was run."""
    path = course.solve("01")
    run = transaction.runner.run_notebook

    def run_and_save(*args, **kwargs):
        result = run(*args, **kwargs)
        path.write_text(path.read_text(encoding="utf-8").replace("2 * x", "5 * x"), encoding="utf-8")
        return result

    monkeypatch.setattr(transaction.runner, "run_notebook", run_and_save)
    assert complete(course, "01").passed
    assert imports(course.root, "scale.double(4)") == "8"


def test_hints_taken_during_a_completion_are_kept(course, monkeypatch):
    course.solve("01")
    run = transaction.runner.run_notebook

    def run_and_hint(*args, **kwargs):
        progress.update(course.root, lambda known: known.hinted("01-double", 2))
        return run(*args, **kwargs)

    monkeypatch.setattr(transaction.runner, "run_notebook", run_and_hint)
    assert complete(course, "01").passed
    assert progress.read(course.root).hints == {"01-double": 2}


def test_a_changed_package_file_is_told_from_the_learners(course):
    course.solve("01")
    complete(course, "01")
    lesson = course.lesson("01")
    with open(lesson.package_file, "a", encoding="utf-8") as file:
        file.write("\n# by hand\n")
    assert progress.owner(lesson, progress.read(course.root)) == "changed"
    lesson.package_file.unlink()
    assert progress.owner(lesson, progress.read(course.root)) == "changed"


# --- reset -------------------------------------------------------------------------------------------------------


def test_reset_brings_back_what_was_released(course):
    released_notebook = course.lesson("01").notebook.read_bytes()
    reference = course.lesson("01").package_file.read_bytes()
    transaction.check(course.load(), course.lesson("01"))  # any command before the first change keeps a copy
    mine = course.solve("01").read_bytes()
    assert complete(course, "01").passed
    progress.update(course.root, lambda known: known.hinted("01-double", 2))
    lesson = course.lesson("01")
    result = transaction.reset(course.load(), lesson)
    assert lesson.notebook.read_bytes() == released_notebook and lesson.package_file.read_bytes() == reference
    assert result.backup.read_bytes() == mine and result.backup.parent == lesson.notebook.parent / "backups"
    assert progress.read(course.root) == progress.Progress({}, {"01-double": 2})
    assert progress.owner(lesson, progress.read(course.root)) == "reference" and leftovers(course.root) == []
    assert transaction.reset(course.load(), lesson).backup is None, "nothing of the learner's was left to keep"


def test_a_reference_that_came_with_a_newer_course_is_the_one_that_reset_brings_back(course):
    released.keep_notebooks(course.load())
    course.solve("01")
    assert complete(course, "01").passed
    transaction.reset(course.load(), course.lesson("01"))
    path = course.lesson("01").package_file
    newer = path.read_text(encoding="utf-8") + "\n# a newer release of the course\n"
    path.write_text(newer, encoding="utf-8")
    course.solve("01")
    assert complete(course, "01").passed
    transaction.reset(course.load(), course.lesson("01"))
    assert path.read_text(encoding="utf-8") == newer


def test_resets_in_the_same_second_keep_both_notebooks(course):
    released.keep_notebooks(course.load())
    lesson, kept = course.lesson("01"), []
    for body in ("return 1", "return 2"):
        course.solve("01", double=body)
        kept.append((transaction.reset(course.load(), lesson).backup, body))
    assert len({path for path, _ in kept}) == 2
    assert all(body in path.read_text(encoding="utf-8") for path, body in kept)


@pytest.mark.parametrize("content", [b"\xff\xfe not text", b"{broken", None])
def test_a_damaged_notebook_can_be_reset(course, content):
    released.keep_notebooks(course.load())
    lesson = course.lesson("01")
    as_released = lesson.notebook.read_bytes()
    lesson.notebook.unlink() if content is None else lesson.notebook.write_bytes(content)
    result = transaction.reset(course.load(), lesson)
    assert lesson.notebook.read_bytes() == as_released
    assert content is None or result.backup.read_bytes() == content


def test_a_reset_that_is_impossible_changes_nothing(course):
    course.solve("01")  # before tito ever ran, and without git
    before = snapshot(course.root)
    with pytest.raises(CourseError, match="not at hand"):
        transaction.reset(course.load(), course.lesson("01"))
    assert snapshot(course.root) == before


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_helps_where_no_copy_was_kept(course):
    as_released = course.lesson("01").notebook.read_bytes()
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "m"]):
        subprocess.run(["git", *command], cwd=course.root, check=True)
    course.solve("01")
    transaction.reset(course.load(), course.lesson("01"))
    assert course.lesson("01").notebook.read_bytes() == as_released


def test_a_lesson_without_learners_file_keeps_the_package_untouched(course):
    course.solve("01", double="return 0")
    released.keep_notebooks(course.load())
    shutil.copy(course.origin / "modules/01_scale/scale.ipynb", course.lesson("01").notebook)
    released.keep_notebooks(course.load())
    before = course.lesson("01").package_file.stat().st_mtime_ns
    transaction.reset(course.load(), course.lesson("01"))
    assert course.lesson("01").package_file.stat().st_mtime_ns == before


# --- progress, locks, journal ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1}', '{"version": 1, "lessons": {"01": 3}, "hints": {}}', ""])
def test_damaged_progress_is_said_and_kept(course, text):
    (course.root / ".tito").mkdir()
    (course.root / progress.FILE).write_text(text)
    with pytest.raises(CourseError) as error:
        progress.read(course.root)
    assert "cannot be read" in error.value.message and "are as they were" in error.value.hint
    with pytest.raises(CourseError):
        progress.update(course.root, lambda known: known.hinted("01-double", 1))
    assert (course.root / progress.FILE).read_text() == text


def test_progress_of_another_version_is_said(course):
    (course.root / ".tito").mkdir()
    (course.root / progress.FILE).write_text('{"version": 2}')
    with pytest.raises(CourseError, match="version 2"):
        progress.read(course.root)


COUNT = """
import sys
from pathlib import Path
from tito.course import progress
for _ in range(15):
    progress.update(Path(sys.argv[1]), lambda known: known.hinted("01-double", known.hints.get("01-double", 0) + 1))
"""


def test_no_hint_is_lost_between_processes(course):
    processes = [subprocess.Popen([sys.executable, "-c", COUNT, str(course.root)]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert progress.read(course.root).hints == {"01-double": 45}


HOLD = """
import sys, time
from pathlib import Path
from tito.course import journal
with journal.locked(Path(sys.argv[1]), journal.COMMAND):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_completion_waits_its_turn_and_a_dead_one_is_forgotten(course):
    course.solve("01")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(course.root)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline().strip() == b"held"
        with pytest.raises(CourseError, match="Another tito command"):
            complete(course, "01")
        assert progress.read(course.root) == progress.Progress(), "reading does not wait"
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert complete(course, "01").passed


def test_a_journal_damaged_by_hand_is_said(course):
    (course.root / ".tito").mkdir()
    (course.root / ".tito" / "journal.json").write_text("{")
    with pytest.raises(CourseError, match="damaged by hand"):
        progress.read(course.root)


def test_a_file_that_cannot_be_written_is_said_and_done_later(course, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    target = Path("tinytorch/core/scale.py")
    write = journal.write_atomic
    monkeypatch.setattr(journal, "write_atomic", full)
    with pytest.raises(CourseError, match="No space left") as error, journal.locked(course.root):
        journal.commit(course.root, {target: "new"})
    assert error.value.hint == "Nothing was changed."
    monkeypatch.setattr(
        journal, "write_atomic", lambda path, text: (write if ".tito" in str(path) else full)(path, text)
    )
    with pytest.raises(CourseError, match="scale.py cannot be written"), journal.locked(course.root):
        journal.commit(course.root, {target: "new"})
    monkeypatch.setattr(journal, "write_atomic", write)
    progress.read(course.root)
    assert (course.root / target).read_text() == "new" and leftovers(course.root) == []


# --- killed at any point -----------------------------------------------------------------------------------------

# Runs ACTION again and again on fresh copies of a course, each time in a child that kills itself (SIGKILL) right
# before its k-th touch of the file system, for every k until the action comes to its end. Runs of student code
# are replaced by results, so that the k-th touch is the same in each run.
EVERY_POINT = """
import json, os, shutil, signal, sys
from pathlib import Path
from tito.course import journal, manifest, progress, runner, transaction

action, template, place = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
TOUCHES = ("open", "os.", "shutil.", "tempfile.")
import psutil, tempfile, random  # imported before touches are counted

def passed(lesson, *_args, **_more):
    checks = tuple(runner.CheckResult(c.id, c.title, c.points, True) for c in lesson.checks)
    return runner.Run(checks)

runner.run_notebook = passed
runner.run_progressive = lambda *_args, **_more: runner.TestRun(1)

def act(root):
    course = manifest.load(root)
    if action == "recover":
        journal.recover(root)
    else:
        getattr(transaction, action)(course, course.lesson("01"))

def killed_at(k, root):
    child = os.fork()
    if child == 0:
        count = [0]
        def hook(event, _):
            if event.startswith(TOUCHES) and event not in ("os.listdir", "os.scandir"):
                count[0] += 1
                if count[0] == k:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        try:
            act(root)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]

def look(root):
    lesson = manifest.load(root).lesson("01")
    raw = lesson.package_file.read_text()
    known = progress.read(root)
    entry = known.lessons.get("01")
    clean = not [p.name for p in lesson.package_file.parent.iterdir() if p.suffix == ".tmp"]
    return {"raw": progress.digest_of(raw), "package": progress.digest_of(lesson.package_file.read_text()),
            "entry": entry.digest if entry else None, "notebook": progress.digest_of(lesson.notebook.read_text()),
            "owner": progress.owner(lesson, known), "hints": known.hints}

seen = []
for k in range(1, 1000):
    root = place / str(k)
    shutil.copytree(template, root)
    status = killed_at(k, root)
    state = look(root)
    act(root)  # the next command, not killed
    state["then"] = look(root)
    names = [p.name for p in root.rglob("*")]
    state["left"] = [n for n in names if n.endswith(".tmp") or n.startswith("scratch-") or n == "journal.json"]
    shutil.rmtree(root)
    if status == 0:
        break
    assert status == signal.SIGKILL, status
    seen.append(state)
print(json.dumps({"points": seen, "end": state}))
"""


def kill_everywhere(action: str, template: Path, place: Path) -> dict:
    place.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", EVERY_POINT, action, str(template), str(place)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@posix
def test_complete_killed_at_every_point(course, tmp_path):
    course.solve("01")
    lesson = course.lesson("01")
    progress.update(course.root, lambda known: known.hinted("01-double", 1))
    before = progress.digest_of(lesson.package_file.read_text(encoding="utf-8"))
    result = kill_everywhere("complete", course.root, tmp_path / "runs")
    after = result["end"]["package"]
    assert after != before and result["end"]["owner"] == "learner"
    outcomes = [(state["package"], state["entry"], state["owner"]) for state in result["points"]]
    assert set(outcomes) == {(before, None, "reference"), (after, after, "learner")}, "before or after, both at once"
    assert {state["raw"] for state in result["points"]} == {before, after}, "importable without any recovery"
    assert outcomes == sorted(outcomes, key=lambda outcome: outcome[2] == "learner"), "once decided, it stays"
    assert len(outcomes) >= 40, "the sweep met many points"
    for state in result["points"]:
        assert state["then"]["owner"] == "learner" and state["left"] == [] and state["hints"] == {"01-double": 1}


@posix
def test_reset_killed_at_every_point(course, tmp_path):
    released.keep_notebooks(course.load())
    as_released = progress.digest_of(course.lesson("01").notebook.read_text(encoding="utf-8"))
    reference = progress.digest_of(course.lesson("01").package_file.read_text(encoding="utf-8"))
    course.solve("01")
    assert complete(course, "01").passed
    mine = progress.digest_of(course.lesson("01").notebook.read_text(encoding="utf-8"))
    learners = progress.digest_of(course.lesson("01").package_file.read_text(encoding="utf-8"))
    result = kill_everywhere("reset", course.root, tmp_path / "runs")
    outcomes = {(state["notebook"], state["package"], state["entry"]) for state in result["points"]}
    assert outcomes == {(mine, learners, learners), (as_released, reference, None)}
    assert all(state["left"] == [] for state in result["points"]) and len(result["points"]) >= 20


@posix
def test_recovery_killed_at_every_point(course, tmp_path):
    texts = {"tinytorch/core/scale.py": "X = 1\n", progress.FILE.as_posix(): progress.Progress({}, {"a": 1}).as_text()}
    writes = [{"path": path, "text": text} for path, text in texts.items()]
    (course.root / ".tito").mkdir()
    (course.root / ".tito" / "journal.json").write_text(json.dumps({"version": 1, "writes": writes}))
    result = kill_everywhere("recover", course.root, tmp_path / "runs")
    assert {state["package"] for state in result["points"]} == {progress.digest_of("X = 1\n")}
    assert all(state["hints"] == {"a": 1} and state["left"] == [] for state in result["points"])
    assert len(result["points"]) >= 10


COMPLETE = """
import sys
from pathlib import Path
from tito.course import manifest, transaction
course = manifest.load(Path(sys.argv[1]))
sys.exit(0 if transaction.complete(course, course.lesson("01")).passed else 1)
"""


@posix
def test_a_real_completion_killed_in_time_leaves_nothing(course, tmp_path):
    """The whole command with its kernel and tests, killed at times spread over its length."""
    course.solve("01")
    lesson = course.lesson("01")
    before = lesson.package_file.read_bytes()
    temporary = tmp_path / "t"
    temporary.mkdir()
    command = [sys.executable, "-c", COMPLETE, str(course.root)]
    env = os.environ | {"TMPDIR": str(temporary)}
    started, family = time.monotonic(), []
    for step in range(1, 9):
        process = subprocess.Popen(command, env=env)
        time.sleep(0.3 * step)
        family += psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        owner = progress.owner(lesson, progress.read(course.root))
        assert owner == "learner" or (owner, lesson.package_file.read_bytes()) == ("reference", before)
    assert subprocess.run(command, env=env).returncode == 0
    assert progress.owner(lesson, progress.read(course.root)) == "learner" and leftovers(course.root) == []
    deadline = time.monotonic() + 20
    while [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, "processes were left"
        time.sleep(0.1)
    assert time.monotonic() - started < 120
    assert imports(course.root, "scale.double(4)") == "8"


# --- the real course ---------------------------------------------------------------------------------------------


def test_lesson_01_of_the_real_course_goes_in_and_out(real_course):
    lesson = real_course.lesson("01")
    reference, as_released = lesson.package_file.read_bytes(), lesson.notebook.read_bytes()
    transaction.released.keep_notebooks(real_course.load())
    real_course.solve("01")
    result = complete(real_course, "01")
    assert result.passed, (result.run, result.tests, result.refusal)
    assert result.earned == lesson.points > 0
    assert result.tests.passed > 0 or not lesson.tests.is_dir()
    transaction.reset(real_course.load(), lesson)
    assert (lesson.package_file.read_bytes(), lesson.notebook.read_bytes()) == (reference, as_released)
