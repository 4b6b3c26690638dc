"""The one way into nbgrader: its settings as the course has them, its gradebook, and no word of its log."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tito.course.errors import CourseError
from tito.instructor.course import GradingCourse


@contextmanager
def nbgrader_ready() -> Iterator[None]:
    """Import and call nbgrader in here: its log is silent, and it finds the program `alembic` beside our Python."""
    # jsonschema imports a slow grammar where JupyterLab is installed; nbgrader's formats need none of it.
    sys.modules.setdefault("rfc3987_syntax", None)
    level, path = logging.root.manager.disable, os.environ.get("PATH")
    logging.disable(logging.CRITICAL)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), *filter(None, [path])])
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"nbgrader\.")  # of SQLAlchemy, when a submission is added
            yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "nbgrader":
            raise
        raise CourseError(
            "Grading needs nbgrader, which is not installed.", 'Run `pip install -e ".[grade]"` in the repository.'
        ) from None
    finally:
        logging.disable(level)
        os.environ.pop("PATH") if path is None else os.environ.update(PATH=path)


def settings(course: GradingCourse):
    """The course's nbgrader_config.py as traitlets reads it, with the root where the course lies now."""
    from traitlets.config.loader import PyFileConfigLoader

    try:
        config = PyFileConfigLoader(course.config.name, path=str(course.root)).load_config()
    except Exception as error:  # it is a program, and may fail in any way
        raise CourseError(
            f"{course.config} cannot be read: {type(error).__name__}: {error}.",
            "Mend the file; `tito grade init` in a new folder shows how it looks.",
        ) from None
    config.CourseDirectory.root = str(course.root)
    return config


def course_id(course: GradingCourse) -> str:
    """nbgrader's name of the course."""
    name = settings(course).CourseDirectory.get("course_id", "")
    if isinstance(name, str) and name.strip():
        return name.strip()
    raise CourseError(
        f"{course.config} names no course.", 'Add a line like `c.CourseDirectory.course_id = "tinytorch"` to it.'
    )


@contextmanager
def open_gradebook(course: GradingCourse) -> Iterator:
    """The course's `nbgrader.api.Gradebook`, closed at the end; made anew where the file is missing."""
    name = course_id(course)
    with nbgrader_ready():
        from nbgrader.api import Gradebook
        from sqlalchemy.exc import DatabaseError

        try:
            gradebook = Gradebook(f"sqlite:///{course.gradebook}", name)
        except DatabaseError as error:
            raise CourseError(
                f"{course.gradebook} cannot be opened: {error.orig}.",
                "Another program may hold it, or it is no gradebook of this version: `nbgrader db upgrade` brings an "
                "old one up to date.",
            ) from None
        with gradebook:
            yield gradebook
