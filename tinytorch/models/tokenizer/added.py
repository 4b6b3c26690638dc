"""Tokens that were added to a vocabulary, special ones among them: read from the files, and found in a text.

Written by hand, not built from a lesson.
"""

import re
import unicodedata
from dataclasses import dataclass, replace
from functools import cache

from tinytorch.models.tokenizer.parts import Part, short
from tinytorch.models.tokenizer.patterns import named_class
from tinytorch.text.tokenization import character_class

__all__ = ["NAMES", "Added", "Finder", "collect_added", "give_ids", "members", "read_named"]

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
OTHERS = ("additional_special_tokens", "extra_special_tokens")
LONGEST = 256  # characters of an added token


@dataclass(frozen=True)
class Added:
    """An added token, and how it is looked for."""

    content: str
    id: int | None
    single_word: bool = False  # only where it touches no other word
    lstrip: bool = False  # with the white space on its left
    rstrip: bool = False
    normalized: bool = False  # in the normalized text, as it is itself when normalized
    special: bool = True


class Finder:
    """Finds tokens in a text: the leftmost, and there the longest.

    Which of them counts, and how much white space it takes along, is as in the `tokenizers` library (Apache-2.0).
    """

    END = ""  # the key of the token that ends at a node of the tree of characters

    def __init__(self, tokens):
        """tokens: pairs (how it stands in the text, Added)."""
        self.tree = {}
        for name, token in tokens:
            node = self.tree
            for character in name:
                node = node.setdefault(character, {})
            node[self.END] = token
        self.start = re.compile(f"[{character_class(sorted(self.tree))}]" if self.tree else "(?!)")

    def cut(self, text, allow_special):
        """Yield the pieces of a text: strings, and between them the ids of tokens."""
        done = at = spaces_end = 0
        while match := self.start.search(text, at):
            start = match.start()
            at, token = self.longest(text, start)
            if token is None or (token.special and not allow_special) or not stands_free(token, text, start, at):
                continue
            end = at
            if token.rstrip:  # the white space that the last token took may reach behind this one
                end = spaces_end = spaces_end if at < spaces_end else spaces().match(text, at).end()
            while token.lstrip and start > done and spaces().fullmatch(text[start - 1]):
                start -= 1
            if done < start:
                yield text[done:start]
            yield token.id
            done = end
        if done < len(text):
            yield text[done:]

    def longest(self, text, start):
        """(end, token) of the longest token that starts here, or (the next place, None)."""
        node, at, found = self.tree, start, (start + 1, None)
        while at < len(text) and text[at] in node:
            node, at = node[text[at]], at + 1
            if self.END in node:
                found = at, node[self.END]
        return found


@cache
def spaces():
    return re.compile(f"[{named_class('space')}]*")


def stands_free(token, text, start, end):
    """Whether a token that must be a word of its own touches no other."""
    return not token.single_word or not any(map(is_word, text[max(start - 1, 0) : start] + text[end : end + 1]))


def is_word(character):
    """Unicode's \\w: letters, marks, digits, connectors, the two joiners, and letters in circles and squares."""
    enclosed = "\u24b6-\u24e9\U0001f130-\U0001f149\U0001f150-\U0001f169\U0001f170-\U0001f189"
    category = unicodedata.category(character)
    return category[0] in "LM" or category in ("Nd", "Nl", "Pc") or bool(re.match(f"[\u200c\u200d{enclosed}]", character))


# Read from the files


def collect_added(state, config):
    """All added tokens in order: tokenizer.json's, tokenizer_config.json's, and the special ones that have a role."""
    added = {}
    for part in state.get("added_tokens", []).parts():
        token = read_added(part, part.get("id").id())
        if token.content in added:
            raise part.error(f"adds {short(token.content)} again")
        added[token.content] = token
    roles = [read_named(config[name]) for name in NAMES if name in config]
    others = [read_named(part) for name in OTHERS if name in config for part in members(config[name])]
    listed = added
    if "added_tokens_decoder" in config:
        decoder = config["added_tokens_decoder"]
        tokens = [read_added(decoder.get(key), key_id(decoder, key)) for key in decoder.of(dict)]
        listed = {token.content: token for token in sorted(tokens, key=lambda token: token.id)}
        added |= listed
    elif "added_tokens" in config:
        special, older = {token.content for token in roles + others}, config["added_tokens"]
        for content in older.value:
            flags = {"content": content, "special": content in special}
            token = read_added(Part(older.file, content, flags), older.get(content).id())
            added.setdefault(content, token)
    for token in roles + others:
        added.setdefault(token.content, token)
    made_special = {token.content for token in roles if token.content in listed}
    return [replace(token, special=token.special or token.content in made_special) for token in added.values()]


def members(part):
    """The members of a list or an object, or the value itself."""
    if isinstance(part.value, dict):
        return [part.get(name) for name in part.value]
    return part.parts() if isinstance(part.value, list) else [part]


def read_added(part, token_id, special=False):
    """An added token with its flags."""
    content = part.get("content").of(str)
    if not 0 < len(content) <= LONGEST:
        raise part.get("content").error(f"has {len(content)} characters; an added token has 1 to {LONGEST}")
    special = part.get("special", special).of(bool)
    flags = {flag: part.get(flag, False).of(bool) for flag in ("single_word", "lstrip", "rstrip")}
    return Added(content, token_id, normalized=part.get("normalized", not special).of(bool), special=special, **flags)


def read_named(part):
    """A special token, given as its text or as an object with its flags."""
    flags = part if isinstance(part.value, dict) else Part(part.file, part.place, {"content": part.value})
    return read_added(flags, None, special=True)


def key_id(part, key):
    if not re.fullmatch("[0-9]{1,9}", key):
        raise part.error(f"has {short(key)} where an id should stand")
    return int(key)


def give_ids(added, vocab, state):
    """The added tokens with their ids: the vocabulary's own, or those that follow it."""
    used, next_id, tokens = set(vocab.values()), len(vocab), []
    for token in added:
        token_id = vocab.get(token.content, next_id)
        if token.content not in vocab:
            next_id += 1
            if token_id in used:
                raise state.error(f"leaves {short(token.content)} the id {token_id}, which is in use: ids have holes")
        if token.id not in (None, token_id):
            raise state.error(f"adds {short(token.content)} as {token.id}, and by its place it is {token_id}")
        tokens.append(replace(token, id=token_id))
    return tokens
