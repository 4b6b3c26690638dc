"""Runs a notebook in a fresh kernel and tells how each cell ended: `python -m tito.jobs.run_notebook SPEC`.

This program never runs student code itself. It goes by the kernel's reply to each cell; what is printed is not
even received. The kernel is started by path from the interpreter that runs tito, so no installed kernelspec
matters, and it is killed, not asked, at the end.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import time
from pathlib import Path

from tito.course.processes import MARK
from tito.jobs.kernel import TOO_MUCH_OUTPUT
from tito.jobs.line import Line

GRACE = 3.0  # seconds that a cell gets to end after it was interrupted


class Stopped(Exception):
    """The kernel is gone, or has to go; `why` says so in one word."""

    def __init__(self, why: str, code: int | None = None):
        super().__init__(why)
        self.why, self.code = why, code


class Kernel:
    """One kernel process and the one channel that is needed: requests to run code, and the replies."""

    def __init__(self, spec: dict):
        from jupyter_client.blocking import BlockingKernelClient
        from jupyter_client.connect import write_connection_file

        self.memory = spec["memory_bytes"]
        private = Path(spec["private"])
        # Sockets in our private folder, unless the system has none or the path is too long for one.
        local = os.name == "posix" and len(str(private)) < 80
        where = ("ipc", str(private / "k")) if local else ("tcp", "127.0.0.1")
        connection_file, _ = write_connection_file(
            str(private / "kernel.json"), transport=where[0], ip=where[1], key=os.urandom(16).hex().encode()
        )
        self.client = BlockingKernelClient(connection_file=connection_file)
        self.client.load_connection_file()
        program = Path(__file__).with_name("kernel.py")
        told = {name: spec[name] for name in ("memory_bytes", "file_bytes", "output_bytes", "package_root")}
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(program), connection_file, json.dumps(told)],
            cwd=private / "work", env=os.environ | {MARK: spec["mark"], "JPY_PARENT_PID": str(os.getpid())},
            start_new_session=os.name == "posix", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.client.start_channels(shell=True, iopub=False, stdin=False, hb=False, control=False)

    def wait_ready(self, seconds: float) -> None:
        """Ask until the kernel answers."""
        deadline = time.monotonic() + seconds
        request = self.client.kernel_info()
        try:
            reply = self._reply(request, deadline)
        except Stopped as stop:
            raise Stopped("start", stop.code) from None
        if reply is None:
            raise Stopped("start")

    def run(self, number: int, source: str, seconds: float) -> dict:
        """Run one cell: {"error": report or None, "late": bool}."""
        content = {"code": source, "silent": False, "store_history": True, "user_expressions": {},
                   "allow_stdin": False, "stop_on_error": False}  # fmt: skip
        message = self.client.session.msg("execute_request", content, metadata={"cellId": str(number)})
        self.client.shell_channel.send(message)
        request = message["header"]["msg_id"]
        reply = self._reply(request, time.monotonic() + seconds)
        late = reply is None
        if late:
            self.interrupt()
            reply = self._reply(request, time.monotonic() + GRACE)
            if reply is None:
                raise Stopped("stuck")
        return {"error": error_of(reply["content"]), "late": late}

    def interrupt(self) -> None:
        """Ctrl-C for the kernel and what it started. Windows has no such signal for it: there the run ends."""
        if os.name == "posix":
            os.killpg(self.process.pid, signal.SIGINT)

    def _reply(self, request: str, deadline: float) -> dict | None:
        """The reply to `request`; None at the deadline; Stopped when the kernel ends or outgrows its memory."""
        next_look = 0.0
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None
            try:
                reply = self.client.get_shell_msg(timeout=min(0.2, max(0.0, deadline - time.monotonic())))
                if reply["parent_header"].get("msg_id") == request:
                    return reply
            except queue.Empty:
                if ended:
                    code = self.process.returncode
                    raise Stopped("output" if code == TOO_MUCH_OUTPUT else "died", code) from None
            if time.monotonic() > next_look:
                next_look = time.monotonic() + 0.5
                if self._memory() > self.memory:
                    raise Stopped("memory")
        return None

    def _memory(self) -> int:
        """Bytes that the kernel and its children hold at this moment."""
        import psutil

        total = 0
        try:
            kernel = psutil.Process(self.process.pid)
            for process in (kernel, *kernel.children(recursive=True)):
                total += process.memory_info().rss
        except psutil.Error:
            pass
        return total


def error_of(content: dict) -> dict | None:
    """The report on a cell that failed; None only for a cell that ran to its end."""
    if content.get("status") == "ok":
        return None
    if content.get("ename") == "CellError":
        return json.loads(content["evalue"])
    return {"name": content.get("ename", "aborted"), "text": str(content.get("evalue", ""))[:4000], "place": None}


def run_cells(spec: dict, line: Line) -> None:
    """Start a kernel, run all cells in order, and tell how each ended."""
    deadline = time.monotonic() + spec["seconds"]
    number = None
    try:
        kernel = Kernel(spec)
        kernel.wait_ready(min(60.0, spec["seconds"]))
        line.say(event="ready")
        for number, source in spec["cells"]:
            left = deadline - time.monotonic()
            if left <= 0:
                raise Stopped("time")
            line.say(event="start", cell=number)
            ending = kernel.run(number, source, min(left, spec["cell_seconds"]))
            if ending["late"] and left < spec["cell_seconds"]:
                raise Stopped("time")
            line.say(event="end", cell=number, **ending)
        line.say(event="finished")
    except Stopped as stop:
        why = "time" if stop.why == "stuck" and time.monotonic() > deadline else stop.why
        line.say(event="stopped", cell=number, why=why, code=stop.code)


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    line = Line(spec["private"], spec["mark"], silent=False)
    run_cells(spec, line)
    os._exit(0)  # tito ends the kernel; no need to wait for the sockets


if __name__ == "__main__":
    main()
