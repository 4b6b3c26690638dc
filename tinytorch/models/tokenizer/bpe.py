"""A chunk of text to ids by lesson 10's merges, and the tokenizer around that.

Written by hand, not built from a lesson.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tinytorch.models.tokenizer.added import Finder
from tinytorch.text.tokenization import (
    CACHE_SIZE,
    LONG_CHUNK,
    byte_letters,
    decode_tokens,
    merge_by_rank,
    merge_by_rank_long,
    plain_ids,
    utf8,
)

__all__ = ["BPE", "FileTokenizer"]

BYTES = {letter: byte for byte, letter in enumerate(byte_letters())}


def token_bytes(token):
    """The bytes that the letters of a token stand for; with any other character in it, the token stands for itself.

    >>> token_bytes("Ġnaà ģ"), token_bytes("Ġcaf")
    (b'\\xc4\\xa0na\\xc3\\xa0 \\xc4\\xa3', b' caf')
    """
    try:
        return bytes([BYTES[letter] for letter in token])
    except KeyError:
        return token.encode()


class BPE:
    """A vocabulary {token: id} and its merges; they work on bytes, or on characters with bytes for unknown ones."""

    def __init__(self, vocab, triples, of_bytes, whole_first):
        """triples: (left, right, new id) in order of rank; whole_first: a chunk that is a token needs no merges."""
        self.vocab, self.of_bytes, self.cache = vocab, of_bytes, {}
        self.merges = {(left, right): (rank, new_id) for rank, (left, right, new_id) in enumerate(triples)}
        names = byte_letters() if of_bytes else [f"<0x{byte:02X}>" for byte in range(256)]
        self.byte_ids = [vocab.get(name) for name in names]
        self.whole = {token_bytes(token) if of_bytes else token: i for token, i in vocab.items() if whole_first}
        self.merge = merge_by_rank if self.in_order() else merge_by_rank_long

    def in_order(self):
        """Whether every token is made before it is a part: else all places of a pair must not be merged at once."""
        made = {}
        for rank, new_id in self.merges.values():
            made[new_id] = max(rank, made.get(new_id, rank))
        return all(made.get(part, -1) < rank for pair, (rank, _) in self.merges.items() for part in pair)

    def encode(self, chunk):
        """The ids of a chunk."""
        ids = self.cache.get(chunk)
        if ids is None:
            ids = self.encode_anew(chunk.encode() if self.of_bytes else chunk)
            if len(chunk) <= LONG_CHUNK:
                if len(self.cache) >= CACHE_SIZE:
                    self.cache.clear()
                self.cache[chunk] = ids
        return ids

    def encode_anew(self, chunk):
        if chunk in self.whole:
            return [self.whole[chunk]]
        ids = [self.byte_ids[byte] for byte in chunk] if self.of_bytes else self.character_ids(chunk)
        return self.merge(ids, self.merges) if len(ids) <= LONG_CHUNK else merge_by_rank_long(ids, self.merges)

    def character_ids(self, chunk):
        ids = []
        for character in chunk:
            if character in self.vocab:
                ids.append(self.vocab[character])
            else:
                ids.extend(self.byte_ids[byte] for byte in character.encode())
        return ids


@dataclass
class FileTokenizer:
    """What `load_tokenizer` returns.

    `special_tokens`: {text: id}; `bos_id` and `eos_id`: those of bos_token and eos_token, or None.
    """

    bpe: BPE
    added: list  # of Added
    normalize: Callable  # text -> text
    chunks: Callable  # (text, whether it is the first) -> chunks
    decoder: Callable | None  # tokens -> tokens; None where tokens are bytes
    before: list  # ids around a text
    after: list
    bos_id: int | None = None
    eos_id: int | None = None

    def __post_init__(self):
        found = [(self.normalize(token.content) if token.normalized else token.content, token) for token in self.added]
        names = {i: name for name, i in self.bpe.vocab.items()} | {token.id: name for name, token in found}
        self.tokens = names if self.decoder else {i: token_bytes(name) for i, name in names.items()}
        self.special_tokens = {token.content: token.id for token in self.added if token.special}
        self.hidden = {i for i, name in names.items() if name in self.special_tokens}
        self.as_written = Finder([(name, token) for name, token in found if not token.normalized])
        self.as_normalized = Finder([(name, token) for name, token in found if token.normalized])

    @property
    def vocab_size(self):
        """The highest id and one. A model may have more rows, since sizes are rounded up."""
        return max(self.tokens) + 1

    def encode(self, text, add_special_tokens=True, allow_special=True):
        """The ids of a text, as transformers' AutoTokenizer gives them.

        Without add_special_tokens nothing is put around the text, such as the token that begins one. Without
        allow_special the name of a special token in the text is plain text: right for what strangers wrote.
        """
        utf8(text)  # says where a character is that has no bytes
        ids = []
        for i, piece in enumerate(self.as_written.cut(text, allow_special)):
            if not isinstance(piece, str):
                ids.append(piece)
                continue
            for j, part in enumerate(self.as_normalized.cut(self.normalize(piece), allow_special)):
                if not isinstance(part, str):
                    ids.append(part)
                    continue
                for chunk in self.chunks(part, i == j == 0):
                    ids.extend(self.bpe.encode(chunk))
        return [*self.before, *ids, *self.after] if add_special_tokens else ids

    def decode(self, ids, skip_special_tokens=False):
        """The text of a list of ids; bytes that are not UTF-8 become U+FFFD.

        An id that no token has is no text, as in transformers: a model may have more rows than there are tokens.
        """
        ids = plain_ids(ids)
        if min(ids, default=0) < 0:
            raise ValueError(f"ids are 0 or more, got {min(ids)}")
        ids = [i for i in ids if i in self.tokens and not (skip_special_tokens and i in self.hidden)]
        if self.decoder is None:
            return decode_tokens(ids, self.tokens)
        return "".join(self.decoder([self.tokens[i] for i in ids]))
