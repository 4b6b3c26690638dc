"""Points as the gradebook has them now, read for feedback, export and report: manual changes count."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime

from tito.course.errors import CourseError
from tito.instructor import autograded
from tito.instructor.assignment import Assignment
from tito.instructor.course import GradingCourse
from tito.instructor.result import Result, from_text


@dataclass(frozen=True)
class CheckScore:
    """One check. `manual`, where a person gave one, stands in place of `auto`; `extra` comes on top of either."""

    id: str
    auto: float | None
    manual: float | None
    extra: float
    max: float

    @property
    def earned(self) -> float:
        return (self.auto or 0.0 if self.manual is None else self.manual) + self.extra


@dataclass(frozen=True)
class Row:
    """One student and one assignment. Without a submission there are no checks, and `total` is None."""

    student: str
    first_name: str
    last_name: str
    email: str
    lms_id: str
    max: float
    submitted: datetime | None = None  # UTC, where the time is known
    checks: tuple[CheckScore, ...] = ()
    total: float | None = None  # what counts: extra credit is in it, the penalty for being late is off
    penalty: float = 0.0
    late_seconds: float = 0.0
    needs_manual_grade: bool = False
    comments: dict[str, str] = field(default_factory=dict)  # grade id of a hole -> what a person wrote to it
    grading: dict = field(default_factory=dict)  # how it was graded: result, release, sandbox, job, flags

    @property
    def name(self) -> str:
        return " ".join(filter(None, [self.first_name, self.last_name])) or self.student

    @property
    def sandbox(self) -> str:
        return str(self.grading.get("sandbox", ""))

    @property
    def flags(self) -> tuple[str, ...]:
        flags = self.grading.get("flags", [])
        return tuple(map(str, flags)) if isinstance(flags, list) else ()


def scores(course: GradingCourse, assignment: Assignment) -> list[Row]:
    """One row per student of the roster, by last name; those who handed nothing in as well."""
    from tito.instructor.nbgrader_setup import open_gradebook

    with open_gradebook(course) as gradebook:
        from nbgrader.api import Assignment as Released
        from nbgrader.api import SubmittedAssignment

        released = gradebook.db.query(Released).filter_by(name=assignment.name).one_or_none()
        if released is None:
            raise CourseError(
                f"{assignment.name} is not in {course.gradebook}.",
                f"`tito grade release {assignment.number}` brings it there.",
            )
        submissions = gradebook.db.query(SubmittedAssignment).filter_by(assignment_id=released.id)
        by_student = {submission.student_id: submission for submission in submissions}
        students = sorted(gradebook.students, key=lambda s: (s.last_name or "", s.first_name or "", s.id))
        return [_row(course, assignment, student, by_student.get(student.id), released) for student in students]


def _row(course: GradingCourse, assignment: Assignment, student, submission, released) -> Row:
    """What the gradebook says about one student."""
    person = (student.id, student.first_name or "", student.last_name or "", student.email or "")
    known = Row(*person, student.lms_user_id or "", float(released.max_score))
    notebook = next((n for n in submission.notebooks if n.name == assignment.notebook), None) if submission else None
    if notebook is None:
        return known
    order = {cell.grade_id: number for number, cell in enumerate(assignment.cells)}
    checks = sorted(map(_check, notebook.grades), key=lambda check: (order.get(check.id, len(order)), check.id))
    penalty = submission.late_submission_penalty or 0.0
    total = sum(check.earned for check in checks) - penalty
    path = course.autograded(student.id, assignment.name) / f"{assignment.notebook}.ipynb"
    return Row(
        *person, known.lms_id, known.max, submission.timestamp, tuple(checks), max(0.0, total), penalty,
        seconds_late(submission), any(grade.needs_manual_grade for grade in notebook.grades),
        {comment.name: comment.manual_comment for comment in notebook.comments if comment.manual_comment},
        autograded.grading_in(path),
    )  # fmt: skip


def _check(grade) -> CheckScore:
    return CheckScore(
        grade.name, grade.auto_score, grade.manual_score, grade.extra_credit or 0.0, float(grade.cell.max_score)
    )


def seconds_late(submission) -> float:
    """nbgrader's `total_seconds_late`, which fails for an extension of an assignment that is never due."""
    return submission.total_seconds_late if submission.assignment.duedate else 0.0


def require_folder_name(student: str) -> None:
    """A student's id names folders and files, so it must not lead out of theirs."""
    if not re.fullmatch(r"[^/\\\x00-\x1f]+", student) or student in (".", ".."):
        raise CourseError(f"{student!r} cannot be a student's id: it is no folder's name.", "Correct it in the roster.")


def result_of(course: GradingCourse, assignment: Assignment, row: Row) -> Result:
    """The result that the gradebook's points of `row` come from, or a CourseError that says why there is none."""
    require_folder_name(row.student)
    path = course.grading(assignment.name) / "results" / f"{row.student}.json"
    merge = f"`tito grade merge {assignment.number}` brings results into the gradebook."
    try:
        result = from_text(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CourseError(
            f"There is no result {path}.", f"`tito grade autograde {assignment.number} --student {row.student}`."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CourseError(
            f"{path} cannot be read: {error!r}.",
            f"`tito grade autograde {assignment.number} --student {row.student} --rerun` makes it anew.",
        ) from None
    if result.digest != row.grading.get("result"):
        raise CourseError(f"The gradebook does not hold the latest result of {row.student}.", merge)
    return result
