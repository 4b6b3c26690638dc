"""What no tracked file holds: emoji, and paths of somebody's machine."""

from __future__ import annotations

import re

import pytest

# Pictures, dingbats (check marks and crosses among them) and what turns a character into a picture. Arrows and
# mathematical signs are text.
EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u27bf\u2b00-\u2bff\ufe0f\u20e3]")
HOMES = ("home", "Users", "root", "work", "tmp", "workspace", "mnt", "private/var")
MACHINE = re.compile(rf"(?<![\w.~$}}*\\])/(?:{'|'.join(HOMES)})/[\w.-]|\b[A-Z]:\\+Users\\")


def texts(tracked):
    """Every tracked file that is text."""
    for path in tracked:
        try:
            yield path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def found(tracked, pattern: re.Pattern) -> list[str]:
    return [
        f"{path.name}:{number}: {match.group()!r} in {line.strip()[:80]}"
        for path, text in texts(tracked)
        for number, line in enumerate(text.splitlines(), start=1)
        for match in pattern.finditer(line)
    ]


def test_no_emoji(tracked):
    assert not found(tracked, EMOJI)


def test_no_absolute_path_of_a_machine(tracked):
    assert not found(tracked, MACHINE)


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("a path " + "/ho" + "me/ada/course", True),
        ("'" + "/tm" + "p/x.npz'", True),
        ("C:" + "\\Users\\ada", True),
        ("src/work/x", False),
        ("https://example.org/home/", False),
        ("and/or, 1/2", False),
    ],
)
def test_the_pattern_knows_a_machines_path(text, matches):
    assert bool(MACHINE.search(text)) is matches
