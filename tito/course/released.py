"""The course as it was released: notebooks and reference files, kept aside so that `reset` can bring them back.

It needs neither src/ nor git, but asks git where nothing was kept (a notebook changed before tito ever ran).
"""

from __future__ import annotations

import hashlib
import subprocess
from contextlib import suppress
from pathlib import Path

from tito.course.errors import CourseError
from tito.course.files import write_atomic
from tito.course.journal import STATE, locked, remove_leftovers
from tito.course.manifest import Course, Lesson
from tito.course.progress import is_reference


def keep_notebooks(course: Course) -> None:
    """Keep a copy of each notebook that is still as released. `start`, `test` and `complete` call this first."""
    missing = [lesson for lesson in course.lessons if not _is_released(lesson, _read(kept_notebook(lesson)))]
    texts = {kept_notebook(lesson): _read(lesson.notebook) for lesson in missing if is_unchanged(lesson)}
    if texts:
        with locked(course.root):
            for path, text in texts.items():
                remove_leftovers(path)
                write_atomic(path, text)


def kept_notebook(lesson: Lesson) -> Path:
    return lesson.root / STATE / "pristine" / f"{lesson.number}.ipynb"


def kept_reference(lesson: Lesson) -> Path:
    """Where the reference file lies, relative to the root, while the learner's own is in its place."""
    return Path(STATE) / "reference" / lesson.package_path.relative_to("tinytorch")


def notebook(lesson: Lesson) -> str:
    """The notebook as released: the kept copy, or the one in modules/, or git's; else a CourseError."""
    candidates = (
        lambda: _read(kept_notebook(lesson)),
        lambda: _read(lesson.notebook),
        lambda: _from_git(lesson.root, lesson.notebook.relative_to(lesson.root)),
    )
    for candidate in candidates:
        text = candidate()
        if _is_released(lesson, text):
            return text
    raise CourseError(
        f"The released notebook of lesson {lesson.folder} is not at hand: no copy was kept, and git has none.",
        f"Take {lesson.notebook.name} from a fresh download of the course. Nothing was changed.",
    )


def reference(lesson: Lesson) -> str:
    """The reference file of the package: the kept copy, or git's; else a CourseError."""
    candidates = (
        lambda: _read(lesson.root / kept_reference(lesson)),
        lambda: _from_git(lesson.root, lesson.package_path),
    )
    for candidate in candidates:
        text = candidate()
        if is_reference(text):
            return text
    raise CourseError(
        f"The reference of {lesson.package_path.as_posix()} is not at hand: no copy was kept, and git has none.",
        "Take the file from a fresh download of the course. Nothing was changed.",
    )


def is_unchanged(lesson: Lesson) -> bool:
    """Is the notebook in modules/ the one that was released? Line ends do not count."""
    return _is_released(lesson, _read(lesson.notebook))


def _is_released(lesson: Lesson, text: str | None) -> bool:
    return text is not None and hashlib.sha256(text.encode("utf-8")).hexdigest() == lesson.notebook_digest


def _read(path: Path) -> str | None:
    """The text of a file with plain line ends (git may have changed them), or None."""
    with suppress(OSError, UnicodeDecodeError):
        return path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    return None


def _from_git(root: Path, path: Path) -> str | None:
    """The file as committed last, or None."""
    with suppress(OSError, UnicodeDecodeError, subprocess.SubprocessError):
        shown = subprocess.run(
            ["git", "show", f"HEAD:./{path.as_posix()}"],
            cwd=root, capture_output=True, stdin=subprocess.DEVNULL, timeout=20, check=True,
        )  # fmt: skip
        return shown.stdout.decode("utf-8").replace("\r\n", "\n")
    return None
