"""`tito grade release`: source and release versions of lessons, the gradebook, and the folder that students get."""

from __future__ import annotations

from pathlib import Path

from tito import show
from tito.course import manifest, source, student_version
from tito.course.errors import CourseError
from tito.course.files import write_atomic
from tito.course.manifest import Course, Lesson
from tito.course.processes import TITO_HOME
from tito.instructor import assignment, registration, student_folder
from tito.instructor.course import GradingCourse
from tito.instructor.freeze import freeze
from tito.instructor.nbgrader_setup import nbgrader_ready


def release(course: GradingCourse, lesson_text: str, upto: bool, out: Path | None) -> int:
    """Release a lesson, with `upto` every lesson before it too, and say where things are."""
    lessons = chosen(repository(), lesson_text, upto)
    folder = (out or course.root / "student").absolute()
    with show.Working("reading the lessons") as working, nbgrader_ready():
        kept = make(course, lessons, folder, tell=working.tell)
    released = [assignment.read(course.frozen(lesson.folder)) for lesson in lessons]
    show.heading("Released", str(course.root))
    table = [(a.name, a.title, f"{a.max_score:g}", str(len(a.checks))) for a in released]
    show.rows(table, ("Assignment", "Lesson", "Points", "Checks"), right=(2, 3))
    show.line()
    show.line(f"Students get {folder}: hand out this folder, e.g. as a zip file.")
    if kept:
        show.line(f"The folder that was there had been worked in; it is kept as {kept}.")
    for name in outdated(course, lessons[0].root):
        show.line(
            f"{name} is not as it was released: src/ has changed. `tito grade release {name}` brings it up to date."
        )
    show.steps((f"tito grade collect {lessons[-1].number} PATH", "when work was handed in"))
    return 0


def repository() -> Path:
    """The maintainers' repository: the current folder's, else the one that tito was installed from."""
    try:
        return source.find_root()
    except CourseError:
        if (TITO_HOME / "src" / "course.toml").is_file():
            return TITO_HOME
        raise CourseError(
            "A release is built from src/, and neither the current folder nor tito's own holds it.",
            'Install tito from the maintainers\' repository (`pip install -e ".[grade]"` there), or run this command '
            "in the repository with --course.",
        ) from None


def chosen(root: Path, lesson_text: str, upto: bool) -> list[Lesson]:
    """The lessons to release, in order."""
    course = manifest.load(root)
    lesson = course.lesson(lesson_text)
    return list(course.lessons[: course.lessons.index(lesson) + 1]) if upto else [lesson]


def make(course: GradingCourse, lessons: list[Lesson], folder: Path, tell=lambda step: None) -> Path | None:
    """Release `lessons` and put the students' folder at `folder`; returns where an old one is kept, if it was used.

    All that can be wrong is found before anything is written. The frozen assignment comes last: a lesson that has it
    is released, and a release that was stopped is made whole by running it again.
    """
    student_folder.require_ours(folder)
    frozen = []
    for lesson in lessons:
        tell(f"freezing {lesson.folder}")
        frozen.append(freeze(lesson))
    for new in frozen:
        registration.require_same_cells(course, new)
    everything = manifest.load(lessons[0].root)
    graded = {*course.released(), *(lesson.folder for lesson in lessons)}
    tell("building the students' folder")
    files = student_folder.contents(everything, upto_highest(everything, graded), graded)
    tell("entering the cells in the gradebook")
    for lesson, new in zip(lessons, frozen):
        registration.register(course, lesson)
        notebook = f"{new.notebook}.ipynb"
        write_atomic(course.source(new.name) / notebook, student_version.as_text(source.notebook_of(lesson), lesson))
        write_atomic(course.release(new.name) / notebook, student_version.notebook_text(lesson))
    kept = student_folder.put(files, folder)
    for new in frozen:
        assignment.save(course, new)
    return kept


def upto_highest(course: Course, graded: set[str]) -> list[Lesson]:
    """The lessons up to the highest one that is released."""
    highest = max(n for n, lesson in enumerate(course.lessons) if lesson.folder in graded)
    return list(course.lessons[: highest + 1])


def outdated(course: GradingCourse, root: Path) -> list[str]:
    """Names of released assignments whose notebook is another one in src/ now."""
    known = {lesson.folder: lesson for lesson in manifest.load(root).lessons}
    pairs = [(known[name], course.release(name)) for name in course.released() if name in known]
    return [
        lesson.folder
        for lesson, folder in pairs
        if not (folder / f"{lesson.name}.ipynb").is_file()
        or (folder / f"{lesson.name}.ipynb").read_text(encoding="utf-8") != student_version.notebook_text(lesson)
    ]
