"""Tokenization: text to ids and back: characters, then byte-level BPE.

Lesson 10_tokenization. Built from src/10_tokenization/10_tokenization.py by `tito dev build`: change it there, not here.
"""

__all__ = [
    "char_vocabulary",
    "decode_characters",
    "encode_characters",
    "write_json",
    "Tokenizer",
    "check_kind",
    "check_text",
    "plain_ids",
    "CharTokenizer",
    "count_pairs",
    "top_pair",
    "merge_pair",
    "character_class",
    "unicode_classes",
    "chunk_regex",
    "chunk_pattern",
    "split_text",
    "replace_word",
    "pop_top_pair",
    "learn_merges",
    "NEVER",
    "merge_by_rank",
    "merge_by_rank_long",
    "decode_tokens",
    "utf8",
    "split_special",
    "BPEState",
    "LONG_CHUNK",
    "CACHE_SIZE",
    "BPETokenizer",
    "byte_letters",
    "read_merges",
    "read_gpt2_files",
]


# %% cell 2
import contextlib
import heapq
import json
import os
import re
import sys
from collections import Counter, defaultdict
from functools import cache


# %% cell 8
def char_vocabulary(text):
    """The distinct characters of a text, in sorted order, so that the same text always gives the same ids.

    >>> char_vocabulary("decade")
    ['a', 'c', 'd', 'e']
    """
    return sorted(set(text))


def decode_characters(ids, characters):
    """The text of a list of ids.

    >>> decode_characters([2, 3, 3, 2], ["a", "c", "d", "e"])
    'deed'
    """
    for position, i in enumerate(ids):
        if not 0 <= i < len(characters):
            raise ValueError(f"id {i} at position {position} is outside of the vocabulary of {len(characters)}")
    return "".join(characters[i] for i in ids)


# %% cell 9 (10-encode-characters)
def encode_characters(text, ids):
    """The id of each character of `text`; `ids` maps characters to numbers.

    An unknown character is a ValueError: "character 'z' at position 3 is not in the vocabulary".

    >>> encode_characters("deed", {"a": 0, "c": 1, "d": 2, "e": 3})
    [2, 3, 3, 2]
    """
    result = []
    for position, character in enumerate(text):
        if character not in ids:
            raise ValueError(f"character {character!r} at position {position} is not in the vocabulary")
        result.append(ids[character])
    return result


# %% cell 12
def write_json(path, state):
    """Write `state` as JSON so that `path` holds the old content or the new, never a part of it."""
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


# %% cell 13
class Tokenizer:
    """What both tokenizers share: the file. `Tokenizer.load(path)` opens whichever kind was saved."""

    def save(self, path):
        """Write this tokenizer to a JSON file, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path):
        """The tokenizer that `save` wrote. A file that is not one is a ValueError with the path."""
        try:
            with open(path, encoding="utf-8") as file:
                return cls.from_dict(json.load(file))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path} does not hold a {cls.__name__}: {error!r}") from error

    @classmethod
    def from_dict(cls, state):
        """The tokenizer that `to_dict` described."""
        return {"char": CharTokenizer, "bpe": BPETokenizer}[state["kind"]].from_dict(state)


def check_kind(state, kind):
    """A saved tokenizer of another kind is a ValueError."""
    if state["kind"] != kind:
        raise ValueError(f"it holds a tokenizer of the kind {state['kind']!r}, not {kind!r}")


def check_text(text):
    """What is not a string is a TypeError."""
    if not isinstance(text, str):
        raise TypeError(f"a tokenizer takes text (str), got {type(text).__name__}")


def plain_ids(ids):
    """The ids of one text as a list; an array or a Tensor goes in, too. A batch or a fraction is a TypeError."""
    ids = list(ids.tolist() if hasattr(ids, "tolist") else ids)
    for i in ids:
        if not hasattr(i, "__index__"):
            raise TypeError(f"ids are whole numbers, got {i!r}. Decode the rows of a batch one by one")
    return ids


# %% cell 14
class CharTokenizer(Tokenizer):
    """One id per character of `text`.

    >>> CharTokenizer("decade").encode("deed")
    [2, 3, 3, 2]
    """

    def __init__(self, text):
        check_text(text)
        self.characters = char_vocabulary(text)
        self.ids = {character: i for i, character in enumerate(self.characters)}

    @property
    def vocab_size(self):
        return len(self.characters)

    def encode(self, text):
        check_text(text)
        return encode_characters(text, self.ids)

    def decode(self, ids):
        return decode_characters(plain_ids(ids), self.characters)

    def to_dict(self):
        return {"kind": "char", "characters": self.characters}

    @classmethod
    def from_dict(cls, state):
        check_kind(state, "char")
        tokenizer = cls("".join(state["characters"]))
        if tokenizer.characters != state["characters"]:
            raise ValueError("its characters are not sorted, or not each there once: the ids would change")
        return tokenizer


# %% cell 25 (10-count-pairs)
def count_pairs(words, weights):
    """How often each pair of neighbours occurs: a Counter {(left, right): count}.

    >>> count_pairs([[1, 2, 1, 2]], [10])
    Counter({(1, 2): 20, (2, 1): 10})
    """
    counts = Counter()
    for word, weight in zip(words, weights):
        for pair in zip(word, word[1:]):
            counts[pair] += weight
    return counts


def top_pair(counts):
    """The pair with the largest count; among equals, the smallest pair of ids.

    >>> top_pair({(2, 1): 7, (1, 9): 7, (0, 0): 3})
    (1, 9)
    """
    return min(counts, key=lambda pair: (-counts[pair], pair))


# %% cell 28 (10-merge-pair)
def merge_pair(word, pair, new_id):
    """The ids of `word`, with each occurrence of `pair` replaced by `new_id`, leftmost first.

    >>> merge_pair([1, 2, 3, 1, 2], (1, 2), 9)
    [9, 3, 9]
    """
    merged, i = [], 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            merged.append(new_id)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


# %% cell 36
def character_class(characters):
    """The inside of a regular expression's [...] for these characters, as ranges; they come in order.

    >>> re.findall(f"[{character_class('abcx')}]", "a badge, x")
    ['a', 'b', 'a', 'x']
    """
    ranges = []
    for point in map(ord, characters):
        if ranges and ranges[-1][1] == point - 1:
            ranges[-1][1] = point
        else:
            ranges.append([point, point])
    return "".join(rf"\U{first:08x}-\U{last:08x}" for first, last in ranges)


def unicode_classes():
    """Letters, numbers and white space: the classes that Unicode calls L, N and White_Space."""
    everything = [chr(point) for point in range(sys.maxunicode + 1)]
    letters = filter(str.isalpha, everything)
    numbers = (c for c in filter(str.isnumeric, everything) if not c.isalpha())
    spaces = (c for c in filter(str.isspace, everything) if c not in "\x1c\x1d\x1e\x1f")
    return character_class(letters), character_class(numbers), character_class(spaces)


# %% cell 38 (10-chunk-regex)
def chunk_regex(letter, number, space):
    """The regular expression of the six alternatives, as a string without capturing groups.

    >>> re.findall(chunk_regex("a-z", "0-9", " "), "it's 20  dogs!")
    ['it', "'s", ' 20', ' ', ' dogs', '!']
    """
    endings = "'(?:s|t|re|ve|m|ll|d)"
    word = f" ?[{letter}]+"
    figures = f" ?[{number}]+"
    signs = f" ?[^{space}{letter}{number}]+"
    trailing = f"[{space}]+(?![^{space}])"
    return "|".join([endings, word, figures, signs, trailing, f"[{space}]+"])


# %% cell 39
@cache
def chunk_pattern():
    """GPT-2's pattern, compiled once. It differs from GPT-2's own only for characters that this Python's Unicode
    tables do not know yet (see unicodedata.unidata_version): those count as signs, alternative 4."""
    return re.compile(chunk_regex(*unicode_classes()))


def split_text(text):
    """The chunks of a text; joined again they are the text.

    >>> split_text("You're 20 years old!  Yes.")
    ['You', "'re", ' 20', ' years', ' old', '!', ' ', ' Yes', '.']
    """
    return chunk_pattern().findall(text)


# %% cell 43 (10-replace-word)
def replace_word(old, new, weight, counts):
    """Keep `counts` right when `old` becomes `new` in a word of this weight; the set of pairs that changed.

    >>> counts = Counter({(1, 2): 5})
    >>> replace_word([1, 2], [9], 5, counts), counts[(1, 2)]
    ({(1, 2)}, 0)
    """
    for pair in zip(old, old[1:]):
        counts[pair] -= weight
    for pair in zip(new, new[1:]):
        counts[pair] += weight
    return {*zip(old, old[1:]), *zip(new, new[1:])}


# %% cell 46 (10-pop-top-pair)
def pop_top_pair(heap, counts):
    """Take entries (-count, pair) off the heap until one is fresh: its pair, or None if none occurs at least twice.

    >>> pop_top_pair([(-9, (1, 2)), (-4, (3, 4))], {(1, 2): 1, (3, 4): 4})
    (3, 4)
    """
    while heap:
        negative, pair = heapq.heappop(heap)
        if -negative == counts[pair]:
            return pair if counts[pair] >= 2 else None
    return None


# %% cell 48
def learn_merges(words, weights, num_merges):
    """The merges that `learn_merges_slow` finds, recounting only the words that a merge changed.

    `where` tells which words hold a pair. It may name words that no longer do: merging nothing there does no harm.
    """
    words, merges = [list(word) for word in words], []
    counts, where = count_pairs(words, weights), defaultdict(set)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    while len(merges) < num_merges and (pair := pop_top_pair(heap, counts)) is not None:
        touched = set()
        for i in where.pop(pair):
            new = merge_pair(words[i], pair, 256 + len(merges))
            touched |= replace_word(words[i], new, weights[i], counts)
            for new_pair in zip(new, new[1:]):
                where[new_pair].add(i)
            words[i] = new
        for changed in touched:
            heapq.heappush(heap, (-counts[changed], changed))
        merges.append(pair)
    return merges


# %% cell 56 (10-merge-by-rank)
NEVER = (float("inf"), None)  # the rank of a pair that was never merged: after all others


def merge_by_rank(ids, merges):
    """The ids of one chunk after all merges that apply; `merges` maps a pair to (rank, new id).

    >>> merge_by_rank(list(b"banana"), {(97, 110): (0, 256), (98, 256): (1, 257), (256, 97): (2, 258)})
    [257, 258]
    """
    while len(ids) > 1:
        pair = min(zip(ids, ids[1:]), key=lambda pair: merges.get(pair, NEVER))
        if pair not in merges:
            break
        ids = merge_pair(ids, pair, merges[pair][1])
    return ids


# %% cell 59
def merge_by_rank_long(ids, merges):
    """What `merge_by_rank` returns, in n log n steps: for chunks of thousands of bytes."""
    ids, end = list(ids), len(ids)
    before, after = list(range(-1, end - 1)), list(range(1, end + 1))
    heap = [(merges[pair][0], i) for i, pair in enumerate(zip(ids, ids[1:])) if pair in merges]
    heapq.heapify(heap)
    while heap:
        rank, i = heapq.heappop(heap)
        j = after[i]
        if j == end or merges.get((ids[i], ids[j]), NEVER)[0] != rank:
            continue  # stale: one of the two was merged with another neighbour
        ids[i], ids[j] = merges[ids[i], ids[j]][1], None
        after[i] = after[j]
        if after[i] < end:
            before[after[i]] = i
        for left, right in ((before[i], i), (i, after[i])):
            if left >= 0 and right < end and (ids[left], ids[right]) in merges:
                heapq.heappush(heap, (merges[ids[left], ids[right]][0], left))
    return [i for i in ids if i is not None]


# %% cell 61 (10-decode-tokens)
def decode_tokens(ids, tokens):
    """The text of a list of ids; `tokens` maps an id to its bytes.

    An unknown id is a ValueError that names the id and the size of the vocabulary.

    >>> decode_tokens([1, 0], {0: b"na", 1: b"ba"})
    'bana'
    """
    parts = []
    for i in ids:
        if i not in tokens:
            raise ValueError(f"id {i} is not in the vocabulary of {len(tokens)} ids")
        parts.append(tokens[i])
    return b"".join(parts).decode("utf-8", errors="replace")


# %% cell 64
def utf8(text):
    """The bytes of a text. Half of a surrogate pair is a ValueError that names its position."""
    check_text(text)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {text[error.start]!r} at position {error.start} is half of a surrogate pair: no character, and "
            "UTF-8 has no bytes for it. Clean the text first: text.encode('utf-8', 'replace').decode('utf-8')"
        ) from None


def split_special(text, special_tokens):
    """The text cut at special tokens, which are kept: plain pieces at even places, special ones at odd places.

    >>> split_special("one<|end|>two", {"<|end|>": 300})
    ['one', '<|end|>', 'two']
    """
    if not special_tokens:
        return [text]
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)


# %% cell 65
class BPEState(Tokenizer):
    """What a BPE tokenizer knows, and the ways in and out of it.

    `byte_ids`: the id of each byte; `merges`: {pair: (rank, id)}; `special_tokens`: {text: id}; and
    `tokens`: {id: bytes}, which follows from the other three.
    """

    def set_state(self, byte_ids, merges, special_tokens):
        """Take over ids of bytes, merges as triples (left, right, new id) in order of rank, and special tokens."""
        self.byte_ids, self.special_tokens, self._cache = list(byte_ids), dict(special_tokens), {}
        self.tokens, self.merges = {}, {}
        for byte, i in zip(range(256), self.byte_ids, strict=True):
            self._add(i, bytes([byte]))
        for rank, (left, right, new_id) in enumerate(merges):
            self._add(new_id, self.tokens[left] + self.tokens[right])
            self.merges[left, right] = rank, new_id
        for name, i in self.special_tokens.items():
            self._add(i, name.encode("utf-8"))
        return self

    def _add(self, i, token):
        if self.tokens.setdefault(i, token) != token:
            raise ValueError(f"id {i} would stand for {self.tokens[i]!r} and for {token!r}")

    @property
    def vocab_size(self):
        return max(self.tokens) + 1

    def to_dict(self):
        merges = [[left, right, new_id] for (left, right), (_, new_id) in self.merges.items()]
        return {"kind": "bpe", "byte_ids": self.byte_ids, "merges": merges, "special_tokens": self.special_tokens}

    @classmethod
    def from_dict(cls, state):
        check_kind(state, "bpe")
        return cls().set_state(state["byte_ids"], state["merges"], state["special_tokens"])

    @classmethod
    def from_gpt2_files(cls, vocab, merges):
        """The tokenizer of the two files that GPT-2 and its relatives come with: vocab.json and merges.txt."""
        return cls().set_state(*read_gpt2_files(vocab, merges))


# %% cell 66
LONG_CHUNK = 64  # bytes; longer ones go through the heap and are not remembered
CACHE_SIZE = 1 << 16  # chunks


class BPETokenizer(BPEState):
    """Byte-level BPE: 256 bytes, then one id per merge, then the special tokens.

    >>> tokenizer = BPETokenizer().train("banana bandana banana", 259)
    >>> tokenizer.decode(tokenizer.encode("banana"))
    'banana'
    """

    def __init__(self, special_tokens=()):
        if isinstance(special_tokens, str) or "" in special_tokens:
            raise ValueError(f"special_tokens is a list of texts, none of them empty; got {special_tokens!r}")
        self.set_state(range(256), [], {name: 256 + i for i, name in enumerate(dict.fromkeys(special_tokens))})

    def train(self, text, vocab_size):
        """Learn merges until there are `vocab_size` ids (fewer when no pair occurs twice); returns the tokenizer.

        Ties: the largest count, then the smallest pair of ids. Same text, same vocabulary.
        """
        utf8(text)  # says where a character is that has no bytes
        room = vocab_size - 256 - len(self.special_tokens)
        if room < 0:
            raise ValueError(f"vocab_size {vocab_size} is too small: 256 bytes and {len(self.special_tokens)} special "
                             f"tokens need {vocab_size - room}")
        counted = Counter()
        for piece in split_special(text, self.special_tokens)[::2]:
            counted.update(split_text(piece))
        pairs = learn_merges([list(utf8(chunk)) for chunk in counted], list(counted.values()), room)
        merges = [(*pair, 256 + rank) for rank, pair in enumerate(pairs)]
        first = 256 + len(merges)
        return self.set_state(range(256), merges, {name: first + i for i, name in enumerate(self.special_tokens)})

    def encode(self, text, allow_special=False):
        """The ids of a text. With `allow_special`, the names of special tokens in it become their ids."""
        utf8(text)  # says where a character is that has no bytes
        ids = []
        for i, piece in enumerate(split_special(text, self.special_tokens if allow_special else ())):
            if i % 2:
                ids.append(self.special_tokens[piece])
                continue
            for chunk in split_text(piece):
                ids.extend(self._cache.get(chunk) or self._encode_chunk(chunk))
        return ids

    def _encode_chunk(self, chunk):
        ids = [self.byte_ids[byte] for byte in chunk.encode("utf-8")]
        if len(ids) > LONG_CHUNK:
            return merge_by_rank_long(ids, self.merges)
        if len(self._cache) >= CACHE_SIZE:
            self._cache.clear()
        self._cache[chunk] = ids = merge_by_rank(ids, self.merges)
        return ids

    def decode(self, ids):
        """The text of a list of ids; bytes that are not UTF-8 become U+FFFD."""
        return decode_tokens(plain_ids(ids), self.tokens)


# %% cell 73 (10-byte-letters)
def byte_letters():
    """The 256 letters of GPT-2's files: at place b, the printable character that stands for byte b.

    >>> byte_letters()[ord("A")], ord(byte_letters()[0]), ord(byte_letters()[32])
    ('A', 256, 288)
    """
    letters, hidden = [], 0
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte:
            letters.append(chr(byte))
        else:
            letters.append(chr(256 + hidden))
            hidden += 1
    return letters


# %% cell 76
def read_merges(path, ids):
    """The lines of merges.txt as triples (left, right, new id)."""
    triples = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            pair = line.rstrip("\r\n")
            if not pair or (number == 1 and pair.startswith("#version")):
                continue
            left, _, right = pair.partition(" ")
            missing = [token for token in (left, right, left + right) if token not in ids]
            if missing or not right:
                raise ValueError(f"{path}, line {number}: {pair!r} needs two tokens, and both and their sum in the "
                                 f"vocabulary; missing: {missing}")
            triples.append((ids[left], ids[right], ids[left + right]))
    return triples


def read_gpt2_files(vocab, merges):
    """The ids of the bytes, the merges as triples in order of rank, and the special tokens of GPT-2's two files."""
    with open(vocab, encoding="utf-8") as file:
        ids = json.load(file)
    letters = byte_letters()
    missing = [byte for byte, letter in enumerate(letters) if letter not in ids]
    if missing:
        raise ValueError(f"{vocab} is no byte-level vocabulary: it has no token for the bytes {missing[:8]}")
    triples = read_merges(merges, ids)
    ordinary = {ids[letter] for letter in letters} | {new_id for _, _, new_id in triples}
    return [ids[letter] for letter in letters], triples, {name: i for name, i in ids.items() if i not in ordinary}
