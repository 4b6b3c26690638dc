"""`tito demo`: the whole idea at work, on the package that is there, learner's files included.

The model runs in a process of its own, in a scratch copy of the course, so nothing of the learner's changes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tito import show
from tito.course import progress, source
from tito.course.errors import CourseError
from tito.course.manifest import Course, Lesson
from tito.course.processes import ONE_THREAD

CHECKPOINT = Path(__file__).parents[2] / "tinytorch" / "demo" / "demo.safetensors"
PROMPT = "The for statement is used to"
SAMPLING = ["--temperature", "0.7", "--top-k", "20", "--seed", "17"]  # livelier than greedy, and as repeatable
TRAINING_STEPS = 450  # about two minutes on two cores; the committed checkpoint took 1500
CACHE_LESSON = "memoization"


def run_demo(
    course: Course,
    prompt: str = PROMPT,
    new_tokens: int = 120,
    train: bool = False,
    steps: int = TRAINING_STEPS,
    checkpoint: Path | None = None,
    out: Path | None = None,
) -> int:
    """Complete lesson 17 as a student would, train or load a GPT, and compare generation with and without the cache.

    Returns the exit code: 0 only if the lesson was completed and both texts are the same.
    """
    out = out or course.root / "out"
    if checkpoint and not train:
        require_checkpoint(checkpoint)  # now, not after a minute; and a mistyped name is no wish to train
    if not (course.root / "src").is_dir():  # in a clone the reference solution stands in for what is missing
        require_package(course)
    with tempfile.TemporaryDirectory(prefix="tito-demo-") as folder:
        scratch = copy_course(course, Path(folder) / "course")
        code = play_the_student(course, course.lesson(CACHE_LESSON), scratch)
        if code:
            return code
        show.line()
        show.heading("2. A GPT and its text", "the topics of pydoc_data, which every Python carries")
        if train or not (checkpoint or CHECKPOINT).is_file():
            checkpoint = checkpoint or out / "demo.safetensors"
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            code = run_job("train", scratch, ["--out", str(checkpoint.resolve()), "--steps", str(steps)])
            if code:
                return code
        else:
            checkpoint = checkpoint or CHECKPOINT
        show.line()
        show.heading("3. Generation without and with the KV cache")
        plot = out.resolve() / "kv-cache-time-per-token.png"
        return run_job("compare", scratch, [
            "--checkpoint", str(checkpoint.resolve()), "--prompt", prompt, "--new", str(new_tokens),
            "--describe", "--measure", "--plot", str(plot), *SAMPLING,
        ])  # fmt: skip


def require_checkpoint(checkpoint: Path) -> Path:
    """`checkpoint`, or a CourseError where there is no such file."""
    if not checkpoint.is_file():
        raise CourseError(f"There is no checkpoint {checkpoint}.", "`tito demo --train` makes one.")
    return checkpoint


def require_package(course: Course, last: str = CACHE_LESSON, what: str = "a GPT and its cache") -> None:
    """A CourseError unless the package is complete and has lesson `last`, as in a clone or at the end of a class."""
    lessons = {lesson.name: lesson for lesson in course.lessons}
    if last not in lessons:
        raise CourseError(
            f"This needs {what}, and the lessons here end with {course.lessons[-1].folder}.",
            "It works once you have completed the last lesson of the whole course.",
        )
    missing = [lesson for lesson in course.lessons if not lesson.package_file.is_file()]
    if missing:
        files = ", ".join(lesson.package_path.as_posix() for lesson in missing)
        raise CourseError(
            f"This needs the whole package, and it lacks {files}.",
            f"`tito module start {missing[0].number}` and `tito module complete {missing[0].number}` bring the first.",
        )


def copy_course(course: Course, to: Path) -> Path:
    """A scratch copy of what a student works with."""
    for name in ("modules", "tests", "tinytorch"):
        if (course.root / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "backups")
            shutil.copytree(course.root / name, to / name, ignore=ignore)
    state = course.root / progress.FILE
    if state.is_file():
        (to / progress.FILE).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(state, to / progress.FILE)
    return to


def play_the_student(course: Course, lesson: Lesson, scratch: Path) -> int:
    """Solve the lesson's notebook from the reference solution and run the real command on it."""
    show.heading(f"1. A student finishes lesson {lesson.folder}", "in a scratch copy; your files stay as they are")
    if progress.owner(lesson, progress.read(course.root)) == "learner":
        show.line(f"You have completed it yourself: from here on, everything runs on your {lesson.package_path}.")
        return 0
    if not lesson.source.is_file():
        show.line("There is no reference solution in this copy of the course; the package's own file is used.")
        return 0
    solved = source.solved_notebook(lesson)
    (scratch / lesson.notebook.relative_to(lesson.root)).write_text(solved, encoding="utf-8")
    show.line(f"$ tito module complete {lesson.number}", style="dim")
    return run_python(["-m", "tito", "module", "complete", lesson.number], scratch)


def run_job(name: str, root: Path, arguments: list[str]) -> int:
    """Run a program of tito/jobs against the package at `root`."""
    return run_python(["-m", f"tito.jobs.{name}", *arguments], root)


def run_python(arguments: list[str], root: Path) -> int:
    """Run this Python in `root`, with its package first on the path and tito's own after it."""
    if sys.stdout:  # None where it was closed before we began
        sys.stdout.flush()
    try:
        return subprocess.run([sys.executable, *arguments], cwd=root, env=environment(root)).returncode
    except KeyboardInterrupt:
        return 130


def environment(root: Path) -> dict[str, str]:
    """This process's environment with the package at `root` first on the path and tito's own after it."""
    home = str(Path(__file__).parents[2])
    path = [str(root), home, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**ONE_THREAD, **os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}
