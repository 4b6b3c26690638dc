"""Regular expressions of tokenizer files, written for the Oniguruma library, as patterns of Python's `re`.

Written by hand, not built from a lesson. `re` has no \\p{..} and another \\s, so lesson 10's classes stand in for them.
A pattern from a file may be hostile: `(a+)+b` would run for years. So a pattern is read piece by piece, what we do not
know is refused, and what we accept needs a time that grows with the text and no faster: see `check_time`.
"""

import math
import re
import sys
import unicodedata
from dataclasses import dataclass
from functools import cache

from tinytorch.text.tokenization import character_class, unicode_classes

__all__ = ["named_class", "translate"]

PIECE = re.compile(
    r"""(?P<open>\((?:\?(?:i?:|[!=]))?)
      | (?P<close>\))
      | (?P<bar>\|)
      | (?P<repeat>(?:[?*+]|\{\d{1,3}(?:,\d{0,3})?\})[?+]?)
      | (?P<one>\.|\\[pP]\{\w+\}|\\.|\[\^?(?:\\.|&(?!&)|[^][\\&])+\]|[^][\\(){}|?*+.^$])""",
    re.VERBOSE | re.DOTALL,
)
MEMBER = re.compile(r"(?P<name>\\[pP]\{\w+\}|\\[sSdD])|(?P<first>\\.|[^\\])(?:-(?P<last>\\.|[^\\]))?", re.DOTALL)
ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v"}
FOLDS = {"s": "ſ", "k": "\u212a"}  # where case counts not, these are equal to an ASCII letter, too
LONGEST = 2000  # characters of a pattern
LONG = 8  # a repeat of so many counts as endless
CHOICES = 64  # ways to read the other repeats and groups of one alternative


@dataclass
class Item:
    """A character, a class, a group of plain alternatives or a look-ahead, with how often it stands there."""

    text: str  # as Python's re reads it
    kind: str = "one"
    ways: int = 1  # alternatives of a group
    least: int = 1
    most: float = 1
    repeat: str = ""

    @property
    def long(self):
        return self.most >= LONG


@cache
def lesson_classes():
    return dict(zip(("L", "N", "space"), unicode_classes()))


@cache
def named_class(name):
    """A general category, such as L or Lu, or "space", Unicode's White_Space, as the inside of [...]."""
    if name in lesson_classes():
        return lesson_classes()[name]
    everything = map(chr, range(sys.maxunicode + 1))
    found = character_class(c for c in everything if unicodedata.category(c).startswith(name))
    if not found:
        raise ValueError(f"\\p{{{name}}} is no general category of Unicode")
    return found


def translate(pattern):
    """The compiled pattern; one that we do not know, or that may take too long, is a ValueError that says where."""
    if len(pattern) > LONGEST:
        raise ValueError(f"it has {len(pattern)} characters; more than {LONGEST} are not taken")
    alternatives, end = read_alternatives(pattern, 0)
    if end < len(pattern):
        raise ValueError(f"at character {end}: a ) that closes nothing")
    check_time(alternatives)
    return re.compile("|".join("".join(item.text + item.repeat for item in items) for items in alternatives))


def read_alternatives(pattern, at, group=None):
    """(alternatives, end): rows of Items, up to the end of the pattern or, in a group, its closing bracket."""
    alternatives = [[]]
    while at < len(pattern):
        piece = PIECE.match(pattern, at)
        if not piece or (group and piece["open"]):
            raise ValueError(f"at character {at}: {pattern[at : at + 12]!r} is nothing that we can translate")
        if piece["close"]:
            break
        end, last = piece.end(), alternatives[-1]
        if piece["bar"]:
            alternatives.append([])
        elif piece["repeat"]:
            if group:
                raise ValueError(f"at character {at}: a repeat inside of a group")
            add_repeat(last, piece["repeat"], at)
        elif piece["one"]:
            last.append(Item(translate_one(piece["one"], group == "(?i:", at)))
        else:
            item, end = read_group(pattern, end, piece["open"])
            last.append(item)
        at = end
    return alternatives, at


def add_repeat(items, repeat, at):
    """Give the last item its ? * + or {m,n}; another + behind it forbids to give back what was taken."""
    if not items or items[-1].repeat or items[-1].kind == "look":
        raise ValueError(f"at character {at}: {repeat!r} has nothing to repeat")
    item, plain = items[-1], re.match(r"[?*+]|\{.*\}", repeat)[0]
    low, _, high = plain.strip("{}").partition(",")
    bounds = {"?": (0, 1), "*": (0, math.inf), "+": (1, math.inf)}.get(plain)
    item.least, item.most = bounds or (int(low), (int(high) if high else math.inf if "," in plain else int(low)))
    if item.least > item.most or repeat.endswith(("??", "*?", "+?", "}?", "}+")):
        raise ValueError(f"at character {at}: {repeat!r} is a repeat that we do not know")
    item.repeat = repeat


def read_group(pattern, at, opening):
    """(Item, end) of a group of plain alternatives, or of a look-ahead at one character."""
    alternatives, end = read_alternatives(pattern, at, opening)
    if end == len(pattern):
        raise ValueError(f"at character {at}: a ( that nothing closes")
    if not all(alternatives):
        raise ValueError(f"at character {at}: an empty alternative")
    look = opening in ("(?!", "(?=")
    if look and len(alternatives) + len(alternatives[0]) > 2:
        raise ValueError(f"at character {at}: a look-ahead at more than one character")
    if opening == "(?i:" and re.search("ss|ff|f[il]|st", pattern[at:end], re.IGNORECASE):
        raise ValueError(f"at character {at}: letters that in other scripts are one, where case counts not")
    text = "|".join("".join(item.text for item in items) for items in alternatives)
    return Item(f"{opening if look else '(?:'}{text})", "look" if look else "group", len(alternatives)), end + 1


def translate_one(piece, fold, at):
    """A character, an escape or a class; with `fold`, upper case and lower case are equal."""
    if piece == ".":
        return piece
    if piece.startswith("["):
        inside = piece[1:-1].removeprefix("^")
        negated, members = piece[1] == "^", list(MEMBER.finditer(inside))
    else:
        negated, members = False, [MEMBER.fullmatch(piece)]
    parts = [translate_member(member, fold, at) for member in members]
    opposite = [part for part in parts if part.startswith("^")]
    if opposite and (len(parts) > 1 or negated):
        raise ValueError(f"at character {at}: {piece!r} has a class that names what is not in it, beside others")
    return f"[{'^' * negated}{''.join(parts)}]"


def translate_member(member, fold, at):
    """A class by name, a range or a character, as it stands inside of [...]; with ^ before it, its opposite."""
    name = member["name"]
    if fold and (name or member["last"] or not member["first"].isascii()):
        raise ValueError(f"at character {at}: {member[0]!r}, where case counts not, is more than an ASCII character")
    if name:
        return "^" * name[1].isupper() + named_class({"s": "space", "d": "Nd", "p": name[3:-1]}[name[1].lower()])
    first, last = literal(member["first"], at), literal(member["last"] or member["first"], at)
    if first > last:
        raise ValueError(f"at character {at}: the range {member[0]!r} runs backwards")
    if fold:
        return character_class(sorted({first.lower(), first.upper(), FOLDS.get(first.lower(), first)}))
    return rf"\U{ord(first):08x}-\U{ord(last):08x}"


def literal(text, at):
    """The character that `text`, maybe an escape, stands for."""
    if len(text) == 1:
        return text
    if text[1] in ESCAPES:
        return ESCAPES[text[1]]
    if text[1] not in r"-.*+?()[]{}|\/^$ ":
        raise ValueError(f"at character {at}: {text!r} is an escape that we do not know")
    return text[1]


def check_time(alternatives):
    """Refuse what may take more time than a constant per character of text, or match nothing at all.

    An alternative has at most two long repeats, and nothing after the second that could fail: so one attempt looks at
    each character a few times. Where it may fail after a long repeat, the next alternative must take the characters
    that it passed: so no later attempt begins among them.
    """
    for number, items in enumerate(alternatives):
        where = f"alternative {number + 1}"
        if not any(item.least and item.kind != "look" for item in items):
            raise ValueError(f"{where} may match nothing")
        if any(item.kind == "look" for item in items[:-1]):
            raise ValueError(f"{where} goes on after a look-ahead")
        if any(item.kind == "group" and item.most > 1 for item in items):
            raise ValueError(f"{where} repeats a group")
        short = [item.ways * (item.most - item.least + 1) for item in items if not item.long]
        if math.prod(short) > CHOICES:
            raise ValueError(f"{where} leaves more than {CHOICES} ways to read a few characters")
        long = [i for i, item in enumerate(items) if item.long]
        if len(long) > 2 or (len(long) == 2 and any(item.least for item in items[long[1] + 1 :])):
            raise ValueError(f"{where} repeats at more than one place before something that may fail")
        if long and any(item.least for item in items[long[0] + 1 :]):
            following = alternatives[number + 1] if number + 1 < len(alternatives) else []
            first = next((item for item in following if item.least), Item(""))
            if not first.long or first.text != items[long[0]].text or first.least > 1:
                raise ValueError(f"{where} may fail after a long repeat, and the next does not take what it passed")
