"""The command of bubblewrap that runs another one in a file system of its own."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path

from tito.instructor import interpreter

PACKAGES = "/packages"  # NumPy, inside


def command(bound: dict[Path, str], tmp_bytes: int, user: int | None) -> list[str]:
    """Inside are: what Python needs, `bound` (path outside -> inside), and a folder for temporary files; nothing else.

    Not even /proc: NumPy can do without, and in many containers it cannot be mounted. Where `user` is given, we are
    root, for whom bubblewrap needs no user namespace, and in which processes would not be counted.
    """
    own = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETPCAP"]  # to become `user`
    if user is None:
        own = ["--unshare-user", "--uid", "1000", "--gid", "1000"]
    bound = {path: f"{PACKAGES}/{path.name}" for path in interpreter.packages()} | bound
    return [
        shutil.which("bwrap") or "bwrap",
        "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", *own,
        "--die-with-parent", "--new-session", "--as-pid-1", *_system(),
        *(part for path, inside in bound.items() for part in ("--ro-bind", str(path), inside)),
        "--size", str(tmp_bytes), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp", "--",
    ]  # fmt: skip


@functools.cache
def _system() -> tuple[str, ...]:
    """Libraries without installed packages, the interpreter, and three devices: the same for every program."""
    found = []
    for path in interpreter.libraries():
        how = ["--symlink", os.readlink(path)] if path.is_symlink() else ["--ro-bind", str(path)]
        found += [*how, str(path)]
    for path in interpreter.installed():
        found += ["--tmpfs", str(path), "--remount-ro", str(path)]
    found += ["--ro-bind", str(interpreter.executable()), str(interpreter.executable())]
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        found += ["--dev-bind", device, device]
    return tuple(found)
