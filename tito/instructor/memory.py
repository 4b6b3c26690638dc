"""How much memory a sandbox holds: the limits of the kernel are per process, and a run may start several."""

from __future__ import annotations

import os
from pathlib import Path


def holds_more(pid: int, most: int) -> bool:
    """Whether a process and all its descendants hold more than `most` bytes. No where /proc does not tell."""
    family = _family(pid)
    if sum(_resident(each) for each in family) <= most:  # cheap, and counts a shared page in each process
        return False
    return sum(_share(each) for each in family) > most


def _family(pid: int) -> list[int]:
    found, waiting = [], [pid]
    while waiting:
        found.append(waiting.pop())
        try:
            for task in os.listdir(f"/proc/{found[-1]}/task"):
                waiting += map(int, Path(f"/proc/{found[-1]}/task/{task}/children").read_text().split())
        except (OSError, ValueError):
            pass
    return found


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _share(pid: int) -> int:
    """Its pages, each divided by how many processes share it (Pss); all of them where that is not to be read."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return _resident(pid)
