"""A unit of grading work: one submission with all that decides its result, as JSON for any machine."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tito.course.errors import CourseError
from tito.instructor.sandbox import Limits

VERSION = 1  # of the way of grading: a higher one makes every submission run anew


@dataclass(frozen=True)
class Job:
    """One submission to grade. `notebook` is the submitted file's text, None where `problem` says why there is none.

    `package` holds files that stand in for the reference's: the student's own earlier lessons, path -> text.
    """

    student: str
    assignment: str
    release: str  # hash of the assignment it is graded with
    notebook: str | None
    problem: str | None = None
    package: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    limits: Limits = Limits()

    @functools.cached_property
    def key(self) -> str:
        """Hash of everything that decides the result: the same key, the same points."""
        return hashlib.sha256(f"{VERSION}\n{self.as_text()}".encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def seed(self) -> int:
        """Seeds every random number of the run; from the key, so that a rerun is the same."""
        return int(self.key[:12], 16)

    def as_text(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"


def from_text(text: str) -> Job:
    """The job that `as_text` wrote."""
    fields = json.loads(text)
    fields["limits"], fields["notes"] = Limits(**fields["limits"]), tuple(fields["notes"])
    return Job(**fields)


def read(path: Path) -> Job:
    """The job in the file `path`."""
    try:
        return from_text(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CourseError(f"{path} cannot be read: {error!r}.", "`tito grade plan` writes it anew.") from None
