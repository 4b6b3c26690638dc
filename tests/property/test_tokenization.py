"""Lesson 10 under hypothesis: every text comes back, and fast ways give what the slow ways give."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from tinytorch.text.tokenization import (
    BPETokenizer,
    CharTokenizer,
    learn_merges,
    merge_by_rank,
    merge_by_rank_long,
    merge_pair,
    split_text,
)

texts = st.text() | st.text("ab '\n\t1_.\u00a0é", max_size=60)
small_words = st.lists(st.lists(st.integers(97, 99), min_size=1, max_size=10), min_size=1, max_size=8)
modest = settings(deadline=None, max_examples=150)
few = settings(deadline=None, max_examples=50)

TRAINED = BPETokenizer(["<|end|>"]).train("she sells sea shells by the sea shore; naïve café, 中文 中文 中文 " * 3, 330)


@modest
@given(texts)
def test_every_text_comes_back(text):
    for tokenizer in (TRAINED, BPETokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(tokenizer.tokens[i] for i in ids) == text.encode()


@modest
@given(texts)
def test_chunks_are_the_text_and_none_is_empty(text):
    chunks = split_text(text)
    assert "".join(chunks) == text
    assert all(chunks)


@modest
@given(texts, texts)
def test_encoding_is_the_same_again_and_from_a_copy(first, second):
    copy = BPETokenizer.from_dict(json.loads(json.dumps(TRAINED.to_dict())))
    ids = TRAINED.encode(first)
    assert copy.encode(second) == TRAINED.encode(second)
    assert TRAINED.encode(first) == ids == copy.encode(first)


@few
@given(st.text(min_size=1), st.data())
def test_characters_come_back(text, data):
    tokenizer = CharTokenizer(text)
    again = data.draw(st.text(sorted(set(text))))
    ids = tokenizer.encode(again)
    assert len(ids) == len(again)
    assert tokenizer.decode(ids) == again


@modest
@given(st.lists(st.integers(1, 3), max_size=30), st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_merge_pair_as_replacing_in_a_string(word, pair):
    """str.replace is leftmost first and does not overlap either."""
    letters = {1: "a", 2: "b", 3: "c", 9: "X"}
    expected = "".join(letters[i] for i in word).replace(letters[pair[0]] + letters[pair[1]], "X")
    assert "".join(letters[i] for i in merge_pair(word, pair, 9)) == expected


@few
@given(small_words, st.data())
def test_training_leaves_what_encoding_makes(words, data):
    """Replaying the merges on a training word, one after the other, gives what merge by rank gives, short or long."""
    weights = [data.draw(st.integers(1, 5)) for _ in words]
    pairs = learn_merges(words, weights, 20)
    merges = {pair: (rank, 256 + rank) for rank, pair in enumerate(pairs)}
    for word in words:
        replayed = word
        for rank, pair in enumerate(pairs):
            replayed = merge_pair(replayed, pair, 256 + rank)
        assert merge_by_rank(word, merges) == replayed
        assert merge_by_rank_long(word, merges) == replayed


@few
@given(st.text("ab", min_size=65, max_size=400))
def test_long_chunks_as_short_ones(text):
    tokenizer = BPETokenizer().train("abaababbab abba baab aabb" * 3, 290)
    assert tokenizer.encode(text) == merge_by_rank(list(text.encode()), tokenizer.merges)


@few
@given(st.lists(st.integers(0, 255), max_size=12))
def test_any_bytes_decode_to_something(values):
    assert BPETokenizer().decode(values) == bytes(values).decode("utf-8", errors="replace")
