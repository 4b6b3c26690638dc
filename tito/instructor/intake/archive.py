"""The entries of a zip file: what each is and whose, why some must not be read, and the rest read within bounds."""

from __future__ import annotations

import functools
import re
import stat
import zipfile
import zlib
from dataclasses import dataclass
from datetime import datetime

from tito.course.errors import CourseError
from tito.instructor.intake import times
from tito.instructor.intake.model import MIB, MOST_BYTES, MOST_FILES, File, Refusal, bounded, is_clutter, shown

MOST_IN_ZIP = 2048 * MIB  # unpacked, in all


@dataclass
class _Budget:
    """Bytes that a zip may still unpack to."""

    left: int = MOST_IN_ZIP


def zip_files(archive: zipfile.ZipFile, made: datetime) -> list[File]:
    """Every entry of a zip. `made` is the time of those that carry none."""
    entries = archive.infolist()
    if len(entries) > MOST_FILES:
        raise CourseError(
            f"{archive.filename} holds {len(entries)} files; {MOST_FILES} is the most that is read.",
            "Unpack it, look at what is in it, and collect from the folder.",
        )
    budget = _Budget()
    files = [_zip_file(archive, entry, made, budget) for entry in entries]
    return [file for file in files if file.path and (file.problem or not is_clutter(file.path))]


def _zip_file(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, made: datetime, budget: _Budget) -> File:
    name = _zip_name(entry)
    path = re.sub(r"^[A-Za-z]:", "", name)
    parts = tuple(part for part in re.split(r"[/\\]", path) if part not in ("", ".", ".."))
    read = functools.partial(_read_zip, archive, entry, budget)
    is_folder = name.endswith(("/", "\\"))
    last = parts[-1] if parts else ""
    return File(parts, last, _zip_time(entry, made), read, _zip_problem(entry, name), is_folder)


def _zip_name(entry: zipfile.ZipInfo) -> str:
    """The entry's name; many programs write UTF-8 without the flag that says so."""
    if entry.flag_bits & 0x800:
        return entry.filename
    try:
        return entry.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return entry.filename


def _zip_problem(entry: zipfile.ZipInfo, name: str) -> str | None:
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        return f"has an absolute path ({shown(name)})"
    if ".." in re.split(r"[/\\]", name):
        return f"has a path that leaves its folder ({shown(name)})"
    if kind == stat.S_IFLNK:
        return "is a link"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is no ordinary file"
    if entry.flag_bits & 0x1:
        return "is encrypted"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is packed in an unusual way; unpack the zip and collect from the folder"
    return None


def _zip_time(entry: zipfile.ZipInfo, made: datetime) -> datetime:
    """A zip keeps local time, without its zone; 1980 is what programs write that keep none."""
    try:
        when = datetime(*entry.date_time).timestamp()
    except (ValueError, OverflowError, OSError):
        return made
    return made if entry.date_time[:3] <= (1980, 1, 1) else times.from_seconds(when)


def _read_zip(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, budget: _Budget) -> bytes:
    if budget.left <= 0:
        raise Refusal(f"comes after {MOST_IN_ZIP // MIB} MiB of other files in the zip; it is not read")
    unpacked = MOST_BYTES
    try:
        with archive.open(entry) as stream:
            data = bounded(stream, MOST_BYTES)
        unpacked = len(data)
        return data
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, OSError, ValueError) as error:
        raise Refusal(f"cannot be unpacked: {shown(str(error))}") from None
    finally:
        budget.left -= unpacked
