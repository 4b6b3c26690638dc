"""`tito grade collect`: submissions from wherever they are into submitted/, one line for each student."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tito import show
from tito.instructor import assignment as assignments
from tito.instructor.assignment import Assignment
from tito.instructor.course import GradingCourse
from tito.instructor.intake import forms, people, store, times
from tito.instructor.intake.choose import choose
from tito.instructor.intake.model import Delivery, Refusal, listed, shown
from tito.instructor.nbgrader_setup import open_gradebook


@dataclass(frozen=True)
class Class:
    """What the gradebook says of the class and one assignment."""

    people: tuple[people.Person, ...]
    due: datetime | None
    extensions: dict[str, timedelta]  # student id -> what nbgrader's gradebook grants


@dataclass(frozen=True)
class Row:
    """What became of one delivery. `state` is one of store.Stored's, or refused."""

    student: str
    state: str
    when: datetime | None = None
    late: str = ""
    remarks: tuple[str, ...] = ()


def collect(course: GradingCourse, lesson: str, source: Path | None, form: str, due: str | None) -> int:
    """Bring in every submission of `lesson` in `source`; 1 where any was refused."""
    assignment = assignments.load(course, lesson)
    deadline = times.due(due) if due is not None else None
    known = _read_class(course, assignment.name)
    roster = people.Roster(known.people)
    with store.locked(course, assignment.name), show.Working(f"collecting {assignment.name}"):
        mended = store.repair(course, assignment.name)
        with forms.opened(course, assignment, source, form, roster) as (form, deliveries):
            if deadline:
                _store_due(course, assignment.name, deadline)
                known = Class(known.people, deadline, known.extensions)
            rows = [_take(course, assignment, delivery, known) for delivery in deliveries]
    _tell(course, assignment, form, known, rows, mended)
    return 1 if any(row.state == "refused" for row in rows) else 0


def _read_class(course: GradingCourse, assignment: str) -> Class:
    with open_gradebook(course) as gradebook:
        everybody = tuple(
            people.Person(one.id, one.first_name or "", one.last_name or "", one.email or "")
            for one in gradebook.students
        )
        entry = next((one for one in gradebook.assignments if one.name == assignment), None)
        due = entry.duedate.replace(tzinfo=UTC) if entry and entry.duedate else None
        granted = {one.student_id: one.extension for one in entry.submissions if one.extension} if entry else {}
    return Class(everybody, due, granted)


def _store_due(course: GradingCourse, assignment: str, deadline: datetime) -> None:
    with open_gradebook(course) as gradebook:
        gradebook.update_or_create_assignment(assignment, duedate=deadline)  # which makes it UTC without a zone


def _take(course: GradingCourse, assignment: Assignment, delivery: Delivery, known: Class) -> Row:
    """Store one delivery, or say why not; nothing that is wrong with it stops the others."""
    student = delivery.student
    unsafe = next((f"{file.shown} {file.problem}" for file in delivery.files if file.problem), None)
    if student is None or delivery.problem:
        reasons = filter(None, (delivery.problem, unsafe))
        return Row(shown(student or delivery.label), "refused", remarks=(*reasons, *delivery.remarks))
    try:
        chosen = choose(delivery.files, assignment)
        when = chosen.when
        if delivery.in_time and known.due:
            when = min(when, known.due)
        stored = store.put(course, assignment, student, chosen.data, when)
    except Refusal as reason:
        return Row(shown(student), "refused", remarks=(str(reason), *delivery.remarks))
    except OSError as error:
        return Row(shown(student), "refused", remarks=(f"cannot be written: {error.strerror}", *delivery.remarks))
    remarks = (*chosen.remarks, *delivery.remarks)
    if stored.state == "older":
        remarks = (f"that of {times.local(when)} is kept in superseded/", *remarks)
    late = times.late_by(stored.when, known.due, known.extensions.get(student))
    mark = times.spoken(late) if late else "yes" if delivery.marked_late else ""
    return Row(shown(student), stored.state, stored.when, mark, remarks)


# ---- what the user sees


def _tell(
    course: GradingCourse, assignment: Assignment, form: str, known: Class, rows: list[Row], mended: list[str]
) -> None:
    """A table of the class, and what it comes to."""
    due = f", due {times.local(known.due)}" if known.due else ", no due time"
    show.heading(f"{assignment.number} {assignment.title}", f"from {form}{due}")
    table = [
        (row.student, row.state, times.local(row.when) if row.when else "", row.late, "; ".join(row.remarks))
        for row in sorted(rows, key=lambda row: row.student)
    ]
    if table:
        show.rows(table, header=("student", "", "handed in", "late", ""))
    else:
        show.line("No submission was found.", indent=2)
    show.line()
    show.line(_summary(rows))
    if mended:
        show.line(f"Ended what a stopped collect had begun: {listed([shown(name) for name in mended])}.")
    there = set(course.submitters(assignment.name))
    missing = [shown(one.id) for one in known.people if one.id not in there]
    if missing:
        show.line(f"Of {show.count(len(known.people), 'student')}, {len(missing)} without a submission: "
                  f"{listed(missing, 10)}.")  # fmt: skip
    if any("not in the roster" in remark for row in rows for remark in row.remarks):
        show.line("`tito grade roster CSV` adds students to the roster; then collect again.")
    if any(row.state in ("taken", "replaced") for row in rows):
        show.steps((f"tito grade autograde {assignment.number}", "grades what was collected"))


def _summary(rows: list[Row]) -> str:
    """`3 taken, 1 replaced, 2 refused; 1 late.`"""
    states = ("taken", "replaced", "unchanged", "older", "refused")
    counts = {state: sum(row.state == state for row in rows) for state in states}
    late = sum(bool(row.late) for row in rows)
    parts = ", ".join(f"{number} {state}" for state, number in counts.items() if number) or "nothing to collect"
    return parts + (f"; {late} late." if late else ".")
