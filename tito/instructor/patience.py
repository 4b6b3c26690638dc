"""Waiting for a database that another program holds, and saying what to do when it does not let go."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tito.course.errors import CourseError

PATIENCE = 30.0  # seconds to wait for a database that another program has locked
ATTEMPT = 1.0  # of these, how long SQLite itself waits before we try from the start
TRANSIENT = ("locked", "UNIQUE")  # UNIQUE: another writer added the same row first, so look again


def patiently(step: Callable, database: Path, patience: float = PATIENCE):
    """`step()`, again and again while another program holds the database."""
    give_up = time.monotonic() + patience
    while True:
        try:
            return step()
        except Exception as error:
            cause = _of_database(error)
            if cause is None:
                raise
            if not any(word in str(cause) for word in TRANSIENT):
                raise CourseError(
                    f"{database} cannot be written: {cause}.",
                    "Is the disk full, or the file read-only or of an older nbgrader? `nbgrader db upgrade` helps "
                    "there. Results are kept; merge again.",
                ) from None
            if time.monotonic() >= give_up:
                raise CourseError(
                    f"{database} was locked by another program for {patience:g} s.",
                    "Nothing was lost: results are kept. Close what has it open (formgrader, a database viewer) "
                    "and run `tito grade merge` again.",
                ) from None
        pause()


def pause() -> None:
    time.sleep(0.05)


def _of_database(error: BaseException | None) -> BaseException | None:
    """The database's own error behind `error`; None where it is none of the database's."""
    from sqlalchemy.exc import DatabaseError

    if isinstance(error, CourseError):
        error = error.__context__  # how opening the gradebook tells it
    return error.orig if isinstance(error, DatabaseError) else None
