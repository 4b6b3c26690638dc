"""What grading one submission came to: a plain record that travels as JSON from a runner to the gradebook."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass, field, fields


@dataclass(frozen=True)
class CheckGrade:
    """One check. `message` is a sentence for the student, empty where the check passed."""

    id: str
    points: float
    earned: float
    message: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Result:
    """One graded submission: always a row for every check, whatever happened.

    `problem` concerns the whole run (time, a notebook that is none). `findings` say what was repaired or left out
    (a changed test cell, an added one); `flags` ask for a person's look. All are sentences; the student sees
    `problem` and `findings`, the instructor sees `flags` too. `notebook` is the notebook as it was run, with
    outputs (JSON of nbformat 4.5), None where there was none to run.
    """

    job: str  # key of the job: hash of release, submission, limits and seed
    student: str
    assignment: str
    release: str  # hash of the assignment
    sandbox: str  # level reached: bwrap, landlock+userns, landlock, none
    checks: tuple[CheckGrade, ...]
    problem: str | None = None
    findings: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    notebook: dict | None = None
    seconds: float = 0.0
    log: tuple[str, ...] = field(default=())

    @property
    def earned(self) -> float:
        return sum(check.earned for check in self.checks)

    @property
    def max_score(self) -> float:
        return sum(check.points for check in self.checks)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the whole."""
        whole = {each.name: getattr(self, each.name) for each in fields(self)}
        whole["checks"] = [asdict(check) for check in self.checks]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    def as_text(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"


def from_text(text: str) -> Result:
    """The result that `as_text` wrote."""
    fields = json.loads(text)
    fields["checks"] = tuple(CheckGrade(**check) for check in fields["checks"])
    for name in ("findings", "flags", "log"):
        fields[name] = tuple(fields[name])
    return Result(**fields)
