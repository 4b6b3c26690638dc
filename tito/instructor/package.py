"""The `tinytorch` that a submission imports: a folder with the reference, or with the student's own files in it."""

from __future__ import annotations

import atexit
import compileall
import py_compile
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tito.course.processes import private_folder, remove_tree
from tito.instructor.assignment import Assignment

_made: dict[str, Path] = {}
_making = threading.Lock()


@contextmanager
def package_folder(assignment: Assignment, own: dict[str, str]) -> Iterator[Path]:
    """A folder with `tinytorch`, files of `own` in the place of the reference's.

    The reference's folder is made once per process, with its bytecode, and shared by all runs: they only read it.
    """
    if own:
        with private_folder() as folder:
            _write(folder, {**assignment.package, **own})
            yield folder
        return
    with _making:
        if assignment.hash not in _made:
            folder = Path(tempfile.mkdtemp(prefix="tito-package-")).resolve()
            atexit.register(remove_tree, folder)
            _write(folder, assignment.package)
            _made[assignment.hash] = folder
    yield _made[assignment.hash]


def _write(folder: Path, files: dict[str, str]) -> None:
    folder.chmod(0o755)  # the sandbox may read it as another user
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    compileall.compile_dir(folder / "tinytorch", quiet=2, invalidation_mode=mode)
