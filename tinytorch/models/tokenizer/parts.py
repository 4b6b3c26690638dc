"""Values in JSON files, checked as they are asked for; every error names the file and the place in it.

Written by hand, not built from a lesson.
"""

from dataclasses import dataclass
from pathlib import Path

from tinytorch.core.training import CheckpointError

__all__ = ["Part", "is_text", "short"]

STEPS = 32  # in a Sequence; real ones have up to four
KINDS = {dict: "an object, {…}", list: "a list, […]", str: "a text", bool: "true or false", int: "a whole number"}


@dataclass(frozen=True)
class Part:
    """A value of a JSON file and where it stands there."""

    file: Path
    place: str
    value: object

    def error(self, problem):
        return CheckpointError(f"{self.file}: {self.place or 'it'} {problem}")

    def get(self, name, default=None):
        """The part by this name; null is as good as absent."""
        value = self.of(dict).get(name)
        return Part(self.file, f"{self.place}.{name}".lstrip("."), default if value is None else value)

    def parts(self):
        """The parts of a list."""
        return [Part(self.file, f"{self.place}[{i}]", value) for i, value in enumerate(self.of(list))]

    def of(self, kind):
        """The value, which must be of this kind."""
        if type(self.value) is not kind:
            raise self.error(f"should be {KINDS[kind]}, and is {short(self.value)}")
        if kind is str and not is_text(self.value):
            raise self.error(f"is {short(self.value)}, with half of a surrogate pair, which is no text")
        return self.value

    def id(self):
        """The value, which must be an id."""
        if not 0 <= self.of(int) < 2**32:
            raise self.error(f"should be an id, 0 or more, and is {short(self.value)}")
        return self.value

    def one_of(self, *known):
        """The value, which must be one that we know."""
        if not any(type(self.value) is type(other) and self.value == other for other in known):
            raise self.error(f"is {short(self.value)}; we know only {', '.join(map(repr, known))}")
        return self.value

    def row(self, table):
        """What a table holds for the type of this part."""
        kind = self.get("type").of(str)
        if kind not in table:
            raise self.error(f"is of the type {short(kind)}; we know only {', '.join(table)}")
        return table[kind]

    def steps(self, name):
        """The members of a Sequence, the part itself, or nothing for null."""
        if self.value is None:
            return []
        if self.get("type").value != "Sequence":
            return [self]
        if len(self.get(name).of(list)) > STEPS:
            raise self.error(f"has {len(self.get(name).value)} steps; more than {STEPS} are not taken")
        return self.get(name).parts()


def short(value):
    """A value as an error shows it."""
    if isinstance(value, (dict, list)):  # maybe deeper than Python's repr can go
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def is_text(value):
    """False for a string with half of a surrogate pair."""
    try:
        return value.isascii() or bool(value.encode())
    except UnicodeEncodeError:
        return False
