"""`tito dev verify`: proof that a lesson's checks can fail, can pass, and help.

Structure: three hints per hole, one check per hole, unique grade ids, points that agree with the registry, built
files that are up to date. Then three runs: the released notebook fails every check, the solved one passes every
check (hidden tests as well), and each wrong body of exercises.toml fails its check with the message it promises.
"""

from __future__ import annotations

import collections
import concurrent.futures
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tito.course import manifest, source
from tito.course.errors import CourseError
from tito.course.manifest import Lesson
from tito.course.notebook import Cell, read
from tito.maintainer import build

SECONDS_PER_WRONG_BODY = 120


@dataclass(frozen=True)
class Finding:
    """One thing that verify looked at: `problem` is None when it holds."""

    lesson: str
    subject: str
    problem: str | None = None


def verify(root: Path, numbers: list[str] | None = None, tell=lambda finding: None) -> list[Finding]:
    """Verify the lessons `numbers` (default: all); each finding is also told at once."""
    course = manifest.load(root)
    findings: list[Finding] = []
    for lesson in course.lessons:
        if numbers and lesson.number not in numbers:
            continue
        for finding in _lesson(course, lesson):
            findings.append(finding)
            tell(finding)
    for problem in duplicate_grade_ids(course):
        findings.append(Finding("course", "grade ids are unique", problem))
        tell(findings[-1])
    return findings


def _lesson(course: manifest.Course, lesson: Lesson):
    for subject, check in STRUCTURE.items():
        yield Finding(lesson.number, subject, check(lesson))
    yield Finding(lesson.number, "the unsolved notebook fails every check", unsolved_fails(lesson))
    yield Finding(lesson.number, "the solved notebook passes every check", solved_passes(lesson))
    yield Finding(lesson.number, "hidden tests pass on the solution", hidden_pass(lesson))
    yield from wrong_bodies(lesson)


# --- structure ---------------------------------------------------------------------------------------------------


def stale(lesson: Lesson) -> str | None:
    """Built files that differ from what the build would make now."""
    texts = build.built_files(lesson)
    old = [path for path, text in texts.items() if not path.is_file() or path.read_bytes() != text.encode()]
    names = ", ".join(path.relative_to(lesson.root).as_posix() for path in old)
    return f"out of date: {names}; run `tito dev build {lesson.number}`" if old else None


def points_disagree(lesson: Lesson) -> str | None:
    """The registry's points against the sum of the graded cells."""
    total = sum(check.points for check in lesson.checks)
    return None if total == lesson.points else f"course.toml says {lesson.points}, the graded cells give {total}"


def without_hints(lesson: Lesson) -> str | None:
    """Exercises that do not have exactly three hints."""
    bad = [e.id for e in lesson.exercises if len([h for h in e.hints if h.strip()]) != 3]
    return f"not three hints: {', '.join(bad)}" if bad else None


def unmatched(lesson: Lesson) -> str | None:
    """Holes without a check or an entry, entries without a hole or a wrong body."""
    cells = source.cells(lesson)
    holes = {cell.grade_id for cell in cells if cell.is_hole}
    checks = {cell.grade_id for cell in cells if cell.is_check}
    entries = {f"{lesson.number}-{entry['id']}": entry for entry in source.exercises(lesson)}
    problems = [f"{hole} has no check {hole}-test" for hole in holes if f"{hole}-test" not in checks]
    problems += [f"{hole} is not in exercises.toml" for hole in holes - entries.keys()]
    problems += [f"exercises.toml names {entry}, which is no hole" for entry in entries.keys() - holes]
    problems += [f"{name} lists no wrong body" for name, entry in entries.items() if not entry.get("wrong")]
    problems += [f"{c.grade_id} does not begin with {lesson.number}-" for c in cells
                 if c.grade_id and not c.grade_id.startswith(f"{lesson.number}-")]
    return "; ".join(sorted(problems)) or None


STRUCTURE = {
    "built files are up to date": stale,
    "points agree": points_disagree,
    "three hints per exercise": without_hints,
    "every hole has a check, hints and wrong bodies": unmatched,
}


def duplicate_grade_ids(course: manifest.Course) -> list[str]:
    """Grade ids that occur twice anywhere in the course."""
    ids = [c.grade_id for lesson in course.lessons for c in source.cells(lesson) if c.grade_id]
    return [f"{name} occurs {count} times" for name, count in collections.Counter(ids).items() if count > 1]


# --- runs --------------------------------------------------------------------------------------------------------


def unsolved_fails(lesson: Lesson) -> str | None:
    """Checks that the released notebook passes although nothing is solved."""
    from tito.course.runner import run_notebook

    run = run_notebook(lesson)
    passed = [result.id for result in run.checks if result.passed]
    if len(run.checks) != len(lesson.checks):
        return f"{len(run.checks)} of {len(lesson.checks)} checks were run: {run.problem}"
    return f"pass without a solution: {', '.join(passed)}" if passed or run.earned else None


def solved_passes(lesson: Lesson) -> str | None:
    """Checks that the solved notebook fails."""
    from tito.course.runner import run_notebook

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / lesson.notebook.name
        path.write_text(source.solved_notebook(lesson), encoding="utf-8")
        run = run_notebook(lesson, path)
    failed = [f"{result.id}: {result.message}" for result in run.checks if not result.passed]
    if run.problem or failed or not run.checks or run.earned != lesson.points:
        return "; ".join([run.problem or "", *failed]).strip("; ") or f"{run.earned} of {lesson.points} points"
    return None


def hidden_pass(lesson: Lesson) -> str | None:
    """The first graded cell of the source, with its hidden tests, that fails on the solution."""
    cells = source.cells(lesson)
    failures = []
    for check in (cell for cell in cells if cell.is_check and "### BEGIN HIDDEN TESTS" in cell.source):
        failure = _run_check(lesson, _before(cells, check), check)
        failures += [f"{check.grade_id}: {failure}"] if failure else []
    return "; ".join(failures) or None


def wrong_bodies(lesson: Lesson):
    """One finding per wrong body: it must fail its check with its message."""
    jobs = [(entry, wrong) for entry in source.exercises(lesson) for wrong in entry.get("wrong", [])]
    with concurrent.futures.ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        problems = pool.map(lambda job: wrong_body_escapes(lesson, *job), jobs)
        for (entry, wrong), problem in zip(jobs, problems):
            yield Finding(lesson.number, f"wrong body {entry['id']}: {wrong['name']}", problem)


def wrong_body_escapes(lesson: Lesson, entry: dict, wrong: dict) -> str | None:
    """Why the wrong body is not caught as promised, or None when it is."""
    hole = f"{lesson.number}-{entry['id']}"
    solved = source.cells(lesson)
    original = next((cell for cell in solved if cell.grade_id == hole), None)
    wanted = wrong.get("check", f"{hole}-test")
    # the check as the student has it: without its hidden tests
    check = next((cell for cell in read(lesson.notebook) if cell.grade_id == wanted), None)
    if original is None or check is None:
        return f"there is no cell {hole if original is None else wanted}"
    try:
        changed = source.with_body(original.source, wrong["body"], wrong.get("hole", 1))
    except CourseError as error:
        return error.message
    before = _before(solved, check)
    if all(label != original.label for label, _ in before):
        return f"{wanted} stands before {hole}"
    failure = _run_check(
        lesson, [(label, changed if label == original.label else text) for label, text in before], check
    )
    if failure is None:
        return f"passes {wanted}"
    if wrong["message"] not in failure:
        return f"fails {wanted}, but says {failure!r} instead of {wrong['message']!r}"
    return None


def _before(cells: tuple[Cell, ...], check: Cell) -> list[tuple[str, str]]:
    """Label and source of the code cells before `check`, without other checks and without measurements."""
    stop = next(number for number, cell in enumerate(cells) if cell.grade_id == check.grade_id)
    return [
        (cell.label, cell.source)
        for cell in cells[:stop]
        if cell.kind == "code" and not cell.is_check and "-measure-" not in (cell.grade_id or "")
    ]


def _run_check(lesson: Lesson, before: list[tuple[str, str]], check: Cell) -> str | None:
    """Run the cells `before`, then `check`, in a fresh interpreter; its failure as text, None when it passed."""
    job = json.dumps({"cells": before, "check": [check.label, check.source]})
    path = os.pathsep.join([str(lesson.root), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tito.jobs.run_cells"],
            input=job,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=SECONDS_PER_WRONG_BODY,
            env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", "MPLBACKEND": "Agg"},
            cwd=tempfile.gettempdir(),
        )
    except subprocess.TimeoutExpired:
        return f"no end within {SECONDS_PER_WRONG_BODY} s"
    if done.returncode:
        return f"the interpreter ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
    return json.loads(done.stdout.splitlines()[-1])["failure"]
