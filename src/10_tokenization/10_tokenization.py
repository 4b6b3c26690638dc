# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   tinytorch:
#     lesson: "10"
# ---

# %% [markdown]
"""
# Lesson 10: Tokenization

A model computes with numbers; people write text. In this lesson you build the two-way door between them:
first a tokenizer that gives each character a number, then the byte-level BPE tokenizer that GPT-2 made
popular, which learns its own vocabulary from text and can write down *anything*.

| | |
|---|---|
| You build | `CharTokenizer`, `BPETokenizer` |
| You need | no earlier lesson; only Python's standard library |
| Exported to | `tinytorch/text/tokenization.py` |
| Time | about 90 minutes |
"""

# %%
#| default_exp text.tokenization
#| export
import contextlib
import heapq
import json
import os
import re
import sys
from collections import Counter, defaultdict
from functools import cache

# %%
import tempfile
import time

UNUSUAL = "naïve 中文, 3½²\t\r\n  — ‘x’ \U0001d11e\x00 e\u0301 '\u00a0 can't <|end|>"


def error_of(function, *args):
    """The words of the ValueError that a call raises; '' if it raises none. The checks use it."""
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return ""


def spell(merges):
    """The bytes that each merge stands for, for people to read."""
    tokens = [bytes([b]) for b in range(256)]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return tokens[256:]

# %% [markdown]
"""
## 1. One number per character

The simplest tokenizer lists every character of a training text, in sorted order, and uses the place in that
list as the id.

    text        "decade"
    vocabulary  a  c  d  e          the distinct characters, sorted
    ids         0  1  2  3

    "decade" -> 2 3 1 0 2 3

**Predict.** With the vocabulary of `"decade"`, which ids does `"deed"` become? Fill in the list before you
run anything.
"""

# %% nbgrader={"grade": false, "grade_id": "10-predict-chars", "locked": false, "schema_version": 3, "solution": true, "task": false}
predicted_ids = None  # replace: a list of four ids
### BEGIN SOLUTION
predicted_ids = [2, 3, 3, 2]
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "10-predict-chars-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_chars():
    """The oracle is list.index on the sorted characters."""
    letters = sorted(set("decade"))
    expected = [letters.index(c) for c in "deed"]
    assert isinstance(predicted_ids, list) and len(predicted_ids) == 4, (
        f"predicted_ids should be a list of four ids, got {predicted_ids!r}")
    assert predicted_ids == expected, (
        f"'deed' becomes {expected}, you predicted {predicted_ids}. Counting starts at 0, and the vocabulary "
        f"{letters} is sorted, not in order of appearance")


if __name__ == "__main__":
    test_unit_predict_chars()

# %% [markdown]
"""
### Build: encode

`ids` maps each character to its number. Going back is a worked sibling: one look-up per id.

What about a character that the training text did not have? There is no number for it. Dropping it would
change the text without a word, so we refuse, and say *which* character *where*: with a text of half a
megabyte, that is the only message that helps.
"""

# %%
#| export
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

# %% nbgrader={"grade": false, "grade_id": "10-encode-characters", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def encode_characters(text, ids):
    """The id of each character of `text`; `ids` maps characters to numbers.

    An unknown character is a ValueError: "character 'z' at position 3 is not in the vocabulary".

    >>> encode_characters("deed", {"a": 0, "c": 1, "d": 2, "e": 3})
    [2, 3, 3, 2]
    """
    ### BEGIN SOLUTION
    result = []
    for position, character in enumerate(text):
        if character not in ids:
            raise ValueError(f"character {character!r} at position {position} is not in the vocabulary")
        result.append(ids[character])
    return result
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "10-encode-characters-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_encode_characters():
    """The oracle is the picture above, worked by hand."""
    ids = {"a": 0, "c": 1, "d": 2, "e": 3}
    got = encode_characters("decade", ids)
    assert got == [2, 3, 1, 0, 2, 3], f"'decade' should become [2, 3, 1, 0, 2, 3], got {got}"
    said = error_of(encode_characters, "deczde", ids)
    assert said, "'z' is not in the vocabulary, but encode_characters('deczde') raised no ValueError"
    assert "'z'" in said and "3" in said, f"the error should name 'z' and its position 3, it says: {said}"
    ### BEGIN HIDDEN TESTS
    got = encode_characters("cab", {"b": 7, "a": 5, "c": 9})
    assert got == [9, 5, 7], f"the numbers come from `ids`: expected [9, 5, 7], got {got}"
    said = error_of(encode_characters, "\n", ids)
    assert "\\n" in said and "0" in said, f"a line break should be shown as '\\n' (use !r) at position 0: {said}"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_encode_characters()

# %% [markdown]
"""
### A file for the vocabulary

A trained model is worthless without the vocabulary it was trained with, so a tokenizer must survive in a
file. Both tokenizers of this lesson share the way there: `to_dict` gives plain lists and strings, JSON writes
them. The file is written beside its place and then moved there in one step, so a crash leaves the old file or
the new one, never half.

The class `CharTokenizer` only keeps state: `encode_characters` and `decode_characters` do the work.
"""

# %%
#| export
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

# %%
#| export
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

# %%
#| export
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

# %% [markdown]
"""
### Where it fails

Real text now: the topics of Python's own help, which ship with every Python. Run the cell and read the last
two lines.
"""

# %%
def help_text():
    """The text of Python's help topics: English prose with code in it."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


if __name__ == "__main__":
    text = help_text()
    chars = CharTokenizer(text)
    print(f"{len(text):,} characters, vocabulary of {chars.vocab_size}")
    print("one id per character:", chars.encode("def f(x):"))
    print(error_of(chars.encode, "a Greek letter: \u03be"))

# %% [markdown]
"""
Two things are wrong.

* The vocabulary is a closed club. All of Unicode would take more than a million ids, nearly all never seen.
* The sequence is as long as the text, and attention (lesson 12) compares each position with each other one:
  twice the length is four times the work. `return` deserves one id, not six.

## 2. Bytes: 256 ids that write everything

A byte is a number from 0 to 255. UTF-8 writes each character as one byte (up to U+007F: ASCII), two (up to
U+07FF), three (up to U+FFFF) or four. So 256 ids are enough for every text there is.

**Predict.** How many byte ids does the text `"10 €, naïve"` become? The letter ï is U+00EF, the euro sign
U+20AC.
"""

# %% nbgrader={"grade": false, "grade_id": "10-predict-bytes", "locked": false, "schema_version": 3, "solution": true, "task": false}
predicted_bytes = None  # replace: one number
### BEGIN SOLUTION
predicted_bytes = 14
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "10-predict-bytes-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_bytes():
    """The oracle is Python's own UTF-8 encoder."""
    text = "10 €, naïve"
    expected = len(text.encode("utf-8"))
    assert predicted_bytes != len(text), (
        f"{len(text)} is the number of characters; two of them take more than one byte")
    assert predicted_bytes == expected, (
        f"{expected} bytes: 9 characters of one byte, the euro sign three, the i with dots two; got {predicted_bytes}")


if __name__ == "__main__":
    test_unit_predict_bytes()

# %% [markdown]
"""
In bytes a text is even longer than in characters. So now we shorten it.

## 3. Merge the pair that occurs most

Byte-pair encoding (Gage 1994, for compression; Sennrich and others 2016, for words) is one idea, repeated:
find the two neighbours that stand together most often, and give that pair an id of its own.

    banana bandana     b a n a n a   b a n d a n a
    pairs              (b,a) 2   (a,n) 4   (n,a) 3   (n,d) 1   (d,a) 1
    merge (a,n) -> X   b X X a       b X d X a
    pairs              (b,X) 2   (X,a) 2   (X,X) 1   (X,d) 1   (d,X) 1

We treat `banana` and `bandana` as two *words*: no pair reaches across the gap.
"""

# %% [markdown]
"""
**Ties.** After the first merge, two pairs occur twice. Any rule will do as long as it is a rule, or the same
text gives different vocabularies on different days. Ours: **the largest count; among equals, the smallest
pair of ids**.

**Predict.** In ids, a is 97, b is 98, n is 110, and the first new id is 256. Which two pairs are merged
first?
"""

# %% nbgrader={"grade": false, "grade_id": "10-predict-merges", "locked": false, "schema_version": 3, "solution": true, "task": false}
predicted_merges = None  # replace: a list of two pairs of ids, [(.., ..), (.., ..)]
### BEGIN SOLUTION
predicted_merges = [(97, 110), (98, 256)]
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "10-predict-merges-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_merges():
    """The oracle is the picture, counted with str.count and the rule for ties."""
    assert isinstance(predicted_merges, list) and len(predicted_merges) == 2, (
        f"predicted_merges should be a list of two pairs, got {predicted_merges!r}")
    first, second = (tuple(pair) for pair in predicted_merges)
    most = max(("ba", "an", "na", "nd", "da"), key=lambda s: "banana".count(s) + "bandana".count(s))
    assert bytes(first) == most.encode(), f"the first merge is {most!r}, {tuple(most.encode())}; you predicted {first}"
    assert second == min((98, 256), (256, 97)), (
        f"(98, 256) and (256, 97) both occur twice; a tie goes to the smallest pair, (98, 256). You predicted {second}")


if __name__ == "__main__":
    test_unit_predict_merges()

# %% [markdown]
"""
### Build: count the pairs

A word that occurs seven times is stored once, with the *weight* 7, and each of its pairs counts seven times.
`zip(word, word[1:])` walks through all neighbours: `zip("cab", "ab")` gives (c, a) and (a, b). In `aaa`, the
pair (a, a) counts twice, although only one of the two can be merged: simple, and the same for everyone who
recounts.
"""

# %% nbgrader={"grade": false, "grade_id": "10-count-pairs", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def count_pairs(words, weights):
    """How often each pair of neighbours occurs: a Counter {(left, right): count}.

    >>> count_pairs([[1, 2, 1, 2]], [10])
    Counter({(1, 2): 20, (2, 1): 10})
    """
    ### BEGIN SOLUTION
    counts = Counter()
    for word, weight in zip(words, weights):
        for pair in zip(word, word[1:]):
            counts[pair] += weight
    return counts
    ### END SOLUTION


def top_pair(counts):
    """The pair with the largest count; among equals, the smallest pair of ids.

    >>> top_pair({(2, 1): 7, (1, 9): 7, (0, 0): 3})
    (1, 9)
    """
    return min(counts, key=lambda pair: (-counts[pair], pair))

# %% nbgrader={"grade": true, "grade_id": "10-count-pairs-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_count_pairs():
    """The oracle is the picture: banana bandana, counted by hand."""
    counts = count_pairs([list(b"banana"), list(b"bandana")], [1, 1])
    named = {bytes(pair).decode(): n for pair, n in counts.items()}
    assert "ab" not in named, f"'ab' spans the end of banana and the start of bandana; words are separate: {named}"
    assert named == {"ba": 2, "an": 4, "na": 3, "nd": 1, "da": 1}, f"banana bandana counts to {named}"
    counts = count_pairs([[1, 2, 1, 2]], [10])
    assert counts == {(1, 2): 20, (2, 1): 10}, f"a word of weight 10 counts ten times; got {dict(counts)}"
    ### BEGIN HIDDEN TESTS
    counts = count_pairs([[5, 5, 5], [7], [5, 6]], [3, 100, 1])
    assert counts == {(5, 5): 6, (5, 6): 1}, f"expected (5,5) six times and (5,6) once, got {dict(counts)}"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_count_pairs()

# %% [markdown]
"""
### Build: merge one pair

Walk from left to right. Where the pair stands, write the new id and step over both; elsewhere copy and step
on.

    merge_pair([a, a, a, b], (a, a), X)   ->   [X, a, b]        the leftmost two, then what is left
"""

# %% nbgrader={"grade": false, "grade_id": "10-merge-pair", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def merge_pair(word, pair, new_id):
    """The ids of `word`, with each occurrence of `pair` replaced by `new_id`, leftmost first.

    >>> merge_pair([1, 2, 3, 1, 2], (1, 2), 9)
    [9, 3, 9]
    """
    ### BEGIN SOLUTION
    merged, i = [], 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            merged.append(new_id)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "10-merge-pair-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_merge_pair():
    """The oracle is worked by hand."""
    for word, pair, expected, trap in [
        ([1, 2, 3, 1, 2], (1, 2), [9, 3, 9], "every occurrence is replaced, also the last"),
        ([1, 1, 1, 2], (1, 1), [9, 1, 2], "an id that was merged is used up: step over both"),
        ([1, 1, 1, 1], (1, 1), [9, 9], "two pairs side by side are both merged"),
        ([2, 1], (1, 2), [2, 1], "(2, 1) is not (1, 2)"),
    ]:
        before = list(word)
        got = merge_pair(word, pair, 9)
        assert got == expected, f"merge_pair({before}, {pair}, 9) should be {expected}, got {got}: {trap}"
        assert word == before, f"merge_pair changed the list it was given, {before} became {word}; return a new one"
    ### BEGIN HIDDEN TESTS
    got = merge_pair([4, 7, 7, 7, 7, 7, 4], (7, 7), 300)
    assert got == [4, 300, 300, 7, 4], f"merging (7, 7) in 4 7 7 7 7 7 4 should give 4 300 300 7 4, got {got}"
    assert merge_pair([7], (7, 7), 300) == [7], "a word of one id has no pair and stays as it is"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_merge_pair()

# %% [markdown]
"""
### Build: learn, the slow way

Now repeat: count, choose, merge everywhere. The k-th merge gets the id 256 + k. Stop early when no pair
occurs at least twice: a pair that occurs once saves nothing.

This version counts everything again in every round. It is the definition; a faster one will have to give the
same merges.
"""

# %% nbgrader={"grade": false, "grade_id": "10-learn-merges-slow", "locked": false, "schema_version": 3, "solution": true, "task": false}
def learn_merges_slow(words, weights, num_merges):
    """The first `num_merges` merges, as a list of pairs; fewer when no pair occurs twice.

    >>> learn_merges_slow([list(b"banana"), list(b"bandana")], [1, 1], 2)
    [(97, 110), (98, 256)]
    """
    ### BEGIN SOLUTION
    words, merges = [list(word) for word in words], []
    while len(merges) < num_merges:
        counts = count_pairs(words, weights)
        if not counts or counts[top_pair(counts)] < 2:
            break
        pair = top_pair(counts)
        words = [merge_pair(word, pair, 256 + len(merges)) for word in words]
        merges.append(pair)
    return merges
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "10-learn-merges-slow-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_learn_merges_slow():
    """The oracle is the picture, and str.replace on a text of three letters."""
    words = [list(b"banana"), list(b"bandana")]
    merges = learn_merges_slow(words, [1, 1], 2)
    assert merges == [(97, 110), (98, 256)], (
        f"banana bandana should give (97, 110), then (98, 256); got {merges}. A second merge made of bytes only means "
        "that the first was not carried out in the words")
    assert words[0] == list(b"banana"), "learn_merges_slow changed the words it was given; work on copies"
    got = learn_merges_slow([list(b"abcabc")], [1], 50)
    assert spell(got) == [b"ab", b"abc"], (
        f"abcabc should give 'ab', then 'abc', then stop, since no pair occurs twice; got {spell(got)}")
    ### BEGIN HIDDEN TESTS
    got = learn_merges_slow([list(b"xyz"), list(b"zy")], [1, 9], 1)
    assert spell(got) == [b"zy"], f"'zy' has the weight 9 and should come first, got {spell(got)}"
    assert learn_merges_slow([[97]], [5], 3) == [], "a word of one byte has no pair to merge"
    got = learn_merges_slow([list(b"aaaaaaaa")], [1], 3)
    assert spell(got) == [b"aa", b"aaaa"], f"aaaaaaaa gives 'aa', then 'aaaa', then stops; got {spell(got)}"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_learn_merges_slow()

# %% nbgrader={"grade": false, "grade_id": "10-measure-slow", "locked": true, "schema_version": 3, "solution": false, "task": false}
def measure_slow():
    """How long would it take on all of the help text? A few merges on a part of it, as one word, multiplied."""
    part = list(help_text().encode("utf-8"))[:40_000]
    start = time.perf_counter()
    merges = learn_merges_slow([part], [1], 5)
    seconds = (time.perf_counter() - start) / 5
    print("the first merges:", spell(merges))
    factor = len(help_text()) / len(part)
    print(f"{seconds:.3f} s per merge on {len(part):,} bytes")
    print(f"768 merges on the whole text: about {seconds * factor * 768:,.0f} s")


if __name__ == "__main__":
    measure_slow()

# %% [markdown]
"""
Two things can be saved. The text repeats itself, so the same words are counted again and again. And a merge
changes few words, but we recount them all. We take them in this order.

## 4. Cut the text into chunks

GPT-2 first cuts the text into chunks with a regular expression and never merges across a cut. That makes
training fast (each distinct chunk is stored once, with a weight), and the vocabulary better: without the cut,
`dog.` and `dog!` and `dog?` would all be learned as tokens.

    "You're 20 years old!  Yes."   ->   You  're  _20  _years  _old  !  _  _Yes  .       (_ is a blank)

A blank belongs to the word that follows, so ` years` is one token, and `years` at the start of a line
another.
"""

# %% [markdown]
r"""
### What is a letter?

GPT-2's pattern writes "letter" as `\p{L}`: every character of Unicode's category L, of any script. Python's
`re` has no `\p`, and its relatives are not the same: `[a-z]` knows no accents, and `\w` takes in digits and
the underscore.

So we build the classes ourselves. `str.isalpha` is exactly category L; `str.isnumeric` is category N and some
letters (a Chinese three is both); `str.isspace` is Unicode's white space and four control characters, which
we take out. The letters are many, but they lie side by side, so the class is a list of ranges. We build it on
first use, once.
"""

# %%
#| export
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

# %% [markdown]
r"""
### The pattern

Six alternatives, tried in this order at each place (GPT-2's `encoder.py`):

| | matches | example |
|---|---|---|
| 1 | the English endings | `'re` |
| 2 | an optional blank, then letters | `_years` |
| 3 | an optional blank, then digits and other numbers | `_20` |
| 4 | an optional blank, then anything that is neither white space, letter nor number | `_...` |
| 5 | white space that is *not followed by* anything but white space | the first of the two blanks before `Yes` |
| 6 | any other white space | a line break before a word |

Number 5, `\s+(?!\S)`, leaves the last blank of a run to the word after it. **Build** alternatives 3 to 6.
`letter`, `number` and `space` are what stands inside square brackets: "one or more letters" is `[{letter}]+`
in an f-string, "no letter, no number" is `[^{letter}{number}]`.
"""

# %% nbgrader={"grade": false, "grade_id": "10-chunk-regex", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def chunk_regex(letter, number, space):
    """The regular expression of the six alternatives, as a string without capturing groups.

    >>> re.findall(chunk_regex("a-z", "0-9", " "), "it's 20  dogs!")
    ['it', "'s", ' 20', ' ', ' dogs', '!']
    """
    endings = "'(?:s|t|re|ve|m|ll|d)"
    word = f" ?[{letter}]+"
    ### BEGIN SOLUTION
    figures = f" ?[{number}]+"
    signs = f" ?[^{space}{letter}{number}]+"
    trailing = f"[{space}]+(?![^{space}])"
    return "|".join([endings, word, figures, signs, trailing, f"[{space}]+"])
    ### END SOLUTION

# %%
#| export
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

# %% nbgrader={"grade": true, "grade_id": "10-chunk-regex-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_chunk_regex():
    """The oracle is worked by hand from the table of alternatives."""
    def chunks(text):
        return re.findall(chunk_regex("a-zA-Z", "0-9", r" \n\t"), text)

    for text, expected, trap in [
        ("You're 20 years", ["You", "'re", " 20", " years"], "the blank goes with the word or number after it"),
        ("a  b", ["a", " ", " b"], "the last blank of a run belongs to the next word (alternative 5)"),
        ("x_1 += y2", ["x", "_", "1", " +=", " y", "2"], "letters, numbers and signs are three kinds of chunks"),
        ("end \n", ["end", " \n"], "white space at the end of the text stays together"),
        ("if\n\nso", ["if", "\n", "\n", "so"], "alternative 5 leaves one line break over, alternative 6 takes it"),
    ]:
        got = chunks(text)
        assert "".join(got) == text, f"chunks must be the whole text: {text!r} was cut into {got}, which lost something"
        assert got == expected, f"{text!r} should be cut into {expected}, got {got}: {trap}"
    ### BEGIN HIDDEN TESTS
    got = split_text("\u00fcber 30\u00b2 \u4e09\u672c, don't!\t\t \u00a0x")
    expected = ["\u00fcber", " 30\u00b2", " \u4e09\u672c", ",", " don", "'t", "!", "\t\t ", "\u00a0", "x"]
    assert got == expected, f"with Unicode's classes the cut should be {expected}, got {got}"
    got = chunks("(1+2)...  3")
    assert got == ["(", "1", "+", "2", ")...", " ", " 3"], f"'(1+2)...  3' was cut into {got}"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_chunk_regex()

# %% nbgrader={"grade": false, "grade_id": "10-measure-chunks", "locked": true, "schema_version": 3, "solution": false, "task": false}
def measure_chunks():
    """How many chunks, and how many distinct ones? That quotient is what we save."""
    chunks = split_text(help_text())
    counted = Counter(chunks)
    print(f"{len(chunks):,} chunks, {len(counted):,} distinct: one in {len(chunks) / len(counted):.0f}")
    print("most common:", counted.most_common(8))


if __name__ == "__main__":
    measure_chunks()

# %% [markdown]
"""
## 5. Recount only what a merge changed

Merging (a, n) changes `banana`, but not `dog`. If we remember for each pair *where* it stands, a round
touches only those words, and the counts can be kept instead of made again: take the old word's pairs out, put
the new word's pairs in.

    banana, weight 3      out: (b,a) 3  (a,n) 6  (n,a) 6
    b X X a, weight 3      in: (b,X) 3  (X,X) 3  (X,a) 3
"""

# %% nbgrader={"grade": false, "grade_id": "10-replace-word", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def replace_word(old, new, weight, counts):
    """Keep `counts` right when `old` becomes `new` in a word of this weight; the set of pairs that changed.

    >>> counts = Counter({(1, 2): 5})
    >>> replace_word([1, 2], [9], 5, counts), counts[(1, 2)]
    ({(1, 2)}, 0)
    """
    ### BEGIN SOLUTION
    for pair in zip(old, old[1:]):
        counts[pair] -= weight
    for pair in zip(new, new[1:]):
        counts[pair] += weight
    return {*zip(old, old[1:]), *zip(new, new[1:])}
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "10-replace-word-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_replace_word():
    """The oracle is counting everything again."""
    old, new, other = list(b"banana"), [98, 256, 256, 97], list(b"nab")
    counts = count_pairs([old, other], [3, 2])
    touched = replace_word(old, new, 3, counts)
    expected = +count_pairs([new, other], [3, 2])
    assert +counts == expected, (
        f"after the change the counts should be {dict(expected)}, got {dict(+counts)}. Do old pairs leave and new pairs "
        "enter, each with the weight of the word?")
    assert touched == {(98, 97), (97, 110), (110, 97), (98, 256), (256, 256), (256, 97)}, (
        f"the pairs that changed are those of the old word and of the new one, got {touched}")
    ### BEGIN HIDDEN TESTS
    counts = count_pairs([[5, 5, 5, 5]], [7])
    touched = replace_word([5, 5, 5, 5], [300, 300], 7, counts)
    assert counts[(5, 5)] == 0 and counts[(300, 300)] == 7, f"(5,5) occurs no more and (300,300) 7 times; got {counts}"
    assert touched == {(5, 5), (300, 300)}, f"two pairs changed, (5,5) and (300,300); got {touched}"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_replace_word()

# %% [markdown]
"""
### Build: the largest count without looking at all

Searching thousands of pairs for the largest in every round is slow too. A heap keeps the smallest entry on
top, so we store `(-count, pair)`: the largest count comes first, and among equals the smallest pair. That is
our rule for ties, for nothing.

A heap cannot change an entry that lies inside it. So when a count changes we push a new entry and leave the
old one to go stale. An entry is *fresh* if its count is still the true one; what is not fresh is thrown away
when it comes to the top.
"""

# %% nbgrader={"grade": false, "grade_id": "10-pop-top-pair", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def pop_top_pair(heap, counts):
    """Take entries (-count, pair) off the heap until one is fresh: its pair, or None if none occurs at least twice.

    >>> pop_top_pair([(-9, (1, 2)), (-4, (3, 4))], {(1, 2): 1, (3, 4): 4})
    (3, 4)
    """
    ### BEGIN SOLUTION
    while heap:
        negative, pair = heapq.heappop(heap)
        if -negative == counts[pair]:
            return pair if counts[pair] >= 2 else None
    return None
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "10-pop-top-pair-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_pop_top_pair():
    """The oracle is top_pair, which looks at all counts."""
    counts = Counter({(1, 2): 1, (3, 4): 4, (3, 3): 4, (8, 8): 2})
    heap = [(-9, (1, 2)), (-4, (3, 4)), (-4, (3, 3)), (-1, (1, 2)), (-2, (8, 8))]
    heapq.heapify(heap)
    got = [pop_top_pair(heap, counts) for _ in range(4)]
    assert got[0] != (1, 2), "the entry (-9, (1, 2)) is stale: the count is 1 by now; compare it with `counts`"
    assert got[0] == top_pair(counts), f"{top_pair(counts)} has the largest count, the smallest of two; got {got[0]}"
    assert got[1:3] == [(3, 4), (8, 8)], f"next come (3, 4), then (8, 8), got {got[1:3]}"
    assert got[3] is None, f"only (1, 2) is left and occurs once, so the answer is None; got {got[3]}"
    ### BEGIN HIDDEN TESTS
    assert pop_top_pair([], Counter()) is None, "an empty heap holds no pair, so the answer is None"
    assert pop_top_pair([(-2, (5, 6))], Counter({(5, 6): 2})) == (5, 6), "a pair that occurs twice is still worth merging"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_pop_top_pair()

# %%
#| export
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

# %% nbgrader={"grade": true, "grade_id": "10-learn-merges-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_learn_merges():
    """The oracle is the slow version, which recounts everything."""
    for source in ("banana bandana anna", "aaaa aaa aa a", "she sells sea shells by the sea shore", "abab baba abba"):
        counted = Counter(source.split())
        words, weights = [list(word.encode()) for word in counted], list(counted.values())
        fast, slow = learn_merges(words, weights, 40), learn_merges_slow(words, weights, 40)
        assert len(slow) > 0, f"the slow version learned nothing from {source!r}"
        assert fast == slow, f"on {source!r} the fast version learned {spell(fast)}, the slow one {spell(slow)}"
    ### BEGIN HIDDEN TESTS
    counted = Counter(split_text(help_text()[:3000]))
    words, weights = [list(word.encode()) for word in counted], list(counted.values())
    assert learn_merges(words, weights, 60) == learn_merges_slow(words, weights, 60), (
        "on 3000 characters of help text the fast and the slow version differ")
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_learn_merges()

# %% nbgrader={"grade": false, "grade_id": "10-measure-fast", "locked": true, "schema_version": 3, "solution": false, "task": false}
def measure_fast():
    """The whole text, both ways; the slow one for a few merges only."""
    counted = Counter(split_text(help_text()))
    words, weights = [list(chunk.encode("utf-8")) for chunk in counted], list(counted.values())
    start = time.perf_counter()
    merges = learn_merges(words, weights, 768)
    fast = time.perf_counter() - start
    start = time.perf_counter()
    slow_merges = learn_merges_slow(words, weights, 10)
    slow = (time.perf_counter() - start) * 768 / 10
    print(f"same first merges: {merges[:10] == slow_merges}")
    print(f"768 merges: {fast:.2f} s; distinct chunks recounted in each round: about {slow:.0f} s")
    print("first:", spell(merges)[:8])
    print("last:", spell(merges)[-6:])


if __name__ == "__main__":
    measure_fast()

# %% [markdown]
"""
**Look back.**

1. What would change if `learn_merges` broke ties by the order of the words? (Give it the same words in
   reverse.)
2. Why may `where` keep the number of a word that no longer holds the pair, while `counts` must be exact?
3. Which tokens would appear if we had not cut the text into chunks? (Train with the whole text as one word.)
"""

# %% [markdown]
"""
## 6. Encode: replay the merges in the order they were learned

A new text goes the same way as the training text did: cut, take bytes, then merge, the merge learned first
going first. Its place in the order is its *rank*. `merges` holds for each pair its rank and the id of the
result.

    merges   (a,n): (0, X)    (b,X): (1, Y)    (X,a): (2, Z)
    b a n a n a   ->   b X X a   ->   Y X a   ->   Y Z

Not the leftmost pair first, and not the longest token first: only the order of training gives, on the
training text, the very tokens that training left there.

**Predict.** With the three merges above, what does `anan` become: X is 256, Y is 257, Z is 258. And `banan`?
"""

# %% nbgrader={"grade": false, "grade_id": "10-predict-encode", "locked": false, "schema_version": 3, "solution": true, "task": false}
predicted_anan = None   # replace: a list of ids
predicted_banan = None  # replace: a list of ids
### BEGIN SOLUTION
predicted_anan = [256, 256]
predicted_banan = [257, 256]
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "10-predict-encode-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_encode():
    """The oracle is str.replace, one merge after the other."""
    for word, predicted in (("anan", predicted_anan), ("banan", predicted_banan)):
        for old, new in (("an", "X"), ("bX", "Y"), ("Xa", "Z")):
            word = word.replace(old, new)
        expected = [256 + "XYZ".index(letter) for letter in word]
        assert predicted == expected, f"the merges leave {word}, that is {expected}; you predicted {predicted}"


if __name__ == "__main__":
    test_unit_predict_encode()

# %% [markdown]
"""
### Build: merge by rank

While there are pairs: take the one of lowest rank (`min` with a key; `merges.get(pair, NEVER)` makes unknown
pairs last). If even that one is unknown, we are done. Otherwise merge it everywhere in this chunk.
"""

# %% nbgrader={"grade": false, "grade_id": "10-merge-by-rank", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
NEVER = (float("inf"), None)  # the rank of a pair that was never merged: after all others


def merge_by_rank(ids, merges):
    """The ids of one chunk after all merges that apply; `merges` maps a pair to (rank, new id).

    >>> merge_by_rank(list(b"banana"), {(97, 110): (0, 256), (98, 256): (1, 257), (256, 97): (2, 258)})
    [257, 258]
    """
    ### BEGIN SOLUTION
    while len(ids) > 1:
        pair = min(zip(ids, ids[1:]), key=lambda pair: merges.get(pair, NEVER))
        if pair not in merges:
            break
        ids = merge_pair(ids, pair, merges[pair][1])
    return ids
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "10-merge-by-rank-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_merge_by_rank():
    """The oracle is the picture, and what training itself left of its words."""
    merges = {(97, 110): (0, 256), (98, 256): (1, 257), (256, 97): (2, 258)}
    for word, expected in (("banana", [257, 258]), ("anna", [256, 110, 97]), ("dog", list(b"dog")), ("", [])):
        got = merge_by_rank(list(word.encode()), merges)
        assert got == expected, (
            f"{word!r} should become {expected}, got {got}. Each round merges the pair of lowest rank that is there, "
            "and rounds go on until no pair is known")
    late = {(1, 2): (5, 300), (2, 3): (4, 301)}
    got = merge_by_rank([1, 2, 3], late)
    assert got == [1, 301], f"(2, 3) has the lower rank, 4, and goes before (1, 2): expected [1, 301], got {got}"
    ### BEGIN HIDDEN TESTS
    got = merge_by_rank([1, 2, 1, 2, 3], {(1, 2): (0, 90), (90, 90): (3, 40), (40, 3): (9, 12)})
    assert got == [12], f"a merge may build on a merge, whatever the ids are: expected [12], got {got}"
    got = merge_by_rank([1, 2, 3, 4], {(3, 4): (0, 900), (1, 2): (1, 6), (6, 900): (2, 7)})
    assert got == [7], f"ranks count, not the size of the new id: expected [7], got {got}"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_merge_by_rank()

# %% [markdown]
"""
### A chunk that is very long

Words are short, so this is fast. But 20,000 letters of a DNA sequence are *one* chunk, and each round walks
through all of it: twice the length takes four times as long. The heap helps again. It holds the place of each
known pair by rank, and a linked list (`before`, `after`) tells who is whose neighbour now. The function is
given; the tokenizer uses it for chunks of more than 64 bytes.
"""

# %%
#| export
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

# %% [markdown]
"""
## 7. Decode: join bytes first

Each id stands for some bytes, and a token may hold a *part* of a character. The euro sign is three bytes. As
three tokens of one byte each, decoded one by one, they are three times U+FFFD, the replacement character;
joined first, they are the euro sign. So: join all bytes, then decode.

A language model may also stop in the middle of a character. What is not UTF-8 becomes U+FFFD instead of an
error (`errors="replace"`). For text that came from `encode` this never happens.
"""

# %% nbgrader={"grade": false, "grade_id": "10-decode-tokens", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def decode_tokens(ids, tokens):
    """The text of a list of ids; `tokens` maps an id to its bytes.

    An unknown id is a ValueError that names the id and the size of the vocabulary.

    >>> decode_tokens([1, 0], {0: b"na", 1: b"ba"})
    'bana'
    """
    ### BEGIN SOLUTION
    parts = []
    for i in ids:
        if i not in tokens:
            raise ValueError(f"id {i} is not in the vocabulary of {len(tokens)} ids")
        parts.append(tokens[i])
    return b"".join(parts).decode("utf-8", errors="replace")
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "10-decode-tokens-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_decode_tokens():
    """The oracle is the text that the bytes were cut from."""
    euro = "€".encode()
    tokens = {0: b"10 ", 1: euro[:1], 2: euro[1:], 3: b"!"}
    got = decode_tokens([0, 1, 2, 3], tokens)
    assert got == "10 €!", (
        f"the bytes of tokens 1 and 2 make one euro sign, so the text is '10 €!', got {got!r}. Join the bytes of all "
        "tokens before decoding")
    got = decode_tokens([0, 1], tokens)
    assert got == "10 \ufffd", f"a character cut off at the end should become U+FFFD, got {got!r}"
    said = error_of(decode_tokens, [0, 7], tokens)
    assert "7" in said and "4" in said, f"id 7 is not among 4 ids; the error should say both numbers, it says: {said!r}"
    ### BEGIN HIDDEN TESTS
    note = "a\U0001d11eb"
    got = decode_tokens(range(6), {i: bytes([b]) for i, b in enumerate(note.encode())})
    assert got == note, f"byte by byte, {note!r} should come back, got {got!r}"
    said = error_of(decode_tokens, [-1], {0: b"x"})
    assert "-1" in said, f"id -1 is not the last token but an error; it says: {said!r}"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_decode_tokens()

# %% [markdown]
"""
## 8. The tokenizer

Three things are left to the class.

* **A cache.** Text repeats itself, so each distinct chunk is merged once and remembered.
* **Special tokens.** Models mark the end of a document with an id that no text can produce, such as
  `<|endoftext|>`. If someone *types* these characters, they are thirteen ordinary characters, unless the
  caller says `allow_special=True`. Otherwise a user could end the document from inside it.
* **What is not text.** A Python string may hold half of a surrogate pair, which is no character and has no
  UTF-8. Replacing it would break the promise that decoding gives the text back. So that is an error, and says
  where.
"""

# %%
#| export
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

# %%
#| export
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

# %%
#| export
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

# %% nbgrader={"grade": true, "grade_id": "10-bpe-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_bpe():
    """The text itself (round trip), and the bytes (without training). The class has no hole of its own."""
    plain = BPETokenizer()
    assert plain.vocab_size == 256, f"without training there are 256 ids, got {plain.vocab_size}"
    assert plain.encode("né") == [110, 195, 169], f"without training ids are bytes, got {plain.encode('né')}"
    tokenizer = BPETokenizer(special_tokens=["<|end|>"]).train("banana bandana " * 3, 262)
    assert tokenizer.vocab_size == 262, f"256 bytes, 5 merges and 1 special token make 262, got {tokenizer.vocab_size}"
    for text in ("banana", UNUSUAL, ""):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text, f"decode(encode(text)) should be the text, {text!r} became {ids}"
    assert len(tokenizer.encode("banana")) < 6, "training on banana should shorten banana"
    typed, meant = tokenizer.encode("<|end|>"), tokenizer.encode("<|end|>", allow_special=True)
    assert len(typed) == 7, f"a special token that is typed is ordinary text of 7 bytes, got {typed}"
    assert meant == [261], f"with allow_special=True it is the last id, 261, got {meant}"
    ### BEGIN HIDDEN TESTS
    copy = BPETokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert copy.encode(UNUSUAL) == tokenizer.encode(UNUSUAL), "a tokenizer from its own dict should encode alike"
    letters = "nab" * 200
    short = merge_by_rank(list(letters.encode()), tokenizer.merges)
    assert tokenizer.encode(letters) == short, "long chunks, through the heap, should encode like short ones"
    assert "position 1" in error_of(tokenizer.encode, "a\ud800"), "half a surrogate pair should be refused by position"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_bpe()

# %% nbgrader={"grade": false, "grade_id": "10-measure-compression", "locked": true, "schema_version": 3, "solution": false, "task": false}
def measure_compression():
    """What a larger vocabulary buys (on text that was not trained on), and what it costs: the table of lesson 11."""
    text = help_text()
    cut = len(text) * 9 // 10
    for vocab_size in (256, 512, 1024, 2048):
        start = time.perf_counter()
        tokenizer = BPETokenizer().train(text[:cut], vocab_size)
        trained = time.perf_counter() - start
        start = time.perf_counter()
        ids = tokenizer.encode(text[cut:])
        encoded = time.perf_counter() - start
        table = tokenizer.vocab_size * 768 * 4 / 2**20
        print(f"{tokenizer.vocab_size:5} ids: trained in {trained:.2f} s, encoded in {encoded:.2f} s, "
              f"{len(text[cut:]) / len(ids):.2f} characters per token, table of 768 columns {table:.2f} MiB")


if __name__ == "__main__":
    measure_compression()

# %% [markdown]
"""
**Predict.** A model keeps one row of numbers per id (lesson 11). GPT-2 small has 50,257 ids, 768 columns, and
float32 takes 4 bytes. How many bytes is that table? And how many would remain with the 256 bytes alone?
"""

# %% nbgrader={"grade": false, "grade_id": "10-predict-table", "locked": false, "schema_version": 3, "solution": true, "task": false}
predicted_table = None  # replace: bytes of GPT-2's table, a whole number (a product is fine)
predicted_small = None  # replace: bytes of the table for 256 ids
### BEGIN SOLUTION
predicted_table = 50_257 * 768 * 4
predicted_small = 256 * 768 * 4
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "10-predict-table-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def test_unit_predict_table():
    """The oracle is the size of an array of floats, counted by Python."""
    from array import array

    row = len(array("f", [0.0] * 768).tobytes())
    for predicted, ids in ((predicted_table, 50_257), (predicted_small, 256)):
        assert predicted != ids * 768, f"{predicted} is the count of numbers; each of them takes 4 bytes"
        assert predicted == ids * row, f"{ids} rows of {row} bytes are {ids * row}; you predicted {predicted}"


if __name__ == "__main__":
    test_unit_predict_table()
    print(f"GPT-2: {predicted_table / 2**20:.1f} MiB of {124_439_808 * 4 / 2**20:.1f} MiB (124,439,808 parameters)")

# %% [markdown]
"""
## 9. GPT-2's own files

GPT-2 ships its vocabulary as two text files: `vocab.json` maps tokens to ids, `merges.txt` has one pair per
line, in order of rank. But tokens are bytes, and bytes such as 0, 10 or 200 make poor text. So each byte is
written as a printable *letter*:

* a byte that is a visible character stands for itself: 33–126 (`!` to `~`), 161–172 and 174–255, as Unicode
  code points;
* the other 68 bytes, from the smallest, become the characters 256, 257, 258 …

The blank is byte 32, the 33rd of the others (0 to 32), so it becomes character 256 + 32 = 288, `Ġ`. That is
why GPT-2's vocabulary is full of words like `Ġthe`.
"""

# %% nbgrader={"grade": false, "grade_id": "10-byte-letters", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def byte_letters():
    """The 256 letters of GPT-2's files: at place b, the printable character that stands for byte b.

    >>> byte_letters()[ord("A")], ord(byte_letters()[0]), ord(byte_letters()[32])
    ('A', 256, 288)
    """
    ### BEGIN SOLUTION
    letters, hidden = [], 0
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte:
            letters.append(chr(byte))
        else:
            letters.append(chr(256 + hidden))
            hidden += 1
    return letters
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "10-byte-letters-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_byte_letters():
    """The oracle: letters as they stand in GPT-2's published vocab.json."""
    letters = list(byte_letters())
    assert len(letters) == 256, f"there should be one letter for each of the 256 bytes, got {len(letters)}"
    for byte, letter, what in [
        (65, "A", "A"), (126, "~", "~"), (161, "¡", "an inverted exclamation mark"),
        (32, "Ġ", "the blank"), (10, "Ċ", "the line break"), (0, "Ā", "the first hidden byte"),
        (127, "ġ", "the 34th hidden byte"), (173, "Ń", "the last hidden byte"),
    ]:
        assert letters[byte] == letter, (
            f"byte {byte} ({what}) should be {letter!r} (character {ord(letter)}), got {letters[byte]!r} "
            f"(character {ord(letters[byte])}). Hidden bytes are numbered among themselves, from 256")
    assert len(set(letters)) == 256, f"two bytes share a letter: only {len(set(letters))} different ones"
    ### BEGIN HIDDEN TESTS
    for byte, code in ((128, 256 + 34), (160, 256 + 66), (255, 255), (33, 33), (172, 172)):
        assert ord(letters[byte]) == code, f"byte {byte} should be character {code}, got {ord(letters[byte])}"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_byte_letters()

# %% [markdown]
"""
Reading the files is bookkeeping: turn letters into ids, and say which file and line is wrong if something is
missing. Whatever the vocabulary has beyond bytes and merges, such as `<|endoftext|>`, is a special token.

In these files ids follow no rule: `!` is 0, since the letters are sorted as characters. That is why `merges`
keeps rank and id apart.
"""

# %%
#| export
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

# %% [markdown]
"""
## The module test

Everything once more, and one scenario from end to end: train on real text, encode text that was not in it,
write GPT-2's two files by hand, read them, save, load, and get the same ids every time.
"""

# %%
def write_gpt2_files(tokenizer, folder):
    """A tokenizer of ours as GPT-2's two files; the oracle for reading them. Returns the two paths."""
    letters = byte_letters()
    written = {i: "".join(letters[b] for b in token) for i, token in tokenizer.tokens.items()}
    vocab, merges = os.path.join(folder, "vocab.json"), os.path.join(folder, "merges.txt")
    with open(vocab, "w", encoding="utf-8") as file:
        json.dump({token: i for i, token in written.items()}, file)
    with open(merges, "w", encoding="utf-8") as file:
        file.write("#version: 0.2\n" + "".join(f"{written[a]} {written[b]}\n" for a, b in tokenizer.merges))
    return vocab, merges

# %% nbgrader={"grade": true, "grade_id": "10-module-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_module():
    """Every check of this lesson, then one scenario from end to end."""
    for check in (
        test_unit_predict_chars, test_unit_encode_characters, test_unit_predict_bytes, test_unit_predict_merges,
        test_unit_count_pairs, test_unit_merge_pair, test_unit_learn_merges_slow, test_unit_chunk_regex,
        test_unit_replace_word, test_unit_pop_top_pair, test_unit_learn_merges, test_unit_predict_encode,
        test_unit_merge_by_rank, test_unit_decode_tokens, test_unit_bpe, test_unit_predict_table,
        test_unit_byte_letters,
    ):
        check()
    text = help_text()
    tokenizer = BPETokenizer().train(text[:100_000], 400)
    assert tokenizer.vocab_size == 400, f"asked for 400 ids, got {tokenizer.vocab_size}"
    unseen = text[300_000:310_000] + UNUSUAL
    ids = tokenizer.encode(unseen)
    assert tokenizer.decode(ids) == unseen, "a text that was not in the training text should come back unchanged"
    assert len(ids) < 0.7 * len(unseen), (
        f"144 merges should save more than 30 %: {len(unseen)} characters became {len(ids)} ids")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(os.path.join(folder, "bpe.json"))
        loaded = BPETokenizer.load(os.path.join(folder, "bpe.json"))
        foreign = BPETokenizer.from_gpt2_files(*write_gpt2_files(tokenizer, folder))
    assert loaded.encode(unseen) == ids, "the tokenizer that was saved and loaded encodes differently"
    assert foreign.encode(unseen) == ids, "the tokenizer read from GPT-2's file format encodes differently"
    print("Lesson 10: every check passed.")


if __name__ == "__main__":
    test_module()

# %% [markdown]
"""
## Summary

* A tokenizer is a two-way door: ids for text, and exactly the same text back.
* Characters are simple but closed; 256 bytes write everything.
* BPE learns merges from counts; ties need a rule. Encoding replays the merges by rank.
* Cutting the text into chunks makes training fast and keeps tokens from crossing words.
* Join bytes first, decode afterwards: a token may hold a part of a character.

## Exercises

1. Print the tokens of your own name, with and without a blank before it. Why do they differ?
2. Train on the first half of the text and on the second. How many merges do the two vocabularies share?
3. Write `"9.11"` and `"9.9"` as tokens. What does a model have to learn before it can compare them?
4. Replace the rule for ties by "the pair that occurs first". How many of the first 256 merges change?
"""

# %% [markdown]
"""
## Design note: why bytes, and why chunks

Both decisions come from the GPT-2 paper (Radford and others, 2019, "Language Models are Unsupervised
Multitask Learners", section 2.2). BPE on Unicode characters would need a base vocabulary of more than 130,000
before the first merge; on bytes it needs 256. And plain BPE on bytes wasted places on variants of one word,
with a full stop, an exclamation mark, a question mark, so they forbade merges across kinds of characters,
with an exception for the blank.

The price is paid by others than English: the letters of many scripts take two or three bytes, and the pattern
knows the endings of one language only.

## What breaks next

The ids are numbers, but not quantities: 257 is not "a bit more" than 256. A network that computes with them
directly learns nonsense. Lesson 11 gives each id a row of numbers that can be learned.
"""
