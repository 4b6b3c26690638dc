"""What a workload is: who takes part, what each of them does in a round, and what the table claims of it.

A file of workloads lists them in `WORKLOADS`, and imports a peer's library only inside the functions that use it: the
table can then be listed, and made without that peer, where it is not installed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

PEERS = {  # each has a process, and needs packages
    "tinytorch": (), "tinytorch training": (), "machine": (), "torch": ("torch",),
    "transformers": ("torch", "transformers"),
}  # fmt: skip


def missing(peer: str) -> list[str]:
    """The packages that a peer needs and that are not installed."""
    return [package for package in PEERS[peer] if find_spec(package) is None]


UNITS = {  # figure(work of a run, seconds of a run, what it returned); work: see Task
    "tokens/s": lambda work, seconds, value: work["tokens"] / seconds,
    "ms/token": lambda work, seconds, value: 1e3 * seconds / work["tokens"],
    "ms": lambda work, seconds, value: 1e3 * seconds,
    "GB/s": lambda work, seconds, value: work["bytes"] / seconds / 1e9,
    "KiB": lambda work, seconds, value: value / 1024,
}


class Task:
    """What a contender does, made once in its own process and then run many times."""

    work: dict[str, float] = {}  # what one run does, in the units that claims count: tokens, bytes

    def run(self) -> float | None:
        """What is timed. A task that measures something else than time returns it."""
        raise NotImplementedError

    def rewind(self) -> None:
        """After each run, not timed: back to where the next run starts."""

    def answer(self) -> list[float] | None:
        """A few numbers that come out the same for all who do the same work; None: nothing to compare."""


@dataclass(frozen=True)
class Contender:
    """`make(folder)` gives its Task, in the process of its peer; the folder is common to all of a run."""

    make: Callable[[Path], Task]
    peer: str = "tinytorch"


@dataclass(frozen=True)
class Claim:
    """One row of the table: a figure of `ours`, the same of `theirs`, and the least or most that their ratio may be.

    unit: one of UNITS. clock: wall, or cpu seconds of all processes.
    """

    ours: str
    theirs: str
    unit: str
    least: float | None = None
    most: float | None = None
    clock: str = "wall"
    title: str = ""  # where a workload makes several claims


@dataclass(frozen=True)
class Workload:
    """seconds: how long its rounds may take in a full run. tolerance: how far answers may differ; None: in any way."""

    name: str
    title: str
    contenders: dict[str, Contender] = field(hash=False)
    claims: tuple[Claim, ...]
    seconds: float = 10
    tolerance: float | None = 1e-3
    long: bool = False  # a single round takes seconds, and --quick leaves it out
