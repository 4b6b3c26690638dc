"""The paged cache against a dict of arrays: any calls in any order, blocks of 1 to 16; and a GPT on rows of a pool."""

import itertools
import zlib
from collections import Counter

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tinytorch.core.autograd import no_grad
from tinytorch.generation.kv_cache import random_gpt
from tinytorch.generation.paged import OutOfBlocks, PagedKVCache, PagedModelKVCache, paged_kv_cache

H, D = 2, 1


def ceil_div(a, b):
    return -(-a // b)


def key_of(prefix):
    """A number that depends on a token and on all before it, exact in float32."""
    return zlib.crc32(bytes(prefix)) % 2**22


class DictOfArrays:
    """The model: for each live sequence its tokens, and its keys as an array (len,). Values are the negated keys.

    Tokens that were stored without their ids are -1; their keys are numbers that occur nowhere else.
    """

    def __init__(self, block_size, num_blocks, max_seqs):
        self.cache = PagedKVCache(num_blocks, block_size, H, D, max_seqs)
        self.block_size, self.num_blocks, self.max_seqs = block_size, num_blocks, max_seqs
        self.texts, self.keys, self.ids, self.unknown, self.found = {}, {}, set(), 2**22, 0

    def add(self, prompt):
        if len(self.texts) == self.max_seqs:
            with pytest.raises(ValueError, match="max_seqs"):
                self.cache.add_sequence(prompt)
            return None
        seq = self.cache.add_sequence(prompt)
        length = self.cache.seq_len(seq)
        assert length % self.block_size == 0 and length <= max(len(prompt or []) - 1, 0)
        self._live(seq, list(prompt or [])[:length], [key_of(prompt[: i + 1]) for i in range(length)])
        self.found += length
        return seq

    def fork(self, seq):
        if len(self.texts) == self.max_seqs:
            with pytest.raises(ValueError, match="max_seqs"):
                self.cache.fork(seq)
            return
        self._live(self.cache.fork(seq), list(self.texts[seq]), list(self.keys[seq]))

    def _live(self, seq, text, keys):
        assert seq not in self.ids, "an id came twice"
        self.ids.add(seq)
        self.texts[seq], self.keys[seq] = text, keys

    def update(self, seq, tokens, known):
        text = self.texts[seq] + (tokens if known else [-1] * len(tokens))
        keys = list(self.keys[seq])
        for i in range(len(keys), len(text)):
            self.unknown += -1 in text
            keys.append(self.unknown if -1 in text[: i + 1] else key_of(text[: i + 1]))
        new = np.broadcast_to(np.array(keys[len(self.keys[seq]) :], np.float32)[:, None], (H, len(tokens), D))
        needed, free = self.blocks_needed(seq, len(tokens)), self.num_blocks - len(self.held())
        if needed > free:
            with pytest.raises(OutOfBlocks, match=f"need {needed} blocks, {free} of num_blocks={self.num_blocks}"):
                self.cache.update(seq, new, -new, tokens if known else None)
        else:
            self.cache.update(seq, new, -new, tokens if known else None)
            self.texts[seq], self.keys[seq] = text, keys

    def blocks_needed(self, seq, n):
        length = len(self.texts[seq])
        shared = length % self.block_size and self.held()[self.cache.tables.table(seq)[-1]] > 1
        return ceil_div(length + n, self.block_size) - ceil_div(length, self.block_size) + bool(shared)

    def held(self):
        return Counter(block for seq in self.texts for block in self.cache.tables.table(seq))

    def truncate(self, seq, length):
        if length > len(self.texts[seq]):
            with pytest.raises(ValueError, match="cannot be cut"):
                self.cache.truncate(seq, length)
            return
        self.cache.truncate(seq, length)
        del self.texts[seq][length:], self.keys[seq][length:]

    def finish(self, seq):
        self.cache.finish_sequence(seq)
        del self.texts[seq], self.keys[seq]
        with pytest.raises(ValueError, match=f"sequence {seq} is not live"):
            self.cache.get_kv(seq)

    def give_up(self, seq, n):
        """A pass of the bookkeeping that is opened and dropped."""
        if self.blocks_needed(seq, n) <= self.cache.num_free():
            copies = self.cache.tables.reserve(seq, n)
            assert len(copies) <= 1
            self.cache.tables.release(seq)

    def check(self):
        tables, held = self.cache.tables, self.held()
        assert tables.blocks.counts == [held[block] for block in range(self.num_blocks)]
        assert sorted(tables.blocks.free) == [block for block in range(self.num_blocks) if not held[block]]
        assert self.cache.num_free() == self.num_blocks - len(held) and tables.sequences() == list(self.texts)
        for seq, keys in self.keys.items():
            table = tables.table(seq)
            assert len(table) == len(set(table)) == ceil_div(len(keys), self.block_size)
            assert self.cache.seq_len(seq) == len(keys)
            expected = np.broadcast_to(np.array(keys, np.float32)[:, None], (H, len(keys), D))
            for part, wanted in zip(self.cache.get_kv(seq), (expected, -expected)):
                assert part.shape == (H, len(keys), D)
                np.testing.assert_array_equal(part, wanted)


class PagedAgainstDict(RuleBasedStateMachine):
    @initialize(block_size=st.integers(1, 16), num_blocks=st.integers(1, 12), max_seqs=st.integers(1, 5))
    def start(self, block_size, num_blocks, max_seqs):
        self.it = DictOfArrays(block_size, num_blocks, max_seqs)

    tokens = st.lists(st.integers(0, 1), max_size=40)

    def some(self, data):
        return data.draw(st.sampled_from(sorted(self.it.texts))) if self.it.texts else None

    @rule(data=st.data(), prompt=st.none() | tokens, extra=st.integers(0, 2))
    def add(self, data, prompt, extra):
        """A prompt by chance, or one that begins like a live text."""
        seq = self.some(data)
        if prompt is not None and seq is not None and extra:
            known = list(itertools.takewhile(lambda token: token >= 0, self.it.texts[seq]))
            prompt = known[: len(known) // extra] + prompt[:extra]
        self.it.add(prompt)

    @rule(data=st.data(), tokens=tokens.filter(bool), known=st.integers(0, 4))
    def update(self, data, tokens, known):
        seq = self.some(data)
        if seq is not None:
            self.it.update(seq, tokens, known > 0)

    @rule(data=st.data(), name=st.sampled_from(["fork", "finish"]))
    def fork_or_finish(self, data, name):
        seq = self.some(data)
        if seq is not None:
            getattr(self.it, name)(seq)

    @rule(data=st.data(), name=st.sampled_from(["truncate", "give_up"]))
    def truncate_or_give_up(self, data, name):
        seq = self.some(data)
        if seq is not None:
            getattr(self.it, name)(seq, data.draw(st.integers(0, len(self.it.texts[seq]) + 1)))

    @invariant()
    def all_is_as_the_dict_says(self):
        self.it.check()


TestPagedAgainstDict = PagedAgainstDict.TestCase
TestPagedAgainstDict.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 7, 8, 13, 16])
def test_a_thousand_random_calls(block_size):
    """A long life: half of the prompts begin as one of four texts, so prefixes are found, shared, cut and evicted."""
    rng, it = np.random.default_rng(block_size), DictOfArrays(block_size, 60 // block_size + 6, 5)
    starts = [rng.integers(0, 2, 40).tolist() for _ in range(4)]
    for _ in range(1000):
        seq = int(rng.choice(list(it.texts))) if it.texts else None
        if seq is None or rng.random() < 0.2:
            prompt = starts[rng.integers(4)][: rng.integers(1, 40)] + rng.integers(0, 2, rng.integers(1, 4)).tolist()
            seq = it.add(prompt)
            if seq is not None:
                it.update(seq, prompt[len(it.texts[seq]) :], known=True)
        else:
            call = rng.choice(["update", "update", "fork", "finish", "truncate", "give_up"])
            if call == "update":
                it.update(seq, rng.integers(0, 2, rng.integers(1, 8)).tolist(), known=rng.random() < 0.9)
            elif call in ("truncate", "give_up"):
                getattr(it, call)(seq, int(rng.integers(0, len(it.texts[seq]) + 2)))
            else:
                getattr(it, call)(seq)
        it.check()
    assert it.found > 200, "the run must find prefixes to say something about them"
    for seq in list(it.texts):
        it.finish(seq)
    assert it.cache.num_free() == it.num_blocks


# ---- a model on rows of a pool


def one_pass(model, pool, seqs, new):
    """Run some tokens of each sequence as one ragged batch; the logits of each row's last one."""
    counts = [len(tokens) for tokens in new]
    ids = np.zeros((len(seqs), max(counts)), int)
    for row, tokens in enumerate(new):
        ids[row, : len(tokens)] = tokens
    with no_grad(), pool.rows(seqs, new).attached_to(model, n_new=counts):
        return model(ids).numpy()[np.arange(len(seqs)), np.array(counts) - 1]


@settings(max_examples=25, deadline=None)
@given(data=st.data(), block_size=st.integers(1, 9), num_texts=st.integers(1, 4))
def test_ragged_texts_that_arrive_one_by_one_in_any_chunks_equal_the_uncached_run(data, block_size, num_texts):
    model, rng = random_gpt(seed=1), np.random.default_rng(data.draw(st.integers(0, 9)))
    start = rng.integers(1, 64, data.draw(st.integers(0, 12))).tolist()
    waiting = [start + rng.integers(1, 64, data.draw(st.integers(1, 8))).tolist() for _ in range(num_texts)]
    pool, texts, logits = PagedModelKVCache(100, block_size, 3, 2, 8, max_seqs=num_texts), {}, {}
    while waiting or len(logits) < num_texts:
        if waiting and (len(logits) == len(texts) or data.draw(st.booleans())):
            text = waiting.pop()
            texts[pool.add_sequence(text)] = text
        todo = {seq: text[pool.seq_len(seq) :] for seq, text in texts.items() if seq not in logits}
        new = [rest[: data.draw(st.integers(1 - bool(row), 5))] for row, rest in enumerate(todo.values())]
        for seq, rest, tokens, last in zip(todo, todo.values(), new, one_pass(model, pool, list(todo), new)):
            if tokens == rest:
                logits[seq] = last
    for seq, text in texts.items():
        with no_grad():
            expected = model(np.array([text])).numpy()[0, -1]
        assert pool.seq_len(seq) == len(text) and logits[seq].shape == expected.shape
        np.testing.assert_allclose(logits[seq], expected, atol=1e-4)


@pytest.mark.parametrize("block_size", [1, 2, 5, 16])
def test_every_chunking_gives_the_logits_of_the_uncached_run(block_size):
    model, ids = random_gpt(), np.random.default_rng(1).integers(0, 64, (2, 6))
    with no_grad():
        expected = model(ids).numpy()
        cache = paged_kv_cache(2, 6, 3, 2, 8, block_size=block_size)
        for cuts in itertools.product([False, True], repeat=5):
            edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), 6]
            cache.reset()
            got = np.concatenate([model(ids[:, a:b], cache=cache).numpy() for a, b in zip(edges, edges[1:])], axis=1)
            assert got.shape == expected.shape
            np.testing.assert_allclose(got, expected, atol=1e-4)
            assert cache.seq_lens == [6, 6]
