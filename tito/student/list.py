"""`tito module list`: the lessons, and how far the learner is with each."""

from __future__ import annotations

from tito import show
from tito.course.manifest import Course
from tito.student.standing import Standing, next_lesson, standings

HEADER = ("No.", "Name", "Lesson", "Minutes", "Points", "State")


def list_lessons(course: Course, json: bool = False) -> int:
    """Show every lesson in one row, then where to go on."""
    lessons = standings(course)
    if json:
        show.as_json({"course": course.name, "lessons": [standing.as_json() for standing in lessons]})
        return 0
    show.heading(course.name, f"{show.count(len(lessons), 'lesson')} in {course.root}")
    show.line()
    show.rows([_row(standing) for standing in lessons], HEADER, right=(3, 4))
    following = next_lesson(course, lessons)
    if following:
        show.steps((f"tito module start {following.number}", f"{following.title}, about {following.minutes} minutes"))
    return 0


def _row(standing: Standing) -> tuple[str, ...]:
    points = f"{standing.earned}/{standing.points}" if standing.state == "completed" else str(standing.points)
    state = "" if standing.state == "open" else standing.state
    return standing.number, standing.name, standing.title, str(standing.minutes), points, state
