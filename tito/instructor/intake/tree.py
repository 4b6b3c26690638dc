"""The files of a folder or a zip, listed and read so that no name and no size in them can do harm.

Links are listed with their problem and never followed; FIFOs and devices are never opened; a size is what was read,
not what a header says; nothing is unpacked to disk. Zips are read in archive.py.
"""

from __future__ import annotations

import functools
import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tito.course.errors import CourseError
from tito.instructor.intake import archive, times
from tito.instructor.intake.model import MOST_BYTES, MOST_FILES, File, Refusal, bounded, is_clutter

DEEPEST = 20  # folders within folders


@contextmanager
def opened(source: Path) -> Iterator[list[File]]:
    """The files of a folder or a zip; they can be read while the `with` block lasts."""
    if source.is_dir():
        yield folder_files(source)
        return
    try:
        opened_zip = zipfile.ZipFile(source)
    except UnicodeDecodeError:
        raise CourseError(
            f"{source} holds a name that is not the UTF-8 that it claims to be.",
            "Unpack it with another program and collect from the folder.",
        ) from None
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise CourseError(
            f"{source} is neither a folder nor a zip file that can be read ({error}).",
            "Name the folder or the zip file with the submissions; a broken download is best fetched again.",
        ) from None
    with opened_zip:
        yield archive.zip_files(opened_zip, times.from_seconds(source.stat().st_mtime))


def folder_files(root: Path) -> list[File]:
    """Everything below `root`; links and special files with their problem."""
    return [file for name in sorted(os.listdir(root)) for file in _below(root, (name,))]


def _below(root: Path, top: tuple[str, ...]) -> list[File]:
    """`top` and what lies below it, up to MOST_FILES: one student's million files do not stop the class."""
    found, waiting = [], [top]
    while waiting:
        parts = waiting.pop()
        file = None if is_clutter(parts) else _folder_file(root, parts)
        if file is None:
            continue
        if len(found) == MOST_FILES or len(parts) > DEEPEST:
            return [File(top, top[-1], file.when, file.read, "holds too many files or too deep folders")]
        found.append(file)
        if file.folder:
            waiting += sorted((parts + (name,) for name in _names(root.joinpath(*parts))), reverse=True)
    return found


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # no right to look into it: it counts as empty
        return []


def _folder_file(root: Path, parts: tuple[str, ...]) -> File | None:
    try:
        status = os.lstat(root.joinpath(*parts))
    except OSError:  # gone in this moment, or in a folder that may be listed and not entered
        return None
    kind = stat.S_IFMT(status.st_mode)
    problem = {stat.S_IFREG: None, stat.S_IFDIR: None, stat.S_IFLNK: "is a link"}.get(kind, "is no ordinary file")
    when = times.from_seconds(status.st_mtime)
    read = functools.partial(read_below, root, parts)
    return File(parts, parts[-1], when, read, problem, folder=kind == stat.S_IFDIR)


def read_below(root: Path, parts: tuple[str, ...], most: int = MOST_BYTES) -> bytes:
    """A regular file below `root`, at most MOST_BYTES of it; no part of the path may be a link, now or in a moment."""
    try:
        with open(_descriptor(root, parts), "rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise Refusal("is no ordinary file")
            return bounded(stream, most)
    except OSError as error:
        raise Refusal(f"cannot be read: {error.strerror}") from None


def _descriptor(root: Path, parts: tuple[str, ...]) -> int:
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if os.open not in os.supports_dir_fd:  # Windows, where a link was refused when it was listed
        return os.open(root.joinpath(*parts), flags)
    here = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    for part in parts:
        try:
            below = os.open(part, flags, dir_fd=here)
        finally:
            os.close(here)
        here = below
    return here
