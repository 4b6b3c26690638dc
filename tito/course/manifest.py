"""Which lessons there are, and where each thing of a lesson lies.

Student commands read `modules/index.json`, which the build derives from src/course.toml, the notebooks and the
exercises. So they behave the same in a clone and in a release, which has no src/.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path

from tito.course.errors import CourseError

INDEX = Path("modules") / "index.json"
# folders and files of the package that are built from no lesson
UNTAUGHT = (
    "tinytorch/viewer",
    "tinytorch/demo",
    "tinytorch/models/architectures.py",
    "tinytorch/models/checkpoint.py",
    "tinytorch/models/safetensors.py",
    "tinytorch/models/tokenizer",
)


@dataclass(frozen=True)
class Exercise:
    """One hole of a lesson. `exports` are the public names that its cell gives to the package."""

    id: str
    title: str
    hints: tuple[str, ...]
    exports: tuple[str, ...] = ()


@dataclass(frozen=True)
class Check:
    """One graded cell of a lesson. `digest` is the SHA-256 of its source as the student gets it."""

    id: str
    title: str
    points: int
    digest: str


@dataclass(frozen=True)
class Lesson:
    """One lesson, as the index tells it."""

    number: str
    name: str
    title: str
    summary: str
    target: str
    needs: tuple[str, ...]
    minutes: int
    points: int
    exports: tuple[str, ...] = ()
    exercises: tuple[Exercise, ...] = ()
    checks: tuple[Check, ...] = ()
    notebook_digest: str = ""  # SHA-256 of the notebook's bytes as released
    has_reference: bool = True  # False in a class that is graded: the package file is there once a student built it
    root: Path = field(default=Path("."), compare=False)

    @property
    def folder(self) -> str:
        return f"{self.number}_{self.name}"

    @property
    def notebook(self) -> Path:
        return self.root / "modules" / self.folder / f"{self.name}.ipynb"

    @property
    def module(self) -> str:
        """Dotted name to import: tinytorch.core.tensor."""
        return f"tinytorch.{self.target}"

    @property
    def package_path(self) -> Path:
        """Where the lesson's file lies, relative to the course root: tinytorch/core/tensor.py."""
        return Path("tinytorch", *self.target.split(".")).with_suffix(".py")

    @property
    def package_file(self) -> Path:
        return self.root / self.package_path

    @property
    def tests(self) -> Path:
        return self.root / "tests" / self.folder

    @property
    def source(self) -> Path:
        """The maintainer's source; absent in an instructor's release."""
        return self.root / "src" / self.folder / f"{self.folder}.py"

    def exercise(self, text: str) -> Exercise:
        """The exercise called `text` ("matmul" or "01-matmul"); an unknown one suggests the nearest."""
        wanted = text.removeprefix(f"{self.number}-").lower()
        for exercise in self.exercises:
            if exercise.id == wanted:
                return exercise
        ids = [exercise.id for exercise in self.exercises]
        raise CourseError(
            f"Lesson {self.folder} has no exercise '{text}'.{_nearest(wanted, ids)}",
            f"Its exercises are: {', '.join(ids)}.",
        )


@dataclass(frozen=True)
class Course:
    """All lessons in their order, and the folder they lie in."""

    root: Path
    name: str
    id: str
    lessons: tuple[Lesson, ...]

    def lesson(self, text: str) -> Lesson:
        """The lesson called `17`, `17_memoization` or `memoization`; an unknown one suggests the nearest."""
        wanted = str(text).strip().lower()
        number = wanted.zfill(2) if wanted.isdigit() else None
        for lesson in self.lessons:
            if wanted in (lesson.folder, lesson.name) or number == lesson.number:
                return lesson
        names = [n for lesson in self.lessons for n in (lesson.number, lesson.name, lesson.folder)]
        raise CourseError(
            f"There is no lesson '{text}'.{_nearest(number or wanted, names)}",
            "`tito module list` shows all lessons.",
        )

    def after(self, lesson: Lesson) -> Lesson | None:
        """The lesson that follows, or None at the end."""
        following = self.lessons[self.lessons.index(lesson) + 1 :]
        return following[0] if following else None

    def touched_by(self, lesson: Lesson) -> list[Lesson]:
        """Lessons up to `lesson` whose progressive tests its file can change: itself and what needs it."""
        touched = {lesson.name}
        upto = self.lessons[: self.lessons.index(lesson) + 1]
        for other in upto:
            if touched & set(other.needs):
                touched.add(other.name)
        return [other for other in upto if other.name in touched]


def _nearest(wanted: str, names: list[str]) -> str:
    close = difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def find_root(start: Path | None = None) -> Path:
    """The course root: the nearest folder from `start` (default: the current one) upwards that holds the index."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / INDEX).is_file():
            return folder
    raise CourseError(
        f"No course here: neither {here} nor a folder above it holds {INDEX.as_posix()}.",
        "Change into the folder of the course (the one with modules/ and tinytorch/) and try again.",
    )


def load(root: Path | None = None) -> Course:
    """The course that lies at `root`, by default the one that the current folder is in."""
    root = root or find_root()
    path = root / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        lessons = tuple(_lesson(entry, root) for entry in index["lessons"])
        return Course(root, index["course"]["name"], index["course"]["id"], lessons)
    except FileNotFoundError:
        raise CourseError(f"{path} is missing.", "Restore it, e.g. `git checkout modules/index.json`.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CourseError(
            f"{path} cannot be read: {error!r}.", "Restore it, e.g. `git checkout modules/index.json`."
        ) from None


def _lesson(entry: dict, root: Path) -> Lesson:
    fields = dict(entry)
    fields["exercises"] = tuple(
        Exercise(e["id"], e["title"], tuple(e["hints"]), tuple(e["exports"])) for e in entry["exercises"]
    )
    fields["checks"] = tuple(Check(**check) for check in entry["checks"])
    fields["needs"], fields["exports"] = tuple(entry["needs"]), tuple(entry["exports"])
    return Lesson(**fields, root=root)
