"""`tito module reset NN`: the lesson as released; the learner's notebook stays as a dated backup."""

from __future__ import annotations

from tito import show
from tito.course import transaction
from tito.course.manifest import Course


def reset(course: Course, name: str) -> int:
    """Bring notebook and package file back as released and say where the learner's notebook is kept."""
    lesson = course.lesson(name)
    result = transaction.reset(course, lesson)
    show.heading(f"Lesson {lesson.number}: {lesson.title}", "as it was released")
    show.line()
    rows = [("Notebook", str(lesson.notebook.relative_to(course.root)))]
    if result.backup:
        rows.append(("Yours", f"kept as {result.backup.relative_to(course.root)}"))
    now = "now: reference" if lesson.has_reference else "not there: yours to build"
    rows.append(("Package", f"{lesson.package_path.as_posix()} ({now})"))
    show.rows(rows)
    show.steps((f"tito module start {lesson.number}", "begin anew"))
    return 0
