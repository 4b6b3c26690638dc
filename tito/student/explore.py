"""`tito explore kv-cache`: a recorded generation as an interactive page."""

from __future__ import annotations

from pathlib import Path

from tito.course.errors import CourseError
from tito.course.manifest import Course
from tito.student.demo import CHECKPOINT, require_checkpoint, require_package, run_job


def run_explore(course: Course, prompt: str, out: Path, new_tokens: int = 32, checkpoint: Path | None = None) -> int:
    """Write the page to `out`, from the learner's package; returns the exit code."""
    require_package(course)
    checkpoint = require_checkpoint(checkpoint or CHECKPOINT)
    if not out.absolute().parent.is_dir():
        raise CourseError(f"There is no folder {out.absolute().parent}.", "Make it, or give another --out.")
    arguments = ["--checkpoint", str(checkpoint.resolve()), "--prompt", prompt, "--new", str(new_tokens)]
    return run_job("explore", course.root, [*arguments, "--out", str(out.absolute())])
