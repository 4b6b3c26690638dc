"""What a form finds in its source: deliveries, each a student's files, read only when they are wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import BinaryIO

from tito.instructor.submission import LARGEST

MIB = 2**20
MOST_BYTES = LARGEST  # of one file
MOST_FILES = 20_000  # in a zip, or in one student's folder
CLUTTER = {"__MACOSX", "__pycache__", "Thumbs.db", "desktop.ini"}  # and every name that begins with a dot


class Refusal(Exception):
    """Why one student's files are not taken; the class goes on."""


@dataclass(frozen=True)
class File:
    """A file in a source. `path` is for words and for telling whose it is, never for opening anything."""

    path: tuple[str, ...]
    name: str  # as the student named it, without what a learning platform put around it
    when: datetime  # in UTC
    read: Callable[[], bytes]  # bounded; raises Refusal
    problem: str | None = None  # why it must not be read: "is a link"
    folder: bool = False
    version: int = 0  # Canvas counts a student's uploads of one name

    @property
    def shown(self) -> str:
        return shown("/".join(self.path))

    @property
    def is_notebook(self) -> bool:
        return not self.folder and self.name.lower().endswith(".ipynb")


@dataclass(frozen=True)
class Delivery:
    """What a source holds of one student. `student` is None where it cannot be told, and `problem` says why."""

    label: str  # as the source names the student
    student: str | None
    files: tuple[File, ...] = ()
    problem: str | None = None
    remarks: tuple[str, ...] = ()
    marked_late: bool = False  # by the platform, e.g. Canvas' LATE in the file's name
    in_time: bool = False  # by the platform, which names no time


def is_clutter(parts: tuple[str, ...]) -> bool:
    """Hidden files, caches, and what macOS and Windows add by themselves."""
    return any(part in CLUTTER or part.startswith(".") for part in parts)


def bounded(stream: BinaryIO, most: int) -> bytes:
    """All of `stream`; Refusal where it is more than `most` bytes, whatever was said of its size."""
    data = stream.read(most + 1)
    if len(data) > most:
        raise Refusal(f"is larger than {most // MIB} MiB")
    return data


def shown(text: str, most: int = 120) -> str:
    """A stranger's name as it may reach a terminal: control and invisible characters spelled out, length bounded."""
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return safe if len(safe) <= most else safe[:most] + "…"


def listed(names: list[str], most: int = 5) -> str:
    """`a, b and 3 more`."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
