"""The examples in the docstrings of the package run and print what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

from tito.course import manifest

COURSE = manifest.load(Path(__file__).parents[2])


@pytest.mark.parametrize("lesson", COURSE.lessons, ids=lambda lesson: lesson.folder)
def test_examples_run(lesson):
    result = doctest.testmod(importlib.import_module(lesson.module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
