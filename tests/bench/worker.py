"""A process of one peer. It makes tasks and runs timed rounds of them, as it is asked to: a line of JSON for each.

`Worker` is the other end, in the process of the bench.
"""

import contextlib
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
LONG = 0.5  # seconds
THREADS = [f"{library}_NUM_THREADS" for library in ("OMP", "OPENBLAS", "MKL", "VECLIB_MAXIMUM")]


class ContenderFailed(Exception):
    """A contender could not be made or run; the message says why."""


def clocks() -> tuple[float, float]:
    """Wall seconds, and CPU seconds of this process and of those it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter(), time.process_time() + children.ru_utime + children.ru_stime


def prepare(tasks: dict, file: str, name: str, contender: str, folder: str) -> dict:
    """Make a contender's task and warm it up; `wall` is about what a run takes."""
    found = next(each for each in importlib.import_module(file).WORKLOADS if each.name == name)
    task = tasks[contender] = found.contenders[contender].make(Path(folder))
    answer = task.answer()
    wall = timed(tasks, contender, 1)["wall"]
    if wall < LONG:  # else its start weighs little
        wall = timed(tasks, contender, 1)["wall"]
    return {"work": task.work, "wall": wall, "answer": None if answer is None else [float(x) for x in answer]}


def timed(tasks: dict, contender: str, calls: int) -> dict:
    """One round: seconds of so many runs together, without what rewinds them."""
    task, wall, cpu, value = tasks[contender], 0.0, 0.0, None
    for _ in range(calls):
        before = clocks()
        value = task.run()
        after = clocks()
        wall, cpu = wall + after[0] - before[0], cpu + after[1] - before[1]
        task.rewind()
    return {"wall": wall, "cpu": cpu, "value": value}


def drop(tasks: dict) -> dict:
    """Forget the tasks of a workload that is done."""
    tasks.clear()
    return {}


def main() -> None:
    """Answer until there are no more requests. What a library prints goes to stderr, not among the answers."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    tasks = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = json.dumps({"prepare": prepare, "timed": timed, "drop": drop}[request.pop("do")](tasks, **request))
        except Exception as error:
            reply = json.dumps({"error": f"{type(error).__name__}: {error}"})
        print(reply, file=replies, flush=True)


class Worker:
    """Starts the process, asks it, ends it."""

    def __init__(self, threads: int):
        path = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")]))
        env = os.environ | dict.fromkeys(THREADS, str(threads)) | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        self.said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self.process = subprocess.Popen([sys.executable, str(HERE / "worker.py")], env=env, encoding="utf-8",
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said)  # fmt: skip

    def ask(self, do: str, **request) -> dict:
        with contextlib.suppress(BrokenPipeError):  # it has ended: then there is no reply, either
            print(json.dumps({"do": do, **request}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        reply = json.loads(line) if line else {"error": f"its process ended: {self.last_words()}"}
        if "error" in reply:
            raise ContenderFailed(reply["error"])
        return reply

    def last_words(self) -> str:
        self.process.wait()
        self.said.seek(0)
        lines = self.said.read().split("\n")
        return next((line for line in reversed(lines) if line.strip()), f"code {self.process.returncode}")

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def close(self) -> None:
        """It ends when there is nothing more to read; one that runs on is not waited for."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.said.close()


if __name__ == "__main__":
    main()
