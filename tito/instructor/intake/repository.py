"""One stranger's Git repository, read without running anything of it.

The branch is looked up here, and git runs in an empty repository of ours that borrows the stranger's objects. So hooks,
filters, aliases, includes, remotes and replacements of theirs do not exist for it.
"""

from __future__ import annotations

import functools
import os
import re
import stat
import subprocess
from datetime import datetime
from pathlib import Path

from tito.instructor.intake import times
from tito.instructor.intake.model import MIB, Refusal, shown
from tito.instructor.intake.tree import read_below

SECONDS = 30  # for one question to git
MEMORY = 2048 * MIB
MOST_STORED = 200_000  # files of a repository's own
HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
BRANCH = re.compile(r"refs/heads/[^\s\0\\:?*\[~^]+")


def require_plain(own: Path) -> None:
    """No link, FIFO or borrowed object store in the repository: they could show another student's work, or wait."""
    if (own / "objects" / "info" / "alternates").exists():
        raise Refusal("the repository borrows objects of another one (objects/info/alternates)")
    waiting, seen = [own], 0
    while waiting:
        path = waiting.pop()
        kind = stat.S_IFMT(path.lstat().st_mode)
        seen += 1
        if kind not in (stat.S_IFREG, stat.S_IFDIR) or (path == own and kind != stat.S_IFDIR):
            raise Refusal(f"the repository is not whole in its folder ({shown(path.name)} leads elsewhere)")
        if seen > MOST_STORED:
            raise Refusal(f"the repository keeps more than {MOST_STORED} files; `git gc` packs them")
        if kind == stat.S_IFDIR:
            waiting += path.iterdir()


def newest_commit(own: Path) -> str:
    """The commit that HEAD names, by its branch or itself."""
    head = _line(own, "HEAD")
    if not head.startswith("ref:"):
        return _hash(head)
    branch = head.removeprefix("ref:").strip()
    if not BRANCH.fullmatch(branch) or ".." in branch or "//" in branch:
        raise Refusal("its HEAD names no branch")
    if (own / branch).is_file():
        return _hash(_line(own, branch))
    packed = _text(own, "packed-refs") if (own / "packed-refs").is_file() else ""
    for line in packed.splitlines():
        commit, _, name = line.partition(" ")
        if name.strip() == branch:
            return _hash(commit)
    raise Refusal("no commit")


def _hash(text: str) -> str:
    if not HASH.fullmatch(text):
        raise Refusal("its HEAD names no commit")
    return text


def _line(own: Path, name: str) -> str:
    return (_text(own, name).splitlines() or [""])[0].strip()


def _text(own: Path, name: str) -> str:
    return read_below(own, tuple(name.split("/"))).decode("utf-8", "replace")


def commit_time(commit: bytes) -> datetime:
    """The committer's time: `committer Ada <ada@example.org> 1795269600 +0100`."""
    found = re.search(rb"^committer .*> (\d{1,12}) [+-]\d{4}$", commit.partition(b"\n\n")[0], re.MULTILINE)
    if not found:
        raise Refusal("its newest commit has no time")
    return times.from_seconds(int(found.group(1)))


def ask(objects: Path, private: Path, form: str, question: list[str], most: int) -> bytes:
    """git's answer from the objects alone; Refusal where it has none, takes too long, or it is longer than `most`."""
    home = private / form
    environment = {
        "PATH": os.environ.get("PATH", os.defpath), "HOME": str(private), "LC_ALL": "C",
        "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_TERMINAL_PROMPT": "0",
        "GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": "none",
    }  # fmt: skip
    if not home.exists():
        start = ["git", "init", "-q", "--bare", "--template=", f"--object-format={form}", str(home)]
        if subprocess.run(start, env=environment, capture_output=True, timeout=SECONDS).returncode:
            raise Refusal(f"this git cannot read {form} repositories")
    command = ["git", "--no-replace-objects", "-c", "core.hooksPath=" + os.devnull, f"--git-dir={home}", *question]
    environment["GIT_OBJECT_DIRECTORY"] = str(objects.resolve())
    return _answer(command, environment, private, most)


def _answer(command: list[str], environment: dict[str, str], private: Path, most: int) -> bytes:
    """What a command writes, into a file whose size the system bounds."""
    output = private / "answer"
    limit = functools.partial(_limit, most + 1) if os.name == "posix" else None
    with open(output, "wb") as stream:
        try:
            done = subprocess.run(
                command, env=environment, cwd=private, stdin=subprocess.DEVNULL, stdout=stream,
                stderr=subprocess.DEVNULL, timeout=SECONDS, preexec_fn=limit,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Refusal(f"git needs more than {SECONDS} s for it") from None
    if output.stat().st_size > most:
        raise Refusal(f"git's answer is longer than {most // MIB} MiB")
    if done.returncode:
        raise Refusal("git cannot read it: the repository is damaged or not complete")
    return output.read_bytes()


def _limit(size: int) -> None:
    """In git's own process, before it starts: no answer larger than `size`, no more memory than MEMORY."""
    import resource

    for what, most in ((resource.RLIMIT_FSIZE, size), (resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0)):
        try:
            resource.setrlimit(what, (most, most))
        except (ValueError, OSError):  # macOS does not bound memory this way
            pass
