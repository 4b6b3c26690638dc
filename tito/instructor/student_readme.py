"""The README.md of the folder that students get."""

from __future__ import annotations

from tito.course.manifest import Course, Lesson

TEXT = """# {course}

Build a deep-learning framework in NumPy, lesson by lesson. Each lesson is a Jupyter notebook of small steps: you write
about ten lines, and the next cell checks them and says which mistake it looks like.

## Install

Python 3.11 or newer, on Linux, macOS or Windows. In this folder:

    python3 -m venv .venv && source .venv/bin/activate
    pip install -e ".[plot]" jupyterlab
    tito doctor

On Windows the first line is `py -m venv .venv` and then `.venv\\Scripts\\activate`. An environment does not survive a
move: after you move or rename the folder, delete `.venv` and make it anew; your work stays.

## Work on a lesson

    tito module start {nn}      # what it builds and needs; opens the notebook in JupyterLab
    tito module test {nn}       # runs your notebook: each check with its points and its message
    tito module complete {nn}   # your code becomes {file}

Stuck: `tito module hint {nn}` goes one step further each time. `tito module reset {nn}` brings a fresh
notebook and keeps yours as a backup. `tito module list` shows all lessons, `tito status` which files are yours.

## Hand in

| lesson | points | you build | you hand in |
|---|---|---|---|
{table}

Hand in the notebook itself, saved and under its own name. Your code runs with it, in the cells that said "Your code
here" and in cells of your own; checks that were changed or deleted are put back before grading. They then also run with
other numbers than those you see, so write what the text asks for rather than what a check happens to look at.

{built} not here yet: {they} what you build. Until a lesson is completed,
those that need it cannot run.

## When you get a newer folder

Work on in the new one: copy your notebooks from the old `modules/` to the same places, and run `tito module complete`
for each lesson that you have done, in order. Keep the old folder until all of them are there.
"""


def readme(course: Course, graded: list[Lesson]) -> str:
    """What to install, where to begin, and which files to hand in; `graded` are the released lessons in order."""
    rows = [
        f"| {lesson.number} {lesson.title} | {lesson.points} | `{lesson.package_path.as_posix()}` "
        f"| `{lesson.notebook.relative_to(lesson.root).as_posix()}` |"
        for lesson in graded
    ]
    one = len(graded) == 1
    return TEXT.format(
        course=course.name,
        nn=graded[0].number,
        file=graded[0].package_path.as_posix(),
        table="\n".join(rows),
        built=f"`{graded[0].package_path.as_posix()}` is" if one else "The files in the third column are",
        they="it is" if one else "they are",
    )
