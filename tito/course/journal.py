"""Changing several files as one: all of them or none, whatever ends the process in between.

The new texts are written into one journal first. Once it stands under its name the change is decided; from then on
it is only carried out, by us or, after a kill, by the next command, as often as that takes. Everything of this
kind lies in `.tito` of the course.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import cache_from_source
from pathlib import Path

from tito.course.errors import CourseError
from tito.course.files import write_atomic

STATE = ".tito"
COMMAND, FILES = "command.lock", "files.lock"  # held for a whole complete or reset; held while files change


@contextmanager
def locked(root: Path, name: str = FILES, patience: float = 10.0) -> Iterator[None]:
    """Hold the lock `name` of the course; the system lets go of it when this process ends, however it ends."""
    (root / STATE).mkdir(exist_ok=True)
    with open(root / STATE / name, "a+b") as file:
        deadline = time.monotonic() + patience
        while not _try_lock(file):
            if time.monotonic() > deadline:
                raise CourseError(
                    "Another tito command is completing or resetting a lesson of this course.",
                    "Wait until it has ended, or end it with Ctrl-C in its terminal, and try again.",
                )
            time.sleep(0.05)
        try:
            yield
        finally:
            _unlock(file)


def _try_lock(file) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks: better without than not at all
        return True


def _unlock(file) -> None:
    with suppress(OSError):
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_UN)


def commit(root: Path, texts: dict[Path, str | None]) -> None:
    """Give every file in `texts` (path relative to the root) its new text, or delete it (None): all or none.

    The lock is held.
    """
    writes = [{"path": path.as_posix(), "text": text} for path, text in texts.items()]
    try:
        write_atomic(_journal(root), json.dumps({"version": 1, "writes": writes}))
    except OSError as error:
        raise CourseError(f"{root / STATE} cannot be written: {error}.", "Nothing was changed.") from None
    _carry_out(root)


def recover(root: Path) -> None:
    """Carry out what a killed command had decided. Every command that reads package or progress calls this first."""
    if _journal(root).exists():
        with locked(root):
            _carry_out(root)


def _journal(root: Path) -> Path:
    return root / STATE / "journal.json"


def _carry_out(root: Path) -> None:
    """Write the journal's texts and remove it; doing so twice does no harm. The lock is held."""
    journal = _journal(root)
    try:
        writes = json.loads(journal.read_text(encoding="utf-8"))["writes"]
    except FileNotFoundError:  # another command was faster
        return
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise CourseError(
            f"{journal} was damaged by hand: it holds a change that is not carried out yet.",
            "Delete it, then complete or reset the lesson you were working on again.",
        ) from None
    for write in writes:
        try:
            _put(root / write["path"], write["text"])
        except OSError as error:
            raise CourseError(
                f"{write['path']} cannot be written: {error}.",
                "Mend that (rights, disk space, a program that holds the file); the next tito command goes on here.",
            ) from None
    journal.unlink(missing_ok=True)
    remove_leftovers(journal)


def _put(path: Path, text: str | None) -> None:
    remove_leftovers(path)
    if text is None:
        path.unlink(missing_ok=True)
    else:
        write_atomic(path, text)
    if path.suffix == ".py":  # a compiled file of the same second and size would pass for this one's
        with suppress(OSError):
            Path(cache_from_source(str(path))).unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Delete temporary files that a killed `write_atomic` of `path` left behind. The lock is held."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        with suppress(OSError):
            leftover.unlink()
