"""Who is meant: the gradebook's students, found by id, address or name, and never guessed."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from tito.instructor.intake.model import Delivery, listed, shown


@dataclass(frozen=True)
class Person:
    """A student as the gradebook knows one."""

    id: str
    first_name: str = ""
    last_name: str = ""
    email: str = ""


class Roster:
    """All students. Each question is answered by the list of ids that fit: none, one, or several."""

    def __init__(self, people: Iterable[Person]):
        self.ids: dict[str, str] = {}
        self._emails, self._names = defaultdict(set), defaultdict(set)
        for person in people:
            self.ids[_plain(person.id)] = person.id
            if person.email:
                self._emails[person.email.strip().casefold()].add(person.id)
            for name in _orders(f"{person.first_name} {person.last_name}".split()):
                self._names[name].add(person.id)

    def with_id(self, text: str) -> list[str]:
        return [self.ids[_plain(text)]] if _plain(text) in self.ids else []

    def with_email(self, text: str) -> list[str]:
        return sorted(self._emails.get(text.strip().casefold(), ()))

    def called(self, name: str) -> list[str]:
        """By name, in any order of its words, without regard to case, accents, blanks and commas."""
        return sorted(self._names.get(_letters(name), ()))


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip())


def _letters(name: str) -> str:
    """`Doe, Jané` -> `doejane`, close to what Canvas makes of a name."""
    return "".join(c for c in unicodedata.normalize("NFKD", name).casefold() if c.isalnum())


def _orders(words: list[str]) -> set[str]:
    """`Jane van Doe` -> janevandoe, vandoejane, doejanevan: where the last name begins is not known."""
    return {_letters("".join(words[k:] + words[:k])) for k in range(len(words))} - {""}


def delivery(label: str, found: list[str], what: str, **fields) -> Delivery:
    """A delivery of the one student found, or one without a student that says why."""
    if len(found) == 1:
        return Delivery(label, found[0], **fields)
    if found:
        why = f"{what} fits several students: {listed([shown(student) for student in found])}"
    else:
        why = f"not in the roster: {what}"
    return Delivery(label, None, problem=why, **fields)


def without_doubles(deliveries: list[Delivery]) -> list[Delivery]:
    """Two people of a platform whose names fit the same student: neither is taken for that student."""
    labels = defaultdict(list)
    for one in deliveries:
        labels[one.student].append(one.label)

    def checked(one: Delivery) -> Delivery:
        if one.student is None or len(labels[one.student]) == 1:
            return one
        why = f"{len(labels[one.student])} submissions fit {shown(one.student)}: {listed(labels[one.student])}"
        return replace(one, student=None, problem=why)

    return [checked(one) for one in deliveries]
