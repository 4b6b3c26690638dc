"""Runs one job in the sandbox and judges: the only place where a submission's code meets its checks.

The worker inside (tito/jobs/grade_cells.py) hears one cell at a time and knows nothing of what follows. A check
earns its points when it ran to its end and its control, sent in the same form and in random order, failed.
"""

from __future__ import annotations

import random
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from tito.course import verdict
from tito.course.errors import CourseError
from tito.course.processes import private_folder
from tito.instructor import claims
from tito.instructor.assignment import Assignment
from tito.instructor.executed import Executed, executed_notebook
from tito.instructor.job import Job
from tito.instructor.names import bound_names, earlier, imports_of, no_tests
from tito.instructor.package import package_folder
from tito.instructor.result import CheckGrade, Result
from tito.instructor.session import GRACE, TOO_MUCH_OUTPUT, Gone, Session
from tito.instructor.submission import notebook_of
from tito.instructor.transplant import RunCell, transplant

START_SECONDS = 60.0
WORKERS = 8  # a cell that ends the worker is left out of the next one, so that the rest can still earn
UNTRUSTED = (
    "This check passes, but in this notebook it cannot tell right from wrong: the same check with wrong values did not "
    "fail as it should. It earns no points until your instructor has looked at it. Return plain numbers, lists, arrays "
    "or Tensors, and change nothing that does not belong to the exercise."
)


def run_job(job: Job, assignment: Assignment, level: str) -> Result:
    """Grade one submission: a row for every check, whatever the submission does."""
    started = time.monotonic()
    notebook, problem = notebook_of(job.notebook) if job.notebook is not None else (None, job.problem)
    if notebook is None:
        checks = tuple(CheckGrade(cell.grade_id, cell.points, 0.0, problem) for cell in assignment.checks)
        return Result(job.key, job.student, job.assignment, job.release, level, checks, problem, job.notes)
    cells, findings = transplant(assignment, notebook)
    run = _Run(job, assignment, cells, started + job.limits.seconds)
    with package_folder(assignment, job.package) as package:
        _all_cells(run, level, package)
    checks = tuple(run.grade(cell.grade_id, cell.points) for cell in assignment.checks)
    return Result(
        job.key, job.student, job.assignment, job.release, level, checks, run.problem,
        (*job.notes, *findings, *dict.fromkeys(run.notes)), tuple(dict.fromkeys(run.flags)),
        executed_notebook(assignment, cells, run.executed, {check.id: check for check in checks}),
        round(time.monotonic() - started, 3),
    )  # fmt: skip


@dataclass
class _Run:
    """One submission on its way: what each cell came to, and what was noted. Cells are known by their index."""

    job: Job
    assignment: Assignment
    cells: tuple[RunCell, ...]
    deadline: float
    executed: dict[int, Executed] = field(default_factory=dict)
    guilty: set[int] = field(default_factory=set)  # cells that ended a worker
    verdicts: dict[str, tuple[str, float]] = field(default_factory=dict)  # grade id -> message ("" passed), seconds
    notes: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    problem: str | None = None

    def label(self, index: int) -> str:
        name = self.cells[index].grade_id
        return f"cell {index + 1}" + (f" ({name})" if name else "")

    def sentence(self, error: dict) -> str:
        if error["name"] == "EOFError" and error["text"].startswith("EOF when reading a line"):
            error = error | {"name": verdict.INPUT}
        if error["name"] == "NameError" and (missing := self.missing(error["text"])):
            return missing
        return verdict.sentence(error, {n: self.label(n) for n in range(len(self.cells))}, self.job.limits)

    def missing(self, text: str) -> str:
        """The sentence for a name that a hole was to define; empty where it is another name."""
        name = re.match(r"name '(\w+)' is not defined", text)
        for index, cell in enumerate(self.cells if name else ()):
            if cell.role == "hole" and re.search(rf"(?m)^(def |class |# ){name[1]}\b", cell.origin.released):
                done = self.executed.get(index, Executed())
                if done.error and _unwritten(done.error):
                    return self.sentence(done.error)
                why = "did not run to its end" if done.error or done.late else "does not"
                return (
                    f"`{name[1]}` is not there: {self.label(index)} is to define it, and {why}. Write it there, "
                    "restart the kernel and run all cells: each must run without an error."
                )
        return ""

    def left(self, seconds: float) -> float:
        return max(0.1, min(seconds, self.deadline - time.monotonic()))

    def time_is_up(self, index: int) -> bool:
        """Whether the run's time is over; says so once."""
        if time.monotonic() < self.deadline:
            return False
        seconds = f"{self.job.limits.seconds:g}"
        self.problem = f"The notebook was stopped in {self.label(index)}: a run may take {seconds} seconds."
        return True

    def grade(self, name: str, points: float) -> CheckGrade:
        message, seconds = self.verdicts.get(name, (self.problem or "Not reached: the run ended before.", 0.0))
        return CheckGrade(name, points, 0.0 if message else points, message, seconds)


def _all_cells(run: _Run, level: str, package: Path) -> None:
    """Run all cells in order; after a cell that ended the worker, go on behind it with a new one."""
    first: int | None = 0
    for _ in range(WORKERS):
        with private_folder() as private:
            session = Session(level, package, run.job.limits, private)
            try:
                first = _serve(run, session, first)
            finally:
                session.close()
        if session.stray:
            run.flags.append("Something in the notebook wrote to the grader's own pipe.")
        if first is None:
            return
    run.problem = f"The run was given up in {run.label(first - 1)}: cells ended it {WORKERS} times."


def _serve(run: _Run, session: Session, first: int) -> int | None:
    """Run the cells in one worker, checks from `first` on. Where to go on with another worker; None at the end."""
    try:
        session.begin(run.left(START_SECONDS), run.job.seed, _imports(run))
    except Gone as gone:
        raise CourseError(  # no student code has run yet: this is not a submission's fault, and no grade
            f"The sandbox ({session.level}) did not start: {session.last_words() or gone.why}.",
            "Run it again; `--jobs 1` needs less memory.",
        ) from None
    for index, cell in enumerate(run.cells):
        if cell.kind != "code" or index in run.guilty or (index < first and cell.role == "check"):
            continue
        if run.time_is_up(index):
            return None
        try:
            (_check if cell.role == "check" else _cell)(run, session, index)
        except Gone as gone:
            run.guilty.add(index)
            _blame(run, index, gone)
            return None if run.time_is_up(index) else index + 1
    return None


def _imports(run: _Run) -> list[str]:
    """Modules of the reference to load before any student code, so that the ground can be restored to them."""
    if run.job.package:  # some are the student's own
        return []
    return imports_of(run.assignment)


def _cell(run: _Run, session: Session, index: int) -> None:
    """Run a cell that is no check."""
    cell = run.cells[index]
    if not cell.source.strip() or "-measure-" in (cell.grade_id or ""):
        return

    def ask(source: str, given: tuple[str, ...] = (), forget: tuple[str, ...] = ()) -> dict:
        seconds = run.left(run.job.limits.cell_seconds)
        return session.ask(
            seconds + GRACE, do="cell", id=index, source=source, given=given, forget=forget, seconds=seconds
        )

    if cell.role in ("plain", "locked"):
        reply = ask(cell.source, given=bound_names(cell.source))
    else:
        reply = ask(cell.source, forget=bound_names(cell.origin.released) if cell.role == "hole" else ())
    if cell.role == "edited":  # the student's wording may add names; those that the lesson defines there are its own
        ask(cell.origin.released, given=bound_names(cell.origin.released))
    run.executed[index] = Executed(reply["output"], reply["error"], reply["late"])
    _take_heard(run, session, index)
    if reply["late"]:
        run.notes.append(f"{verdict.capital(run.label(index))}: {verdict.small(verdict.late(run.job.limits))}")
    elif reply["error"] and cell.role in ("hole", "edited", "own") and not _unwritten(reply["error"]):
        run.notes.append(f"{verdict.capital(run.label(index))} failed: {_ended(run.sentence(reply['error']))}")


def _unwritten(error: dict) -> bool:
    return error["name"] == "NotImplementedError"


def _check(run: _Run, session: Session, index: int) -> None:
    """Run a check and its control, in random order."""
    cell, control = run.cells[index], None
    wrong_cell = run.assignment.controls.get(cell.grade_id, cell.source)
    before = [each.source for each in run.cells[:index] if each.role == "check"]
    runs_again = earlier(cell.source, before)

    def ask(source: str, is_control: bool) -> dict:
        seconds = run.left(run.job.limits.cell_seconds)
        return session.ask(
            seconds + 2 * GRACE, do="check", id=index, source=source, control=is_control, seconds=seconds,
            define=runs_again + no_tests(runs_again) if is_control else runs_again,
        )  # fmt: skip

    control_first = random.Random(f"{run.job.seed} {cell.grade_id}").random() < 0.5
    if control_first:
        control = ask(wrong_cell, is_control=True)
    reply = ask(cell.source, is_control=False)
    message = _message(run, index, reply)
    if not message and not control_first:
        control = ask(wrong_cell, is_control=True)
    _take_heard(run, session, index)
    rests = [each.grade_id for each in run.cells[:index] if each.source in runs_again]
    if not message and any(run.verdicts.get(name, ("",))[0] == UNTRUSTED for name in rests if name):
        message = UNTRUSTED  # it runs that check again
    if not message and (wrong := _not_failed(control, claims.numbers_in(wrong_cell))):
        message = "" if control["late"] else UNTRUSTED  # slowness, maybe the machine's, is no proof of anything
        run.flags.append(f"{cell.grade_id} passes, but {wrong}. Look at the code that it checks.")
    run.verdicts[cell.grade_id] = (message, float(reply["seconds"]))
    run.executed[index] = Executed(reply["output"], reply["error"], reply["late"])


def _not_failed(control: dict, numbers: set[int]) -> str:
    """In which way a control did not fail as it does on honest work, which makes every claim and sees it refused."""
    if control["held"]:
        return "it also accepts wrong values"
    if control["ended"] is not None or control["late"] or control["odd"] or set(control["made"] or []) != numbers:
        return "the same check with wrong values did not come to its end"
    return ""


def _message(run: _Run, index: int, reply: dict) -> str:
    """Why a check failed, as a sentence; empty where it passed."""
    if reply["late"]:
        return verdict.late(run.job.limits)
    if reply["ended"] == TOO_MUCH_OUTPUT:
        return _too_much(run.job.limits)
    if reply["ended"] is not None:
        return f"The check did not come to its end: {verdict.death(reply['ended'])}."
    if reply["odd"] or reply["held"] is not None:  # only a control says what held
        run.flags.append(f"{verdict.capital(run.label(index))}: the reply was not the worker's own.")
        return UNTRUSTED
    return run.sentence(reply["error"]) or "The check failed." if reply["error"] else ""


def _take_heard(run: _Run, session: Session, index: int) -> None:
    where = verdict.capital(run.label(index))
    for event in session.take_heard():
        run.flags.append(f"{where} tried {event}, which looks inside the grader; it was refused.")


def _too_much(limits) -> str:
    return f"Printed more than {limits.output_bytes / 1e6:g} MB. Is there a print in a loop?"


def _blame(run: _Run, index: int, gone: Gone) -> None:
    """A cell ended the worker, or the worker had to be ended in it: say so, and fail the check that it was."""
    limits = run.job.limits
    words = {
        "late": verdict.late(limits),
        "output": _too_much(limits),
        "memory": f"Used more than {2 * limits.memory_bytes / 2**30:g} GiB of memory with all that it started.",
        "died": f"It ended the run: {verdict.death(gone.code)}.",
    }[gone.why]
    run.executed[index] = Executed("", {"name": "Ended", "text": words, "place": None}, gone.why == "late")
    if run.cells[index].role == "check":
        run.verdicts[run.cells[index].grade_id] = (words, 0.0)
    run.notes.append(f"{verdict.capital(run.label(index))} was left out: {verdict.small(words)}")


def _ended(text: str) -> str:
    return text if text.rstrip().endswith((".", "?", ")")) else f"{text}."
