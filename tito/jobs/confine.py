"""Gives up everything that a submission does not need, then runs one program: `python -S confine.py SPEC`.

SPEC is JSON, as `tito.instructor.sandbox.start` writes it: the level, the limits, the program, and what may be read.
One file without imports of ours, because inside the sandbox nothing else is there.
"""

import ctypes
import json
import os
import signal
import struct
import sys

libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

# linux/prctl.h, linux/sched.h, linux/landlock.h
PDEATHSIG, KEEPCAPS, SECCOMP, CAPBSET_DROP, SUBREAPER, NO_NEW_PRIVS, AMBIENT = 1, 8, 22, 24, 36, 38, 47
NEW_IPC, NEW_USER, NEW_PID, NEW_NET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
CAP_SETUID, CAP_SETPCAP = 7, 8
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE, IOCTL_DEV = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14, 1 << 15
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture


def check(result: int, what: str) -> int:
    """The result of a call of libc, or OSError in the system's words."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, *values: int) -> int:
    return libc.prctl(option, *(ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]))


def enter_namespaces(own_user: bool) -> None:
    """Go on as the first process of a world of its own: no other process, no network, no shared memory."""
    user, group = os.getuid(), os.getgid()
    namespaces = NEW_PID | NEW_NET | NEW_IPC | (NEW_USER if own_user else 0)
    check(libc.unshare(namespaces), "cannot make namespaces, see user.max_user_namespaces")
    if own_user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {user} 1"), ("gid_map", f"1000 {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    prctl(PDEATHSIG, signal.SIGKILL)
    fork_and_wait()


def fork_and_wait(afterwards=lambda: None) -> None:
    """Returns in a child that dies with its parent. The parent waits, does `afterwards`, and ends as the child did."""
    child = os.fork()
    if not child:
        prctl(PDEATHSIG, signal.SIGKILL)
        return
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # whoever listens must hear the end of the child, not ours
        os.dup2(nowhere, stream)
    ended = None
    while ended != child:
        ended, status = os.wait()
    afterwards()
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def watch_descendants() -> None:
    """Go on in a child of a process that inherits every orphan, and kills what is left when either is ended."""
    check(prctl(SUBREAPER, 1), "prctl")

    def stop(*_):
        end_descendants()
        os._exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    prctl(PDEATHSIG, signal.SIGTERM)
    fork_and_wait(end_descendants)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def end_descendants() -> None:
    """Stop them all, then kill them: a stopped process starts no others, so the search comes to an end."""
    stopped = set()
    while new := descendants() - stopped:
        for process in new:
            signal_quietly(process, signal.SIGSTOP)
        stopped |= new
    for process in stopped:
        signal_quietly(process, signal.SIGKILL)
    try:
        while True:
            os.wait()
    except ChildProcessError:
        pass


def descendants() -> set[int]:
    """Every living process below this one, by the table of parents in /proc."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                state, parent = file.read().rpartition(b")")[2].split()[:2]
        except OSError:
            continue
        if state not in b"ZX":
            children.setdefault(int(parent), []).append(int(name))
    found, ahead = set(), [os.getpid()]
    while ahead:
        below = children.get(ahead.pop(), [])
        found.update(below)
        ahead += below
    return found


def signal_quietly(process: int, number: int) -> None:
    try:
        os.kill(process, number)
    except OSError:
        pass


def become(user: int) -> None:
    """From root to the ordinary user `user`, for whom the count of processes holds.

    Only files are still opened as root (fsuid), or a folder that is root's alone could not be read; as root has no
    capabilities either, that means those that root owns and the sandbox shows.
    """
    check(prctl(KEEPCAPS, 1), "prctl")
    os.setresuid(user, user, user)
    set_capabilities(1 << CAP_SETUID | 1 << CAP_SETPCAP)
    libc.setfsuid(0)


def set_capabilities(kept: int) -> None:
    header = struct.pack("Ii", 0x20080522, 0)
    check(libc.capset(header, struct.pack("6I", kept, kept, 0, 0, 0, 0)), "capset")


def drop_capabilities() -> None:
    """None now, and none to gain by running another program."""
    for capability in range(64):
        if prctl(CAPBSET_DROP, capability) < 0:
            break
    prctl(AMBIENT, 4)  # clear all
    set_capabilities(0)
    check(prctl(NO_NEW_PRIVS, 1), "prctl")


def set_limits(limits: dict, counted_alone: bool) -> None:
    """The kernel's limits, hard and soft. Where others of the same user are counted too, they are allowed for."""
    if sys.platform == "win32":  # has none of them
        return
    import resource

    seconds = int(limits["seconds"]) + 2
    processes = limits["processes"] + (0 if counted_alone else threads_of_user())
    for name, value in (
        ("CORE", 0), ("CPU", seconds), ("FSIZE", limits["file_bytes"]), ("NOFILE", limits["open_files"]),
        ("NPROC", processes), ("AS", limits["memory_bytes"]),
    ):  # fmt: skip
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
        except (ValueError, OSError):
            if sys.platform == "linux":  # elsewhere some of them are not kept or not there
                raise


def threads_of_user() -> int:
    """How many threads this user runs already."""
    found = 0
    for name in filter(str.isdigit, os.listdir("/proc")) if os.path.isdir("/proc/self") else ():
        try:
            if os.stat(f"/proc/{name}").st_uid == os.getuid():
                found += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue
    return found


def restrict_files(readable: list, listable: list, writable: list) -> None:
    """Landlock: these trees and files, no others; no TCP; no signal and no abstract socket out of here."""
    version = check(libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1), "landlock_create_ruleset")
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    attributes = struct.pack("QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = check(libc.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(size), 0), "landlock_create_ruleset")
    reading = EXECUTE | READ_FILE | READ_DIR
    for paths, rights in ((readable, reading), (listable, READ_DIR), (writable, files & ~EXECUTE)):
        for path in paths:
            try:
                opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            allowed = rights if os.path.isdir(path) else rights & FILE_RIGHTS
            rule = struct.pack("=Qi", allowed & files, opened)
            check(libc.syscall(ADD_RULE, ruleset, 1, rule, 0), f"landlock_add_rule {path}")
            os.close(opened)
    check(prctl(NO_NEW_PRIVS, 1), "prctl")
    check(libc.syscall(RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def refuse_calls(code: bytes) -> None:
    """Seccomp: from here on every system call passes the filter `code` (see tito.instructor.calls)."""
    if not code:
        return
    kept = ctypes.create_string_buffer(code, len(code))
    filter_ = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(kept)))
    check(prctl(SECCOMP, 2, ctypes.addressof(filter_)), "seccomp")


def confine(spec: dict) -> None:
    """Every step that the level asks for; an error of one of them ends this program before the student's begins."""
    level, user = spec["level"], spec["user"]
    if level == "landlock+userns":
        enter_namespaces(own_user=user is None)
    if level in ("bwrap", "landlock+userns"):
        # We are the first process of a namespace. It would ignore fatal signals of its own, and when it ends, all
        # others are killed before it is gone. So the program becomes the second.
        fork_and_wait()
    elif level == "landlock":
        watch_descendants()
    if level != "none" and user is not None:
        become(user)
    if level != "none":
        prctl(PDEATHSIG, signal.SIGKILL)  # a change of user forgets it
    set_limits(spec["limits"], counted_alone=user is not None or level in ("bwrap", "landlock+userns"))
    if level.startswith("landlock"):
        restrict_files(spec["readable"], spec["listable"], spec["writable"])
    if level != "none":
        drop_capabilities()
        refuse_calls(bytes.fromhex(spec["calls"]))


def run(program: str, path: list[str]) -> None:
    """As `python PROGRAM` would, with the standard library and `path` to import from."""
    sys.argv[:] = [program]
    sys.path += path
    with open(program, "rb") as file:
        code = compile(file.read(), program, "exec")
    main = sys.modules["__main__"] = type(sys)("__main__")
    main.__file__ = program
    exec(code, main.__dict__)


if __name__ == "__main__":
    specification = json.loads(sys.argv[1])
    confine(specification)
    run(specification["program"], specification["path"])
