"""What of a message may reach a student: no line of a hidden test, no control codes, and no more than can be read.

Messages come from the student's own code, which may carry the source of the check that runs it. A determined
program can always disguise what it has seen; what it must not do is reach it, and that is the sandbox's part. Here
ends what a traceback, `inspect.getsource` or a `repr` of a cell would carry.
"""

from __future__ import annotations

import re

from tito.instructor.assignment import Assignment

WITHHELD = "This check failed. Its message quotes a hidden test, so it is not shown here."
SHORTEST = 12  # characters of a line that is worth hiding; shorter ones (`else:`) say nothing
LONGEST = 2000  # characters of a message
CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
# What survives quoting by repr, ascii or json at any depth: printable ASCII without blanks and backslashes.
QUOTING = re.compile(r"\\+(?:[nrt]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8})|\\|[^!-~]")


def hidden_lines(assignment: Assignment) -> frozenset[str]:
    """The lines that grading runs and students never got, in the form in which messages are searched for them."""
    released = {_bare(line) for cell in assignment.cells for line in cell.released.splitlines()}
    run = [cell.source for cell in assignment.cells] + list(assignment.controls.values())
    lines = (line.strip() for text in run for line in text.splitlines())
    return frozenset(_bare(line) for line in lines if len(line) >= SHORTEST) - released - {""}


def for_students(text: str, hidden: frozenset[str], withheld: str = WITHHELD) -> str:
    """`text` as a student may see it: `withheld` where it quotes a hidden line, and cut where it is too long."""
    searched = _bare(text) + "\n" + _bare(plain(text))  # colour codes could stand within a word, or eat a letter
    if any(line in searched for line in hidden):
        return withheld
    text = plain(text.replace("\r\n", "\n")).strip("\n")
    return text if len(text) <= LONGEST else text[:LONGEST] + " ... (shortened)"


def plain(text: str) -> str:
    """`text` without colour codes, control characters and what UTF-8 cannot carry."""
    return CONTROL.sub("", text)


def _bare(text: str) -> str:
    return QUOTING.sub("", text)
