"""Negative controls of a lesson: made when it is released, kept to what its reference solution fails as it should."""

from __future__ import annotations

from tito.course.errors import CourseError
from tito.course.processes import private_folder
from tito.instructor.assignment import Assignment
from tito.instructor.claims import control_of
from tito.instructor.names import earlier, imports_of, no_tests
from tito.instructor.package import package_folder
from tito.instructor.sandbox import Limits
from tito.instructor.session import Gone, Session

SECONDS = 60.0


def make(assignment: Assignment, solutions: dict[str, str]) -> dict[str, str]:
    """The control of every check, kept to the claims that the solution fails as it should.

    `solutions`: grade id of each hole -> its solved source. Raises CourseError where the solution fails a check.
    """
    made: dict[str, str] = {}
    with package_folder(assignment, {}) as package, private_folder() as private:
        session = Session("none", package, Limits(), private)
        try:
            session.begin(SECONDS, 0, imports_of(assignment))
            for index, cell in enumerate(assignment.cells):
                if cell.kind != "code" or "-measure-" in (cell.grade_id or ""):
                    continue
                asked = {"id": index, "seconds": SECONDS}
                if cell.role != "check":
                    source = solutions.get(cell.grade_id, cell.source)
                    session.ask(SECONDS, do="cell", source=source, given=[], forget=[], **asked)
                    continue
                before = [each.source for each in assignment.cells[:index] if each.role == "check"]
                runs_again = earlier(cell.source, before)
                real = session.ask(
                    SECONDS, do="check", source=cell.source, define=runs_again, control=False, **asked
                )
                _require(cell.grade_id, real)
                wrong = session.ask(
                    SECONDS, do="check", source=control_of(cell.source), control=True,
                    define=runs_again + no_tests(runs_again), **asked,
                )  # fmt: skip
                reliable = set(wrong["made"] or []) - set(wrong["held"] or [])
                made[cell.grade_id] = control_of(cell.source, reliable)
        except Gone as gone:
            raise CourseError(
                f"The reference solution of {assignment.name} cannot be run: {gone.why}. {session.last_words()}",
                f"`tito dev verify {assignment.number}` shows more.",
            ) from None
        finally:
            session.close()
    return made


def _require(name: str, reply: dict) -> None:
    if reply["error"] or reply["late"] or reply["ended"] is not None:
        error = reply["error"] or {"name": "The check", "text": "did not come to its end"}
        raise CourseError(
            f"The reference solution fails {name}: {error['name']}: {error['text']}",
            "A release with such a check could not be graded. `tito dev verify` shows more.",
        )
