"""An IPython kernel with bounds: `python kernel.py CONNECTION_FILE SPEC_AS_JSON`. Imports nothing of tito.

The bounds are set inside, because there they hold before anything is copied: printed text is counted as it is
written, memory and file sizes are limited by the system. What remains is watched from outside (run_notebook).
"""

from __future__ import annotations

import json
import linecache
import os
import sys
import traceback

TOO_MUCH_OUTPUT = 197  # exit status


class CellError(Exception):
    """What went wrong in a cell, as JSON: stands in for the student's exception in the reply."""


def bound_resources(memory: int, file_size: int) -> None:
    """Limit memory, file size and core dumps where the system can (not on Windows; macOS ignores memory)."""
    try:
        import resource
    except ImportError:
        return
    memory_kind = resource.RLIMIT_DATA if sys.platform.startswith("linux") else resource.RLIMIT_AS
    for kind, value in ((memory_kind, memory), (resource.RLIMIT_FSIZE, file_size), (resource.RLIMIT_CORE, 0)):
        try:
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):
            continue


def bound_output(limit: int) -> None:
    """End the kernel once more than `limit` characters were printed, or ten times that in messages (plots)."""
    from ipykernel.iostream import IOPubThread, OutStream

    printed = sent = 0
    write, send = OutStream.write, IOPubThread.send_multipart

    def counted_write(self, string):
        nonlocal printed
        printed += len(string) if isinstance(string, str) else 0
        if printed > limit:
            os._exit(TOO_MUCH_OUTPUT)
        return write(self, string)

    def counted_send(self, parts, *args, **kwargs):
        nonlocal sent
        sent += sum(len(part) for part in parts)
        if sent > 10 * limit:
            os._exit(TOO_MUCH_OUTPUT)
        return send(self, parts, *args, **kwargs)

    OutStream.write, IOPubThread.send_multipart = counted_write, counted_send


def use_package(root: str) -> None:
    """Put the folder of `tinytorch` first on the path, here and in what student code starts.

    Done only now, with the libraries loaded: a student's file `random.py` beside the package cannot stand in for
    one of theirs.
    """
    sys.path.insert(0, root)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))


class Watch:
    """Holds every cell to the same ground, and turns its error into a report."""

    def __init__(self, shell):
        self.shell = shell
        self.streams = (sys.stdout, sys.stderr)
        self.process = os.getpid()
        self.names: dict[str, str] = {}  # name that IPython compiles a cell under -> number of the cell
        # Nobody reads IPython's own tracebacks, and making one may itself fail or take long.
        shell.showtraceback = shell.showsyntaxerror = lambda *args, **kwargs: None
        shell._last_traceback = None  # ipykernel reads it, and sets it only in cells without `await`
        shell.ask_exit = lambda: None  # exit() would stop the kernel a moment later, in the middle of another cell
        shell.events.register("pre_run_cell", self.before)
        shell.events.register("post_run_cell", self.after)

    def before(self, info) -> None:
        """Checks run where `__name__ == "__main__"`, even if a cell before gave that name another value."""
        self.shell.user_ns["__name__"] = "__main__"
        try:
            self.names[self.shell.compile.get_code_name(info.raw_cell, info.raw_cell, 0)] = info.cell_id
        except Exception:  # only places in messages are lost
            pass

    def after(self, result) -> None:
        """Put back replaced streams (the reply needs them), and report the error, if any, in plain words."""
        if os.getpid() != self.process:  # a fork that came back from the cell: it must not reply
            os._exit(1)
        sys.stdout, sys.stderr = self.streams
        for slot in ("error_before_exec", "error_in_exec"):
            error = getattr(result, slot, None)
            if error is not None:
                setattr(result, slot, CellError(json.dumps(self.report(error))))

    def report(self, error: BaseException) -> dict:
        try:
            text = str(error)
        except Exception:
            text = "(an error whose own text cannot be made)"
        if isinstance(error, SyntaxError):
            text = error.msg
        if len(text) > 4000:
            text = text[:4000] + " ..."
        name = type(error).__name__
        if name.startswith("_") and isinstance(error, SyntaxError):  # Python 3.13 has a private kind of it
            name = "SyntaxError"
        return {"name": name, "text": text, "place": self.place(error)}

    def place(self, error: BaseException) -> dict | None:
        """The innermost line of student code, in the notebook or in the package."""
        if isinstance(error, SyntaxError) and error.filename in self.names:
            return {"cell": self.names[error.filename], "line": error.lineno, "code": (error.text or "").strip()}
        best = None
        for frame, line in traceback.walk_tb(error.__traceback__):
            name = frame.f_code.co_filename
            spot = {"line": line, "code": linecache.getline(name, line).strip()[:200]}
            if name in self.names:
                best = spot | {"cell": self.names[name]}
            elif "tinytorch" in name:
                best = spot | {"file": name}
        return best


def main() -> None:
    connection_file, spec = sys.argv[1], json.loads(sys.argv[2])
    bound_resources(spec["memory_bytes"], spec["file_bytes"])
    sys.modules.setdefault("debugpy", None)  # no debugger here; importing it costs a quarter of the start
    from ipykernel.kernelapp import IPKernelApp

    app = IPKernelApp.instance()
    app.initialize(
        ["-f", connection_file, "--HistoryManager.enabled=False", "--InteractiveShell.colors=NoColor",
         "--InteractiveShell.xmode=Minimal"]
    )  # fmt: skip
    bound_output(spec["output_bytes"])
    use_package(spec["package_root"])
    Watch(app.shell)
    app.start()


if __name__ == "__main__":
    main()
