"""Everything that reaches the terminal.

Colour only on a terminal that wants it (rich decides: NO_COLOR, TERM). Lines are wrapped on a terminal and left
whole in a pipe. A character that the stream cannot carry, e.g. an arrow on a cp1252 console, is spelled in ASCII.
"""

from __future__ import annotations

import codecs
import functools
import os
import re
import sys
import unicodedata

SPELLED = {
    "→": "->", "←": "<-", "⇒": "=>", "×": "x", "·": "*", "≤": "<=", "≥": ">=", "≠": "!=", "≈": "~", "−": "-",
    "…": "...", "–": "-", "—": "-", "‘": "'", "’": "'", "“": '"', "”": '"', "√": "sqrt", "∞": "inf", "∈": "in",
    "\N{GREEK SMALL LETTER MU}": "u", "\N{MICRO SIGN}": "u",
}  # fmt: skip
CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # colour codes and the like
WIDTH = 100  # a line is no longer than this, however wide the terminal
STATES = {"pass": "green", "FAIL": "bold red", "yours": "green", "completed": "green", "ok": "green"}
STATES |= {"changed": "yellow", "missing": "bold red", "problem": "bold red"}


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler: what the encoding cannot carry, as ASCII."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wanted = error.object[error.start : error.end]
    plain = (SPELLED.get(c) or unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode() for c in wanted)
    return "".join(part or "?" for part in plain), error.end


def prepare() -> None:
    """Make both streams carry any text; called once, at the start."""
    codecs.register_error("tito-spell", _spell)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="tito-spell")


@functools.cache
def console(stderr: bool = False):
    """The rich console of a stream, made when it is first needed."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)


def width(stderr: bool = False) -> int | None:
    """Columns to wrap at; None where the output is not a terminal and lines stay whole."""
    screen = console(stderr)
    return min(screen.width, WIDTH) if screen.is_terminal else None


def wrapped(text: str, first: str = "", rest: str | None = None, stderr: bool = False) -> str:
    """`text` after the prefix `first`, later lines after `rest`; line breaks in `text` are kept."""
    import textwrap

    rest = " " * len(first) if rest is None else rest
    columns, lines = width(stderr), []
    for piece in CONTROL.sub("", text.expandtabs()).splitlines() or [""]:
        prefix = rest if lines else first
        if columns is None or len(prefix + piece) <= columns:
            lines.append((prefix + piece).rstrip())
        else:  # only what is too long is touched: a message may hold aligned numbers
            lines += textwrap.wrap(
                piece, columns, initial_indent=prefix, subsequent_indent=rest,
                break_long_words=False, break_on_hyphens=False,
            )  # fmt: skip
    return "\n".join(lines)


def clipped(text: str, lines: int = 6, columns: int = 400) -> str:
    """A long message by its first and last lines: a learner's error may hold a whole array."""
    pieces = [piece if len(piece) <= columns else piece[:columns] + " ..." for piece in text.splitlines()]
    if len(pieces) > lines:
        left_out = count(len(pieces) - lines + 1, "line")
        pieces = [*pieces[: lines - 3], f"... {left_out} more; `--json` has them all ...", *pieces[-2:]]
    return "\n".join(pieces)


def line(text: str = "", style: str | None = None, indent: int = 0) -> None:
    """One paragraph, wrapped on a terminal."""
    console().print(wrapped(text, " " * indent), style=style)


def count(number: int, thing: str) -> str:
    """`1 point`, `2 points`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def heading(title: str, remark: str = "") -> None:
    """What the output is about, in bold, and a remark beside it."""
    from rich.text import Text

    console().print(Text.assemble((title, "bold"), (f"   {remark}" if remark else "", "dim")))


def rows(table: list[tuple[str, ...]], header: tuple[str, ...] = (), indent: int = 2, right: tuple = ()) -> None:
    """Columns, aligned; the last one wraps under itself. `right` lists the columns that align right."""
    from rich.text import Text

    lines = [tuple(_carried(cell) for cell in row) for row in ([header] if header else []) + table]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for number, row in enumerate(lines):
        styled = Text(" " * indent)
        for column, cell in enumerate(row[:-1]):
            space = " " * (widths[column] - len(cell))
            padded = space + cell if column in right else cell + space
            styled.append(padded + "  ", "dim" if header and number == 0 else STATES.get(cell.strip(), ""))
        last = row[-1].rjust(widths[-1]) if len(row) - 1 in right else row[-1]
        style = "dim" if header and number == 0 else STATES.get(row[-1], "")
        styled.append(wrapped(last, " " * styled.cell_len)[styled.cell_len :], style)
        styled.rstrip()
        console().print(styled)


def _carried(text: str) -> str:
    """`text` as the stream will carry it, so that columns are measured right; without control characters."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return CONTROL.sub("", text).encode(encoding, "tito-spell").decode(encoding)


def steps(*commands: tuple[str, str]) -> None:
    """What to do next: commands and why, after an empty line."""
    line()
    pad = max(len(command) for command, _ in commands)
    for number, (command, why) in enumerate(commands):
        line(wrapped(why, f"{'      ' if number else 'Next: '}{command.ljust(pad)}   "))


def as_json(value: object) -> None:
    """For programs: one JSON document in ASCII, which every encoding carries."""
    import json

    if sys.stdout:  # None where it was closed before we began
        sys.stdout.write(json.dumps(value, indent=2) + "\n")
        sys.stdout.flush()


def abandon_stdout() -> None:
    """What stdout cannot take goes nowhere from now on, so that Python does not stumble over it at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def problem(message: str, hint: str = "", json: bool = False) -> None:
    """A mistake that the user can mend: what came and what is needed, then what to do."""
    if json:
        try:
            return as_json({"error": message, "hint": hint})
        except OSError:  # a full disk, or a reader who has gone: words on stderr are left
            abandon_stdout()
    screen = console(stderr=True)
    screen.print(wrapped(message, "tito: ", "      ", stderr=True), style="bold red")
    if hint:
        screen.print(wrapped(hint, "      ", stderr=True))


class Working:
    """A line that says what is being done, on a terminal only, and is gone when it is done."""

    def __init__(self, text: str, quiet: bool = False):
        spinner = "dots" if (sys.stdout.encoding or "").lower().startswith("utf") else "line"
        self._status = None if quiet else console().status(text, spinner=spinner)

    def __enter__(self):
        if self._status and console().is_terminal:
            self._status.start()
        return self

    def __exit__(self, *_):
        if self._status and console().is_terminal:
            self._status.stop()

    def tell(self, text: str) -> None:
        """The next thing that is being done."""
        if self._status:
            self._status.update(text)


class Progress:
    """A bar on a terminal, with a line for each thing that needs a look; in a pipe, a line for everything."""

    def __init__(self, text: str, total: int):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console(), transient=True, disable=not console().is_terminal)
        self._task = self._bar.add_task(text, total=total)

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *_):
        self._bar.stop()

    def step(self, row: tuple[str, ...], bad: bool = False) -> None:
        """One more is done; `row` tells which, how, and a remark, last."""
        if row[-1] or not console().is_terminal:
            console().print(wrapped("  ".join(row)), style="bold red" if bad else None)
        self._bar.advance(self._task)


def crash(error: BaseException) -> None:
    """A mistake of ours: one line, and how to report it."""
    problem(
        f"an error that should not happen: {type(error).__name__}: {error}",
        "Please report it with the output of the same command under TITO_DEBUG=1.",
    )
