"""How far the learner is with each lesson: what `list`, `status` and `start` show."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tito.course import notebook, progress, released
from tito.course.manifest import Course, Lesson

NOT_YET = ("NotImplementedError", "still to be written")  # what a hole says as it is released
WHOSE = {name: name for name in ("reference", "changed", "missing", "to build")} | {"learner": "yours"}


@dataclass(frozen=True)
class Standing:
    """One lesson as the learner has it."""

    number: str
    name: str
    title: str
    minutes: int
    points: int
    earned: int
    state: str  # open, started, completed
    file: str
    owner: str  # learner, reference, changed, missing, to build (in a class that is graded)
    notebook: str

    @property
    def whose(self) -> str:
        return WHOSE[self.owner]

    def as_json(self) -> dict:
        return asdict(self)


def standings(course: Course) -> list[Standing]:
    """All lessons, in order."""
    released.keep_notebooks(course)  # as early as can be: what was never kept cannot be brought back
    known = progress.read(course.root)
    return [_standing(lesson, known) for lesson in course.lessons]


def _standing(lesson: Lesson, known: progress.Progress) -> Standing:
    entry = known.lessons.get(lesson.number)
    absent = "missing" if entry or lesson.has_reference else "to build"
    owner = progress.owner(lesson, known) if lesson.package_file.is_file() else absent
    state = "completed" if entry else "started" if was_edited(lesson) else "open"
    return Standing(
        lesson.number, lesson.name, lesson.title, lesson.minutes, lesson.points,
        entry.points if entry else 0, state, lesson.package_path.as_posix(), owner,
        lesson.notebook.relative_to(lesson.root).as_posix(),
    )  # fmt: skip


def was_edited(lesson: Lesson) -> bool:
    """Is there a notebook, and another than the one that was released?"""
    return lesson.notebook.is_file() and not released.is_unchanged(lesson)


def unwritten(lesson: Lesson) -> list[str]:
    """Grade ids of the holes that are as they were released, in order."""
    cells = notebook.read(lesson.notebook)
    return [cell.grade_id for cell in cells if cell.is_hole and all(word in cell.source for word in NOT_YET)]


def next_lesson(course: Course, all_standings: list[Standing]) -> Lesson | None:
    """Where to go on: the first lesson that is begun and not completed, else the first one that is open."""
    for state in ("started", "open"):
        for standing in all_standings:
            if standing.state == state:
                return course.lesson(standing.number)
    return None
