"""`tito module start NN`: what a lesson builds and needs; opens its notebook."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from urllib.parse import quote

from tito import show
from tito.course import notebook
from tito.course.errors import CourseError
from tito.course.manifest import Course, Lesson
from tito.student.standing import Standing, standings

MOST_NAMES = 12


def start(course: Course, name: str, open_notebook: bool = True) -> int:
    """Describe the lesson and open its notebook in JupyterLab where there is one and a person at a terminal."""
    lesson = course.lesson(name)
    notebook.read(lesson.notebook)  # a damaged or missing notebook is said now, not in the browser
    known = {standing.name: standing for standing in standings(course)}
    describe(lesson, known)
    jupyter = open_notebook and _can_open()
    done = known[lesson.name].state == "completed"
    show.steps(
        (f"tito module test {lesson.number}", "run your notebook and see the points"),
        (f"tito module hint {lesson.number}", "when you are stuck"),
        (f"tito module complete {lesson.number}", "again, after a change" if done else "put your code to use"),
    )
    return _open(lesson) if jupyter else 0


def describe(lesson: Lesson, known: dict[str, Standing]) -> None:
    """What the lesson builds, needs and exports, and where its notebook lies."""
    own = known[lesson.name]
    show.heading(
        f"Lesson {lesson.number}: {lesson.title}",
        f"about {lesson.minutes} minutes, {show.count(lesson.points, 'point')}",
    )
    show.line(f"{lesson.summary[:1].upper()}{lesson.summary[1:]}.")
    show.line()
    needs = [f"{known[n].number} {n} ({known[n].whose})" for n in lesson.needs if n in known]
    exercises = ", ".join(exercise.id for exercise in lesson.exercises)
    show.rows([
        ("Exercises", f"{len(lesson.exercises)}: {exercises}" if exercises else "none"),
        ("Needs", ", ".join(needs) or "nothing before it"),
        ("Exports", _exports(lesson)),
        ("Into", f"{own.file} (now: {own.whose})"),
        ("Notebook", str(lesson.notebook)),
    ])  # fmt: skip
    first = [known[n].number for n in lesson.needs if n in known and known[n].owner == "to build"]
    if first:
        show.line()
        show.line(f"What is marked to build comes first: `tito module start {first[0]}`.", style="bold")
    if any(known[n].whose == "reference" for n in lesson.needs if n in known):
        show.line()
        show.line("What is marked reference comes with the course, so you can begin here.", style="dim")


def _exports(lesson: Lesson) -> str:
    """The names that the lesson gives to the package, those of its exercises first."""
    own = [name for exercise in lesson.exercises for name in exercise.exports]
    names = list(dict.fromkeys([*own, *lesson.exports]))
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "") or "nothing"


def _can_open() -> bool:
    """Is a person at this terminal, and JupyterLab installed?"""
    at_terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    return at_terminal and importlib.util.find_spec("jupyterlab") is not None


def _open(lesson: Lesson) -> int:
    """Run JupyterLab on the notebook until the learner ends it."""
    show.line()
    show.line("JupyterLab opens in your browser; Ctrl-C here ends it.", style="dim")
    sys.stdout.flush()
    where = quote(lesson.notebook.relative_to(lesson.root).as_posix())
    command = [
        *(sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={lesson.root}"),
        *(f"--LabApp.default_url=/lab/tree/{where}", "--ServerApp.log_level=ERROR", "--LabApp.log_level=ERROR"),
    ]
    path = os.pathsep.join([str(lesson.root), *filter(None, [os.environ.get("PYTHONPATH")])])
    # The notebook's `import tinytorch` must find this course's package, wherever else there is one.
    process = subprocess.Popen(command, cwd=lesson.root, env={**os.environ, "PYTHONPATH": path})
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:  # JupyterLab hears it too, asks, and ends by itself
            continue
    if code in (0, 130, -2):
        return 0
    raise CourseError("JupyterLab ended with an error.", f"Any notebook editor will do: open {lesson.notebook}.")
