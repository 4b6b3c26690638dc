"""Runs one program of tito/jobs so that student code in it reaches nothing but its own submission.

    level            kept from the program
    bwrap            every file but an allow-list, in a file system of its own; the network; other processes; what it
                     leaves behind; more than `tmp_bytes` of files
    landlock+userns  the same, but of files only the content: that a file exists, and its size, can be found out; each
                     file it writes is bounded (`file_bytes`), their sum is not
    landlock         files, network, signals and what it leaves behind likewise; it sees that other processes exist
    none             nothing

In every level the kernel's limits of `Limits` hold for each process; the number of processes bounds their sum.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from tito.course.errors import CourseError
from tito.course.processes import MARK, ONE_THREAD, end_all
from tito.instructor import bubblewrap, calls, interpreter

LEVELS = ("bwrap", "landlock+userns", "landlock", "none")  # strongest first
CONFINE = Path(__file__).resolve().parents[1] / "jobs" / "confine.py"
_FIRST_USER = 1_900_000_000  # above the ranges that containers and virtual machines take


@dataclass(frozen=True)
class Limits:
    """Of one submission. The runner keeps the seconds and the output, the sandbox the rest."""

    cell_seconds: float = 30.0
    seconds: float = 120.0
    memory_bytes: int = 2 * 2**30
    file_bytes: int = 64 * 2**20
    tmp_bytes: int = 256 * 2**20
    processes: int = 64
    open_files: int = 256
    output_bytes: int = 10_000_000


def choose(wanted: str) -> str:
    """The level that `--sandbox WANTED` means on this machine; CourseError says why there is none."""
    if wanted == "none":
        return wanted
    candidates = {"auto": LEVELS[:3], "bwrap": LEVELS[:1], "landlock": LEVELS[1:3]}.get(wanted)
    if candidates is None:
        raise CourseError(f"There is no sandbox '{wanted}'.", "Choose auto, bwrap, landlock or none.")
    if sys.platform != "linux":
        raise CourseError(
            f"On this system ({sys.platform}) a submission cannot be kept from files, network and other programs.",
            "Grade on Linux, in a virtual machine for one; or ask for it with `--sandbox none`, where only time, "
            "output and, on macOS, some resources are limited.",
        )
    refused = {}
    for level in candidates:
        escaped = _tested(level)
        if escaped is None:
            return level
        refused[level] = escaped
    raise CourseError(
        "No sandbox holds here. " + " ".join(f"{level}: {why}" for level, why in refused.items()),
        "Install bubblewrap (Debian, Ubuntu: `apt install bubblewrap`) and allow user namespaces, which containers and "
        "some systems refuse; or ask for `--sandbox none`: then a submission can read and change all that you can.",
    )


@functools.cache
def _tested(level: str) -> str | None:
    return self_test(level)


def self_test(level: str) -> str | None:
    """What escapes from the level on this machine, in a sentence; None where it holds."""
    from tito.instructor import escapes

    return escapes.find(level)


def start(level: str, program: Path, package: Path, limits: Limits, private: Path, mark: str) -> subprocess.Popen:
    """Run the file `program` with this Python, NumPy and what lies in the folder `package`.

    It may write into one folder, its working one. Its streams are pipes. The process ends as the program did, or
    with 128 + the signal that ended it. The thread that calls this must outlive the process: they die together.
    """
    program, package, private = program.resolve(), package.resolve(), private.resolve()
    temporary = private / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    spec = {"level": level, "user": _user(), "limits": asdict(limits), "calls": calls.program().hex()}
    if level == "bwrap":
        bound = {CONFINE: "/confine.py", program: "/program.py", package: "/package"}
        outside, confine, home = bubblewrap.command(bound, limits.tmp_bytes, spec["user"]), "/confine.py", "/tmp"
        spec |= {"program": "/program.py", "path": ["/package", bubblewrap.PACKAGES]}
    else:
        outside, confine, home = [], str(CONFINE), str(temporary)
        packages = _links(private / "packages")
        readable, listable = interpreter.allowed()
        spec |= {
            "program": str(program), "path": [str(package), str(packages)],
            "readable": [*readable, str(program), str(package), str(packages), "/dev/urandom"],
            "listable": listable, "writable": [home, os.devnull],
        }  # fmt: skip
    return subprocess.Popen(
        [*outside, str(interpreter.executable()), *_PYTHON, confine, json.dumps(spec)],
        env=_environment(mark, home), cwd=temporary, start_new_session=True, bufsize=0,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


# As -I, but for -E: the variables of `_environment` are to be read, the seed of hashes among them.
_PYTHON = ("-s", "-S", "-P", "-B")


def _environment(mark: str, home: str) -> dict[str, str]:
    return ONE_THREAD | {
        "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": home, "TMPDIR": home, "MPLBACKEND": "Agg",
        "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", MARK: mark,
    }  # fmt: skip


def _user() -> int | None:
    """Whom a program of root's becomes: a user of its own, so that its processes are counted. None where not root."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return None
    user = _FIRST_USER + secrets.randbelow(1 << 24)
    try:
        first, _, count = map(int, Path("/proc/self/uid_map").read_text().split())
    except (OSError, ValueError):  # no Linux, or several ranges
        return None
    return user if first == 0 and user < count else None


def _links(folder: Path) -> Path:
    """A folder in which Python finds NumPy and nothing else that is installed beside it."""
    folder.mkdir(exist_ok=True)
    for package in interpreter.packages():
        link = folder / package.name
        if not link.is_symlink():
            link.symlink_to(package, target_is_directory=True)
    return folder


def end(level: str, process: subprocess.Popen, mark: str) -> None:
    """End the program and everything that it started; afterwards nothing of it is left."""
    if process.poll() is None and level in ("bwrap", "landlock+userns"):
        _signal(_children(process.pid) or [process.pid], signal.SIGKILL)  # a namespace ends with its first process
    elif process.poll() is None and level == "landlock":
        process.terminate()  # it ends its descendants, detached ones too, then itself
    try:
        process.wait(timeout=5 if level != "none" else 0)
    except subprocess.TimeoutExpired:
        pass
    if level == "none" or process.returncode is None or process.returncode < 0:
        end_all(mark, process.pid)
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        try:
            stream.close()
        except OSError:
            pass


def _children(process: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def _signal(processes: list[int], number: int) -> None:
    for process in processes:
        try:
            os.kill(process, number)
        except OSError:
            pass
