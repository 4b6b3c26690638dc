"""`tito grade report`: a page with plots for the instructor; it names no student."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from pathlib import Path

from tito import show
from tito.course.errors import CourseError
from tito.course.files import write_atomic
from tito.instructor import assignment as assignments
from tito.instructor import hidden, pages, plots
from tito.instructor.assignment import Assignment
from tito.instructor.course import GradingCourse
from tito.instructor.nbgrader_setup import course_id
from tito.instructor.pages import number
from tito.instructor.scores import Row, result_of, scores

COMMONEST = 10  # messages per lesson


def report(course: GradingCourse, out: Path | None) -> int:
    """Write the page for all lessons that were released."""
    names = course.released()
    if not names:
        raise CourseError(f"No lesson was released in {course.root}.", "`tito grade release LESSON` releases one.")
    released = [assignments.read(course.frozen(name)) for name in names]
    rows = [scores(course, assignment) for assignment in released]
    lessons = [_lesson(course, assignment, each) for assignment, each in zip(released, rows, strict=True)]
    days = _days([row for each in rows for row in each])
    path = out or course.root / "report.html"
    page = pages.render(
        "report.html", course=course_id(course), students=show.count(len(rows[0]), "student"), lessons=lessons,
        timeline=plots.timeline(days) if days else None,
    )  # fmt: skip
    write_atomic(path, page)
    show.line(f"Report of {show.count(len(released), 'lesson')} written: {path}")
    return 0


def _lesson(course: GradingCourse, assignment: Assignment, rows: list[Row]) -> dict:
    """What the page says about one lesson."""
    rows = [row for row in rows if row.total is not None]
    totals = [row.total for row in rows]
    known = {"number": assignment.number, "title": assignment.title, "max": number(assignment.max_score)}
    if not rows:
        return known | {"submissions": 0, "late": 0, "mean": "", "median": ""}
    return known | {
        "submissions": len(rows),
        "late": sum(row.late_seconds > 0 for row in rows),
        "mean": f"{statistics.fmean(totals):.2f}",
        "median": number(statistics.median(totals)),
        "distribution": plots.distribution(totals, assignment.max_score),
        "success": plots.success(_rates(assignment, rows)),
        "messages": _messages(course, assignment, rows),
    }


def _rates(assignment: Assignment, rows: list[Row]) -> list[tuple[str, float]]:
    """Each check's title, and which part of the submissions has all its points."""
    full: Counter = Counter(check.id for row in rows for check in row.checks if check.earned >= check.max)
    ids = [check.grade_id for check in assignment.checks]
    return [(assignment.titles.get(check, check), full[check] / len(rows)) for check in ids]


def _messages(course: GradingCourse, assignment: Assignment, rows: list[Row]) -> list[dict]:
    """The commonest messages, by their first line; results that cannot be read are left out."""
    found: Counter = Counter()
    for row in rows:
        try:
            result = result_of(course, assignment, row)
        except CourseError:
            continue
        for check in result.checks:
            if check.message.strip():
                text = hidden.plain(check.message.strip().splitlines()[0])[:200]
                found[assignment.titles.get(check.id, check.id), text] += 1
    commonest = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:COMMONEST]
    return [{"check": check, "text": text, "count": count} for (check, text), count in commonest]


def _days(rows: list[Row]) -> list[tuple[str, int, float]]:
    """Per day with submissions: the day, how many there were, and their mean as a part of the points."""
    days = defaultdict(list)
    for row in rows:
        if row.total is not None and row.submitted:
            days[f"{row.submitted:%Y-%m-%d}"].append(row.total / row.max if row.max else 0.0)
    return [(day, len(parts), statistics.fmean(parts)) for day, parts in sorted(days.items())]
