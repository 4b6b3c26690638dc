"""Negative controls: made from a check's text, kept to what the reference fails, and failed by every honest lesson."""

from __future__ import annotations

from pathlib import Path

import pytest

from tito.course import manifest, source
from tito.instructor import freeze
from tito.instructor.claims import control_of
from tito.instructor.job import Job
from tito.instructor.run import run_job

REPOSITORY = Path(__file__).resolve().parents[2]
LESSONS = manifest.load(REPOSITORY).lessons


@pytest.mark.parametrize(
    ("check", "control"),
    [
        ("assert got == 18, 'no'", "_claim(0, lambda: _same(None, got, 18))"),
        ("assert a == 1 and b == 2", "_claim(0, lambda: _same(None, a, 1) and _same(None, b, 2))"),
        ("assert np.allclose(a, b, atol=1)", "_claim(0, lambda: _same(np.allclose, a, b, atol=1))"),
        ("np.testing.assert_equal(a, b)", "_claim(0, lambda: _same(np.testing.assert_equal, a, b))"),
        ("assert x is None", "_claim(0, lambda: x is _tilt(None))"),
        ("assert 'a' in text", "_claim(0, lambda: _tilt('a') in text)"),
        ("assert np.abs(a - b).max() < 1", "_claim(0, lambda: np.abs(a - _tilt(b)).max() < 1)"),
        ("error = abs(a - b)", "error = abs(a - _tilt(b))"),
        ("assert (a == b).all()", "_claim(0, lambda: (a == _tilt(b)).all())"),
        ("x = f(1)", "x = f(1)"),
    ],
)
def test_what_an_assertion_becomes(check, control):
    assert control_of(check) == control + "\n"


def test_a_claim_that_is_not_kept_is_still_evaluated():
    control = control_of("assert f() == 1\nassert g() == 2", keep={1})
    assert control == "f() == 1\n_claim(1, lambda: _same(None, g(), 2))\n"


def test_every_check_of_lesson_17_has_a_claim(lesson17):
    controls = lesson17.assignment.controls
    assert set(controls) == {cell.grade_id for cell in lesson17.assignment.checks}
    assert all("_claim(" in control for control in controls.values())


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.folder)
def test_the_solved_lesson_earns_everything_and_nobody_is_flagged(lesson, level):
    assignment = freeze.freeze(lesson)
    job = Job("ann", assignment.name, assignment.hash, source.solved_notebook(lesson))
    result = run_job(job, assignment, level)
    assert [(check.id, check.message) for check in result.checks if check.message] == []
    assert (result.earned, result.problem) == (assignment.max_score, None)
    assert (result.findings, result.flags) == ((), ())
