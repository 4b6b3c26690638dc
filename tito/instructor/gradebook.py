"""The one writer of the gradebook: results go in through nbgrader's own classes, each in one transaction.

Per submission the database is committed first and the autograded notebook renamed into place second. The notebook
carries the hash of the result in its metadata, so a kill in between is repaired by the next merge, and a merge of
what is there already changes nothing.

What a person did in formgrader survives: `manual_score`, `extra_credit` and manual comments are never written here.
nbgrader's own mark "flagged" is set when grading raises flags that were not told before, and taken away by a person.
A check with a manual score is marked for review only when its automatic score changes, so that a rerun with the
same outcome asks nobody to look again. (`nbgrader autograde` marks it every time.)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tito.course.errors import CourseError
from tito.course.files import write_atomic
from tito.instructor import autograded, hidden
from tito.instructor.assignment import Assignment
from tito.instructor.course import GradingCourse
from tito.instructor.nbgrader_setup import open_gradebook, settings
from tito.instructor.patience import ATTEMPT, PATIENCE, patiently
from tito.instructor.result import Result
from tito.instructor.scores import require_folder_name, seconds_late
from tito.instructor.scores import scores as scores


@dataclass(frozen=True)
class _Known:
    """Ids of an assignment's rows in the gradebook, looked up once."""

    assignment: str
    notebook: str
    grade_cells: dict[str, str]  # grade id -> id of the row
    solution_cells: dict[str, str]
    hidden: frozenset[str]


class Writer:
    """One session with the gradebook, for any number of merges."""

    def __init__(self, course: GradingCourse, patience: float = PATIENCE):
        self._course, self._patience = course, patience
        self._known: dict[str, _Known] = {}
        self._lateness = None
        self._stack = ExitStack()

    def __enter__(self) -> Writer:
        self._settings = settings(self._course)
        shared = self._settings.CourseDirectory.get("groupshared", False) is True
        self._mode = 0o664 if shared else 0o444  # nbgrader's own convention for autograded/
        self._gradebook = self._patiently(lambda: self._stack.enter_context(open_gradebook(self._course)))
        self._db = self._gradebook.db
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def _patiently(self, step: Callable):
        return patiently(step, self._course.gradebook, self._patience)

    def merge(self, assignment: Assignment, result: Result, timestamp: datetime | None = None) -> bool:
        """Bring one result in; False where the gradebook has it already. `timestamp`: when it was handed in.

        A student or an assignment that the gradebook does not know, and a result that is not this assignment's,
        are CourseErrors; they concern this submission only, and the writer goes on.
        """
        _require_fit(assignment, result)
        timestamp = _naive_utc(timestamp)
        known = self._patiently(lambda: self._look_up(assignment))
        messages = {
            check.id: hidden.for_students(check.message or "This check failed.", known.hidden)
            for check in result.checks
            if check.message or check.earned < check.points
        }
        path = self._course.autograded(result.student, assignment.name) / f"{assignment.notebook}.ipynb"
        told = (autograded.grading_in(path) or {}).get("flags")
        new_flags = bool(result.flags) and told != list(result.flags)
        changed = self._patiently(lambda: self._record(known, result, messages, timestamp, new_flags))
        return self._write_files(assignment, result, messages, timestamp) or changed

    def _look_up(self, assignment: Assignment) -> _Known:
        """The gradebook's rows for `assignment`; they must be those of this release."""
        if assignment.hash in self._known:
            return self._known[assignment.hash]
        from nbgrader.api import MissingEntry

        try:
            notebook = self._gradebook.find_notebook(assignment.notebook, assignment.name)
        except MissingEntry:
            notebook = None
        points = {cell.name: cell.max_score for cell in notebook.grade_cells} if notebook else {}
        if points != {check.grade_id: check.points for check in assignment.checks}:
            raise CourseError(
                f"{self._course.gradebook} does not hold the checks of {assignment.name} as they were released.",
                f"`tito grade release {assignment.number}` brings them there.",
            )
        self._known[assignment.hash] = _Known(
            notebook.assignment_id, notebook.id, {cell.name: cell.id for cell in notebook.grade_cells},
            {cell.name: cell.id for cell in notebook.solution_cells}, hidden.hidden_lines(assignment),
        )  # fmt: skip
        return self._known[assignment.hash]

    def _record(
        self, known: _Known, result: Result, messages: dict[str, str], timestamp: datetime | None, new_flags: bool
    ) -> bool:
        """Set every row of one submission in one transaction; whether one of them is new or changed."""
        from sqlalchemy import text

        db = self._db
        try:
            db.execute(text(f"PRAGMA busy_timeout = {int(1000 * min(ATTEMPT, self._patience))}"))
            db.execute(text("BEGIN IMMEDIATE"))  # so that nothing changes between reading and writing
            with db.no_autoflush:
                submission, notebook = self._submission(known, result.student)
                submission.timestamp = timestamp
                notebook.flagged = notebook.flagged or new_flags
                self._set_grades(known, notebook, result)
                self._set_comments(known, notebook, messages)
            changed = bool(db.new) or any(map(db.is_modified, db.dirty))
            db.flush()
            penalty = self._penalty(submission, notebook)
            if penalty != notebook.late_submission_penalty:
                notebook.late_submission_penalty, changed = penalty, True
            db.commit()
            return changed
        finally:
            db.remove()  # forgets the objects, and rolls back what was not committed

    def _submission(self, known: _Known, student: str):
        """The rows of a student's submission and notebook, new ones where there are none."""
        from nbgrader.api import Student, SubmittedAssignment, SubmittedNotebook

        if self._db.get(Student, student) is None:
            raise CourseError(
                f"Student {student!r} is not in {self._course.gradebook}; the result was not merged.",
                "Add the student: `tito grade roster CSV`, then merge again.",
            )
        submission = (
            self._db.query(SubmittedAssignment)
            .filter_by(assignment_id=known.assignment, student_id=student)
            .one_or_none()
        )
        if submission is None:
            submission = SubmittedAssignment(assignment_id=known.assignment, student_id=student)
        notebook = next((n for n in submission.notebooks if n.notebook_id == known.notebook), None)
        notebook = notebook or SubmittedNotebook(notebook_id=known.notebook, assignment=submission)
        self._db.add_all([submission, notebook])
        return submission, notebook

    def _set_grades(self, known: _Known, notebook, result: Result) -> None:
        """Automatic scores; what was graded by hand is marked for review where its automatic score changes."""
        from nbgrader.api import Grade

        there = {grade.cell_id: grade for grade in notebook.grades}
        for check in result.checks:
            cell = known.grade_cells[check.id]
            grade = there.get(cell) or Grade(cell_id=cell, notebook=notebook)
            if grade.manual_score is None:
                grade.needs_manual_grade = False
            elif grade.auto_score != check.earned:
                grade.needs_manual_grade = True
            grade.auto_score = float(check.earned)
            self._db.add(grade)

    def _set_comments(self, known: _Known, notebook, messages: dict[str, str]) -> None:
        """The message of a failed check, as the automatic comment on its exercise's cell."""
        from nbgrader.api import Comment

        there = {comment.cell_id: comment for comment in notebook.comments}
        for grade_id, cell in known.solution_cells.items():
            comment = there.get(cell) or Comment(cell_id=cell, notebook=notebook)
            comment.auto_comment = messages.get(f"{grade_id}-test")
            self._db.add(comment)

    def _penalty(self, submission, notebook) -> float | None:
        """What nbgrader_config.py takes off for being late, by nbgrader's own preprocessor; None for nothing."""
        late = seconds_late(submission)
        if not late:
            return None
        self._db.expire(notebook, ["score"])
        try:
            if self._lateness is None:
                from nbgrader.preprocessors import AssignLatePenalties

                self._lateness = AssignLatePenalties(config=self._settings)
                self._lateness.init_plugin()
            penalty = self._lateness.plugin_inst.late_submission_penalty(submission.student_id, notebook.score, late)
            return None if penalty is None else self._lateness._check_late_penalty(notebook, penalty)
        except Exception as error:  # the plugin may be the instructor's own
            raise CourseError(
                f"The penalty for being late fails: {type(error).__name__}: {error}.",
                f"Look for AssignLatePenalties in {self._course.config}, then merge again.",
            ) from error

    def _write_files(
        self, assignment: Assignment, result: Result, messages: dict[str, str], timestamp: datetime | None
    ) -> bool:
        """The autograded notebook and its timestamp.txt; whether one of them had to be written."""
        folder = self._course.autograded(result.student, assignment.name)
        path = folder / f"{assignment.notebook}.ipynb"
        grading = {
            "result": result.digest, "release": result.release, "sandbox": hidden.plain(result.sandbox),
            "job": hidden.plain(result.job), "flags": [hidden.plain(flag) for flag in result.flags],
        }  # fmt: skip
        stamp = f"{timestamp.isoformat(' ')} UTC\n" if timestamp else None
        written = self._write_stamp(folder / "timestamp.txt", stamp)
        if autograded.grading_in(path) == grading:
            return written
        write_atomic(path, autograded.notebook_text(assignment, result, messages, grading), self._mode)
        return True

    def _write_stamp(self, path: Path, text: str | None) -> bool:
        """nbgrader compares these files to tell which feedback is out of date."""
        there = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
        if text == there:
            return False
        if text is None:
            path.unlink()
        else:
            write_atomic(path, text, self._mode)
        return True


def _require_fit(assignment: Assignment, result: Result) -> None:
    """A result comes from a file that may be anybody's: it must be whole, and of this release."""
    student, remedy = str(result.student), f"Run `tito grade autograde {assignment.number} --rerun` for it."
    require_folder_name(student)
    if (result.assignment, result.release) != (assignment.name, assignment.hash):
        raise CourseError(
            f"The result of {student} is of {result.assignment}, release {str(result.release)[:12]}; the course has "
            f"{assignment.name}, release {assignment.hash[:12]}.", remedy,
        )  # fmt: skip
    points = {check.id: check.points for check in result.checks}
    whole = len(points) == len(result.checks) and points == {c.grade_id: c.points for c in assignment.checks}
    if not whole or not all(0 <= check.earned <= check.points for check in result.checks):
        raise CourseError(f"The result of {student} does not hold every check of {assignment.name} once.", remedy)


def _naive_utc(timestamp: datetime | None) -> datetime | None:
    """As nbgrader stores times: in UTC, without saying so."""
    if timestamp is None or timestamp.tzinfo is None:
        return timestamp
    return timestamp.astimezone(UTC).replace(tzinfo=None)
