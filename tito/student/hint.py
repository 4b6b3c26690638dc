"""`tito module hint NN [exercise]`: one step further each time."""

from __future__ import annotations

from tito import show
from tito.course import progress
from tito.course.errors import CourseError
from tito.course.manifest import Course, Lesson
from tito.student.standing import unwritten


def hint(course: Course, name: str, exercise: str | None = None, json: bool = False) -> int:
    """Show one more hint of `exercise`; without one, list the exercises and how many hints were taken."""
    lesson = course.lesson(name)
    if exercise is None:
        return _overview(course, lesson, json)
    chosen = lesson.exercise(exercise)
    if not chosen.hints:
        raise CourseError(f"There are no hints for {chosen.id}.", "Look at the example in its docstring.")
    taken = _take(course, f"{lesson.number}-{chosen.id}", len(chosen.hints))
    if json:
        shown = list(chosen.hints[:taken])
        show.as_json({"lesson": lesson.number, "exercise": chosen.id, "hints": shown, "of": len(chosen.hints)})
        return 0
    show.heading(f"Exercise {lesson.number}-{chosen.id}: {chosen.title}", f"hint {taken} of {len(chosen.hints)}")
    show.line()
    for number, text in enumerate(chosen.hints[:taken], start=1):
        style = None if number == taken else "dim"
        show.line(show.wrapped(text, f"  {number}. "), style=style)
    if taken < len(chosen.hints):
        show.steps((f"tito module hint {lesson.number} {chosen.id}", "one step further"))
    else:
        show.steps((f"tito module test {lesson.number}", "that was the last hint: try it"))
    return 0


def _take(course: Course, grade_id: str, most: int) -> int:
    """Take one more hint of `most`, and return how many were taken by now."""

    def one_more(known: progress.Progress) -> progress.Progress:
        return known.hinted(grade_id, min(known.hints.get(grade_id, 0) + 1, most))

    return progress.update(course.root, one_more).hints[grade_id]


def _overview(course: Course, lesson: Lesson, json: bool) -> int:
    """The exercises, which are written, and how many hints were taken."""
    empty = unwritten(lesson)
    taken = progress.read(course.root).hints
    ids = [f"{lesson.number}-{exercise.id}" for exercise in lesson.exercises]
    rows = [(e, i not in empty, taken.get(i, 0)) for e, i in zip(lesson.exercises, ids)]
    if json:
        found = [
            {"exercise": e.id, "title": e.title, "written": done, "hints_taken": taken, "hints": len(e.hints)}
            for e, done, taken in rows
        ]
        show.as_json({"lesson": lesson.number, "exercises": found})
        return 0
    show.heading(f"Lesson {lesson.number}: {lesson.title}", "exercises")
    show.line()
    table = [(e.id, e.title, "written" if done else "to do", f"{taken} of {len(e.hints)}") for e, done, taken in rows]
    show.rows(table, ("Exercise", "Title", "State", "Hints taken"))
    undone = [e for e, done, _ in rows if not done]
    if undone:
        show.steps((f"tito module hint {lesson.number} {undone[0].id}", f"{undone[0].title}: where to look"))
    else:
        show.steps((f"tito module test {lesson.number}", "see which checks pass"))
    return 0
