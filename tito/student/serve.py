"""`tito serve`: the GPT of a checkpoint behind an HTTP interface in OpenAI's form, on the package that is there."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

from tito.course.errors import CourseError
from tito.course.manifest import Course
from tito.student.demo import CHECKPOINT, environment, require_checkpoint, require_package, run_python

EXTRA = ("starlette", "uvicorn")
SERVING_LESSON = "paged_serving"


def run_serve(course: Course, checkpoint: Path | None, host: str, port: int, sizes: dict[str, int]) -> int:
    """Serve until Ctrl-C; returns the exit code where there is a process left to return to."""
    require_extra()
    require_package(course, SERVING_LESSON, "a GPT and the scheduler of lesson 23")
    checkpoint = require_checkpoint(checkpoint or CHECKPOINT).resolve()
    arguments = ["-m", "tito.jobs.serve", "--checkpoint", str(checkpoint), f"--host={host}", "--port", str(port)]
    arguments += [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    if os.name == "nt":
        return run_python(arguments, course.root)
    # The server takes this process's place, so that a signal to `tito serve` is one to the server, whoever sends it.
    # A Ctrl-C between the two waits until the server can answer it.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    sys.stdout.flush()
    os.chdir(course.root)
    os.execve(sys.executable, [sys.executable, *arguments], environment(course.root))


def require_extra() -> None:
    """A CourseError that says how to get what the server stands on, where it is not installed."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise CourseError(
            f"`tito serve` stands on Starlette and uvicorn, and {' and '.join(missing)} cannot be found.",
            f"`{subprocess.list2cmdline([sys.executable, '-m', 'pip', 'install', *EXTRA])}` brings them.",
        )
