"""What student code can do from inside each sandbox: tried in it, looked at from outside.

Every attempt also runs at the level `none`, where it succeeds: an attempt that cannot succeed would prove nothing.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tito.course.errors import CourseError
from tito.course.processes import MARK
from tito.instructor import bubblewrap, calls, escapes, interpreter, sandbox

REPOSITORY = Path(__file__).resolve().parents[2]
CONTAINED = sandbox.LEVELS[:3]
NAMESPACES = sandbox.LEVELS[:2]  # a world of processes of their own
SECONDS = 60  # nothing here takes more than one; a hang must not stop the tests

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nothing is contained on this system")

TOOLS = """
import json, os, sys, time

def succeeds(attempt, *values):
    try:
        attempt(*values)
    except (OSError, MemoryError):
        return False
    return True

def say(value):
    print(json.dumps(value), flush=True)
"""


def need(level: str) -> str:
    """Skip where the level does not hold on this machine."""
    escaped = None if level == "none" else sandbox._tested(level)
    if escaped:
        pytest.skip(f"{level} is missing here: {escaped}")
    return level


@pytest.fixture(params=CONTAINED)
def contained(request) -> str:
    return need(request.param)


@pytest.fixture(params=sandbox.LEVELS)
def level(request) -> str:
    return need(request.param)


@pytest.fixture
def begin(tmp_path):
    """Start a program in the sandbox; whatever is left of it at the end of the test is ended."""
    package = tmp_path / "package"
    (package / "tinytorch").mkdir(parents=True)
    (package / "tinytorch" / "__init__.py").write_text("origin = 'the package'\n", encoding="utf-8")
    started = []

    def start(level: str, code: str, **limits) -> subprocess.Popen:
        number = len(started)
        program = tmp_path / f"program{number}.py"
        program.write_text(TOOLS + textwrap.dedent(code), encoding="utf-8")
        mark = secrets.token_hex(16)
        private = tmp_path / f"private{number}"
        process = sandbox.start(level, program, package, replace(sandbox.Limits(), **limits), private, mark)
        started.append((level, process, mark))
        return process

    yield start
    for level, process, mark in started:
        sandbox.end(level, process, mark)


@pytest.fixture
def run(begin):
    """Run a program to its end and return what it said."""

    def run(level: str, code: str, task=None, **limits):
        process = begin(level, code, **limits)
        said, complaint = process.communicate(json.dumps(task).encode() + b"\n", timeout=SECONDS)
        assert process.returncode == 0, complaint.decode()
        return json.loads(said)

    return run


def expected(level: str, attempts):
    """What succeeds: all of it without a sandbox, nothing within one."""
    return list(attempts) if level == "none" else []


class TestFiles:
    def test_nothing_of_others_can_be_read(self, level, run, tmp_path):
        with tempfile.NamedTemporaryFile(dir=Path.home()) as at_home:
            other = tmp_path / "other"
            other.mkdir()
            (other / "submission").write_text("theirs", encoding="utf-8")
            wanted = [
                REPOSITORY / "pyproject.toml", __file__, psutil.__file__, other / "submission", at_home.name,
                "/etc/passwd", f"/proc/{os.getpid()}/environ", f"/proc/{os.getpid()}/cmdline",
            ]  # fmt: skip
            wanted += [next(folder.rglob("*.py")) for folder in interpreter.installed() if any(folder.rglob("*.py"))]
            wanted = [str(path) for path in wanted]
            code = "say([path for path in json.loads(input()) if succeeds(lambda: open(path, 'rb').read(1))])"
            assert run(level, code, wanted) == expected(level, wanted)

    def test_no_folder_of_others_can_be_listed(self, level, run, tmp_path):
        wanted = [str(path) for path in (tmp_path, REPOSITORY, Path(psutil.__file__).parent, "/proc/self/task")]
        code = "say([path for path in json.loads(input()) if succeeds(os.listdir, path)])"
        assert run(level, code, wanted) == expected(level, wanted)

    ATTEMPTS = {
        "create": "open(os.path.join(folder, 'new'), 'w').close()",
        "append": "with open(victim, 'a') as file: file.write('more')",
        "truncate": "os.truncate(victim, 1)",
        "rename": "os.rename(victim, victim + '2')",
        "replace": "open('mine', 'w').close(); os.replace('mine', victim)",
        "remove": "os.remove(victim)",
        "mkdir": "os.mkdir(os.path.join(folder, 'new'))",
        "symlink": "os.symlink(victim, os.path.join(folder, 'new'))",
        "link": "os.link(victim, os.path.join(folder, 'new'))",
        "mkfifo": "os.mkfifo(os.path.join(folder, 'new'))",
        "chmod": "os.chmod(victim, 0o640)",
        "utime": "os.utime(victim, (0, 0))",
        "own link": "os.symlink(victim, 'mine'); open('mine', 'a').write('more')",
    }

    def test_nothing_outside_can_be_changed(self, level, run, tmp_path):
        """Every attempt on a folder of its own, so that none stands in the way of another."""

        def look(name):
            states = [(path, path.lstat()) for path in sorted(folders[name].iterdir())]
            texts = [path.read_text(encoding="utf-8") for path, _ in states if path.is_file()]
            return [(path.name, state.st_mode, state.st_mtime_ns) for path, state in states], texts

        folders = {name: tmp_path / "outside" / name for name in self.ATTEMPTS}
        for folder in folders.values():
            folder.mkdir(parents=True)
            (folder / "victim").write_text("as it was", encoding="utf-8")
            folder.chmod(0o777)
            (folder / "victim").chmod(0o666)
        before = {name: look(name) for name in folders}
        code = """
        import contextlib
        for name, (attempt, folder) in json.loads(input()).items():
            names = {"os": os, "folder": folder, "victim": os.path.join(folder, "victim")}
            with contextlib.suppress(OSError):
                exec(attempt, names)
            with contextlib.suppress(OSError):
                os.remove("mine")
        say(None)
        """
        run(level, code, {name: (self.ATTEMPTS[name], str(folder)) for name, folder in folders.items()})
        assert [name for name in folders if look(name) != before[name]] == expected(level, folders)

    def test_the_package_and_the_libraries_cannot_be_changed(self, contained, run):
        code = """
        import numpy, tinytorch
        files = [__file__, *(module.__file__ for module in (json, os, numpy, tinytorch))]
        say([file for file in files if succeeds(lambda: open(os.path.dirname(file) + "/new", "w"))])
        """
        assert run(contained, code) == []

    def test_one_place_can_be_written_and_is_the_working_folder(self, contained, run, tmp_path):
        code = """
        import tempfile, shutil
        with open("kept", "w") as file:
            file.write("mine")
        shutil.copy("kept", "copy")
        with tempfile.NamedTemporaryFile() as file:
            say([open("copy").read(), os.path.dirname(file.name) == os.getcwd() == os.path.expanduser("~")])
        """
        assert run(contained, code) == ["mine", True]

    def test_bubblewrap_shows_one_writable_folder_of_bounded_size(self, run):
        code = """
        import errno
        def full():
            for number in range(1000):
                with open(f"{number}", "wb") as file:
                    file.write(bytes(2**20))
        try:
            full()
        except OSError as error:
            assert error.errno == errno.ENOSPC
        folders = [folder for folder, _, _ in os.walk("/") if succeeds(os.mkdir, os.path.join(folder, "new"))]
        say([folders, sum(os.path.getsize(name) for name in os.listdir() if name != "new")])
        """
        folders, size = run(need("bwrap"), code, tmp_bytes=8 * 2**20)
        assert folders == ["/tmp"] and 7 * 2**20 <= size <= 8 * 2**20


class TestOthers:
    """The network and other programs."""

    def test_no_network(self, level, run, tmp_path):
        with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            tcp.bind(("127.0.0.1", 0))
            udp.bind(("127.0.0.1", 0))
            tcp.listen()
            with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as local:
                local.bind(f"{short}/socket")
                local.listen()
                for listener in (tcp, udp, local):
                    listener.settimeout(0)
                code = """
                import socket
                tcp, udp, local = json.loads(input())
                kept = []
                def reach(family, kind, address):
                    kept.append(socket.socket(family, kind))
                    kept[-1].connect(address)
                    kept[-1].send(b"out")
                say([succeeds(reach, socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", tcp)),
                     succeeds(reach, socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", udp)),
                     succeeds(reach, socket.AF_UNIX, socket.SOCK_STREAM, local)])
                """
                task = [tcp.getsockname()[1], udp.getsockname()[1], f"{short}/socket"]
                out = run(level, code, task)
                heard = []
                for name, receive in (("tcp", tcp.accept), ("udp", lambda: udp.recv(9)), ("unix", local.accept)):
                    try:
                        receive()
                        heard.append(name)
                    except BlockingIOError:
                        pass
        assert heard == expected(level, ["tcp", "udp", "unix"]) and out == [level == "none"] * 3

    def test_no_signal_reaches_another_process(self, level, run):
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as victim:
            code = "import signal\nsay(succeeds(os.kill, json.loads(input()), signal.SIGKILL))"
            assert run(level, code, victim.pid) is (level == "none")
            victim.stdin.close()
            assert victim.wait(timeout=SECONDS) in ((-signal.SIGKILL,) if level == "none" else (0, 1))

    @pytest.mark.parametrize("level", [*NAMESPACES, "none"])
    def test_other_processes_cannot_be_seen(self, level, run):
        code = """
        def seen(pid):
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return False
            return True
        say([seen(json.loads(input())), succeeds(os.listdir, "/proc/self")])
        """
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
            assert run(need(level), code, other.pid) == [level == "none"] * 2
            other.stdin.close()

    def test_root_has_nothing_of_a_root_user(self, contained, run):
        """No capability, no way back to root, no namespace in which to be root."""
        code = """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        data = (ctypes.c_uint32 * 6)()
        libc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), data)
        calls = {"unshare": libc.unshare(0x10000000), "mount": libc.mount(b"none", b".", b"tmpfs", 0, None)}
        user = os.getuid()
        say([any(data), succeeds(os.setresuid, 0, 0, 0) and user != 0, succeeds(os.setgroups, []), calls])
        """
        assert run(contained, code) == [False, False, False, {"unshare": -1, "mount": -1}]


class TestLimits:
    def test_memory(self, level, run):
        code = """
        kept = []
        def take():
            while True:
                kept.append(bytearray(2**26))
        succeeds(take)
        taken, kept = len(kept), None
        import numpy
        say([taken, succeeds(numpy.empty, 2**29, "u1"), int(numpy.ones(2**20).sum())])
        """
        taken, more, total = run(level, code, memory_bytes=2**29)
        assert 3 <= taken < 8 and not more and total == 2**20

    def test_a_big_file(self, level, run):
        code = """
        def write(size):
            with open("file", "wb") as file:
                file.write(bytes(size))
        say([succeeds(write, 2**20), succeeds(write, 2**20 + 1), os.path.getsize("file")])
        """
        assert run(level, code, file_bytes=2**20) == [True, False, 2**20]

    def test_open_files(self, level, run):
        code = """
        kept = []
        def take():
            while True:
                kept.append(os.open("/dev/null", os.O_RDONLY))
        succeeds(take)
        say(len(kept))
        """
        assert 20 < run(level, code, open_files=32) < 32

    def test_seconds_of_the_processor(self, contained, begin):
        """Of a program that nobody watches any more: the runner's own limit is the clock's."""
        process = begin(contained, "import resource\nsay(resource.getrlimit(resource.RLIMIT_CPU))", seconds=7)
        assert json.loads(process.stdout.readline()) == [9, 9]

    def test_a_fork_bomb_is_bounded_and_nothing_of_it_is_left(self, contained, begin):
        code = """
        while True:
            try:
                os.fork()
            except BlockingIOError:
                os.write(1, b"full\\n")
                time.sleep(60)
        """
        process = begin(contained, code, processes=16)
        listener = os.dup(process.stdout.fileno())
        assert process.stdout.readline() == b"full\n"
        if contained in NAMESPACES or os.geteuid() == 0:  # where those of the same user are not counted with them
            assert 10 <= len(marked(process)) <= 16 + 3
        sandbox.end(contained, process, mark_of(process))
        assert ended(listener) and not marked(process)


def mark_of(process: subprocess.Popen) -> str:
    """Of a process of the fixture `begin`, while it runs; remembered for afterwards."""
    if not hasattr(process, "tito_mark"):
        process.tito_mark = psutil.Process(process.pid).environ()[MARK]
    return process.tito_mark


def marked(process: subprocess.Popen) -> list[int]:
    """Ids of all processes that carry the mark of `process`."""
    mark, found = mark_of(process), []
    for other in psutil.process_iter():
        try:
            if other.environ().get(MARK) == mark:
                found.append(other.pid)
        except psutil.Error:
            continue
    return found


def ended(listener: int) -> bool:
    """Nobody holds the other end of the pipe any more; hidden processes that do are not found in any other way."""
    os.set_blocking(listener, False)
    try:
        while os.read(listener, 1 << 16):
            pass
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(listener)


class TestEnd:
    DETACHED = """
    import ctypes
    def hide():
        "The mark, as far as the process can."
        strings, number = ctypes.POINTER(ctypes.c_void_p).in_dll(ctypes.CDLL(None), "environ"), 0
        while strings[number]:
            ctypes.memset(strings[number], 0, len(ctypes.string_at(strings[number])))
            number += 1
    ready, done = os.pipe()
    if not os.fork():
        os.setsid()
        if not os.fork():
            if HIDDEN:
                hide()
            os.write(done, b"x")
            time.sleep(600)
        os._exit(0)
    os.wait()
    os.read(ready, 1)
    say("away")
    """

    # Without a sandbox a process that hides its mark does escape.
    @pytest.mark.parametrize(
        ("level", "hidden"), [*((level, hidden) for level in CONTAINED for hidden in (False, True)), ("none", False)]
    )
    def test_a_detached_grandchild_is_gone(self, level, begin, hidden):
        process = begin(need(level), self.DETACHED.replace("HIDDEN", str(hidden)) + "\n    time.sleep(600)")
        listener = os.dup(process.stdout.fileno())
        assert process.stdout.readline() == b'"away"\n'
        sandbox.end(level, process, mark_of(process))
        assert ended(listener)

    def test_it_is_gone_when_the_program_ended_by_itself(self, contained, begin):
        process = begin(contained, self.DETACHED.replace("HIDDEN", "True"))
        listener = os.dup(process.stdout.fileno())
        assert process.wait(timeout=SECONDS) == 0
        assert ended(listener)

    @pytest.mark.parametrize(
        ("code", "status"),
        [("sys.exit(3)", 3), ("os._exit(4)", 4), ("os.abort()", -6), ("os.kill(os.getpid(), 9)", -9), ("1/0", 1)],
    )
    def test_the_status_is_the_programs(self, level, begin, code, status):
        got = begin(level, code).wait(timeout=SECONDS)
        assert got == (status if status >= 0 or level == "none" else 128 - status)

    def test_it_dies_with_us(self, contained, tmp_path):
        """Whoever started it is killed and cannot clean up."""
        mark = secrets.token_hex(16)
        code = textwrap.dedent(self.DETACHED.replace("HIDDEN", "False")) + "time.sleep(600)"
        (tmp_path / "program.py").write_text(TOOLS + code, encoding="utf-8")
        (tmp_path / "package").mkdir()
        starter = f"""
import pathlib
from tito.instructor import sandbox
private = pathlib.Path({str(tmp_path / "private")!r})
program, package = private.with_name("program.py"), private.with_name("package")
process = sandbox.start({contained!r}, program, package, sandbox.Limits(), private, {mark!r})
print(process.stdout.readline(), flush=True)
input()
"""
        argv = [sys.executable, "-c", starter]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY) as process:
            process.tito_mark = mark
            assert b"away" in process.stdout.readline() and marked(process)
            process.kill()
        deadline = time.monotonic() + SECONDS
        while marked(process) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not marked(process)


class TestProgram:
    """What the program finds around it."""

    def test_numpy_and_the_package_and_nothing_else(self, contained, run):
        code = """
        import numpy, tinytorch
        found = []
        for name in json.loads(input()):
            try:
                __import__(name)
                found.append(name)
            except ImportError:
                pass
        product = (numpy.eye(3) @ numpy.arange(3)).tolist()
        say([tinytorch.origin, numpy.__version__, found, product, sys.argv[1:], __name__])
        """
        import numpy

        there = ["numpy.random", "json.tool"]
        absent = ["tito", "pip", "psutil", "nbgrader", "pytest", "matplotlib", "tinytorch.core"]
        assert run(contained, code, there + absent) == [
            "the package", numpy.__version__, there, [0, 1, 2], [], "__main__",
        ]  # fmt: skip

    def test_the_environment_is_ours_alone(self, level, run, monkeypatch):
        monkeypatch.setenv("SECRET_TOKEN", "x")
        monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
        names = {
            "PATH", "LANG", "HOME", "TMPDIR", "PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE", "MPLBACKEND", MARK,
            "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS",
        }  # fmt: skip
        assert set(run(level, "say([name for name in os.environ if name != 'PWD'])")) == names

    def test_two_runs_see_the_same_hashes(self, contained, run):
        assert run(contained, "say(hash('a'))") == run(contained, "say(hash('a'))")

    def test_streams_are_pipes_that_are_closed_with_it(self, contained, begin):
        process = begin(contained, "say(sys.stdin.readline()); sys.stderr.write('complaint'); sys.stderr.flush()")
        said, complaint = process.communicate(b"in\n", timeout=SECONDS)
        assert (said, complaint) == (b'"in\\n"\n', b"complaint")

    def test_paths_may_be_relative(self, contained, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("package").mkdir()
        Path("program.py").write_text("print('here')", encoding="utf-8")
        process = sandbox.start(contained, Path("program.py"), Path("package"), sandbox.Limits(), Path("private"), "m")
        try:
            assert process.communicate(timeout=SECONDS)[0] == b"here\n"
        finally:
            sandbox.end(contained, process, "m")


class TestSelfTest:
    def test_it_sees_every_escape_where_nothing_is_kept(self, tmp_path):
        """Only the limits hold in `none`; a root user is root already."""
        (tmp_path / "work").mkdir()
        with escapes._listeners(tmp_path / "work") as (task, heard):
            found = {*escapes._try("none", tmp_path, task), *heard()}
        ours = {"become_root", "has_capabilities", "start_many"}  # depend on who runs this test
        assert set(escapes._WORDS) - found - ours == {"allocate", "write_much"}

    def test_it_sees_what_landlock_alone_lets_through(self, monkeypatch):
        need("landlock")
        monkeypatch.setattr(calls, "program", lambda: b"")
        assert "UDP" in sandbox.self_test("landlock") and "mode of files" in sandbox.self_test("landlock")

    def test_it_sees_a_network_that_is_left_open(self, monkeypatch):
        need("bwrap")
        whole = bubblewrap.command
        monkeypatch.setattr(calls, "program", lambda: b"")
        assert sandbox.self_test("bwrap") is None  # it does not lean on the filter
        monkeypatch.setattr(bubblewrap, "command", lambda *a: [part for part in whole(*a) if part != "--unshare-net"])
        assert sandbox.self_test("bwrap") == "it can open TCP connections; it can send over UDP."

    def test_a_refusal_is_passed_on_in_the_systems_words(self, monkeypatch, tmp_path):
        fake = tmp_path / "bwrap"
        words = "bwrap: No permissions to create new namespace"
        fake.write_text(f"#!/bin/sh\necho '{words}' >&2\nexit 1\n", encoding="utf-8")
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert words in sandbox.self_test("bwrap")


@pytest.fixture
def machine(monkeypatch):
    """A machine whose levels hold as told; counts the self-tests."""
    tested = []
    refused = {}

    def self_test(level):
        tested.append(level)
        return refused.get(level)

    sandbox._tested.cache_clear()
    monkeypatch.setattr(sandbox, "self_test", self_test)
    refused["tested"] = tested
    yield refused
    sandbox._tested.cache_clear()


class TestChoose:
    @pytest.mark.parametrize(
        ("wanted", "refused", "chosen"),
        [
            ("auto", [], "bwrap"),
            ("auto", ["bwrap"], "landlock+userns"),
            ("auto", ["bwrap", "landlock+userns"], "landlock"),
            ("bwrap", ["landlock"], "bwrap"),
            ("landlock", [], "landlock+userns"),
            ("landlock", ["landlock+userns"], "landlock"),
            ("none", ["bwrap"], "none"),
        ],
    )
    def test_the_strongest_that_holds(self, machine, wanted, refused, chosen):
        machine.update(dict.fromkeys(refused, "it leaks."))
        assert sandbox.choose(wanted) == chosen

    @pytest.mark.parametrize("wanted", ["auto", "bwrap", "landlock"])
    def test_where_none_holds_it_says_why_and_what_to_do(self, machine, wanted):
        machine.update({level: f"{level} leaks." for level in CONTAINED})
        with pytest.raises(CourseError) as error:
            sandbox.choose(wanted)
        tried = {"auto": CONTAINED, "bwrap": CONTAINED[:1], "landlock": CONTAINED[1:]}[wanted]
        assert [level for level in CONTAINED if f"{level} leaks." in error.value.message] == list(tried)
        assert "--sandbox none" in error.value.hint and "apt install bubblewrap" in error.value.hint

    def test_each_level_is_tested_once(self, machine):
        assert sandbox.choose("auto") == sandbox.choose("bwrap") == "bwrap"
        assert machine["tested"] == ["bwrap"]

    def test_without_bubblewrap(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        sandbox._tested.cache_clear()
        try:
            with pytest.raises(CourseError, match="bubblewrap is not installed"):
                sandbox.choose("bwrap")
        finally:
            sandbox._tested.cache_clear()

    @pytest.mark.parametrize("system", ["darwin", "win32"])
    def test_elsewhere_it_says_what_cannot_be_contained(self, machine, monkeypatch, system):
        monkeypatch.setattr(sys, "platform", system)
        with pytest.raises(CourseError, match=f"{system}.*files, network") as error:
            sandbox.choose("auto")
        assert "--sandbox none" in error.value.hint and machine["tested"] == []
        assert sandbox.choose("none") == "none"

    def test_a_level_that_is_none(self):
        with pytest.raises(CourseError, match="'docker'") as error:
            sandbox.choose("docker")
        assert "auto, bwrap, landlock or none" in error.value.hint
