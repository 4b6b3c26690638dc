"""The memory of a process and its descendants, against what they are known to hold."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager

import pytest

from tito.instructor.memory import holds_more

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
MIB = 2**20
HOLD = "block = b'x' * (100 << 20)\n"  # written to, so that it is in memory
TELL = "print('ready', flush=True)\nsys.stdin.read()\n"


@contextmanager
def program(source: str):
    """A running Python that has said it is ready."""
    process = subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def test_one_process():
    with program(f"import sys\n{HOLD}{TELL}") as pid:
        assert holds_more(pid, 100 * MIB) and not holds_more(pid, 200 * MIB)


def test_what_it_started_counts_too():
    inner = f"import sys\n{HOLD}{TELL}"
    outer = f"""import subprocess, sys
{HOLD}
child = subprocess.Popen([sys.executable, "-c", {inner!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
{TELL}child.kill()"""
    with program(outer) as pid:
        assert holds_more(pid, 200 * MIB) and not holds_more(pid, 300 * MIB)


def test_pages_that_forks_share_count_once():
    forks = f"import os, sys\n{HOLD}for _ in range(3):\n    if not os.fork():\n        sys.stdin.read(); os._exit(0)\n"
    with program(forks + TELL) as pid:
        assert holds_more(pid, 100 * MIB) and not holds_more(pid, 200 * MIB)


def test_a_process_that_is_gone():
    with program(f"import sys\n{TELL}") as pid:
        pass
    assert not holds_more(pid, 0)
