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


def beside(name, title, ours, peer, theirs, most=None) -> Workload:
    claim = Claim("tinytorch", peer, "ms", most=most, clock="cpu")
    return Workload(name, title, {"tinytorch": ours, peer: theirs}, (claim,), 8)


NUMPY = "import numpy", program("import numpy")
WORKLOADS = [
    beside("start-tito", "tito --help", program("from tito.main import main; main()", "--help"),
           "import typer", program("import typer"), 1.5),
    beside("start-tinytorch", "import tinytorch", program("import tinytorch"), *NUMPY, 1.3),
    beside("start-cache", "import tinytorch.generation.kv_cache, and with it the GPT",
           program("import tinytorch.generation.kv_cache"), *NUMPY),
]  # fmt: skip
