"""What a learner has done: completed lessons and taken hints, in `.tito/progress.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from tito.course.errors import CourseError
from tito.course.files import write_atomic
from tito.course.journal import STATE, locked, recover, remove_leftovers
from tito.course.manifest import Lesson

FILE = Path(STATE) / "progress.json"
VERSION = 1
ORIGIN = "Exported from {notebook} by `tito module complete {number}`: change it there, not here."
MADE_BY_LEARNER = "by `tito module complete"  # in the head of a file that ORIGIN went into


@dataclass(frozen=True)
class Entry:
    """One completed lesson. `digest` is the SHA-256 of the package file that was exported then."""

    completed: str
    points: int
    of: int
    digest: str


@dataclass(frozen=True)
class Progress:
    """Entries by the lesson's number, and how many hints were taken by the exercise's id (`01-matmul`)."""

    lessons: dict[str, Entry] = field(default_factory=dict)
    hints: dict[str, int] = field(default_factory=dict)

    def completed(self, lesson: Lesson, points: int, text: str) -> Progress:
        """This progress, and `lesson` completed now with the package file `text`."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        entry = Entry(now, points, lesson.points, digest_of(text))
        return replace(self, lessons=self.lessons | {lesson.number: entry})

    def without(self, lesson: Lesson) -> Progress:
        """This progress, and `lesson` not completed."""
        return replace(self, lessons={n: entry for n, entry in self.lessons.items() if n != lesson.number})

    def hinted(self, exercise: str, count: int) -> Progress:
        """This progress, and `count` hints taken for the exercise."""
        return replace(self, hints=self.hints | {exercise: count})

    def as_text(self) -> str:
        lessons = {number: vars(entry) for number, entry in sorted(self.lessons.items())}
        content = {"version": VERSION, "lessons": lessons, "hints": dict(sorted(self.hints.items()))}
        return json.dumps(content, indent=1) + "\n"


def read(root: Path) -> Progress:
    """The progress in the course at `root`; none yet is an empty one, a damaged file a CourseError."""
    recover(root)
    return read_locked(root)


def read_locked(root: Path) -> Progress:
    """`read`, for one who holds the lock."""
    path = root / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise CourseError(
                f"{path} is of version {content['version']}, and this tito knows version {VERSION}.",
                "Use the version of tito that wrote it, or update this one.",
            )
        lessons = {number: Entry(**entry) for number, entry in content["lessons"].items()}
        hints = {str(exercise): int(count) for exercise, count in content["hints"].items()}
        return Progress(lessons, hints)
    except FileNotFoundError:
        return Progress()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CourseError(
            f"{path} cannot be read ({type(error).__name__}: {error}).",
            "Your notebooks and your files in tinytorch/ are as they were. Mend the file, or rename it and run "
            "`tito module complete` again for the lessons you have done.",
        ) from None


def update(root: Path, change: Callable[[Progress], Progress]) -> Progress:
    """Read, change and write the progress as one step, also beside other tito commands."""
    recover(root)
    with locked(root):
        progress = change(read_locked(root))
        remove_leftovers(root / FILE)
        write_atomic(root / FILE, progress.as_text())
        return progress


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def owner(lesson: Lesson, progress: Progress) -> str:
    """Whose the lesson's package file is: "learner", "reference", or "changed" by other means (or missing)."""
    text = package_text(lesson)
    entry = progress.lessons.get(lesson.number)
    if entry is not None and text is not None and digest_of(text) == entry.digest:
        return "learner"
    return "reference" if entry is None and is_reference(text) else "changed"


def package_text(lesson: Lesson) -> str | None:
    """The text of the lesson's package file, None where there is none that could be read."""
    try:
        return lesson.package_file.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return None


def is_reference(text: str | None) -> bool:
    """Whether a package file is one that was there from the start: no `tito module complete` wrote it."""
    return text is not None and MADE_BY_LEARNER not in text[:2000]
