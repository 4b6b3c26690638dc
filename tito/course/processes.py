"""Programs that run student code: started apart, heard line by line, and ended with everything they started."""

from __future__ import annotations

import json
import os
import queue
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARK = "TITO_RUN"  # an environment variable that every process of one run inherits
TITO_HOME = Path(__file__).resolve().parents[2]

# The course's matrices are small: a second BLAS thread gains nothing, and on a busy machine the two wait in turn.
ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}

# Variables of tito's own surroundings that would change what a run means: -O removes every assert.
_DROPPED = {
    "PYTHONOPTIMIZE", "PYTHONSTARTUP", "PYTHONINSPECT", "MPLBACKEND", "FORCE_COLOR",
    "CLICOLOR_FORCE", "JPY_PARENT_PID", "IPYKERNEL_CELL_NAME",
}  # fmt: skip


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder of this run alone, with an empty `work` and `tmp` inside; gone afterwards, whatever is in it."""
    folder = Path(tempfile.mkdtemp(prefix="tito-")).resolve()
    try:
        for name in ("work", "tmp"):
            (folder / name).mkdir()
        yield folder
    finally:
        remove_tree(folder)


def remove_tree(folder: Path) -> None:
    """Delete a folder, also one whose contents were made read-only."""

    def insist(function, path, _):
        try:
            os.chmod(os.path.dirname(path), stat.S_IRWXU)
            os.chmod(path, stat.S_IRWXU)
            function(path) if function is not os.scandir else shutil.rmtree(path, ignore_errors=True)
        except OSError:
            pass

    for _ in range(3):  # a file may still be held for a moment (Windows), or have just been added
        shutil.rmtree(folder, **{"onexc" if sys.version_info >= (3, 12) else "onerror": insist})
        if not folder.exists():
            return
        time.sleep(0.1)


def environment(private: Path) -> dict[str, str]:
    """What a run sees: private temporary folders, no colour, and nothing that changes what Python means.

    One BLAS thread, where the user has not set another number.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _DROPPED and not name.startswith(("PYTEST_", "COV_CORE_", "JUPYTER"))
    }
    temporary = str(private / "tmp")
    return ONE_THREAD | kept | {
        "NO_COLOR": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "IPYTHONDIR": str(private / "ipython"),
        "TMPDIR": temporary,
        "TEMP": temporary,
        "TMP": temporary,
    }


class Job:
    """`python -m MODULE`, a program of tito/jobs that talks to us over tito.jobs.line.

    Use it in a `with` block: at its end the program and everything it started, grandchildren and processes that
    left its group included, are gone.
    """

    def __init__(self, module: str, spec: dict, env: dict[str, str], private: Path):
        self.mark = secrets.token_hex(16)
        self.private = private
        spec = spec | {"private": str(private), "mark": self.mark}
        (private / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        # As `python -m MODULE`, with tito's home last on the path in case it was never installed. As an entry of
        # PYTHONPATH, a student's file `random.py` beside it would stand in for Python's own.
        start = (
            f"import runpy, sys; sys.path.append({str(TITO_HOME)!r}); runpy.run_module({module!r}, None, '__main__')"
        )
        self._argv = [sys.executable, "-P", "-c", start, str(private / "spec.json")]
        self._env = env | {MARK: self.mark}

    def __enter__(self) -> Job:
        apart = (
            {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
            if sys.platform == "win32"
            else {"start_new_session": True}
        )
        with open(self.private / "stderr.txt", "wb") as stderr:
            self.process = subprocess.Popen(
                self._argv, env=self._env, cwd=self.private / "work",
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, **apart,
            )  # fmt: skip
        self._lines: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def _listen(self) -> None:
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def events(self, deadline: float) -> Iterator[dict]:
        """What the program says, until it ends. After `deadline` (time.monotonic): TimeoutError."""
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError from None
            if not line.endswith(b"\n"):  # the end, or a line cut short by a kill
                return
            yield json.loads(line)

    def last_words(self) -> str:
        """The last line that the program itself wrote to stderr: only of use when it failed as a program."""
        text = (self.private / "stderr.txt").read_text(encoding="utf-8", errors="replace").strip()
        return text.splitlines()[-1] if text else ""

    def __exit__(self, *_) -> None:
        end_all(self.mark, self.process.pid)
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            try:
                stream.close()
            except OSError:
                pass


def end_all(mark: str, root: int | None = None) -> None:
    """Kill every process that descends from `root` or carries `mark`, except the caller, and wait for their end."""
    import psutil

    for _ in range(50):
        victims = _find(mark, root)
        if not victims:
            return
        for process in victims:
            try:
                process.kill()
            except psutil.Error:
                pass
        psutil.wait_procs(victims, timeout=0.2)


def _find(mark: str, root: int | None) -> list:
    import psutil

    found = {}
    if root is not None:
        try:
            found = {child.pid: child for child in psutil.Process(root).children(recursive=True)}
        except psutil.Error:
            pass
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found[process.pid] = process
        except (psutil.Error, OSError):
            continue
    found.pop(os.getpid(), None)
    return [process for process in found.values() if _alive(process)]


def _alive(process) -> bool:
    import psutil

    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
