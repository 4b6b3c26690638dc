"""`tito module test NN`: run the learner's notebook, show every check, change nothing."""

from __future__ import annotations

from tito import show
from tito.course import transaction
from tito.course.manifest import Course, Lesson
from tito.course.runner import CheckResult, TestRun
from tito.course.transaction import Completion
from tito.student.standing import NOT_YET, unwritten

MOST_NOTES = 5


def test(course: Course, name: str, json: bool = False) -> int:
    """Show each check with its points and what its failure says; 0 only if all is well."""
    lesson = course.lesson(name)
    with show.Working("running your notebook", quiet=json) as working:
        result = transaction.check(course, lesson, tell=working.tell)
    if json:
        show.as_json(as_json(lesson, result))
        return 0 if result.passed else 1
    report(lesson, result)
    if result.passed:
        show.steps((f"tito module complete {lesson.number}", "put your code into the package"))
    else:
        advise(lesson, result)
    return 0 if result.passed else 1


def report(lesson: Lesson, result: Completion) -> None:
    """The run as a learner reads it: checks, what stopped it, progressive tests, points."""
    run = result.run
    to_do = [] if run.passed else unwritten(lesson)
    show.heading(f"Lesson {lesson.number}: {lesson.title}", str(lesson.notebook.relative_to(lesson.root)))
    show.line()
    columns = max(len(check.title) for check in run.checks), max(len(check.id) for check in run.checks)
    for check in run.checks:
        show_check(check, waits_for(lesson, check, to_do), *columns)
    for note in [note for note in run.notes if NOT_YET[1] not in note][:MOST_NOTES]:
        show.line(show.clipped(note), indent=2, style="dim")
    if run.problem:
        show.line()
        show.line(run.problem, style="bold red")
    if result.refusal:
        show.line()
        show.line(f"The checks pass, but your code cannot be exported. {result.refusal.message}", style="bold red")
        show.line(result.refusal.hint)
    show_tests(result.tests)
    show.line()
    show.line(f"{run.earned} of {show.count(run.points, 'point')}.", style="bold")
    if to_do:
        show.line(f"{show.count(len(to_do), 'exercise')} still to be written, from {to_do[0]} on.")


def waits_for(lesson: Lesson, check: CheckResult, to_do: list[str]) -> str | None:
    """The exercise that a failed check waits for because nothing is written there yet; None if it is not that."""
    if check.passed or check.cell is None or not to_do:
        return None
    own = check.id.removesuffix("-test")
    if own in to_do:
        return own
    if not any(own == f"{lesson.number}-{exercise.id}" for exercise in lesson.exercises):
        return to_do[0]  # a check of the whole lesson
    return next((grade_id for grade_id in to_do if f"Exercise {grade_id} " in check.message), None)


def show_check(check: CheckResult, waiting: str | None, titles: int, ids: int) -> None:
    """One check in one row; below it, where it is and what its failure says."""
    points = f"{check.earned}/{check.points}"
    mark = "pass " if check.passed else "to do" if waiting else "FAIL "
    show.rows([(mark, points.rjust(5), check.title.ljust(titles), check.id.ljust(ids))])
    if waiting and waiting != check.id.removesuffix("-test"):
        show.line(f"waits for {waiting}", indent=9, style="dim")
    elif not check.passed and not waiting:
        where = f"cell {check.cell}: " if check.cell else ""
        show.line(where + show.clipped(check.message), indent=9)


def show_tests(tests: TestRun | None) -> None:
    """How the progressive tests ended, if they ran."""
    total = tests.passed + len(tests.failed) if tests else 0
    if not total and not (tests and tests.problem):
        return
    show.line()
    show.line(f"With the rest of the package: {tests.passed} of {show.count(total, 'test')} passed.")
    for name, message in tests.failed:
        show.rows([("FAIL", name)])
        show.line(show.clipped(message), indent=8)
    if tests.problem:
        show.line(tests.problem, style="bold red")


def advise(lesson: Lesson, result: Completion) -> None:
    """The next step after a failure: the hint for the first exercise whose check fails."""
    if result.run.passed:  # what is wrong stands above: the export, or the tests with other lessons
        show.steps((f"tito module test {lesson.number}", "after the change, run it again"))
        return
    known = {exercise.id for exercise in lesson.exercises}
    for check in result.run.checks:
        exercise = check.id.removeprefix(f"{lesson.number}-").removesuffix("-test")
        if not check.passed and exercise in known:
            show.steps((f"tito module hint {lesson.number} {exercise}", "points to the way"))
            return
    show.steps((f"tito module hint {lesson.number}", "lists the exercises"))


def as_json(lesson: Lesson, result: Completion) -> dict:
    """The run for programs."""
    run, tests = result.run, result.tests
    checks = [{**vars(check), "earned": check.earned} for check in run.checks]
    progressive = tests and {
        "passed": tests.passed,
        "failed": [{"test": name, "message": message} for name, message in tests.failed],
        "problem": tests.problem,
    }
    return {
        "lesson": lesson.number,
        "passed": result.passed,
        "earned": run.earned,
        "points": run.points,
        "problem": run.problem or (result.refusal and result.refusal.message),
        "notes": list(run.notes),
        "checks": checks,
        "tests": progressive,
        "seconds": round(run.seconds, 2),
    }
