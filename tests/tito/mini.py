"""A course of three tiny lessons in plain Python, built by tito's own build: what the tests of tito work on.

It is fast (no NumPy in a kernel) and does not change when a lesson of the real course does.
"""

# ruff: noqa: E501

from __future__ import annotations

from pathlib import Path

COURSE = """
[course]
name = "Mini"
id = "mini"

[[lesson]]
number = "01"
name = "scale"
title = "Scale"
summary = "numbers, doubled and added up"
target = "core.scale"
needs = []
minutes = 10
points = 6

[[lesson]]
number = "02"
name = "shift"
title = "Shift"
summary = "numbers, moved along"
target = "core.shift"
needs = ["scale"]
minutes = 5
points = 3

[[lesson]]
number = "04"
name = "words"
title = "Words"
summary = "text, counted → a table"
target = "text.words"
needs = []
minutes = 5
points = 1
"""

HEAD = """# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   tinytorch:
#     lesson: "{number}"
# ---

# %% [markdown]
\"\"\"
# Lesson {number}
\"\"\"

# %%
#| default_exp {target}
#| export
{imports}
"""

HOLE = """
# %% nbgrader={{"grade": false, "grade_id": "{id}", "locked": false, "schema_version": 3, "solution": true, "task": false}}
#| export
def {name}(x):
    \"\"\"{doc}\"\"\"
    ### BEGIN SOLUTION
    return {solution}
    ### END SOLUTION
"""

CHECK = """
# %% nbgrader={{"grade": true, "grade_id": "{id}-test", "locked": true, "points": {points}, "schema_version": 3, "solution": false, "task": false}}
def test_{name}():
    \"\"\"By hand.\"\"\"
    got = {call}
    assert got == {expected}, f"{call}: got {{got}}, expected {expected}: {mistake}"
    ### BEGIN HIDDEN TESTS
    assert {call} == {expected}
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_{name}()
"""

EXERCISE = """
[[exercise]]
id = "{id}"
title = "{title}"
hints = ["Look at the example in the docstring of {id}.", "The idea of {id}.", "The steps of {id}: one line."]
[[exercise.wrong]]
name = "forgets it"
message = "{mistake}"
body = "return x"
"""

PROGRESSIVE = '''"""Lesson {number} with everything before it."""

import {module} as lesson


class TestTogether:
    def test_{name}(self):
        assert lesson.{call} == {expected}, "{name} does not fit with the lessons before it"
'''


def hole(number: str, name: str, solution: str, call: str, expected: str, points: int, mistake: str) -> str:
    """A hole and its check."""
    identity = f"{number}-{name}"
    return HOLE.format(id=identity, name=name, doc=f"Example: {call} is {expected}.", solution=solution) + CHECK.format(
        id=identity, name=name, points=points, call=call, expected=expected, mistake=mistake
    )


LESSONS = {
    "01_scale": (
        HEAD.format(number="01", target="core.scale", imports="UNIT = 1")
        + hole("01", "double", "2 * x", "double(4)", "8", 2, "was the factor forgotten?")
        + hole("01", "total", "sum(x)", "total([1, 2, 3])", "6", 3, "was only one number taken?")
        + CHECK.format(
            id="01-module", name="module", points=1, call="double(total([1, 2]))", expected="6", mistake="together?"
        ),
        [("double", "Twice a number", "was the factor"), ("total", "The sum", "only one number")],
    ),
    "02_shift": (
        HEAD.format(number="02", target="core.shift", imports="from tinytorch.core.scale import double")
        + hole("02", "shift", "double(x) + 1", "shift(3)", "7", 3, "was one forgotten?"),
        [("shift", "One further", "was one forgotten")],
    ),
    "04_words": (
        HEAD.format(number="04", target="text.words", imports="import collections")
        + hole("04", "count", "len(x.split())", "count('a b')", "2", 1, "blanks → words?"),
        [("count", "Words, counted", "blanks → words")],
    ),
}
TESTS = {
    "01_scale": PROGRESSIVE.format(
        number="01", module="tinytorch.core.scale", name="scale", call="double(lesson.total([1, 2]))", expected="6"
    ),
    "02_shift": PROGRESSIVE.format(
        number="02", module="tinytorch.core.shift", name="shift", call="shift(5)", expected="11"
    ),
}


def write(root: Path) -> None:
    """Write the sources of the mini course below `root` and build it there."""
    from tito.maintainer.build import build

    def put(path: str, text: str) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8", newline="\n")

    put("src/course.toml", COURSE)
    for package in ("tinytorch", "tinytorch/core", "tinytorch/text"):
        put(f"{package}/__init__.py", '"""The mini course."""\n')
    for folder, (source, exercises) in LESSONS.items():
        put(f"src/{folder}/{folder}.py", source)
        entries = (EXERCISE.format(id=i, title=title, mistake=mistake) for i, title, mistake in exercises)
        put(f"src/{folder}/exercises.toml", "".join(entries))
    for folder, text in TESTS.items():
        put(f"tests/{folder}/test_progressive_integration.py", text)
    build(root)
