"""The steps that tokenizer.json names before and after BPE: normalizers, pre-tokenizers, decoders, post-processors.

Written by hand, not built from a lesson. A step is a row of a table, by the name that the `tokenizers` library gives
it; what has no row is refused by its name.
"""

import itertools
import re
import sys
import unicodedata
from functools import cache

from tinytorch.models.tokenizer.parts import short
from tinytorch.models.tokenizer.patterns import named_class, translate
from tinytorch.text.tokenization import character_class, split_text

__all__ = ["read_decoder", "read_normalizer", "read_post_processor", "read_pre_tokenizer"]

LONG_RUN = 64  # combining marks in a row, from which on we sort them ourselves


def pattern_of(part):
    """The pattern of a Split or Replace: {"String": …} as it stands, or {"Regex": …} translated."""
    found = part.get("pattern")
    if found.get("String").value:
        return re.compile(re.escape(found.get("String").of(str)))
    try:
        return translate(found.get("Regex").of(str))
    except ValueError as error:
        raise found.error(f"is a regular expression that we do not take: {error}") from None


def in_turn(steps):
    """The function that gives its argument to the first of these functions, what comes out to the next, and so on."""

    def run(value):
        for step in steps:
            value = step(value)
        return value

    return run


# Normalizers: text -> text


@cache
def mark_run(decomposed):
    """A long run of combining marks, and of the characters that are nothing but marks when decomposed (NFD, NFKD)."""
    everything = map(chr, range(sys.maxunicode + 1))
    marks = (c for c in everything if unicodedata.combining(unicodedata.normalize(decomposed, c)[0]))
    return re.compile(f"[{character_class(marks)}]{{{LONG_RUN},}}")


def unicode_form(part):
    """NFC and its relatives. `unicodedata` orders marks in quadratic time, so long runs of them are sorted before."""
    form = part.value["type"]
    decomposed = form.replace("C", "D")

    def sorted_marks(run):
        marks = unicodedata.normalize(decomposed, "\n".join(run[0])).replace("\n", "")
        return "".join(sorted(marks, key=unicodedata.combining))

    def normalize(text):
        text = text if text.isascii() else mark_run(decomposed).sub(sorted_marks, text)
        return unicodedata.normalize(form, text)

    return normalize


def replace(part):
    pattern, content = pattern_of(part), part.get("content").of(str)
    if len(content) > len(part.get("pattern").get("String", "?").of(str)):
        raise part.error("replaces by more characters than it finds; a row of such steps could fill any memory")
    return lambda text: pattern.sub(lambda _: content, text)


def prepend(part):
    prefix = part.get("prepend").of(str)
    return lambda text: prefix + text if text else text


NORMALIZERS = {**dict.fromkeys(("NFC", "NFD", "NFKC", "NFKD"), unicode_form), "Replace": replace, "Prepend": prepend}


def read_normalizer(part):
    """The function text -> text that a normalizer is."""
    return in_turn([step.row(NORMALIZERS)(step) for step in part.steps("normalizers")])


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
    return in_turn([step.row(DECODERS)(step) for step in parts])


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
