"""`tito module complete NN`: test the lesson and, if all is well, put the learner's code into the package."""

from __future__ import annotations

from tito import show
from tito.course import transaction
from tito.course.manifest import Course, Lesson
from tito.student import test


def complete(course: Course, name: str, json: bool = False) -> int:
    """Show the run as `test` does, then what changed and what comes next; 0 only if the lesson is completed."""
    lesson = course.lesson(name)
    with show.Working("running your notebook", quiet=json) as working:
        result = transaction.complete(course, lesson, tell=working.tell)
    following = course.after(lesson)
    if json:
        changed = [path.as_posix() for path in result.written]
        more = {"changed": changed, "next": following.number if following else None}
        show.as_json({**test.as_json(lesson, result), **more})
        return 0 if result.passed else 1
    test.report(lesson, result)
    if not result.passed:
        show.line("Not completed: the package is as it was.")
        test.advise(lesson, result)
        return 1
    show.line()
    show.line(f"Lesson {lesson.number} is completed. {lesson.package_path.as_posix()} is now yours.", style="green")
    _next(lesson, following)
    return 0


def _next(lesson: Lesson, following: Lesson | None) -> None:
    if following:
        why = f"{following.title}, about {following.minutes} minutes"
        show.steps((f"tito module start {following.number}", why), ("tito status", "which files are yours"))
    else:
        show.steps(("tito demo", f"{lesson.title} was the last lesson: see it all run"))
