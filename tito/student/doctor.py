"""`tito doctor`: does everything that the course needs work here, and what to do where it does not."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from tito import show
from tito.course import manifest, progress
from tito.course.errors import CourseError
from tito.course.manifest import Course

DISTRIBUTION = "tinytorch-course"
OPTIONAL = {
    "jupyterlab": "`pip install jupyterlab` to work on the notebooks in a browser; any notebook editor will do",
    "matplotlib": "`pip install matplotlib` to see the plots; everything else works without",
}
LEAST_PYTHON, LEAST_FREE = (3, 11), 500 * 2**20
NOTEBOOK = '{"cells": [%s], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
CELL = '{"cell_type": "code", "id": "one", "metadata": {}, "source": "1 + 1", "outputs": [], "execution_count": null}'


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `advice` says what to do where it is not well."""

    subject: str
    state: str  # ok, note, problem
    found: str
    advice: str = ""


def doctor(json: bool = False) -> int:
    """Look at everything; 0 only if there is no problem."""
    with show.Working("looking at this machine and the course", quiet=json) as working:
        findings = [python(), *packages()]
        course, found = course_here()
        findings.append(found)
        if course:
            findings += [write_access(course), disk(course), progress_file(course)]
            working.tell("importing the package")
            findings += [package(course), which_package(course)]
            working.tell("starting a kernel")
            findings.append(kernel(course))
    problems = [finding for finding in findings if finding.state == "problem"]
    if json:
        show.as_json({"ok": not problems, "findings": [asdict(finding) for finding in findings]})
        return 1 if problems else 0
    show.rows([(finding.state, finding.subject, finding.found) for finding in findings], indent=0)
    for finding in findings:
        if finding.advice:
            show.line()
            show.line(show.wrapped(finding.advice, f"{finding.subject}: ", "  "))
    show.line()
    show.line(
        f"{show.count(len(problems), 'problem')}: see above what to do." if problems else "All is well.", style="bold"
    )
    return 1 if problems else 0


def python() -> Finding:
    found = f"{sys.version.split()[0]} at {sys.executable}"
    if sys.version_info[:2] < LEAST_PYTHON:
        return Finding("Python", "problem", found, "The course needs Python 3.11 or newer: make a new environment.")
    return Finding("Python", "ok", found)


def packages() -> list[Finding]:
    """What the installed course asks for, and the optional rest."""
    try:
        wanted = [text for text in metadata.requires(DISTRIBUTION) or [] if "extra ==" not in text]
    except metadata.PackageNotFoundError:
        advice = "Run `pip install -e .` in the folder of the course."
        return [Finding(DISTRIBUTION, "problem", "not installed", advice)]
    findings = [_package(text) for text in wanted]
    for name, advice in OPTIONAL.items():
        version = _version(name)
        findings.append(Finding(name, "ok", version) if version else Finding(name, "note", "not installed", advice))
    return findings


def _package(requirement: str) -> Finding:
    """One requirement such as `numpy>=1.26`."""
    name, least = re.match(r"([\w.-]+)\s*(?:>=\s*([\d.]+))?", requirement).groups()
    version, advice = _version(name), f"`{_pasted()} -m pip install '{requirement}'` brings it."
    if version is None:
        return Finding(name, "problem", f"not installed, needed: {requirement}", advice)
    if least and _numbers(version) < _numbers(least):
        return Finding(name, "problem", f"{version} is too old, needed: {requirement}", advice)
    return Finding(name, "ok", version)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:3]]


def course_here() -> tuple[Course | None, Finding]:
    try:
        course = manifest.load()
    except CourseError as error:
        return None, Finding("course", "problem", error.message, error.hint)
    gone = [lesson.number for lesson in course.lessons if not lesson.notebook.is_file()]
    if gone:
        advice = "; ".join(f"`tito module reset {number}`" for number in gone)
        return course, Finding("course", "problem", f"no notebook of {', '.join(gone)}", f"To get it back: {advice}.")
    return course, Finding("course", "ok", f"{course.name}, {len(course.lessons)} lessons, {course.root}")


def write_access(course: Course) -> Finding:
    """Can tito write where it must: notebooks, package, progress?"""
    for folder in (course.root, course.root / "modules", course.root / "tinytorch"):
        try:
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".tito-doctor-"):
                pass
        except OSError as error:
            advice = f"Give yourself write access to {folder}, or copy the course to a folder of yours."
            return Finding("write access", "problem", f"{folder}: {error.strerror}", advice)
    return Finding("write access", "ok", "notebooks, package and progress")


def disk(course: Course) -> Finding:
    free = shutil.disk_usage(course.root).free
    found = f"{free / 2**30:.1f} GiB free"
    if free < LEAST_FREE:
        return Finding("disk", "problem", found, "Make room: runs and checkpoints need about half a GiB.")
    return Finding("disk", "ok", found)


def progress_file(course: Course) -> Finding:
    try:
        done = progress.read(course.root).lessons
    except CourseError as error:
        return Finding("progress", "problem", error.message, error.hint)
    return Finding("progress", "ok", f"{len(done)} of {len(course.lessons)} lessons completed")


def package(course: Course) -> Finding:
    """Does each file of the package import? In a process of its own: it may be the learner's."""
    from tito.course.runner import run_progressive

    ready = _built(course)
    run = run_progressive([], course.root, imports=ready)
    if run.ok:
        rest = len(course.lessons) - len(ready)
        later = f", {rest} to build or waiting for those" if rest else ""
        return Finding("package", "ok", f"{show.count(len(ready), 'file')} import{later}")
    wrong = run.problem or ": ".join(run.failed[0])
    advice = "`tito status` says whose the file is; `tito module reset NN` brings the reference back."
    return Finding("package", "problem", wrong, advice)


def _built(course: Course) -> list[manifest.Lesson]:
    """The lessons whose file should import: without those that a student of a class has yet to build or needs first."""
    waiting = set()
    for lesson in course.lessons:
        to_build = not lesson.has_reference and not lesson.package_file.is_file()
        if to_build or waiting & set(lesson.needs):
            waiting.add(lesson.name)
    return [lesson for lesson in course.lessons if lesson.name not in waiting]


def which_package(course: Course) -> Finding:
    """What would a notebook get that was opened without tito?"""
    code = "import importlib.util as u; s = u.find_spec('tinytorch'); print(ascii(s.origin) if s else '')"
    with tempfile.TemporaryDirectory() as elsewhere:
        answer = subprocess.run([sys.executable, "-c", code], cwd=elsewhere, capture_output=True, encoding="utf-8")
    found = Path(ast.literal_eval(answer.stdout)).parent if answer.stdout.strip() else None
    if found and found.resolve() == (course.root / "tinytorch").resolve():
        return Finding("tinytorch", "ok", "Python finds the one of this course")
    advice = (
        "A notebook that `tito module start` opens uses this course's package, and so does every run of tito. "
        f"Before you start Jupyter in another way, set PYTHONPATH to {course.root}."
    )
    if found is None:  # the folder was moved or renamed after `pip install -e .`
        advice += f" For good: `{_pasted()} -m pip install -e .` in that folder."
    return Finding("tinytorch", "note", f"Python finds {found}" if found else "Python does not find it", advice)


def kernel(course: Course) -> Finding:
    """Does a kernel start and compute?"""
    from tito.course.runner import run_notebook

    nothing = manifest.Lesson("00", "doctor", "", "", "doctor", (), 0, 0, root=course.root)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "doctor.ipynb")
        path.write_text(NOTEBOOK % CELL, encoding="utf-8")
        run = run_notebook(nothing, path)
    wrong = run.problem or next(iter(run.notes), None)
    if wrong:
        advice = f"Install it anew: `{_pasted()} -m pip install --force-reinstall ipykernel jupyter_client`."
        return Finding("kernel", "problem", wrong, advice)
    return Finding("kernel", "ok", f"starts and computes, {run.seconds:.1f} s")


def _pasted() -> str:
    """This Python as a shell takes it, also where its path has a space."""
    return subprocess.list2cmdline([sys.executable])
