"""Ids become text as they come: whole characters only, and cut before a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence


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
