"""`tito status`: which files of the package are the learner's, which are the reference, and where to go on."""

from __future__ import annotations

from tito import show
from tito.course.manifest import Course
from tito.student.standing import Standing, next_lesson, standings

MEANING = {
    "changed": "was edited or replaced since; `tito module complete {number}` exports your notebook again, "
    "`tito module reset {number}` brings the reference back",
    "missing": "is gone; `tito module complete {number}` or `tito module reset {number}` brings it back",
}


def status(course: Course, json: bool = False) -> int:
    """Show who wrote each file of the package, the points so far, and the next step."""
    lessons = standings(course)
    done = [standing for standing in lessons if standing.state == "completed"]
    earned, points = sum(s.earned for s in done), sum(s.points for s in lessons)
    if json:
        totals = {"completed": len(done), "lessons": len(lessons), "earned": earned, "points": points}
        files = [standing.as_json() for standing in lessons]
        show.as_json({"course": course.name, "root": str(course.root), "totals": totals, "files": files})
        return 0
    show.heading(course.name, str(course.root))
    show.line()
    show.rows([(s.number, s.file, s.whose, _remark(s)) for s in lessons], ("No.", "File", "Whose", ""))
    show.line()
    show.line(f"{len(done)} of {len(lessons)} lessons completed, {earned} of {show.count(points, 'point')}.")
    for standing in lessons:
        if standing.owner in MEANING:
            show.line(f"{standing.file} {MEANING[standing.owner].format(number=standing.number)}.")
    _next(course, lessons)
    return 0


def _remark(standing: Standing) -> str:
    if standing.state == "completed":
        return f"completed, {standing.earned}/{standing.points} points"
    return "notebook begun" if standing.state == "started" else ""


def _next(course: Course, lessons: list[Standing]) -> None:
    following = next_lesson(course, lessons)
    if following is None:
        show.steps(("tito demo", "you have built all of it: see it run"))
    elif next(s for s in lessons if s.number == following.number).state == "started":
        show.steps((f"tito module test {following.number}", f"see how far your {following.title} is"))
    else:
        show.steps((f"tito module start {following.number}", f"{following.title}: {following.summary}"))
