"""nbgrader's exchange, by nbgrader's own `collect` as the course's settings have it.

nbgrader chooses the newest submission of each student. Only its copying is left out: it follows links, stops at the
first file that it cannot copy, and deletes what was collected before. The files are read where they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from tito.course.errors import CourseError
from tito.course.processes import private_folder
from tito.instructor.assignment import Assignment
from tito.instructor.course import GradingCourse
from tito.instructor.intake import folder, people, tree
from tito.instructor.intake.model import Delivery, File, shown
from tito.instructor.nbgrader_setup import nbgrader_ready, settings


@contextmanager
def opened(course: GradingCourse, roster: people.Roster, assignment: Assignment) -> Iterator[list[Delivery]]:
    """One delivery for each student in the exchange; they can be read while the `with` block lasts."""
    with private_folder() as private:
        found = _found(course, assignment, private / "work")
        yield [_delivery(student, path, roster, assignment) for student, path in sorted(found.items())]


def _found(course: GradingCourse, assignment: Assignment, scratch: Path) -> dict[str, Path]:
    """Student id -> the folder with the newest submission."""
    config = _settings(course)
    config.CourseDirectory.root = str(scratch)
    config.CourseDirectory.db_url = f"sqlite:///{course.gradebook}"
    config.CourseDirectory.assignment_id = assignment.name
    found: dict[str, Path] = {}
    with nbgrader_ready():
        from nbgrader.auth import Authenticator
        from nbgrader.coursedir import CourseDirectory
        from nbgrader.exchange import ExchangeError, ExchangeFactory

        collector = ExchangeFactory(config=config).Collect(
            coursedir=CourseDirectory(config=config), authenticator=Authenticator(config=config), config=config
        )
        collector.check_owner = False  # it stops at a dangling link; the owner is looked up below
        _forgive_names(collector)
        collector.do_copy = lambda source, target, log=None: found.update({Path(target).parent.name: Path(source)})
        try:
            collector.start()
        except ExchangeError as error:
            raise CourseError(
                f"nbgrader's exchange cannot be read: {error}.",
                "`c.Exchange.root` in nbgrader_config.py names its folder, which you must be able to write; "
                f"`nbgrader release_assignment {assignment.name}` makes the course's place in it. "
                f"Or name a folder or a zip file: `tito grade collect {assignment.number} PATH`.",
            ) from None
    for path in (scratch / "submitted").glob(f"*/{assignment.name}"):  # an exchange of another make copies by itself
        found.setdefault(path.parent.name, path)
    return found


def _forgive_names(collector) -> None:
    """A folder in the exchange whose name is no submission's is listed by that name; nbgrader would stop."""
    strict = getattr(collector, "_path_to_record", None)

    def forgiving(path: str) -> dict:
        try:
            return strict(path)
        except Exception:
            name = Path(path).name
            return {"username": name, "filename": name, "timestamp": datetime(1980, 1, 1)}

    if strict:
        collector._path_to_record = forgiving


def _settings(course: GradingCourse):
    """As nbgrader reads them: the system's and the user's nbgrader_config.py, then the course's."""
    from jupyter_core.paths import jupyter_config_path
    from traitlets.config import Config
    from traitlets.config.loader import PyFileConfigLoader

    merged = Config()
    for place in reversed(jupyter_config_path()):
        if (Path(place) / course.config.name).is_file():
            merged.merge(PyFileConfigLoader(course.config.name, path=place).load_config())
    merged.merge(settings(course))
    return merged


def _delivery(student: str, path: Path, roster: people.Roster, assignment: Assignment) -> Delivery:
    known = people.delivery(shown(student), roster.with_id(student), f"'{shown(student)}'")
    if path.is_symlink() or not path.is_dir():
        return replace(known, problem=known.problem or "its place in the exchange is no folder")
    owner = _user(path)
    remarks = (f"its folder belongs to {shown(owner)}",) if owner not in (None, student) else ()
    return replace(known, files=folder.of_lesson(_files(path), assignment), remarks=remarks)


def _files(path: Path) -> list[File]:
    try:
        return tree.folder_files(path)
    except OSError:  # no right to look into it
        return []


def _user(path: Path) -> str | None:
    """Who owns a submission on this machine, which nbgrader takes for the student."""
    try:
        return path.owner()
    except (KeyError, OSError, NotImplementedError):
        return None
