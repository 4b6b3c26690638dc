"""One worker in its sandbox: requests go in, replies come out, and what student code writes in between is no reply."""

from __future__ import annotations

import json
import os
import queue
import random
import secrets
import subprocess
import threading
import time
from pathlib import Path

from tito.course.errors import CourseError
from tito.instructor import sandbox
from tito.instructor.memory import holds_more

WORKER = Path(__file__).resolve().parents[1] / "jobs" / "grade_cells.py"
GRACE = 4.0  # seconds beyond a cell's limit until the sandbox is ended from outside
WATCH = 0.5  # seconds between two looks at the memory of a run that takes longer
LONGEST_LINE = 1_000_000
TOO_MUCH_OUTPUT = 197  # exit status of a worker, or of a check in it, that printed too much
BLANK = {
    "error": None, "output": "", "seconds": 0.0, "late": False, "odd": False, "held": None, "made": None, "ended": None
}  # fmt: skip


class Gone(Exception):
    """The worker ended or was ended. `why`: late, output, memory, died; `code`: its exit status, where there is one."""

    def __init__(self, why: str, code: int | None = None):
        super().__init__(why)
        self.why, self.code = why, code


_live: set[Session] = set()
_stopping = threading.Event()


def close_all() -> None:
    """End every worker of this process, and let none begin: after Ctrl-C."""
    _stopping.set()
    for session in list(_live):
        session.process.kill()


class Session:
    """One worker, from start to end."""

    def __init__(self, level: str, package: Path, limits, private: Path):
        if _stopping.is_set():
            raise CourseError("Stopped.")
        self.level, self.limits, self.mark = level, limits, secrets.token_hex(16)
        self.process = sandbox.start(level, WORKER, package, limits, private, self.mark)
        _live.add(self)
        if _stopping.is_set():  # it was started while the others were ended
            self.process.kill()
        self.replies: queue.Queue[bytes] = queue.Queue(maxsize=100)
        self.stray = 0  # lines that nobody asked for
        self.heard: set[str] = set()  # attempts that the worker refused, since the last reply
        self._key = secrets.randbits(128)
        self._tokens = None
        self._printed, self._last = 0, b""
        self._threads = [threading.Thread(target=job, daemon=True) for job in (self._hear, self._drain)]
        for thread in self._threads:
            thread.start()

    def _hear(self) -> None:
        """Lines of the worker; one that is longer than any reply ends the run."""
        try:
            with open(self.process.stdout.fileno(), "rb", closefd=False) as stream:
                while (line := stream.readline(LONGEST_LINE)).endswith(b"\n"):
                    self.replies.put(line, timeout=60.0)
        except (OSError, ValueError, queue.Full):  # closed by us, or flooded
            pass
        try:
            self.replies.put(b"", timeout=60.0)
        except queue.Full:
            pass

    def _drain(self) -> None:
        """What is printed below Python's streams: counted, its end kept, and too much of it ends the run."""
        try:
            while piece := os.read(self.process.stderr.fileno(), 65536):
                self._printed += len(piece)
                self._last = (self._last + piece)[-2000:]
                if self._printed > self.limits.output_bytes:
                    self.process.kill()
                    return
        except (OSError, ValueError):
            pass

    def begin(self, patience: float, seed: int, imports: list[str]) -> None:
        """The first request. From now on both sides draw the same tokens, one for each reply; no request tells one."""
        self.ask(patience, do="begin", key=self._key, seed=seed, imports=imports, output=self.limits.output_bytes)
        self._tokens = random.Random(self._key)

    def ask(self, patience: float, /, **request) -> dict:
        """Send one request and wait `patience` seconds for its reply. Raises Gone where none comes."""
        token = self._tokens.getrandbits(64) if self._tokens else 0
        line = json.dumps(request).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self.process.stdin.fileno(), line) :]
        except OSError:
            raise self._gone() from None
        deadline = time.monotonic() + patience
        while True:
            try:
                line = self.replies.get(timeout=max(0.0, min(WATCH, deadline - time.monotonic())))
            except queue.Empty:
                if holds_more(self.process.pid, 2 * self.limits.memory_bytes):
                    raise Gone("memory") from None
                if time.monotonic() >= deadline:
                    raise Gone("late") from None
                continue
            if not line:
                raise self._gone()
            reply = sound_reply(line, token)
            if reply is not None:
                return reply
            self._note(line)

    def _note(self, line: bytes) -> None:
        """A line that is no reply: the worker tells of something that it refused, or student code wrote it."""
        event = _parsed(line).get("heard")
        if isinstance(event, str) and len(self.heard) < 10:
            self.heard.add(_text(event)[:100])
        else:
            self.stray += 1

    def take_heard(self) -> list[str]:
        """What was refused since the last call."""
        heard, self.heard = sorted(self.heard), set()
        return heard

    def _gone(self) -> Gone:
        try:
            code = self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            code = None
        code = 128 - code if code is not None and 128 < code < 160 else code  # a signal
        much = self._printed > self.limits.output_bytes or code == TOO_MUCH_OUTPUT
        return Gone("output" if much else "died", code)

    def last_words(self) -> str:
        """The last line that was written to stderr."""
        lines = self._last.decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else ""

    def close(self) -> None:
        """End the worker with everything that it started."""
        _live.discard(self)
        sandbox.end(self.level, self.process, self.mark)
        for thread in self._threads:
            thread.join(GRACE)


def sound_reply(line: bytes, token: int) -> dict | None:
    """The reply in a line; None for what is none, since student code can write to the worker's pipe as well."""
    reply = _parsed(line)
    if reply.get("token") != token:
        return None
    error = reply.get("error")
    sound = (
        (error is None or _is_error(error))
        and isinstance(reply.get("output", ""), str)
        and isinstance(reply.get("seconds", 0.0), (int, float))
        and isinstance(reply.get("late", False), bool)
        and isinstance(reply.get("odd", False), bool)
        and isinstance(reply.get("held"), (list, type(None)))
        and isinstance(reply.get("made"), (list, type(None)))
        and isinstance(reply.get("ended"), (int, type(None)))
    )
    return BLANK | _text(reply) if sound else None


def _parsed(line: bytes) -> dict:
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _text(value):
    """`value` with all its text such that it can be written as UTF-8."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    return {name: _text(each) for name, each in value.items()} if isinstance(value, dict) else value


def _is_error(error: object) -> bool:
    if not isinstance(error, dict) or not all(isinstance(error.get(name), str) for name in ("name", "text")):
        return False
    place = error.get("place")
    return place is None or (
        isinstance(place, dict)
        and isinstance(place.get("line"), (int, type(None)))
        and isinstance(place.get("cell"), (int, type(None)))
        and all(isinstance(place.get(name, ""), str) for name in ("code", "file"))
    )
