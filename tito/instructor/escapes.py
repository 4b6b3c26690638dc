"""Finds out whether a sandbox holds on this machine, by trying to leave it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tito.course.processes import private_folder
from tito.instructor import sandbox

PROGRAM = sandbox.CONFINE.with_name("try_escape.py")
SECONDS = 30

# Attempt of tito/jobs/try_escape.py -> what it means
_WORDS = {
    "read": "it can read files outside", "list_folder": "it can list folders outside",
    "write": "it can write outside", "change_mode": "it can change the mode of files outside",
    "write_package": "it can change the package", "connect": "it can open TCP connections",
    "send": "it can send over UDP", "connect_unix": "it can talk to other programs over a socket file",
    "signal_parent": "it can send signals to tito", "become_root": "it can become root",
    "has_capabilities": "it has capabilities", "allocate": "it can take more memory than its limit",
    "write_much": "it can write files beyond its limit", "start_many": "it can start more processes than its limit",
}  # fmt: skip


def find(level: str) -> str | None:
    """What escapes from `level`, in a sentence; None where it holds."""
    if level == "none":
        return "it keeps nothing from a submission."
    if sys.platform != "linux":
        return "it needs Linux."
    if level == "bwrap" and not shutil.which("bwrap"):
        return "bubblewrap is not installed (there is no program bwrap on PATH)."
    with private_folder() as folder, _listeners(folder / "work") as (task, heard):
        escaped = _try(level, folder, task)
        if isinstance(escaped, str):
            return escaped
        found = [_WORDS[name] for name in dict.fromkeys([*escaped, *heard()])]
    return "; ".join(found) + "." if found else None


@contextlib.contextmanager
def _listeners(outside: Path) -> Iterator[tuple[dict, callable]]:
    """What there is to reach outside, and a function that tells what was reached."""
    secret, victim = outside / "secret", outside / "victim"
    for file in (secret, victim):
        file.write_text(secrets.token_hex(), encoding="utf-8")
        file.chmod(0o600)
    with contextlib.ExitStack() as stack:
        tcp, udp, unix = (
            stack.enter_context(socket.socket(family, kind))
            for family, kind in ((socket.AF_INET, socket.SOCK_STREAM), (socket.AF_INET, socket.SOCK_DGRAM),
                                 (socket.AF_UNIX, socket.SOCK_STREAM))
        )  # fmt: skip
        tcp.bind(("127.0.0.1", 0))
        udp.bind(("127.0.0.1", 0))
        tcp.listen()
        names = {tcp: "connect", udp: "send"}
        with contextlib.suppress(OSError):  # the path of a socket has at most 107 bytes
            unix.bind(str(outside / "socket"))
            unix.listen()
            names[unix] = "connect_unix"

        def reached() -> list[str]:
            found = [names[listener] for listener in select.select(list(names), [], [], 0)[0]]
            return found + (["change_mode"] if stat.S_IMODE(victim.stat().st_mode) != 0o600 else [])

        yield {
            "outside": str(outside), "secret": str(secret), "victim": str(victim), "unix": str(outside / "socket"),
            "tcp": tcp.getsockname()[1], "udp": udp.getsockname()[1], "parent": os.getpid(),
        }, reached  # fmt: skip


def _try(level: str, folder: Path, task: dict) -> list[str] | str:
    """Names of the attempts that succeeded; a sentence where the program did not come to an end."""
    package = folder / "package"
    (package / "tinytorch").mkdir(parents=True)
    (package / "tinytorch" / "__init__.py").touch()
    limits = replace(sandbox.Limits(), processes=16)
    task |= {name: getattr(limits, name) for name in ("memory_bytes", "file_bytes", "processes")}
    mark = secrets.token_hex(16)
    process = sandbox.start(level, PROGRAM, package, limits, folder / "private", mark)
    try:
        said, complaint = process.communicate(json.dumps(task).encode() + b"\n", timeout=SECONDS)
        return json.loads(said)
    except subprocess.TimeoutExpired:
        return f"the test did not end within {SECONDS} seconds."
    except ValueError:
        last = complaint.decode(errors="replace").strip().splitlines()[-1:] or [f"ended with {process.returncode}"]
        return f"it cannot start a program here ({last[0]})."
    finally:
        sandbox.end(level, process, mark)
