"""Every lesson keeps its promises: built files are up to date, checks can fail, can pass, and help.

The work is done by `tito dev verify`; here each part of it is a test of its own, so that they run side by side.
"""

import re
from pathlib import Path

import pytest

from tito.course import manifest, notebook, source
from tito.maintainer import build, verify

ROOT = Path(__file__).parents[2]
COURSE = manifest.load(ROOT)
each_lesson = pytest.mark.parametrize("lesson", COURSE.lessons, ids=lambda lesson: lesson.folder)


def test_every_lesson_of_the_registry_is_in_the_index():
    names = [lesson.folder for lesson in source.bare_lessons(ROOT)]
    assert len(names) >= 12
    assert [lesson.folder for lesson in COURSE.lessons] == names


def test_the_committed_index_is_the_built_one():
    lessons = source.bare_lessons(ROOT)
    assert build.index_text(ROOT, lessons, lessons) == (ROOT / manifest.INDEX).read_text(encoding="utf-8")


def test_grade_ids_are_unique_in_the_course():
    assert verify.duplicate_grade_ids(COURSE) == []


@each_lesson
@pytest.mark.parametrize("subject", verify.STRUCTURE)
def test_structure(lesson, subject):
    assert verify.STRUCTURE[subject](lesson) is None


@each_lesson
def test_cell_ids_are_stable_and_unique(lesson):
    first, second = build.notebook_text(lesson), build.notebook_text(lesson)
    assert first == second
    ids = [cell.id for cell in notebook.read(lesson.notebook)]
    assert len(ids) > 10
    assert len(set(ids)) == len(ids)


@each_lesson
def test_no_solution_is_left_in_the_notebook(lesson):
    """Neither a marker, nor any line of a solution that the lesson does not show elsewhere."""
    released = lesson.notebook.read_text(encoding="utf-8")
    assert "BEGIN SOLUTION" not in released and "HIDDEN TESTS" not in released
    shown = "\n".join(cell.source for cell in notebook.read(lesson.notebook))
    visible = "\n".join(
        re.sub(r"### BEGIN (HIDDEN TESTS|SOLUTION).*?### END \1", "", cell.source, flags=re.S)
        for cell in source.cells(lesson)
    )
    holes = [cell for cell in source.cells(lesson) if cell.is_hole]
    assert holes
    for cell in holes:
        for region in source.REGION.finditer(cell.source):
            for line in region.group().splitlines()[1:-1]:
                line = line.strip()
                if len(line) >= 20 and not line.startswith("#") and line not in visible:
                    assert line not in shown, f"{cell.label} shows a line of its solution: {line}"


@each_lesson
def test_the_unsolved_notebook_fails_every_check_and_earns_nothing(lesson):
    assert verify.unsolved_fails(lesson) is None


@each_lesson
def test_the_solved_notebook_passes_every_check_and_earns_all(lesson):
    assert verify.solved_passes(lesson) is None


@each_lesson
def test_hidden_tests_pass_on_the_solution(lesson):
    assert verify.hidden_pass(lesson) is None


WRONG = [
    pytest.param(lesson, entry, wrong, id=f"{lesson.number}-{entry['id']}: {wrong['name']}")
    for lesson in COURSE.lessons
    for entry in source.exercises(lesson)
    for wrong in entry.get("wrong", [])
]


@pytest.mark.parametrize(("lesson", "entry", "wrong"), WRONG)
def test_a_wrong_body_fails_its_check_with_the_message_that_helps(lesson, entry, wrong):
    assert verify.wrong_body_escapes(lesson, entry, wrong) is None
