"""Runs the cells of one submission inside the sandbox, one request at a time. Imports nothing of tito.

The runner (tito/instructor/run.py) sits at the other end of standard input and output, one JSON document per line:

    {"do": "begin", "token": …, "seed": 7, "imports": ["tinytorch.core.tensor", …]}
    {"do": "cell",  "token": …, "id": 3, "source": …, "given": true, "forget": [names], "seconds": 30}
    {"do": "check", "token": …, "id": 4, "source": …, "define": [sources], "control": false, "seconds": 30}

and hears one line for each: {"token", "error", "output", "seconds", "late", "ended", "held", "made"}. A cell runs
here and leaves its names behind, as in a notebook. A check runs in a fork, on ground that is restored first: the
modules that were loaded before any student code, the names that given cells defined, the definitions of earlier
checks. What it changes is gone with the fork, and so is a process that it kills.
"""

from __future__ import annotations

import _thread
import builtins
import gc
import importlib
import io
import json
import linecache
import os
import random
import select
import signal
import sys
import time
import traceback
import types
import warnings

PRINTED = 20_000  # characters of a cell's output that are kept
TOO_MUCH_OUTPUT = 197  # exit status
GRACE = 2.0  # seconds that an interrupted check may take to end


class Late(BaseException):
    """Raised in student code at its time limit; no `except Exception` holds it back."""


class Tape(io.TextIOBase):
    """Standard output of a cell: keeps the first characters, counts all, and ends the process at `limit`."""

    def __init__(self, limit: int):
        self.limit, self.count, self.pieces = limit, 0, []

    def writable(self) -> bool:
        return True

    def write(self, text) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() takes text, not {type(text).__name__}")
        if self.count < PRINTED:
            self.pieces.append(text[: PRINTED - self.count])
        self.count += len(text)
        if self.count > self.limit:
            os._exit(TOO_MUCH_OUTPUT)
        return len(text)

    def text(self) -> str:
        left_out = self.count - PRINTED
        return "".join(self.pieces) + (f"\n... {left_out} more characters ...\n" if left_out > 0 else "")


class Ground:
    """What was there before any student code: kept once, put back in the fork of every check.

    Functions and classes of every loaded module, the methods of these classes, the code and the defaults of these
    functions. Data stays as it is, for a lesson may rightly change it (the engine that lesson 05 plugs in).
    """

    def __init__(self):
        self.modules = dict(sys.modules)
        self.names = [(vars(module), dict(vars(module))) for name, module in self.modules.items() if _is_loaded(module)]
        self.names = [(live, kept if self._all_of(live) else _callables(kept)) for live, kept in self.names]
        classes = {id(v): v for _, kept in self.names for v in kept.values() if isinstance(v, type)}
        self.methods = [(c, dict(vars(c))) for c in classes.values() if c.__flags__ & 1 << 9]  # a Python class
        functions = {id(v): v for _, kept in self.names + self.methods for v in kept.values() if _is_function(v)}
        self.codes = [(f, f.__code__, f.__defaults__, f.__kwdefaults__) for f in functions.values()]
        self.limit = sys.getrecursionlimit()

    @staticmethod
    def _all_of(live: dict) -> bool:
        """Built-in names are kept whatever they are: `__debug__`, `Ellipsis` and exceptions among them."""
        return live is vars(builtins)

    def restore(self) -> None:
        """Put back what was replaced or removed."""
        sys.settrace(None)
        sys.setprofile(None)
        sys.setrecursionlimit(self.limit)
        for live, kept in self.names:
            for name, value in kept.items():
                if live.get(name, self) is not value:
                    live[name] = value
        for name, module in self.modules.items():
            if sys.modules.get(name) is not module:
                sys.modules[name] = module
        for owner, kept in self.methods:
            now = vars(owner)
            for name, value in kept.items():
                if now.get(name, self) is not value:
                    type.__setattr__(owner, name, value)
            for name in [name for name in now if name not in kept and name in COMPARISONS]:
                type.__delattr__(owner, name)
        for function, code, defaults, keyword_defaults in self.codes:
            if function.__code__ is not code:
                function.__code__ = code
            if function.__defaults__ is not defaults:
                function.__defaults__ = defaults
            if function.__kwdefaults__ is not keyword_defaults:
                function.__kwdefaults__ = keyword_defaults


COMPARISONS = {
    "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__bool__", "__array_ufunc__", "__getattribute__",
}  # fmt: skip


def _is_loaded(module) -> bool:
    return isinstance(module, types.ModuleType) and module.__name__ != "__main__"


def _is_function(value) -> bool:
    return isinstance(value, types.FunctionType)


def _callables(names: dict) -> dict:
    kinds = (types.FunctionType, types.BuiltinFunctionType, type, types.ModuleType)
    return {name: value for name, value in names.items() if isinstance(value, kinds)}


class Worker:
    """The namespace of the notebook and what is needed to hold its cells to the same ground."""

    def __init__(self, requests, replies, output_limit: int):
        self.requests, self.replies, self.output_limit = requests, replies, output_limit
        self.main = types.ModuleType("__main__")
        sys.modules["__main__"] = self.main
        self.names: dict[str, int] = {}  # file name that a cell is compiled under -> its id
        self.given: dict[str, object] = {}  # names that the lesson's own cells bound
        self.restored = True  # whether the ground is as it was

    def begin(self, request: dict) -> dict:
        self.seed = request["seed"]
        import numpy
        import numpy.testing

        for name in request["imports"]:
            importlib.import_module(name)
        fix_randomness(self.seed)
        self.main.__dict__["display"] = print  # Jupyter's; a cell of a student's own may use it
        self.ground = Ground()
        self.pristine_error_state = numpy.geterr()
        gc.collect()
        gc.freeze()  # nothing of this is ever garbage: forks share its pages, and collections skip it
        return {"token": request["token"]}

    def cell(self, request: dict) -> dict:
        """Run a cell here."""
        tape = Tape(self.output_limit)
        known = dict(self.main.__dict__) if request["given"] else {}
        reply = self.timed(request, lambda: self.execute(request["id"], request["source"], tape), tape)
        self.restored = False
        if request["given"]:
            now = self.main.__dict__
            self.given |= {name: value for name, value in now.items() if known.get(name, self) is not value}
        for name in request["forget"]:
            self.given.pop(name, None)
        return reply

    def check(self, request: dict) -> dict:
        """Run a check in a fork and pass on what it says; a fork that says nothing has ended by itself."""
        if not self.restored:  # here, for in the fork every object that is looked at is copied
            self.ground.restore()
            self.restored = True
        read, write = os.pipe()
        threads = _thread._count()  # a student's: the fork leaves them behind
        child = os.fork()
        if child == 0:
            os.close(read)
            self.run_check(request, write, threads)
        os.close(write)
        words = _listen(read, request["seconds"] + GRACE)
        os.close(read)
        try:
            os.killpg(child, signal.SIGKILL)  # what it started, and itself where it did not end
        except ProcessLookupError:
            pass
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
        _, status = os.waitpid(child, 0)
        try:
            return json.loads(words)
        except ValueError:
            late = words is None
            return {"token": request["token"], "error": None, "output": "", "seconds": 0.0, "late": late, "held": None,
                    "ended": None if late else os.waitstatus_to_exitcode(status)}  # fmt: skip

    def run_check(self, request: dict, write: int, threads: int) -> None:
        """In the fork: level the ground, define what earlier checks defined, run, tell, and end at once."""
        try:
            os.setpgid(0, 0)
            os.close(self.requests.fileno())
            os.close(self.replies)
            if threads:  # they can have changed something again
                self.ground.restore()
            self.level()
            self.main.__dict__.update(self.given)
            self.main.__dict__["__name__"] = "earlier"  # defines test functions without calling them
            for source in request["define"]:
                exec(compile(source, "<earlier check>", "exec", dont_inherit=True), self.main.__dict__)
            tape = Tape(self.output_limit)
            run = Control(self.main.__dict__).run if request["control"] else self.execute
            reply = self.timed(request, lambda: run(request["id"], request["source"], tape), tape)
            _write_all(write, json.dumps(reply).encode() + b"\n")
        finally:
            os._exit(0)

    def level(self) -> None:
        """States of libraries that outlive a cell: the same for every check."""
        import numpy

        numpy.seterr(**self.pristine_error_state)
        numpy.set_printoptions(edgeitems=3, threshold=1000, precision=8, suppress=False, linewidth=75)
        warnings.resetwarnings()
        fix_randomness(self.seed)

    def timed(self, request: dict, run, tape: Tape) -> dict:
        """Run something within its seconds; the error, if any, in plain words."""
        error, late, before, streams = None, False, time.perf_counter(), (sys.stdout, sys.stderr)
        told: dict = {"held": None, "made": None}
        try:
            signal.signal(signal.SIGALRM, _late)
            signal.setitimer(signal.ITIMER_REAL, request["seconds"], 0.5)  # again, if the first was swallowed
            try:
                told |= run() or {}
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except Late:
            late = True
        except BaseException as caught:  # SystemExit and KeyboardInterrupt are a student's errors too
            error = self.report(caught)
        sys.stdout, sys.stderr = streams
        return {"token": request["token"], "error": error, "output": tape.text(), "late": late, "ended": None,
                "seconds": round(time.perf_counter() - before, 4), **told}  # fmt: skip

    def execute(self, number: int, source: str, tape: Tape) -> None:
        """Compile and run one cell as `__main__`, with its output on `tape`."""
        self.main.__dict__["__name__"] = "__main__"
        name = f"<cell {number}>"
        self.names[name] = number
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        code = compile(source, name, "exec", dont_inherit=True)
        sys.stdout = sys.stderr = tape
        exec(code, self.main.__dict__)

    def report(self, error: BaseException) -> dict:
        """Name, text and place of an error; whatever its own methods do, this returns."""
        try:
            text = str(error.msg if isinstance(error, SyntaxError) else error)
        except BaseException:
            text = "(an error whose own text cannot be made)"
        name = "SyntaxError" if isinstance(error, SyntaxError) else str(type(error).__name__)
        return {"name": name, "text": text[:4000], "place": self.place(error)}

    def place(self, error: BaseException) -> dict | None:
        """The innermost line of the notebook, or of the package, that the error came through."""
        if isinstance(error, SyntaxError) and error.filename in self.names:
            code = (error.text or "").strip()[:200]
            return {"cell": self.names[error.filename], "line": error.lineno, "code": code}
        best = None
        for frame, line in traceback.walk_tb(error.__traceback__):
            name = frame.f_code.co_filename
            spot = {"line": line, "code": linecache.getline(name, line).strip()[:200]}
            if name in self.names:
                best = spot | {"cell": self.names[name]}
            elif "tinytorch" in name:
                best = spot | {"file": "tinytorch" + name.rpartition("tinytorch")[2]}
        return best

    def serve(self) -> None:
        """Answer requests until there are no more."""
        for line in self.requests:
            request = json.loads(line)
            reply = getattr(self, request["do"])(request)
            _write_all(self.replies, json.dumps(reply).encode() + b"\n")


class Control:
    """A check whose expectations were made wrong (tito/instructor/controls.py): honest work fails every one."""

    def __init__(self, namespace: dict):
        self.namespace, self.held, self.made = namespace, set(), set()

    def run(self, number: int, source: str, tape: Tape) -> dict:
        """Run it to its end: which of its wrong claims were made, and which of them held."""
        self.namespace |= {"__name__": "__main__", "_tilt": tilt, "_claim": self.claim}
        sys.stdout = sys.stderr = tape
        try:
            exec(compile(source, f"<cell {number}>", "exec", dont_inherit=True), self.namespace)
        except Late:
            raise
        except BaseException:  # what follows a wrong claim may fail in any way
            pass
        return {"held": sorted(self.held), "made": sorted(self.made)}

    def claim(self, number: int, say) -> None:
        """Wrong claim `number`: held where it is true, or where a call that should have refused it returned None."""
        self.made.add(number)
        try:
            said = say()
            if said is None or bool(said):
                self.held.add(number)
        except Exception:
            pass


def tilt(value):
    """A value that differs from `value` wherever anybody looks, of the same kind where there is one."""
    import numpy

    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float, complex)):
        return value + 1 + abs(value)
    if isinstance(value, str):
        return value + "~"
    if isinstance(value, bytes):
        return value + b"~"
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)([tilt(each) for each in value]) if value else type(value)([0])
    if isinstance(value, dict):
        return {key: tilt(each) for key, each in value.items()} or {"~": 0}
    if isinstance(value, (set, frozenset)):
        return value | {"~"}
    if value is None:
        return 0
    array = numpy.asarray(value.data if hasattr(value, "requires_grad") else value)
    if array.dtype == bool:
        return ~array
    if array.dtype.kind in "iufc":
        return array + 1 + numpy.abs(numpy.where(numpy.isfinite(array), array, 0))
    return object()


def fix_randomness(seed: int) -> None:
    """The same numbers in every run, also from generators that nobody seeded."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    entropy = random.Random(seed)
    generators = sys.modules.get("numpy.random.bit_generator")
    if generators is not None and hasattr(generators, "randbits"):
        generators.randbits = entropy.getrandbits


def _late(*_) -> None:
    raise Late


def _listen(pipe: int, seconds: float) -> str | None:
    """The line that comes, or what came before the other side closed; None when neither was in time."""
    pieces, deadline = [], time.monotonic() + seconds
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        piece = os.read(pipe, 65536)
        pieces.append(piece)
        if not piece or piece.endswith(b"\n"):
            return b"".join(pieces).decode("utf-8", "replace")


def _write_all(pipe: int, data: bytes) -> None:
    while data:
        data = data[os.write(pipe, data) :]


def main() -> None:
    """Keep the line to the runner for ourselves; what student code prints at the lowest level goes to stderr."""
    requests, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.dup2(2, 1)
    Worker(requests, replies, int(os.environ.get("TITO_OUTPUT", 10_000_000))).serve()
    os._exit(0)


if __name__ == "__main__":
    main()
