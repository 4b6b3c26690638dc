"""Tries to leave the sandbox it runs in, and says how it went: one line of JSON in, one out. Standard library only.

Each attempt is what a submission could do in a few lines of Python; none does harm where it succeeds.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import time


def read(task):
    with open(task["secret"], "rb") as file:
        return file.read(1)


def list_folder(task):
    return os.listdir(task["outside"])


def write(task):
    """A new file, more of an old one, less of an old one: any of the three."""
    for attempt in (
        lambda: open(os.path.join(task["outside"], "written"), "wb").close(),
        lambda: open(task["victim"], "ab").close(),
        lambda: os.truncate(task["victim"], 0),
        lambda: os.remove(task["victim"]),
    ):
        with contextlib.suppress(OSError):
            attempt()
            return True


def change_mode(task):
    """The parent looks at the mode: a sandbox may let the call succeed and do nothing."""
    os.chmod(task["victim"], 0o777)


def write_package(task):
    import tinytorch

    with open(os.path.join(os.path.dirname(tinytorch.__file__), "written"), "wb"):
        return True


def connect(task):
    with socket.socket() as tcp:
        tcp.settimeout(2)
        tcp.connect(("127.0.0.1", task["tcp"]))
        return True


def send(task):
    with socket.socket(type=socket.SOCK_DGRAM) as udp:
        udp.sendto(b"out", ("127.0.0.1", task["udp"]))


def connect_unix(task):
    with socket.socket(socket.AF_UNIX) as local:
        local.connect(task["unix"])
        return True


def signal_parent(task):
    """SIGURG does nothing to a process that did not ask for it. Numbers below 10 are this world's own."""
    if task["parent"] >= 10:
        os.kill(task["parent"], signal.SIGURG)
        return True


def become_root(task):
    """Who has that number already gains nothing by it: it is an ordinary user that a container calls so."""
    before = os.getresuid()
    os.setresuid(0, 0, 0)
    return before != (0, 0, 0)


def has_capabilities(task):
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    ctypes.CDLL(None).capget(header, data)
    return any(data)


def allocate(task):
    kept = bytearray(task["memory_bytes"])
    return len(kept)


def write_much(task):
    try:
        with open("much", "wb") as file:
            file.truncate(task["file_bytes"] + 1)
            return True
    finally:
        with contextlib.suppress(OSError):
            os.remove("much")


def start_many(task):
    children = []
    try:
        for _ in range(task["processes"] + 1):
            child = os.fork()
            if not child:
                time.sleep(60)
                os._exit(0)
            children.append(child)
        return True
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def lacks_numpy(task):
    import numpy

    import tinytorch

    return not (numpy.ones((8, 8)) @ numpy.ones((8, 8)) == 8).all() or not tinytorch.__file__


ATTEMPTS = (read, list_folder, write, change_mode, write_package, connect, send, connect_unix, signal_parent,
            become_root, has_capabilities, allocate, write_much, start_many)  # fmt: skip


def main() -> None:
    task, escaped = json.loads(sys.stdin.readline()), []
    lacks_numpy(task)  # an error of this one is ours, and ends the program
    for attempt in ATTEMPTS:
        with contextlib.suppress(OSError, MemoryError):
            if attempt(task):
                escaped.append(attempt.__name__)
    print(json.dumps(escaped), flush=True)


main()
