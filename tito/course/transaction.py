"""A lesson into the package, and back: tested in a scratch copy, then swapped in with the progress, all or nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from tito.course import notebook, progress, released, runner
from tito.course.errors import CourseError
from tito.course.export import module_source
from tito.course.journal import COMMAND, STATE, commit, locked, recover
from tito.course.manifest import Course, Lesson
from tito.course.processes import remove_tree

Tell = Callable[[str], None]  # hears one sentence at the beginning of each step


@dataclass(frozen=True)
class Completion:
    """How far a lesson came. `refusal` is why it could not be exported; `tests` is None where none were run."""

    lesson: Lesson
    run: runner.Run
    tests: runner.TestRun | None = None
    refusal: CourseError | None = None
    next: Lesson | None = None
    written: tuple[Path, ...] = ()  # relative to the course root; empty where nothing was swapped in
    text: str = ""  # the package file that the notebook gives

    @property
    def passed(self) -> bool:
        return self.run.passed and self.refusal is None and self.tests is not None and self.tests.ok

    @property
    def earned(self) -> int:
        return self.run.earned

    @property
    def of(self) -> int:
        return self.run.points


@dataclass(frozen=True)
class Reset:
    """What a reset did: where the learner's notebook was kept (None: there was nothing of theirs), what it wrote."""

    lesson: Lesson
    backup: Path | None
    written: tuple[Path, ...]


def check(course: Course, lesson: Lesson, tell: Tell = lambda step: None, limits=None) -> Completion:
    """Run the notebook's checks and, if all pass, the progressive tests on a scratch copy. Changes nothing."""
    recover(course.root)
    released.keep_notebooks(course)
    with _scratch(course.root) as scratch:
        # What is run is what is exported, even if the learner saves the notebook in the meantime.
        copy = scratch / lesson.notebook.name
        notebook.load_json(lesson.notebook)
        shutil.copyfile(lesson.notebook, copy)
        cells = notebook.read(copy)
        tell(f"Running {lesson.notebook.relative_to(course.root).as_posix()} in a fresh kernel.")
        run = runner.run_notebook(lesson, copy, course.root, limits)
        result = Completion(lesson, run, next=course.after(lesson))
        if not run.passed:
            return result
        origin = progress.ORIGIN.format(
            notebook=lesson.notebook.relative_to(course.root).as_posix(), number=lesson.number
        )
        try:
            text = module_source(lesson, cells, origin)
        except CourseError as error:
            return replace(result, refusal=error)
        tell(f"Testing {lesson.package_path.as_posix()} with the rest of the package.")
        return replace(result, text=text, tests=_try_out(course, lesson, text, scratch, limits))


def complete(course: Course, lesson: Lesson, tell: Tell = lambda step: None, limits=None) -> Completion:
    """`check`, and where all passes put the learner's file into the package and write the progress, all or nothing."""
    with locked(course.root, COMMAND, patience=2.0):
        result = check(course, lesson, tell, limits)
        if not result.passed:
            return result
        tell(f"Putting {lesson.package_path.as_posix()} in place.")
        with locked(course.root):
            old = progress.package_text(lesson)
            now = progress.read_locked(course.root).completed(lesson, result.earned, result.text)
            texts = {lesson.package_path: result.text, progress.FILE: now.as_text()}
            kept = released.kept_reference(lesson)
            if progress.is_reference(old) and not (course.root / kept).exists():
                texts = {kept: old, **texts}
            commit(course.root, texts)
        return replace(result, written=tuple(texts))


def reset(course: Course, lesson: Lesson) -> Reset:
    """The notebook as released, the package file back to the reference (or gone, where a class is graded and has none),
    no entry in the progress; all or nothing.

    The learner's notebook is kept beside it with the date in its name; hints that were taken stay taken.
    """
    with locked(course.root, COMMAND, patience=2.0):
        recover(course.root)
        now = progress.read(course.root)
        texts: dict[Path, str | None] = {lesson.notebook.relative_to(course.root): released.notebook(lesson)}
        if not lesson.has_reference:
            texts |= {lesson.package_path: None} if lesson.package_file.exists() else {}
        elif progress.owner(lesson, now) != "reference":
            texts[lesson.package_path] = released.reference(lesson)
            kept = released.kept_reference(lesson)  # the next one is kept anew: the course may have changed by then
            texts |= {kept: None} if (course.root / kept).exists() else {}
        backup = _keep_backup(lesson, texts[lesson.notebook.relative_to(course.root)])
        with locked(course.root):
            now = progress.read_locked(course.root)
            if lesson.number in now.lessons:
                texts[progress.FILE] = now.without(lesson).as_text()
            commit(course.root, texts)
        return Reset(lesson, backup, tuple(texts))


def _keep_backup(lesson: Lesson, as_released: str) -> Path | None:
    """Copy the learner's notebook, byte by byte, unless it is as released or gone."""
    path = lesson.notebook
    if not path.exists() or path.read_bytes() == as_released.encode("utf-8"):
        return None
    folder = path.parent / "backups"
    folder.mkdir(exist_ok=True)
    stem = f"{path.stem}-{datetime.now():%Y%m%d-%H%M%S}"
    names = [f"{stem}.ipynb", *(f"{stem}-{n}.ipynb" for n in range(2, 1000))]
    backup = next(folder / name for name in names if not (folder / name).exists())
    shutil.copyfile(path, backup)
    return backup


def _try_out(course: Course, lesson: Lesson, text: str, scratch: Path, limits) -> runner.TestRun:
    """The progressive tests, with `text` in place of the lesson's file in a copy of the package."""
    package = scratch / "tinytorch"
    shutil.copytree(course.root / "tinytorch", package, ignore=shutil.ignore_patterns("__pycache__", "*.tmp"))
    target = scratch / lesson.package_path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8", newline="\n")
    return runner.run_progressive(course.touched_by(lesson), scratch, limits, _importers(course, lesson, scratch))


def _importers(course: Course, lesson: Lesson, scratch: Path) -> list[Lesson]:
    """The lesson and all that build on it: files that must still import once its file has changed."""
    names = {lesson.name}
    for other in course.lessons:
        if names & set(other.needs):
            names.add(other.name)
    return [other for other in course.lessons if other.name in names and (scratch / other.package_path).is_file()]


@contextmanager
def _scratch(root: Path) -> Iterator[Path]:
    """A folder in .tito for this process; those that killed processes left are removed on the way."""
    import psutil

    (root / STATE).mkdir(exist_ok=True)
    for old in (root / STATE).glob("scratch-*"):
        number = old.name.split("-")[1]
        if not (number.isdigit() and psutil.pid_exists(int(number))):
            remove_tree(old)
    folder = Path(tempfile.mkdtemp(dir=root / STATE, prefix=f"scratch-{os.getpid()}-"))
    try:
        yield folder
    finally:
        remove_tree(folder)
