"""Export: what is marked goes into the package; what is wrong is said with cell and line, and nothing comes out."""

import ast
import json
from dataclasses import replace

import pytest

from tito.course import notebook
from tito.course.errors import CourseError
from tito.course.export import module_source
from tito.course.manifest import Exercise, Lesson

LESSON = Lesson("01", "tensor", "Tensor", "arrays", "core.tensor", (), 60, 2)
HEAD = "#| default_exp core.tensor\n#| export\nimport math"
DOUBLE = "#| export\ndef double(x):\n    return 2 * x"


def cells(*sources, grade_ids=()):
    raw = [
        {"cell_type": "code", "id": f"c{n}", "source": text,
         "metadata": {"nbgrader": {"grade_id": grade_ids[n], "solution": True}} if n < len(grade_ids) else {}}
        for n, text in enumerate(sources)
    ]
    return notebook.cells_of({"cells": raw}, "test.ipynb")


def error(*sources, lesson=LESSON, **keywords):
    with pytest.raises(CourseError) as caught:
        module_source(lesson, cells(*sources, **keywords), "origin")
    return caught.value.message


def test_only_marked_cells_are_exported_in_their_order():
    marked = cells(HEAD, "print('not this')", DOUBLE, "#| export\nN = 3\n_hidden = 4")
    text = module_source(LESSON, marked, "Made by hand.")
    namespace = {}
    exec(compile(text, "tensor.py", "exec"), namespace)
    assert namespace["__all__"] == ["double", "N"]
    assert namespace["double"](4) == 8
    assert "print" not in text and "#|" not in text
    assert ast.get_docstring(ast.parse(text)) == "Tensor: arrays.\n\nLesson 01_tensor. Made by hand."
    assert "# %% cell 1\n" in text and "# %% cell 3\n" in text


def test_solution_markers_do_not_reach_the_package():
    solved = "#| export\ndef f():\n    ### BEGIN SOLUTION\n    return 1\n    ### END SOLUTION"
    text = module_source(LESSON, cells(HEAD, solved), "")
    assert "SOLUTION" not in text and "    return 1" in text


def test_a_syntax_error_names_cell_and_line():
    message = error(HEAD, "#| export\ndef f(:\n    pass", grade_ids=[None, "01-f"])
    assert message.startswith("cell 2 (01-f), line 2:") and "def f(:" in message


def test_a_return_outside_a_function_is_a_syntax_error_too():
    assert error(HEAD, "#| export\nx = 1\nreturn x").startswith("cell 2, line 3:")


@pytest.mark.parametrize("command", ["%timeit 1", "!ls", "%%time", "get_ipython().system('ls')"])
def test_notebook_commands_are_refused(command):
    message = error(HEAD, f"#| export\nx = 1\n{command}")
    assert message.startswith("cell 2, line 3:") and "notebook command" in message


def test_a_missing_target_is_named():
    assert "'#| default_exp core.tensor' is missing" in error("#| export\nx = 1")


@pytest.mark.parametrize("target", ["core.layers", "..evil", "os", "/etc/passwd"])
def test_a_wrong_target_is_refused(target):
    assert f"exports to '{target}'" in error(f"#| default_exp {target}\n#| export\nx = 1")


def test_a_cell_that_lost_its_directive_is_named():
    lesson = replace(LESSON, exports=("double",))
    message = error(HEAD, DOUBLE.replace("#| export\n", ""), lesson=lesson)
    assert message.startswith("cell 2 defines 'double', but lacks the line '#| export'")


def test_a_deleted_or_renamed_definition_is_named_with_its_cell():
    exercise = Exercise("double", "Twice", ("a", "b", "c"), ("double",))
    lesson = replace(LESSON, exports=("double",), exercises=(exercise,))
    assert "No exported cell defines 'double' (cell 01-double)" in error(HEAD, lesson=lesson)
    assert "No exported cell defines 'double'" in error(HEAD, DOUBLE.replace("double", "twice"), lesson=lesson)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b"{ \"cells\": [", "not valid JSON (line 1"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"[1, 2]", "not a notebook"),
        (b"{}", "not a notebook"),
        (json.dumps({"nbformat": 3, "worksheets": []}).encode(), "old notebook format 3"),
        (json.dumps({"nbformat": 4}).encode(), "no list of cells"),
        (json.dumps({"nbformat": 4, "cells": [{"cell_type": "code"}]}).encode(), "cell 1 has no source"),
    ],
)
def test_a_bad_notebook_gets_a_clear_sentence(tmp_path, content, words):
    path = tmp_path / "tensor.ipynb"
    path.write_bytes(content)
    with pytest.raises(CourseError, match="^[^\n]*$") as caught:
        notebook.read(path)
    assert words in caught.value.message and caught.value.hint
    assert path.read_bytes() == content


def test_a_missing_notebook_gets_a_clear_sentence(tmp_path):
    with pytest.raises(CourseError, match="There is no notebook"):
        notebook.read(tmp_path / "none.ipynb")


def test_a_cell_is_found_by_grade_id_and_else_by_cell_id():
    by_grade = cells("a", "b", grade_ids=["01-x", "01-y"])
    assert notebook.find(by_grade, "01-y").source == "b"
    assert notebook.find(cells("a", "b"), "c1").source == "b"
    assert notebook.find(by_grade, "01-z") is None
