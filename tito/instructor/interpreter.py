"""What a Python with NumPy needs of this machine's files: the allow-list of the sandbox.

Its standard library and shared libraries, without the folders of installed packages; of these only NumPy, which is all
that the lessons import. Matplotlib is left out even where it is installed: a grade must not depend on it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from pathlib import Path

_SYSTEM = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")
_SINGLE = ("/etc/ld.so.cache", "/etc/alternatives")  # the second holds links, on Debian one to NumPy's BLAS


@functools.cache
def executable() -> Path:
    """The interpreter itself, not a link of a virtual environment."""
    return Path(getattr(sys, "_base_executable", None) or sys.executable).resolve()


@functools.cache
def libraries() -> tuple[Path, ...]:
    """Folders with the standard library and the shared libraries, and single files; links as they are."""
    prefix = executable().parent.parent  # where the interpreter, started by that path, looks for its library
    found = dict.fromkeys([prefix / "lib", prefix / "lib64", *map(Path, (*_SYSTEM, *_SINGLE))])
    return tuple(path for path in found if path.exists())


@functools.cache
def installed() -> tuple[Path, ...]:
    """Folders of installed packages inside `libraries`: not to be seen."""
    folders = [path for path in libraries() if path.is_dir() and not path.is_symlink()]
    return tuple(
        hidden
        for folder in folders
        for pattern in ("python3*/site-packages", "python3*/dist-packages")
        for hidden in sorted(folder.glob(pattern))
    )


@functools.cache
def packages() -> tuple[Path, ...]:
    """NumPy's folder, and the one beside it with the shared libraries that it brought."""
    numpy = Path(importlib.util.find_spec("numpy").origin).resolve().parent
    return tuple(path for path in (numpy, numpy.with_name("numpy.libs")) if path.is_dir())


@functools.cache
def allowed() -> tuple[list[str], list[str]]:
    """`libraries` and `packages` for Landlock, which can only allow: what may be read, and what only listed."""
    readable, listable = [str(executable()), *map(str, packages())], []

    def allow(path: Path) -> None:
        if path in installed():
            return
        if any(path in hidden.parents for hidden in installed()):
            listable.append(str(path))
            for entry in os.scandir(path):
                allow(path / entry.name)
        else:
            readable.append(str(path))

    for path in dict.fromkeys(path.resolve() for path in libraries()):
        allow(path)
    return readable, listable
