"""Start-up: the CPU seconds of a whole Python process, beside what it cannot do without."""

import subprocess
import sys

from workload import Claim, Contender, Task, Workload


class Program(Task):
    """A Python process, from its start to its end."""

    def __init__(self, code, *arguments):
        self.command = [sys.executable, "-c", code, *arguments]

    def run(self):
        subprocess.run(self.command, stdout=subprocess.DEVNULL, check=True)


def program(code, *arguments) -> Contender:
    return Contender(lambda folder: Program(code, *arguments), "machine")


def beside(name, title, ours, theirs, most) -> Workload:
    """ours and theirs: a name and a Contender."""
    claim = Claim(ours[0], theirs[0], "ms", most=most, clock="cpu")
    return Workload(name, title, dict([ours, theirs]), (claim,), 8)


WORKLOADS = [
    beside("start-tito", "tito --help", ("tito", program("from tito.main import main; main()", "--help")),
           ("import typer", program("import typer")), 1.5),
    beside("start-tinytorch", "import tinytorch", ("tinytorch", program("import tinytorch")),
           ("import numpy", program("import numpy")), 1.3),
]  # fmt: skip
