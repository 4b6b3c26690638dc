"""`tito generate`: a text continued by the model of a directory, or by the demo's, on the package that is there."""

from __future__ import annotations

from pathlib import Path

from tito.course.errors import CourseError
from tito.course.manifest import Course
from tito.student.demo import CHECKPOINT, require_checkpoint, require_package, run_job

MODELS_LESSON = "modern_transformers"


def require_models(course: Course) -> None:
    """A CourseError unless the package can run a downloaded model."""
    require_package(course, MODELS_LESSON, "the models of lesson 21")


def run_generate(
    course: Course,
    prompt: str,
    model: Path | None = None,
    checkpoint: Path | None = None,
    cache: bool = True,
    options: dict[str, object] | None = None,
) -> int:
    """Continue `prompt`; `options` are those of tito.jobs.generate, None for its default. Returns the exit code."""
    given = {name: value for name, value in (options or {}).items() if value is not None}
    if model is not None and checkpoint is not None:
        raise CourseError("--model and --checkpoint exclude each other.", "Choose one.")
    if not cache and (unused := {"cache-dtype", "window"} & given.keys()):
        raise CourseError(f"--no-cache and --{min(unused)} exclude each other.", "Choose one.")
    if model is None:
        require_package(course)
        arguments = ["--checkpoint", str(require_checkpoint(checkpoint or CHECKPOINT).absolute())]
    else:
        require_models(course)
        arguments = ["--model", str(model.absolute())]
    arguments += [f"--prompt={prompt}", *([] if cache else ["--no-cache"])]
    return run_job("generate", course.root, [*arguments, *(f"--{name}={value}" for name, value in given.items())])
