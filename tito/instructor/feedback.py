"""`tito grade feedback`: one HTML page per student, in nbgrader's feedback/ folder."""

from __future__ import annotations

from datetime import UTC, datetime

from tito import show
from tito.course.errors import CourseError
from tito.course.files import write_atomic
from tito.instructor import assignment as assignments
from tito.instructor import hidden, pages
from tito.instructor.assignment import Assignment
from tito.instructor.course import GradingCourse
from tito.instructor.pages import number
from tito.instructor.result import Result
from tito.instructor.scores import CheckScore, Row, result_of, scores

LEFT_OUT = "A remark that quotes a hidden test is not shown here."


def feedback(course: GradingCourse, lesson: str, students: list[str]) -> int:
    """Write the pages of all submissions of a lesson, or of some students'."""
    assignment = assignments.load(course, lesson)
    rows = {row.student: row for row in scores(course, assignment)}
    wanted = list(dict.fromkeys(students)) or [student for student, row in rows.items() if row.total is not None]
    if not wanted:
        raise CourseError(
            f"The gradebook holds no grades of {assignment.name} yet.", f"`tito grade autograde {assignment.number}`."
        )
    lines, written = hidden.hidden_lines(assignment), 0
    for student in wanted:
        try:
            _write(course, assignment, student, rows.get(student), lines)
            written += 1
        except CourseError as error:  # this student's only: the others get theirs
            show.problem(f"{student}: {error.message}", error.hint)
    if written:
        place = course.feedback("STUDENT", assignment.name) / f"{assignment.notebook}.html"
        show.line(f"{show.count(written, 'page')} written: {place}")
    return 0 if written == len(wanted) else 1


def _write(course: GradingCourse, assignment: Assignment, student: str, row: Row | None, lines: frozenset) -> None:
    """One student's page."""
    if row is None:
        raise CourseError("the roster has no such student.", "`tito grade roster CSV` adds students.")
    if row.total is None:
        raise CourseError("no grades in the gradebook.", f"`tito grade autograde {assignment.number}` first.")
    result = result_of(course, assignment, row)
    path = course.grading(assignment.name) / "results" / f"{student}.json"
    graded = datetime.fromtimestamp(int(path.stat().st_mtime), UTC)
    write_atomic(
        course.feedback(student, assignment.name) / f"{assignment.notebook}.html",
        page(assignment, row, result, graded, lines),
    )


def page(assignment: Assignment, row: Row, result: Result, graded: datetime, lines: frozenset[str]) -> str:
    """The page: points as the gradebook has them, messages as grading wrote them, and no line of a hidden test."""
    grades = {check.id: check for check in result.checks}
    titles = assignment.titles
    return pages.render(
        "feedback.html",
        number=assignment.number, lesson=assignment.title, name=row.name, student=row.student,
        total=number(row.total), most=number(row.max), remarks=_remarks(row),
        problem=hidden.for_students(result.problem or "", lines, "The run stopped early."),
        checks=[_check(check, grades.get(check.id), assignment, lines) for check in row.checks],
        comments=[(titles.get(f"{hole}-test", hole), comment) for hole, comment in row.comments.items()],
        findings=[hidden.for_students(text, lines, LEFT_OUT) for text in result.findings],
        graded=f"{graded:%Y-%m-%d %H:%M} UTC", release=result.release[:12],
    )  # fmt: skip


def _check(score: CheckScore, grade, assignment: Assignment, lines: frozenset[str]) -> dict:
    """One row of the table, and what there is to say about a check that failed."""
    failed = grade is not None and (grade.earned < grade.points or grade.message)
    return {
        "title": assignment.titles.get(score.id, score.id),
        "state": "by hand" if grade is None else "passed" if not failed else "partly" if grade.earned else "failed",
        "earned": number(score.earned),
        "max": number(score.max),
        "by_hand": _by_hand(score),
        "message": hidden.for_students(grade.message or "This check failed.", lines) if failed else "",
        "hint": assignment.hints.get(score.id, "") if failed else "",
    }


def _by_hand(score: CheckScore) -> str:
    """What a person changed."""
    changes = []
    if score.manual is not None:
        changes.append(f"set by hand to {number(score.manual)} (the check gave {number(score.auto or 0.0)})")
    if score.extra:
        changes.append(f"{number(score.extra)} extra")
    return "; ".join(changes)


def _remarks(row: Row) -> list[str]:
    """What else bears on the total."""
    remarks = []
    if row.late_seconds:
        cost = f"; {number(row.penalty)} points are taken off for it" if row.penalty else ""
        remarks.append(f"Handed in {pages.span(row.late_seconds)} late{cost}.")
    if row.needs_manual_grade:
        remarks.append("A person will still look at some of these points.")
    return remarks
