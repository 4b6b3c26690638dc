"""The tokenizer of a downloaded model, from its files: GPT-2's, Llama's and Qwen2's, with lesson 10's BPE.

Written by hand, not built from a lesson. The BPE is lesson 10's: `merge_by_rank`, `decode_tokens`, the letters of bytes.
Added here is what the files say around it: tokenizer_steps.py has what cuts and normalizes text, patterns.py the
regular expressions for that, and this file the tokens that are added to a vocabulary.

The ids are those of the `tokenizers` library, except for characters that are newer than one of the Unicode tables at
hand: this Python's (unicodedata.unidata_version), and the library's, which are of several versions.
"""

import re
import unicodedata
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from tinytorch.core.training import CheckpointError
from tinytorch.models.patterns import named_class
from tinytorch.models.safetensors import read_json
from tinytorch.models.tokenizer_steps import (
    Part,
    read_decoder,
    read_normalizer,
    read_post_processor,
    read_pre_tokenizer,
)
from tinytorch.text.tokenization import (
    CACHE_SIZE,
    LONG_CHUNK,
    byte_letters,
    character_class,
    decode_tokens,
    merge_by_rank,
    merge_by_rank_long,
    plain_ids,
    read_merges,
    utf8,
)

__all__ = ["FileTokenizer", "load_tokenizer"]

WHOLE, VOCAB, MERGES, CONFIG = "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MORE_NAMES = ("additional_special_tokens", "extra_special_tokens")


# BPE: a chunk of text to ids


class BPE:
    """A vocabulary {token: id} and its merges, on the bytes of a chunk or, with bytes for the rest, its characters."""

    def __init__(self, vocab, merges, of_bytes, whole_first):
        """merges: triples (left, right, new id) in order; whole_first: a chunk that is a token needs no merges."""
        self.of_bytes, self.vocab, self.cache = of_bytes, vocab, {}
        self.merges = {(left, right): (rank, new_id) for rank, (left, right, new_id) in enumerate(merges)}
        names = byte_letters() if of_bytes else [f"<0x{byte:02X}>" for byte in range(256)]
        self.byte_ids = [vocab.get(name) for name in names]
        self.whole = {} if not whole_first else {token_bytes(t): i for t, i in vocab.items()} if of_bytes else vocab
        self.merge = merge_by_rank if self.in_order() else merge_by_rank_long

    def in_order(self):
        """Whether each token is made before it is a part: only then may all places of a pair be merged at once."""
        made = {}
        for rank, new_id in self.merges.values():
            made[new_id] = max(rank, made.get(new_id, rank))
        return all(made.get(part, -1) < rank for pair, (rank, _) in self.merges.items() for part in pair)

    def first_ids(self, chunk):
        """The ids before any merge."""
        if self.of_bytes:
            return [self.byte_ids[byte] for byte in chunk.encode()]
        return [i for c in chunk for i in ([self.vocab[c]] if c in self.vocab else map(self.byte_ids.__getitem__, c.encode()))]

    def encode(self, chunk):
        ids = self.cache.get(chunk)
        if ids is None:
            ids = self.encode_anew(chunk)
            if len(chunk) <= LONG_CHUNK:
                if len(self.cache) >= CACHE_SIZE:
                    self.cache.clear()
                self.cache[chunk] = ids
        return ids

    def encode_anew(self, chunk):
        whole = self.whole.get(chunk.encode() if self.of_bytes else chunk)
        if whole is not None:
            return [whole]
        ids = self.first_ids(chunk)
        return (self.merge if len(ids) <= LONG_CHUNK else merge_by_rank_long)(ids, self.merges)


LETTERS = {letter: byte for byte, letter in enumerate(byte_letters())}


def token_bytes(token):
    """The bytes that the letters of a token stand for; a token with another character in it stands for itself."""
    try:
        return bytes([LETTERS[letter] for letter in token])
    except KeyError:
        return token.encode()


# Added tokens: found in the text before anything else


@dataclass(frozen=True)
class Added:
    """A token that is not BPE's: how it is looked for in a text."""

    content: str
    id: int | None
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = True


class Finder:
    """Finds added tokens in a text: the leftmost, and there the longest."""

    END = None  # the key, in a node of the tree of characters, of the token that ends there

    def __init__(self, tokens):
        """tokens: pairs (as it stands in the text, Added)."""
        self.tree = {}
        for text, token in tokens:
            node = self.tree
            for character in text:
                node = node.setdefault(character, {})
            node[self.END] = token
        self.start = re.compile(f"[{character_class(sorted(self.tree))}]" if self.tree else "(?!)")

    def longest(self, text, at):
        """(end, token) of the longest token that starts here, or None."""
        node, found = self.tree, None
        while at < len(text) and text[at] in node:
            node = node[text[at]]
            at += 1
            if self.END in node:
                found = at, node[self.END]
        return found

    def cut(self, text, allow_special):
        """The pieces of a text: strings, and the ids of the tokens between them."""
        done = at = run = 0  # run: the end of the white space that the last token took with it
        while start := self.start.search(text, at):
            start = start.start()
            at, token = self.longest(text, start) or (start + 1, None)
            if token is None or (token.special and not allow_special) or not stands_free(token, text, start, at):
                continue
            end = at
            if token.rstrip:
                end = run = run if at < run else spaces().match(text, at).end()
            while token.lstrip and start > done and spaces().fullmatch(text, start - 1, start):
                start -= 1
            if done < start:
                yield text[done:start]
            yield token.id
            done = end
        if done < len(text):
            yield text[done:]


@cache
def spaces():
    return re.compile(f"[{named_class('space')}]*")


def stands_free(token, text, start, end):
    """Whether a token that must be a whole word touches no other word."""
    return not token.single_word or not (text[:start] and is_word(text[start - 1]) or text[end:] and is_word(text[end]))


def is_word(character):
    """Unicode's \\w: letters, marks, digits, connectors, the two joiners, and letters in circles and squares."""
    category, point = unicodedata.category(character), ord(character)
    return category[0] in "LM" or category in ("Nd", "Nl", "Pc") or character in "\u200c\u200d" or any(
        first <= point <= last for first, last in
        ((0x24B6, 0x24E9), (0x1F130, 0x1F149), (0x1F150, 0x1F169), (0x1F170, 0x1F189)))  # fmt: skip


# The tokenizer


@dataclass
class FileTokenizer:
    """What `load_tokenizer` returns.

    `special_tokens`: {text: id}; `bos_id`: the id before a text, or None; `eos_ids`: the ids that end one.
    """

    bpe: BPE
    added: list
    normalize: object
    chunks: object
    decoder: object  # None: the tokens are bytes
    around: tuple  # ids before, ids after
    bos_id: int | None = None
    eos_ids: tuple = ()
    tokens: dict = field(init=False, repr=False)  # id -> bytes or text

    def __post_init__(self):
        normal = {token: self.normalize(token.content) if token.normalized else token.content for token in self.added}
        names = {i: name for name, i in self.bpe.vocab.items()} | {token.id: name for token, name in normal.items()}
        self.tokens = names if self.decoder else {i: token_bytes(name) for i, name in names.items()}
        self.special_tokens = {token.content: token.id for token in self.added if token.special}
        self.hidden = {i for i, name in names.items() if name in self.special_tokens}
        self.exact = Finder((name, token) for token, name in normal.items() if not token.normalized)
        self.normal = Finder((name, token) for token, name in normal.items() if token.normalized)

    @property
    def vocab_size(self):
        """The highest id and one: as many rows as a model needs, or fewer, since models round up."""
        return max(self.tokens) + 1

    def encode(self, text, add_special_tokens=True, allow_special=True):
        """The ids of a text, as transformers' AutoTokenizer gives them.

        Without add_special_tokens, nothing is put around the text, such as the token that begins one. Without
        allow_special, the name of a special token in the text is text: right for what strangers write.
        """
        utf8(text)  # says where a character is that has no bytes
        ids = []
        for i, piece in enumerate(self.exact.cut(text, allow_special)):
            if isinstance(piece, str):
                self.encode_piece(self.normalize(piece), i == 0, allow_special, ids)
            else:
                ids.append(piece)
        return [*self.around[0], *ids, *self.around[1]] if add_special_tokens else ids

    def encode_piece(self, piece, first, allow_special, ids):
        for i, part in enumerate(self.normal.cut(piece, allow_special)):
            if isinstance(part, str):
                for chunk in self.chunks(part, first and i == 0):
                    ids.extend(self.bpe.encode(chunk))
            else:
                ids.append(part)

    def decode(self, ids, skip_special_tokens=False):
        """The text of a list of ids; bytes that are not UTF-8 become U+FFFD.

        An id that no token has is no text, as in transformers: models have more rows than their vocabulary has tokens.
        """
        ids = plain_ids(ids)
        if min(ids, default=0) < 0:
            raise ValueError(f"ids are 0 or more, got {min(ids)}")
        hidden = self.hidden if skip_special_tokens else ()
        ids = [i for i in ids if i in self.tokens and i not in hidden]
        if self.decoder is None:
            return decode_tokens(ids, self.tokens)
        return "".join(self.decoder([self.tokens[i] for i in ids]))


# Files


def load_tokenizer(path):
    """The tokenizer in a model's directory, or in a tokenizer.json.

    It comes from tokenizer.json, or where there is none from vocab.json and merges.txt; what tokenizer_config.json
    and its older relatives add is added as transformers does. `bos_id` and `eos_ids` are those that
    generation_config.json or config.json name, or else the tokenizer's own. What is damaged, or of a kind that we do
    not have, is a CheckpointError that names the file and the place in it: no text is cut otherwise in silence.
    """
    path = Path(path)
    folder, file = (path, path / WHOLE) if path.is_dir() else (path.parent, path)
    if path.is_dir() and not file.is_file() and not all((path / name).is_file() for name in (VOCAB, MERGES)):
        raise CheckpointError(f"{path} holds no {WHOLE}, and not both of {VOCAB} and {MERGES}")
    config = read_config(folder)
    state = Part(file, "", read_json(file)) if file.is_file() or not path.is_dir() else gpt2_state(folder, config)
    state.get("version", "1.0").one_of("1.0")
    chunks, of_bytes = read_pre_tokenizer(state.get("pre_tokenizer"))
    bpe = read_bpe(state.get("model"), of_bytes)
    added = give_ids(collect_added(state, config), bpe.vocab, state)
    ids = bpe.vocab | {token.content: token.id for token in added}
    around = read_around(state, config, ids)
    bos, eos = (named_ids(folder, name) or [ids[n] for n in [name_of(config, name)] if n] for name in NAMES[:2])
    return FileTokenizer(bpe, added, read_normalizer(state.get("normalizer")), chunks,
                         read_decoder(state.get("decoder"), of_bytes), around, bos[0] if bos else None, tuple(eos))  # fmt: skip


GPT2 = {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}, "decoder": {"type": "ByteLevel"}}
QWEN2_CHUNKS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+")  # fmt: skip
QWEN2 = {"normalizer": {"type": "NFC"}, "decoder": {"type": "ByteLevel"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"Regex": QWEN2_CHUNKS}, "behavior": "Isolated"},
    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}}  # fmt: skip
CLASSES = {"GPT2Tokenizer": GPT2, "Qwen2Tokenizer": QWEN2}
END = "<|endoftext|>"  # begins and ends texts for both, where nothing else is named


def gpt2_state(folder, config):
    """What tokenizer.json would hold, from vocab.json, merges.txt and the name of the tokenizer's class."""
    kind = config.get("tokenizer_class")
    if kind is None:
        models = {None: "GPT2Tokenizer", "gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer"}
        path = folder / "config.json"
        model = Part(path, "", read_json(path)).get("model_type") if path.is_file() else Part(path, "", None)
        kind = Part(path, "model_type", models[model.one_of(*models)])
    name = kind.of(str).removesuffix("Fast")
    if name not in CLASSES:
        raise kind.error(f"is {name!r}; without a {WHOLE} we know only {', '.join(CLASSES)}")
    vocab = read_json(folder / VOCAB)
    for role in ("bos_token", "eos_token") if name == "GPT2Tokenizer" else ("eos_token",):
        if END in vocab:
            config.setdefault(role, Part(folder / VOCAB, role, END))
    return Part(folder / VOCAB, "", CLASSES[name] | {"model": {"vocab": vocab, "merges": folder / MERGES}})


def read_bpe(part, of_bytes):
    """The BPE of the model part. One that knows no bytes could lose characters, so it is refused."""
    if part.get("type", "BPE").of(str) != "BPE":  # GPT-2's own file does not name it
        raise part.error(f"is of the type {part.value['type']!r}; we know only BPE")
    part.get("dropout", 0).one_of(0, 0.0)
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        part.get(name, "").one_of("")
    if not of_bytes:
        part.get("byte_fallback", False).one_of(True)
    vocab = read_vocab(part.get("vocab"))
    bpe = BPE(vocab, read_triples(part.get("merges"), vocab), of_bytes, part.get("ignore_merges", False).of(bool))
    missing = [byte for byte, i in enumerate(bpe.byte_ids) if i is None]
    if missing:
        raise part.get("vocab").error(f"has no token for the bytes {str(missing[:8])[1:-1]}")
    return bpe


def read_vocab(part):
    """{token: id}, each id there once."""
    tokens = {}
    for token, i in part.of(dict).items():
        Part(part.file, f"the token {token!r:.60}", token).of(str)
        if Part(part.file, f"the id of {token!r:.60}", i).id() in tokens:
            raise part.error(f"gives the id {i} to {tokens[i]!r:.60} and to {token!r:.60}")
        tokens[i] = token
    return part.value


def read_triples(part, ids):
    """The merges as triples (left, right, new id) in order of rank, from "a b", ["a", "b"] or merges.txt."""
    if isinstance(part.value, Path):
        try:
            return read_merges(part.value, ids)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
    triples = []
    for i, pair in enumerate(part.of(list)):
        words = pair.split(" ") if isinstance(pair, str) else pair
        try:
            left, right = words
            triples.append((ids[left], ids[right], ids[left + right]))
        except (KeyError, TypeError, ValueError):
            raise part.error(f"[{i}] is {pair!r:.60}, and should be two tokens that with their sum are in the "
                             "vocabulary") from None  # fmt: skip
    return triples


def read_config(folder):
    """The parts of tokenizer_config.json by name; of its older relatives, too, if it lists no added tokens."""
    config = {}
    for name in (CONFIG, "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file() and "added_tokens_decoder" not in config:
            whole = Part(folder / name, "", read_json(folder / name))
            found = {"added_tokens": whole} if name == "added_tokens.json" else {key: whole.get(key) for key in whole.value}
            config |= {key: part for key, part in found.items() if part.value is not None}
    return config


def read_added(part, token_id, special=False):
    """An added token with its flags."""
    content = part.get("content")
    if not 0 < len(content.of(str)) <= 1000:
        raise content.error(f"has {len(content.value)} characters; a token has 1 to 1000")
    special = part.get("special", special).of(bool)
    flags = {flag: part.get(flag, False).of(bool) for flag in ("single_word", "lstrip", "rstrip")}
    return Added(content.value, token_id, normalized=part.get("normalized", not special).of(bool), special=special, **flags)


def collect_added(state, config):
    """All added tokens in order: tokenizer.json's, tokenizer_config.json's, and the special ones that have a name."""
    added = {}
    for part in state.get("added_tokens", []).parts():
        token = read_added(part, part.get("id").id())
        if token.content in added:
            raise part.error(f"adds {token.content!r:.60} again")
        added[token.content] = token
    named = [read_named(part) for name in NAMES + MORE_NAMES if name in config for part in members(config[name])]
    if "added_tokens_decoder" in config:
        decoder = config["added_tokens_decoder"]
        tokens = [read_added(decoder.get(key), key_id(decoder, key)) for key in decoder.of(dict)]
        added |= {token.content: token for token in sorted(tokens, key=lambda token: token.id)}
    elif "added_tokens" in config:
        special = {token.content for token in named}
        for content in config["added_tokens"].value:
            token_id, is_special = config["added_tokens"].get(content).id(), content in special
            added.setdefault(content, Added(content, token_id, normalized=not is_special, special=is_special))
    for token in named:
        added[token.content] = replace(added.get(token.content, token), special=True)
    return list(added.values())


def members(part):
    """A text, an object, or the members of a list."""
    return part.parts() if isinstance(part.value, list) else [part]


def read_named(part):
    """A special token, as its text or as an object with its flags."""
    if isinstance(part.value, dict):
        return read_added(part, None, special=True)
    return read_added(Part(part.file, part.place, {"content": part.value}), None, special=True)


def key_id(part, key):
    if not re.fullmatch("[0-9]{1,9}", key):
        raise part.error(f"has {key!r:.60} where an id should stand")
    return int(key)


def give_ids(added, vocab, state):
    """The added tokens with their ids: those of the vocabulary, or the next that are free."""
    used, next_id, tokens = set(vocab.values()), len(vocab), []
    for token in added:
        token_id = vocab.get(token.content, next_id)
        if token.content not in vocab:
            next_id += 1
            if token_id in used:
                raise state.error(f"has holes in its ids: {token.content!r:.60} would get {token_id}, which is in use")
        if token.id not in (None, token_id):
            raise state.error(f"adds {token.content!r:.60} with the id {token.id}, and where it stands it is {token_id}")
        tokens.append(replace(token, id=token_id))
    return tokens


def name_of(config, role):
    """The text of bos_token or eos_token, or None."""
    return read_named(config[role]).content if role in config else None


def read_around(state, config, ids):
    """(ids before, ids after) a text: the post-processor's, unless tokenizer_config.json itself says what to add."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        around = read_post_processor(state.get("post_processor"))
        unknown = {i for part in around for i in part} - set(ids.values())
        if unknown:
            raise state.get("post_processor").error(f"adds the id {min(unknown)}, which no token has")
        return around
    wanted = [role for role in NAMES[:2] if f"add_{role}" in config and config[f"add_{role}"].of(bool)]
    return tuple([ids[name_of(config, role)]] if role in wanted and role in config else [] for role in NAMES[:2])


def named_ids(folder, name):
    """The ids that generation_config.json or config.json gives for bos_token or eos_token."""
    for file in ("generation_config.json", "config.json"):
        if (folder / file).is_file():
            part = Part(folder / file, "", read_json(folder / file)).get(f"{name}_id")
            if part.value is not None:
                return [member.id() for member in members(part)]
    return []
