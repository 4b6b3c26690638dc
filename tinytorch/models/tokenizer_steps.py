"""The steps that tokenizer.json names before and after BPE: normalizers, pre-tokenizers, decoders, post-processors.

Written by hand, not built from a lesson. A step is a row of a table, by the name that the `tokenizers` library gives
it; what has no row is refused by its name.
"""

import itertools
import re
import sys
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tinytorch.core.training import CheckpointError
from tinytorch.models.patterns import named_class, translate
from tinytorch.text.tokenization import character_class, split_text

__all__ = ["Part", "read_decoder", "read_normalizer", "read_post_processor", "read_pre_tokenizer"]

STEPS = 32
LONG_RUN = 64  # combining marks in a row, from which on we sort them ourselves


@dataclass(frozen=True)
class Part:
    """A value of a JSON file, and where it stands there, so that each error names both."""

    file: Path
    place: str
    value: object

    def error(self, problem):
        return CheckpointError(f"{self.file}: {self.place or 'it'} {problem}")

    def get(self, name, default=None):
        """The part by this name; absent is as good as null."""
        value = self.of(dict).get(name)
        return Part(self.file, f"{self.place}.{name}".lstrip("."), default if value is None else value)

    def parts(self):
        """The parts of a list."""
        return [Part(self.file, f"{self.place}[{i}]", value) for i, value in enumerate(self.of(list))]

    def of(self, kind):
        """The value, which is of this kind."""
        if type(self.value) is not kind:
            names = {dict: "an object, {…}", list: "a list", str: "a text", bool: "true or false", int: "a whole number"}
            raise self.error(f"should be {names[kind]}, and is {short(self.value)}")
        if kind is str and not self.value.isascii():
            check_surrogates(self, self.value)
        return self.value

    def id(self):
        """An id: a whole number, 0 or more."""
        if self.of(int) < 0 or self.value >= 2**32:
            raise self.error(f"should be an id, 0 or more, and is {short(self.value)}")
        return self.value

    def one_of(self, *known):
        """The value, if it is among those that we know."""
        if not any(type(self.value) is type(other) and self.value == other for other in known):
            raise self.error(f"is {short(self.value)}; we know only {', '.join(map(repr, known))}")
        return self.value

    def row(self, table):
        """What the table holds for the type of this part."""
        kind = self.get("type").of(str)
        if kind not in table:
            raise self.error(f"is of the type {short(kind)}; we know only {', '.join(table)}")
        return table[kind]

    def steps(self, name):
        """The members of a Sequence, or the part itself; none for null."""
        if self.value is None:
            return []
        parts = self.get(name).parts() if self.get("type").value == "Sequence" else [self]
        if len(parts) > STEPS:
            raise self.error(f"has {len(parts)} steps; {STEPS} are more than any real one has")
        return parts


def short(value):
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else f"a {type(value).__name__}"
    return text if len(text) < 60 else f"{text[:60]}…"


def check_surrogates(part, text):
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise part.error(f"has half of a surrogate pair at character {error.start}, which is no text") from None


def pattern_of(part):
    """The pattern of a Split or Replace: {"String": …} as it stands, or {"Regex": …} translated."""
    found = part.get("pattern")
    if found.get("String").value:
        return re.compile(re.escape(found.get("String").of(str)))
    try:
        return translate(found.get("Regex").of(str))
    except ValueError as error:
        raise found.error(f"is a regular expression that we do not take: {error}") from None


# Normalizers: text -> text


@cache
def mark_run():
    """A long run of combining marks, and of the few characters that are made of marks alone."""
    everything = map(chr, range(sys.maxunicode + 1))
    return re.compile(f"[{character_class(c for c in everything if unicodedata.combining(unicodedata.normalize('NFD', c)[0]))}]"
                      f"{{{LONG_RUN},}}")  # fmt: skip


def unicode_form(part):
    """NFC and its relatives. `unicodedata` orders marks in quadratic time, so we sort long runs of them before."""
    form = part.value["type"]

    def sort_marks(run):
        return "".join(sorted(unicodedata.normalize("NFD", "\n".join(run[0])).replace("\n", ""), key=unicodedata.combining))

    return lambda text: unicodedata.normalize(form, text if text.isascii() else mark_run().sub(sort_marks, text))


def replace(part):
    pattern, content = pattern_of(part), part.get("content").of(str)
    if len(content) > len(part.get("pattern").get("String", "?").of(str)):
        raise part.error("replaces by more characters than it finds, which a row of them can do without end")
    return lambda text: pattern.sub(lambda _: content, text)


def prepend(part):
    prefix = part.get("prepend").of(str)
    return lambda text: prefix + text if text else text


NORMALIZERS = {**dict.fromkeys(("NFC", "NFD", "NFKC", "NFKD"), unicode_form), "Replace": replace, "Prepend": prepend}


def read_normalizer(part):
    """The function text -> text that a normalizer is."""
    steps = [step.row(NORMALIZERS)(step) for step in part.steps("normalizers")]

    def normalize(text):
        for step in steps:
            text = step(text)
        return text

    return normalize


# Pre-tokenizers: (piece of text, is it the first of all) -> chunks


def byte_level(part):
    prefix = part.get("add_prefix_space").of(bool)
    split = split_text if part.get("use_regex", True).of(bool) else lambda piece: [piece]
    return lambda piece, first: split(f" {piece}" if prefix and not piece.startswith(" ") else piece)


def isolate(pattern):
    """Cut at both ends of each match."""

    def step(piece, first):
        ends = [0, *itertools.chain.from_iterable(match.span() for match in pattern.finditer(piece)), len(piece)]
        return [piece[start:end] for start, end in itertools.pairwise(ends) if start < end]

    return step


def split(part):
    part.get("behavior").one_of("Isolated")
    part.get("invert", False).one_of(False)
    return isolate(pattern_of(part))


def digits(part):
    one = f"[{named_class('N')}]"
    return isolate(re.compile(one if part.get("individual_digits").of(bool) else f"{one}+"))


def metaspace(part):
    """SentencePiece's white space: each space becomes a ▁, and one more stands at the start."""
    mark, scheme = mark_and_scheme(part)
    cut = re.compile(f"{re.escape(mark)}[^{re.escape(mark)}]*|[^{re.escape(mark)}]+")
    cut = cut.findall if part.get("split", True).of(bool) else lambda piece: [piece]

    def step(piece, first):
        piece = piece.replace(" ", mark)
        missing = not piece.startswith(mark) and (scheme == "always" or (scheme == "first" and first))
        return cut(mark + piece if missing else piece)

    return step


def mark_and_scheme(part):
    mark = part.get("replacement")
    if len(mark.of(str)) != 1:
        raise mark.error(f"should be one character, and is {short(mark.value)}")
    scheme = part.get("prepend_scheme", "always").one_of("always", "first", "never")
    if not part.get("add_prefix_space", True).of(bool) and scheme != "never":
        raise part.error(f"has add_prefix_space false and prepend_scheme {scheme!r}, which disagree")
    return mark.value, scheme


PRE_TOKENIZERS = {"ByteLevel": byte_level, "Split": split, "Digits": digits, "Metaspace": metaspace}


def read_pre_tokenizer(part):
    """(the function (text, first) -> chunks that a pre-tokenizer is, whether the chunks go on as bytes)."""
    parts = part.steps("pretokenizers")
    steps = [step.row(PRE_TOKENIZERS)(step) for step in parts]
    kinds = [step.value["type"] for step in parts]
    if "ByteLevel" in kinds[:-1]:
        raise part.error("has a step after ByteLevel, which would see letters that stand for bytes")

    def chunks(text, first):
        pieces = [text]
        for step in steps:
            pieces = [new for i, old in enumerate(pieces) for new in step(old, first and i == 0)]
        return pieces

    return chunks, kinds[-1:] == ["ByteLevel"]


# Decoders: tokens -> tokens, which are joined at the end. ByteLevel is lesson 10's decode_tokens and has no row here


def replace_tokens(part):
    step = replace(part)
    return lambda tokens: [step(token) for token in tokens]


def byte_fallback(part):
    """Tokens such as <0xE2> are bytes; where a row of them is not UTF-8, each byte of it becomes U+FFFD."""

    is_byte = re.compile("<0x[0-9A-Fa-f]{2}>").fullmatch

    def text_of(row):
        row = list(row)
        try:
            return bytes(int(token[3:5], 16) for token in row).decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(row)

    def decode(tokens):
        rows = itertools.groupby(tokens, lambda token: bool(is_byte(token)))
        return [token for found, row in rows for token in ([text_of(row)] if found else row)]

    return decode


def fuse(part):
    return lambda tokens: ["".join(tokens)]


def strip(part):
    """Take up to `start` characters off the front of each token."""
    content, start = part.get("content").of(str), part.get("start").id()
    part.get("stop").one_of(0)
    if len(content) != 1:
        raise part.error(f"strips {short(content)}, which is not one character")

    def cut(token):
        return token[min(start, len(token) - len(token.lstrip(content))) :]

    return lambda tokens: [cut(token) for token in tokens]


def metaspace_tokens(part):
    mark, scheme = mark_and_scheme(part)
    first = " " if scheme == "never" else ""
    return lambda tokens: [token.replace(mark, " " if i else first) for i, token in enumerate(tokens)]


DECODERS = {"Replace": replace_tokens, "ByteFallback": byte_fallback, "Fuse": fuse, "Strip": strip,
            "Metaspace": metaspace_tokens}  # fmt: skip


def read_decoder(part, bytes_inside):
    """The function tokens -> tokens that a decoder is; None for ByteLevel, which goes with chunks that are bytes."""
    parts = part.steps("decoders")
    is_byte_level = [step.get("type").value for step in parts] == ["ByteLevel"]
    if is_byte_level != bytes_inside or not parts:
        raise part.error("and pre_tokenizer do not go together: both are ByteLevel, or neither")
    if is_byte_level:
        return None
    steps = [step.row(DECODERS)(step) for step in parts]

    def decode(tokens):
        for step in steps:
            tokens = step(tokens)
        return tokens

    return decode


# Post-processors: the ids before and after those of the text


def template(part):
    """(ids before, ids after) of a TemplateProcessing for one text."""
    before, after, seen = [], [], 0
    for piece in part.get("single").parts():
        if piece.get("Sequence").value is not None:
            piece.get("Sequence").get("id").one_of("A")
            seen += 1
            continue
        name = piece.get("SpecialToken").get("id").of(str)
        ids = [i.id() for i in part.get("special_tokens").get(name).get("ids").parts()]
        (after if seen else before).extend(ids)
    if seen != 1:
        raise part.get("single").error(f"has the text {seen} times, not once")
    return before, after


POST_PROCESSORS = {"TemplateProcessing": template, "ByteLevel": lambda part: ([], [])}  # ByteLevel moves offsets alone


def read_post_processor(part):
    """(ids before, ids after) that a post-processor puts around a text's own."""
    before, after = [], []
    for step in part.steps("processors"):
        first, last = step.row(POST_PROCESSORS)(step)
        before, after = first + before, after + last
    return before, after
