"""Ids become text as they come: whole characters only, and cut before a stop string."""

from __future__ import annotations

import codecs
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

BYTE_OR_NOTHING = re.compile("(<0x[0-9A-Fa-f]{2}>)?")  # a byte token, and what is not shown: the next may be a byte


class Text:
    """The text of one answer while it grows.

    What `add` and `end` return, joined, is the text of all ids together, cut before the stop string that is complete
    first, however the ids cut the text. Bytes of an unfinished character wait for the rest of it, and so does what
    may be the beginning of a stop string.
    """

    def __init__(self, tokens: Mapping[int, bytes], stops: Sequence[str] = ()):
        self.tokens, self.stops, self.stopped = tokens, stops, False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def add(self, token: int) -> str:
        """What can be shown now that this token has come."""
        return self._show(self._decoder.decode(self.tokens[token]))

    def end(self) -> str:
        """What was held back; bytes that never became a character are U+FFFD."""
        shown = self._show(self._decoder.decode(b"", final=True))
        shown, self._held = shown + self._held, ""
        return shown

    def _show(self, new: str) -> str:
        text = self._held + new
        found = [(text.index(stop) + len(stop), text.index(stop)) for stop in self.stops if stop in text]
        if found or self.stopped:
            self._held, self.stopped = "", True
            return text[: min(found)[1]] if found else ""
        kept = len(text) - max((beginning(text, stop) for stop in self.stops), default=0)
        self._held = text[kept:]
        return text[:kept]


def beginning(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`.

    >>> beginning("see you at the en", "the end")
    6
    """
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


class DecodedText:
    """As Text, for a tokenizer of characters: it decodes whole lists alone, and a row of byte tokens only as a row."""

    def __init__(self, tokenizer):
        self.tokenizer, self.last, self.waiting = tokenizer, [], []

    def add(self, token: int) -> str:
        """What can be shown now that this token has come."""
        self.waiting.append(token)
        name = "" if token in self.tokenizer.hidden else self.tokenizer.tokens.get(token, "")
        return "" if BYTE_OR_NOTHING.fullmatch(name) else self.end()

    def end(self) -> str:
        """What was held back. The last token before it stands at its front, since a text's first space is not shown."""
        before, whole = (self.tokenizer.decode(ids, True) for ids in (self.last, self.last + self.waiting))
        self.last, self.waiting = self.waiting[-1:], []
        return whole[len(before) :]


def text_of(tokenizer) -> Text | DecodedText:
    """The growing text of a tokenizer, lesson 10's or a file's; special tokens of a file are not shown."""
    if getattr(tokenizer, "decoder", None):
        return DecodedText(tokenizer)
    hidden = dict.fromkeys(getattr(tokenizer, "hidden", ()), b"")
    return Text(defaultdict(bytes, tokenizer.tokens | hidden))  # a model may have more ids than its tokenizer
