"""A folder of Git repositories, bare or not, each named after its student: the newest commit of the default branch.

Nothing is checked out and nothing of a student's repository is run: see repository.py.

The time is the commit's. Whoever commits can write any time into it; where that matters, ask the server of the
repositories when the push came.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from tito.course.errors import CourseError
from tito.course.processes import private_folder
from tito.instructor.assignment import Assignment
from tito.instructor.intake import people, repository
from tito.instructor.intake.model import MIB, MOST_BYTES, Delivery, File, Refusal, shown

MOST_LISTED = 16 * MIB  # bytes of a commit's list of files
MOST_COMMIT = MIB


def repositories(source: Path) -> list[Path]:
    """The repositories that lie directly in `source`, in order."""
    folders = [path for path in sorted(source.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    return [path for path in folders if (path / ".git").exists() or _is_bare(path)]


def matches(source: Path) -> bool:
    """Whether most folders in `source` are repositories."""
    folders = [path for path in source.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return 2 * len(repositories(source)) > len(folders)


@contextmanager
def opened(source: Path, roster: people.Roster, assignment: Assignment) -> Iterator[list[Delivery]]:
    """One delivery for each repository; they can be read while the `with` block lasts."""
    if not shutil.which("git"):
        raise CourseError("git is not installed.", "Install it, or collect from folders: `--from folder`.")
    with private_folder() as private:
        yield [_delivery(path, roster, assignment, private) for path in repositories(source)]


def _is_bare(path: Path) -> bool:
    return (path / "HEAD").exists() and (path / "objects").is_dir() and (path / "refs").is_dir()


def _delivery(path: Path, roster: people.Roster, assignment: Assignment, private: Path) -> Delivery:
    name = path.name.removesuffix(".git")
    known = people.delivery(shown(name), roster.with_id(name), f"'{shown(name)}'")
    if known.student is None:
        return known
    try:
        return replace(known, files=tuple(_files(path, assignment, private)))
    except Refusal as reason:
        return replace(known, problem=str(reason))
    except OSError as error:
        return replace(known, problem=f"the repository cannot be read: {error.strerror}")


def _files(path: Path, assignment: Assignment, private: Path) -> list[File]:
    """The notebook in modules/, else every file of its name, as the newest commit has them."""
    if path.is_symlink():
        raise Refusal("the repository is a link")
    own = path if _is_bare(path) else path / ".git"
    repository.require_plain(own)
    commit = repository.newest_commit(own)
    git = functools.partial(repository.ask, own / "objects", private, "sha256" if len(commit) == 64 else "sha1")
    if int(git(["cat-file", "-s", commit], 100)) > MOST_COMMIT:
        raise Refusal("its newest commit is too large")
    when = repository.commit_time(git(["cat-file", "commit", commit], MOST_COMMIT))
    wanted = f"{assignment.notebook}.ipynb"
    listing = git(["ls-tree", "-r", "-z", "-l", "--full-tree", commit], MOST_LISTED)
    files = [_file(entry, when, git) for entry in listing.split(b"\0") if entry]
    named = [file for file in files if file.name == wanted]
    return [file for file in named if file.path == ("modules", assignment.name, wanted)] or named


def _file(entry: bytes, when: datetime, git) -> File:
    """A line of `git ls-tree -l`: mode, type, hash, size, tab, path."""
    head, _, name = entry.partition(b"\t")
    mode, _, blob, size = head.decode("ascii").split()
    path = tuple(os.fsdecode(name).split("/"))
    problem = {"120000": "is a link", "160000": "is a repository of its own"}.get(mode)
    if size.isdigit() and int(size) > MOST_BYTES:
        problem = f"is larger than {MOST_BYTES // MIB} MiB"
    return File(path, path[-1], when, functools.partial(git, ["cat-file", "blob", blob], MOST_BYTES), problem)
